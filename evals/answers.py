"""What goes to a model and what comes back: prompts that fit, and answers that are kept.

Both work with any of lm-eval's models. A prompt is rendered in the format that the model was
trained on, and one that is too long loses tokens out of its middle. Answers are written to a file
batch by batch, so that scoring that is cut off goes on from there.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import prompts
from tools.common import WrongInput, atomic
from tools.prompts import FORMATS

GAP = "\n[…]\n"  # stands where a prompt was cut


class Prompts:
    """Renders prompts, and counts in `cut` the tokens that each lost: {prompt: tokens}.

    `rows` holds the rows of several turns by the text that lm-eval has of them; any other text is
    the content of a user's turn.
    """

    def __init__(self, form: str, options: dict[str, Any] | None = None):
        self.form, self.options = form, options
        self.cut: dict[str, int] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def conversation(self, content: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """(turns before the answer, tools) of a text of lm-eval's."""
        if content in self.rows:
            messages, tools = prompts.read_conversation(self.rows[content])
            return messages[:-1], tools
        return [{"role": "user", "content": content}], None

    def text(self, tokenizer: Any, content: str) -> str:
        if tokenizer is None:  # an endpoint's, which starts a completion with its own first token
            return FORMATS[self.form].format(content)
        messages, tools = self.conversation(content)
        return prompts.render(tokenizer, messages, self.options, self.form, tools)

    def attach(self, lm: Any, budget: int) -> None:
        """Makes an lm-eval model render with this, leaving room for `budget` new tokens.

        A model without a tokenizer here (behind an endpoint) keeps its own chat format.
        """
        tokenizer = getattr(lm, "tokenizer", None)
        lm.conversation = self.conversation
        if tokenizer is None and self.form == "chat":
            return
        if tokenizer is not None and self.form == "chat":
            self.refuse_unrenderable(tokenizer)

        def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            content = history[-1]["content"]
            if tokenizer is None:
                return self.text(None, content)
            return self.fitting(tokenizer, content, lm.max_length - budget)

        lm.apply_chat_template = template

    def refuse_unrenderable(self, tokenizer: Any) -> None:
        """Raises WrongInput where the base's chat template leaves out what a row asks with."""
        for number, row in prompts.pick_shapes(self.rows.values()):
            turns = [turn | {"train": False} for turn in row["messages"][:-1]]
            question = row | {"messages": turns}
            if reason := prompts.explain_unrenderable(tokenizer, question, self.options):
                raise WrongInput(f"row {number}: {reason}; another base can be scored on such rows")

    def fitting(self, tokenizer: Any, content: str, room: int) -> str:
        """The prompt of `content` in `room` tokens at the most.

        What is asked stands at the beginning or at the end of a prompt, so where one is too long it
        is the middle that goes, of its longest turn, and not, as lm-eval does it, the beginning.
        """
        text = self.text(tokenizer, content)
        if len(text.encode()) <= room:  # a token is a byte at least
            return text
        messages, tools = self.conversation(content)
        longest = max(messages, key=lambda message: len(str(message.get("content") or "")))
        tokens = tokenizer.encode(str(longest.get("content") or ""), add_special_tokens=False)
        keep = len(tokens)
        while (over := len(tokenizer.encode(text)) - room) > 0:
            keep -= over
            if keep < 2:
                raise WrongInput(f"a model of {room} tokens has no room for a prompt")
            parts = (tokens[: (keep + 1) // 2], tokens[len(tokens) - keep // 2 :])
            longest["content"] = GAP.join(map(tokenizer.decode, parts))
            text = prompts.render(tokenizer, messages, self.options, self.form, tools)
        if keep < len(tokens):
            self.cut[text] = len(tokens) - keep
        return text


class Progress:
    """For an lm-eval model: a line that tells how many of `rows` answers are there."""

    def expect(self, label: str, rows: int) -> None:
        self.label, self.rows, self.done, self.start = label, rows, 0, time.monotonic()

    def progress(self, rows: int) -> None:
        self.done += rows
        seconds = max(time.monotonic() - self.start, 1e-3)
        text = f"eval       {self.label} {self.done}/{self.rows} rows, {self.done / seconds:.1f}/s"
        last = self.done >= self.rows
        if sys.stdout.isatty():
            print(f"\r{text:<70}", end="\n" if last else "", flush=True)
        elif last or self.done // 160 != (self.done - rows) // 160:
            print(text, flush=True)


class Answers:
    """Answers by prompt: those that `known` has, and those in `file` if they are of `identity`.

    An answer is {"prompt": SHA-256, "answer"}, with {"probabilities": {label: share}} where the
    model tells them, and {"refused": the reason} where an endpoint gave none. A refused prompt is
    asked again by the next job.
    """

    def __init__(self, file: Path, identity: Any, known: dict[str, dict[str, Any]] | None = None):
        self.file, self.known = file, {} if known is None else known
        lines = _sound_lines(file)
        kept = lines[1:] if lines and lines[0] == identity else []
        kept = [line for line in kept if "prompt" in line and "refused" not in line]
        self.known |= {line["prompt"]: line for line in kept}
        self.probabilities: list[Any] = []
        self.refusals: dict[str, str] = {}
        # Written anew, whole or not at all: torn lines are gone, and answers of another identity.
        with atomic(file) as out:
            for line in [identity, *kept]:
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def add_partial(self, kind: str, request: Any, answer: str) -> None:
        """lm-eval calls this, its cache hook, with every answer of a batch that is done."""
        line: dict[str, Any] = {"prompt": _key(request[0]), "answer": answer}
        if self.probabilities:
            line["probabilities"] = self.probabilities.pop(0)
        if reason := self.refusals.get(request[0]):
            line["refused"] = reason
        self.known[line["prompt"]] = line
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def recall(self, text: str) -> dict[str, Any]:
        """What is kept of a prompt's answer."""
        return self.known[_key(text)]

    def attach(self, lm: Any, told: Callable[[str], None] = lambda text: None) -> None:
        """Makes an lm-eval model answer only what is not known yet, and keep what it answers."""
        plain = lm.generate_until
        lm.set_cache_hook(self)
        self.probabilities = getattr(lm, "probabilities", [])
        self.refusals = getattr(lm, "refusals", {})

        def generate_until(requests: list[Any], **options: Any) -> list[str]:
            keys = [_key(request.args[0]) for request in requests]
            asked = dict(zip(keys, requests, strict=True))
            left = [request for key, request in asked.items() if key not in self.known]
            if len(left) < len(asked):
                told(f"{len(asked) - len(left)} of {len(asked)} prompts are answered already")
            lm.rows, lm.answered = len(left), len(asked) - len(left)
            if left:
                plain(left, **options)
            return [self.known[key]["answer"] for key in keys]

        lm.generate_until = generate_until


def _sound_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines. A disk that ran full, or a machine that stopped, may
    have torn any of them.
    """
    lines = []
    for text in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
