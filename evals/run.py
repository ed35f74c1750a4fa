"""Scores a recipe's base and its adapter with lm-eval, on the base that the adapter was trained on.

    python -m evals.run smollm2-135m/sentiment_r4 [--tasks fpb,fiqa] [--limit 200] [--force]

Scores lie in `<run>/evals/<dataset>.json`, those of the base in `base_<precision>/evals/` beside
the run: metric values with 95 % intervals, every answer, and what was evaluated. A score whose
model, data and task are still the same is not computed again.
"""

import argparse
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from evals import report, stats
from tools import convert, export, recipes, weights
from tools.cli import ROOT, WrongInput, command, digest, nearest, quiet, write_json

TASKS = ROOT / "evals" / "tasks"
BATCH = 16  # rows; lm-eval sorts them by length first


def datasets(recipe: recipes.Recipe, named: str) -> list[str]:
    """The datasets to score on: those named, else those of the recipe's task that are at hand."""
    known = sorted(path.stem for path in TASKS.glob("*.yaml"))
    known = [name for name in known if name in convert.sources()["datasets"]]
    asked = named.replace(",", " ").split()
    for name in asked:
        if name not in known:
            raise WrongInput(f'unknown dataset "{name}" in TASKS{nearest(name, known)}')
        convert.manifest(convert.test_path(name))
    if asked:
        return asked
    of_task = convert.sources()["tasks"].get(recipe.task, {}).get("eval", [])
    there = [name for name in of_task if name in known and convert.test_path(name).is_file()]
    if not there:
        raise WrongInput(
            f"no test data of {recipe.name} is there; `make data` makes it, or TASKS=…"
        )
    return there


def folder(recipe: recipes.Recipe, config: dict[str, Any], adapter: bool) -> Path:
    """Where the scores of the adapter, or of its base, lie."""
    base = recipe.run.with_name(f"base_{weights.precision(config)}")
    return (recipe.run if adapter else base) / "evals"


def score_file(place: Path, dataset: str, limit: int | None) -> Path:
    return place / (f"{dataset}_sample{limit}.json" if limit else f"{dataset}.json")


def evaluated(recipe: recipes.Recipe, config: dict[str, Any], dataset: str, adapter: bool) -> Any:
    """What a score depends on; where it is the same, the score stands."""
    base = ROOT / config["base_model"]
    keys = ("load_in_4bit", "load_in_8bit", "bnb_config_kwargs")
    task = yaml.load(
        (TASKS / f"{dataset}.yaml").read_text().replace("!function", ""), yaml.CSafeLoader
    )
    files = [f"{dataset}.yaml", "utils.py", *filter(None, [task.get("include")])]
    return {
        "dataset": dataset,
        "base_model": config["base_model"],
        "base_files": {file.name: digest(file) for file in sorted(base.glob("*.safetensors"))},
        "quantization": {key: config[key] for key in keys if key in config},
        "precision": weights.precision(config),
        "adapter_sha256": digest(recipe.run / "adapter_model.safetensors") if adapter else None,
        "data_sha256": convert.manifest(convert.test_path(dataset))["sha256"],
        "data_from": convert.manifest(convert.test_path(dataset)).get("from"),
        "task_files": {name: digest(TASKS / name)[:12] for name in files},
    }


def measure(
    model: Any, tokenizer: Any, dataset: str, limit: int | None, label: str
) -> list[dict[str, Any]]:
    """Answers of a model to a dataset's rows, in the rows' order, as lm-eval's task scores them."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from evals.model import Model

    with open(convert.test_path(dataset), "rb") as file:
        total = sum(1 for _ in file)
    rows = min(limit or total, total)
    # Files may be sorted by label, so a limit takes rows from all over: the same ones every time.
    chosen = sorted(random.Random(0).sample(range(total), rows))
    result = simple_evaluate(
        model=Model(model, tokenizer, BATCH, label, rows),
        tasks=[f"finlora_{dataset}"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        samples={f"finlora_{dataset}": chosen},
    )
    samples = sorted(result["samples"][f"finlora_{dataset}"], key=lambda sample: sample["doc_id"])
    answers = []
    for sample in samples:
        expected, answered = sample["f1_weighted"]  # the pair that the task's F1 is made from
        answer = sample["resps"][0][0]
        row = {"row": sample["doc_id"], "expected": expected, "answered": answered}
        answers.append(row | {"answer": answer})
    return answers


def score(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    expected, answered = [r["expected"] for r in rows], [r["answered"] for r in rows]
    return {name: stats.estimate(name, expected, answered) for name in stats.SCORES}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="score a recipe's base and adapter")
    parser.add_argument("recipe")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--limit", default="")
    parser.add_argument("--force", default="", help="1: score again")
    arguments = parser.parse_args()
    if arguments.limit and not (arguments.limit.isdigit() and int(arguments.limit) > 0):
        raise WrongInput(f'LIMIT must be a number of rows, not "{arguments.limit}"')
    limit = int(arguments.limit) if arguments.limit else None
    recipe = recipes.find(arguments.recipe)
    config = recipe.trained()
    names = datasets(recipe, arguments.tasks)

    export.ensure(config["base_model"])
    force = arguments.force not in ("", "0")
    todo = []
    for name in names:
        for adapter in (False, True):
            file = score_file(folder(recipe, config, adapter), name, limit)
            identity = evaluated(recipe, config, name, adapter) | {"limit": limit}
            if force or not file.is_file() or _identity(file) != identity:
                todo.append((name, adapter, file, identity))
    if todo:
        print(f"eval       {recipe.name} on {', '.join(names)}", flush=True)
        quiet()
        model, tokenizer = weights.load(config, recipe.run)
        for name, adapter, file, identity in todo:
            label = f"{name}, {'adapter' if adapter else 'base'}:"
            with nullcontext() if adapter else model.disable_adapter():
                rows = measure(model, tokenizer, name, limit, label)
            content = {
                "evaluated": identity,
                "device": str(model.device),
                "examples": len(rows),
                "metrics": score(rows),
                "predictions": rows,
            }
            write_json(file, content)
    places = [folder(recipe, config, adapter) for adapter in (False, True)]
    files = {name: [score_file(place, name, limit) for place in places] for name in names}
    report.show(recipe.name, files)


def _identity(file: Path) -> Any:
    try:
        return json.loads(file.read_text())["evaluated"]
    except (ValueError, KeyError):
        return None


if __name__ == "__main__":
    main()
