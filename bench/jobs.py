"""What experiments share: changed recipes, and trainings and scorings, one by one or at once."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals import run
from tools import subjects
from tools.common import ROOT, JobFailed, atomic, format_yaml, read_json
from tools.recipes import Recipe
from tools.subjects import Subject
from tools.train import launch
from tools.train.machines import Machines
from tools.train.profiles import Choice

# All rows train, and the last step is scored: nothing is validated.
UNVALIDATED = {"test_datasets": None, "eval_steps": None, "load_best_model_at_end": None}


def vary(recipe: Recipe, folder: str, changes: dict[str, Any]) -> Recipe:
    """A recipe with other settings, which is trained in `folder`; None takes a setting away."""
    config = recipe.config | changes
    config |= {"output_dir": folder, "dataset_prepared_path": f"{folder}/prepared"}
    return replace(
        recipe, config={key: value for key, value in config.items() if value is not None}
    )


def train_and_score(recipe: Recipe, dataset: str) -> dict[str, dict[str, Any]]:
    """Trains and scores a recipe, or what is missing of it; the score files of base and adapter."""
    launch.train(recipe, Choice(), Machines(), False)
    subject = subjects.of_recipe(recipe, False, None, None)
    files = run.score_subject(subject, run.Request([dataset]))[dataset]
    return {side: read_json(file) for side, file in files.items()}


def run_verb(*arguments: Any) -> None:
    """Runs `python -m tools …`; raises JobFailed with its message."""
    command = [sys.executable, "-m", "tools", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        message = process.stderr.strip().removeprefix("error: ")
        raise JobFailed(message or f"{arguments[0]} failed")


def run_all(label: str, jobs: dict[str, Any], work: Callable[[Any], str], workers: int) -> None:
    """Calls `work` on each job, `workers` at a time, and prints the text that it returns.

    Raises JobFailed at the end if some jobs failed.
    """
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    finished = itertools.count(1)

    def run_job(name: str) -> bool:
        try:
            text = work(jobs[name])
        except JobFailed as error:
            print(f"{label:<10} {name}: {error}", file=sys.stderr, flush=True)
            return False
        print(f"{label:<10} {next(finished)}/{len(jobs)} {name} {text}", flush=True)
        return True

    pool = ThreadPoolExecutor(workers)
    try:
        failed = list(pool.map(run_job, jobs)).count(False)
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise JobFailed(f"{failed} of {len(jobs)} failed; the same command tries them again")


def write_config(path: Path, config: dict[str, Any]) -> None:
    with atomic(path) as file:
        file.write(format_yaml(config).encode())


def find_scores(run: Path, base: Path, side: str, dataset: str, limit: int | None) -> Path:
    """The score file of a run (`side` is adapter) or of its base, whose folder is `base`."""
    return Subject("", {}, run, run, base, None, "chat").file(side, dataset, limit)
