"""The choices of a question: how files hold them, how prompts list them, how answers name them.

choices = parse_choices(["up", "down"], "options")      [("A", "up"), ("B", "down")]
write_choices(choices, "Which way?", False)             "A. up\\nB. down"
name_choice(choices, "(b)", [])                         "B"
find_choice_columns(["question", "Option A", "Option B"])   ["Option A", "Option B"]
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import takewhile
from typing import Any, NamedTuple

import orjson

from tools.data import turns

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_CHOICES = len(LETTERS)
# Columns of one choice each, in their order, without spaces and punctuation: a, b, …; optiona, …;
# choice1, …; choice0, ….
COLUMNS = [
    [f"{start}{mark}" for mark in marks]
    for start in (
        *("", "option", "options", "opt", "op", "choice", "choices", "answer", "ans"),
        *("alternative", "ending"),
    )
    for marks in ("abcdefghij", "0123456789", "123456789")
    if start or marks.isalpha()
]
# The keys of a choice that is an object: its letter or label, and its text.
OBJECTS = [
    *(("key", "value"), ("label", "text"), ("label", "value"), ("letter", "text")),
    *(("letter", "value"), ("option", "text"), ("option", "choice"), ("id", "text")),
    *(("id", "content"), ("", "text"), ("", "content"), ("", "value"), ("", "option")),
    *(("", "choice"), ("", "answer")),
]
# A letter as people write it: B, (B), [B], Option B, `B) text`, `B - text`.
SPELLED = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[]?(\w+)[)\]]?(?:\s*[).:–-]+\s*(.*))?", re.S | re.I
)
Choice = tuple[str, str]  # letter or label, and text; "" for a text that is missing


class Numbered(NamedTuple):
    """An answer that is a number, and what tells whether it counts the choices of its row."""

    number: int
    choices: int  # how many there are
    is_choice: bool  # one of them is this number
    is_typed: bool  # the answer is a number and the choices are texts

    def counts_from(self, first: int) -> bool:
        return first <= self.number < first + self.choices


def find_choice_columns(columns: Iterable[str]) -> list[str]:
    """The columns that hold a choice each, such as A, B and C, or option_a and option_b."""
    by_name: dict[str, str] = {}
    for column in columns:
        by_name.setdefault(re.sub(r"[\W_]+", "", column.casefold()), column)
    for names in COLUMNS:
        found = [by_name[name] for name in takewhile(by_name.__contains__, names)]
        if len(found) > 1:
            return found
    return []


def is_pair_of_letters(columns: list[str]) -> bool:
    """Whether columns of choices are A and B alone, which may be anything."""
    return len(re.sub(r"[\W_]+", "", "".join(columns))) == 2


def parse_choices(value: Any, column: str) -> list[Choice]:
    """The choices of a row; ValueError that names the column where they are none."""
    labels: list[Any] = []
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = orjson.loads(value)
        except ValueError:
            raise ValueError(f'"{column}" is a text and not a JSON list of choices') from None
    if isinstance(value, dict):  # ARC: {"text": […], "label": […]}; or {"A": …, "B": …}
        if isinstance(value.get("text"), list):
            marks = value.get("label")
            value, labels = value["text"], marks if isinstance(marks, list) else []
        else:
            value, labels = list(value.values()), list(value)
    if value and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = ((m, t) for m, t in OBJECTS if all({m, t} - {""} <= e.keys() for e in value))
        mark, text = next(pairs, ("", ""))
        if not text:
            raise ValueError(f'"{column}" holds objects without a text: {str(value[0])[:60]}')
        marks = [entry[mark] for entry in value] if mark else []
        if len({m for m in marks if isinstance(m, str) and 0 < len(m.strip()) < 3}) == len(value):
            labels = marks  # other ids are numbers of rows, or names
        value = [entry[text] for entry in value]
    if turns.is_missing(value):
        return []
    if not isinstance(value, list) or len(value) > MOST_CHOICES:
        raise ValueError(f'"{column}" must be a list of at most {MOST_CHOICES} choices')
    letters = map(str, labels) if len(labels) == len(value) else LETTERS
    texts = (turns.write_value(text, column) for text in value)
    return [
        (letter, "" if turns.is_stand_in(text) else text)
        for letter, text in zip(letters, texts, strict=False)
    ]


def write_choices(choices: list[Choice], prompt: str, are_answers: bool) -> str:
    """Choices with their letters; "" where the prompt lists them already.

    `are_answers`: answers are the choices themselves, so in a prompt their texts are enough.
    """
    choices = [(mark, text) for mark, text in choices if text]
    marked = [rf"{re.escape(mark)}\W{{1,3}}\s*{re.escape(text)}" for mark, text in choices]
    if are_answers and all(text in prompt for _, text in choices):
        return ""
    if all(re.search(rf"(?<!\w){pattern}(?!\w)", prompt) for pattern in marked):
        return ""
    if all(re.match(rf"\W?{re.escape(mark)}[.):]", text) for mark, text in choices):
        return "\n".join(text for _, text in choices)
    return "\n".join(f"{mark}. {text}" for mark, text in choices)


def name_choice(choices: list[Choice], answer: str, columns: list[str]) -> str | None:
    """The letter that an answer means, or the text of the choice that it is; None for another.

    A letter may be written b, (B), B), `B) text` or Option B, or be the name of the choice's own
    column, one of `columns`.
    """
    texts = dict(choices)
    if answer not in texts:
        same = [text for text in texts.values() if text == answer]
        same += [
            text for text in texts.values() if text and fold_choice(text) == fold_choice(answer)
        ]
        if same:
            return same[0]
    letters = {name.casefold(): mark for name, mark in zip(columns, texts, strict=False)}
    letters |= {mark.casefold(): mark for mark in texts}
    spelled = SPELLED.fullmatch(answer)
    letter, text = (spelled[1], spelled[2] or "") if spelled else (answer, "")
    mark = answer if answer in texts else letters.get(letter.casefold(), "")
    if not texts.get(mark) or (text and fold_choice(text) != fold_choice(texts[mark])):
        return None
    return mark


def fold_choice(text: str) -> str:
    """A choice without case, a full stop and the marks of amounts; a number as its value."""
    plain = text.casefold().strip().removesuffix(".")
    with suppress(ValueError):
        return str(float(plain.strip("$€£% ").replace(",", "")))
    return plain


def is_list_of_numbers(choices: Any) -> bool:
    return isinstance(choices, list) and any(isinstance(choice, int | float) for choice in choices)
