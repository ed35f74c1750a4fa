"""Loads the rules of a dataset or task: its labels, and its repairs from data/sources.yaml.

    load_test_rules("fpb", Path("data/raw/test/fpb_test.jsonl")).labels
    load_train_rules("xbrl_term", Path("data/raw")).removals

A new kind of repair is a function here and a row in `REMOVALS`.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tools import sources
from tools.common import git_blob
from tools.data import swap
from tools.data.formulas import find_expressions
from tools.data.rows import Removal, Reword, RowTest, Rules, read_batches
from tools.data.turns import join_turns


def load_test_rules(
    dataset: str, source: Path, repair: bool | None = None, quarantine: bool = False
) -> Rules:
    """Loads the rules of one dataset. Its repair applies to the published file; for another file of
    the dataset and for a user's own test file the rows decide (see tools/data/swap.py).
    """
    spec = sources.tables()["datasets"][dataset]
    rules = Rules(frozenset(spec.get("labels", ())), reword=choose_reword(spec))
    known_repair = spec.get("repair")
    if known_repair and git_blob(source) == known_repair["blob"]:
        reason = known_repair["reason"]
        text = f"repaired: {reason.strip().removesuffix('.')}"
        check = {"outcome": "repaired", "text": text}
        return replace(rules, relabel=known_repair["relabel"], reason=reason, label_check=check)
    if known_repair or Path(spec["file"]).is_absolute():
        return check_labels(source, rules, repair, quarantine, mixed=not known_repair)
    return rules


def check_labels(
    source: Path,
    rules: Rules,
    repair: bool | None = None,
    quarantine: bool = False,
    mixed: bool = True,
) -> Rules:
    """Adds to a file's rules the repair that its rows call for; see `swap.check`."""
    relabel = sources.tables()["swap"]["relabel"]
    is_example = source.resolve().is_relative_to(
        sources.SAMPLE.resolve()
    )  # made up, so without the source's shares
    if is_example or rules.labels and not relabel.keys() <= rules.labels:
        return rules
    return swap.check(source, rules, repair, quarantine, mixed)


def load_train_rules(task: str, folder: Path) -> Rules:
    """Loads the rules of a task's training set: the labels of its datasets, and its repairs."""
    spec = sources.tables()["tasks"][task]
    removals = tuple(
        Removal(kind, repair["reason"], partial(REMOVALS[kind], repair[kind], folder))
        for repair in spec.get("repairs", ())
        for kind in repair.keys() & REMOVALS.keys()
    )
    cut = spec.get("cut_long_prompts") == "middle"
    datasets = [sources.tables()["datasets"][name] for name in spec["eval"]]
    reword = choose_reword(datasets[0], spec.get("answers")) if datasets else None
    return Rules(join_labels(spec["eval"]), removals=removals, cut=cut, reword=reword)


def choose_reword(dataset: dict[str, Any], answers: str | None = None) -> Reword | None:
    """How a dataset words its prompts, and a task its training answers, where FinLoRA's differ."""
    instruction = dataset.get("instruction")
    if not instruction:
        return None
    before, after = instruction["instead_of"], instruction["write"]

    def reword(prompt: str, answer: str) -> tuple[str, str]:
        if before not in prompt:
            raise ValueError(f'the prompt lacks its instruction, "{before[:60]}…"')
        if answers == "worked":
            (expression,) = find_expressions(prompt, answer)
            answer = f"{expression} = {answer}"
        return prompt.replace(before, after), answer

    return reword


def join_labels(datasets: list[str]) -> frozenset[str]:
    """Joins the labels of datasets; empty if one of them has free-text answers."""
    table = sources.tables()["datasets"]
    labels = [frozenset(table[name].get("labels", ())) for name in datasets]
    return frozenset().union(*labels) if all(labels) else frozenset()


def fingerprint(prompt: str) -> bytes:
    """Hashes a prompt to 16 bytes, ignoring case and white space."""
    return hashlib.blake2b(" ".join(prompt.lower().split()).encode(), digest_size=16).digest()


def fingerprint_row(row: dict[str, Any], field: str = "messages") -> bytes:
    """Hashes the prompt of a chat row: its turns but the last, and its tools."""
    turns = [{"role": "", "content": ""} | turn for turn in row[field][:-1]]
    return fingerprint(f"{join_turns(turns)}{row.get('tools') or ''}")


# ---- Removals: each makes a test; rows that pass it leave the training set


def remove_rows_of(datasets: list[str], folder: Path) -> RowTest | str:
    """Tests whether a prompt is in a test set, ignoring case and white space."""
    paths = [folder / sources.tables()["datasets"][name]["file"] for name in datasets]
    for path in paths:
        if not path.is_file():
            return f"not looked for: {path.name} is not at hand"
    batches = (batch for path in paths for batch in read_batches(path))
    tested = {fingerprint(prompt) for batch in batches for prompt in batch.prompts}
    return lambda prompt, answer: fingerprint(prompt) in tested


def remove_repeats(wanted: bool, folder: Path) -> RowTest:
    """Tests whether a prompt came before; holds 16 bytes of each prompt."""
    seen: set[bytes] = set()

    def is_repeated(prompt: str, answer: str) -> bool:
        mark = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
        count = len(seen)
        seen.add(mark)
        return wanted and len(seen) == count

    return is_repeated


def remove_prompts(pattern: str, folder: Path) -> RowTest:
    search = re.compile(pattern).search
    return lambda prompt, answer: search(prompt)


def remove_answers(pattern: str, folder: Path) -> RowTest:
    search = re.compile(pattern).search
    return lambda prompt, answer: search(answer)


def remove_without_expression(wanted: bool, folder: Path) -> RowTest:
    """Tests whether no expression gives the key of Financial Math."""
    return lambda prompt, answer: wanted and not find_expressions(prompt, answer)


def remove_with_several_expressions(wanted: bool, folder: Path) -> RowTest:
    return lambda prompt, answer: wanted and len(find_expressions(prompt, answer)) > 1


REMOVALS: dict[str, Callable[[Any, Path], RowTest | str]] = {
    "without_rows_of": remove_rows_of,
    "unique": remove_repeats,
    "without_prompts": remove_prompts,
    "without_answers": remove_answers,
    "without_expression": remove_without_expression,
    "with_several_expressions": remove_with_several_expressions,
}
