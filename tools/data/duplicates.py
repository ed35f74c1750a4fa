"""Finds prompts that a task's files hold twice, to the letter or nearly so.

    find_repeats(parts)        equal prompts, leaks into a test set, contradictions
    Near(parts).findings()     prompts that differ in few characters

What is compared is a prompt without its template, which tools/data/templates.py takes off.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tools.data.parts import EXAMPLES, Finding, Part, count_noun

SIMILAR = 0.85  # Jaccard similarity of 5-character pieces from which two prompts are near
PROPOSED = 0.7  # from which LSH proposes a pair: so it finds 602 of the 605 in xbrl_term
PERMUTATIONS = 128  # of a MinHash: standard error of its estimate at most 0.044
NEAR_ROWS = 50_000  # rows a task that are compared for likeness; of more, an even sample
CANDIDATES = 20  # earlier rows of a task that a row is compared with in full
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")

Place = tuple[int, int]  # number of a part, number of a row


def find_repeats(parts: list[Part]) -> Iterator[Finding]:
    """Prompts that stand twice, in a file or in two, and prompts with more than one answer."""
    places: dict[int, list[Place]] = defaultdict(list)
    for number, part in enumerate(parts):
        for row, mark in enumerate(part.prompt_marks):
            places[mark].append((number, row))
    groups = [group for _, group in sorted(places.items()) if len(group) > 1]
    for number, part in enumerate(parts):
        yield from find_repeats_inside(part, [[r for n, r in g if n == number] for g in groups])
        for other, source in enumerate(parts[:number]):
            pairs = [
                (next(r for n, r in group if n == other), row)
                for group in groups
                if any(n == other for n, _ in group)
                for n, row in group
                if n == number
            ]
            if pairs:
                text = count_noun(len(pairs), "prompt stands", "prompts stand")
                text += f" in {source.name} too, but for case and spaces"
                is_leak = source.split == "train" and part.split != "train"
                kind = ("error", "leak") if is_leak else ("note", "overlap")
                examples = show_pairs(source, part, pairs)
                yield part.finding((*kind, "certain"), text, len(pairs), examples)
    yield from find_contradictions(parts, groups)


def find_repeats_inside(part: Part, groups: list[list[int]]) -> Iterator[Finding]:
    """`groups`: the rows of each prompt."""
    groups = [rows for rows in groups if len(rows) > 1]
    if groups:
        extra = sum(len(rows) - 1 for rows in groups)
        verbatim = sum(len(rows) - len({part.prompts[row] for row in rows}) for rows in groups)
        text = count_noun(extra, "row repeats", "rows repeat")
        text += " an earlier prompt of the file but for case and spaces, "
        text += f"{verbatim} of them letter for letter"
        examples = [row for rows in groups[:EXAMPLES] for row in rows[:2]]
        yield part.finding(("warning", "duplicates", "certain"), text, extra, examples)


def find_contradictions(parts: list[Part], groups: list[list[Place]]) -> Iterator[Finding]:
    torn = [group for group in groups if len({parts[n].answer_marks[row] for n, row in group}) > 1]
    if torn:
        names = sorted({parts[n].name for group in torn for n, _ in group})
        text = count_noun(len(torn), "prompt has", "prompts have")
        text += f" more than one answer (in {', '.join(names)})"
        examples = [parts[n].example(row) for group in torn[:EXAMPLES] for n, row in group[:2]]
        # Two answers in words may say the same; two labels do not.
        labelled = all(part.labels for part in parts)
        severity, confidence = ("warning", "certain") if labelled else ("note", "medium")
        yield parts[max(torn[0])[0]].finding(
            (severity, "contradiction", confidence),
            text,
            len(torn),
            examples,
            sum(len(part.lines) for part in parts),
        )


def show_pairs(a: Part, b: Part, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Examples of rows that go together, of one file and another."""
    return [part.example(row) for x, y in pairs[:EXAMPLES] for part, row in ((a, x), (b, y))]


def cut_shingles(text: str) -> set[bytes]:
    return {text[i : i + 5].encode() for i in range(len(text) - 4)}


class Near:
    """Near duplicates of a task: MinHash and LSH propose pairs, their exact Jaccard decides.

    A pair counts if its numbers are the same too: a question with other numbers is another one.
    """

    def __init__(self, parts: list[Part]) -> None:
        from datasketch import MinHashLSH

        self.lsh = MinHashLSH(threshold=PROPOSED, num_perm=PERMUTATIONS)
        self.step = -(-sum(len(part.lines) for part in parts) // NEAR_ROWS) or 1
        self.parts = parts
        self.compared: set[int] = set()  # marks of prompts
        self.pairs: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for number, part in enumerate(parts):
            for row in range(0, len(part.lines), self.step):
                # Else too little to compare, or an exact duplicate, which `find_repeats` counts.
                if len(part.texts[row]) >= 20 and part.prompt_marks[row] not in self.compared:
                    self.compare(number, row)

    def compare(self, number: int, row: int) -> None:
        """Compares what varies in a row with the earlier ones, of its file and those before it."""
        from datasketch import MinHash

        part = self.parts[number]
        text = part.texts[row]
        self.compared.add(part.prompt_marks[row])
        shingles, numbers = cut_shingles(text), sorted(NUMBERS.findall(text))
        sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch(shingles)
        similar_rows: dict[int, int] = {}  # the first in each file
        for n, other in sorted(self.lsh.query(sketch))[:CANDIDATES]:
            other_text = self.parts[n].texts[other]
            if n in similar_rows or sorted(NUMBERS.findall(other_text)) != numbers:
                continue
            other_shingles = cut_shingles(other_text)
            if len(shingles & other_shingles) >= SIMILAR * len(shingles | other_shingles):
                similar_rows[n] = other
        for n, other in similar_rows.items():
            self.pairs[n, number].append((other, row))
        self.lsh.insert((number, row), sketch, check_duplication=False)

    def findings(self) -> Iterator[Finding]:
        for (first, second), pairs in self.pairs.items():
            a, b = self.parts[first], self.parts[second]
            same = sum(a.answer_marks[x] == b.answer_marks[y] for x, y in pairs)
            where = "an earlier row" if first == second else f"a row of {a.name}"
            text = count_noun(len(pairs), "prompt is", "prompts are") + f" like {where} (Jaccard "
            text += (
                f"similarity of {SIMILAR} or more, the same numbers), {same} with the same answer"
            )
            is_leak = a.split == "train" and b.split != "train"
            check = "near leak" if is_leak else "near duplicates"
            grade = ("warning" if is_leak and same else "note", check, "medium")
            yield b.finding(grade, text, len(pairs), show_pairs(a, b, pairs))
