"""Reads JSONL strictly and in constant memory; a malformed row is named and refused.

    for batch in read_batches(Path("data/raw/test/fpb_test.jsonl")):
        print(batch.prompts, batch.answers, batch.refused)

A row is FinLoRA's (context and target) or a chat row (messages). Repeated keys, control characters,
control tokens, types other than text and numbers, and empty texts are refused; page breaks and end
tokens after an answer are repaired. The rules for texts and turns are in tools/data/turns.py.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import orjson

from tools.common import WrongInput, shown, unique
from tools.data import turns

ASCII_ESCAPE = re.compile(rb"\\(?:[bf]|u00[0-7])")  # an escaped ASCII character
MAX_LINE = 16 * 2**20  # bytes; FinLoRA's longest rows are about 20 kB
CHUNK = 2**16  # bytes that are read at a time
# Of these, some stand in every control token of tools/data/turns.py.
TOKEN_HINTS = (
    *(b"<|", b"</s>", b"<s>", b"<eos>", b"<bos>", b"<pad>", b"<unk>", b"_turn>", b"_image>"),
    *(b"INST]", b"[TOOL", b"[/TOOL", b"[AVAILABLE", b"[/AVAILABLE", b"SYSTEM_PROMPT]"),
)
REFUSALS_SHOWN = 10  # rows that are named one by one

RowTest = Callable[[str, str], object]  # of prompt and answer
Reword = Callable[[str, str], tuple[str, str]]  # of the same; raises ValueError where it cannot


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
    reword: Reword | None = None  # after the removals

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
    repairs: Counter[str] = field(default_factory=Counter)  # rows by what was repaired in them

    def select(self, mask: list[bool]) -> "Batch":
        """Returns the batch with the rows that the mask selects."""
        if all(mask):
            return self
        names = ("numbers", "lines", "prompts", "answers", "chat")
        columns: dict[str, Any] = {n: list(compress(getattr(self, n), mask)) for n in names}
        return replace(self, **columns)

    def append(self, number: int, line: bytes, prompt: str, answer: str, chat: bytes) -> None:
        """Adds a row that broke no rule."""
        self.numbers.append(number)
        self.lines.append(line)
        self.prompts.append(prompt)
        self.answers.append(answer)
        self.chat.append(chat)

    def reword(self, reword: Reword) -> "Batch":
        """Returns the batch with other prompts and answers; rows without any become refused."""
        batch = replace(self, numbers=[], lines=[], prompts=[], answers=[], chat=[])
        batch.refused = list(self.refused)
        columns = (self.numbers, self.lines, self.prompts, self.answers)
        for number, line, *pair in zip(*columns, strict=True):
            try:
                prompt, answer = reword(*pair)
            except ValueError as error:
                batch.refused.append((number, str(error), line))
                continue
            batch.append(number, line, prompt, answer, build_chat_row(prompt, answer))
        return batch

    def stop_at_first(self) -> None:
        """Raises WrongInput that names the first row that broke a rule, if one did."""
        refusals = Refusals(shown(self.source))
        for number, reason, _ in sorted(self.refused):
            refusals.add(f"line {number}", reason)
        refusals.stop()


@dataclass
class Refusals:
    """The rows of a file that cannot be used: the first ones, and how many for each reason."""

    name: str
    first: list[tuple[str, str]] = field(default_factory=list)  # place and reason
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, reason: str) -> None:
        if len(self.first) < REFUSALS_SHOWN:
            self.first.append((place, reason))
        # What differs from row to row, the answer and its numbers, does not divide a reason.
        kind = re.sub(r'(?<= is )"[^"]*"', "…", reason)
        self.reasons[re.sub(r"\d[\d,.]*", "N", kind)] += 1

    def list_lines(self) -> list[str]:
        """The first rows with their reasons and, of more, a count by reason; to be printed."""
        lines = [f"{place}: {reason}" for place, reason in self.first]
        if self.reasons.total() > len(self.first):
            lines += [f"{count:,} rows: {reason}" for reason, count in self.reasons.most_common(10)]
        return lines

    def stop(self) -> None:
        """Prints the rows and raises WrongInput, if there are any."""
        if not self.first:
            return
        total = self.reasons.total()
        if total > 1:
            print(f"refused    {self.name}: {total:,} rows cannot be used")
            for line in self.list_lines():
                print(f"           {line}")
        place, reason = self.first[0]
        rest = f"; {total - 1:,} more rows cannot be used" if total > 1 else ""
        advice = "ON_ERROR=quarantine leaves such rows out"
        raise WrongInput(f"{self.name}, {place}: {reason}{rest} ({advice})")


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
            prompt, answer, chat = parse_row(line, rules, plain, batch.repairs)
        except (ValueError, RecursionError) as error:
            batch.refused.append((number, str(error), line))
            continue
        batch.append(number, line, prompt, answer, chat)
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


def parse_row(
    line: bytes,
    rules: Rules = NO_RULES,
    plain: bool = False,
    repairs: Counter[str] | None = None,
) -> tuple[str, str, bytes]:
    """(prompt, answer, chat row) of one line; raises ValueError that says what is wrong with it.

    `plain`: the line stands in a block that `is_plain`. `repairs` counts what is repaired.
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
    repairs = Counter() if repairs is None else repairs
    if "messages" in row and "context" not in row:
        return parse_chat_row(line, row, rules, repairs)
    prompt, answer = row.get("context"), row.get("target")
    if not (isinstance(prompt, str) and isinstance(answer, str) and len(row) == 2) or not (
        plain or is_plain(line, 1)
    ):
        row = json.loads(line, object_pairs_hook=unique)  # orjson rounds long numbers, too
        prompt, answer = read_text(row, "context"), read_text(row, "target")
        pair = pair_turns(prompt, answer)
        turns.mend_turns(pair, repairs)
        prompt, answer = (turn["content"] for turn in pair)
    prompt, answer = prompt.strip(), answer.strip()
    if not prompt or not answer:
        raise ValueError(f'"{"target" if prompt else "context"}" is empty')
    answer = check_answer(prompt, answer, rules)
    return prompt, answer, build_chat_row(prompt, answer)


def parse_chat_row(
    line: bytes, row: dict[str, Any], rules: Rules, repairs: Counter[str]
) -> tuple[str, str, bytes]:
    """The same of a line that is a chat row; what its `tools` and turns hold stays in it."""
    if orjson.dumps(row) == line.strip():  # so it has no key twice and no long number
        if is_plain_pair(line, row):  # most rows, and the rest takes three times as long
            prompt, answer = (turn["content"].strip() for turn in row["messages"])
            if prompt and answer and not any(map(turns.is_stand_in, (prompt, answer))):
                answer = check_answer(prompt, answer, rules)
                return prompt, answer, build_chat_row(prompt, answer)
    else:
        row = json.loads(line, object_pairs_hook=unique)
    chat: dict[str, Any] = {"messages": turns.read_turns(row["messages"], "messages")}
    turns.mend_turns(chat["messages"], repairs)
    turns.check_row(chat)
    if tools := turns.read_tools(row.get("tools"), "tools"):
        chat["tools"] = tools
    messages = chat["messages"]
    prompt = turns.join_turns(messages[:-1])
    last = messages[-1]
    if last.get("tool_calls"):
        return prompt, turns.write_answer(last), write_chat_row(chat)
    last["content"] = check_answer(prompt, last["content"], rules)
    return prompt, last["content"], write_chat_row(chat)


def is_plain_pair(line: bytes, row: dict[str, Any]) -> bool:
    """Whether a row is a user's turn and an assistant's, in which nothing can be mended."""
    messages = row["messages"]
    return (
        row.keys() == {"messages"}
        and isinstance(messages, list)
        and [turn.get("role") if isinstance(turn, dict) else "" for turn in messages]
        == ["user", "assistant"]
        and all(
            turn.keys() == {"role", "content"} and isinstance(turn["content"], str)
            for turn in messages
        )
        and b"\x7f" not in line
        and not ASCII_ESCAPE.search(line)
        and not any(hint in line for hint in TOKEN_HINTS)
    )


def check_answer(prompt: str, answer: str, rules: Rules) -> str:
    """An answer after its repair; raises ValueError where it is none of the labels."""
    if rules.relabel:
        answer = rules.repair(prompt, answer)
    if rules.labels and answer not in rules.labels:
        labels = ", ".join(sorted(rules.labels))
        raise ValueError(f'the answer "{answer[:60]}" is none of {labels}')
    return answer


def is_plain(text: bytes, rows: int) -> bool:
    """Whether `rows` rows with context and target have no control character or token, and no
    repeated key.

    orjson accepts both silently, and Python's own parser takes twice the time, so it parses only
    the rows that are not plain. A repeated key occurs twice in the text unless it is escaped.
    """
    return (
        text.count(b'"context"') == text.count(b'"target"') == rows
        and b"\x7f" not in text
        and not ASCII_ESCAPE.search(text)
        and not any(hint in text for hint in TOKEN_HINTS)
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
    if control := turns.CONTROL.search(value):
        raise ValueError(f'"{key}" holds the control character {control.group()!r}')
    return value


def pair_turns(prompt: str, answer: str) -> list[turns.Turn]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def build_chat_row(prompt: str, answer: str) -> bytes:
    return write_chat_row({"messages": pair_turns(prompt, answer)})


def write_chat_row(chat: dict[str, Any]) -> bytes:
    return orjson.dumps(chat, option=orjson.OPT_APPEND_NEWLINE)
