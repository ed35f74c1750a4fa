"""Divides rows by prompt into those that train and those that validate or test.

    draw_validation(Counter({mark: rows, …}))     prompts of a training set that validate
    split_test_set(source, rules, spec)           rows that train in place of a missing file
    divide_rows(marks, [TEST_SHARE])              sides of the user's own rows, by label or time

All rows of a prompt go to one side.
"""

import hashlib
import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from tools import sources
from tools.common import WrongInput, shown
from tools.data.rows import Rules, read_batches
from tools.data.rules import fingerprint


def draw_validation(copies: Counter[bytes]) -> set[bytes]:
    """Draws the prompts that validate, given the rows of each prompt, which stay together.

    Seed and prompt alone determine the order, so a shuffled file gives the same prompts. They fill
    the share of the rows to the row, as Axolotl's own split does. A prompt with more copies than
    there is room for is skipped, so in small files the prompts with many copies train. At least one
    prompt validates, but none if there are fewer than `least`.
    """
    spec = sources.tables()["validation"]
    if len(copies) < spec["least"]:
        return set()
    return draw_prompts(copies, math.ceil(spec["share"] * copies.total()))


def draw_prompts(copies: Counter[bytes], room: int) -> set[bytes]:
    """Draws prompts by the seed until they fill `room` rows; at least one prompt."""
    key = str(sources.tables()["validation"]["seed"]).encode()
    order = sorted(copies, key=lambda mark: hashlib.blake2b(mark, key=key).digest())
    drawn = set[bytes]()
    for mark in order:
        if copies[mark] <= room:
            drawn.add(mark)
            room -= copies[mark]
        if not room:
            break
    return drawn or {min(order, key=copies.__getitem__)}


def split_test_set(
    source: Path, rules: Rules, spec: dict[str, Any]
) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the numbers of a test set's rows that train, and of those that test.

    `spec` is a task's `without_train`. No prompt is in both, nor what `choose_mark` takes for one.
    Holds 16 bytes of each row.
    """
    mark, wanted = choose_mark(spec), spec["rows"]
    marks = [mark(prompt) for batch in read_batches(source, rules) for prompt in batch.prompts]
    if len(marks) <= wanted:
        raise WrongInput(
            f"{shown(source)} has {len(marks)} rows; {wanted} of them train in place of a missing "
            "training file, and some must be left to test on"
        )
    draw = random.Random(spec["seed"])
    if "together" in spec:
        units = draw_whole_units(Counter(marks), wanted, draw)
        train = frozenset(number for number, unit in enumerate(marks) if unit in units)
    else:
        train = frozenset(draw.sample(range(len(marks)), wanted))
    trained = {marks[number] for number in train}
    return train, frozenset(number for number, unit in enumerate(marks) if unit not in trained)


def choose_mark(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """What identifies the unit of a prompt that is never divided, by a task's `without_train`.

    It is the whole prompt, or what the first group of the pattern `together` finds in it.
    """
    if "together" not in spec:
        return fingerprint
    pattern = re.compile(spec["together"], re.DOTALL)

    def mark_part(prompt: str) -> bytes:
        match = pattern.search(prompt)
        return fingerprint(match[1] if match else prompt)

    return mark_part


def draw_whole_units(rows: Counter[bytes], wanted: int, draw: random.Random) -> set[bytes]:
    """Draws units, given the rows of each, with at most `wanted` rows; at least one unit."""
    order = sorted(rows)
    draw.shuffle(order)
    units, room = set[bytes](), wanted
    for unit in order:
        if rows[unit] <= room:
            units.add(unit)
            room -= rows[unit]
    return units or {min(order, key=rows.__getitem__)}


# ---- Rows of the user's own


@dataclass(frozen=True)
class Share:
    """How many rows go to one side: a share of them, of at most so many units."""

    name: str
    share: float
    most: int


TEST_SHARE, VALIDATION_SHARE = Share("test", 0.2, 500), Share("validation", 0.1, 500)
SEED = 42


@dataclass
class RowMarks:
    """What decides on which side each row of a file goes; a number for each row.

    `prompts` and `groups` are hashes, `labels` numbers of answers, `times` seconds. Those that do
    not decide are empty.
    """

    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    groups: "array[int]" = field(default_factory=lambda: array("Q"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))


def join_units(marks: RowMarks) -> list[int]:
    """A unit for each row: rows of one prompt, or of one group, are never divided."""
    if not marks.groups:
        return list(marks.prompts)
    parents: dict[tuple[str, int], tuple[str, int]] = {}

    def find_root(node: tuple[str, int]) -> tuple[str, int]:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = node = parents[parent]
        return node

    pairs = list(zip(marks.prompts, marks.groups, strict=True))
    for prompt, group in pairs:
        parents[find_root(("prompt", prompt))] = find_root(("group", group))
    roots = (find_root(("prompt", prompt)) for prompt, _ in pairs)
    return [number ^ (kind == "group") for kind, number in roots]


def divide_rows(marks: RowMarks, shares: list[Share]) -> list[str]:
    """The side of each row: the name of one of `shares`, or "train".

    By time where the rows have one: the newest rows are the first side, the next the second. Else
    units are drawn, in each label alike where the rows have labels. No unit is on two sides. The
    order of the file decides nothing.
    """
    units = join_units(marks)
    rows: dict[int, list[int]] = {}
    for number, unit in enumerate(units):
        rows.setdefault(unit, []).append(number)
    sides, left = ["train"] * len(units), set(rows)
    for share in shares:
        if len(left) < 2:
            raise WrongInput(
                f"GROUP: too few groups to divide the rows; no group is left for {share.name}"
            )
        drawn = draw_newest(left, rows, marks, share) if marks.times else None
        for unit in drawn if drawn is not None else draw_units(left, rows, marks, share):
            left.discard(unit)
            for number in rows[unit]:
                sides[number] = share.name
    return sides


def draw_newest(
    units: set[int], rows: dict[int, list[int]], marks: RowMarks, share: Share
) -> list[int]:
    """The newest units; units of the same time stay together."""
    newest = {unit: max(marks.times[number] for number in rows[unit]) for unit in units}
    order = sorted(newest.values(), reverse=True)
    count = max(1, min(share.most, round(share.share * len(order))))
    drawn = [unit for unit in units if newest[unit] >= order[count - 1]]
    if len(drawn) == len(units):
        raise WrongInput(f"TIME: too few different times to divide the rows; no {share.name} rows")
    return drawn


def draw_units(
    units: set[int], rows: dict[int, list[int]], marks: RowMarks, share: Share
) -> list[int]:
    """Units drawn by the seed, from each label its share; at least one."""
    order = sorted(units)
    random.Random(f"{SEED} {share.name}").shuffle(order)
    strata: dict[int, list[int]] = {}
    for unit in order:
        label = marks.labels[rows[unit][0]] if marks.labels else 0
        strata.setdefault(label, []).append(unit)
    part, drawn = min(share.share, share.most / max(1, len(order))), list[int]()
    for stratum in strata.values():
        wanted = part * sum(len(rows[unit]) for unit in stratum)
        for unit in stratum:
            if len(rows[unit]) / 2 <= wanted:
                drawn.append(unit)
                wanted -= len(rows[unit])
    return drawn or [min(order, key=lambda unit: len(rows[unit]))]


DATE = re.compile(r"\d{4}-?\d\d-?\d\d.*", re.S)


class Clock:
    """Reads the column that orders rows: dates or numbers, as the first row has."""

    def __init__(self, column: str):
        self.column = column
        self.is_date: bool | None = None  # unknown before the first row

    def read(self, row: dict[str, Any]) -> float:
        """The time of a row; raises ValueError for none, and for a number among dates."""
        time, is_date = read_time(value := row.get(self.column), self.column)
        if self.is_date is None:
            self.is_date = is_date
        if is_date != self.is_date:
            kinds = ("a number", "a date") if is_date else ("a date", "a number")
            raise ValueError(
                f'"{self.column}" is {value!r:.60}, {kinds[1]}, and {kinds[0]} in the first row: '
                "they have no common order"
            )
        return time


def read_time(value: Any, column: str) -> tuple[float, bool]:
    """(seconds, True) of a date or its ISO text, (number, False) of a number, such as a year."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        text = value.strip()
        try:
            # More than 8 digits are Unix time.
            is_date = DATE.fullmatch(text) and not (text.isdigit() and len(text) > 8)
            value = datetime.fromisoformat(text) if is_date else float(text)
        except ValueError:
            value = text
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp(), True
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value), False
    raise ValueError(f'"{column}" is {value!r:.60}, no date such as 2024-03-31 and no number')
