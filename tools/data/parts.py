"""The files that an audit reads, what it measures of their rows, and how it reports a finding.

for part in find_parts("sentiment", folder):
    part.read(0), part.finding(("warning", "duplicates", "certain"), "3 rows repeat …", 3)
"""

import hashlib
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import sources
from tools.data import rows
from tools.data.rows import parse_row
from tools.data.rules import join_labels

EXAMPLES = 3  # of each finding
EXCERPT = 240  # characters of a row that an example shows
Grade = tuple[str, str, str]  # severity, check, confidence


def make_array(typecode: str) -> "array[int]":
    return field(default_factory=lambda: array(typecode))


@dataclass
class Finding:
    """Something wrong with the rows of `file`; `count` of `of` rows show it."""

    severity: str
    check: str
    file: str
    text: str
    confidence: str
    count: int
    of: int
    examples: list[dict[str, Any]]


@dataclass
class Part:
    """One file of a task, and what was measured of each row that could be read."""

    path: Path
    split: str
    datasets: list[str]
    facts: dict[str, Any]  # of data/sources.yaml, `audit`
    lines: "array[int]" = make_array("I")
    offsets: "array[int]" = make_array("Q")
    prompts: "array[int]" = make_array("Q")  # hashes
    answers: "array[int]" = make_array("Q")  # hashes
    chars: "array[int]" = make_array("I")
    classes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[int] = field(default_factory=Counter)
    common: set[int] = field(default_factory=set)  # the sentences that are part of a template
    templates: Counter[str] = field(default_factory=Counter)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = join_labels(self.datasets)
        self.name = "/".join(self.path.parts[-2:])

    def read(self, row: int) -> tuple[str, str]:
        """(prompt, answer) of a row, by its number from 0, read again."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            return parse_row(file.readline())

    def example(self, row: int, note: str = "") -> dict[str, Any]:
        prompt, answer = self.read(row)
        text = prompt if len(prompt) <= EXCERPT else "… " + prompt[-EXCERPT:].partition(" ")[2]
        texts = {"text": escape(text), "answer": escape(answer[:80])}
        return {"file": self.name, "line": self.lines[row], "note": note, **texts}

    def finding(
        self,
        grade: Grade,
        text: str,
        count: int,
        examples: Iterable[int | dict[str, Any]] = (),
        of: int | None = None,
    ) -> Finding:
        """A finding on this file, `of` all its rows without; an example may be a row's number."""
        severity, check, confidence = grade
        shown = [self.example(entry) if isinstance(entry, int) else entry for entry in examples]
        total = len(self.lines) if of is None else of
        return Finding(severity, check, self.name, text, confidence, count, total, shown)


def find_parts(task: str, folder: Path) -> list[Part]:
    """The files of a task that are at hand: its training file first, then its test files."""
    table, spec = sources.tables(), sources.tables()["tasks"][task]
    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name in spec["eval"]:
        names_by_file[table["datasets"][name]["file"]].append(name)
    facts = [table.get("audit", {}).get(name, {}) for name in spec["eval"]]
    # A mixture is computed if all of its sets are; class counts are those of one set.
    check = {"check": facts[0].get("check")} if all(each == facts[0] for each in facts) else {}
    train = Part(folder / spec["train"], "train", spec["eval"], check)
    tests = [
        Part(folder / file, "test", names, table.get("audit", {}).get(names[0], {}))
        for file, names in names_by_file.items()
    ]
    # A multi-task set that has no file of its own is the same as its parts.
    if "parts" in spec and not train.path.is_file():
        return []
    return [part for part in (train, *tests) if part.path.is_file()]


def read_rows(path: Path) -> Iterator[tuple[int, int, tuple[str, str] | str]]:
    """Yields (line, offset, (prompt, answer)) of each row, or the reason that it has none."""
    with open(path, "rb") as file:
        number = offset = 0
        while line := file.readline(rows.MAX_LINE + 1):
            number, start, end = number + 1, offset, line
            while len(end) > rows.MAX_LINE and not end.endswith(b"\n"):
                end = file.readline(rows.MAX_LINE + 1)  # of a line that is too long
            offset = file.tell()
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = 3, line[3:]
            if not line.strip():
                continue
            try:
                yield number, start, parse_row(line)
            except ValueError as error:
                yield number, start, str(error)


def escape(text: str) -> str:
    """A text of a row as it may be printed: nothing in it steers a terminal or a browser."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def count_noun(count: int, singular: str, plural: str) -> str:
    """`1 row repeats` or `3 rows repeat`."""
    return f"{count:,} {singular if count == 1 else plural}"


def hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def normalize(text: str) -> str:
    """A text as it is compared: without differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
