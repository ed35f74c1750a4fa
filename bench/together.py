"""Two tasks at once against each alone, and TFNS with repaired labels against published ones.

    python -m bench.together [--parts tasks]    trains and scores what is missing
    python -m bench.together --status           what is done, and what is left

bench/together.yaml states the hypotheses, the margin and the settings. A training on two tasks sees
as many rows of each as a training on one. Each training leaves a file in
results/_together/<part>/, so the experiment goes on on any machine that has these files;
`python -m bench.methods --page` writes what came of it into docs/methods.md.
"""

import argparse
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import equivalence
from bench.cells import (
    Cell,
    ScoredSet,
    collect_columns,
    describe_sets,
    list_clusters,
    list_missing,
    train_and_test,
    work_through,
)
from bench.jobs import UNVALIDATED, choose_names, require_rows, vary
from tools import recipes, sources
from tools.common import ROOT, WrongInput, atomic, command, quiet, read_yaml, shown, slugify
from tools.recipes import Recipe

SPEC = ROOT / "bench" / "together.yaml"
RESULTS = ROOT / "results" / "_together"
RUNS = ROOT / "runs" / ".together"  # hidden from `make report`, `eval` and `status`
ROWS_SEED = 42


@dataclass(frozen=True)
class Part:
    """The trainings of one question, and what they say so far."""

    spec: dict[str, Any]
    name: str

    @property
    def plan(self) -> dict[str, Any]:
        return dict(self.spec["parts"][self.name])

    def list_tests(self, variant: str) -> list[ScoredSet]:
        return [self.find_test(name) for name in self.plan["variants"][variant]["tests"]]

    def find_test(self, name: str) -> ScoredSet:
        return ScoredSet(**self.spec["tests"][name])

    def find_rows_file(self, variant: str) -> Path:
        """The training rows of a variant; the name says that no single task trains."""
        return RUNS / self.name / f"{slugify(variant)}.jsonl"

    def list_cells(self, variant: str) -> list[Cell]:
        """The trainings of a variant, one for each seed."""
        task = self.plan["variants"][variant]["train"][0]
        recipe = recipes.find(f"{self.spec['model']}/{task}_{self.spec['method']}")
        entry = recipe.config["datasets"][0]
        changes = UNVALIDATED | self.spec["settings"]
        changes |= {"datasets": [entry | {"path": shown(self.find_rows_file(variant))}]}
        return [self.make_cell(recipe, variant, changes | {"seed": n}) for n in self.spec["seeds"]]

    def make_cell(self, recipe: Recipe, variant: str, changes: dict[str, Any]) -> Cell:
        name = f"{slugify(variant)}_seed{changes['seed']}"
        varied = vary(recipe, shown(RUNS / self.name / name), changes)
        planned = {
            "train": self.plan["variants"][variant]["train"],
            "rows": self.spec["rows"],
            "scores": describe_sets(self.list_tests(variant)),
        }
        return Cell(RESULTS / self.name / f"{name}.json", varied, planned)

    def list_all_cells(self) -> list[Cell]:
        return [cell for variant in self.plan["variants"] for cell in self.list_cells(variant)]

    def list_finished_cells(self) -> list[Cell]:
        return [cell for cell in self.list_all_cells() if cell.is_done]

    @property
    def missing(self) -> list[str]:
        return list_missing(self.list_all_cells())

    def compare_all(self) -> list[dict[str, Any]]:
        """The comparisons of the plan, with corrected p; no training may be missing."""
        compared = [
            self.compare(pair["variant"], pair["against"], pair["test"])
            for pair in self.plan["compared"]
        ]
        equivalence.correct_family(compared)
        return compared

    def compare(self, variant: str, against: str, test: str) -> dict[str, Any]:
        groups = [self.list_cells(name) for name in (variant, against)]
        datasets = self.find_test(test).datasets
        values, others = (collect_columns(group, datasets) for group in groups)
        clusters = list_clusters(groups[0][0], datasets)
        return equivalence.compare_means(values - others, self.spec["margin"], clusters)


def write_rows(part: Part, variant: str) -> None:
    """Writes the seeded training rows of a variant: as many of each of its tasks."""
    rows: list[bytes] = []
    tasks = part.plan["variants"][variant]["train"]
    require_rows(tasks)
    for task in tasks:
        path = sources.train_path(task)
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) < part.spec["rows"]:
            raise WrongInput(f"{shown(path)} has {len(lines)} rows; {part.spec['rows']} are needed")
        rows += random.Random(ROWS_SEED).sample(lines, part.spec["rows"])
    random.Random(ROWS_SEED).shuffle(rows)
    with atomic(part.find_rows_file(variant)) as file:
        file.writelines(rows)


def run_part(part: Part) -> None:
    """Trains and scores what is missing."""
    for variant in part.plan["variants"]:
        cells, tests = part.list_cells(variant), part.list_tests(variant)
        if list_missing(cells):
            write_rows(part, variant)
        work_through(cells, partial(train_and_test, test_sets=tests), f"together   {variant}")


def print_status(part: Part) -> None:
    missing = part.missing
    total = len(part.plan["variants"]) * len(part.spec["seeds"])
    left = f"; left: {', '.join(missing)}" if missing else ""
    print(f"together   {part.name}: {total - len(missing)} of {total} trainings{left}")


def open_parts(names: str = "") -> list[Part]:
    """The named parts, or all."""
    spec = read_yaml(SPEC)
    return [Part(spec, name) for name in choose_names(names, spec["parts"], "part")]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="tasks together and alone; labels swapped or not")
    parser.add_argument("--parts", default="", help="of bench/together.yaml; all if unset")
    parser.add_argument("--status", action="store_true", help="what is done, and what is left")
    options = parser.parse_args()
    parts = open_parts(options.parts)
    quiet()
    for part in parts:
        if not options.status:
            run_part(part)
        print_status(part)


if __name__ == "__main__":
    main()
