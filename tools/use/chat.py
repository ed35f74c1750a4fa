"""Talks to an adapter: one prompt to base and adapter side by side, or a conversation.

    python -m tools chat smollm2-135m/sentiment_r4 "What is the sentiment of …"
    python -m tools chat smollm2-135m/sentiment_r4        a conversation; an empty line ends it
    python -m tools chat "" "…" --adapter runs/hub/someone/some-adapter --precision nf4

Answers are greedy; the base has the precision and prompts have the format of the training.
"""

import sys
from contextlib import nullcontext
from typing import Any

from tools import models, prompts, sources, subjects
from tools.common import quiet
from tools.data.shapes import FINLORA_START

BUDGET = 200  # new tokens at most


def answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    options: dict[str, Any] | None = None,
    streamer: Any = None,
    form: str = "chat",
) -> str:
    """The model's greedy answer to a conversation, without its end token."""
    import torch

    ids = prompts.tokens(tokenizer, messages, options, form)
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=BUDGET,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def harmless(text: str) -> str:
    """Text without characters that control a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def print_side_by_side(
    model: Any, tokenizer: Any, subject: subjects.Subject, messages: list[dict[str, str]]
) -> None:
    """Prints the answers of base and adapter side by side."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table, cells = Table(expand=True), []
    for name, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
        with context:
            text = answer(model, tokenizer, messages, subject.options, form=subject.prompt_format)
        cells.append(escape(harmless(text)))
        table.add_column(f"{name}, {models.precision(subject.config)}", ratio=1)
    table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def converse(
    model: Any, tokenizer: Any, subject: subjects.Subject, messages: list[dict[str, str]]
) -> None:
    """Reads a line, streams the answer, and repeats until an empty line or the end of input.

    `messages` are those before the first line: a system turn or none.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(harmless(text), end="\n" if stream_end else "", flush=True)

    print(f"chat       {subject.name}; an empty line ends the conversation")
    options, form = subject.options, subject.prompt_format
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = answer(model, tokenizer, messages, options, streamer, form)
        messages.append({"role": "assistant", "content": text})


def explain_wording(task: str | None, prompt: str) -> str:
    """How the catalogue's task words a text, if a prompt is not worded so; else empty."""
    worded = sources.word_text(task, "…")
    if worded == "…" or prompt.lstrip().startswith(FINLORA_START):
        return ""
    return f"{task} was trained on prompts of the form {worded!r}"


def chat(subject: subjects.Subject, prompt: str | None, system: str | None = None) -> None:
    """Answers `prompt` with base and adapter, or holds a conversation without one.

    `system` is the system turn that the rows of the training began with.
    """
    models.bring_base(subject.config["base_model"])
    quiet()
    if note := explain_wording(subject.task, prompt or ""):
        print(f"chat       note: {note}")
    model, tokenizer = models.load(subject.config, subject.adapter)
    messages = [{"role": "system", "content": system}] if system else []
    if prompt and prompt.strip():
        messages.append({"role": "user", "content": prompt.strip()})
        print_side_by_side(model, tokenizer, subject, messages)
    else:
        converse(model, tokenizer, subject, messages)
