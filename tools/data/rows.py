"""Reads FinLoRA's rows strictly and in constant memory: a row is taken whole, or named and refused.

A block of rows is parsed at once by orjson, and whether all of them are sound is seen from a few
counts over its bytes. Where it is not, its rows are looked at one by one.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import orjson

from tools.common import WrongInput, shown

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# How JSON may spell a control character or, as \u0022, a quotation mark.
SUSPECT = re.compile(rb"\\(?:[bf]|u00[0-7])")
MAX_LINE = 16 * 2**20  # bytes; FinLoRA's longest rows are about 20 kB
CHUNK = 2**16  # bytes that are parsed at a time: what fits a core's cache is fastest


Test = Callable[[str, str], object]  # of prompt and answer


@dataclass(frozen=True)
class Rules:
    """What a dataset asks of its rows: the answers there are, and the repair of known defects."""

    labels: frozenset[str] = frozenset()
    relabel: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    where: Test | None = None  # the rows to relabel; all of them without it
    label_check: dict[str, Any] | None = None  # what tools/data/swap.py saw, for the manifest
    removals: tuple["Removal", ...] = ()  # training sets only
    cut: bool = False  # whether a prompt that is too long loses its middle

    def repair(self, prompt: str, answer: str) -> str:
        """The answer as the repair has it."""
        if answer in self.relabel and (self.where is None or self.where(prompt, answer)):
            return self.relabel[answer]
        return answer


@dataclass(frozen=True)
class Removal:
    """Rows that a repair takes out. `start` makes the test of a row, or says why it cannot."""

    kind: str
    reason: str
    start: "Callable[[], Test | str]"


FREE = Rules()


@dataclass
class Batch:
    """Some rows of a source in their order, by column, and the rows that broke a rule."""

    source: Path
    numbers: Sequence[int]  # of the line, from 1
    lines: Sequence[bytes]
    prompts: list[str]
    answers: list[str]
    chat: list[bytes]  # the rows as they are written
    refused: list[tuple[int, str, bytes]]  # line number, reason, line
    read: int  # lines that were not blank

    def only(self, kept: list[bool]) -> "Batch":
        if all(kept):
            return self

        def chosen(column: Sequence[Any]) -> list[Any]:
            return list(compress(column, kept))

        return Batch(
            self.source,
            chosen(self.numbers),
            chosen(self.lines),
            chosen(self.prompts),
            chosen(self.answers),
            chosen(self.chat),
            self.refused,
            self.read,
        )

    def stop_at_first(self) -> None:
        """Raises WrongInput that names the first row that broke a rule, if one did."""
        if self.refused:
            number, reason, _ = min(self.refused)
            where = f"{shown(self.source)}, line {number}"
            raise WrongInput(f"{where}: {reason} (ON_ERROR=quarantine leaves such rows out)")


def batches(
    source: Path, rule: Rules = FREE, each: Callable[[bytes], object] = lambda block: None
) -> Iterator[Batch]:
    """Reads a file of FinLoRA rows in constant memory; `each` gets every block of its bytes."""
    with open(source, "rb") as file:
        number = 1
        while block := file.read(CHUNK):
            block += file.readline(MAX_LINE + 1)
            each(block)
            if number == 1:
                block = block.removeprefix(b"\xef\xbb\xbf")
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            if columns := at_once(block, lines, rule):
                numbers = range(number, number + len(lines))
                yield Batch(source, numbers, lines, *columns, [], len(lines))
            else:
                yield one_by_one(source, lines, number, rule)
            number += len(lines)
            while not block.endswith(b"\n") and (block := file.readline(CHUNK)):
                each(block)  # what is left of a line that is too long


def at_once(
    block: bytes, lines: list[bytes], rule: Rules
) -> tuple[list[str], list[str], list[bytes]] | None:
    """Prompts, answers and chat rows of a block if none of its rows needs a second look."""
    if len(block) > MAX_LINE:
        return None
    try:
        rows = list(map(orjson.loads, lines))
        prompts = [row["context"].strip() for row in rows]
        answers = [row["target"].strip() for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if rule.relabel:
        answers = list(map(rule.repair, prompts, answers))
    if not all(prompts) or not all(answers):
        return None
    if rule.labels and not rule.labels.issuperset(answers):
        return None
    chat = list(map(chat_row, prompts, answers))
    return (prompts, answers, chat) if plain(block, b"".join(chat), len(rows)) else None


def plain(block: bytes, chat: bytes, rows: int) -> bool:
    """Whether parsed rows hold no control character and no key twice, which orjson takes silently.

    A row of two keys has 8 quotation marks around its strings and its chat row has 18; the others
    stand inside of strings. So the counts differ by 10 a row where no row has a third key or one
    twice. What is not plain is looked at row by row.
    """
    import numpy

    if b"\x7f" in block or SUSPECT.search(block):
        return False
    read, written = (numpy.frombuffer(text, numpy.uint8) == ord('"') for text in (block, chat))
    return bool(numpy.count_nonzero(written) - numpy.count_nonzero(read) == 10 * rows)


def one_by_one(source: Path, lines: list[bytes], first: int, rule: Rules) -> Batch:
    """The rows of a block and those that break a rule; five times slower than `at_once`."""
    count = sum(1 for line in lines if line and not line.isspace())
    batch = Batch(source, numbers := [], kept := [], [], [], [], [], count)
    for number, line in enumerate(lines, first):
        if line.isspace() or not line:
            continue
        try:
            prompt, answer = row(line, rule)
        except (ValueError, RecursionError) as error:
            batch.refused.append((number, str(error), line))
            continue
        numbers.append(number)
        kept.append(line)
        batch.prompts.append(prompt)
        batch.answers.append(answer)
        batch.chat.append(chat_row(prompt, answer))
    return batch


def row(line: bytes, rule: Rules) -> tuple[str, str]:
    """(prompt, answer) of one line; raises ValueError that says what is wrong with it."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE // 2**20} MB; one row stands on one line")
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise ValueError(f"not UTF-8: byte {wrong.start + 1} of the line") from None
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, not {type(content).__name__}")
    content = json.loads(line, object_pairs_hook=once)  # orjson rounds long numbers, too
    values = []
    for key in ("context", "target"):
        if key not in content:
            found = ", ".join(map(str, content)) or "none"
            raise ValueError(f'the key "{key}" is missing; the row has {found}')
        value = content[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # as FinLoRA's own loader does
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be text, not {type(value).__name__}')
        if found_control := CONTROL.search(value):
            raise ValueError(f'"{key}" holds the control character {found_control.group()!r}')
        value = value.strip()
        if not value:
            raise ValueError(f'"{key}" is empty')
        values.append(value)
    prompt, answer = values
    answer = rule.repair(prompt, answer)
    if rule.labels and answer not in rule.labels:
        raise ValueError(f'the answer "{answer[:60]}" is none of {", ".join(sorted(rule.labels))}')
    return prompt, answer


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON parser's pairs; raises ValueError where a key stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{twice}" stands twice')
    return content


def chat_row(prompt: str, answer: str) -> bytes:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return orjson.dumps({"messages": turns}, option=orjson.OPT_APPEND_NEWLINE)
