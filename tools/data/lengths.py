"""Counts the tokens of chat rows as training sees them, and shortens prompts that are too long.

    load("HuggingFaceTB/SmolLM2-135M-Instruct").count([chat_row])

A row is rendered with the tokenizer's chat template, as Axolotl does: the prompt's tokens end where
the assistant's answer begins. Answers are never cut. If a task's row in data/sources.yaml has
`cut_long_prompts: middle`, a prompt whose row is longer than `sequence_len` loses tokens in its
middle; otherwise such a row is refused (Axolotl would drop it silently).
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import orjson

from tools.common import ROOT, WrongInput, digest
from tools.data.rows import Batch, write_chat_row
from tools.data.turns import cut_longest, join_turns
from tools.prompts import read_conversation, render, render_row


@dataclass
class Lengths:
    """The tokens of the checked rows, before any prompt was cut.

    `prompt` and `answer` count rows by their number of tokens. `sequence_len` is in tokens; None
    sets no limit.
    """

    tokenizer: Any
    name: str
    sequence_len: int | None = None
    options: dict[str, Any] | None = None  # the recipe's chat_template_kwargs
    prompt: Counter[int] = field(default_factory=Counter)
    answer: Counter[int] = field(default_factory=Counter)
    over: int = 0
    cut: int = 0

    def copy_empty(self) -> "Lengths":
        return Lengths(self.tokenizer, self.name, self.sequence_len, self.options)

    def count(self, chats: list[bytes]) -> list[tuple[int, int]]:
        """Returns (tokens before the last answer, tokens of that answer) of each chat row."""
        texts, starts = [], []
        for chat in chats:
            row = orjson.loads(chat)
            turns, tools = read_conversation(row)
            text = render_row(self.tokenizer, row, self.options)
            texts.append(text)
            prompt = render(self.tokenizer, turns[:-1], self.options, tools=tools)
            starts.append(len(commonprefix([prompt, text])))
        rows = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        sizes = [row.char_to_token(start) for row, start in zip(rows, starts, strict=True)]
        return [(size, len(row) - size) for row, size in zip(rows, sizes, strict=True)]

    def check(self, batch: Batch, cut: bool, bounded: bool) -> Batch:
        """Counts a batch; if `bounded`, rows that are too long are cut or refused."""
        fits = []
        for index, (prompt, answer) in enumerate(self.count(batch.chat)):
            self.prompt[prompt] += 1
            self.answer[answer] += 1
            fits.append(self.sequence_len is None or prompt + answer <= self.sequence_len)
            self.over += not fits[-1]
            if fits[-1] or not bounded:
                continue
            if cut and (chat := self.cut_middle(batch.chat[index])):
                batch.chat[index] = chat
                messages = orjson.loads(chat)["messages"]
                batch.prompts[index] = join_turns(messages[:-1])
                self.cut += 1
                fits[-1] = True
                continue
            reason = f"{prompt + answer} tokens, {answer} of them the answer's, "
            reason += f"are more than the sequence_len of {self.sequence_len}"
            batch.refused.append((batch.numbers[index], reason, batch.lines[index]))
        return batch.select(fits) if bounded else batch

    def cut_middle(self, chat: bytes) -> bytes | None:
        """The row with a prompt that lost its middle, so that it fits; None if no cut does that."""
        row = orjson.loads(chat)
        encode = self.tokenizer.backend_tokenizer.encode
        fits = cut_longest(
            row["messages"],
            lambda text: encode(text, add_special_tokens=False).offsets,
            lambda: sum(self.count([write_chat_row(row)])[0]) - (self.sequence_len or 0),
        )
        return write_chat_row(row) if fits else None

    def summarize(self) -> dict[str, Any]:
        """Returns the manifest's facts; each quantile is the length of a row (nearest rank)."""
        over = None
        if self.sequence_len is not None:
            share = round(self.over / self.prompt.total(), 6)
            over = {"rows": self.over, "share": share, "cut": self.cut}
        return {
            "tokenizer": self.name,
            "sequence_len": self.sequence_len,
            "prompt": compute_quantiles(self.prompt),
            "answer": compute_quantiles(self.answer),
            "over": over,
        }


def compute_quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Returns min, median, 95th percentile and max of counted lengths, in tokens."""
    total, rank, quantiles = lengths.total(), 0, dict[str, int]()
    ranks = {"min": 1, "median": (total + 1) // 2, "p95": -(-total * 95 // 100), "max": total}
    for length in sorted(lengths):
        rank += lengths[length]
        reached = (name for name, least in ranks.items() if least <= rank)
        quantiles = dict.fromkeys(reached, length) | quantiles
    return quantiles


def load(base: str, sequence_len: int | None = None) -> Lengths | None:
    """Loads the tokenizer of a folder or of the Hub's cache; None if it is not there."""
    from transformers import AutoTokenizer

    # Nothing forks while tokens are counted, so the tokenizer can use every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder = ROOT / base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else base, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise WrongInput(f"{base}: a fast tokenizer with a chat template is needed")
    name = base
    if (folder / "tokenizer.json").is_file():
        name += f" (tokenizer.json {digest(folder / 'tokenizer.json')[:12]})"
    return Lengths(tokenizer, name, sequence_len)
