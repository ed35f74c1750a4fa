"""What a base and its adapter gain where an answer can only be a label.

    python -m bench.constrained [smollm2-135m/sentiment_r4 …] [--limit 300]

Scores finished runs with and without CONSTRAIN=1 on the same rows, as `make eval` does: scores that
stand are not computed again. The table goes to results/constrained.json, beside those of other
recipes on this machine.
"""

import argparse
from dataclasses import replace
from typing import Any

from evals import report, run, stats
from evals.tasks.utils import NONE
from tools import recipes, subjects
from tools.common import ROOT, command, format_table, quiet, read_json, write_json
from tools.train.hardware import detect_host

RESULTS = ROOT / "results" / "constrained.json"
DATASETS = {
    "smollm2-135m/sentiment_r4": ["fpb", "fiqa"],
    "smollm2-135m/ner_r4": ["ner"],
}


def compare_answers(free: report.Content, limited: report.Content) -> dict[str, Any]:
    """The first metric of two score files on the same rows, and what the constraint gains."""
    metric = next(iter(free["metrics"]))
    (ours, theirs), clusters = report.select_shared(metric, [free, limited])
    gain = stats.compare(metric, ours, theirs, clusters)
    unread = sum(row["answered"] == NONE for row in free["predictions"])
    return {
        "metric": metric,
        "rows": free["examples"],
        "without_label": unread,  # free answers in which no label is found
        "free": free["metrics"][metric],
        "constrained": limited["metrics"][metric],
        "gain": gain,
    }


def measure_recipe(name: str, datasets: list[str], limit: int | None) -> dict[str, Any]:
    """What `compare_answers` returns: {dataset: {side: …}}."""
    subject, request = subjects.find(name), run.Request(datasets, limit)
    limited = replace(subject, constrained=True)
    files = [run.score_subject(scored, request) for scored in (subject, limited)]
    return {
        dataset: {
            side: compare_answers(*(report.read(scores[dataset][side]) for scores in files))
            for side in subject.sides
        }
        for dataset in datasets
    }


def print_gains(measured: dict[str, Any]) -> None:
    rows = [("dataset", "model", "rows", "no label", "free, %", "constrained, %", "gain, points")]
    for name, by_dataset in measured.items():
        for dataset, sides in by_dataset.items():
            for side, entry in sides.items():
                texts = [
                    f"{point} ({interval or report.NO_INTERVAL})"
                    for point, interval in (
                        report.format_percent(entry["free"]),
                        report.format_percent(entry["constrained"]),
                        report.format_percent(entry["gain"], signed=True),
                    )
                ]
                counts = (str(entry["rows"]), str(entry["without_label"]))
                label = name.rpartition("/")[2] if side == "adapter" else "base"
                rows.append((dataset, label, *counts, *texts))
    print(format_table(rows, "<<>>>>>"))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="what limiting answers to labels gains")
    parser.add_argument("recipes", nargs="*", default=list(DATASETS))
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    quiet()
    measured = {}
    for name in options.recipes:
        recipe = recipes.find(name)
        datasets = DATASETS.get(recipe.name) or run.choose_datasets(recipe.task, [])
        measured[recipe.name] = measure_recipe(recipe.name, datasets, options.limit)
    machine = detect_host().describe_machine()
    before = read_json(RESULTS) if RESULTS.is_file() else {}
    if before.get("machine") == machine:
        measured = before["measured"] | measured
    write_json(RESULTS, {"machine": machine, "measured": measured})
    print_gains(measured)


if __name__ == "__main__":
    main()
