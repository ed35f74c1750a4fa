"""Searches for the recipe that learns most in the time that a recipe of the catalogue takes.

    python -m bench.beyond [--workers 2]      bench/beyond.yaml: every candidate, or what is missing

Training rows are divided once, seeded, into those that train and those that judge. Test rows are
not read. What is trained stays in runs/.beyond/, so the command can be interrupted and repeated;
results go to results/beyond.json. Candidates that run side by side share the cores alike, so their
seconds compare. Where the recipe that came of it and the one that it is to beat are trained and
scored in runs/, their test scores are compared as well.
"""

import argparse
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bench.parity import called, machine
from evals import stats
from tools import recipes
from tools.common import ROOT, JobFailed, WrongInput, atomic, command, shown, write_json
from tools.data.rules import fingerprint

SPEC = ROOT / "bench" / "beyond.yaml"
RESULTS = ROOT / "results" / "beyond.json"
RUNS = ROOT / "runs" / ".beyond"
SEED = 20231107


def hash_question(line: bytes) -> bytes:
    """What tells the prompts of chat rows apart: all of a row but its answer."""
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
    drawn = random.Random(SEED).sample(range(len(lines)), validation)
    judging = {prompts[at] for at in drawn}
    files = {"train": RUNS / "train.jsonl", "validation": RUNS / "validation.jsonl"}
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with atomic(path) as file:
            wanted = name == "validation"
            sides = zip(lines, prompts, strict=True)
            file.writelines(line for line, prompt in sides if (prompt in judging) == wanted)
    return files


def config(spec: dict[str, Any], name: str, files: dict[str, Path]) -> dict[str, Any]:
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


def measured(content: dict[str, Any]) -> dict[str, Any]:
    """What a finished training's log says; seconds are those of the steps, without evaluation."""
    lines = (ROOT / content["output_dir"] / "progress.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    steps = [line for line in log if "loss" in line]
    start = next(line for line in log if line["step"] == 0)
    return {
        "validation_loss": [line["eval_loss"] for line in log if "eval_loss" in line][-1],
        "seconds": round(steps[-1]["seconds"] - start["seconds"]),
        "steps": steps[-1]["step"],
        "real_tokens": steps[-1]["real_tokens"],
    }


def results(spec: dict[str, Any], configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "spec": spec,
        "candidates": {name: measured(content) for name, content in configs.items()},
    }


def scores(recipe: str, dataset: str, limit: int, side: str = "") -> dict[str, Any]:
    """A score file of a run, or of its base."""
    run = ROOT / "runs" / recipe
    folder = run.parent / "base_nf4" if side == "base" else run
    name = f"{dataset}_sample{limit}" if limit else dataset
    content: dict[str, Any] = json.loads((folder / "evals" / f"{name}.json").read_text())
    return content


def confirmed(spec: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of both recipes on each test set and on all rows, and their paired difference.

    Raises FileNotFoundError where a run or a score is missing.
    """
    pair = (spec["recipe"], spec["confirm"]["recipe"])
    found: dict[str, Any] = {}
    values: dict[str, list[list[float]]] = {}
    for dataset, limit in spec["confirm"]["sets"].items():
        files = [scores(recipe, dataset, limit) for recipe in pair]
        values[dataset] = [[row["values"]["accuracy"] for row in f["predictions"]] for f in files]
        base = scores(pair[0], dataset, limit, "base")["metrics"]["accuracy"]["value"]
        found[dataset] = {"base": round(base, 4)}
    values["all"] = [sum((columns[side] for columns in values.values()), []) for side in (0, 1)]
    for dataset, (first, second) in values.items():
        one = stats.compare("accuracy", first, second)
        means = [round(sum(column) / len(column), 4) for column in (first, second)]
        told = {name: round(one[name], 6) for name in ("value", "low", "high", "p")}
        found.setdefault(dataset, {}).update(rows=len(first), accuracy=means, difference=told)
    sets = [one["difference"] for name, one in found.items() if name != "all"]
    for one, p in zip(sets, stats.holm([one["p"] for one in sets]), strict=True):
        one["p"] = round(p, 6)
    runs = [json.loads((ROOT / "runs" / recipe / "run.json").read_text()) for recipe in pair]
    return {"sets": found, "seconds": [round(run["seconds"]) for run in runs]}


def confirmation(content: dict[str, Any]) -> str:
    """Markdown of what `confirmed` found."""
    names = [content["spec"]["recipe"], content["spec"]["confirm"]["recipe"]]
    first, second = (name.rpartition("/")[2] for name in names)
    lines = [
        f"| test rows | base | {first} | {second} | difference, points | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in content["confirmed"]["sets"].items():
        base = f"{100 * one['base']:.1f}" if "base" in one else ""
        gain, low, high = (100 * one["difference"][key] for key in ("value", "low", "high"))
        means = " | ".join(f"{100 * mean:.1f}" for mean in one["accuracy"])
        lines.append(
            f"| {name}, {one['rows']} | {base} | {means} | {gain:+.1f} ({low:+.1f} … {high:+.1f}) "
            f"| {one['difference']['p']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def table(content: dict[str, Any]) -> str:
    """Markdown, the best first."""
    found = content["candidates"]
    time = found[content["spec"]["baseline"]]["seconds"]
    lines = ["| candidate | validation loss | steps | time |", "| --- | ---: | ---: | ---: |"]
    for name in sorted(found, key=lambda name: found[name]["validation_loss"]):
        one = found[name]
        share = 100 * one["seconds"] / time
        lines.append(f"| {name} | {one['validation_loss']:.3f} | {one['steps']} | {share:.0f} % |")
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="what learns most in the same time")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    spec = yaml.safe_load(SPEC.read_text())
    rows = ROOT / recipes.build_config(spec["recipe"])["datasets"][0]["path"]
    files = divide(rows, spec["validation"])
    configs = {name: config(spec, name, files) for name in spec["candidates"]}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.workers))

    def train(name: str) -> None:
        content = configs[name]
        recipe = RUNS / f"{Path(content['output_dir']).name}.yaml"
        with atomic(recipe) as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        called("train", recipe)
        one = measured(content)
        loss, seconds = one["validation_loss"], one["seconds"]
        print(f"beyond     {name}: validation loss {loss:.4f}, {seconds} s", flush=True)

    pool = ThreadPoolExecutor(given.workers)
    try:
        list(pool.map(train, configs))
    except JobFailed as error:
        raise JobFailed(f"{error}; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)
    content = results(spec, configs)
    try:
        content["confirmed"] = confirmed(spec)
    except FileNotFoundError as error:
        print(f"beyond     not compared on test rows: {shown(Path(error.filename))} is missing")
    write_json(RESULTS, content)
    print(table(content))
    if "confirmed" in content:
        print(confirmation(content))


if __name__ == "__main__":
    main()
