"""A model behind an OpenAI-compatible endpoint.

    OPENAI_API_KEY=… python -m tools eval --backend openai --base-url https://api.openai.com/v1 \
        --model-name gpt-4o --tasks fpb --limit 200

The official client retries after a 429 (as long as Retry-After says), a 5xx, a timeout and a lost
connection. lm-eval's own class takes a reply without an answer for an empty answer, which would be
scored as wrong. Here such a reply, or a cut answer, is asked for again; if that does not help, the
job stops.
"""

import asyncio
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from lm_eval.api.model import LM

from evals.answers import Progress
from tools import runs
from tools.common import JobFailed, WrongInput
from tools.prompts import write_arguments

CONCURRENT = 8  # requests under way
RETRIES = 12  # of a request: a minute of back-off, enough for a limit by the minute
TIMEOUT = 120.0  # seconds without a byte
# Reasons to end an answer. Together has `eos` for `stop`; `length` is the task's answer budget.
ENDS = ("stop", "eos", "length", "tool_calls")
REFUSED = (400, 413, 422, 451)  # status of a row that is not answered: filtered, or too long
FILTERED = 3  # tries of a row whose answer is filtered
# If so many rows are refused and none is answered, the request is wrong and not the rows.
ALL = 16
KEPT = "what was answered is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint; scored as a `Subject` is."""

    base_url: str  # may hold a password
    model: str
    prompt_format: str
    shots: int = 0  # worked examples in each prompt

    sides = ("base",)
    task = None
    options = None

    @property
    def url(self) -> str:
        """The base URL without a password."""
        parts = urlsplit(self.base_url)
        address = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{address}{parts.path}".rstrip("/")

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def file(self, side: str, dataset: str, limit: int | None) -> Path:
        folder = re.sub(r"[^\w.-]+", "-", self.model).strip(".-") or "model"
        form = f"_{self.prompt_format}" if self.prompt_format != "chat" else ""
        folder += f"_{self.shots}_shots" if self.shots else ""
        name = f"{dataset}{form}{f'_sample{limit}' if limit else ''}.json"
        return runs.RUNS / "endpoint" / folder / "evals" / name

    def identity(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "base_model": self.model,
            "precision": "as served",
            "prompt_format": self.prompt_format,
        }

    @property
    def client_options(self) -> dict[str, Any]:
        # A local server needs no key, but the client does.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return {
            "api_key": key,
            "base_url": self.base_url,
            "max_retries": RETRIES,
            "timeout": TIMEOUT,
        }


def find_endpoint(base_url: str | None, model: str | None, form: str | None) -> Endpoint:
    """The endpoint at a URL; without a model's name, of the only model that it serves."""
    try:
        parts = urlsplit(base_url or "")
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not base_url or not is_valid or parts.query or parts.fragment:
        raise WrongInput(
            "BACKEND=openai needs BASE_URL=https://host/v1, what stands before /chat/completions"
        )
    endpoint = Endpoint(base_url, model or "", form or "chat")
    if model:
        return endpoint
    try:
        with openai.OpenAI(**endpoint.client_options) as client:
            served = [entry.id for entry in client.models.list()]
    except openai.OpenAIError as error:
        raise _explain_failure(endpoint, error) from None
    except (ValueError, TypeError, AttributeError):
        raise JobFailed(f"{endpoint.url} lists no models, so MODEL_NAME=… is needed") from None
    if len(served) != 1:
        names = _hide_key(", ".join(served[:8]) or "none")
        raise WrongInput(f"MODEL_NAME=… is needed; {endpoint.url} serves {names}")
    return Endpoint(base_url, served[0], endpoint.prompt_format)


def _hide_key(text: str) -> str:
    """A server's text without the key, which some servers repeat."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) >= 8 else text


def _explain_failure(endpoint: Endpoint, error: openai.OpenAIError) -> Exception:
    """The one-line error for what the client raised after its last try."""
    url = endpoint.url
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return WrongInput(f"{url} refuses the key in OPENAI_API_KEY, or there is none")
    if not isinstance(error, openai.APIStatusError):
        why = "timed out" if isinstance(error, openai.APITimeoutError) else "cannot be reached"
        return JobFailed(f"{url} {why}, after {RETRIES} retries; {KEPT}")
    message = _hide_key(error.message)[:200]
    if isinstance(error, openai.NotFoundError):
        return WrongInput(f'{url} has no "{endpoint.model}", or BASE_URL is wrong: {message}')
    return JobFailed(f"{url} answers {error.status_code}: {message}; {KEPT}")


def read_reply(reply: Any) -> tuple[str | None, str]:
    """(answer, reason why it ended) of a reply; the answer is None where it is missing or cut."""
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
    # Empty at the end of the budget: the model spent it on reasoning that is not shown.
    is_whole = end in ENDS and isinstance(text, str) and (text or end != "length")
    return text if is_whole else None, str(end or "")


class RefusedRow(Exception):
    """An endpoint does not answer a row; says why."""


class RemoteModel(Progress, LM):  # type: ignore[misc]
    """An lm-eval model that asks an endpoint, CONCURRENT requests at a time.

    The format `chat` sends a row's turns, which the server puts into the model's template; the
    others send the prompt as it stands, as a completion. `refusals`: {prompt: reason}.
    """

    tokenizer_name = "the endpoint's"

    def __init__(self, endpoint: Endpoint, label: str, rows: int) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.refusals: dict[str, str] = {}
        self.answered = 0
        self.expect(label, rows)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        try:
            return asyncio.run(self.answer_all(requests))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def answer_all(self, requests: list[Any]) -> list[str]:
        answers = [""] * len(requests)
        queue = iter(enumerate(requests))

        async def work(client: openai.AsyncOpenAI) -> None:
            for number, request in queue:
                answers[number] = await self.answer(client, request, len(requests))
                self.cache_hook.add_partial("generate_until", request.args, answers[number])
                self.progress(1)

        client = openai.AsyncOpenAI(**self.endpoint.client_options)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(work(client))
        return answers

    async def answer(self, client: openai.AsyncOpenAI, request: Any, rows: int) -> str:
        """The answer to a row; empty where the endpoint refuses it."""
        text, settings = request.args
        try:
            answer = await self.ask_until_whole(client, text, settings)
        except RefusedRow as refusal:
            self.refusals[text] = str(refusal)
            if not self.answered and len(self.refusals) >= min(ALL, rows):
                raise JobFailed(f"{self.endpoint.url} refuses every row: {refusal}") from None
            return ""
        self.answered += 1
        return _hide_key(answer)

    async def ask_until_whole(
        self, client: openai.AsyncOpenAI, text: str, settings: dict[str, Any]
    ) -> str:
        end = ""
        for attempt in range(RETRIES + 1):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8))
            answer, end = read_reply(await self.ask(client, text, settings))
            if answer is not None:
                return answer
            if end == "content_filter" and attempt + 1 >= min(FILTERED, RETRIES + 1):
                raise RefusedRow("finish_reason: content_filter")
        raise JobFailed(
            f"{self.endpoint.url} gave no whole answer in {RETRIES + 1} tries (finish_reason: "
            f"{_hide_key(end or 'none')[:40]}); {KEPT}"
        )

    async def ask(self, client: openai.AsyncOpenAI, text: str, settings: dict[str, Any]) -> Any:
        """One reply; None where its JSON is cut. Raises RefusedRow."""
        options: dict[str, Any] = {
            "model": self.endpoint.model,
            "temperature": 0,
            "max_tokens": settings["max_gen_toks"],
        }
        if settings.get("until"):
            options["stop"] = settings["until"]
        try:
            if self.endpoint.prompt_format != "chat":
                return await client.completions.create(prompt=text, **options)
            messages, tools = self.conversation(text)
            options |= {"tools": tools} if tools else {}
            turns: Any = write_arguments(messages)
            return await client.chat.completions.create(messages=turns, **options)
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code in REFUSED:
                reason = " ".join(_hide_key(error.message).split())[:200]
                raise RefusedRow(reason or "no reason") from None
            raise _explain_failure(self.endpoint, error) from None
        except ValueError:
            return None

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("an endpoint gives no probabilities of a prompt")

    loglikelihood_rolling = loglikelihood
