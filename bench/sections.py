"""The sections of docs/methods.md beside the ranking, from results/_together/ and results/*.json.

Two tasks together and alone, swapped labels; calculations against bare numbers; what an adapter
costs elsewhere.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench import equivalence, forgetting, together, worked
from bench.cells import collect_columns, refuse_other_rows
from bench.jobs import describe_gain, state_p
from bench.performance import build_table
from bench.texts import (
    ROUNDED,
    average_score,
    format_difference,
    format_points,
    format_seeds,
    is_constant,
    list_names,
    quote,
)
from evals import stats
from evals.run import find_cluster_pattern
from tools.common import read_json

WORKED = """\
FinLoRA's Financial Math asks for a bare number. The task
[`formula_worked`](data.md#calculations) asks for the calculation and its value instead."""
# What was trained and scored in results/worked.json: the answer, and what of it counts.
WORKED_SCORES = {
    ("bare", "accuracy"): ("a number", "the number"),
    ("worked", "accuracy"): ("a calculation and its value", "what the calculation comes to"),
    ("worked", "numeric_accuracy"): ("a calculation and its value", "the value written"),
}


# ---- tasks together, swapped labels


def build_part(part: together.Part) -> list[str]:
    """A section: the hypothesis, scores by variant and test, and the comparisons."""
    plan, spec = part.plan, part.spec
    # Variants train on other rows, and are compared on the same test rows.
    refuse_other_rows(part.list_finished_cells(), same_training=False)
    lines = [f"## {plan['title']}", "", quote(plan["hypothesis"]), ""]
    scored = [(name, test) for name, entry in plan["variants"].items() for test in entry["tests"]]
    rows = [build_variant(part, *pair) for pair in scored]
    headings = ["trained on", "scored on", "majority", "base", "accuracy, % (each seed)"]
    lines += ["Majority: the most frequent answer alone.", "", *build_table(headings, rows)]
    lines += describe_below(part, scored)
    for variant, test in scored:
        lines += describe_constant(part, variant, test)
    for pair, comparison in zip(plan["compared"], part.compare_all(), strict=True):
        name = f"{pair['variant']} against {pair['against']}, on {pair['test']}"
        verdict = equivalence.describe_verdict(comparison, spec["margin"])
        points = f"{format_difference(comparison)} points over {len(spec['seeds'])} seeds"
        lines.append(f"- {name}: {verdict}; {points}, {state_p(comparison['p'])} (Holm).")
        verdict = equivalence.judge_direction(comparison, spec["margin"], pair["expected"])
        change = "drop" if pair["expected"] == "lower" else "rise"
        least = f"{100 * spec['margin']:g} points"
        lines.append(f"  The predicted {change} of more than {least} is {verdict}.")
    return [*lines, f"- {plan['note']}", ""]


def build_variant(part: together.Part, variant: str, test: str) -> list[str]:
    """The row of a variant in the table of a part."""
    cells, datasets = part.list_cells(variant), part.find_test(test).datasets
    refuse_other_rows(cells)
    means = collect_columns(cells, datasets).mean(0)
    sides = (average_score(cells[0], datasets, side) for side in ("majority", "base"))
    return [variant, test, *map(format_points, sides), format_seeds(means.mean(), means)]


def describe_constant(part: together.Part, variant: str, test: str) -> list[str]:
    """A line where a variant scores what the most frequent answer alone scores."""
    cells, datasets = part.list_cells(variant), part.find_test(test).datasets
    if not is_constant(cells, datasets):
        return []
    name = f"- {variant}, scored on {test}:"
    if is_constant(cells, datasets, same_rows=True):
        return [
            f"{name} all seeds are right on the same rows, as many as the most frequent answer "
            "alone. They probably give it to all rows, and learned no more of the labels."
        ]
    return [f"{name} each seed scores what one answer to all rows scores."]


def describe_below(part: together.Part, scored: Sequence[tuple[str, str]]) -> list[str]:
    """A line that names the scores below those of the most frequent answer; none without any."""
    below = []
    for variant, test in scored:
        cells, datasets = part.list_cells(variant), part.find_test(test).datasets
        majority = average_score(cells[0], datasets, "majority")
        if collect_columns(cells, datasets).mean() < majority - ROUNDED:
            below.append(f"{variant} on {test}")
    return [f"- Below the most frequent answer alone: {', '.join(below)}."] if below else []


# ---- calculations


def build_worked() -> list[str]:
    """A section: what numbers and calculations scored, and what it shows."""
    lines = ["## Calculations against bare numbers", "", WORKED, ""]
    if not worked.RESULTS.is_file():
        return [*lines, "Not measured yet: `python -m bench.worked`.", ""]
    content = read_json(worked.RESULTS)
    answers = content["answers"]
    origins = {name: side.get("origin") for name, side in answers.items()}
    if any(origin and origin != worked.describe_origin(name) for name, origin in origins.items()):
        return [*lines, "Recipes or scoring changed since: run `python -m bench.worked` again.", ""]
    scores = {key: answers[key[0]][key[1]] for key in WORKED_SCORES}
    rows = [
        [*texts, format_points(score["base"]), format_seeds(fmean(score["seeds"]), score["seeds"])]
        for texts, score in zip(WORKED_SCORES.values(), scores.values(), strict=True)
    ]
    setting = (
        f"SmolLM2-135M was trained with each on the same {answers['bare']['rows']} rows, whose "
        f"keys have one calculation, for {answers['bare']['steps']} steps with seeds "
        f"{', '.join(map(str, content['seeds']))}, and answered the same {content['test_rows']} "
        f"test rows about {content['test_clusters']} formulas, on {content['machine']}."
    )
    if not all(origins.values()):
        setting += (
            " The results do not record the versions of recipes and scoring, so a later change of "
            "them would not show here."
        )
    table = build_table(["answer", "scored by", "base", "right, % (each seed)"], rows)
    return [*lines, setting, "", *table, *conclude_worked(content["difference"]), ""]


def conclude_worked(difference: dict[str, Any]) -> list[str]:
    """What the difference shows, why, and what would overturn it."""
    verdict = "" if difference["p"] < stats.LEVEL else "; no difference is shown"
    return [
        f"- Calculations minus bare numbers: {describe_gain(difference)}, 95 % over formulas and "
        f"seeds{verdict}.",
        "- The question states the formula. The last two lines tell how often the model puts the "
        "right numbers into it, and how often the value that it writes is right. An application "
        "has to evaluate the calculation, as the scoring does.",
        "- A model that calculates well might gain less, and other seeds could bring the interval "
        "to 0.",
    ]


# ---- forgetting


def build_forgetting() -> list[str]:
    text = (
        "What an adapter adds to its base's loss, in nats a token, on the same texts at the same "
        "precision: general prose, and the keys of each task's test rows behind their prompts. "
        "More is forgetting. Means over runs, and the outermost ends of the runs' 95 % "
        "intervals, which are over texts."
    )
    lines = ["## What an adapter costs elsewhere", "", text, ""]
    if not forgetting.RESULTS.is_file():
        return [*lines, "Not measured yet: `python -m bench.forgetting`.", ""]
    measured = read_json(forgetting.RESULTS)["runs"]
    current = {name: entry for name, entry in measured.items() if forgetting.is_current(entry)}
    if len(current) < len(measured):
        old = list_names([name for name in measured if name not in current])
        text = f"Left out, since recipe or texts changed: {old}. Run `python -m bench.forgetting`."
        lines += [text, ""]
    if not current:
        return lines
    entries = list(current.values())
    return [*lines, *build_forgotten(entries), *conclude_forgetting(entries)]


def build_forgotten(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A column for each recipe, and where its runs were measured."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_recipe.setdefault(entry["recipe"], []).append(entry)
    texts = {name: loss["texts"] for entry in entries for name, loss in entry["losses"].items()}
    rows = [
        [name, str(count), *(format_forgotten(runs, name) for runs in by_recipe.values())]
        for name, count in texts.items()
    ]
    measured = [
        f"`{recipe}` at {runs[0]['precision']}, {count_runs(len(runs))}, on "
        + " and ".join(dict.fromkeys(entry["machine"] for entry in runs))
        for recipe, runs in by_recipe.items()
    ]
    table = build_table(["texts of", "texts", *by_recipe], rows)
    lines = [*table, f"Measured: {'; '.join(measured)}.", ""]
    if old := list_unclustered(entries):
        lines += [
            f"Rows were taken as independent, so these intervals are too narrow: {old}.",
            "",
        ]
    return lines


def list_unclustered(entries: Sequence[dict[str, Any]]) -> str:
    """Losses whose rows ask about shared texts, measured as if they did not."""
    old: dict[str, dict[str, None]] = {}
    for entry in entries:
        for dataset, measured in entry["losses"].items():
            if find_cluster_pattern(dataset) and "clusters" not in measured:
                old.setdefault(entry["recipe"], {})[dataset] = None
    return "; ".join(f"`{recipe}` on {' and '.join(names)}" for recipe, names in old.items())


def format_forgotten(runs: Sequence[dict[str, Any]], dataset: str) -> str:
    """`+0.024 (+0.016 … +0.033)`: the mean over runs, the outermost ends of their intervals."""
    differences = [run["losses"][dataset]["difference"] for run in runs if dataset in run["losses"]]
    if not differences:
        return "–"
    values, lows, highs = ([d[key] for d in differences] for key in ("value", "low", "high"))
    text = f"{fmean(values):+.3f}"
    if None not in lows:
        text += f" ({min(lows):+.3f} … {max(highs):+.3f})"
    return text + (", its own task" if dataset in runs[0]["own_datasets"] else "")


def count_runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"


def conclude_forgetting(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for the prose, and one for other tasks' keys."""
    lines = []
    prose = [entry["losses"][forgetting.PROSE]["difference"] for entry in entries]
    worse = sum(bool(d["low"] is not None and d["low"] > 0) for d in prose)
    mean = fmean(d["value"] for d in prose)
    lines.append(
        f"- Prose: {mean:+.3f} nats a token on average over {count_runs(len(prose))}; {worse} of "
        "them worse than the base, by the interval. The table has each recipe's own mean."
    )
    others = [
        measured["difference"]
        for entry in entries
        for dataset, measured in entry["losses"].items()
        if dataset != forgetting.PROSE and dataset not in entry["own_datasets"]
    ]
    if others:
        worse = sum(bool(d["low"] is not None and d["low"] > 0) for d in others)
        better = sum(bool(d["high"] is not None and d["high"] < 0) for d in others)
        lines.append(
            f"- Keys of other tasks: of {len(others)} pairs of run and dataset {worse} are worse "
            f"than the base and {better} better, by the interval."
        )
    lines.append(
        "- Runs of other seeds or recipes whose intervals include 0 would overturn it. Loss is not "
        "the score: an adapter that answers in another form has a higher loss without knowing less."
    )
    return [*lines, ""]
