"""Writes the evaluation of a task of the user's own, by what its answers are.

    build_evaluation("my_task", answers, find_labels(answers))      the content of an lm-eval YAML

How answers are read and scored is in evals/tasks/own.py, a template for each kind in
evals/tasks/_own_<kind>.yaml.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evals import run
from evals.tasks import own, utils
from tools.data import bases

# Answers are labels where they are short and each stands in several rows.
LONGEST_LABEL, ROWS_PER_LABEL = 60, 5  # characters; rows of a label on average
MOST_NUMBERS = 20  # as labels: more different numbers are amounts
SAMPLED = 1000  # answers that decide what a task's answers are; the longest that are counted
MOST = 0.9  # share of answers that decides: a few may be "n/a"
# Every answer gets this share more tokens than the longest key has, and these beside.
ROOM, SPARE = 1.25, 8
LETTERS_PER_TOKEN = 1.8  # where no tokenizer is at hand; all other bytes are a token each


def find_labels(answers: Sequence[str]) -> list[str]:
    """The labels of a classification, most frequent first; empty where answers are no labels."""
    counts = Counter(answers)
    if len(counts) < 2 or len(answers) < ROWS_PER_LABEL * len(counts):
        return []
    if any(len(answer) > LONGEST_LABEL or "\n" in answer for answer in counts):
        return []
    if find_kind(list(counts)) in ("objects", "lists", "calls"):
        return []
    if len(counts) > MOST_NUMBERS and find_kind(list(counts)) == "numbers":
        return []
    return [label for label, _ in counts.most_common()]


def find_kind(answers: Sequence[str]) -> str:
    """What answers that are no labels are: calls, objects, lists, numbers or text."""
    sample = answers[:: -(-len(answers) // SAMPLED)]
    if any(map(own.read_calls, sample)):
        return "calls"
    tests: dict[str, Callable[[str], bool]] = {
        "objects": lambda answer: isinstance(own.find_json(answer), dict) and answer[0] == "{",
        "lists": lambda answer: isinstance(own.find_json(answer), list) and answer[0] == "[",
        "numbers": utils.is_number,
    }
    for kind, test in tests.items():
        if sum(map(test, sample)) >= MOST * len(sample):
            return kind
    return "text"


def build_evaluation(task: str, answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """The lm-eval task for rows with these answers, which are one of `labels` where there are any.

    An answer is `utils.key` of a chat row.
    """
    kind = "labels" if labels else find_kind(answers)
    budget = count_budget([*answers, *labels])
    content: dict[str, Any] = {
        "include": f"../_own_{kind}.yaml",
        "task": f"finlora_{task}",
        "dataset_kwargs": {"data_files": {"test": f"data/chat/{task}_test.jsonl"}},
        "generation_kwargs": {"max_gen_toks": budget, "do_sample": False, "until": []},
    }
    if labels:
        find_label = {"function": "own_label", "labels": list(labels)}
        steps = [find_label, {"function": "take_first"}]
        content["filter_list"] = [{"name": "label", "filter": steps}]
    return content


def find_metric(evaluation: dict[str, Any]) -> str:
    """The first metric of what `build_evaluation` returned."""
    path = run.TASKS / Path(evaluation["include"]).name
    return str(run.read_task_file(path)["metric_list"][0]["metric"])


def count_budget(answers: Sequence[str]) -> int:
    """Tokens for an answer: those of the longest one by any base's tokenizer at hand, and room."""
    longest = sorted(set(answers), key=lambda answer: len(answer.encode()))[-SAMPLED:]
    counts = [
        max(len(row.ids) for row in base.tokenizer.encode_batch(longest, add_special_tokens=False))
        for base in bases.list_bases()
    ] or [max(map(estimate_tokens, longest))]
    return math.ceil(ROOM * max(counts)) + SPARE


def estimate_tokens(text: str) -> int:
    """Tokens of a text, rather too many than too few."""
    letters = len(re.findall("[A-Za-z ]", text))
    return math.ceil(letters / LETTERS_PER_TOKEN) + len(text.encode()) - letters
