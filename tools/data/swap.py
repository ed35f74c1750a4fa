"""Decides from its rows whether two labels of a file are swapped, and what to repair.

FinLoRA's sentiment training file joins four sources. The script that builds it swaps two labels of
one of them (TFNS); the file that it replaced does not. Which one a file is, its rows tell:

1. Rows of TFNS and of FiQA share an instruction ("tweet"). A row of TFNS stands twice in the file,
   a row of FiQA 21 times, so the copies of a prompt with its answer tell them apart. 42 copies fit
   both; they are taken for two equal rows of FiQA, since a tweet would have to stand in TFNS 21
   times, and keep their answer.
2. The class shares of TFNS's rows are compared with those of the source. The distance is half the
   sum of the absolute differences (total variation): 0 is equal, and the swapped shares are 46
   points away from the right ones. SLACK is allowed, since the source's two splits differ, and
   three standard errors of the distance: few rows say little.
3. Near the right shares and not near the swapped ones: unchanged. The reverse: repaired. Neither or
   both: nobody can tell, and the conversion stops. REPAIR=0 and REPAIR=1 decide by hand.

Where copies were dropped or drawn (one row of each prompt, a sample of the file), they tell
nothing. All rows with the instruction are then taken together. FiQA has few neutral posts, so it
cannot make swapped shares look right: where they do look right, nothing is changed. Where they look
swapped, it is not known which rows are to be repaired, and the conversion stops.

One pass over the file; it holds 16 bytes and a number for each prompt with the instruction.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import sources
from tools.common import WrongInput, shown
from tools.data.rows import Rules, batches

SLACK, SLACK_OF_MIXED = 0.05, 0.10
STANDARD_ERRORS = 3
STRAY = 0.01  # share of the prompts whose copies may fit neither source


@dataclass(frozen=True)
class Seen:
    """What a file holds with the instruction: rows of the source by class, and the rows' marks."""

    classes: Counter[str]  # source rows, so copies count once
    rows: int  # rows of the file that they stand for
    marks: frozenset[bytes]  # of prompt and answer
    both: int = 0  # prompts whose copies fit both sources
    neither: int = 0  # prompts whose copies fit neither
    mixed: bool = False  # the copies tell nothing: rows of both sources are among them


def hash_row(prompt: str, answer: str) -> bytes:
    return hashlib.blake2b(f"{answer}\0{prompt}".encode(), digest_size=16).digest()


def see(source: Path, rule: Rules, quarantine: bool, mixed: bool) -> Seen | None:
    """Counts a file's rows with the instruction; None where there are none.

    `mixed`: another source's rows may be among them. A row that breaks a rule raises WrongInput
    unless such rows are kept in quarantine.
    """
    spec = sources.tables()["swap"]
    copies: Counter[bytes] = Counter()
    answer_of: dict[bytes, str] = {}
    for batch in batches(source, Rules(rule.labels)):
        if not quarantine:
            batch.stop_at_first()
        for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
            if spec["instruction"] in prompt:
                key = hash_row(prompt, answer)
                copies[key] += 1
                answer_of[key] = answer
    if not copies:
        return None

    def count(marks: set[bytes], copies_of: Callable[[bytes], float]) -> Counter[str]:
        classes: Counter[str] = Counter()
        for key in marks:
            classes[answer_of[key]] += copies_of(key)  # type: ignore[assignment]
        return classes

    everything = set(copies)
    if not mixed:
        return Seen(count(everything, copies.__getitem__), copies.total(), frozenset(copies))
    ours, theirs = spec["copies"], spec["other_copies"]
    other = {key for key, number in copies.items() if number % theirs == 0}
    both = sum(copies[key] % ours == 0 for key in other)
    tweets = {key for key in everything - other if copies[key] % ours == 0}
    neither = len(everything) - len(other) - len(tweets)
    if neither > STRAY * len(everything):
        rest = everything - other
        return Seen(
            count(everything, lambda key: 1),
            sum(copies[key] for key in rest),
            frozenset(rest),
            both,
            neither,
            mixed=True,
        )
    return Seen(
        count(tweets, lambda key: copies[key] // ours),
        sum(copies[key] for key in tweets),
        frozenset(tweets),
        both,
        neither,
    )


def measure_distance(seen: Counter[str], expected: dict[str, int]) -> float:
    """Total variation between two sets of class counts, 0 to 1."""
    names = seen.keys() | expected.keys()
    total, of = seen.total(), sum(expected.values())
    return sum(abs(seen[name] / total - expected.get(name, 0) / of) for name in names) / 2


def compute_allowance(seen: Seen, expected: dict[str, int]) -> float:
    """The distance up to which shares count as equal."""
    of = sum(expected.values())
    spread = sum(count / of * (1 - count / of) for count in expected.values())
    error = math.sqrt(spread * (1 / seen.classes.total() + 1 / of)) / 2
    return (SLACK_OF_MIXED if seen.mixed else SLACK) + STANDARD_ERRORS * error


def format_shares(classes: dict[str, int]) -> str:
    total = sum(classes.values())
    return ", ".join(f"{name} {100 * classes[name] / total:.1f} %" for name in sorted(classes))


def judge(seen: Seen) -> tuple[str, dict[str, Any]]:
    """("right", "swapped" or "unclear", the numbers that it rests on)."""
    spec = sources.tables()["swap"]
    right = sources.tables()["audit"][spec["dataset"]]["published_classes"]
    swapped = {spec["relabel"].get(name, name): count for name, count in right.items()}
    limit = compute_allowance(seen, right)
    from_right, from_swapped = (measure_distance(seen.classes, each) for each in (right, swapped))
    numbers = {
        "seen": dict(sorted(seen.classes.items())),
        "source": right,
        "distance_from_source": round(from_right, 4),
        "distance_from_swapped": round(from_swapped, 4),
        "allowed": round(limit, 4),
    }
    near = (from_right <= limit, from_swapped <= limit)
    verdict = {(True, False): "right", (False, True): "swapped"}.get(near, "unclear")
    return verdict, numbers


def check(source: Path, rule: Rules, repair: bool | None, quarantine: bool, mixed: bool) -> Rules:
    """A file's rules with the repair that its rows call for, or that `repair` decides by hand.

    Raises WrongInput where the rows do not tell.
    """
    spec = sources.tables()["swap"]
    seen = see(source, rule, quarantine, mixed)
    if seen is None:
        return rule
    name, pair = spec["dataset"].upper(), " and ".join(sorted(spec["relabel"]))
    if not seen.marks:
        text = f"unchanged: no {name} rows, all rows with its instruction have FiQA's copies"
        return replace(rule, label_check={"outcome": "unchanged", "text": text})
    verdict, numbers = judge(seen)
    facts: dict[str, Any] = numbers | {"rows": seen.rows}
    facts |= {"fit_both_sources": seen.both, "fit_neither_source": seen.neither}
    facts |= {"copies_tell_sources_apart": not seen.mixed}
    evidence = (
        f"{seen.classes.total():,} {name} rows have {format_shares(seen.classes)}; "
        f"the source has {format_shares(numbers['source'])}; "
        f"{100 * numbers['distance_from_source']:.1f} points from it, "
        f"{100 * numbers['distance_from_swapped']:.1f} from its shares with {pair} swapped, "
        f"{100 * numbers['allowed']:.1f} allowed"
    )
    if seen.mixed:
        evidence = evidence.replace(f"{name} rows", f"prompts of {name} or FiQA", 1)
        evidence += (
            f"; {seen.neither:,} prompts have copies of neither, so copies do not tell them apart"
        )
    elif seen.neither:
        evidence += (
            f"; {seen.neither:,} prompts have copies of neither source and keep their answers"
        )
    if seen.both:
        evidence += f"; {seen.both:,} prompts have copies that fit both sources and count as FiQA's"
    if repair is not None:
        outcome = "forced"
        what = f"{pair} swapped in {seen.rows:,} rows" if repair else "unchanged"
        text = f"REPAIR={int(repair)}, by hand: {what}; {evidence}"
    elif verdict == "right":
        outcome, text = "unchanged", f"unchanged, shares as the source's: {evidence}"
    elif verdict == "swapped" and not seen.mixed:
        outcome, repair = "repaired", True
        text = f"repaired, {pair} were swapped in {seen.rows:,} rows: {evidence}"
    else:
        why = "which rows are swapped" if verdict == "swapped" else f"whether {pair} are swapped"
        raise WrongInput(
            f"{shown(source)}: its rows do not tell {why}: {evidence}. REPAIR=1 swaps them in the "
            f"{seen.rows:,} rows that may be {name}'s, REPAIR=0 leaves the file as it is"
        )
    facts = {"outcome": outcome, "text": text, **facts}
    if not repair:
        return replace(rule, label_check=facts)
    marks = seen.marks
    return replace(
        rule,
        relabel=spec["relabel"],
        where=lambda prompt, answer: hash_row(prompt, answer) in marks,
        reason=text,
        label_check=facts,
    )
