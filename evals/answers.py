"""Prompts that fit, and answers that are saved batch by batch, for any of lm-eval's models."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools import prompts
from tools.common import WrongInput, atomic
from tools.prompts import FORMATS

GAP = "\n[…]\n"  # stands where a prompt was cut
Turn = dict[str, Any]  # {"role", "content"}
Turns = list[Turn]


class Prompts:
    """Renders prompts in one format, behind the worked `examples`: chat rows, none by default.

    `cut` counts the tokens that each prompt lost, `dropped` the examples: {prompt: count}. `rows`
    holds the rows of several turns by the text that lm-eval has of them; any other text is the
    content of a user's turn.
    """

    def __init__(
        self,
        form: str,
        options: dict[str, Any] | None = None,
        examples: Sequence[dict[str, Any]] = (),
    ):
        self.form, self.options, self.examples = form, options, list(examples)
        self.cut: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.histories: dict[str, Turns] = {}  # of an endpoint's prompts

    def conversation(
        self, content: str, examples: Sequence[Turn] = ()
    ) -> tuple[Turns, list[Any] | None]:
        """(turns before the answer, tools) of a text of lm-eval's, with the examples' turns."""
        if content not in self.rows:
            return [*examples, {"role": "user", "content": content}], None
        messages, tools = prompts.read_conversation(self.rows[content])
        first = int(messages[0]["role"] == "system")  # templates take it at the beginning only
        return [*messages[:first], *examples, *messages[first:-1]], tools

    def text(self, tokenizer: Any, content: str, examples: Sequence[Turn] = ()) -> str:
        if tokenizer is None:  # an endpoint's, which starts a completion with its own first token
            texts = [turn["content"] for turn in examples]
            pairs = zip(texts[::2], texts[1::2], strict=True)
            written = [f"{FORMATS[self.form].format(text)} {answer}" for text, answer in pairs]
            return "\n\n".join([*written, FORMATS[self.form].format(content)])
        messages, tools = self.conversation(content, examples)
        return prompts.render(tokenizer, messages, self.options, self.form, tools)

    def attach(self, lm: Any, budget: int) -> None:
        """Makes an lm-eval model render with this, leaving room for `budget` new tokens.

        A model without a tokenizer here (behind an endpoint) keeps its own chat format: its prompts
        are texts that stand for turns.
        """
        tokenizer = getattr(lm, "tokenizer", None)
        lm.conversation = self.recall_conversation
        if tokenizer is not None and self.form == "chat":
            self.refuse_unrenderable(tokenizer)

        def render(history: Turns, add_generation_prompt: bool = True) -> str:
            *examples, question = history
            if tokenizer is None and self.form == "chat":
                return self.remember(history)
            if tokenizer is None:
                return self.text(None, question["content"], examples)
            return self.fit(tokenizer, question["content"], lm.max_length - budget, examples)

        lm.apply_chat_template = render

    def remember(self, history: Turns) -> str:
        """The text that stands for the turns of lm-eval's history."""
        text = "\n\n".join(turn["content"] for turn in history)
        self.histories[text] = history
        return text

    def recall_conversation(self, text: str) -> tuple[Turns, list[Any] | None]:
        *examples, question = self.histories[text]
        return self.conversation(question["content"], examples)

    def refuse_unrenderable(self, tokenizer: Any) -> None:
        """Raises WrongInput where the base's chat template leaves out what a row asks with."""
        for number, row in prompts.pick_shapes(self.rows.values()):
            turns = [turn | {"train": False} for turn in row["messages"][:-1]]
            question = row | {"messages": turns}
            if reason := prompts.explain_unrenderable(tokenizer, question, self.options):
                raise WrongInput(f"row {number}: {reason}; another base can be scored on such rows")

    def fit(self, tokenizer: Any, content: str, room: int, examples: Sequence[Turn] = ()) -> str:
        """The prompt of `content` in at most `room` tokens; raises WrongInput if none fits.

        It drops the last examples first, so that prompts go on sharing their beginning, and then
        cuts the question.
        """
        turns = list(examples)
        text = self.text(tokenizer, content, turns)
        while turns and count_surplus(tokenizer, text, room) > 0:
            del turns[-2:]
            text = self.text(tokenizer, content, turns)
        if not turns:
            text = self.cut_middle(tokenizer, content, room)
        if len(turns) < len(examples):
            self.dropped[text] = (len(examples) - len(turns)) // 2
        return text

    def cut_middle(self, tokenizer: Any, content: str, room: int) -> str:
        """The prompt of `content` without examples; one that is too long loses tokens.

        They are the middle of its longest turn: questions stand at the beginning or the end.
        lm-eval would cut the beginning.
        """
        text = self.text(tokenizer, content)
        if count_surplus(tokenizer, text, room) <= 0:
            return text
        messages, tools = self.conversation(content)
        longest = max(messages, key=lambda message: len(str(message.get("content") or "")))
        tokens = tokenizer.encode(str(longest.get("content") or ""), add_special_tokens=False)
        keep = len(tokens)
        while (over := count_surplus(tokenizer, text, room)) > 0:
            keep -= over
            if keep < 2:
                raise WrongInput(f"a model of {room} tokens has no room for a prompt")
            parts = (tokens[: (keep + 1) // 2], tokens[len(tokens) - keep // 2 :])
            longest["content"] = GAP.join(map(tokenizer.decode, parts))
            text = prompts.render(tokenizer, messages, self.options, self.form, tools)
        self.cut[text] = len(tokens) - keep
        return text


def count_surplus(tokenizer: Any, text: str, room: int) -> int:
    """How many tokens of a prompt are too many; 0 or less where it fits."""
    size = len(text.encode())
    if size <= room:  # a token is at least a byte
        return size - room
    return len(tokenizer.encode(text)) - room


class Progress:
    """For an lm-eval model: prints how many of `rows` answers there are."""

    def expect(self, label: str, rows: int) -> None:
        self.label, self.rows, self.done, self.start = label, rows, 0, time.monotonic()

    def progress(self, rows: int) -> None:
        self.done += rows
        seconds = max(time.monotonic() - self.start, 1e-3)
        text = f"eval       {self.label} {self.done}/{self.rows} rows, {self.done / seconds:.1f}/s"
        is_last = self.done >= self.rows
        if sys.stdout.isatty():
            print(f"\r{text:<70}", end="\n" if is_last else "", flush=True)
        elif is_last or self.done // 160 != (self.done - rows) // 160:
            print(text, flush=True)


class Answers:
    """Answers by prompt, read from and appended to `file`, which is valid for one `identity`.

    A line is {"prompt": SHA-256, "answer"}, with {"probabilities": {label: share}} where the model
    gives them, and of an endpoint {"usage": its tokens}, {"refused": the reason} where it refused.
    The next job asks a refused prompt again. `by_prompt` may be shared by datasets with the same
    prompts.
    """

    def __init__(
        self, file: Path, identity: Any, by_prompt: dict[str, dict[str, Any]] | None = None
    ):
        self.file, self.by_prompt = file, {} if by_prompt is None else by_prompt
        lines = _read_sound_lines(file)
        is_valid = lines[:1] == [identity]
        lines = [line for line in lines if "prompt" in line and "refused" not in line]
        lines = lines if is_valid else []
        self.by_prompt |= {line["prompt"]: line for line in lines}
        self.probabilities: list[Any] = []
        self.refusals: dict[str, str] = {}
        self.usage: dict[str, Any] = {}
        self.keys: list[str] = []  # of the prompts that were to be answered
        with atomic(file) as out:  # without torn lines and answers of another identity
            for line in [identity, *lines]:
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def add_partial(self, kind: str, request: Any, answer: str) -> None:
        """lm-eval calls this, its cache hook, with every answer of a finished batch."""
        line: dict[str, Any] = {"prompt": _hash_prompt(request[0]), "answer": answer}
        if self.probabilities:
            line["probabilities"] = self.probabilities.pop(0)
        if reason := self.refusals.get(request[0]):
            line["refused"] = reason
        if usage := self.usage.get(request[0]):
            line["usage"] = asdict(usage)
        self.by_prompt[line["prompt"]] = line
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def recall(self, prompt: str) -> dict[str, Any]:
        """The line of a prompt's answer."""
        return self.by_prompt[_hash_prompt(prompt)]

    def list_usage(self) -> list[dict[str, int]]:
        """What each answer cost, where an endpoint gave it."""
        lines = [self.by_prompt[key] for key in self.keys]
        return [line["usage"] for line in lines if "usage" in line]

    def attach(self, lm: Any, tell: Callable[[str], None] = lambda text: None) -> None:
        """Makes an lm-eval model answer only new prompts, and saves its answers."""
        generate = lm.generate_until
        lm.set_cache_hook(self)
        self.probabilities = getattr(lm, "probabilities", [])
        self.refusals = getattr(lm, "refusals", {})
        self.usage = getattr(lm, "usage", {})

        def generate_until(requests: list[Any], **options: Any) -> list[str]:
            keys = [_hash_prompt(request.args[0]) for request in requests]
            by_key = dict(zip(keys, requests, strict=True))
            self.keys = list(by_key)
            new = [request for key, request in by_key.items() if key not in self.by_prompt]
            if len(new) < len(by_key):
                tell(f"{len(by_key) - len(new)} of {len(by_key)} prompts are answered already")
            lm.rows, lm.answered = len(new), len(by_key) - len(new)
            if new:
                generate(new, **options)
            return [self.by_prompt[key]["answer"] for key in keys]

        lm.generate_until = generate_until


def _read_sound_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; a full disk or a crash may have torn any line."""
    lines = []
    for text in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _hash_prompt(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
