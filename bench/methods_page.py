"""docs/methods.md, from results/{_methods,_together}/ and results/*.json.

Every number comes from these files or from the plans in bench/*.yaml. Where trainings are missing,
the page names them and draws no conclusion from the others.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench import equivalence, together
from bench.cells import Cell, collect_columns, refuse_other_rows
from bench.jobs import state_p
from bench.performance import build_table
from bench.sections import build_forgetting, build_part, build_worked
from bench.texts import (
    ROUNDED,
    describe_largest,
    describe_majorities,
    format_difference,
    format_points,
    format_range,
    format_seeds,
    is_constant,
    quote,
)
from evals import report, stats

if TYPE_CHECKING:
    from bench.methods import Experiment

HEAD = """\
# FinLoRA's ranking re-examined

FinLoRA ranks LoRA, QLoRA, DoRA and rsLoRA at one learning rate. Here each method first gets its own
rate, chosen on validation rows, and is then trained with three seeds and scored on test rows.
The [hypothesis](#hypothesis): at their best rates all lie within a margin of two points of LoRA.
What would overturn the results stands [at the end](#what-would-overturn-it).
"""

OTHERS = """\
Other experiments conclude in their sections: [two tasks at once](#two-tasks-at-once), [swapped
labels](#swapped-labels), [calculations](#calculations-against-bare-numbers), [what an adapter costs
elsewhere](#what-an-adapter-costs-elsewhere).
"""

COMMANDS = """\
    make fetch data TASKS=sentiment,xbrl_term,ner,tfns,tfns_as_published,formula,formula_worked
    .venv/bin/python -m bench.methods            # hours on two cores; goes on where it stopped
    .venv/bin/python -m bench.together
    .venv/bin/python -m bench.worked             # answers that are calculations
    .venv/bin/python -m bench.forgetting         # what the finished runs of SmolLM2 forgot
    make results                                 # writes this page from results/

Where FinLoRA's own training files of sentiment and NER lie in `FINLORA_DATA` or `data/raw`, the
same commands train on them and give other numbers. Those here are of a part of its [test
files](data.md).

Each training leaves a small file of results. They are committed, so another machine with the same
data goes on from them. Within this experiment, test rows are read once all rates of their task are
chosen, and not before. Earlier [experiments](experiments.md) scored all of FPB's and some others.
"""

PLANNED = f"""\
What {equivalence.SIMULATED:,} simulated experiments find with the planned standard deviations of
paired differences. A row's difference is the same for all seeds; for the figures in brackets it is
drawn anew for each. Holm's correction is left out, and makes these findings rarer. The standard
deviations were written down before the first training.
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
- Sentiment, NER and TFNS train on a part of FinLoRA's test files, because its training files for
  them were not at hand; XBRL terms and Financial Math train on FinLoRA's training files. Most of
  the sentiment rows are tweets (tfns). Keys of the sentiment sets have errors of their own, which
  may cost methods differently.
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
MISSING = "nothing is concluded while trainings are missing; `--status` names them."


# ---- the ranking


def describe_plan(experiment: "Experiment") -> str:
    """The difference that can be detected and the margin that can be shown, before any result."""
    plan, margin = experiment.plan, experiment.spec["margin"]
    design = equivalence.Design(seeds=len(experiment.spec["seeds"]), **plan["planned"])
    alike, anew = (equivalence.simulate_design(design, margin, new) for new in (False, True))
    found, shown = (
        f"{format_points(alike[key])} ({format_points(anew[key])})"
        for key in ("detectable", "showable")
    )
    power, row_sd = f"{100 * equivalence.POWER:.0f} %", format_points(design.row_sd)
    return (
        f"- {experiment.task}: {design.rows:,} test rows ({', '.join(plan['datasets'])}), "
        f"{design.seeds} seeds; standard deviations of {row_sd} points over rows and "
        f"{format_points(design.seed_sd)} over seeds. {power} of such experiments find a true "
        f"difference of {found} points, and {power} show equal methods equivalent within {shown}. "
        f"Only {100 * alike['equivalent']:.0f} % ({100 * anew['equivalent']:.0f} %) show that "
        "within the margin."
    )


def build_rates(experiment: "Experiment") -> list[str]:
    """The table of validation scores by rate; a method's best is bold."""
    spec, plan = experiment.spec, experiment.plan
    rows = []
    for method, entry in spec["methods"].items():
        best, cells = experiment.choose_rate(method), []
        for rate, cell in experiment.list_rate_cells(method).items():
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
    return is_constant(cells, ["validation"], same_rows=True)


def format_method(
    experiment: "Experiment", method: str, setting: str, comparison: dict[str, Any] | None
) -> list[str]:
    """The row of a method in the table of test scores."""
    spec, plan = experiment.spec, experiment.plan
    title = spec["methods"][method]["title"]
    cells = experiment.list_setting_cells(method, setting)
    columns = collect_columns(cells, plan["datasets"])
    mean = stats.estimate_mean(plan["metric"], columns.T.tolist())
    score = format_seeds(mean["value"], columns.mean(0))
    rate = cells[0].recipe.config["learning_rate"]
    if comparison is None:
        return [title, f"{rate:g}", score, "–", "reference"]
    verdict = equivalence.describe_verdict(comparison, spec["margin"])
    return [title, f"{rate:g}", score, format_difference(comparison), verdict]


def build_tests(experiment: "Experiment", setting: str) -> list[str]:
    """The table of test scores at the common or the best rates."""
    spec, plan = experiment.spec, experiment.plan
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
    if setting == "best":  # it holds for both
        text = describe_largest(tested[0], plan["datasets"])
        text += describe_majorities(tested, plan["datasets"])
        lines += [" ".join(text), ""] if text else []
    for method, comparison in compared.items():
        lines.append(describe_comparison(spec["methods"][method]["title"], comparison))
    has_parts = setting == "best" and len(plan["datasets"]) > 1
    return [*lines, "", *(build_datasets(experiment, setting) if has_parts else [])]


def build_datasets(experiment: "Experiment", setting: str) -> list[str]:
    """A table of differences by dataset."""
    spec, datasets = experiment.spec, experiment.plan["datasets"]
    rows = []
    for method in experiment.compare_all(setting):
        compared = [experiment.compare(method, setting, name) for name in datasets]
        rows.append([spec["methods"][method]["title"], *map(format_difference, compared)])
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
    if all(c["p_margin"] < stats.LEVEL for c in compared.values()):
        verdict = "is shown: at its best rate each method is equivalent to the reference"
    elif any(c["low"] > margin or c["high"] < -margin for c in compared.values()):
        verdict = "is refuted: a method's interval lies outside the margin"
    else:
        verdict = "is neither shown nor refuted: a method's interval extends past the margin"
    titles = {name: entry["title"] for name, entry in experiment.spec["methods"].items()}
    weakest, comparison = max(compared.items(), key=lambda pair: pair[1]["p_margin"])
    is_shown = comparison["p_margin"] < stats.LEVEL
    level, low, high = (90, "low90", "high90") if is_shown else (95, "low", "high")
    ends = f"{100 * comparison[low]:+.1f} … {100 * comparison[high]:+.1f}"
    differ = [titles[name] for name, c in compared.items() if c["p"] < stats.LEVEL]
    other = f" A difference is shown for {' and '.join(differ)}." if differ else ""
    return (
        f"- {experiment.task}: the hypothesis {verdict}. "
        f"Over {len(experiment.spec['seeds'])} seeds the weakest test of the margin is that of "
        f"{titles[weakest]}: {level} % interval {ends} points, "
        f"{state_p(comparison['p_margin'])} (Holm); more seeds could "
        f"{'overturn' if is_shown else 'decide'} it.{other}"
    )


def conclude_ranking(experiment: "Experiment") -> list[str]:
    """The hypothesis, the spread over rates, and rates that may not be the best."""
    spec = experiment.spec
    lines = [judge_hypothesis(experiment), describe_spread(experiment)]
    edges = (min(spec["rates"]), max(spec["rates"]))
    for method, entry in spec["methods"].items():
        if (best := experiment.choose_rate(method)) in edges:
            lines.append(
                f"- {experiment.task}: the best rate of {entry['title']}, {best:g}, is an end of "
                "the grid; a better one may lie beyond."
            )
    return lines


def build_verdicts(experiments: list["Experiment"]) -> list[str]:
    """A table of all methods against the reference; [] without a whole experiment."""
    if not experiments:
        return []
    spec = experiments[0].spec
    methods, reference = dict(spec["methods"]), spec["reference"]
    base = methods.pop(reference)["title"]
    within = f" within ±{100 * spec['margin']:g} points"
    rows = []
    for experiment in experiments:
        for setting, rate in (("common", f"{spec['common_rate']:g} for all"), ("best", "its best")):
            cells = [
                f"{format_difference(comparison)}, "
                f"{equivalence.describe_verdict(comparison, spec['margin']).replace(within, '')}"
                for comparison in experiment.compare_all(setting).values()
            ]
            rows.append([experiment.task, rate, *cells])
    text = (
        f"Test rows, in points against {base}, with 95 % intervals over rows and "
        f"{len(spec['seeds'])} seeds. Equivalent:{within}. The common rate is the middle of the "
        "grid, set before the first training."
    )
    titles = [entry["title"] for entry in methods.values()]
    return [text, "", *build_table(["task", "learning rate", *titles], rows)]


# ---- the page


def build_page(experiments: list["Experiment"]) -> str:
    """The whole page; raises WrongInput where results do not belong together."""
    spec, parts = experiments[0].spec, together.open_parts()
    whole = [experiment for experiment in experiments if not experiment.missing]
    whole_parts = [part for part in parts if not part.missing]
    for experiment in whole:
        refuse_other_rows(experiment.list_finished_cells())
    margin = f"Margin: {format_points(spec['margin'])} points. Written before the first training:"
    lines = [HEAD, "## Conclusions", ""]
    lines += [f"- {e.task}: {MISSING}" for e in experiments if e.missing]
    lines += [f"- {p.plan['title']}: {MISSING}" for p in parts if p.missing]
    lines += [line for experiment in whole for line in conclude_ranking(experiment)]
    lines += ["", *build_verdicts(whole), OTHERS]
    if whole:
        lines += ["![Validation score by learning rate, a line for each method](methods.svg)", ""]
    lines += ["## Hypothesis", "", margin, "", quote(spec["hypothesis"]), ""]
    lines += [PLANNED, *map(describe_plan, experiments), "", VERDICTS]
    lines += ["## Results", ""]
    for experiment in whole:
        lines += build_rates(experiment)
        for setting in ("common", "best"):
            lines += build_tests(experiment, setting)
    lines += [line for part in whole_parts for line in build_part(part)]
    lines += [*build_worked(), *build_forgetting(), LIMITS]
    stages = {
        f"{experiment.task}, {stage}": cells
        for experiment in experiments
        for stage, cells in experiment.group_finished_cells().items()
    }
    stages |= {part.plan["title"]: part.list_finished_cells() for part in parts}
    lines += ["## Run it", "", COMMANDS, MACHINES, "", *describe_machines(stages)]
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
