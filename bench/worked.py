"""Compares answers that are calculations with bare numbers, on FinLoRA's Financial Math.

    python -m bench.worked [--workers 2]         everything, or what is missing

SmolLM2-135M trains `formula_r4` (a number) and `formula_worked_r4` (a calculation and its value) on
the same rows, those whose key one calculation gives, in the same order, for the same steps, with
three seeds. Both are scored on the same test rows, by the same keys. A difference is tested over
rows and seeds (see bench/parity.py), and for each seed by McNemar's test over rows.

Trainings and scores stay in runs/.worked/, so the command can be interrupted and repeated. Results
go to results/worked.json.
"""

import argparse
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import numpy as np

from bench.jobs import describe_machine, find_scores, run_all, run_verb, write_config
from bench.parity import compare_variants
from evals import stats
from tools import models, recipes, sources
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    command,
    digest,
    json_lines,
    read_json,
    shown,
    write_json,
)
from tools.data.formulas import find_expressions
from tools.data.rows import build_chat_row
from tools.data.rules import load_train_rules
from tools.runs import Run

RESULTS = ROOT / "results" / "worked.json"
RUNS = ROOT / "runs" / ".worked"  # hidden from `make report`, `eval` and `status`
SEEDS = (1, 2, 3)
RECIPES = {"bare": "smollm2-135m/formula_r4", "worked": "smollm2-135m/formula_worked_r4"}
TASKS = {"bare": "formula", "worked": "formula_worked"}
DATASETS = {"bare": "financial_math", "worked": "financial_math_worked"}
METRICS = {"bare": ("accuracy",), "worked": ("accuracy", "numeric_accuracy")}
# All rows train: nothing is validated.
SETTINGS = {"test_datasets": None, "eval_steps": None, "load_best_model_at_end": None}


@dataclass(frozen=True)
class Training:
    """A recipe with a seed, on the rows that both kinds of answers have."""

    answers: str  # bare or worked
    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        rows = digest(ROOT / self.config["datasets"][0]["path"])
        text = json.dumps([rows, self.config], sort_keys=True)
        return f"{self.answers}_{hashlib.sha256(text.encode()).hexdigest()[:8]}_seed{self.seed}"

    @property
    def run(self) -> Run:
        return Run(RUNS / "runs" / self.name)

    def find_scores(self, side: str = "adapter") -> Path:
        base = RUNS / "runs" / f"base_{models.precision(self.config)}"
        return find_scores(self.run.folder, base, side, DATASETS[self.answers], None)

    def read_values(self, metric: str, side: str = "adapter") -> list[float]:
        """The values of a metric, in the order of the test rows."""
        return [row["values"][metric] for row in read_json(self.find_scores(side))["predictions"]]


def write_rows() -> dict[str, Path]:
    """Writes the training rows whose key one calculation gives, with both kinds of answers."""
    for name in TASKS.values():
        path = sources.train_path(name)
        if not path.is_file() or sources.manifest(path).get("from") == "data/sample":
            raise WrongInput(f"FinLoRA's rows of {name} are needed: `make fetch data TASKS={name}`")
    reword = load_train_rules(TASKS["worked"], sources.CHAT).reword
    assert reword
    pairs = [
        (row["messages"][0]["content"], row["messages"][1]["content"])
        for row in json_lines(sources.train_path(TASKS["bare"]))
    ]
    pairs = [pair for pair in pairs if len(find_expressions(*pair)) == 1]
    rows = {"bare": pairs, "worked": [reword(*pair) for pair in pairs]}
    files = {answers: RUNS / f"{answers}.jsonl" for answers in rows}
    for answers, path in files.items():
        with atomic(path) as file:
            file.writelines(build_chat_row(*pair) for pair in rows[answers])
    return files


def list_jobs(files: dict[str, Path]) -> list[Training]:
    """The seeds one after the other, so that an interrupted comparison has whole pairs."""
    jobs = []
    for seed in SEEDS:
        for answers, recipe in RECIPES.items():
            config = recipes.build_config(recipe) | SETTINGS | {"seed": seed}
            del config["output_dir"], config["dataset_prepared_path"]
            entry = config["datasets"][0] | {"path": shown(files[answers])}
            config = {key: value for key, value in config.items() if value is not None}
            jobs.append(Training(answers, seed, config | {"datasets": [entry]}))
    return jobs


def run_jobs(jobs: list[Training], workers: int) -> None:
    """Trains and scores what has no scores; raises JobFailed if something failed."""
    left = {job.name: job for job in jobs if not job.find_scores().is_file()}
    print(f"worked     {len(jobs)} trainings, {len(left)} to do, {workers} at a time", flush=True)
    locks: dict[Path, Lock] = defaultdict(Lock)

    def train_and_score(job: Training) -> str:
        paths = {"output_dir": job.run.folder, "dataset_prepared_path": job.run.folder / "prepared"}
        recipe = RUNS / f"{job.name}.yaml"
        write_config(recipe, job.config | {key: shown(path) for key, path in paths.items()})
        run_verb("train", recipe)
        with locks[job.find_scores("base")]:  # the base is scored once
            run_verb("eval", recipe, "--tasks", DATASETS[job.answers])
        return f"accuracy {100 * fmean(job.read_values('accuracy')):.1f}"

    run_all("worked", left, train_and_score, workers)


def collect_results(jobs: list[Training]) -> dict[str, Any]:
    """What each kind of answers scored, and worked minus bare on the same rows."""
    by_answers = {name: [job for job in jobs if job.answers == name] for name in RECIPES}
    sides: dict[str, Any] = {}
    for answers, trainings in by_answers.items():
        infos = [job.run.info for job in trainings]
        sides[answers] = {
            "recipe": RECIPES[answers],
            "steps": trainings[0].config["max_steps"],
            "rows": infos[0]["data"][0]["rows"],
            "loss": [round(info["train_loss"], 4) for info in infos],
            "seconds": [round(info["seconds"]) for info in infos],
        }
        for metric in METRICS[answers]:
            means = [round(fmean(job.read_values(metric)), 4) for job in trainings]
            base = round(fmean(trainings[0].read_values(metric, "base")), 4)
            sides[answers][metric] = {"base": base, "seeds": means}
    columns = {
        answers: [job.read_values("accuracy") for job in trainings]
        for answers, trainings in by_answers.items()
    }
    bare, worked = (np.array(columns[answers], float).T for answers in RECIPES)
    pairs = zip(columns["bare"], columns["worked"], strict=True)
    return {
        "machine": describe_machine(),
        "seeds": list(SEEDS),
        "test_rows": len(bare),
        "answers": sides,
        "difference": compare_variants(worked, bare, None),
        "difference_by_seed": [stats.compare("accuracy", *pair) for pair in pairs],
    }


def describe_results(content: dict[str, Any]) -> str:
    lines = []
    for answers, entry in content["answers"].items():
        for metric in METRICS[answers]:
            means = ", ".join(f"{100 * mean:.1f}" for mean in entry[metric]["seeds"])
            lines.append(f"{answers}, {metric}: {means} (base {100 * entry[metric]['base']:.1f})")
    gain = content["difference"]
    points = "{:+.1f} ({:+.1f} … {:+.1f})".format(
        *(100 * gain[key] for key in ("value", "low", "high"))
    )
    return "\n".join([*lines, f"worked minus bare: {points} points, p = {gain['p']:.2g}"])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="calculations against bare numbers")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if options.workers < 1 or options.workers > (os.cpu_count() or 1):
        raise WrongInput(f"--workers {options.workers}: 1 to {os.cpu_count()}, a core each")
    jobs = list_jobs(write_rows())
    run_jobs(jobs, options.workers)
    content = collect_results(jobs)
    write_json(RESULTS, content)
    print(describe_results(content))


if __name__ == "__main__":
    main()
