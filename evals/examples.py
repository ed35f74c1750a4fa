"""Chooses the worked examples that a base finds in its prompts, from a task's training rows.

    choose_examples(sources.test_path("fpb"), 3)     three chat rows, one of each label

The same rows are chosen every time: a seed and the prompts alone decide, not the order of the file.
Labels are balanced, and no prompt of the test rows is among them.
"""

import hashlib
from bisect import insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tools import sources
from tools.common import WrongInput, shown
from tools.data.rules import fingerprint_row

SEED = b"42"


def choose_examples(test_rows: Path, count: int) -> list[dict[str, Any]]:
    """`count` training rows of the task that is tested on a file of chat rows.

    Where answers are labels, the examples have each equally often, or once less often. Raises
    WrongInput where there are fewer rows of one question and one answer, and where they have one
    label of several.
    """
    train_rows = find_training_rows(test_rows)
    labels = find_labels(test_rows)
    sources.manifest(train_rows)
    tested = {mark_prompt(row) for row in read_chat_rows(test_rows)}
    by_label: dict[str, list[tuple[bytes, bytes]]] = {}  # the first ones: (mark, row as JSON)
    for row in read_chat_rows(train_rows):
        answer, mark = str(row["messages"][-1].get("content")), mark_prompt(row)
        if not is_single_question(row) or mark in tested or (labels and answer not in labels):
            continue
        first = by_label.setdefault(answer if labels else "", [])
        if all(mark != other for other, _ in first):
            insort(first, (mark, orjson.dumps(row)))
            del first[count:]
    if labels and len(labels) > 1 >= len(by_label):
        raise WrongInput(
            f"{shown(train_rows)} answers with {' and '.join(by_label) or 'none'} of the "
            f"{len(labels)} labels of {shown(test_rows)}, so worked examples would teach one answer"
        )
    ranked = sorted(
        (rank, mark, text) for first in by_label.values() for rank, (mark, text) in enumerate(first)
    )
    by_prompt: dict[bytes, bytes] = {}
    for _, mark, text in ranked:
        by_prompt.setdefault(mark, text)  # one row of a prompt that has two labels
    texts = list(by_prompt.values())[:count]
    if len(texts) < count:
        raise WrongInput(
            f"{count} worked examples are too many: {shown(train_rows)} has {len(texts)} rows of "
            f"one question and one answer that {shown(test_rows)} lacks"
        )
    return [orjson.loads(text) for text in texts]


def find_labels(test_rows: Path) -> set[str]:
    """The labels that answers to a file of chat rows can be; empty where they are no labels.

    Those of the dataset, as the file need not have each: what its rows are is not for the prompt.
    """
    found = sources.manifest(test_rows).get("labels")
    if not found:
        return set()
    for name, entry in sources.tables()["datasets"].items():
        if sources.test_path(name) == test_rows:
            return set(entry.get("labels") or found)
    return set(found)


def find_training_rows(test_rows: Path) -> Path:
    """The training file of the first task that is tested on a file of chat rows."""
    for task, spec in sources.tables()["tasks"].items():
        if "parts" not in spec and test_rows in map(sources.test_path, spec["eval"]):
            return sources.train_path(task)
    raise WrongInput(f"no task trains for {shown(test_rows)}, so there are no worked examples")


def read_chat_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        yield from map(orjson.loads, file)


def is_single_question(row: dict[str, Any]) -> bool:
    """Whether a row is a question and its answer, perhaps behind a system turn, without tools."""
    roles = [turn["role"] for turn in row["messages"] if not turn.get("tool_calls")]
    is_plain = roles in (["user", "assistant"], ["system", "user", "assistant"])
    return is_plain and len(roles) == len(row["messages"]) and not row.get("tools")


def mark_prompt(row: dict[str, Any]) -> bytes:
    """Identifies a prompt but for case and white space, in an order that the seed decides."""
    return hashlib.blake2b(fingerprint_row(row), key=SEED, digest_size=16).digest()


def read_question(row: dict[str, Any]) -> str:
    """The last question of a chat row."""
    return str(row["messages"][-2]["content"])
