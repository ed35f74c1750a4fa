"""Compares answers that are calculations with bare numbers, on FinLoRA's Financial Math.

    python -m bench.worked [--seeds 3]

SmolLM2-135M trains `formula_r4` (a number) and `formula_worked_r4` (a calculation and its value) on
the same rows, those whose key one calculation gives, in the same order, for the same steps, with
several seeds. Both are scored on the same test rows, by the same keys. Four rows ask about one
formula, so a difference is tested over formulas and seeds (see bench/parity.py), and for each seed
by a bootstrap of formulas.

Trainings and scores stay in runs/.worked/, so the command can be interrupted and repeated. Results
go to results/worked.json, and from there into docs/methods.md.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.equivalence import compare_variants
from bench.jobs import (
    UNVALIDATED,
    describe_gain,
    list_row_values,
    read_seed_count,
    require_rows,
    train_and_score,
    vary,
)
from evals import run, stats
from evals.report import select_shared
from tools import recipes, sources
from tools.common import ROOT, atomic, command, json_lines, quiet, shown, write_json
from tools.data.formulas import find_expressions
from tools.data.rows import build_chat_row
from tools.data.rules import load_train_rules
from tools.train.hardware import detect_host

RESULTS = ROOT / "results" / "worked.json"
RUNS = ROOT / "runs" / ".worked"  # hidden from `make report`, `eval` and `status`
TASKS = {"bare": "formula", "worked": "formula_worked"}
DATASETS = {"bare": "financial_math", "worked": "financial_math_worked"}
METRICS = {"bare": ("accuracy",), "worked": ("accuracy", "numeric_accuracy")}


def write_training_rows() -> None:
    """Writes the training rows whose key one calculation gives, with both kinds of answers."""
    require_rows(TASKS.values())
    reword = load_train_rules(TASKS["worked"], sources.CHAT).reword
    assert reword
    pairs = [
        (row["messages"][0]["content"], row["messages"][1]["content"])
        for row in json_lines(sources.train_path(TASKS["bare"]))
    ]
    pairs = [pair for pair in pairs if len(find_expressions(*pair)) == 1]
    rows = {"bare": pairs, "worked": [reword(*pair) for pair in pairs]}
    for answers, pairs in rows.items():
        with atomic(find_rows_file(answers)) as file:
            file.writelines(build_chat_row(*pair) for pair in pairs)


def find_rows_file(answers: str) -> Path:
    return RUNS / f"{answers}.jsonl"


def find_recipe(answers: str) -> recipes.Recipe:
    return recipes.find(f"smollm2-135m/{TASKS[answers]}_r4")


def vary_recipe(answers: str, seed: int) -> recipes.Recipe:
    recipe = find_recipe(answers)
    datasets = [recipe.config["datasets"][0] | {"path": shown(find_rows_file(answers))}]
    changes = UNVALIDATED | {"seed": seed, "datasets": datasets}
    return vary(recipe, f"{shown(RUNS)}/{answers}_seed{seed}", changes)


def describe_origin(answers: str) -> dict[str, Any]:
    """The recipe, task and scoring of a kind of answers; its scores stand while they are these."""
    task = run.read_tasks()[DATASETS[answers]]
    return {
        "digest": find_recipe(answers).digest,
        "task_version": task["metadata"]["version"],
        "scoring": run.SCORING,
    }


def measure_answers(
    answers: str, seeds: list[int]
) -> tuple[dict[str, Any], list[list[float]], stats.Clusters]:
    """What one kind of answers scored with all seeds, its accuracy by seed and test row, and the
    clusters of these rows."""
    trained = [vary_recipe(answers, seed) for seed in seeds]
    scores = [train_and_score(recipe, DATASETS[answers]) for recipe in trained]
    infos = [recipe.run.info for recipe in trained]
    side: dict[str, Any] = {
        "recipe": trained[0].name,
        "origin": describe_origin(answers),
        "steps": infos[0]["steps"],
        "rows": infos[0]["data"][0]["rows"],
        "loss": [round(info["train_loss"], 4) for info in infos],
        "seconds": [round(info["seconds"]) for info in infos],
    }
    for metric in METRICS[answers]:
        base = fmean(list_row_values(scores[0]["base"], metric))
        means = [fmean(list_row_values(sides["adapter"], metric)) for sides in scores]
        side[metric] = {"base": round(base, 4), "seeds": [round(mean, 4) for mean in means]}
    columns, clusters = select_shared("accuracy", [sides["adapter"] for sides in scores])
    return side, columns, clusters


def compare_answers(seeds: list[int]) -> dict[str, Any]:
    """What each kind of answers scored, and worked minus bare on the same rows."""
    measured = {answers: measure_answers(answers, seeds) for answers in TASKS}
    (_, bare_columns, clusters), (_, worked_columns, _) = measured["bare"], measured["worked"]
    bare, worked = (np.array(columns, float).T for columns in (bare_columns, worked_columns))
    pairs = zip(bare_columns, worked_columns, strict=True)
    return {
        "machine": detect_host().describe_machine(),
        "seeds": seeds,
        "test_rows": len(bare),
        "test_clusters": len(set(clusters or ())),
        "answers": {answers: side for answers, (side, *_) in measured.items()},
        "difference": compare_variants(worked, bare, None, clusters),
        "difference_by_seed": [stats.compare("accuracy", *pair, clusters) for pair in pairs],
    }


def describe_results(content: dict[str, Any]) -> str:
    lines = []
    for answers, entry in content["answers"].items():
        for metric in METRICS[answers]:
            means = ", ".join(f"{100 * mean:.1f}" for mean in entry[metric]["seeds"])
            lines.append(f"{answers}, {metric}: {means} (base {100 * entry[metric]['base']:.1f})")
    return "\n".join([*lines, f"worked minus bare: {describe_gain(content['difference'])}"])


@command
def main() -> None:
    count = read_seed_count("calculations against bare numbers", RESULTS)
    quiet()
    write_training_rows()
    first = find_recipe("bare").seed
    content = compare_answers(list(range(first, first + count)))
    write_json(RESULTS, content)
    print(describe_results(content))


if __name__ == "__main__":
    main()
