"""What experiments share: options, changed recipes, and trainings and scorings."""

import argparse
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals import run
from tools import sources, subjects
from tools.common import WrongInput, read_json, shown
from tools.recipes import Recipe
from tools.train import launch
from tools.train.machines import Machines
from tools.train.profiles import Choice

# All rows train, and the last step is scored: nothing is validated.
UNVALIDATED = {"test_datasets": None, "eval_steps": None, "load_best_model_at_end": None}


def read_seed_count(description: str, results: Path) -> int:
    """The option --seeds of an experiment, which has no other.

    Raises WrongInput where `results` holds more seeds, which fewer would replace.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=3)
    count: int = parser.parse_args().seeds
    if count < 1:
        raise WrongInput("--seeds is a number from 1")
    measured = len(read_json(results)["seeds"]) if results.is_file() else 0
    if count < measured:
        raise WrongInput(
            f"{shown(results)} holds {measured} seeds, and --seeds {count} would write fewer; "
            "remove the file first"
        )
    return count


def choose_names(text: str, names: Collection[str], kind: str) -> list[str]:
    """The names that an option lists, or all of them; raises WrongInput at one that is unknown."""
    chosen = text.replace(",", " ").split()
    if unknown := [name for name in chosen if name not in names]:
        raise WrongInput(f"unknown {kind} {unknown[0]}; there are {', '.join(names)}")
    return chosen or list(names)


def require_rows(tasks: Iterable[str]) -> None:
    """Raises WrongInput where FinLoRA's training rows of a task are not here."""
    missing = []
    for task in dict.fromkeys(tasks):
        path = sources.train_path(task)
        if not path.is_file() or sources.manifest(path).get("from") == "data/sample":
            missing.append(task)
    if missing:
        names = ",".join(missing)
        raise WrongInput(f"FinLoRA's rows of {names} are needed: `make fetch data TASKS={names}`")


def vary(recipe: Recipe, folder: str, changes: dict[str, Any]) -> Recipe:
    """A recipe with other settings, which is trained in `folder`; None takes a setting away."""
    config = recipe.config | changes
    config |= {"output_dir": folder, "dataset_prepared_path": f"{folder}/prepared"}
    return replace(
        recipe, config={key: value for key, value in config.items() if value is not None}
    )


def train_and_score(
    recipe: Recipe, dataset: str, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Trains and scores a recipe, or what is missing of it; the score files of base and adapter."""
    launch.train(recipe, Choice(), Machines(), False)
    subject = subjects.of_recipe(recipe)
    files = run.score_subject(subject, run.Request([dataset], limit))[dataset]
    return {side: read_json(file) for side, file in files.items()}


def list_row_values(scores: dict[str, Any], metric: str) -> list[float]:
    """The values of a metric in a score file, in the order of the test rows."""
    return [row["values"][metric] for row in scores["predictions"]]


def describe_gain(gain: dict[str, Any]) -> str:
    """A difference of two shares in points, with its interval and p."""
    value, low, high = (100 * gain[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} … {high:+.1f}), {state_p(gain['p'])}"


def state_p(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
