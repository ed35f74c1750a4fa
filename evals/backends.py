"""What answers: transformers here, vLLM on a GPU, or a model behind an OpenAI-compatible endpoint.

    python -m tools eval sentiment_r4 --backend vllm
    OPENAI_API_KEY=… python -m tools eval --backend openai --base-url https://api.openai.com/v1 \
        --model-name gpt-4o --tasks fpb --limit 200

Each backend takes what is scored and returns a function (side, label, rows) → context manager of
an lm-eval model.

An endpoint is asked by the official client: it tries again after a 429 (as long as Retry-After
says), a 5xx, a timeout and a connection that is lost. lm-eval's own class for endpoints takes a
reply without an answer for an empty answer, which would be scored as wrong. Here such a reply, and
an answer that did not end, is asked for again, and where that does not help, the job stops.
"""

import asyncio
import copy
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tools import adapters, models, prompts, runs
from tools.common import ROOT, JobFailed, WrongInput
from tools.prompts import changes_tokenizer
from tools.subjects import Subject

KEPT = 256  # rows that vLLM answers before they are kept
LONGEST = 16384  # tokens that vLLM makes room for
CONCURRENT = 8  # requests under way
RETRIES = 12  # of a request: a minute of back-off, enough for a limit by the minute
TIMEOUT = 120.0  # seconds without a byte
# Together says `eos` for `stop`. `length` is the task's answer budget, which is meant.
ENDS = ("stop", "eos", "length", "tool_calls")
# What an endpoint says of a row that it does not answer: a filter, or a prompt that is too long.
REFUSED = (400, 413, 422, 451)
FILTERED = 3  # tries of a row whose answer is filtered
# Rows that are all refused, none answered: then it is the request that is wrong, not the rows.
ALL = 16

Models = Callable[[str, str, int], Any]  # (side, label, rows) → context manager of an LM

# ---- here


def transformers(subject: Subject) -> Models:
    from evals.model import Model

    model, tokenizer = models.load(subject.config, subject.adapter)

    @contextmanager
    def of_side(side: str, label: str, rows: int) -> Iterator[Any]:
        adapted = side == "adapter" or not subject.adapter
        with nullcontext() if adapted else model.disable_adapter():
            yield Model(model, tokenizer, label, rows)

    return of_side


# ---- vLLM


def vllm_arguments(subject: Subject) -> dict[str, Any]:
    """What lm-eval's vLLM class is made with: the quantized base and the adapter as LoRA module."""
    from transformers import AutoConfig

    config, precision = subject.config, models.precision(subject.config)
    if precision in ("int8", "fp4"):
        raise WrongInput(f"vLLM quantizes no base to {precision}; BACKEND=transformers scores it")
    base = config["base_model"]
    base = str(ROOT / base) if (ROOT / base).is_dir() else base
    length = AutoConfig.from_pretrained(base).get_text_config(decoder=True).max_position_embeddings
    arguments = {
        "pretrained": base,
        "dtype": config.get("dtype") or "bfloat16",
        "max_model_len": min(length, LONGEST),
        "batch_size": KEPT,
    }
    if precision == "nf4":  # bitsandbytes in vLLM: NF4 with double quantization
        arguments["quantization"] = "bitsandbytes"
    if subject.adapter:
        plain, _ = adapters.read(subject.adapter)
        if changes_tokenizer(config):
            arguments["tokenizer"] = str(subject.adapter)
        rank = adapters.vllm_rank(plain.rank)
        if rank is None:
            raise WrongInput(
                f"vLLM takes no rank over {adapters.RANKS[-1]}, and the adapter has {plain.rank}; "
                "BACKEND=transformers scores it"
            )
        unusual = "DoRA" if plain.dora else models.check_adapter(config, subject.adapter).unusual
        if unusual:
            raise WrongInput(f"vLLM has no {unusual}; BACKEND=transformers scores this adapter")
        arguments |= {"lora_local_path": str(subject.adapter), "max_lora_rank": rank}
    return arguments


def vllm(subject: Subject) -> Models:
    import torch

    arguments = vllm_arguments(subject)
    if not (importlib.util.find_spec("vllm") and torch.cuda.is_available()):
        raise WrongInput("BACKEND=vllm needs a GPU and vLLM (`pip install vllm`)")
    from lm_eval.models.vllm_causallms import VLLM

    loaded = VLLM(**arguments)

    @contextmanager
    def of_side(side: str, label: str, rows: int) -> Iterator[Any]:
        # The engine is shared; what `Prompts` and `Answers` attach belongs to one score.
        lm = copy.copy(loaded)
        if side == "base":
            lm.lora_request = None
        yield lm

    return of_side


# ---- endpoints


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint, as what is scored."""

    base_url: str  # as given: it may hold a password
    model: str
    prompt_format: str

    sides = ("base",)
    task = None
    options = None

    @property
    def url(self) -> str:
        """The base URL as it may be shown and kept."""
        parts = urlsplit(self.base_url)
        address = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{address}{parts.path}".rstrip("/")

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def file(self, side: str, dataset: str, limit: int | None) -> Path:
        folder = re.sub(r"[^\w.-]+", "-", self.model).strip(".-") or "model"
        parts = [dataset, self.prompt_format if self.prompt_format != "chat" else ""]
        parts += [f"sample{limit}" if limit else ""]
        name = "_".join(filter(None, parts)) + ".json"
        return runs.RUNS / "endpoint" / folder / "evals" / name

    def identity(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "base_model": self.model,
            "precision": "as served",
            "prompt_format": self.prompt_format,
        }


def endpoint(base_url: str | None, model: str | None, form: str | None) -> Endpoint:
    """The endpoint that is asked for; where no model is named, the only one that it serves."""
    base_url = base_url or ""
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise WrongInput(
            "BACKEND=openai needs BASE_URL=https://host/v1, what stands before /chat/completions"
        )
    found = Endpoint(base_url, model or "", form or "chat")
    if model:
        return found
    import openai

    try:
        with openai.OpenAI(**_client(base_url)) as client:
            served = [one.id for one in client.models.list()]
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise _stopped(found, error, "lists no models, so MODEL_NAME=… is needed") from None
    if len(served) != 1:
        known = ", ".join(served[:8]) or "none"
        raise WrongInput(f"MODEL_NAME=… is needed; {found.url} serves {hidden(known)}")
    return Endpoint(base_url, served[0], found.prompt_format)


def _client(base_url: str) -> dict[str, Any]:
    # A local server needs no key, and the client wants one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return {"api_key": key, "base_url": base_url, "max_retries": RETRIES, "timeout": TIMEOUT}


def hidden(text: str) -> str:
    """A server's text without the key, which some repeat."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) >= 8 else text


def _stopped(asked: Endpoint, error: Exception, otherwise: str) -> Exception:
    """The one line for what the client raised after its last try."""
    import openai

    if not isinstance(error, openai.OpenAIError):
        return JobFailed(f"{asked.url} {otherwise}")
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return WrongInput(f"{asked.url} refuses the key in OPENAI_API_KEY, or there is none")
    kept = "what was answered is kept, and the same command goes on from there"
    if not isinstance(error, openai.APIStatusError):
        why = "timed out" if isinstance(error, openai.APITimeoutError) else "cannot be reached"
        return JobFailed(f"{asked.url} {why}, after {RETRIES} retries; {kept}")
    said = hidden(error.message)[:200]
    if isinstance(error, openai.NotFoundError):
        return WrongInput(f'{asked.url} has no "{asked.model}", or BASE_URL is wrong: {said}')
    return JobFailed(f"{asked.url} answers {error.status_code}: {said}; {kept}")


def whole(reply: Any) -> str | None:
    """The answer in a reply; None where there is none or it is cut."""
    choice = next(iter(getattr(reply, "choices", None) or []), None)
    end = getattr(choice, "finish_reason", None)
    # A completion has a text, a chat a message.
    text = getattr(choice, "text", None)
    if text is None:
        message = getattr(choice, "message", None)
        text = getattr(message, "content", None)
        if calls := getattr(message, "tool_calls", None):
            written = json.dumps([call.model_dump(mode="json") for call in calls])
            text = "\n".join(filter(None, [text, written]))
    # Nothing, at the budget's end: the model spent it on reasoning that is not shown.
    if end not in ENDS or not isinstance(text, str) or (end == "length" and not text):
        return None
    return text


def _end(reply: Any) -> str:
    """Why an answer ended."""
    choice = next(iter(getattr(reply, "choices", None) or []), None)
    return str(getattr(choice, "finish_reason", None) or "")


class Refusal(Exception):
    """An endpoint does not answer a row; says why."""


def openai(asked: Endpoint) -> Models:
    from lm_eval.api.model import LM
    from openai import APIStatusError, AsyncOpenAI, OpenAIError

    from evals.answers import Progress

    class Remote(Progress, LM):
        """An lm-eval model that asks an endpoint, CONCURRENT requests at a time.

        `chat` is a list of turns, which the server puts into the model's template; every other
        format is a completion of the prompt as it stands.
        """

        tokenizer_name = "the endpoint's"

        def __init__(self) -> None:
            super().__init__()
            self.refusals: dict[str, str] = {}  # {prompt: reason}
            self.answered = 0

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return chat_history[-1]["content"]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            try:
                return asyncio.run(self._all(requests))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

        async def _all(self, requests: list[Any]) -> list[str]:
            answers = [""] * len(requests)
            left = iter(enumerate(requests))  # all workers take from it

            async def work(client: AsyncOpenAI) -> None:
                for number, request in left:
                    text, settings = request.args
                    try:
                        answers[number] = hidden(await self._one(client, text, settings))
                        self.answered += 1
                    except Refusal as refusal:
                        self.refusals[text] = str(refusal)
                        if not self.answered and len(self.refusals) >= min(ALL, len(requests)):
                            raise JobFailed(f"{asked.url} refuses every row: {refusal}") from None
                    self.cache_hook.add_partial("generate_until", request.args, answers[number])
                    self.progress(1)

            async with (
                AsyncOpenAI(**_client(asked.base_url)) as client,
                asyncio.TaskGroup() as all_,
            ):
                for _ in range(CONCURRENT):
                    all_.create_task(work(client))
            return answers

        async def _one(self, client: AsyncOpenAI, text: str, settings: dict[str, Any]) -> str:
            told: dict[str, Any] = {"model": asked.model, "temperature": 0}
            told |= {"max_tokens": settings["max_gen_toks"]}
            if settings.get("until"):
                told["stop"] = settings["until"]
            reply: Any = None
            for attempt in range(RETRIES + 1):
                if attempt:
                    await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8))
                try:
                    if asked.prompt_format == "chat":
                        turns: Any
                        turns, tools = self.conversation(text)
                        told |= {"tools": tools} if tools else {}
                        turns = prompts.write_arguments(turns)
                        reply = await client.chat.completions.create(messages=turns, **told)
                    else:
                        reply = await client.completions.create(prompt=text, **told)
                except OpenAIError as error:
                    if isinstance(error, APIStatusError) and error.status_code in REFUSED:
                        reason = " ".join(hidden(error.message).split())[:200]
                        raise Refusal(reason or "no reason") from None
                    raise _stopped(asked, error, "") from None
                except ValueError:  # JSON that is cut
                    reply = None
                if (answer := whole(reply)) is not None:
                    return answer
                if _end(reply) == "content_filter" and attempt + 1 >= min(FILTERED, RETRIES + 1):
                    raise Refusal("finish_reason: content_filter")
            end = hidden(_end(reply) or "none")[:40]
            raise JobFailed(
                f"{asked.url} gave no whole answer in {RETRIES + 1} tries (finish_reason: {end}); "
                "what was answered is kept, and the same command goes on from there"
            )

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError("an endpoint gives no probabilities of a prompt")

        loglikelihood_rolling = loglikelihood

    @contextmanager
    def of_side(side: str, label: str, rows: int) -> Iterator[Any]:
        lm = Remote()
        lm.expect(label, rows)
        yield lm

    return of_side


BACKENDS: dict[str, Callable[[Any], Models]] = {
    "transformers": transformers,
    "vllm": vllm,
    "openai": openai,
}
