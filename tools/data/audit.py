"""Reads the rows that are at hand and reports what is wrong with them; it changes nothing.

    python -m tools.data.audit                       every task whose files are at hand
    python -m tools.data.audit "sentiment,formula"   two of them; --json prints the report as JSON

It leaves runs/audit/audit.json and runs/audit/index.html. A finding has a severity (an `error`
changes scores, a `warning` may, a `note` is worth knowing), a confidence, a count and examples:

    error    test/tfns_test.jsonl   labels are swapped: neutral stands where … positive   certain

Rows are read one at a time; what stays in memory is a few numbers and a MinHash a row. What they
are compared with (class counts of a dataset's source, how keys are computed) stands in
data/sources.yaml under `audit`.
"""

import hashlib
import json
import math
import re
import statistics
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from tools import common as common_module
from tools import sources
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    digest,
    nearest,
    read_yaml,
    shown,
    write_json,
)
from tools.data import convert, formulas

OUT = ROOT / "runs" / "audit"
PAGE = ROOT / "tools" / "data" / "audit.html"
TOKENIZER = ROOT / "models" / "smollm2-135m" / "tokenizer.json"

EXAMPLES = 3  # of each finding
EXCERPT = 240  # characters of a row that an example shows
BINS = 24
SIMILAR = 0.85  # Jaccard similarity of 5-character pieces from which two prompts are near
PROPOSED = 0.7  # from which LSH proposes a pair: so it finds 602 of the 605 in xbrl_term
PERMUTATIONS = 128  # of a MinHash: standard error of its estimate at most 0.044
NEAR_ROWS = 50_000  # rows a task that are compared for likeness; of more, an even sample
NEAR_CHARS = 2_000  # characters that are compared of a long prompt: its first and last half
CANDIDATES = 20  # earlier rows of a task that a row is compared with in full
TOKEN_CHARS = 20_000_000  # characters a file that are tokenized; of more, an even sample
DISTINCT = 1_000  # wrong answers, and templates, that are told apart in a file
SENTENCES = 200_000  # sentences that are counted at a time; beyond, those seen once are dropped
TEMPLATE_SHARE = 0.01  # a sentence that this share of the prompts hold is part of a template
OUTLIER_SHARE = 0.005  # a template that fewer rows use is an outlier
IMPROBABLE = 1e-6

SENTENCE = re.compile(r"(?<=[.:?!])\s+|\n+|(?<=Answer:)")
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")
PLACEHOLDER = re.compile(r"(?:nan|none|null|n a|na|undefined)?")  # of a cell that was empty
SEVERITIES = {"error": "red", "warning": "yellow", "note": "blue"}


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
    labels: frozenset[str]
    facts: dict[str, Any]  # of data/sources.yaml, `audit`
    lines: "array[int]" = field(default_factory=lambda: array("I"))
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))  # hashes
    answers: "array[int]" = field(default_factory=lambda: array("Q"))  # hashes
    chars: "array[int]" = field(default_factory=lambda: array("I"))
    classes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[int] = field(default_factory=Counter)
    common: set[int] = field(default_factory=set)  # the sentences that are part of a template
    templates: Counter[str] = field(default_factory=Counter)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-2:])

    def at(self, row: int) -> tuple[str, str]:
        """(prompt, answer) of a row, by its number from 0, read again."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            return convert.row(file.readline(), convert.Rules())

    def example(self, row: int, note: str = "") -> dict[str, Any]:
        prompt, answer = self.at(row)
        text = prompt if len(prompt) <= EXCERPT else "… " + prompt[-EXCERPT:].partition(" ")[2]
        found = {"file": self.name, "line": self.lines[row], "note": note}
        return found | {"text": visible(text), "answer": visible(answer[:80])}

    def finding(
        self,
        severity: str,
        check: str,
        text: str,
        confidence: str,
        count: int,
        examples: Iterable[int | dict[str, Any]] = (),
        of: int = 0,
    ) -> Finding:
        """A finding on this file; its examples are row numbers, or made already."""
        made = [self.example(each) if isinstance(each, int) else each for each in examples]
        total = of or len(self.lines)
        return Finding(severity, check, self.name, text, confidence, count, total, made)


# ---- Reading


def parts(task: str, folder: Path) -> list[Part]:
    """The files of a task that are there: its training file first, then its test files."""
    table, spec = sources.tables(), sources.tables()["tasks"][task]
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in spec["eval"]:
        by_file[table["datasets"][name]["file"]].append(name)
    facts = table.get("audit", {})
    of_all = [facts.get(name, {}) for name in spec["eval"]]
    # A mixture is computed if all of its sets are; class counts are those of one set.
    check = {"check": of_all[0].get("check")} if all(f == of_all[0] for f in of_all) else {}
    train = Part(folder / spec["train"], "train", spec["eval"], labels(spec["eval"]), check)
    tests = [
        Part(folder / file, "test", names, labels(names), facts.get(names[0], {}))
        for file, names in by_file.items()
    ]
    found = [part for part in (train, *tests) if part.path.is_file()]
    # A multi-task set that has no file of its own is what its parts are.
    return [] if "parts" in spec and train not in found else found


def labels(datasets: list[str]) -> frozenset[str]:
    """The answers that there are in some datasets; none where one of them is free."""
    found = [frozenset(sources.tables()["datasets"][name].get("labels", ())) for name in datasets]
    return frozenset().union(*found) if all(found) else frozenset()


def rows(path: Path) -> Iterator[tuple[int, int, tuple[str, str] | str]]:
    """Yields (line, offset, (prompt, answer)) of each row, or the reason that it has none."""
    with open(path, "rb") as file:
        number = offset = 0
        while line := file.readline(convert.MAX_LINE + 1):
            number += 1
            start, offset = offset, offset + len(line)
            rest = line
            while len(rest) > convert.MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(convert.MAX_LINE + 1)  # of a line that is too long
                offset += len(rest)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = 3, line[3:]
            if not line.strip():
                continue
            try:
                yield number, start, convert.row(line, convert.Rules())
            except ValueError as error:
                yield number, start, str(error)


def visible(text: str) -> str:
    """A text of a row as it may be printed: nothing in it steers a terminal or a browser."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def many(count: int, what: str) -> str:
    """`1 row repeats` or `3 rows repeat`, of "row repeats|rows repeat"."""
    one, several = what.split("|")
    return f"{count:,} {one if count == 1 else several}"


def short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def plain(text: str) -> str:
    """A text as it is compared: without differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def sentences(prompt: str) -> list[str]:
    """The pieces that a prompt's template is made of; the middle of a long one is left out."""
    found = [piece for piece in SENTENCE.split(prompt) if piece]
    return found if len(found) <= 40 else found[:20] + found[-20:]


def histogram(values: Iterable[int]) -> dict[str, Any]:
    """Median, largest value and the counts of `BINS` equal bins from 0 to the largest."""
    kept, bins = sorted(values) or [0], [0] * BINS
    for value in kept:
        bins[min(BINS - 1, value * BINS // max(1, kept[-1]))] += 1
    return {"median": int(statistics.median(kept)), "max": kept[-1], "bins": bins}


def checksum(file: str) -> str:
    """What identifies a published file: the SHA-256 of its content, else git's SHA-1 of it."""
    known = sources.tables()["files"].get(file, {})
    return str(known.get("sha256") or known.get("blob", ""))


def is_published(part: Part) -> bool:
    """Whether a file is FinLoRA's to the byte, by the checksums of data/sources.yaml."""
    sha = checksum(part.name)
    return sha == (digest(part.path) if len(sha) == 64 else common_module.git_blob(part.path))


def scan(part: Part) -> Iterator[Finding]:
    """Reads a file once: rows, labels, lengths, and which sentences recur."""
    unread, broken = 0, []
    outside: dict[str, int] = {}  # the first row of each answer that is no label
    for line, offset, row in rows(part.path):
        if isinstance(row, str):
            unread += 1
            broken.append({"file": part.name, "line": line, "text": visible(row)})
            del broken[EXAMPLES:]
            continue
        prompt, answer = row
        if part.labels:
            label = answer
            if answer not in part.labels:
                label = visible(answer[:80])
                label = label if label in outside or len(outside) < DISTINCT else "(others)"
                outside.setdefault(label, len(part.lines))
            part.classes[label] += 1
        part.lines.append(line)
        part.offsets.append(offset)
        part.prompts.append(short_hash(plain(prompt)))
        part.answers.append(short_hash(plain(answer)))
        part.chars.append(len(prompt) + len(answer))
        part.sentences.update({zlib.crc32(piece.encode()) for piece in sentences(prompt)})
        if len(part.sentences) > SENTENCES:  # what is common is seen twice before long
            part.sentences = Counter({k: n for k, n in part.sentences.items() if n > 1})
    if unread:
        text = f"{many(unread, 'row|rows')} cannot be read"
        total = unread + len(part.lines)
        yield part.finding("error", "rows", text, "certain", unread, broken, total)
    if outside:
        count, first = sum(part.classes[label] for label in outside), list(outside.values())
        text = f"{many(count, 'answer is|answers are')} none of {', '.join(sorted(part.labels))}"
        yield part.finding("error", "labels", text, "certain", count, first[:EXAMPLES])
    part.report = {
        "file": part.name,
        "from": sources.origin(part.path),
        "as_published": is_published(part),
        "split": part.split,
        "datasets": part.datasets,
        "rows": len(part.lines),
        "unreadable": unread,
        "labels": dict(part.classes.most_common(20)),
        "chars": histogram(part.chars),
    }


# ---- Checks of one file


def balance(part: Part) -> Iterator[Finding]:
    """Class counts against those that the dataset's source publishes, and their permutations."""
    published = part.facts.get("published_classes", {})
    names, source = list(published), part.facts.get("classes_from", "the source")
    counts = [part.classes[label] for label in names]
    rows, whole = sum(counts), sum(published.values())
    if not rows:
        return
    from scipy.stats import chisquare

    def p_value(order: Iterable[str]) -> float:
        expected = [published[label] * rows / whole for label in order]
        return float(chisquare(counts, expected).pvalue)

    as_is, best = p_value(names), max(permutations(names), key=p_value)
    part.report["source"] = {"classes": published, "p": as_is}
    exact = counts == [published[label] for label in best]
    if best == tuple(names) and as_is <= IMPROBABLE:
        text = f"the class shares are not those of {source} (chi-square, p {below(as_is)})"
        yield part.finding("warning", "balance", text, "high", rows)
    if best == tuple(names) or (as_is > IMPROBABLE and not exact):
        return
    moved = [(label, true) for label, true in zip(names, best, strict=True) if label != true]
    swap = ", ".join(f"{label} stands where the source has {true}" for label, true in moved)
    seen = ", ".join(f"{part.classes[label]:,} {label}" for label in names)
    known = ", ".join(f"{published[label]:,} {label}" for label in names)
    text = f"labels are swapped: {swap}. The file has {seen}; {source} has {known}. "
    if exact:
        # Were the counts any that add up to the rows, each as likely as the other: of the
        # C(rows + k - 1, k - 1) ways to split rows into k classes, k! - 1 fit a swap.
        k = len(names)
        chance = (math.factorial(k) - 1) / math.comb(rows + k - 1, k - 1)
        text += f"All {k} counts fit the swap exactly (by chance: {chance:.0e}), and as labelled "
        text += f"they do not (chi-square, p {below(as_is)})"
        sure = "certain"
    else:
        fits = p_value(best)
        text += f"Swapped, the shares fit (chi-square, p = {fits:.2g}), as labelled they do not "
        text += f"(p {below(as_is)})"
        sure = "high" if fits > 0.01 else "low"
    affected = sum(part.classes[label] for label, _ in moved)
    yield part.finding("error", "balance", text, sure, affected)


def below(p: float) -> str:
    return f"= {p:.0e}" if p > 1e-300 else "< 1e-300"


def tokenizer() -> Any:
    """SmolLM2's tokenizer, or None where the model is not there (yet)."""
    return read_tokenizer() if TOKENIZER.is_file() else None


@cache
def read_tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER))


def sequence_length(task: str) -> int:
    """Tokens that the task's recipes train on at most."""
    matrix = read_yaml(ROOT / "recipes" / "matrix.yaml")
    settings = (matrix["tasks"].get(task) or {}).get("settings", {})
    return int(settings.get("sequence_len", matrix["common"]["sequence_len"]))


def second_reading(part: Part, limit: int, near: "Near") -> Iterator[Finding]:
    """Reads a file again, with its recurring sentences known: templates, tokens, keys, likeness."""
    least = max(3, TEMPLATE_SHARE * len(part.lines))
    part.common = {piece for piece, count in part.sentences.items() if count >= least}
    part.sentences.clear()
    computes = part.facts.get("check") == "formulas"
    step = -(-sum(part.chars) // TOKEN_CHARS) or 1
    first_with: dict[str, int] = {}
    empty, batch, tokens, verdicts = array("I"), [], Tokens(), []
    readable = (row for _, _, row in rows(part.path) if not isinstance(row, str))
    for row, (prompt, answer) in enumerate(readable):
        template = template_of(prompt, part)
        part.templates[template] += 1
        first_with.setdefault(template, row)
        own = varying(prompt, part)
        if PLACEHOLDER.fullmatch(own):
            empty.append(row)
        near.add(part, row, own)
        if tokenizer() and row % step == 0:
            batch.append((row, prompt, answer))
        if len(batch) == 256:
            tokens.count(batch, limit)
        if computes and (verdict := formulas.check(prompt, answer)):
            verdicts.append((row, verdict))
    tokens.count(batch, limit)
    yield from odd_templates(part, first_with)
    if empty and len(empty) < 0.1 * len(part.lines):
        text = f"{many(len(empty), 'prompt asks|prompts ask')} for nothing: a placeholder, like nan"
        yield part.finding("warning", "empty", text, "high", len(empty), empty[:EXAMPLES])
    yield from tokens.findings(part, limit)
    if computes:
        yield from wrong_keys(part, verdicts)


class Tokens:
    """Token counts of rows, prompt and answer, without the chat template's own tokens."""

    def __init__(self) -> None:
        self.lengths, self.long_rows, self.long_answers = (array("I") for _ in range(3))

    def count(self, batch: list[tuple[int, str, str]], limit: int) -> None:
        """Counts the rows of a batch, (row, prompt, answer), and empties it."""
        if batch:
            prompts = tokenizer().encode_batch_fast([prompt for _, prompt, _ in batch])
            answers = tokenizer().encode_batch_fast([answer for _, _, answer in batch])
            for (row, _, _), prompt, answer in zip(batch, prompts, answers, strict=True):
                self.lengths.append(len(prompt) + len(answer))
                if self.lengths[-1] > limit:
                    (self.long_answers if len(answer) >= limit else self.long_rows).append(row)
            batch.clear()

    def findings(self, part: Part, limit: int) -> Iterator[Finding]:
        if self.lengths:
            part.report["tokens"] = histogram(self.lengths) | {"limit": limit}
        for severity, found, what in (
            ("warning", self.long_rows, "row is|rows are"),
            ("error", self.long_answers, "answer alone is|answers alone are"),
        ):
            if found:
                text = (
                    f"{many(len(found), what)} longer than {limit} tokens of SmolLM2's tokenizer, "
                )
                text += f"of {len(self.lengths):,} that were counted"
                yield part.finding(
                    severity,
                    "length",
                    text,
                    "high",
                    len(found),
                    found[:EXAMPLES],
                    len(self.lengths),
                )


def template_of(prompt: str, part: Part) -> str:
    """The sentences of a prompt that recur in its file, with … for the others."""
    pieces: list[str] = []
    for piece in sentences(prompt):
        known = zlib.crc32(piece.encode()) in part.common
        if known or pieces[-1:] != ["…"]:
            pieces.append(piece if known else "…")
    template = " ".join(pieces)[:600]
    room = template in part.templates or len(part.templates) < DISTINCT
    return template if room else "(others)"


def odd_templates(part: Part, first_with: dict[str, int]) -> Iterator[Finding]:
    used = part.templates.most_common()
    part.report["templates"] = {
        "distinct": len(used),
        "most_common": [{"rows": count, "text": visible(text)} for text, count in used[:5]],
    }
    odd = [(text, count) for text, count in used if count < OUTLIER_SHARE * len(part.lines)]
    count, usual = sum(count for _, count in odd), len(used) - len(odd)
    # Where most prompts differ there is no template to be out of.
    if odd and count < 0.1 * len(part.lines):
        text = f"{many(count, 'prompt follows|prompts follow')} none of the "
        text += many(usual, "usual template|usual templates")
        examples = [first_with[template] for template, _ in odd[:EXAMPLES]]
        yield part.finding("note", "template", text, "medium", count, examples)


def wrong_keys(part: Part, verdicts: list[tuple[int, formulas.Verdict]]) -> Iterator[Finding]:
    """The keys that their own formula does not give, by how sure that is."""
    checked, agree = len(verdicts), sum(v.agrees for _, v in verdicts)
    share = checked / max(1, len(part.lines))
    part.report["formulas"] = {"checked": checked, "agree": agree, "share": round(share, 4)}
    for confidence, severity, what in (
        ("high", "error", "is not what its own formula gives|are not what their own formula gives"),
        ("medium", "warning", "follows from another convention|follow from another convention"),
        ("low", "note", "is not exact|are not exact"),
    ):
        found = [(row, v) for row, v in verdicts if not v.agrees and v.confidence == confidence]
        if found:
            kinds = Counter(f"{visible(v.formula)[:60]} ({v.why})" for _, v in found)
            one, several = what.split("|")
            text = f"{many(len(found), f'key {one}|keys {several}')}, of {checked} that could be "
            text += f"computed ({share:.0%} of the rows): "
            text += ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            examples = [part.example(row, computed(v)) for row, v in found]
            yield part.finding(severity, "formula", text, confidence, len(found), examples, checked)


def computed(verdict: formulas.Verdict) -> str:
    """What a wrong key should have been, for an example."""
    nearest = f" in the nearest of {verdict.readings} readings" if verdict.readings > 1 else ""
    text = f"gives {verdict.value:,.2f}{nearest}, the key is {verdict.key:,.2f}"
    return f"{text}: {verdict.why}"


# ---- Checks across rows and files


def repeats(task_parts: list[Part]) -> Iterator[Finding]:
    """Prompts that stand twice, in a file or in two, and prompts with more than one answer."""
    import numpy as np

    hashes = np.concatenate([np.array(part.prompts, dtype=np.uint64) for part in task_parts])
    keys, counts = np.unique(hashes, return_counts=True)
    places: dict[int, list[tuple[int, int]]] = {int(key): [] for key in keys[counts > 1]}
    for number, part in enumerate(task_parts):
        for row, key in enumerate(part.prompts):
            if key in places:
                places[key].append((number, row))
    for number, part in enumerate(task_parts):
        inside = [[row for n, row in found if n == number] for found in places.values()]
        inside = [found for found in inside if len(found) > 1]
        extra = sum(len(found) - 1 for found in inside)
        if inside:
            verbatim = sum(len(f) - len({part.at(row)[0] for row in f}) for f in inside)
            text = (
                f"{many(extra, 'row repeats|rows repeat')} an earlier prompt of the file but for "
            )
            text += f"case and spaces, {verbatim} of them letter for letter"
            examples = [row for found in inside[:EXAMPLES] for row in found[:2]]
            yield part.finding("warning", "duplicates", text, "certain", extra, examples)
        for other, source in enumerate(task_parts[:number]):
            pairs = [
                (next(row for n, row in found if n == other), row)
                for found in places.values()
                if any(n == other for n, _ in found)
                for n, row in found
                if n == number
            ]
            if pairs:
                text = f"{many(len(pairs), 'prompt stands|prompts stand')} in {source.name} too, "
                text += "but for case and spaces"
                kind = ("error", "leak") if source.split == "train" else ("note", "overlap")
                yield part.finding(*kind, text, "certain", len(pairs), in_both(source, part, pairs))
    torn = [
        found
        for found in places.values()
        if len({task_parts[n].answers[row] for n, row in found}) > 1
    ]
    if torn:
        named = sorted({task_parts[n].name for found in torn for n, _ in found})
        text = f"{many(len(torn), 'prompt has|prompts have')} more than one answer "
        text += f"(in {', '.join(named)})"
        both = [task_parts[n].example(row) for f in torn[:EXAMPLES] for n, row in f[:2]]
        # Two answers in words may say the same; two labels do not.
        sure = ("warning", "certain") if all(p.labels for p in task_parts) else ("note", "medium")
        yield task_parts[max(torn[0])[0]].finding(
            sure[0], "contradiction", text, sure[1], len(torn), both, len(hashes)
        )


def in_both(a: Part, b: Part, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Examples of rows that go together, of one file and another."""
    return [part.example(row) for x, y in pairs[:EXAMPLES] for part, row in ((a, x), (b, y))]


def varying(prompt: str, part: Part) -> str:
    """What of a prompt is not its template, as letters, digits and single spaces."""
    own = [p for p in SENTENCE.split(prompt) if p and zlib.crc32(p.encode()) not in part.common]
    text = re.sub(r"\W+", " ", plain(" ".join(own))).strip()
    return text if len(text) <= NEAR_CHARS else text[: NEAR_CHARS // 2] + text[-NEAR_CHARS // 2 :]


def shingles(text: str) -> set[bytes]:
    return {text[i : i + 5].encode() for i in range(len(text) - 4)}


class Near:
    """Near duplicates of a task: MinHash and LSH propose pairs, their exact Jaccard decides.

    A pair counts if its numbers are the same too: a question with other numbers is another one.
    """

    def __init__(self, task_parts: list[Part]) -> None:
        from datasketch import MinHashLSH

        self.lsh = MinHashLSH(threshold=PROPOSED, num_perm=PERMUTATIONS)
        self.step = -(-sum(len(part.lines) for part in task_parts) // NEAR_ROWS) or 1
        self.parts = task_parts
        self.seen: set[int] = set()
        self.pairs: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)

    def add(self, part: Part, row: int, text: str) -> None:
        """Compares what varies in a row with the earlier ones, of its file and those before it."""
        from datasketch import MinHash

        if row % self.step or len(text) < 20 or part.prompts[row] in self.seen:
            return  # too little to compare, or an exact duplicate, which `repeats` counts
        self.seen.add(part.prompts[row])
        pieces, here = shingles(text), self.parts.index(part)
        sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch(pieces)
        like: dict[int, int] = {}  # the first like it in each file
        for n, other in sorted(self.lsh.query(sketch))[:CANDIDATES]:
            if n in like:
                continue
            theirs = varying(self.parts[n].at(other)[0], self.parts[n])
            if sorted(NUMBERS.findall(theirs)) != sorted(NUMBERS.findall(text)):
                continue
            if len(pieces & shingles(theirs)) >= SIMILAR * len(pieces | shingles(theirs)):
                like[n] = other
        for n, other in like.items():
            self.pairs[n, here].append((other, row))
        self.lsh.insert((here, row), sketch, check_duplication=False)

    def findings(self) -> Iterator[Finding]:
        for (first, second), pairs in self.pairs.items():
            a, b = self.parts[first], self.parts[second]
            same = sum(a.answers[x] == b.answers[y] for x, y in pairs)
            where = "an earlier row" if first == second else f"a row of {a.name}"
            text = (
                f"{many(len(pairs), 'prompt is|prompts are')} like {where} (Jaccard similarity of "
            )
            text += f"{SIMILAR} or more, the same numbers), {same} with the same answer"
            leak = a.split == "train" and b.split == "test"
            kind = "near leak" if leak else "near duplicates"
            severity = "warning" if leak and same else "note"
            yield b.finding(severity, kind, text, "medium", len(pairs), in_both(a, b, pairs))


# ---- The report


def at_hand() -> list[str]:
    """The tasks that have files beside the examples; all of them where only the examples are."""
    tasks = list(sources.tables()["tasks"])
    return [task for task in tasks if sources.source_folder(task) != sources.SAMPLE] or tasks


def audit(tasks: list[str]) -> dict[str, Any]:
    """Audits the files of some tasks that are at hand; returns the report as plain values."""
    findings: list[Finding] = []
    files: dict[str, dict[str, Any]] = {}
    for task in tasks:
        found = parts(task, sources.source_folder(task))
        if not found:
            continue
        for part in found:
            findings += scan(part)
        near = Near(found)
        for part in found:
            findings += balance(part)
            findings += second_reading(part, sequence_length(task), near)
            files.setdefault(part.name, part.report | {"repairs": known_repairs(task, part)})
        findings += repeats(found)
        findings += near.findings()
    order = list(SEVERITIES)
    unique = {(f.file, f.text): f for f in findings}.values()
    return {
        "tasks": tasks,
        "tokenizer": shown(TOKENIZER.parent) if tokenizer() else None,
        "limits": {
            "rows compared for likeness, a task": NEAR_ROWS,
            "characters compared of a prompt": NEAR_CHARS,
            "characters tokenized, a file": TOKEN_CHARS,
        },
        "files": list(files.values()),
        "findings": [
            asdict(f) for f in sorted(unique, key=lambda f: (order.index(f.severity), f.file))
        ],
    }


def known_repairs(task: str, part: Part) -> list[str]:
    """The repairs that `make data` makes in a file; a relabelling is for the published one."""
    table = sources.tables()
    if part.split == "train":
        return repairs(table["tasks"][task])
    found = [text for name in part.datasets for text in repairs(table["datasets"][name])]
    return found if part.report["as_published"] else []


def repairs(row: dict[str, Any]) -> list[str]:
    """What the repairs of a task or dataset are for, with their evidence."""
    found = row.get("repairs", [row["repair"]] if "repair" in row else [])
    texts = ["; ".join(str(each[k]) for k in ("reason", "evidence") if k in each) for each in found]
    return [" ".join(text.split()).removesuffix(".") for text in texts]


def print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    files = Table(title="Files", title_justify="left", box=None)
    for name in ("file", "from", "rows", "tokens (median, most)", "templates", "answers"):
        files.add_column(name, justify="right" if name in ("rows", "templates") else "left")
    for each in report["files"]:
        tokens = each.get("tokens")
        answers = ", ".join(f"{n:,} {label}" for label, n in list(each["labels"].items())[:7])
        files.add_row(
            each["file"],
            each["from"],
            f"{each['rows']:,}",
            f"{tokens['median']:,}, {tokens['max']:,}" if tokens else "not counted",
            str(each["templates"]["distinct"]),
            escape(answers) or "free",
        )
    table = Table(title="Findings", title_justify="left", box=None)
    for name in ("", "file", "finding", "confidence"):
        table.add_column(name)
    for each in report["findings"]:
        colour = SEVERITIES[each["severity"]]
        table.add_row(
            f"[{colour}]{each['severity']}[/]",
            each["file"],
            escape(each["text"]),
            each["confidence"],
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(files)
    console.print()
    console.print(table if report["findings"] else "No findings.")
    for each in report["files"]:
        for repair in each["repairs"]:
            console.print(
                f"\n`make data` repairs {each['file']}: {escape(repair)}", highlight=False
            )


def bars(classes: dict[str, int], published: dict[str, Any]) -> str:
    """An SVG of label counts; the outlines are what the source's shares would give."""
    from html import escape

    rows = sum(classes.values())
    source = published.get("classes", {})
    expected = {label: n * rows / sum(source.values()) for label, n in source.items()}
    largest = max([*classes.values(), *expected.values()])
    out = [f'<svg viewBox="0 0 360 {len(classes) * 40}" role="img" aria-label="label counts">']
    for index, (label, count) in enumerate(classes.items()):
        y, text = index * 40, f"{escape(label[:32])}: {count:,} ({count / rows:.1%})"
        out.append(f'<text x="0" y="{y + 13}">{text}</text>')
        out.append(
            f'<rect class="bar" y="{y + 18}" height="14" width="{360 * count / largest:.1f}"/>'
        )
        if label in expected:
            width = max(1.0, 359 * expected[label] / largest)
            out.append(f'<rect class="ghost" x=".5" y="{y + 18}" height="14" width="{width:.1f}"/>')
    caption = "Answers" + ("; outlined: the shares of the source" if expected else "")
    return f"<figure>{''.join(out)}</svg><figcaption>{caption}</figcaption></figure>"


def lengths(values: dict[str, Any], unit: str) -> str:
    """An SVG histogram of row lengths."""
    largest, width = max(values["bins"], default=1), 360 / BINS
    out = ['<svg viewBox="0 0 360 150" role="img" aria-label="histogram of lengths">']
    for index, count in enumerate(values["bins"]):
        height = 120 * count / largest
        out.append(
            f'<rect class="bar" x="{index * width:.1f}" y="{125 - height:.1f}" '
            f'width="{width - 1:.1f}" height="{height:.1f}"/>'
        )
    out.append('<line class="line" x1="0" x2="360" y1="125.5" y2="125.5"/>')
    out.append('<text class="axis" x="0" y="142">0</text>')
    out.append(f'<text class="axis" x="360" y="142" text-anchor="end">{values["max"]:,}</text>')
    caption = f"Length in {unit}, prompt and answer; median {values['median']:,}"
    return f"<figure>{''.join(out)}</svg><figcaption>{caption}</figcaption></figure>"


def page(report: dict[str, Any]) -> str:
    """The report as one HTML file without any other; rows are hostile input, so all is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    files = []
    for each in report["files"]:
        tokens = each.get("tokens")
        plots = bars(each["labels"], each.get("source", {})) if each["labels"] else ""
        plots += lengths(tokens or each["chars"], "tokens" if tokens else "characters")
        files.append(each | {"plots": Markup(plots)})  # noqa: S704 (built above, labels escaped)
    found = Counter(each["severity"] for each in report["findings"])
    counts = ", ".join(f"{found[s]} {s}{'' if found[s] == 1 else 's'}" for s in SEVERITIES)
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(report | {"files": files, "counts": counts})


def run(tasks: list[str], as_json: bool = False) -> None:
    """Audits `tasks`, or all that are at hand, and writes runs/audit/; raises WrongInput."""
    known = sources.tables()["tasks"]
    tasks = tasks or at_hand()
    for task in tasks:
        if task not in known:
            raise WrongInput(f'unknown task "{task}"{nearest(task, list(known))}')
    report = audit(tasks)
    if not report["files"]:
        raise WrongInput(f"no file of {', '.join(tasks)} is at hand; `make fetch` gets FinLoRA's")
    write_json(OUT / "audit.json", report)
    with atomic(OUT / "index.html") as file:
        file.write(page(report).encode())
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print_tables(report)
    print(f"\nreport     {shown(OUT / 'index.html')}, {shown(OUT / 'audit.json')}")
