"""Recognizes which columns of a file hold the prompt, the answer and the other parts of a row.

    shape = recognize(open_rows("my.csv"))
    print(shape.describe())                     text and label: prompt text, answer label

A shape of another kind is a row of `KNOWN`. `MAP="prompt=question,context=passage,answer=gold"`
names the columns by hand. How a shape makes chat rows is in tools/data/shapes.py.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tools.common import WrongInput, nearest
from tools.data import turns
from tools.data.choices import (
    MOST_CHOICES,
    Numbered,
    find_choice_columns,
    fold_choice,
    is_list_of_numbers,
    is_pair_of_letters,
)
from tools.data.formats import RowFile
from tools.data.labels import (
    are_single,
    check_numbering,
    count_values,
    list_options,
    name_numbers,
    parse_labels,
    read_number,
)
from tools.data.shapes import INSTRUCTION_FIRST, PASSAGE, Shape, list_passages

SAMPLED = 200  # rows that show which columns there are
FEW_NUMBERS = 10  # answers that are numbers; with fewer, nothing follows from what is absent
# What `MAP=` may name: the parts of a row.
PARTS = ("messages", "tools", "system", "history", "prompt", "context", "choices", "gold", "answer")


@dataclass(frozen=True)
class Known:
    """A shape that people use: a name, and the columns that may hold each part of a row.

    A file has the shape where it has one column of each of the `needed` parts, and no column named
    in `unless`.
    """

    kind: str
    needed: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)
    order: tuple[str, ...] = ("context", "prompt", "choices")  # of the parts in a prompt
    unless: tuple[str, ...] = ()


SYSTEM = ("system", "system_prompt", "systeminstruction", "system_instruction")
CONTEXT = ("context", "passage", "document", "evidence", "article", "paragraph", "contexts")
CHOICES = ("choices", "options")
TEXT = ("text", "sentence", "headline", "tweet", "news", "title", "content", "review", "post")
LABEL = (
    *("label", "labels", "sentiment", "label_text", "class", "category", "target", "rating"),
    *("gold_label", "polarity", "tone"),
)
# Of rows like FiQA's, whose `target` is the firm that a score is about.
SCORES = ("score", "sentiment_score", "aspect", "aspects")
FINLORA_PROMPT = "context"  # the column of FinLoRA's whole prompts
FINLORA_START = "Instruction:"  # of most of them

KNOWN = [
    Known(
        "messages",
        {"messages": ("messages",)},
        {"system": SYSTEM, "tools": ("tools", "functions")},
    ),
    Known(
        "ShareGPT",
        {"messages": ("conversations", "conversation")},
        {"system": SYSTEM, "tools": ("tools",)},
    ),
    Known(
        "Alpaca",
        {"prompt": ("instruction",), "answer": ("output",)},
        {"context": ("input", "question"), "system": SYSTEM, "history": ("history",)},
        INSTRUCTION_FIRST,
    ),
    Known(
        "Dolly",
        {"prompt": ("instruction",), "answer": ("response", "answer", "completion")},
        {"context": ("context", "input", "question"), "system": SYSTEM},
        INSTRUCTION_FIRST,
    ),
    Known(
        "PIXIU",
        {"prompt": ("query",), "answer": ("answer",)},
        {"choices": CHOICES, "gold": ("gold",)},
    ),
    Known("PIXIU", {"prompt": ("query",), "choices": CHOICES, "gold": ("gold",)}),
    Known(
        "prompt and completion",
        {"prompt": ("prompt",), "answer": ("completion", "response", "answer", "output", "target")},
        {"system": SYSTEM, "context": (*CONTEXT, "input"), "history": ("history",)},
    ),
    Known(
        "question and answer",
        {
            "prompt": ("question", "query", "input"),
            "answer": (
                *("answer", "answers", "answerkey", "response", "output", "completion", "target"),
            ),
        },
        {"context": (*CONTEXT, "input"), "choices": CHOICES}
        | {"system": SYSTEM, "history": ("history",)},
    ),
    Known("FinLoRA", {"prompt": (FINLORA_PROMPT,), "answer": ("target",)}),
    Known("text and label", {"prompt": TEXT, "answer": LABEL}, unless=SCORES),
    Known(
        "text and label",
        {"prompt": TEXT, "answer": tuple(name for name in LABEL if name != "target")},
    ),
    Known(
        "prompt and completion",
        {"prompt": ("user_prompt", "inputs"), "answer": ("targets", "answer", "response")},
        {"system": SYSTEM},
    ),
    Known("prompt and completion", {"prompt": ("user",), "answer": ("assistant",)}),
    Known("Gemini", {"messages": ("contents",)}, {"system": SYSTEM}),
]
# Columns of unanswered rows, for `make predict` without a task.
PROMPTS = ("prompt", "question", "query", "instruction", *TEXT, "input", FINLORA_PROMPT)


def parse_map(text: str) -> dict[str, str]:
    """{part: column} of `MAP="prompt=question,answer=gold"`; raises WrongInput."""
    mapping: dict[str, str] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        part, sign, column = (word.strip() for word in entry.partition("="))
        if not sign or not column:
            raise WrongInput(f'MAP="{text}": write part=column, such as prompt=question')
        if part not in PARTS:
            parts = ", ".join(PARTS)
            raise WrongInput(
                f'MAP: "{part}" is not a part of a row{nearest(part, list(PARTS))}: {parts}'
            )
        if part in mapping:
            raise WrongInput(f'MAP: "{part}" is named twice; TEMPLATE= joins several columns')
        if column in mapping.values():
            raise WrongInput(f'MAP: the column "{column}" is named for two parts of a row')
        mapping[part] = column
    if mapping and "prompt" not in mapping and "messages" not in mapping:
        raise WrongInput(f'MAP="{text}": the column of the prompt is missing: prompt=…')
    return mapping


def recognize(
    rows: RowFile,
    mapping: dict[str, str] | None = None,
    template: str | None = None,
    labels: list[str] | None = None,
) -> Shape:
    """The shape of a file's rows; raises WrongInput that says what is missing.

    `mapping` names columns by hand, `template` words the prompt, `labels` are the names of integer
    answers in their order, or `number=name`.
    """
    sample = [row for _, row in islice(iter(rows), SAMPLED) if isinstance(row, dict)]
    columns = list(dict.fromkeys([*(rows.columns or ()), *(key for row in sample for key in row)]))
    if not columns:
        place, reason = next(iter(rows), ("", "it has none"))
        raise WrongInput(f"{rows.name}: no row can be read; the first, {place}: {reason}")
    shape = map_columns(columns, mapping) if mapping else find_shape(columns)
    if shape is None:
        raise WrongInput(f"{rows.name}: {explain_unknown(columns)}")
    take_choice_columns(shape, columns, sample)
    shape = shape if template is None else shape.word(template, columns)
    history = shape.columns.get("history", "")
    if shape.kind == "question and answer" and not any(
        isinstance(row.get(history), list) for row in sample
    ):
        shape.columns.pop("history", None)
    answer = shape.columns.get("answer", "")
    if labels and (not answer or "gold" in shape.columns):
        raise WrongInput('LABELS= does not apply to rows that hold turns or "gold"')
    if any(isinstance(row.get(answer), list) for row in sample):
        shape.lists = "of one" if are_single(rows, answer) else "of several"
    if labels:
        shape.names = parse_labels(labels)
        check_numbering(rows, answer, shape.names)
    elif rows.label_names.get(answer) and "gold" not in shape.columns:
        shape.names = name_numbers(rows.label_names[answer])
    if "choices" in shape.columns:
        shape.counted_from = find_first_number(rows, shape)
    if shape.choice_columns and not any(map(shape.answers_a_choice, sample)):
        names = shape.columns.pop("choices")
        rows.notes.append(f"no answer is one of the choices {names}, and prompts leave them out")
        shape.choice_columns, shape.counted_from = [], ""
    refuse_single_prompt(rows, shape, sample)
    lists_labels = shape.kind == "text and label" or "labels" in shape.fields
    if lists_labels and (shape.names or shape.lists != "of several"):
        shape.options = list_options(rows, answer, shape.names)
    shape.unused = list_unused(shape, columns, sample)
    return shape


def refuse_unwanted(rows: RowFile, shape: Shape) -> None:
    """Raises WrongInput for rows of KTO or Prodigy, of which some are not wanted."""
    has_verdicts = "answer" in rows.columns and "answer" not in shape.columns.values()
    verdicts = {text.lower() for text in count_values(rows, "answer")} if has_verdicts else set()
    if {"reject", "ignore"} & verdicts and verdicts <= {"accept", "reject", "ignore"}:
        raise WrongInput(
            f'{rows.name}: "answer" says which rows are right (Prodigy); keep those of accept, '
            "or name the columns to train on with MAP="
        )
    names = ("label", "kto_tag")
    column = next((name for name in rows.columns if name.strip().lower() in names), "")
    if not column or column in shape.columns.values():
        return
    labels = {re.sub(r"\.0+\Z", "", label.lower()) for label in count_values(rows, column)}
    unwanted = {"false", "0", "undesirable"} & labels
    if unwanted and labels <= {"true", "false", "0", "1", "desirable", "undesirable"}:
        raise WrongInput(
            f"{rows.name}: {column} says which completions are wanted (KTO), which is not trained "
            "on here; keep the rows where it is true, or name the columns to train on with MAP="
        )


def find_first_number(rows: RowFile, shape: Shape) -> str:
    """ "0" or "1": the number that answers give to the first choice; "" where they give none.

    From 1 where the number of choices occurs and 0 never does. Where most numbers are choices, they
    count them only if the choices are texts. Raises WrongInput where both may be meant.
    """
    column = shape.columns.get("gold") or shape.columns.get("answer", "")
    cases = Counter(list_numbered(rows, shape, column)) if column else Counter[Numbered]()
    if not cases:
        return ""
    like_choices = sum(count for case, count in cases.items() if case.is_choice)
    if "gold" not in shape.columns and like_choices * 2 >= cases.total():
        if not any(all(case.counts_from(first) for case in cases) for first in (0, 1)):
            return ""
        if not any(case.is_typed for case in cases):
            raise WrongInput(
                f'{rows.name}: "{column}" holds numbers that are choices and may also count them; '
                "write the letter of the choice"
            )
    has_zero = any(case.number == 0 for case in cases)
    has_last = any(case.number == case.choices for case in cases)
    if not has_zero and not has_last and cases.total() >= FEW_NUMBERS:
        rows.notes.append(f'"{column}" counts the choices from 0, and 0 never occurs in it')
    return "1" if has_last and not has_zero else "0"


def list_numbered(rows: RowFile, shape: Shape, column: str) -> Iterator[Numbered]:
    """The answers of a column that are numbers, and no letters or labels of choices."""
    for _, row in rows:
        if not isinstance(row, dict) or (number := read_number(shape.take(row, column))) is None:
            continue
        with suppress(ValueError):  # the row is refused later
            choices = shape.read_choices(row)
            if not choices or str(number) in [mark for mark, _ in choices]:
                continue
            is_typed = not isinstance(shape.take(row, column), str)
            is_typed &= not is_list_of_numbers(shape.take_choices(row))
            is_choice = fold_choice(str(number)) in [fold_choice(text) for _, text in choices]
            # Larger numbers tell no more, and a column may have any number of them.
            yield Numbered(min(number, MOST_CHOICES + 1), len(choices), is_choice, is_typed)


def map_columns(columns: list[str], mapping: dict[str, str]) -> Shape:
    for part, column in mapping.items():
        if column not in columns:
            hint = nearest(column, columns) or f"; there are {', '.join(columns)}"
            raise WrongInput(f'MAP: {part} names the column "{column}", which does not exist{hint}')
    return Shape("your own columns", mapping)


def find_shape(columns: list[str]) -> Shape | None:
    """The first of the known shapes that a file's columns fit."""
    by_name: dict[str, str] = {}
    for column in columns:
        by_name.setdefault(column.strip().lower(), column)

    def pick(names: tuple[str, ...]) -> str | None:
        return next((by_name[name] for name in names if name in by_name), None)

    for candidate in KNOWN:
        picked = {part: pick(names) for part, names in candidate.needed.items()}
        for part, names in candidate.optional.items():
            picked[part] = pick(tuple(n for n in names if by_name.get(n) not in picked.values()))
        chosen = {part: column for part, column in picked.items() if column is not None}
        distinct = len(set(chosen.values())) == len(chosen) and not pick(candidate.unless)
        if candidate.needed.keys() <= chosen.keys() and distinct:
            return Shape(candidate.kind, chosen, candidate.order)
    prompt = pick(PROMPTS)
    return Shape("prompts without answers", {"prompt": prompt}) if prompt else None


def take_choice_columns(shape: Shape, columns: list[str], sample: list[dict[str, Any]]) -> None:
    """Takes columns of one choice each for the choices of a shape of questions without any.

    A and B alone may be anything: they are choices where all answers are such letters.
    """
    is_question = shape.kind in ("question and answer", "PIXIU", "your own columns")
    if not is_question or "answer" not in shape.columns or "choices" in shape.columns:
        return
    others = (column for column in columns if column not in shape.columns.values())
    found = find_choice_columns(others)
    if is_pair_of_letters(found):
        answers = [row.get(shape.columns["answer"]) for row in sample]
        texts = [str(answer).strip() for answer in answers if not turns.is_missing(answer)]
        if not texts or not all(re.fullmatch(r"\W?[ab]\W?", text, re.I) for text in texts):
            return
    if found:
        shape.choice_columns, shape.columns["choices"] = found, ", ".join(found)


def refuse_single_prompt(rows: RowFile, shape: Shape, sample: list[dict[str, Any]]) -> None:
    """Raises WrongInput where the prompt is the same in all rows, and another column differs."""
    parts = {"messages", "context", "choices", "history"} & shape.columns.keys()
    if parts or shape.template is not None or not shape.has_answer or len(sample) < FEW_NUMBERS:
        return

    def count(column: str) -> int:
        return len({str(row.get(column)) for row in sample})

    prompt = shape.columns["prompt"]
    others = [column for column in rows.columns if column not in shape.columns.values()]
    richest = max(others, key=count, default="")
    if richest and count(prompt) == 1 and count(richest) * 2 > len(sample):
        raise WrongInput(
            f'{rows.name}: "{prompt}" is the same in all rows; MAP= names the column of the '
            f'prompt, or TEMPLATE="{{{prompt}}} {{{richest}}}" joins it with another'
        )


def explain_unknown(columns: list[str]) -> str:
    """Why no prompt and answer are known among some columns, and what to do."""
    names = ", ".join(columns[:20])
    if reason := explain_preferences(columns):
        return reason
    return f'no prompt and answer among its columns {names}; MAP="prompt=…,answer=…" names them'


def explain_preferences(columns: list[str]) -> str:
    """What to do with rows of preferences; "" for the columns of other rows."""
    if not {"chosen", "rejected"} <= {column.lower() for column in columns}:
        return ""
    text = "these are rows of preferences (chosen and rejected), which are not trained on here"
    return f"{text}; MAP= trains on one of the two columns"


def list_unused(shape: Shape, columns: list[str], sample: list[dict[str, Any]]) -> list[str]:
    """The columns, and the keys of turns, that nothing of a chat row is made of."""
    used = {*shape.columns.values(), *shape.choice_columns, *shape.fields}
    if shape.template is not None:
        parts = {part for part in ("prompt", "context", "choices") if part not in shape.fields}
        unworded = {c for part in parts & shape.columns.keys() for c in shape.list_columns(part)}
        used -= unworded - set(shape.fields)
    unused = [column for column in columns if column not in used]
    if column := shape.columns.get("context"):
        keys: dict[str, None] = {}
        for row in sample:
            with suppress(ValueError):  # the row is refused later
                for passage in list_passages(row.get(column), column):
                    keys |= dict.fromkeys(passage if isinstance(passage, dict) else ())
        if not keys.keys().isdisjoint(PASSAGE):
            unused += [f"{column}[].{key}" for key in keys if key not in (*PASSAGE, "title")]
    if column := shape.columns.get("messages"):
        keys = {}
        for row in sample:
            conversation = row.get(column)
            for turn in conversation if isinstance(conversation, list) else ():
                keys |= dict.fromkeys(turn if isinstance(turn, dict) else ())
        unused += [f"{column}[].{key}" for key in keys if key not in turns.TURN_KEYS]
    return unused
