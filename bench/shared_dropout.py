"""Whether accuracy suffers where packed rows share the dropout of their common beginning.

    python -m bench.shared_dropout [--seeds 42 43 44] [--steps 110]

Trains smollm2-135m/sentiment_r4 for each seed on packed and on padded rows, and scores both on FPB.
What is trained stays in runs/.shared_dropout/, so the command can be interrupted and repeated; a
table of all finished seeds goes to results/shared_dropout.json.
"""

import argparse
import json
from typing import Any

import yaml

from bench.jobs import run_verb
from tools import recipes
from tools.common import ROOT, atomic, command, format_table, write_json
from tools.runs import Run
from tools.train.hardware import detect_host

RECIPE, DATASET = "smollm2-135m/sentiment_r4", "fpb"
RUNS = ROOT / "runs" / ".shared_dropout"
RESULTS = ROOT / "results" / "shared_dropout.json"
SIDES = {"packed": {}, "padded": {"shared_prefix": False}}


def train_and_score(seed: int, steps: int, side: str) -> dict[str, Any]:
    """Trains one side with one seed, or what is missing of it; returns what it reached."""
    folder = RUNS / f"{steps}_steps_{seed}_{side}"
    config = recipes.build_config(RECIPE) | SIDES[side]
    config |= {"seed": seed, "max_steps": steps, "output_dir": str(folder)}
    config |= {"dataset_prepared_path": str(folder / "prepared"), "eval_steps": steps}
    path = folder.with_suffix(".yaml")
    with atomic(path) as file:
        file.write(yaml.safe_dump(config, sort_keys=False).encode())
    run_verb("train", path)
    run_verb("eval", path, "--tasks", DATASET)
    info = Run(folder).info
    scores = json.loads((folder / "evals" / f"{DATASET}.json").read_text())
    return {
        "accuracy": round(scores["metrics"]["accuracy"]["value"], 4),
        "validation_loss": round(info["last_eval_loss"], 4),
        "seconds": round(info["seconds"]),
        "computed_tokens": info["computed_tokens"],
    }


def print_seeds(seeds: dict[str, dict[str, dict[str, Any]]]) -> None:
    rows = [("seed", "rows", "accuracy, %", "validation loss", "tokens computed", "seconds")]
    for seed, sides in seeds.items():
        for side, reached in sides.items():
            numbers = (100 * reached["accuracy"], reached["validation_loss"])
            texts = (f"{numbers[0]:.1f}", f"{numbers[1]:.3f}", f"{reached['computed_tokens']:,}")
            rows.append((seed, side, *texts, str(reached["seconds"])))
    for side in SIDES:
        values = [sides[side]["accuracy"] for sides in seeds.values()]
        rows.append(("mean", side, f"{100 * sum(values) / len(values):.1f}", "", "", ""))
    print(format_table(rows, "><>>>>"))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="packed rows against padded ones, with dropout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=110)
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    seeds = old.get("seeds", {}) if old.get("steps") == options.steps else {}
    for seed in options.seeds:
        seeds[str(seed)] = {side: train_and_score(seed, options.steps, side) for side in SIDES}
        content = {"recipe": RECIPE, "dataset": DATASET, "steps": options.steps}
        write_json(RESULTS, content | {"machine": detect_host().describe_machine(), "seeds": seeds})
    print_seeds(seeds)


if __name__ == "__main__":
    main()
