"""Decides from its rows whether two labels of a file are swapped, and what to repair.

    check(source, rules, repair=None, quarantine=False, mixed=True).label_check["outcome"]

FinLoRA's sentiment training file joins four sources. The script that builds it swaps two labels of
one of them (TFNS); the file that it replaced does not. The rows tell which file it is:

1. Rows of TFNS and FiQA share an instruction ("tweet"). The file has 2 copies of a TFNS row and 21
   of a FiQA row, so the copies of a prompt with its answer tell them apart. 42 copies fit both;
   they count as two equal rows of FiQA, since TFNS would need the same tweet 21 times, and keep
   their answer.
2. The class shares of TFNS's rows are compared with the source's. The distance is half the sum of
   the absolute differences (total variation); the swapped shares are 46 points from the right ones.
   SLACK is allowed because the source's two splits differ, and three standard errors of the
   distance because few rows say little.
3. Near the right shares only: unchanged. Near the swapped shares only: repaired. Near both or
   neither: the conversion stops. REPAIR=0 and REPAIR=1 decide by hand.

In a deduplicated or sampled file the copies say nothing, so all rows with the instruction are taken
together. FiQA has few neutral posts and cannot make swapped shares look right: if they look right,
nothing changes. If they look swapped, it is unknown which rows to repair, and the conversion stops.

One pass over the file; it holds 16 bytes and a number for each prompt with the instruction.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import sources
from tools.common import WrongInput, shown
from tools.data.rows import Rules, read_batches

SLACK, SLACK_OF_MIXED = 0.05, 0.10
STANDARD_ERRORS = 3
STRAY = 0.01  # share of the prompts whose copies may fit neither source


@dataclass(frozen=True)
class Evidence:
    """The source's rows in a file, by class, and the marks of the rows."""

    classes: Counter[str]  # source rows, so copies count once
    rows: int  # rows of the file that they stand for
    marks: frozenset[bytes]  # of prompt and answer
    both: int = 0  # prompts whose copies fit both sources
    neither: int = 0  # prompts whose copies fit neither
    mixed: bool = False  # the copies say nothing: rows of both sources are among them


def check(source: Path, rules: Rules, repair: bool | None, quarantine: bool, mixed: bool) -> Rules:
    """Adds to a file's rules the repair that its rows call for, or that `repair` decides by hand.

    `mixed`: another source's rows may be among them. Raises WrongInput if the rows do not decide,
    and for a row that breaks a rule unless `quarantine`.
    """
    spec = sources.tables()["swap"]
    copies, answers = count_copies(source, rules, quarantine)
    if not copies:
        return rules
    evidence = weigh_copies(copies, answers, mixed)
    name, pair = spec["dataset"].upper(), " and ".join(sorted(spec["relabel"]))
    if not evidence.marks:
        text = f"unchanged: no {name} rows, all rows with its instruction have FiQA's copies"
        return replace(rules, label_check={"outcome": "unchanged", "text": text})
    verdict, numbers = judge(evidence)
    reasons = describe(evidence, numbers, name, pair)
    if repair is not None:
        outcome = "forced"
        action = f"{pair} swapped in {evidence.rows:,} rows" if repair else "unchanged"
        text = f"REPAIR={int(repair)}, by hand: {action}; {reasons}"
    elif verdict == "right":
        outcome, text = "unchanged", f"unchanged, shares as the source's: {reasons}"
    elif verdict == "swapped" and not evidence.mixed:
        outcome, repair = "repaired", True
        text = f"repaired, {pair} were swapped in {evidence.rows:,} rows: {reasons}"
    else:
        open_point = "which rows are" if verdict == "swapped" else f"whether {pair} are"
        raise WrongInput(
            f"{shown(source)}: its rows do not tell {open_point} swapped: {reasons}. REPAIR=1 "
            f"swaps them in the {evidence.rows:,} rows that may be {name}'s, REPAIR=0 leaves the "
            "file as it is"
        )
    facts = {"outcome": outcome, "text": text, **numbers, "rows": evidence.rows}
    facts |= {"fit_both_sources": evidence.both, "fit_neither_source": evidence.neither}
    facts |= {"copies_tell_sources_apart": not evidence.mixed}
    if not repair:
        return replace(rules, label_check=facts)
    return replace(
        rules,
        relabel=spec["relabel"],
        relabels_row=lambda prompt, answer: hash_row(prompt, answer) in evidence.marks,
        reason=text,
        label_check=facts,
    )


def hash_row(prompt: str, answer: str) -> bytes:
    return hashlib.blake2b(f"{answer}\0{prompt}".encode(), digest_size=16).digest()


def count_copies(
    source: Path, rules: Rules, quarantine: bool
) -> tuple[Counter[bytes], dict[bytes, str]]:
    """Returns the copies and the answer of each distinct row with the instruction, by mark."""
    instruction = sources.tables()["swap"]["instruction"]
    copies: Counter[bytes] = Counter()
    answers: dict[bytes, str] = {}
    for batch in read_batches(source, Rules(rules.labels)):
        if not quarantine:
            batch.stop_at_first()
        for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
            if instruction in prompt:
                mark = hash_row(prompt, answer)
                copies[mark] += 1
                answers[mark] = answer
    return copies, answers


def weigh_copies(copies: Counter[bytes], answers: dict[bytes, str], mixed: bool) -> Evidence:
    """Selects the source's rows among those with its instruction."""

    def collect(source_rows: Mapping[bytes, int], both: int = 0, neither: int = 0) -> Evidence:
        classes: Counter[str] = Counter()
        for mark, number in source_rows.items():
            classes[answers[mark]] += number
        rows = sum(copies[mark] for mark in source_rows)
        return Evidence(classes, rows, frozenset(source_rows), both, neither)

    if not mixed:
        return collect(copies)
    spec = sources.tables()["swap"]
    copies_of_source, copies_of_other = spec["copies"], spec["other_copies"]
    others = {mark for mark, number in copies.items() if number % copies_of_other == 0}
    rest = copies.keys() - others
    fitting = {m: copies[m] // copies_of_source for m in rest if copies[m] % copies_of_source == 0}
    both = sum(copies[mark] % copies_of_source == 0 for mark in others)
    neither = len(rest) - len(fitting)
    if neither > STRAY * len(copies):
        rows = sum(copies[mark] for mark in rest)
        return Evidence(Counter(answers.values()), rows, frozenset(rest), both, neither, True)
    return collect(fitting, both, neither)


def judge(evidence: Evidence) -> tuple[str, dict[str, Any]]:
    """Returns "right", "swapped" or "unclear", and the numbers behind the verdict."""
    spec = sources.tables()["swap"]
    right = sources.tables()["audit"][spec["dataset"]]["published_classes"]
    swapped = {spec["relabel"].get(name, name): count for name, count in right.items()}
    allowed = compute_allowance(evidence, right)
    distances = [measure_distance(evidence.classes, classes) for classes in (right, swapped)]
    numbers = {
        "seen": dict(sorted(evidence.classes.items())),
        "source": right,
        "distance_from_source": round(distances[0], 4),
        "distance_from_swapped": round(distances[1], 4),
        "allowed": round(allowed, 4),
    }
    is_right, is_swapped = (distance <= allowed for distance in distances)
    if is_right == is_swapped:
        return "unclear", numbers
    return "right" if is_right else "swapped", numbers


def measure_distance(classes: Counter[str], expected: dict[str, int]) -> float:
    """Computes the total variation between two sets of class counts, 0 to 1."""
    names = classes.keys() | expected.keys()
    total, of = classes.total(), sum(expected.values())
    return sum(abs(classes[name] / total - expected.get(name, 0) / of) for name in names) / 2


def compute_allowance(evidence: Evidence, expected: dict[str, int]) -> float:
    """Computes the distance up to which shares count as equal."""
    of = sum(expected.values())
    spread = sum(count / of * (1 - count / of) for count in expected.values())
    error = math.sqrt(spread * (1 / evidence.classes.total() + 1 / of)) / 2
    return (SLACK_OF_MIXED if evidence.mixed else SLACK) + STANDARD_ERRORS * error


def describe(evidence: Evidence, numbers: dict[str, Any], name: str, pair: str) -> str:
    """Puts the numbers of a verdict into words."""
    kind = f"prompts of {name} or FiQA" if evidence.mixed else f"{name} rows"
    parts = [
        f"{evidence.classes.total():,} {kind} have {format_shares(evidence.classes)}",
        f"the source has {format_shares(numbers['source'])}",
        f"{100 * numbers['distance_from_source']:.1f} points from it, "
        f"{100 * numbers['distance_from_swapped']:.1f} from its shares with {pair} swapped, "
        f"{100 * numbers['allowed']:.1f} allowed",
    ]
    if evidence.neither:
        ending = " source and keep their answers"
        if evidence.mixed:
            ending = ", so copies do not tell them apart"
        parts.append(f"{evidence.neither:,} prompts have copies of neither{ending}")
    if evidence.both:
        parts.append(
            f"{evidence.both:,} prompts have copies that fit both sources and count as FiQA's"
        )
    return "; ".join(parts)


def format_shares(classes: dict[str, int]) -> str:
    total = sum(classes.values())
    return ", ".join(f"{name} {100 * classes[name] / total:.1f} %" for name in sorted(classes))
