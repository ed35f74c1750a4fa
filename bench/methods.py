"""FinLoRA's ranking of methods, examined again: LoRA, DoRA, rsLoRA at 8 bits and QLoRA at 4.

    python -m bench.methods [--tasks sentiment]    trains and scores what is missing
    python -m bench.methods --status               what is done, and what is left
    python -m bench.methods --page                 writes docs/methods.md and its figure
    python -m bench.methods --check                fails where one of them is old

bench/methods.yaml states hypothesis, margin and settings. First each method trains at each rate,
with one seed, and validation rows choose its rate; no test row is read before all of a task's rates
are chosen. Then other seeds train at a common rate and at the chosen ones, and are scored on test
rows, once. Each training leaves a file in results/_methods/<task>/, so the experiment goes on on
any machine that has these files; FinLoRA's rows are needed (`make fetch data`).
"""

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench import equivalence, methods_figure, methods_page
from bench.cells import (
    Cell,
    ScoredSet,
    collect_columns,
    describe_sets,
    list_clusters,
    list_missing,
    train_and_test,
    train_and_validate,
    work_through,
)
from bench.jobs import UNVALIDATED, choose_names, require_rows, vary
from evals.figures import update_figure
from tools import recipes
from tools.common import ROOT, JobFailed, command, quiet, read_yaml, shown, update_page
from tools.recipes import Recipe
from tools.train.heldout import hold_out
from tools.train.space import Validation

SPEC = ROOT / "bench" / "methods.yaml"
RESULTS = ROOT / "results" / "_methods"
RUNS = ROOT / "runs" / ".methods"  # hidden from `make report`, `eval` and `status`
PAGE = ROOT / "docs" / "methods.md"
FIGURE = ROOT / "docs" / "methods.svg"
Spec = dict[str, Any]


read_recipe = cache(recipes.find)  # a page asks for a recipe's cells hundreds of times


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
        return read_recipe(f"{self.spec['model']}/{self.task}_{name}")

    @property
    def validation_set(self) -> ScoredSet:
        """The rule that scores validation rows: that of one dataset."""
        return ScoredSet([self.plan["validated_as"]], self.plan["metric"])

    def make_cell(self, method: str, rate: float, seed: int, scored: ScoredSet) -> Cell:
        recipe = self.find_recipe(method)
        name = f"{method}_{format_rate(rate)}_seed{seed}"
        entry = recipe.config["datasets"][0]
        rows = shown(self.folder / Path(entry["path"]).name)
        changes = UNVALIDATED | self.spec["settings"]
        changes |= {"learning_rate": rate, "seed": seed, "datasets": [entry | {"path": rows}]}
        varied = vary(recipe, shown(self.folder / name), changes)
        # Rows that are held back to validate do not train, so both stages depend on their number.
        planned = {"validation": self.plan["validation"], "scores": describe_sets([scored])}
        return Cell(RESULTS / self.task / f"{name}.json", varied, planned)

    def list_rate_cells(self, method: str) -> dict[float, Cell]:
        seed, scored = self.spec["rate_seed"], self.validation_set
        return {rate: self.make_cell(method, rate, seed, scored) for rate in self.spec["rates"]}

    def list_all_rate_cells(self) -> list[Cell]:
        methods = self.spec["methods"]
        return [cell for method in methods for cell in self.list_rate_cells(method).values()]

    def list_seed_cells(self, method: str, rate: float) -> list[Cell]:
        scored = self.test_set
        return [self.make_cell(method, rate, seed, scored) for seed in self.spec["seeds"]]

    def list_setting_cells(self, method: str, setting: str) -> list[Cell]:
        """The cells of a method at the `common` or at its `best` rate."""
        rate = self.choose_rate(method) if setting == "best" else self.spec["common_rate"]
        return self.list_seed_cells(method, rate)

    @property
    def missing_rates(self) -> list[str]:
        """The names of trainings without which no rate can be chosen."""
        return list_missing(self.list_all_rate_cells())

    def choose_rate(self, method: str) -> float:
        """The rate with the best validation score, the lower of equals; all must be in."""
        cells = self.list_rate_cells(method).items()
        scores = {rate: cell.content["scores"]["validation"]["value"] for rate, cell in cells}
        return max(sorted(scores), key=lambda rate: scores[rate])

    def list_test_cells(self) -> dict[str, Cell]:
        """The trainings that test rows score; raises JobFailed before all rates are chosen."""
        if self.missing_rates:
            raise JobFailed(f"{self.task}: no test row is read before all rates are chosen")
        return {
            cell.name: cell
            for method in self.spec["methods"]
            for setting in ("common", "best")
            for cell in self.list_setting_cells(method, setting)
        }

    @property
    def missing_tests(self) -> list[str]:
        return list_missing(list(self.list_test_cells().values()))

    @property
    def missing(self) -> list[str]:
        return self.missing_rates or self.missing_tests

    def compare(self, method: str, setting: str, dataset: str = "") -> dict[str, Any]:
        """A method minus the reference, on one dataset or all; no training may be missing."""
        datasets = [dataset] if dataset else self.plan["datasets"]
        names = (method, self.spec["reference"])
        groups = [self.list_setting_cells(name, setting) for name in names]
        values, others = (collect_columns(group, datasets) for group in groups)
        clusters = list_clusters(groups[0][0], datasets)
        return equivalence.compare_means(values - others, self.spec["margin"], clusters)

    def compare_all(self, setting: str) -> dict[str, dict[str, Any]]:
        """Each method against the reference, with corrected p."""
        others = [name for name in self.spec["methods"] if name != self.spec["reference"]]
        compared = {name: self.compare(name, setting) for name in others}
        equivalence.correct_family(list(compared.values()))
        return compared

    def group_finished_cells(self) -> dict[str, list[Cell]]:
        """Every cell that has results, by stage."""
        stages = {"rates": self.list_all_rate_cells(), "test rows": list[Cell]()}
        if not self.missing_rates:
            stages["test rows"] = list(self.list_test_cells().values())
        return {name: [cell for cell in cells if cell.is_done] for name, cells in stages.items()}

    def list_finished_cells(self) -> list[Cell]:
        return [cell for cells in self.group_finished_cells().values() for cell in cells]


# ---- training


def divide_rows(experiment: Experiment) -> Path:
    """Writes the rows that train and those that validate into the experiment's folder."""
    task = experiment.task
    require_rows([task])
    count = experiment.plan["validation"]
    sizes = Validation(least=count, most=count)
    recipe = experiment.find_recipe(experiment.spec["reference"])
    division = hold_out(recipe, sizes, experiment.folder)
    settings = experiment.spec["settings"]
    rows = settings["max_steps"] * settings["micro_batch_size"]
    print(f"methods    {task}: {division}; {rows} rows are seen", flush=True)
    return division.validation


def run_experiment(experiment: Experiment) -> None:
    """Trains and scores what is missing: first all rates on validation rows, then test rows."""
    plan, task = experiment.plan, experiment.task
    if experiment.missing_rates:
        validation = divide_rows(experiment)
        work_through(
            experiment.list_all_rate_cells(),
            lambda cell: train_and_validate(cell, plan["validated_as"], validation, plan["metric"]),
            f"methods    {task}, rates",
        )
    if experiment.missing_tests:
        divide_rows(experiment)
        work_through(
            list(experiment.list_test_cells().values()),
            lambda cell: train_and_test(cell, [experiment.test_set]),
            f"methods    {task}, test rows",
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


def open_experiments(tasks: str = "") -> list[Experiment]:
    """The experiments of the named tasks, or of all."""
    spec = read_yaml(SPEC)
    return [Experiment(spec, task) for task in choose_names(tasks, spec["tasks"], "task")]


def write_page(check: bool = False) -> None:
    """Writes the page and its figure; with `check`, raises JobFailed where one is old."""
    experiments = open_experiments()
    update_page(PAGE, methods_page.build_page(experiments), "make results", check)
    whole = [experiment for experiment in experiments if not experiment.missing]
    drawn = methods_figure.describe_drawn(whole) if whole else ""
    update_figure(FIGURE, drawn, lambda: methods_figure.draw_rates(whole, FIGURE), check)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA, DoRA, rsLoRA and QLoRA at their best rates")
    parser.add_argument("--tasks", default="", help="of bench/methods.yaml; all if unset")
    parser.add_argument("--status", action="store_true", help="what is done, and what is left")
    parser.add_argument("--page", action="store_true", help="write docs/methods.md")
    parser.add_argument("--check", action="store_true", help="fail where the page is old")
    options = parser.parse_args()
    experiments = open_experiments(options.tasks)
    if options.status:
        for experiment in experiments:
            print_status(experiment)
    elif options.page or options.check:
        write_page(options.check)
    else:
        quiet()
        for experiment in experiments:
            run_experiment(experiment)
            print_status(experiment)


if __name__ == "__main__":
    main()
