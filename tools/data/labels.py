"""The labels of a column of answers: their names, and which of them a prompt lists.

parse_labels(["1=negative", "2=positive"])      {"1": "negative", "2": "positive"}
list_options(rows, "label", None)               ["negative", "positive"]
"""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tools.common import WrongInput
from tools.data import turns
from tools.data.formats import RowFile

MOST_OPTIONS = 20  # labels that a prompt lists
MOST_SPELLINGS = 1000  # distinct labels; a column with more holds no labels


def parse_labels(labels: list[str]) -> dict[str, str]:
    """{integer as text: name} of `LABELS=negative,neutral` or `LABELS=-1=negative,0=neutral`."""
    pairs = [re.fullmatch(r"\s*([+-]?\d+)(?:\.0+)?\s*=\s*(.*?)\s*", label) for label in labels]
    others = [label for label, pair in zip(labels, pairs, strict=True) if not pair]
    others += [label for label in labels if re.search(r'[\[\]{};"]', label)]
    if others and (any(pairs) or are_misspelled(labels)):
        raise WrongInput(
            f'LABELS=: "{others[0]}" is no number=name; write LABELS="0=negative,1=positive", or '
            "the names alone, from 0 on"
        )
    if any(pairs):
        names = {str(int(pair[1])): pair[2] for pair in pairs if pair}
    else:
        names = name_numbers([label.strip() for label in labels])
    if not all(names.values()) or len(set(names.values())) < len(labels):
        raise WrongInput(f'LABELS="{",".join(labels)}": each label needs a name of its own')
    return names


def are_misspelled(labels: list[str]) -> bool:
    """Whether labels that are no number=name are meant as such: `0:negative`, `(0) negative`,
    `negative=0`, `N=negative`, or a list in brackets.
    """
    return (
        any(re.search(r'[=\[\]{};"]', label) for label in labels)
        or all(re.fullmatch(r"\s*\(?[+-]?\d+\W+[^\W\d].*", label) for label in labels)
        or all(re.fullmatch(r".*[^\W\d]\s*:\s*\d+\s*", label) for label in labels)
    )


def check_numbering(rows: RowFile, column: str, names: dict[str, str]) -> None:
    """Raises WrongInput where LABELS= names numbers from 0 and the labels count from 1."""
    counts = {re.sub(r"\.0+\Z", "", value.lower()) for value in count_values(rows, column)}
    if counts and counts <= {"true", "false"} and names.keys() == {"0", "1"}:
        rows.notes.append(f'"{column}": false is {names["0"]}, true is {names["1"]}')
    counts_from_1 = str(len(names)) in counts and "0" not in counts
    if counts_from_1 and list(names) == list(map(str, range(len(names)))):
        pairs = ",".join(f"{int(number) + 1}={name}" for number, name in names.items())
        raise WrongInput(f'LABELS=: "{column}" counts from 1; write LABELS="{pairs}"')


def name_numbers(labels: list[str]) -> dict[str, str]:
    return {str(number): label for number, label in enumerate(labels)}


def are_single(rows: RowFile, column: str) -> bool:
    """Whether a column holds lists, and each of them one text or number."""
    found = False
    for _, row in rows:
        value = row.get(column) if isinstance(row, dict) else None
        if isinstance(value, list):
            if len(value) != 1 or isinstance(value[0], dict | list):
                return False
            found = True
    return found


def list_options(rows: RowFile, column: str, names: dict[str, str] | None) -> list[str]:
    """The labels that prompts list, which only all rows show; none where there are too many.

    `column` holds the answers, "" where there are none; `names` are those of integer labels.
    """
    if names:
        return list(names.values()) if len(names) <= MOST_OPTIONS else []
    if not column:
        return []
    counts = count_values(rows, column)
    folded = turns.fold_spellings(counts)
    return choose_options(label for label in counts if label not in folded)


def choose_options(labels: Iterable[str]) -> list[str]:
    """Labels as a prompt lists them, in order; none where there are too few or too many."""
    options = sorted(label for label in set(labels) if not turns.is_stand_in(label))
    return options if 2 <= len(options) <= MOST_OPTIONS else []


def count_values(rows: RowFile, column: str) -> Counter[str]:
    """How often a column holds each text or number, also in lists; empty where there are too many
    of them.
    """
    counts = Counter[str]()
    for _, row in rows:
        value = row.get(column) if isinstance(row, dict) else None
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str | int | float) or turns.is_missing(entry):
                continue
            with suppress(ValueError):  # the row is refused later
                counts[turns.strip_end_tokens(turns.write_value(entry, column)).strip()] += 1
        if len(counts) > MOST_SPELLINGS:
            return Counter()
    return counts


def read_number(value: Any) -> int | None:
    """An integer, of a number or its text; None for anything else."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([+-]?\d+)(\.0+)?\s*", value)):
        return int(match[1])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
