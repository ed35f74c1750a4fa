"""FinLoRA's ranking of methods, examined again: LoRA, DoRA, rsLoRA at 8 bits and QLoRA at 4.

    python -m bench.methods [--tasks sentiment]    trains and scores what is missing
    python -m bench.methods --status               what is done, and what is left
    python -m bench.methods --page                 writes docs/methods.md and its figure
    python -m bench.methods --check                fails where the page is older than the results

bench/methods.yaml states hypothesis, margin and settings. First each method trains at each rate,
with one seed, and validation rows choose its rate; no test row is read before all of a task's rates
are chosen. Then other seeds train at a common rate and at the chosen ones, and are scored on test
rows, once. Each training leaves a file in results/methods/<task>/, so the experiment goes on on any
machine that has these files; FinLoRA's rows are needed (`make fetch data`).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import equivalence, methods_page
from bench.cells import (
    Cell,
    ScoredSet,
    collect_columns,
    list_missing,
    train_and_test,
    train_and_validate,
)
from bench.jobs import UNVALIDATED, vary
from tools import recipes, sources
from tools.common import ROOT, JobFailed, WrongInput, atomic, command, quiet, read_yaml, shown
from tools.recipes import Recipe
from tools.train.heldout import hold_out
from tools.train.space import Validation

SPEC = ROOT / "bench" / "methods.yaml"
RESULTS = ROOT / "results" / "methods"
RUNS = ROOT / "runs" / ".methods"  # hidden from `make report`, `eval` and `status`
PAGE = ROOT / "docs" / "methods.md"
FIGURE = ROOT / "docs" / "methods.svg"
Spec = dict[str, Any]


def format_rate(rate: float) -> str:
    """A rate as it stands in names of files: 0.0003 → 3e-4."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


@dataclass(frozen=True)
class Experiment:
    """The trainings of one task, and what they say so far."""

    spec: Spec
    task: str

    @property
    def plan(self) -> Spec:
        return dict(self.spec["tasks"][self.task])

    @property
    def test_set(self) -> ScoredSet:
        plan = self.plan
        return ScoredSet(plan["datasets"], plan["metric"], plan.get("limit"))

    @property
    def folder(self) -> Path:
        return RUNS / self.task

    def find_recipe(self, method: str) -> Recipe:
        name = self.spec["methods"][method]["recipe"]
        return recipes.find(f"{self.spec['model']}/{self.task}_{name}")

    def cell(self, method: str, rate: float, seed: int) -> Cell:
        recipe = self.find_recipe(method)
        name = f"{method}_{format_rate(rate)}_seed{seed}"
        entry = recipe.config["datasets"][0]
        rows = shown(self.folder / Path(entry["path"]).name)
        changes = UNVALIDATED | self.spec["settings"]
        changes |= {"learning_rate": rate, "seed": seed, "datasets": [entry | {"path": rows}]}
        varied = vary(recipe, shown(self.folder / name), changes)
        return Cell(RESULTS / self.task / f"{name}.json", varied)

    def list_rate_cells(self, method: str) -> dict[float, Cell]:
        seed = self.spec["rate_seed"]
        return {rate: self.cell(method, rate, seed) for rate in self.spec["rates"]}

    def list_seed_cells(self, method: str, rate: float) -> list[Cell]:
        return [self.cell(method, rate, seed) for seed in self.spec["seeds"]]

    @property
    def missing_rates(self) -> list[str]:
        """The names of trainings without which no rate can be chosen."""
        named = (self.list_rate_cells(method).values() for method in self.spec["methods"])
        return [name for group in named for name in list_missing(list(group))]

    def choose_rate(self, method: str) -> float | None:
        """The rate with the best validation score, the lower of equals; None before all are in."""
        group = self.list_rate_cells(method)
        if list_missing(list(group.values())):
            return None
        scores = {
            rate: cell.content["scores"]["validation"]["value"] for rate, cell in group.items()
        }
        return max(sorted(scores), key=lambda rate: scores[rate])

    def list_test_cells(self) -> dict[str, Cell]:
        """The trainings that test rows score; raises JobFailed before all rates are chosen."""
        if self.missing_rates:
            raise JobFailed(f"{self.task}: no test row is read before all rates are chosen")
        named: dict[str, Cell] = {}
        for method in self.spec["methods"]:
            best = self.choose_rate(method)
            assert best is not None  # nothing is missing
            for rate in (self.spec["common_rate"], best):
                named |= {cell.name: cell for cell in self.list_seed_cells(method, rate)}
        return named

    @property
    def missing_tests(self) -> list[str]:
        return list_missing(list(self.list_test_cells().values()))

    def compare(self, method: str, setting: str) -> dict[str, Any] | None:
        """A method against the reference at the `common` or its `best` rate; None if one lacks."""
        sides = []
        for name in (method, self.spec["reference"]):
            best = self.choose_rate(name)
            rate = best if setting == "best" else self.spec["common_rate"]
            group = self.list_seed_cells(name, rate) if rate is not None else []
            if not group or list_missing(group):
                return None
            sides.append(collect_columns(group, self.plan["datasets"]))
        return equivalence.compare_means(sides[0] - sides[1], self.spec["margin"])

    def compare_all(self, setting: str) -> dict[str, dict[str, Any] | None]:
        """Each method against the reference; p is corrected where all of the family are there."""
        others = [name for name in self.spec["methods"] if name != self.spec["reference"]]
        compared = {name: self.compare(name, setting) for name in others}
        family = [comparison for comparison in compared.values() if comparison]
        if len(family) < len(compared):
            return dict.fromkeys(compared)
        equivalence.correct_family(family)
        return compared

    def list_all_files(self) -> list[Cell]:
        """Every cell that has results, of either stage."""
        named = [cell for m in self.spec["methods"] for cell in self.list_rate_cells(m).values()]
        if not self.missing_rates:
            named += self.list_test_cells().values()
        return [cell for cell in named if cell.is_done]


# ---- training


def divide_rows(experiment: Experiment) -> Path:
    """Writes the rows that train and those that validate into the experiment's folder."""
    task = experiment.task
    path = sources.train_path(task)
    if not path.is_file() or sources.manifest(path).get("from") == "data/sample":
        raise WrongInput(f"FinLoRA's rows of {task} are needed: `make fetch data TASKS={task}`")
    count = experiment.plan["validation"]
    sizes = Validation(least=count, most=count)
    recipe = experiment.find_recipe(experiment.spec["reference"])
    division = hold_out(recipe, sizes, experiment.folder)
    wanted = (
        experiment.spec["settings"]["max_steps"] * (experiment.spec["settings"]["micro_batch_size"])
    )
    print(f"methods    {task}: {division}; {wanted} rows are seen", flush=True)
    return division.validation


def work_through(cells: list[Cell], work: Callable[[Cell], None], label: str) -> None:
    """Calls `work` on each cell without results, one after the other."""
    missing = [cell for cell in cells if not cell.is_done]
    for number, cell in enumerate(missing, 1):
        print(f"methods    {label}: {number} of {len(missing)} left, {cell.name}", flush=True)
        work(cell)


def run_experiment(experiment: Experiment) -> None:
    """Trains and scores what is missing: first all rates on validation rows, then test rows."""
    plan, task = experiment.plan, experiment.task
    if experiment.missing_rates:
        validation = divide_rows(experiment)
        rate_cells = [
            cell
            for method in experiment.spec["methods"]
            for cell in experiment.list_rate_cells(method).values()
        ]
        work_through(
            rate_cells,
            lambda cell: train_and_validate(cell, plan["validated_as"], validation, plan["metric"]),
            f"{task}, rates",
        )
    if experiment.missing_tests:
        divide_rows(experiment)
        work_through(
            list(experiment.list_test_cells().values()),
            lambda cell: train_and_test(cell, [experiment.test_set]),
            f"{task}, test rows",
        )


def print_status(experiment: Experiment) -> None:
    task, missing = experiment.task, experiment.missing_rates
    total = len(experiment.spec["methods"]) * len(experiment.spec["rates"])
    stages = {"rates": (missing, total)}
    if not missing:
        stages["tests"] = (experiment.missing_tests, len(experiment.list_test_cells()))
    for stage, (missing, total) in stages.items():
        left = f"; left: {', '.join(missing)}" if missing else ""
        print(f"methods    {task}: {total - len(missing)} of {total} {stage}{left}")


def open_experiments(names: list[str]) -> list[Experiment]:
    spec = read_yaml(SPEC)
    if unknown := [name for name in names if name not in spec["tasks"]]:
        raise WrongInput(f"unknown task {unknown[0]}; there are {', '.join(spec['tasks'])}")
    return [Experiment(spec, name) for name in names or spec["tasks"]]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA, DoRA, rsLoRA and QLoRA at their best rates")
    parser.add_argument("--tasks", default="", help="of bench/methods.yaml; all if unset")
    parser.add_argument("--status", action="store_true", help="what is done, and what is left")
    parser.add_argument("--page", action="store_true", help="write docs/methods.md")
    parser.add_argument("--check", action="store_true", help="fail where docs/methods.md is old")
    options = parser.parse_args()
    experiments = open_experiments(options.tasks.replace(",", " ").split())
    if options.status:
        for experiment in experiments:
            print_status(experiment)
    elif options.page or options.check:
        everything = open_experiments([])
        page = methods_page.build_page(everything)
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
            return
        if options.check:
            raise JobFailed(f"{shown(PAGE)} is not what results/ holds; `make results` writes it")
        methods_page.draw_rates(everything, FIGURE)
        with atomic(PAGE) as file:
            file.write(page.encode())
    else:
        quiet()
        for experiment in experiments:
            run_experiment(experiment)
            print_status(experiment)


if __name__ == "__main__":
    main()
