"""A model behind an OpenAI-compatible endpoint.

    OPENAI_API_KEY=… python -m tools eval --backend openai --base-url https://api.openai.com/v1 \
        --model-name gpt-4o --tasks fpb --limit 200

The official client retries after a 429 (as long as Retry-After says), a 5xx, a timeout and a lost
connection. lm-eval's own class takes a reply without an answer for an empty answer, which would be
scored as wrong. Here such a reply, or a cut answer, is asked for again; if that does not help, the
job stops.

    … --reasoning-tokens 4000 --price-in 1.25 --price-out 10 --max-cost 5
"""

import asyncio
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from lm_eval.api.model import LM

from evals.answers import Progress
from evals.choices import request_choice
from tools import runs
from tools.common import JobFailed, WrongInput
from tools.prompts import write_arguments
from tools.subjects import CONSTRAINED

CONCURRENT = 8  # requests under way
RETRIES = 12  # of a request: a minute of back-off, enough for a limit by the minute
TIMEOUT = 120.0  # seconds without a byte
# Reasons to end an answer. Together has `eos` for `stop`; `length` is the task's answer budget.
ENDS = ("stop", "eos", "length", "tool_calls")
REFUSED = (400, 413, 422, 451)  # status of a row that is not answered: filtered, or too long
FILTERED = 3  # tries of a row whose answer is filtered
# If so many rows are refused and none is answered, the request is wrong and not the rows.
ALL = 16
UNSUPPORTED = ("max_tokens", "temperature")  # parameters that reasoning models refuse
MILLION = 1_000_000
KEPT = "what was answered is kept, and the same command continues from there"


@dataclass(frozen=True)
class Limits:
    """How many requests are under way, what they cost, and when a command stops asking."""

    concurrency: int | None = None  # CONCURRENT where there is none
    price_in: float | None = None  # USD for a million tokens of prompts
    price_out: float | None = None  # USD for a million tokens of answers, reasoning included
    max_cost: float | None = None  # USD
    max_total_tokens: int | None = None  # of prompts and answers

    def check(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            raise WrongInput("PRICE_IN and PRICE_OUT go together: USD for a million tokens")
        if self.max_cost is not None and self.price_in is None:
            raise WrongInput("MAX_COST needs PRICE_IN and PRICE_OUT: USD for a million tokens")

    @property
    def is_budget(self) -> bool:
        return self.max_cost is not None or self.max_total_tokens is not None

    def compute_cost(self, usage: "Usage") -> float | None:
        """USD; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (usage.tokens_in * self.price_in + usage.tokens_out * self.price_out) / MILLION


@dataclass
class Usage:
    """Tokens of replies, as the endpoint reports them; `unreported` counts replies without any."""

    tokens_in: int = 0
    tokens_out: int = 0
    replies: int = 0
    unreported: int = 0

    def add(self, other: "Usage") -> None:
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.replies += other.replies
        self.unreported += other.unreported

    def describe(self, limits: Limits) -> str:
        text = f"{self.replies:,} replies, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        cost = limits.compute_cost(self)
        text += f", {cost:.4f} USD" if cost is not None else ""
        return text + (f"; {self.unreported:,} without a token count" if self.unreported else "")


@dataclass
class Spending:
    """What a command has spent, and whether it may ask for more."""

    limits: Limits
    total: Usage = field(default_factory=Usage)
    under_way: int = 0  # requests without a reply
    largest: Usage = field(default_factory=Usage)  # the most tokens of a single reply

    def add(self, usage: Usage) -> None:
        self.total.add(usage)
        self.largest.tokens_in = max(self.largest.tokens_in, usage.tokens_in)
        self.largest.tokens_out = max(self.largest.tokens_out, usage.tokens_out)

    @property
    def is_waiting(self) -> bool:
        """Whether the next request has to wait for those under way.

        The first reply tells what a request costs.
        """
        is_blind = self.limits.is_budget and not self.total.replies
        return bool(self.under_way and (is_blind or self.explain_stop(1)))

    def explain_stop(self, more: int) -> str:
        """Why `more` requests must not be sent; empty where they may.

        Each of them, and of those under way, may cost as much as the dearest so far.
        """
        limits, requests = self.limits, self.under_way + more
        expected = Usage(
            self.total.tokens_in + requests * self.largest.tokens_in,
            self.total.tokens_out + requests * self.largest.tokens_out,
        )
        cost, tokens = limits.compute_cost(expected), expected.tokens_in + expected.tokens_out
        spent = self.total.describe(limits)
        if limits.max_cost is not None and cost is not None and cost > limits.max_cost:
            return f"MAX_COST={limits.max_cost:g} is reached ({spent})"
        if limits.max_total_tokens is not None and tokens > limits.max_total_tokens:
            return f"MAX_TOTAL_TOKENS={limits.max_total_tokens} is reached ({spent})"
        return ""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint; scored as a `Subject` is."""

    base_url: str  # may hold a password
    model: str
    prompt_format: str
    shots: int = 0  # worked examples in each prompt
    constrained: bool = False  # answers can only be labels
    reasoning_tokens: int | None = None  # that the model may spend beside the answer
    limits: Limits = Limits()

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
        folder += f"_{self.shots}_shots" if self.shots else ""
        parts = [
            dataset,
            self.prompt_format if self.prompt_format != "chat" else "",
            f"reasoning{self.reasoning_tokens}" if self.reasoning_tokens else "",
            CONSTRAINED if self.constrained else "",
            f"sample{limit}" if limit else "",
        ]
        name = "_".join(filter(None, parts)) + ".json"
        return runs.RUNS / "endpoint" / folder / "evals" / name

    def identity(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "base_model": self.model,
            "precision": "as served",
            "prompt_format": self.prompt_format,
            **({"reasoning_tokens": self.reasoning_tokens} if self.reasoning_tokens else {}),
        }

    def summarize_usage(self, usages: Iterable[dict[str, int]]) -> dict[str, Any]:
        """What answers cost: their tokens, and USD where there are prices."""
        total = Usage()
        for usage in usages:
            total.add(Usage(**usage))
        cost = self.limits.compute_cost(total)
        prices = {"price_in": self.limits.price_in, "price_out": self.limits.price_out}
        return asdict(total) | ({"usd": cost, **prices} if cost is not None else {})

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


def check_endpoint(endpoint: Endpoint) -> Endpoint:
    """An endpoint that can be asked; one without a model's name gets the only model served."""
    try:
        parts = urlsplit(endpoint.base_url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or parts.query or parts.fragment:
        raise WrongInput(
            "BACKEND=openai needs BASE_URL=https://host/v1, the part before /chat/completions"
        )
    if endpoint.reasoning_tokens and endpoint.prompt_format != "chat":
        raise WrongInput("REASONING_TOKENS goes with PROMPT_FORMAT=chat: completions do not reason")
    endpoint.limits.check()
    if endpoint.model:
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
    return replace(endpoint, model=served[0])


def _hide_key(text: str) -> str:
    """A server's text without the key, which some servers repeat."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) >= 8 else text


def _shorten(text: str) -> str:
    """A server's text in one line."""
    return " ".join(_hide_key(text).split())[:200]


def _refuses_parameters(error: openai.APIStatusError) -> bool:
    """Whether an endpoint refuses a parameter that reasoning models do not take."""
    return error.param in UNSUPPORTED or "max_completion_tokens" in error.message


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


def read_refusal(reply: Any) -> str:
    """The text with which a model refuses in place of an answer; empty where there is none."""
    choice = next(iter(getattr(reply, "choices", None) or []), None)
    refusal = getattr(getattr(choice, "message", None), "refusal", None)
    return refusal if isinstance(refusal, str) else ""


def read_usage(reply: Any) -> Usage:
    """The tokens of a reply. Some endpoints count those of reasoning in the total alone."""
    usage = getattr(reply, "usage", None)
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    tokens_in, tokens_out, total = (getattr(usage, name, None) for name in names)
    if not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
        return Usage(replies=1, unreported=1)
    if isinstance(total, int):
        tokens_out = max(tokens_out, total - tokens_in)
    return Usage(tokens_in, tokens_out, replies=1)


class RefusedRow(Exception):
    """An endpoint does not answer a row; says why."""


class RemoteModel(Progress, LM):  # type: ignore[misc]
    """An lm-eval model that asks an endpoint, several requests at a time.

    The format `chat` sends a row's turns, which the server puts into the model's template; the
    others send the prompt as it stands, as a completion. Of each prompt, `refusals` holds why it
    got no answer and `usage` what it cost.
    """

    tokenizer_name = "the endpoint's"

    def __init__(self, endpoint: Endpoint, label: str, rows: int, spending: Spending) -> None:
        super().__init__()
        self.endpoint, self.spending = endpoint, spending
        self.choices: Sequence[str] = ()  # the only answers, where there are some
        self.refusals: dict[str, str] = {}
        self.usage: dict[str, Usage] = {}
        self.answered = 0
        self.expect(label, rows)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        try:
            return asyncio.run(self.answer_all(requests))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def answer_all(self, requests: list[Any]) -> list[str]:
        answers = [""] * len(requests)
        queue, replied, stop = iter(enumerate(requests)), asyncio.Condition(), ""

        async def work(client: openai.AsyncOpenAI) -> None:
            nonlocal stop
            for number, request in queue:
                async with replied:
                    # What is under way may cost less than it might.
                    await replied.wait_for(lambda: not self.spending.is_waiting)
                    if reason := self.spending.explain_stop(1):
                        stop = reason
                        return
                    self.spending.under_way += 1
                try:
                    answers[number] = await self.answer(client, request, len(requests))
                finally:
                    self.spending.under_way -= 1
                self.cache_hook.add_partial("generate_until", request.args, answers[number])
                self.progress(1)
                async with replied:
                    replied.notify_all()

        client = openai.AsyncOpenAI(**self.endpoint.client_options)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(self.endpoint.limits.concurrency or CONCURRENT):
                group.create_task(work(client))
        if stop:
            raise JobFailed(f"{stop}; {KEPT}, with the same budget again")
        return answers

    async def answer(self, client: openai.AsyncOpenAI, request: Any, rows: int) -> str:
        """The answer to a row; empty where the endpoint refuses it."""
        text, settings = request.args
        try:
            answer = _hide_key(await self.ask_until_whole(client, text, settings))
        except RefusedRow as refusal:
            self.refusals[text] = str(refusal)
            if not self.answered and len(self.refusals) >= min(ALL, rows):
                raise JobFailed(f"{self.endpoint.url} refuses every row: {refusal}") from None
            return ""
        if self.choices and answer.strip() not in self.choices:
            raise WrongInput(
                f"CONSTRAIN=1: {self.endpoint.url} ignores structured_outputs, which vLLM's server "
                f"takes; it answers {answer[:40]!r}, which is no label"
            )
        self.answered += 1
        return answer

    async def ask_until_whole(
        self, client: openai.AsyncOpenAI, text: str, settings: dict[str, Any]
    ) -> str:
        end = ""
        for attempt in range(RETRIES + 1):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8))
                if reason := self.spending.explain_stop(0):
                    raise JobFailed(f"{reason}; {KEPT}, with the same budget again")
            reply = await self.ask(client, text, settings)
            self.count(text, read_usage(reply))
            if refusal := read_refusal(reply):
                raise RefusedRow(_shorten(f"refusal: {refusal}"))
            answer, end = read_reply(reply)
            if answer is not None:
                return answer
            if end == "content_filter" and attempt + 1 >= min(FILTERED, RETRIES + 1):
                raise RefusedRow("finish_reason: content_filter")
            if end == "length" and self.endpoint.reasoning_tokens:
                raise RefusedRow("finish_reason: length, with nothing but reasoning")
        hint = "; a reasoning model needs REASONING_TOKENS=4000" if end == "length" else ""
        raise JobFailed(
            f"{self.endpoint.url} gave no whole answer in {RETRIES + 1} tries (finish_reason: "
            f"{_hide_key(end or 'none')[:40]}{hint}); {KEPT}"
        )

    def count(self, text: str, usage: Usage) -> None:
        """Adds what a reply to a prompt has cost."""
        self.spending.add(usage)
        self.usage.setdefault(text, Usage()).add(usage)
        if usage.unreported and self.spending.limits.is_budget:
            raise JobFailed(
                f"{self.endpoint.url} reports no tokens, so MAX_COST and MAX_TOTAL_TOKENS cannot "
                f"be kept; {KEPT}"
            )

    def list_options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The fields of a request beside its prompt."""
        budget, reasoning = settings["max_gen_toks"], self.endpoint.reasoning_tokens
        options: dict[str, Any] = {"model": self.endpoint.model}
        if reasoning:  # such models take no temperature
            options["max_completion_tokens"] = budget + reasoning
        else:
            options |= {"temperature": 0, "max_tokens": budget}
        if settings.get("until"):
            options["stop"] = settings["until"]
        if self.choices:
            options["extra_body"] = request_choice(self.choices)
        return options

    async def ask(self, client: openai.AsyncOpenAI, text: str, settings: dict[str, Any]) -> Any:
        """One reply; None where its JSON is cut. Raises RefusedRow."""
        options = self.list_options(settings)
        try:
            if self.endpoint.prompt_format != "chat":
                return await client.completions.create(prompt=text, **options)
            messages, tools = self.conversation(text)
            options |= {"tools": tools} if tools else {}
            turns: Any = write_arguments(messages)
            return await client.chat.completions.create(messages=turns, **options)
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code in REFUSED:
                if not self.endpoint.reasoning_tokens and _refuses_parameters(error):
                    raise WrongInput(
                        f'"{self.endpoint.model}" takes no max_tokens or no temperature, as '
                        f"reasoning models do; REASONING_TOKENS=4000 lets it reason"
                    ) from None
                raise RefusedRow(_shorten(error.message) or "no reason") from None
            raise _explain_failure(self.endpoint, error) from None
        except ValueError:
            return None

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("an endpoint gives no probabilities of a prompt")

    loglikelihood_rolling = loglikelihood
