"""Talks to an adapter: one prompt to base and adapter side by side, or a conversation.

    python -m tools chat smollm2-135m/sentiment_r4 "What is the sentiment of …"
    python -m tools chat smollm2-135m/sentiment_r4        a conversation; an empty line ends it
    python -m tools chat "" "…" --adapter runs/hub/someone/some-adapter --precision nf4

Answers are greedy; the base has the precision and prompts have the format of the training. With
`--constrain` an answer can only be a label of the adapter's task.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from evals.choices import build_constraint
from tools import models, prompts, sources, subjects
from tools.common import quiet, spell_out
from tools.data.recognize import FINLORA_START

BUDGET = 200  # new tokens at most


@dataclass(frozen=True)
class Style:
    """How a conversation becomes a prompt, and the only answers to it where there are `labels`."""

    options: dict[str, Any] | None = None  # of the chat template
    form: str = "chat"
    labels: Sequence[str] = ()


PLAIN = Style()


def answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    style: Style = PLAIN,
    streamer: Any = None,
) -> str:
    """The model's greedy answer to a conversation, without its end token."""
    import torch

    ids = prompts.tokens(tokenizer, messages, style.options, style.form)
    inputs = torch.tensor([ids], device=model.device)
    processors = []
    if style.labels:
        processors.append(build_constraint(model, tokenizer, style.labels).begin_at(len(ids)))
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=BUDGET,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=processors,
            streamer=streamer,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def print_side_by_side(
    model: Any, tokenizer: Any, precision: str, messages: list[dict[str, str]], style: Style
) -> None:
    """Prints the answers of base and adapter side by side."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table, cells = Table(expand=True), []
    for name, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
        with context:
            text = answer(model, tokenizer, messages, style)
        cells.append(escape(spell_out(text)))
        table.add_column(f"{name}, {precision}", ratio=1)
    table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def converse(model: Any, tokenizer: Any, messages: list[dict[str, str]], style: Style) -> None:
    """Reads a line, streams the answer, and repeats until an empty line or the end of input.

    `messages` are those before the first line: a system turn or none.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(spell_out(text), end="\n" if stream_end else "", flush=True)

    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = answer(model, tokenizer, messages, style, streamer)
        messages.append({"role": "assistant", "content": text})


def explain_wording(task: str | None, prompt: str) -> str:
    """How the catalogue's task words a text, if a prompt is not worded so; else empty."""
    worded = sources.word_text(task, "…")
    if worded == "…" or prompt.lstrip().startswith(FINLORA_START):
        return ""
    return f"{task} was trained on prompts of the form {worded!r}"


def chat(
    subject: subjects.Subject,
    prompt: str | None,
    system: str | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Answers `prompt` with base and adapter, or holds a conversation without one.

    `system` is the system turn that the rows of the training began with; `labels` are the only
    answers, where there are some.
    """
    models.bring_base(subject.config["base_model"])
    quiet()
    if note := explain_wording(subject.task, prompt or ""):
        print(f"chat       note: {note}")
    if labels:
        print(f"chat       CONSTRAIN=1: an answer can only be {', '.join(labels)}")
    model, tokenizer = models.load(subject.config, subject.adapter)
    messages = [{"role": "system", "content": system}] if system else []
    style = Style(subject.options, subject.prompt_format, labels)
    if prompt and prompt.strip():
        messages.append({"role": "user", "content": prompt.strip()})
        precision = models.precision(subject.config)
        print_side_by_side(model, tokenizer, precision, messages, style)
    else:
        print(f"chat       {subject.name}; an empty line ends the conversation")
        converse(model, tokenizer, messages, style)
