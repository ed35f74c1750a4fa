"""Searches for the recipe that learns most in the time that a recipe of the catalogue takes.

    python -m bench.beyond [--workers 2]      bench/beyond.yaml: every candidate, or what is missing

Training rows are divided once, seeded, into those that train and those that judge. Test rows are
not read. What is trained stays in runs/.beyond/, so the command can be interrupted and repeated;
results go to bench/beyond.json. Candidates that run side by side share the cores alike, so their
seconds compare.
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
from tools import recipes
from tools.cli import ROOT, JobFailed, WrongInput, atomic, command, shown, write_json

SPEC = ROOT / "bench" / "beyond.yaml"
RESULTS = ROOT / "bench" / "beyond.json"
RUNS = ROOT / "runs" / ".beyond"
SEED = 20231107


def divide(rows: Path, validation: int) -> dict[str, Path]:
    """Writes train.jsonl and validation.jsonl from a file of chat rows; the same every time."""
    if not rows.is_file():
        raise WrongInput(f"{shown(rows)} is needed: `make fetch data`")
    lines = rows.read_bytes().splitlines(keepends=True)
    if not 0 < validation < len(lines):
        raise WrongInput(f"validation: {validation} of the {len(lines)} rows in {shown(rows)}")
    judging = set(random.Random(SEED).sample(range(len(lines)), validation))
    files = {"train": RUNS / "train.jsonl", "validation": RUNS / "validation.jsonl"}
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with atomic(path) as file:
            wanted = name == "validation"
            file.writelines(line for at, line in enumerate(lines) if (at in judging) == wanted)
    return files


def config(spec: dict[str, Any], name: str, files: dict[str, Path]) -> dict[str, Any]:
    """A candidate's whole config; `name` is its name in the YAML."""
    content = recipes.config(spec["recipe"]) | spec["settings"] | spec["candidates"][name]
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
    rows = ROOT / recipes.config(spec["recipe"])["datasets"][0]["path"]
    files = divide(rows, spec["validation"])
    configs = {name: config(spec, name, files) for name in spec["candidates"]}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.workers))

    def train(name: str) -> None:
        content = configs[name]
        recipe = RUNS / f"{Path(content['output_dir']).name}.yaml"
        with atomic(recipe) as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        called("tools.train", recipe)
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
    write_json(RESULTS, content)
    print(table(content))


if __name__ == "__main__":
    main()
