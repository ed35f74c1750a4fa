"""Divides a recipe's rows for a search: those that train, and 100 to 200 that judge.

    hold_out(recipe, settings.validation, folder).judged

The recipe's validation rows judge. Where they are too few, training rows are held back, drawn by
prompt with a fixed seed; all copies of a prompt are on one side, and so are rows that stay together
where the task's test rows are divided from its training rows. Test rows are not read.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tools import recipes, sources
from tools.common import WrongInput, atomic, shown
from tools.data.rules import fingerprint_row
from tools.data.split import choose_mark, draw_prompts
from tools.train.checks import find_data_file
from tools.train.space import Validation


@dataclass(frozen=True)
class Division:
    """The files of a search, and how many rows they have."""

    train: Path
    validation: Path
    trained: int
    judged: int
    held_back: int  # of those that judge

    def __str__(self) -> str:
        origin = f", {self.held_back} of them held back from training" if self.held_back else ""
        return f"{self.trained} rows train, {self.judged} judge{origin}; no test row is read"


def read_chat_lines(
    recipe: recipes.Recipe, entry: dict[str, Any]
) -> tuple[list[bytes], list[bytes]]:
    """The rows of a data file, and what identifies the prompt of each, or what it asks about.

    Raises WrongInput unless it is JSONL with turns.
    """
    path = find_data_file(recipe, entry["path"])
    field = entry.get("field_messages") or "messages"
    keys = entry.get("message_property_mappings") or {}
    role, text = (keys.get(key, key) for key in ("role", "content"))
    division = sources.tables()["tasks"].get(recipe.task or "", {}).get("without_train", {})
    mark_unit = choose_mark(division) if "together" in division else None
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path else []
    marks = []
    try:
        if path is None:
            raise ValueError
        for line in lines:
            row = orjson.loads(line)
            turns = [turn | {"role": turn[role], "content": turn.get(text)} for turn in row[field]]
            if not turns:
                raise ValueError
            asked = "\n".join(str(turn["content"]) for turn in turns[:-1])
            marks.append(
                mark_unit(asked) if mark_unit else fingerprint_row(row | {field: turns}, field)
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WrongInput(
            f"{recipe.where}: a search needs JSONL rows with turns under {field}, each with {role} "
            f"and {text}; {shown(path) if path else entry['path']} has others"
        ) from None
    return lines, marks


def hold_out(recipe: recipes.Recipe, sizes: Validation, folder: Path) -> Division:
    """Writes the two files of a search into `folder`; the same rows give the same files."""
    config, _ = sources.drop_missing_validation(recipe.config)
    if len(config["datasets"]) > 1:
        raise WrongInput(f"{recipe.where}: a search needs one training file, and it names several")
    entry = config["datasets"][0]
    lines, marks = read_chat_lines(recipe, entry)
    own, own_marks = list[bytes](), list[bytes]()
    for other in config.get("test_datasets") or ():
        other_lines, other_marks = read_chat_lines(recipe, other)
        own, own_marks = own + other_lines, own_marks + other_marks
    validating = set(own_marks)
    copies = Counter(mark for mark in marks if mark not in validating)
    if len(own) > sizes.most:
        drawn = draw_prompts(Counter(own_marks), sizes.most)
        judging = [line for line, mark in zip(own, own_marks, strict=True) if mark in drawn]
    else:
        judging, drawn = list(own), set[bytes]()
    if len(own) < sizes.least:
        total = len(lines) + len(own)
        wanted = min(max(sizes.least, total // 5), sizes.most, total // 3) - len(own)
        drawn = draw_prompts(copies, wanted) if wanted > 0 and copies else set()
        judging += [line for line, mark in zip(lines, marks, strict=True) if mark in drawn]
    judged = validating | drawn
    training = [line for line, mark in zip(lines, marks, strict=True) if mark not in judged]
    if len(judging) < 2 or not training:
        raise WrongInput(
            f"{recipe.where}: {len(lines)} rows are too few to train on some and judge by others"
        )
    stem = Path(entry["path"]).stem.removesuffix("_train")
    # The name tells the task, as that of the recipe's own file does.
    files = {f"{Path(entry['path']).stem}.jsonl": training, f"{stem}_val.jsonl": judging}
    for name, rows in files.items():
        with atomic(folder / name) as file:
            file.writelines(row + b"\n" for row in rows)
    train, validation = (folder / name for name in files)
    held_back = max(0, len(judging) - len(own))
    return Division(train, validation, len(training), len(judging), held_back)
