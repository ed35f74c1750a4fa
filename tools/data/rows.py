"""Reads FinLoRA's rows strictly and in constant memory; a malformed row is named and refused.

    for batch in read_batches(Path("data/raw/test/fpb_test.jsonl")):
        print(batch.prompts, batch.answers, batch.refused)

Repeated keys, control characters, types other than text and numbers, and empty texts are refused.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import orjson

from tools.common import WrongInput, shown, unique

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
ASCII_ESCAPE = re.compile(rb"\\(?:[bf]|u00[0-7])")  # an escaped ASCII character
MAX_LINE = 16 * 2**20  # bytes; FinLoRA's longest rows are about 20 kB
CHUNK = 2**16  # bytes that are read at a time


RowTest = Callable[[str, str], object]  # of prompt and answer


@dataclass(frozen=True)
class Removal:
    """A repair that removes rows. `start` makes the test of a row, or says why it cannot."""

    kind: str
    reason: str
    start: Callable[[], RowTest | str]


@dataclass(frozen=True)
class Rules:
    """A dataset's possible answers and the repair of its defects."""

    labels: frozenset[str] = frozenset()
    relabel: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    relabels_row: RowTest | None = None  # selects the rows to relabel; default: all
    label_check: dict[str, Any] | None = None  # the findings of tools/data/swap.py
    removals: tuple[Removal, ...] = ()  # training sets only
    cut: bool = False  # shortens prompts that are too long in their middle

    def repair(self, prompt: str, answer: str) -> str:
        """Returns the repaired answer."""
        if answer in self.relabel and (not self.relabels_row or self.relabels_row(prompt, answer)):
            return self.relabel[answer]
        return answer


NO_RULES = Rules()


@dataclass
class Batch:
    """Consecutive rows of a source, by column, and the rows that broke a rule."""

    source: Path
    rows_in: int = 0  # lines that are not blank
    numbers: list[int] = field(default_factory=list)  # of the lines, from 1
    lines: list[bytes] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    chat: list[bytes] = field(default_factory=list)  # the rows as they are written
    refused: list[tuple[int, str, bytes]] = field(default_factory=list)  # line number, reason, line

    def select(self, mask: list[bool]) -> "Batch":
        """Returns the batch with the rows that the mask selects."""
        if all(mask):
            return self
        names = ("numbers", "lines", "prompts", "answers", "chat")
        columns: dict[str, Any] = {n: list(compress(getattr(self, n), mask)) for n in names}
        return replace(self, **columns)

    def stop_at_first(self) -> None:
        """Raises WrongInput for the first row that broke a rule, if any."""
        if self.refused:
            number, reason, _ = min(self.refused)
            where = f"{shown(self.source)}, line {number}"
            raise WrongInput(f"{where}: {reason} (ON_ERROR=quarantine leaves such rows out)")


def read_batches(source: Path, rules: Rules = NO_RULES) -> Iterator[Batch]:
    """Yields the rows of a file, a block of lines at a time."""
    for first, block in read_blocks(source):
        yield parse_block(source, first, block, rules)


def parse_block(source: Path, first: int, block: bytes, rules: Rules) -> Batch:
    """Parses whole lines; `first` is the number of the first."""
    lines = list(enumerate(block.split(b"\n"), first))
    lines = [(number, line) for number, line in lines if line and not line.isspace()]
    batch = parse_lines(source, lines, rules, is_plain(block, len(lines)))
    # If a row lacks a key, another may have it twice.
    return parse_lines(source, lines, rules, False) if batch.refused else batch


def parse_lines(source: Path, lines: list[tuple[int, bytes]], rules: Rules, plain: bool) -> Batch:
    batch = Batch(source, len(lines))
    for number, line in lines:
        try:
            prompt, answer = parse_row(line, rules, plain)
        except (ValueError, RecursionError) as error:
            batch.refused.append((number, str(error), line))
            continue
        batch.numbers.append(number)
        batch.lines.append(line)
        batch.prompts.append(prompt)
        batch.answers.append(answer)
    batch.chat = list(map(build_chat_row, batch.prompts, batch.answers))
    return batch


def read_blocks(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the first line, whole lines); cuts off a line longer than MAX_LINE."""
    with open(source, "rb") as file:
        number = 1
        while block := file.read(CHUNK):
            block += file.readline(MAX_LINE + 1)
            yield number, block.removeprefix(b"\xef\xbb\xbf") if number == 1 else block
            number += block.count(b"\n") + (not block.endswith(b"\n"))
            while not block.endswith(b"\n") and (block := file.readline(CHUNK)):
                pass


def parse_row(line: bytes, rules: Rules = NO_RULES, plain: bool = False) -> tuple[str, str]:
    """Returns (prompt, answer) of one line; raises ValueError with the fault.

    `plain`: the line is in a block that `is_plain`.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE // 2**20} MB; one row stands on one line")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise ValueError(f"not UTF-8: byte {wrong.start + 1} of the line") from None
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"an object is needed, not {type(row).__name__}")
    prompt, answer = row.get("context"), row.get("target")
    if not (isinstance(prompt, str) and isinstance(answer, str) and len(row) == 2) or not (
        plain or is_plain(line, 1)
    ):
        row = json.loads(line, object_pairs_hook=unique)  # orjson rounds long numbers, too
        prompt, answer = read_text(row, "context"), read_text(row, "target")
    prompt, answer = prompt.strip(), answer.strip()
    if not prompt or not answer:
        raise ValueError(f'"{"target" if prompt else "context"}" is empty')
    if rules.relabel:
        answer = rules.repair(prompt, answer)
    if rules.labels and answer not in rules.labels:
        labels = ", ".join(sorted(rules.labels))
        raise ValueError(f'the answer "{answer[:60]}" is none of {labels}')
    return prompt, answer


def is_plain(text: bytes, rows: int) -> bool:
    """Whether `rows` rows with context and target have no control character and no repeated key.

    orjson accepts both silently, and Python's own parser takes twice the time, so it parses only
    the rows that are not plain. A repeated key occurs twice in the text unless it is escaped.
    """
    return (
        text.count(b'"context"') == text.count(b'"target"') == rows
        and b"\x7f" not in text
        and not ASCII_ESCAPE.search(text)
    )


def read_text(row: dict[str, Any], key: str) -> str:
    """Reads a value as text; numbers become strings, as in FinLoRA's own loader."""
    if key not in row:
        keys = ", ".join(row) or "none"
        raise ValueError(f'the key "{key}" is missing; the row has {keys}')
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, not {type(value).__name__}')
    if control := CONTROL.search(value):
        raise ValueError(f'"{key}" holds the control character {control.group()!r}')
    return value


def build_chat_row(prompt: str, answer: str) -> bytes:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return orjson.dumps({"messages": turns}, option=orjson.OPT_APPEND_NEWLINE)
