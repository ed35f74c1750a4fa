"""Whether accuracy suffers where packed rows share the dropout of their common beginning.

    python -m bench.shared_dropout [--seeds 3]

Trains smollm2-135m/sentiment_r4 with each seed on packed and on padded rows, and scores both on
FPB. Packed runs are the recipe's own (`make verify` has the same), padded ones stay in
runs/.shared_dropout/, so the command can be interrupted and repeated. A table of all finished
seeds goes to results/shared_dropout.json.
"""

from typing import Any

from bench.jobs import read_seed_count, train_and_score, vary
from tools import recipes
from tools.common import ROOT, command, format_table, quiet, read_json, write_json
from tools.train.hardware import detect_host

RECIPE, DATASET = "smollm2-135m/sentiment_r4", "fpb"
RUNS = "runs/.shared_dropout"
RESULTS = ROOT / "results" / "shared_dropout.json"
SIDES = ("packed", "padded")


def measure_side(recipe: recipes.Recipe) -> dict[str, Any]:
    """What one side reached with one seed."""
    scores, info = train_and_score(recipe, DATASET)["adapter"], recipe.run.info
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
    count = read_seed_count("packed rows against padded ones, with dropout", RESULTS)
    quiet()
    recipe = recipes.find(RECIPE)
    content = {"recipe": RECIPE, "dataset": DATASET, "digest": recipe.digest}
    old = read_json(RESULTS) if RESULTS.is_file() else {}
    seeds = old["seeds"] if old.get("digest") == recipe.digest else {}
    for seed in range(recipe.seed, recipe.seed + count):
        seeded = recipe.with_seed(seed)
        padded = vary(seeded, f"{RUNS}/seed{seed}", {"shared_prefix": False})
        seeds[str(seed)] = {"packed": measure_side(seeded), "padded": measure_side(padded)}
        machine = detect_host().describe_machine(1)
        write_json(RESULTS, content | {"machine": machine, "seeds": seeds})
    print_seeds(seeds)


if __name__ == "__main__":
    main()
