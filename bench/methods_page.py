"""docs/methods.md and its figure, from results/{_methods,_together}/ and results/*.json.

Every number comes from these files or from the plans in bench/*.yaml. Where trainings are missing,
the page names them and draws no conclusion from the others.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bench import equivalence, forgetting, together, worked
from bench.cells import Cell, collect_columns, list_missing, refuse_other_rows
from bench.jobs import describe_gain, state_p
from bench.performance import build_table
from evals import report, stats
from evals.figures import COLOURS, MARKERS
from tools.common import atomic, read_json

if TYPE_CHECKING:
    from bench.methods import Experiment

HEAD = """\
# FinLoRA's ranking re-examined

FinLoRA ranks LoRA, QLoRA, DoRA and rsLoRA at one learning rate. Here each method first gets its own
rate, chosen on validation rows, and is then trained with three seeds and scored on test rows.
`make results` writes this page from [results/](../results/), and says what is missing.

    make fetch data TASKS=sentiment,xbrl_term,ner,tfns,tfns_as_published,formula,formula_worked
    .venv/bin/python -m bench.methods            # hours on two cores; goes on where it stopped
    .venv/bin/python -m bench.together
    .venv/bin/python -m bench.worked             # answers that are calculations
    .venv/bin/python -m bench.forgetting         # what the finished runs of SmolLM2 forgot
    make results

Each training leaves a small file of results. They are committed, so another machine with the same
data goes on from them. Within this experiment, test rows are read once all rates of their task are
chosen, and not before. Earlier [experiments](experiments.md) scored all of FPB's and some others.
"""

PLANNED = f"""\
What the plan can find, by {equivalence.SIMULATED:,} simulated experiments with the planned standard
deviations of paired differences. A row's difference is the same for all seeds there; in brackets,
another for each. Holm's correction is left out, and makes these findings rarer.
"""

VERDICTS = """\
Verdicts are t tests over rows and seeds, both of them drawn (Hillis 2007), and two one-sided tests
of the margin. Their p-values are corrected over the methods of a table (Holm), the intervals are
not. *Undecided*: neither a difference nor equivalence is shown. The score is one mean over the rows
of all datasets, so the largest counts most.

The standard error is at least 1 / rows: one more row might have been answered differently, and
seeds that agree by chance would leave hardly an interval. Under each table, *at its least* marks
the intervals that this makes wider.
"""

LIMITS = """\
## What a 135M model cannot tell

- It has 135 million parameters, FinLoRA's models 8 billion. A small model loses more at 4 bits, has
  less to forget, and takes higher rates. This ranking need not hold for larger models.
- It is trained for minutes. A method that starts slowly and ends higher is cut off.
- Data are FinLoRA's published test files, divided; its training files are not at hand. Most of the
  sentiment rows are tweets (tfns). Keys of the sentiment sets have errors of their own, which may
  cost methods differently.
- The rates are half a decade apart. A best rate at an end of the grid may lie beyond it.

## What would overturn it

- More seeds, whose interval leaves the margin, or enters it.
- More seeds or rows that choose a rate. One seed's validation score has an interval of ±5 points,
  so a method's best rate may be its neighbour.
- A rate between those of the grid that is better by more than the margin, for one method alone.
- The same experiment on a model of billions of parameters. The command is the same with another
  `model` in [bench/methods.yaml](../bench/methods.yaml), on a GPU.
"""


MACHINES = """\
Rounding differs between machines and versions, so a rate chosen on one need not be the best on
another. In brackets: trainings."""
FINLORAS_RATE = 1e-4  # of all its methods
ROUNDED = 1e-4  # shares in files of results have four decimals
WORKED = """\
FinLoRA's Financial Math asks for a bare number. The task
[`formula_worked`](data.md#calculations) asks for the calculation and its value instead."""
# What was trained and scored in results/worked.json: the answer, and what of it counts.
WORKED_SCORES = {
    ("bare", "accuracy"): ("a number", "the number"),
    ("worked", "accuracy"): ("a calculation and its value", "what the calculation comes to"),
    ("worked", "numeric_accuracy"): ("a calculation and its value", "the value written"),
}


def format_points(value: float, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f}"


def format_seeds(mean: float, seeds: Sequence[float]) -> str:
    return f"{format_points(mean)} ({', '.join(map(format_points, seeds))})"


def format_difference(comparison: dict[str, Any]) -> str:
    value, low, high = (format_points(comparison[key], True) for key in ("value", "low", "high"))
    return f"{value} ({low} … {high})"


def format_range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{format_points(high - low)} points ({format_points(low)} … {format_points(high)})"


def quote(text: str) -> str:
    return "> " + " ".join(text.split())


def list_names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def describe_majorities(cells: Sequence[Cell], datasets: Sequence[str]) -> list[str]:
    """A sentence on what the most frequent answer alone would score; none where it is no label."""
    first = next((cell for cell in cells if cell.is_done), None)
    scores: dict[str, Any] = first.content["scores"] if first else {}
    shares = [
        f"{format_points(scores[name]['majority'])} % of {name.replace('_', ' ')}"
        for name in datasets
        if "majority" in scores.get(name, {})
    ]
    if not first or not shares:
        return []
    if len(datasets) == 1 or len(shares) < len(datasets):
        return [f"The most frequent answer alone is right on {', '.join(shares)} rows."]
    overall = format_points(average_score(first, datasets, "majority"))
    return [
        f"The most frequent answer of each dataset alone is right on {overall} % of all rows: "
        f"{', '.join(shares)}."
    ]


def describe_largest(cell: Cell, datasets: Sequence[str]) -> list[str]:
    """A sentence on the dataset that has most of the rows; none where no dataset has."""
    rows = {name: cell.content["scores"][name]["rows"] for name in datasets}
    largest = max(rows, key=lambda name: rows[name])
    share = rows[largest] / sum(rows.values())
    if len(rows) == 1 or share <= 0.5:
        return []
    return [f"{100 * share:.0f} % of the rows are from {largest}, so verdicts are mostly about it."]


def describe_missing(what: str, missing: Sequence[str], total: int) -> list[str]:
    """A line on how much of a stage is done; with the names of what is missing."""
    if not missing:
        return [f"- {what}: all {total} trainings are done."]
    if len(missing) == total:
        return [f"- {what}: none of {total} trainings is done."]
    return [f"- {what}: {total - len(missing)} of {total} done. Missing: {list_names(missing)}."]


# ---- the ranking


def describe_progress(experiment: "Experiment") -> list[str]:
    task, spec = experiment.task, experiment.spec
    total = len(spec["methods"]) * len(spec["rates"])
    lines = describe_missing(f"{task}, rates", experiment.missing_rates, total)
    if experiment.missing_rates:
        return [*lines, f"- {task}, test rows: not read, since not all rates are chosen."]
    tests = len(experiment.list_test_cells())
    return lines + describe_missing(f"{task}, test rows", experiment.missing_tests, tests)


def describe_plan(experiment: "Experiment") -> str:
    """The difference that can be detected and the margin that can be shown, before any result."""
    plan, margin = experiment.plan, experiment.spec["margin"]
    design = equivalence.Design(seeds=len(experiment.spec["seeds"]), **plan["planned"])
    alike, anew = (equivalence.simulate_design(design, margin, anew) for anew in (False, True))
    found, shown = (
        f"{format_points(alike[key])} ({format_points(anew[key])})"
        for key in ("detectable", "showable")
    )
    power, row_sd = f"{100 * equivalence.POWER:.0f} %", format_points(design.row_sd)
    return (
        f"- {experiment.task}: {design.rows:,} test rows ({', '.join(plan['datasets'])}), "
        f"{design.seeds} seeds; standard deviations of {row_sd} points over rows and "
        f"{format_points(design.seed_sd)} over seeds. {power} find a true difference of {found} "
        f"points, and {power} show equal methods equivalent within {shown}. Within the margin, "
        f"{100 * alike['equivalent']:.0f} % ({100 * anew['equivalent']:.0f} %) do."
    )


def build_rates(experiment: "Experiment") -> list[str]:
    """The table of validation scores by rate; a method's best is bold once all rates are in."""
    spec, plan = experiment.spec, experiment.plan
    rows = []
    for method, entry in spec["methods"].items():
        best, cells = experiment.choose_rate(method), []
        for rate, cell in experiment.list_rate_cells(method).items():
            text = "missing"
            if cell.is_done:
                score = cell.content["scores"]["validation"]
                text = format_points(score["value"])
                if "low" in score:
                    text += f" ({format_points(score['low'])} … {format_points(score['high'])})"
            cells.append(f"**{text}**" if rate == best else text)
        rows.append([entry["title"], *cells])
    headings = [f"{report.title(plan['metric'])}, %", *(f"{rate:g}" for rate in spec["rates"])]
    text = (
        f"{plan['validation']} validation rows, seed {spec['rate_seed']}, "
        f"{spec['settings']['max_steps']} steps of {spec['settings']['micro_batch_size']} rows. "
        "95 % intervals over rows; a method's chosen rate is bold."
    )
    text = " ".join([text, *describe_majorities(experiment.list_all_rate_cells(), ["validation"])])
    if rates := [f"{rate:g}" for rate in spec["rates"] if is_constant_rate(experiment, rate)]:
        text += (
            f" At {', '.join(rates)} all methods are right on the same rows, as many as that: they "
            "probably give this answer to all rows."
        )
    return [f"### Rates, {experiment.task}", "", text, "", *build_table(headings, rows)]


def is_constant_rate(experiment: "Experiment", rate: float) -> bool:
    """Whether at a rate all methods are right on the same rows, as many as one answer is."""
    cells = [experiment.list_rate_cells(method)[rate] for method in experiment.spec["methods"]]
    return not list_missing(cells) and is_constant(cells, ["validation"], same_rows=True)


def format_method(
    experiment: "Experiment", method: str, setting: str, comparison: dict[str, Any] | None
) -> list[str]:
    """The row of a method in the table of test scores."""
    spec, plan = experiment.spec, experiment.plan
    title = spec["methods"][method]["title"]
    cells = experiment.list_setting_cells(method, setting)
    if list_missing(cells):
        return [title, "", "missing", "", ""]
    columns = collect_columns(cells, plan["datasets"])
    mean = stats.estimate_mean(plan["metric"], columns.T.tolist())
    score = format_seeds(mean["value"], columns.mean(0))
    rate = cells[0].recipe.config["learning_rate"]
    if method == spec["reference"]:
        return [title, f"{rate:g}", score, "–", "reference"]
    if comparison is None:
        return [title, f"{rate:g}", score, "", "not all are done"]
    verdict = equivalence.describe_verdict(comparison, spec["margin"])
    return [title, f"{rate:g}", score, format_difference(comparison), verdict]


def has_whole_method(experiment: "Experiment", setting: str) -> bool:
    """Whether all seeds of a method were scored on test rows."""
    groups = (experiment.list_setting_cells(name, setting) for name in experiment.spec["methods"])
    return any(not list_missing(group) for group in groups)


def build_tests(experiment: "Experiment", setting: str) -> list[str]:
    """The table of test scores at the common or the best rates."""
    spec, plan = experiment.spec, experiment.plan
    if experiment.missing_rates or not has_whole_method(experiment, setting):
        return []
    name = "one common rate" if setting == "common" else "each method's best rate"
    compared = experiment.compare_all(setting)
    rows = [
        format_method(experiment, method, setting, compared.get(method))
        for method in spec["methods"]
    ]
    reference = spec["methods"][spec["reference"]]["title"]
    headings = ["method", "rate", f"{report.title(plan['metric'])}, % (each seed)"]
    headings += [f"minus {reference}, points", "verdict"]
    lines = [f"### Test rows at {name}, {experiment.task}", "", *build_table(headings, rows)]
    tested = experiment.group_finished_cells()["test rows"]
    text = describe_largest(tested[0], plan["datasets"])
    text += describe_majorities(tested, plan["datasets"])
    lines += [" ".join(text), ""] if text else []
    for method, comparison in compared.items():
        if comparison:
            lines.append(describe_comparison(spec["methods"][method]["title"], comparison))
    return [*lines, "", *(build_datasets(experiment, setting) if setting == "best" else [])]


def build_datasets(experiment: "Experiment", setting: str) -> list[str]:
    """A table of differences by dataset; [] where there is one dataset or nothing to compare."""
    spec, datasets = experiment.spec, experiment.plan["datasets"]
    rows = []
    for method, comparison in experiment.compare_all(setting).items():
        if comparison is None or len(datasets) == 1:
            return []
        compared = [experiment.compare(method, setting, name) for name in datasets]
        cells = [format_difference(comparison) for comparison in compared if comparison]
        rows.append([spec["methods"][method]["title"], *cells])
    scores = experiment.list_setting_cells(spec["reference"], setting)[0].content["scores"]
    headings = [f"{name}, {scores[name]['rows']:,} rows" for name in datasets]
    text = "The same differences by dataset, in points, with 95 % intervals:"
    return [text, "", *build_table(["method", *headings], rows)]


def describe_comparison(title: str, comparison: dict[str, Any]) -> str:
    low, high = (format_points(comparison[key], True) for key in ("low90", "high90"))
    seeds = ", ".join(format_points(value, True) for value in comparison["seeds"])
    return (
        f"- {title}: seeds {seeds}; 90 % interval {low} … {high}; "
        f"p of no difference {comparison['p']:.2g}, of the margin {comparison['p_margin']:.2g} "
        f"(Holm), {comparison['freedom']:.1f} degrees of freedom"
        f"{'; standard error at its least' if comparison['is_least'] else ''}."
    )


def describe_spread(experiment: "Experiment") -> str:
    """How far apart the methods' validation scores lie at FinLoRA's rate, and at their best."""
    scores = [
        {
            rate: cell.content["scores"]["validation"]["value"]
            for rate, cell in experiment.list_rate_cells(method).items()
        }
        for method in experiment.spec["methods"]
    ]
    at_rate = [by_rate[FINLORAS_RATE] for by_rate in scores]
    at_finloras = format_range(at_rate)
    at_best = format_range([max(by_rate.values()) for by_rate in scores])
    return (
        f"- {experiment.task}, validation rows, one seed: the methods lie within {at_finloras} at "
        f"FinLoRA's rate of {FINLORAS_RATE:g}, and within {at_best} at each one's best."
        f"{describe_low(experiment, at_rate)}"
    )


def describe_low(experiment: "Experiment", scores: Sequence[float]) -> str:
    """How many of the scores at FinLoRA's rate lie below the most frequent answer's; "" if none."""
    first = experiment.list_all_rate_cells()[0].content["scores"]["validation"]
    below = sum(score < first["majority"] - ROUNDED for score in scores if "majority" in first)
    if not below:
        return ""
    return (
        f" At FinLoRA's rate {below} of {len(scores)} lie below the most frequent answer alone "
        f"({format_points(first['majority'])}), so that spread says little of what they learned."
    )


def judge_hypothesis(experiment: "Experiment") -> str:
    """Whether the hypothesis holds: that at their best rates all methods lie within the margin."""
    compared, margin = experiment.compare_all("best"), experiment.spec["margin"]
    found = [comparison for comparison in compared.values() if comparison]
    if len(found) < len(compared):
        verdict = "is not tested yet, trainings are missing"
    elif all(comparison["p_margin"] < stats.LEVEL for comparison in found):
        verdict = "is shown: at its best rate each method is equivalent to the reference"
    elif any(c["low"] > margin or c["high"] < -margin for c in found):
        verdict = "is refuted: a method's interval lies outside the margin"
    else:
        verdict = "is neither shown nor refuted: a method's interval extends past the margin"
    return f"- {experiment.task}: the hypothesis {verdict}."


def conclude_ranking(experiment: "Experiment") -> list[str]:
    """A sentence for each setting that is complete."""
    spec = experiment.spec
    reference = spec["methods"][spec["reference"]]["title"]
    if experiment.missing_rates:
        return [f"- {experiment.task}: none yet, rates are missing."]
    lines = [judge_hypothesis(experiment), describe_spread(experiment)]
    settings = {"common": "at one common rate", "best": "at each one's best rate"}
    for setting, name in settings.items():
        for method, comparison in experiment.compare_all(setting).items():
            if comparison is None:
                continue
            title = spec["methods"][method]["title"]
            verdict = equivalence.describe_verdict(comparison, spec["margin"])
            lines.append(
                f"- {experiment.task}, {title} against {reference} {name}: {verdict}; "
                f"{format_difference(comparison)} points, 95 % over rows and "
                f"{len(comparison['seeds'])} seeds."
            )
    edges = (min(spec["rates"]), max(spec["rates"]))
    for method, entry in spec["methods"].items():
        if (best := experiment.choose_rate(method)) in edges:
            lines.append(
                f"- {experiment.task}: the best rate of {entry['title']}, {best:g}, is an end of "
                "the grid; a better one may lie beyond."
            )
    return lines


# ---- tasks together, swapped labels


def describe_part(part: together.Part) -> list[str]:
    total = len(part.plan["variants"]) * len(part.spec["seeds"])
    return describe_missing(part.plan["title"], part.missing, total)


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
        if comparison is None:
            lines.append(f"- {name}: no conclusion, trainings are missing.")
        else:
            verdict = equivalence.describe_verdict(comparison, spec["margin"])
            points = f"{format_difference(comparison)} points over {len(spec['seeds'])} seeds"
            lines.append(f"- {name}: {verdict}; {points}, {state_p(comparison['p'])} (Holm).")
            verdict = equivalence.judge_direction(comparison, spec["margin"], pair["expected"])
            change = "drop" if pair["expected"] == "lower" else "rise"
            least = f"{100 * spec['margin']:g} points"
            lines.append(f"  The predicted {change} of more than {least} is {verdict}.")
    if not part.missing:
        lines.append(f"- {plan['note']}")
    return [*lines, ""]


def build_variant(part: together.Part, variant: str, test: str) -> list[str]:
    """The row of a variant in the table of a part."""
    cells, datasets = part.list_cells(variant), part.find_test(test).datasets
    if list_missing(cells):
        return [variant, test, "", "", "missing"]
    refuse_other_rows(cells)
    means = collect_columns(cells, datasets).mean(0)
    sides = (average_score(cells[0], datasets, side) for side in ("majority", "base"))
    return [variant, test, *map(format_points, sides), format_seeds(means.mean(), means)]


def describe_constant(part: together.Part, variant: str, test: str) -> list[str]:
    """A line where a variant scores what the most frequent answer alone scores."""
    cells, datasets = part.list_cells(variant), part.find_test(test).datasets
    if list_missing(cells) or not is_constant(cells, datasets):
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
        if not list_missing(cells):
            majority = average_score(cells[0], datasets, "majority")
            if collect_columns(cells, datasets).mean() < majority - ROUNDED:
                below.append(f"{variant} on {test}")
    return [f"- Below the most frequent answer alone: {', '.join(below)}."] if below else []


def is_constant(cells: Sequence[Cell], datasets: Sequence[str], same_rows: bool = False) -> bool:
    """Whether each cell scores what one answer scores; with `same_rows`, all on the same rows."""
    if any("majority" not in cells[0].content["scores"][name] for name in datasets):
        return False
    columns = collect_columns(cells, datasets)
    majority = average_score(cells[0], datasets, "majority")
    if same_rows and (columns != columns[:, :1]).any():
        return False
    return bool(max(abs(columns.mean(0) - majority)) < ROUNDED)


def average_score(cell: Cell, datasets: Sequence[str], side: str) -> float:
    """The score of the base, or of the most frequent answer, over the rows of several datasets."""
    scores = [cell.content["scores"][name] for name in datasets]
    total = sum(score["rows"] for score in scores)
    return float(sum(score[side] * score["rows"] for score in scores) / total)


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
        f"test rows, on {content['machine']}."
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
        f"- Calculations minus bare numbers: {describe_gain(difference)}, 95 % over rows and "
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
        "Loss per token of base and adapter on the same texts, at the adapter's precision: general "
        "prose, and the keys of each task's test rows behind their prompts. More is forgetting. "
        "The adapter's own task stands last. 95 % intervals over texts, of one run each."
    )
    lines = ["## What an adapter costs elsewhere", "", text, ""]
    if not forgetting.RESULTS.is_file():
        return [*lines, "Not measured yet: `python -m bench.forgetting`.", ""]
    rows = []
    entries = read_json(forgetting.RESULTS)["runs"]
    current = {name: entry for name, entry in entries.items() if forgetting.is_current(entry)}
    if len(current) < len(entries):
        old = list_names([name for name in entries if name not in current])
        text = f"Left out, since recipe or texts changed: {old}. Run `python -m bench.forgetting`."
        lines += [text, ""]
    if not current:
        return lines
    for name, entry in current.items():
        own = entry["own_datasets"]
        for dataset in sorted(entry["losses"], key=lambda dataset: dataset in own):
            measured = entry["losses"][dataset]
            difference = measured["difference"]
            gain = f"{difference['value']:+.3f}"
            if difference["low"] is not None:
                gain += f" ({difference['low']:+.3f} … {difference['high']:+.3f})"
            where = f"{dataset}, its own task" if dataset in own else dataset
            values = (f"{measured[side]:.3f}" for side in ("base", "adapter"))
            rows.append([name, where, str(measured["texts"]), *values, gain])
    headings = ["run", "texts of", "texts", "base", "adapter", "adapter minus base, nats a token"]
    return [*lines, *build_table(headings, rows), *conclude_forgetting(list(current.values()))]


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
        "them worse than the base, by the interval."
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
        "- Other seeds or longer trainings would overturn it. Loss is not the score: an adapter "
        "that answers in another form has a higher loss without knowing less."
    )
    return [*lines, ""]


# ---- page and figure


def build_page(experiments: list["Experiment"]) -> str:
    """The whole page; raises WrongInput where results do not belong together."""
    spec, parts = experiments[0].spec, together.open_parts()
    for experiment in experiments:
        refuse_other_rows(experiment.list_finished_cells())
    margin = f"Margin: {format_points(spec['margin'])} points. Written before the first training:"
    lines = [HEAD, "## What is done", ""]
    lines += [line for experiment in experiments for line in describe_progress(experiment)]
    lines += [line for part in parts for line in describe_part(part)]
    lines += ["", "## Hypothesis", "", margin, "", quote(spec["hypothesis"]), ""]
    lines += [PLANNED, *map(describe_plan, experiments), "", VERDICTS]
    lines += ["## Conclusions", ""]
    lines += [line for experiment in experiments for line in conclude_ranking(experiment)]
    lines += ["", "## Results", ""]
    if any(experiment.list_finished_cells() for experiment in experiments):
        lines += ["![Validation score by learning rate, a line for each method](methods.svg)", ""]
    for experiment in experiments:
        lines += build_rates(experiment)
        for setting in ("common", "best"):
            lines += build_tests(experiment, setting)
    lines += [line for part in parts for line in build_part(part)]
    lines += [*build_worked(), *build_forgetting(), LIMITS]
    stages = {
        f"{experiment.task}, {stage}": cells
        for experiment in experiments
        for stage, cells in experiment.group_finished_cells().items()
    }
    stages |= {part.plan["title"]: part.list_finished_cells() for part in parts}
    lines += ["## Machines", "", MACHINES, ""]
    lines += describe_machines(stages)
    return "\n".join(lines).rstrip() + "\n"


def describe_machines(stages: dict[str, list[Cell]]) -> list[str]:
    """A line for each machine with its versions: how many trainings of which stage ran there."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for stage, cells in stages.items():
        for cell in cells:
            packages = cell.content["packages"].items()
            versions = ", ".join(f"{name} {version}" for name, version in packages)
            counts[f"{cell.content['machine']} ({versions})"][stage] += 1
    return [
        f"- {machine}: {'; '.join(f'{stage} ({n})' for stage, n in trained.items())}."
        for machine, trained in counts.items()
    ]


def mark_drawing(experiments: list["Experiment"]) -> str:
    """A digest of what the figure shows, which it holds; "" where there is nothing to show."""
    drawn = {
        experiment.task: {
            cell.name: {key: value for key, value in score.items() if key != "values"}
            for cell in experiment.group_finished_cells()["rates"]
            for score in (cell.content["scores"]["validation"],)
        }
        for experiment in experiments
        if experiment.list_finished_cells()
    }
    text = json.dumps([drawn, experiments[0].spec["methods"]], sort_keys=True)
    return f"sha256 of the scores: {hashlib.sha256(text.encode()).hexdigest()}" if drawn else ""


def draw_rates(experiments: list["Experiment"], file: Path) -> None:
    """Validation score against rate: a panel for each task, a line for each method."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown_tasks = [experiment for experiment in experiments if experiment.list_finished_cells()]
    if not shown_tasks:
        return
    settings: dict[Any, Any] = {"svg.hashsalt": "methods", "svg.fonttype": "none"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.4 * len(shown_tasks), 4.2), layout="constrained")
        panels = figure.subplots(1, len(shown_tasks), squeeze=False)[0]
        for axes, experiment in zip(panels, shown_tasks, strict=True):
            draw_task(axes, experiment)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        with atomic(file) as out:
            description = {"Description": mark_drawing(experiments)}
            metadata = {"Date": None, "Creator": None} | description
            figure.savefig(out, format="svg", metadata=metadata)


def draw_task(axes: Any, experiment: "Experiment") -> None:
    for place, (method, entry) in enumerate(experiment.spec["methods"].items()):
        cells = experiment.list_rate_cells(method).items()
        done = [
            (rate, cell.content["scores"]["validation"]) for rate, cell in cells if cell.is_done
        ]
        shift = 1.04 ** (place - 1.5)  # so that intervals do not cover each other
        rates = [rate * shift for rate, _ in done]
        values = [100 * score["value"] for _, score in done]
        reach = [
            [100 * abs(score.get(end, score["value"]) - score["value"]) for _, score in done]
            for end in ("low", "high")
        ]
        style = {"color": COLOURS[place], "marker": MARKERS[place], "ms": 5, "capsize": 3}
        axes.errorbar(rates, values, yerr=reach, label=entry["title"], **style)
    if majorities := [score["majority"] for _, score in done if "majority" in score]:
        axes.axhline(100 * majorities[0], color="#8a8f98", ls=":", label="most frequent answer")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation {report.title(experiment.plan['metric'])}, %")
    axes.set_title(experiment.task)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
