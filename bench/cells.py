"""One training of an experiment, and the small JSON that keeps what it scored.

    tests = [ScoredSet(["fpb"], "accuracy")]
    cell = Cell(RESULTS / "lora_1e-3_seed42.json", recipe, {"scores": describe_sets(tests)})
    cell.is_done                     the JSON is there, of this recipe and this plan
    train_and_test(cell, tests)

The JSON is committed, so an experiment goes on on another machine. It holds the value of each row
that was scored, in the order of the rows, and no text of theirs: a paired test needs no more.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import report, run, stats
from evals.backends import open_transformers
from evals.validation import Scorer
from tools import subjects
from tools.common import JobFailed, WrongInput, check_name, digest, read_json, shown, write_json
from tools.recipes import Recipe
from tools.train import launch
from tools.train.hardware import detect_host
from tools.train.machines import Machines
from tools.train.profiles import Choice

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cell:
    """A training, by the file of its results, its varied recipe, and what else was planned.

    `planned` holds the settings that decide which rows train and which are scored how: the recipe's
    digest knows none of them. It is kept in the file as it is, so JSON must hold it.
    """

    file: Path
    recipe: Recipe
    planned: dict[str, Any]

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def content(self) -> dict[str, Any]:
        """What was measured; {} where it is missing, or of another recipe, plan or scoring."""
        if not self.file.is_file():
            return {}
        content = read_json(self.file)
        wanted = {"digest": self.recipe.digest, "planned": self.planned, "scoring": run.SCORING}
        is_current = all(content.get(key) == value for key, value in wanted.items())
        return content if is_current else {}

    @property
    def is_done(self) -> bool:
        return bool(self.content)


@dataclass(frozen=True)
class ScoredSet:
    """Datasets that one metric scores together; `limit` takes seeded rows of each."""

    datasets: list[str]
    metric: str
    limit: int | None = None


def describe_sets(test_sets: Sequence[ScoredSet]) -> dict[str, dict[str, Any]]:
    """How the rows of each dataset are scored; raises WrongInput where one has no task."""
    tasks, described = run.read_tasks(), {}
    for test_set in test_sets:
        for name in test_set.datasets:
            check_name("dataset", name, tasks)
            version = tasks[name]["metadata"]["version"]
            how = {"metric": test_set.metric, "limit": test_set.limit, "task_version": version}
            described[name] = how
    return described


def list_missing(cells: Sequence[Cell]) -> list[str]:
    return [cell.name for cell in cells if not cell.is_done]


def work_through(cells: Sequence[Cell], work: Callable[[Cell], None], label: str) -> None:
    """Calls `work` on each cell without results, one after the other."""
    missing = [cell for cell in cells if not cell.is_done]
    for number, cell in enumerate(missing, 1):
        print(f"{label}: {cell.name}, {number} of {len(missing)}", flush=True)
        work(cell)


def pack_values(values: Sequence[float]) -> str | list[float]:
    """The values of rows, short: a digit each where all are 0 or 1."""
    if all(value in (0, 1) for value in values):
        return "".join(str(int(value)) for value in values)
    return [round(float(value), 4) for value in values]


def unpack_values(packed: str | list[float]) -> list[float]:
    return [float(value) for value in packed]


def train(cell: Cell) -> dict[str, Any]:
    """Trains a cell, or what is missing of it; returns what its results say of the training."""
    recipe = cell.recipe
    launch.train(recipe, Choice(), Machines(), False)
    info = recipe.run.info
    return {
        "recipe": recipe.name,
        "digest": recipe.digest,
        "planned": cell.planned,
        "seed": recipe.seed,
        "steps": info["steps"],
        "rows": sum(entry["rows"] for entry in info["data"] if entry["split"] == "train"),
        "train_sha256": [entry["sha256"] for entry in info["data"]],
        "loss": round(info["train_loss"], 4),
        "seconds": round(info["seconds"]),
        "trainable_parameters": info["trainable_parameters"],
        "machine": detect_host().describe_machine(),
        "packages": {name: info["packages"][name] for name in ("torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
        "scoring": run.SCORING,
    }


def describe_score(
    metric: str, values: Sequence[float], data_sha256: str, rows: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The score of these values; of scored rows also clusters and majority where they have any."""
    clusters = [row["cluster"] for row in rows if "cluster" in row]
    majority = report.measure_majority({"predictions": list(rows)})
    score = stats.estimate(metric, values, clusters)
    ends = {key: round(end, 6) for key, end in score.items() if isinstance(end, float)}
    return {
        "metric": metric,
        "rows": len(values),
        "data_sha256": data_sha256,
        **ends,
        "values": pack_values(values),
        **({"clusters": " ".join(map(str, clusters))} if clusters else {}),
        **({} if majority is None else {"majority": round(majority, 6)}),
    }


def take_values(
    cell: Cell, dataset: str, rows: Sequence[dict[str, Any]], metric: str
) -> list[float]:
    """The values of scored rows; raises JobFailed where some have none."""
    values = [row["values"].get(metric) for row in rows]
    if None in values:
        raise JobFailed(f"{cell.name}: {values.count(None)} of {dataset} cannot be scored")
    return values


def train_and_validate(cell: Cell, dataset: str, rows: Path, metric: str) -> None:
    """Trains a cell and scores it on validation rows, by the rule of a dataset."""
    content = train(cell)
    subject = subjects.of_recipe(cell.recipe)
    with open(rows, "rb") as file:
        count = sum(1 for _ in file)
    with open_transformers(subject)("adapter", f"{cell.name}, validation:", count) as lm:
        answers = Scorer(dataset, rows).answer(lm, subject.options)
    values = take_values(cell, "the validation rows", answers, metric)
    score = describe_score(metric, values, digest(rows), answers)
    write_json(cell.file, content | {"scores": {"validation": score}})


def train_and_test(cell: Cell, test_sets: Sequence[ScoredSet]) -> None:
    """Trains a cell and scores it, and its base, on test rows."""
    content = train(cell)
    subject = subjects.of_recipe(cell.recipe)
    scores = {}
    for test_set in test_sets:
        files = run.score_subject(subject, run.Request(test_set.datasets, test_set.limit))
        for dataset, sides in files.items():
            base, adapter = (read_json(sides[side]) for side in ("base", "adapter"))
            rows, sha = adapter["predictions"], adapter["evaluated"]["data_sha256"]
            values = take_values(cell, dataset, rows, test_set.metric)
            scores[dataset] = describe_score(test_set.metric, values, sha, rows)
            scores[dataset] |= {"base": round(base["metrics"][test_set.metric]["value"], 6)}
    write_json(cell.file, content | {"scores": scores})


def list_values(cell: Cell, datasets: Sequence[str]) -> list[float]:
    """The values of a cell's rows, those of one dataset after the other."""
    scores = cell.content["scores"]
    return [value for name in datasets for value in unpack_values(scores[name]["values"])]


def list_clusters(cell: Cell, datasets: Sequence[str]) -> list[int] | None:
    """The cluster of each of a cell's rows; None where no dataset has any.

    A row without one is a cluster of its own, and no cluster spans two datasets. Raises WrongInput
    for a cell of a version that did not name the clusters of a dataset that has them.
    """
    scores, clusters = cell.content["scores"], list[int]()
    for name in datasets:
        if run.find_cluster_pattern(name) and "clusters" not in scores[name]:
            raise WrongInput(
                f"{shown(cell.file)} names no clusters of {name}; move it away, and the next "
                "call measures it again"
            )
        own = [int(place) for place in scores[name].get("clusters", "").split()]
        clusters += [len(clusters) + place for place in own or range(scores[name]["rows"])]
    return clusters if any("clusters" in scores[name] for name in datasets) else None


def collect_columns(cells: Sequence[Cell], datasets: Sequence[str]) -> Array:
    """The values of cells that differ by their seed: (rows, seeds)."""
    return np.array([list_values(cell, datasets) for cell in cells], float).T


def refuse_other_rows(cells: Sequence[Cell], same_training: bool = True) -> None:
    """Raises WrongInput where cells were not scored, or not trained, on the same rows."""
    seen: dict[str, tuple[str, Any]] = {}
    for cell in cells:
        content = cell.content
        scores = content["scores"].items()
        digests = {name: score["data_sha256"] for name, score in scores}
        if same_training:
            digests["training"] = content["train_sha256"]
        for name, sha in digests.items():
            first, other = seen.setdefault(name, (cell.name, sha))
            if sha != other:
                raise WrongInput(
                    f"{shown(cell.file)} has other rows of {name} than {first}; remove the file "
                    "and run the experiment again"
                )
