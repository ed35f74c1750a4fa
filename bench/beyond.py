"""Searches for the recipe that learns most in the time that a recipe of the catalogue takes.

    python -m bench.beyond [--workers 2]      bench/beyond.yaml: every candidate, or what is missing

Training rows are divided once, seeded, into those that train and those that validate. Test rows are
not read. Trainings stay in runs/.beyond/, so the command can be interrupted and repeated; results
go to results/beyond.json. Candidates that run side by side share the cores alike, so their seconds
compare. Where the resulting recipe and the one that it should beat are trained and scored in runs/,
their test scores are compared as well.
"""

import argparse
import json
import os
import random
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.jobs import find_scores, run_all, run_verb, write_config
from evals import stats
from tools import recipes
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    command,
    json_lines,
    read_json,
    read_yaml,
    shown,
    write_json,
)
from tools.data.rules import fingerprint
from tools.runs import Run
from tools.train.hardware import detect_host

SPEC = ROOT / "bench" / "beyond.yaml"
RESULTS = ROOT / "results" / "beyond.json"
RUNS = ROOT / "runs" / ".beyond"
SEED = 20231107


def hash_question(line: bytes) -> bytes:
    """Identifies the prompt of a chat row: all of the row but its answer."""
    row = json.loads(line)
    turns = row.pop("messages", [])[:-1]
    return fingerprint(json.dumps([row, turns]))


def divide(rows: Path, validation: int) -> dict[str, Path]:
    """Writes train.jsonl and validation.jsonl from a file of chat rows; the same every time.

    All copies of a prompt go to one side, so there may be a few more than `validation` rows.
    """
    if not rows.is_file():
        raise WrongInput(f"{shown(rows)} is needed: `make fetch data`")
    lines = rows.read_bytes().splitlines(keepends=True)
    if not 0 < validation < len(lines):
        raise WrongInput(f"validation: {validation} of the {len(lines)} rows in {shown(rows)}")
    prompts = list(map(hash_question, lines))
    sample = random.Random(SEED).sample(range(len(lines)), validation)
    validating = {prompts[place] for place in sample}
    files = {"train": RUNS / "train.jsonl", "validation": RUNS / "validation.jsonl"}
    for name, path in files.items():
        sides = zip(lines, prompts, strict=True)
        with atomic(path) as file:
            file.writelines(
                line for line, prompt in sides if (prompt in validating) == (name == "validation")
            )
    return files


def build_candidate(spec: dict[str, Any], name: str, files: dict[str, Path]) -> dict[str, Any]:
    """A candidate's whole config; `name` is its name in the YAML."""
    content = recipes.build_config(spec["recipe"]) | spec["settings"] | spec["candidates"][name]
    folder = RUNS / "".join(c if c.isalnum() else "_" for c in name)
    entry = content["datasets"][0]
    return content | {
        "datasets": [entry | {"path": shown(files["train"])}],
        "test_datasets": [
            entry | {"path": shown(files["validation"]), "ds_type": "json", "split": "train"}
        ],
        "eval_steps": content["max_steps"],
        "output_dir": shown(folder),
        "dataset_prepared_path": shown(folder / "prepared"),
    }


def read_figures(config: dict[str, Any]) -> dict[str, Any]:
    """Figures from a finished training's log; seconds are those of the steps alone."""
    run = Run(ROOT / config["output_dir"])
    log = json_lines(run.progress_file)
    last = run.losses()[-1]
    start = next(line for line in log if line["step"] == 0)
    return {
        "validation_loss": [line["eval_loss"] for line in log if "eval_loss" in line][-1],
        "seconds": round(last["seconds"] - start["seconds"]),
        "steps": last["step"],
        "real_tokens": last["real_tokens"],
    }


def compare_on_test_rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of both recipes on each test set and on all rows, and their paired difference.

    Raises FileNotFoundError where a run or a score is missing.
    """
    runs = [Run(ROOT / "runs" / name) for name in (spec["recipe"], spec["confirm"]["recipe"])]
    base = runs[0].folder.parent / "base_nf4"
    sets: dict[str, Any] = {}
    values: dict[str, list[list[float]]] = {}
    for name, limit in spec["confirm"]["sets"].items():
        files = [find_scores(run.folder, base, "adapter", name, limit) for run in runs]
        values[name] = [
            [row["values"]["accuracy"] for row in read_json(file)["predictions"]] for file in files
        ]
        scores = read_json(find_scores(runs[0].folder, base, "base", name, limit))
        sets[name] = {"base": round(scores["metrics"]["accuracy"]["value"], 4)}
    values["all"] = [sum((columns[side] for columns in values.values()), []) for side in (0, 1)]
    for name, (first, second) in values.items():
        comparison = stats.compare("accuracy", first, second)
        means = [round(fmean(column), 4) for column in (first, second)]
        difference = {key: round(comparison[key], 6) for key in ("value", "low", "high", "p")}
        sets.setdefault(name, {}).update(rows=len(first), accuracy=means, difference=difference)
    differences = [entry["difference"] for name, entry in sets.items() if name != "all"]
    corrected = stats.holm([difference["p"] for difference in differences])
    for difference, p in zip(differences, corrected, strict=True):
        difference["p"] = round(p, 6)
    seconds = [round(read_json(run.info_file)["seconds"]) for run in runs]
    return {"sets": sets, "seconds": seconds}


def format_test_scores(content: dict[str, Any]) -> str:
    """Markdown of `compare_on_test_rows`."""
    names = [content["spec"]["recipe"], content["spec"]["confirm"]["recipe"]]
    first, second = (name.rpartition("/")[2] for name in names)
    lines = [
        f"| test rows | base | {first} | {second} | difference, points | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, entry in content["confirmed"]["sets"].items():
        base = f"{100 * entry['base']:.1f}" if "base" in entry else ""
        gain, low, high = (100 * entry["difference"][key] for key in ("value", "low", "high"))
        means = " | ".join(f"{100 * mean:.1f}" for mean in entry["accuracy"])
        lines.append(
            f"| {name}, {entry['rows']} | {base} | {means} | {gain:+.1f} ({low:+.1f} … {high:+.1f})"
            f" | {entry['difference']['p']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def format_candidates(content: dict[str, Any]) -> str:
    """Markdown, the best candidate first."""
    baseline = content["candidates"][content["spec"]["baseline"]]["seconds"]
    lines = ["| candidate | validation loss | steps | time |", "| --- | ---: | ---: | ---: |"]
    for name, figures in sorted(
        content["candidates"].items(), key=lambda item: item[1]["validation_loss"]
    ):
        loss, share = figures["validation_loss"], 100 * figures["seconds"] / baseline
        lines.append(f"| {name} | {loss:.3f} | {figures['steps']} | {share:.0f} % |")
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="what learns most in the same time")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    spec = read_yaml(SPEC)
    rows = ROOT / recipes.build_config(spec["recipe"])["datasets"][0]["path"]
    files = divide(rows, spec["validation"])
    configs = {name: build_candidate(spec, name, files) for name in spec["candidates"]}

    def train(config: dict[str, Any]) -> str:
        recipe = RUNS / f"{Path(config['output_dir']).name}.yaml"
        write_config(recipe, config)
        run_verb("train", recipe)
        figures = read_figures(config)
        return f"validation loss {figures['validation_loss']:.4f}, {figures['seconds']} s"

    run_all("beyond", configs, train, options.workers)
    content = {
        "machine": detect_host().describe_machine(),
        "spec": spec,
        "candidates": {name: read_figures(config) for name, config in configs.items()},
    }
    try:
        content["confirmed"] = compare_on_test_rows(spec)
    except FileNotFoundError as error:
        print(f"beyond     not compared on test rows: {shown(Path(error.filename))} is missing")
    write_json(RESULTS, content)
    print(format_candidates(content))
    if "confirmed" in content:
        print(format_test_scores(content))


if __name__ == "__main__":
    main()
