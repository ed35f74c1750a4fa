"""Takes in a file of rows: makes chat rows of them on the disk, and says what is in them.

    intake = take_in(open_rows("my.csv"), shape, IntakeOptions(), path)
    intake.rows, intake.refusals, intake.answers        counts, bad rows, the answers or a sample

Memory does not grow with the texts: a row leaves its marks (tools/data/split.py) and its answer
where there are few different ones.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from tools.common import atomic
from tools.data import turns
from tools.data.bases import BaseTokenizer
from tools.data.rows import Refusals, write_chat_row
from tools.data.rules import fingerprint
from tools.data.shapes import Shape
from tools.data.split import Clock, RowMarks

MOST_ANSWERS = 10_000  # different ones that are counted; with more, a sample is kept
SAMPLED = 1000  # answers of a sample, and the longest beside them
BLOCK = 1000  # rows whose tokens are counted at a time


@dataclass
class IntakeOptions:
    """What a user asks for: columns that group or order rows, and how long rows are treated."""

    group: str | None = None
    time: str | None = None
    last_only: bool = False  # the loss falls on the last answer of a row
    cut: bool = False  # a prompt that is too long loses its middle
    sequence_len: int = 4096
    bases: list[BaseTokenizer] = field(default_factory=list)


@dataclass
class Intake:
    """The chat rows of a file, in its order, and what was counted of them."""

    spool: IO[bytes]
    marks: RowMarks = field(default_factory=RowMarks)
    rows: int = 0
    refusals: Refusals = field(default_factory=lambda: Refusals(""))
    answers: Counter[str] = field(default_factory=Counter)
    is_counted: bool = True  # whether `answers` has all of them
    longest_answers: list[tuple[int, str]] = field(default_factory=list)
    over: Counter[str] = field(default_factory=Counter)  # rows too long, by base
    repairs: Counter[str] = field(default_factory=Counter)  # rows by what was repaired in them
    cut: int = 0
    longest: int = 0  # bytes of a row

    def list_answers(self) -> list[str]:
        """The answers of all rows, or where there are many different ones, a sample of them."""
        answers = self.answers.elements() if self.is_counted else self.answers.keys()
        return [*answers, *(text for _, text in self.longest_answers)]

    def add_answer(self, answer: str) -> int:
        """Counts an answer; returns its number, or -1 where answers are no longer counted."""
        if self.is_counted and answer not in self.answers and len(self.answers) == MOST_ANSWERS:
            self.is_counted = False
            sizes = ((len(text.encode()), text) for text in self.answers)
            self.longest_answers = heapq.nlargest(SAMPLED, sizes)
            heapq.heapify(self.longest_answers)
            self.answers = Counter(dict.fromkeys(islice(self.answers, 0, None, 10), 1))
        if not self.is_counted:
            item = (len(answer.encode()), answer)
            if len(self.longest_answers) < SAMPLED:
                heapq.heappush(self.longest_answers, item)
            elif item > self.longest_answers[0]:
                heapq.heapreplace(self.longest_answers, item)
            return -1
        self.answers[answer] += 1
        return 0

    def read(self) -> Iterator[bytes]:
        self.spool.seek(0)
        return iter(self.spool)


def hash_mark(text: str) -> int:
    return int.from_bytes(fingerprint(text)[:8], "big")


def take_in(rows: Any, shape: Shape, options: IntakeOptions, refused: Path) -> Intake:
    """The chat rows of a file; bad rows are counted, and written to the file `refused`."""
    spool = TemporaryFile(dir=refused.parent)  # noqa: SIM115
    intake = Intake(spool, refusals=Refusals(rows.name))
    numbers: dict[str, int] = {}
    with atomic(refused) as refused_file:

        def refuse(place: str, reason: str, row: Any) -> None:
            intake.refusals.add(place, reason)
            entry = {"file": rows.name, "place": place, "reason": reason, "row": row}
            # Not orjson, which has no integers of over 64 bits.
            refused_file.write(f"{json.dumps(entry, ensure_ascii=False, default=str)}\n".encode())

        def read_chats() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], int, float]]:
            for place, row in rows:
                try:
                    if isinstance(row, ValueError):
                        raise row
                    if not isinstance(row, dict):
                        raise ValueError(f"an object is needed, not {type(row).__name__}")
                    chat = shape.build_chat(row)
                    name = options.group
                    group = hash_mark(turns.require_text(row.get(name), name)) if name else 0
                    time = clock.read(row) if clock else 0.0
                except (ValueError, RecursionError) as error:
                    refuse(place, str(error), None if isinstance(row, ValueError) else row)
                    continue
                if options.last_only:
                    train_on_last(chat["messages"])
                yield place, row, chat, group, time

        clock = Clock(options.time) if options.time else None
        chats = read_chats()
        while block := list(islice(chats, BLOCK)):
            reasons = check_lengths([chat for _, _, chat, _, _ in block], intake, options)
            for (place, row, chat, group, time), reason in zip(block, reasons, strict=True):
                if reason:
                    refuse(place, reason, row)
                    continue
                add_row(intake, chat, numbers)
                if options.group:
                    intake.marks.groups.append(group)
                if options.time:
                    intake.marks.times.append(time)
    if not intake.refusals.first:
        refused.unlink()
    if not intake.is_counted:
        del intake.marks.labels[:]
    return intake


def add_row(intake: Intake, chat: dict[str, Any], numbers: dict[str, int]) -> None:
    """Writes a chat row to the spool and keeps its marks. `numbers` are those of the answers."""
    messages = chat["messages"]
    intake.spool.write(write_chat_row(chat))
    intake.rows += 1
    intake.marks.prompts.append(hash_mark(turns.join_turns(messages[:-1])))
    answer = turns.write_answer(messages[-1])
    if intake.add_answer(answer) < 0:
        numbers.clear()
        return
    intake.marks.labels.append(numbers.setdefault(answer, len(numbers)))


def train_on_last(messages: list[turns.Turn]) -> None:
    """Marks earlier answers as not to be trained on, as `message_field_training` has it."""
    for turn in messages[:-1]:
        if turn["role"] == "assistant":
            turn["train"] = False


# ---- Lengths


def check_lengths(chats: list[dict[str, Any]], intake: Intake, options: IntakeOptions) -> list[str]:
    """Why each row is too long for a base at hand; "" where it fits, or fits after a cut.

    A token is a byte at least, so only rows with more bytes than the limit are tokenized.
    """
    reasons = [""] * len(chats)
    sizes = [count_bytes(chat) for chat in chats]
    intake.longest = max(intake.longest, *sizes)
    for base in options.bases:
        room = options.sequence_len
        long = [
            number
            for number, chat in enumerate(chats)
            if not reasons[number]
            and (
                chat.get("tools")
                or sizes[number] + base.count_overhead(len(chat["messages"])) > room
            )
        ]
        counts = base.count_tokens([chats[number] for number in long])
        for number, count in zip(long, counts, strict=True):
            if isinstance(count, str) or count <= room:
                continue  # `print_unrenderable` reports a template that refuses a row
            intake.over[base.name] += 1
            if options.cut and cut_to_fit(chats[number], base, room):
                intake.cut += 1
                continue
            reasons[number] = f"{count:,} tokens for {base.name}, more than {room:,} (sequence_len)"
    return reasons


def count_bytes(chat: dict[str, Any]) -> int:
    return sum(len(turn["content"].encode()) for turn in chat["messages"])


def cut_to_fit(chat: dict[str, Any], base: BaseTokenizer, room: int) -> bool:
    """Takes the middle out of the longest prompt of a row until it has `room` tokens at most."""
    return turns.cut_longest(
        chat["messages"], base.find_offsets, lambda: int(base.count_tokens([chat])[0]) - room
    )
