"""Holds the files of an audit, with their rows in memory, and its findings.

    for part in find_parts("sentiment", folder):
        part.finding(("warning", "duplicates", "certain"), "3 rows repeat …", 3)

Examples of findings are escaped, so that a hostile row cannot control a terminal or a browser.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tools import sources
from tools.common import spell_out
from tools.data.rows import read_batches
from tools.data.rules import join_labels

EXAMPLES = 3  # of each finding
EXCERPT = 240  # characters of a row that an example shows
Grade = tuple[str, str, str]  # severity, check, confidence


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
    """One file of a task, its readable rows, and their measurements."""

    path: Path
    split: str
    datasets: list[str]
    facts: dict[str, Any]  # of data/sources.yaml, `audit`
    lines: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    refused: list[tuple[int, str, bytes]] = field(default_factory=list)  # line, reason, text
    texts: list[str] = field(default_factory=list)  # of each prompt, what is not its template
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = join_labels(self.datasets)
        self.name = "/".join(self.path.parts[-2:])

        for batch in read_batches(self.path):
            self.lines += batch.numbers
            self.prompts += batch.prompts
            self.answers += batch.answers
            self.refused += batch.refused

    @cached_property
    def prompt_marks(self) -> list[int]:
        return list(map(hash_normalized, self.prompts))

    @cached_property
    def answer_marks(self) -> list[int]:
        return list(map(hash_normalized, self.answers))

    def example(self, row: int, note: str = "") -> dict[str, Any]:
        prompt, answer = self.prompts[row], self.answers[row]
        text = prompt if len(prompt) <= EXCERPT else "… " + prompt[-EXCERPT:].partition(" ")[2]
        texts = {"text": spell_out(text), "answer": spell_out(answer[:80])}
        return {"file": self.name, "line": self.lines[row], "note": note, **texts}

    def finding(
        self,
        grade: Grade,
        text: str,
        count: int,
        examples: Iterable[int | dict[str, Any]] = (),
        of: int | None = None,
    ) -> Finding:
        """Makes a finding, by default `of` all rows of the file; an example may be a row number."""
        severity, check, confidence = grade
        shown = [self.example(entry) if isinstance(entry, int) else entry for entry in examples]
        total = len(self.lines) if of is None else of
        return Finding(severity, check, self.name, text, confidence, count, total, shown)


def find_parts(task: str, folder: Path) -> list[Part]:
    """Reads the files of a task that are there: its training file, then its test files."""
    table, spec = sources.tables(), sources.tables()["tasks"][task]
    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name in spec["eval"]:
        names_by_file[table["datasets"][name]["file"]].append(name)
    facts = [table.get("audit", {}).get(name, {}) for name in spec["eval"]]
    # The keys of a mixture are checked if those of all its sets are; class counts are of one set.
    check = {"check": facts[0].get("check")} if all(f == facts[0] for f in facts) else {}
    parts = [(folder / spec["train"], "train", spec["eval"], check)]
    if "val" in spec:
        parts.append((folder / spec["val"], "validation", spec["eval"], check))
    # A multi-task set without a file of its own repeats its parts.
    if "parts" in spec and not parts[0][0].is_file():
        return []
    for file, names in names_by_file.items():
        parts.append((folder / file, "test", names, table.get("audit", {}).get(names[0], {})))
    return [Part(*arguments) for arguments in parts if arguments[0].is_file()]


def count_noun(count: int, singular: str, plural: str) -> str:
    """Formats `1 row repeats` or `3 rows repeat`."""
    return f"{count:,} {singular if count == 1 else plural}"


def normalize(text: str) -> str:
    """Removes differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_normalized(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(normalize(text).encode(), digest_size=8).digest(), "big")
