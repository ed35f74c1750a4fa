"""What a merge costs: base plus adapter against merged models of 16 and 4 bits, on FPB.

    python -m bench.merged [--seeds 3]

Sides, each scored on all test rows with each seed:

    adapter     smollm2-135m/sentiment_r4, the adapter beside its 4-bit base
    merged_16   the same adapter, merged into the dequantized base, in bfloat16
    merged_4    the same adapter, merged and rounded to NF4 again
    aware       trained with `merge_aware` and without dropout: it computes with the rounded sum
    aware_4     the 4-bit model that its merge saves, as any program loads it

Runs of `adapter` are the recipe's own (`make verify` has the same); the others stay in
runs/.merged/, so the command can be interrupted and repeated. Each merged model is removed once it
is scored. Results go to results/merged.json. A seed takes ten minutes on two cores where its
adapter is trained already.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.equivalence import compare_variants
from bench.jobs import (
    describe_gain,
    list_row_values,
    read_seed_count,
    train_and_score,
    vary,
)
from evals import run
from tools import recipes, subjects
from tools.common import ROOT, command, format_table, quiet, read_json, write_json
from tools.subjects import Subject
from tools.train.hardware import detect_host
from tools.use import merge

RECIPE, DATASET = "smollm2-135m/sentiment_r4", "fpb"
RUNS = "runs/.merged"
RESULTS = ROOT / "results" / "merged.json"
AWARE = {"merge_aware": True, "lora_dropout": 0.0}
SIDES = ("adapter", "merged_16", "merged_4", "aware", "aware_4")
# What each side is compared with.
OTHERS = {"merged_16": "adapter", "merged_4": "adapter", "aware": "adapter", "aware_4": "aware"}
QUANTIZATION = ("load_in_4bit", "bnb_config_kwargs")


def find_merged(subject: Subject, folder: Path) -> Subject:
    """A merged model as a base of its own; its config.json describes its weights."""
    config = {key: value for key, value in subject.config.items() if key not in QUANTIZATION}
    config["base_model"] = str(folder.relative_to(ROOT))
    return replace(subject, config=config, adapter=None, base_folder=folder)


def score_merged(recipe: recipes.Recipe, bits: int) -> dict[str, Any]:
    """The score file of a finished run's merge, and how it differs from base + adapter."""
    subject = subjects.of_recipe(recipe)
    place = ROOT / RUNS / f"{recipe.run.folder.name}_{bits}bit"
    score_file, report = place / "evals" / f"{DATASET}.json", place / merge.REPORT
    if not (score_file.is_file() and report.is_file() and describes_adapter(report, subject)):
        assert subject.adapter
        folder = merge.merge(subject.config, subject.adapter, subject.prompt_format, bits)
        merged = find_merged(subject, folder)
        file = run.score_subject(merged, run.Request([DATASET]))[DATASET]["base"]
        score_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, score_file)
        shutil.copy(folder / merge.REPORT, report)
        shutil.rmtree(folder)
    return read_json(score_file) | {"merge": read_json(report)}


def describes_adapter(report: Path, subject: Subject) -> bool:
    """Whether the report of a merge is about a subject's adapter."""
    assert subject.adapter
    origin = merge.describe_origin(subject.config, subject.adapter, subject.prompt_format)
    content = read_json(report)
    return bool(content == content | origin)


def score_sides(recipe: recipes.Recipe) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({side: score file}, time, memory and loss of both trainings) of one seed."""
    aware = vary(recipe, f"{RUNS}/aware_seed{recipe.seed}", AWARE)
    sides = {"adapter": train_and_score(recipe, DATASET)["adapter"]}
    sides |= {f"merged_{bits}": score_merged(recipe, bits) for bits in (16, 4)}
    sides["aware"] = train_and_score(aware, DATASET)["adapter"]
    sides["aware_4"] = score_merged(aware, 4)
    keys = ("seconds", "peak_memory_bytes", "last_eval_loss", "finished", "packages")
    trainings = {
        name: {key: trained.run.info[key] for key in keys}
        for name, trained in (("adapter", recipe), ("aware", aware))
    }
    return sides, trainings


def measure_seed(recipe: recipes.Recipe) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(scores and merges, accuracy of each test row) of one seed, each by side."""
    scores, trainings = score_sides(recipe)
    values = {side: list_row_values(content, "accuracy") for side, content in scores.items()}
    entry: dict[str, Any] = {side: {"accuracy": float(np.mean(values[side]))} for side in SIDES}
    for side in SIDES:
        if report := scores[side].get("merge"):
            names = ("largest_logit_difference", "same_next_token")
            entry[side] |= {name: round(report[name], 6) for name in names}
    for side, other in OTHERS.items():
        pairs = zip(scores[side]["predictions"], scores[other]["predictions"], strict=True)
        same = [first["answer"] == second["answer"] for first, second in pairs]
        entry[side][f"same_answers_as_{other}"] = float(np.mean(same))
    return entry | {"training": trainings}, values


def compare_sides(seeds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Each side minus the one that it is compared with, over rows and seeds."""
    tables = {side: np.array([values[side] for values in seeds.values()]).T for side in SIDES}
    pairs = {**OTHERS, "aware_4": "adapter"}
    return {
        f"{side}_minus_{other}": compare_variants(tables[side], tables[other], None)
        for side, other in pairs.items()
    }


def print_results(content: dict[str, Any]) -> None:
    rows = [("seed", *SIDES)]
    for seed, entry in content["seeds"].items():
        rows.append((seed, *(f"{100 * entry[side]['accuracy']:.1f}" for side in SIDES)))
    print(format_table(rows, "<" + ">" * len(SIDES)))
    for name, gain in content["differences"].items():
        print(f"{name.replace('_minus_', ' minus ')}: {describe_gain(gain)}")


@command
def main() -> None:
    count = read_seed_count("merged models against base plus adapter", RESULTS)
    quiet()
    recipe = recipes.find(RECIPE)
    content: dict[str, Any] = {"recipe": RECIPE, "dataset": DATASET, "digest": recipe.digest}
    content |= {"machine": detect_host().describe_machine(), "seeds": {}}
    values: dict[str, dict[str, list[float]]] = {}
    for seed in map(str, range(recipe.seed, recipe.seed + count)):
        content["seeds"][seed], values[seed] = measure_seed(recipe.with_seed(int(seed)))
        content |= {"rows": len(values[seed]["aware"]), "differences": compare_sides(values)}
        write_json(RESULTS, content)
    print_results(content)


if __name__ == "__main__":
    main()
