"""Pages of the results: docs/results.md, the README's table and the figure docs/results.svg.

`make results` writes them from results/, and `make check` fails where they do not match it. Only
evidence is shown with its figures. A stale result is named with the reason, and one of the examples
in data/sample is not shown at all.
"""

from statistics import fmean

from evals import figures, report, results, results_figure
from evals.results import DatasetResult, MetricResult, Result, Score
from tools import recipes
from tools.common import ROOT, format_markdown, insert_block, update_page

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "results.svg"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
MOST_ROWS = 10  # of the table in the README, which has 120 lines at most
# The methods whose recipes the README prefers: QLoRA, and what tuning found.
PREFERRED = ("_r4", "_tuned")

NOTHING = (
    "Nothing is measured yet with today's recipes and data; `make verify "
    "RECIPE=smollm2-135m/sentiment_r4` measures one.\n"
)
HEAD = """\
# Results

What each recipe scored, what it took, and on which device. `make verify RECIPE=…` trains a recipe
with three seeds, scores it and its base on the same rows, and writes one file to
[results/](../results/); `make results` writes this page from those files.
[Contributing](../CONTRIBUTING.md#a-result) says how to add yours.

- Scores are in %, with 95 % intervals. An adapter's score is the mean over its seeds. Its interval
  covers rows and seeds, so two seeds that lie apart leave nearly everything open. Rows that ask
  about one text count as one ([why](evaluation.md#intervals-and-tests)). The gain over the base is
  on the same rows.
- *Majority*: the accuracy of the most frequent answer alone. *Base, examples*: the untrained base
  with worked examples of the training rows in its prompts.
- *FinLoRA's* metrics are by FinLoRA's scoring, the others by this project's
  ([evaluation](evaluation.md)); a line says *also FinLoRA's* where all scores of both are the same.
  *Published* is FinLoRA's score of the same method on Llama 3.1 8B, shown where rows and labels are
  the same.
- Time is that of one training, also where the machine did other work meanwhile:
  [performance](performance.md) compares speeds. Memory is the peak of one process.
"""


# ---- scores as text


def format_score(score: Score | None, signed: bool = False) -> str:
    """`28.5 (23.8 … 33.8)`: percent, with the interval if there is one."""
    if score is None:
        return "–"
    missing = "" if score.low is not None else "no interval"
    value, interval = report.format_percent(score.model_dump() | {"no_interval": missing}, signed)
    return f"{value} ({interval})" if interval else value


def format_majority(entry: DatasetResult) -> str:
    """What the most frequent answer alone would score, in percent."""
    return "–" if entry.majority is None else f"{100 * entry.majority:.1f}"


# ---- README


def select_featured(evidence: list[Result]) -> list[Result]:
    """One result for each recipe; only those with enough seeds, if any has them."""
    chosen = results.choose_evidence(evidence)
    enough = results.ENOUGH_SEEDS
    return [result for result in chosen if len(result.trainings) >= enough] or chosen


def choose_for_readme(featured: list[Result]) -> list[Result]:
    """Those that fit into the table with all their datasets, the preferred methods before others.

    They stay in their order.
    """
    chosen = list[Result]()
    for result in sorted(featured, key=lambda result: not result.recipe.endswith(PREFERRED)):
        if count_scores([*chosen, result]) <= MOST_ROWS:
            chosen.append(result)
    return [result for result in featured if result in chosen] or featured[:1]


def build_readme_table(featured: list[Result]) -> str:
    """A line for each recipe and dataset."""
    heads = ["recipe", "test rows", "metric", "majority, %", "base, %", "with examples, %"]
    rows = []
    for result in featured:
        for dataset, entry in result.datasets.items():
            metric, scores = entry.main
            cells = [link_result(result, "docs/"), f"{dataset}, {entry.rows:,}"]
            rows.append(
                [*cells, report.title(metric), format_majority(entry), *format_sides(scores)]
            )
    return format_markdown([*heads, "adapter, %", "gain, points"], rows[:MOST_ROWS], 3)


def count_scores(listed: list[Result]) -> int:
    return sum(len(result.datasets) for result in listed)


def link_result(result: Result, folder: str = "") -> str:
    return f"[`{result.recipe}`]({folder}results.md#{name_anchor(result)})"


def name_anchor(result: Result) -> str:
    """The anchor that GitHub gives the heading of a result."""
    kept = [c for c in name_heading(result).lower() if c.isalnum() or c in "-_ "]
    return "".join(kept).replace(" ", "-")


def name_heading(result: Result) -> str:
    return f"{result.recipe} on {result.device}"


def format_sides(scores: MetricResult) -> list[str]:
    """The base, the base with examples, the adapter, and its gain over the base."""
    sides = (scores.base, scores.base_with_examples, scores.adapter)
    return [*map(format_score, sides), format_score(scores.gain, signed=True)]


def build_readme_block(evidence: list[Result]) -> str:
    if not evidence:
        return NOTHING
    featured = choose_for_readme(select_featured(evidence))
    left = count_scores(evidence) - min(count_scores(featured), MOST_ROWS)
    rest = f"[Results](docs/results.md) has {left} more. " if left else ""
    devices = "; ".join(dict.fromkeys(result.device for result in featured))
    counts = sorted({len(result.trainings) for result in featured})
    means = "Scores of adapters are of one training.\n"
    if counts != [1]:
        words = " or ".join(map(str, counts))
        means = (
            f"Scores of adapters are means over {words} seeds, and their intervals are over rows "
            "and seeds.\n"
        )
    return (
        f"![Score of base and adapter]({FIGURE.relative_to(ROOT)})\n\n"
        f"{build_readme_table(featured)}\n"
        f"{rest}Devices: {devices}. Majority: the most frequent answer alone. In brackets: 95 % "
        f"intervals. {means}"
    )


# ---- docs/results.md


def build_results_page(measured: list[Result]) -> str:
    """The page of all results that are not of the examples."""
    reasons = [(result, results.explain_stale(result)) for result in measured]
    current = [result for result, reason in reasons if not reason]
    stale = [describe_stale(result, reason) for result, reason in reasons if reason]
    parts = [HEAD, NOTHING]
    if current:
        figure = f"![Score of base and adapter]({FIGURE.name})\n"
        parts = [HEAD, figure, build_comparison(current), *map(build_section, current)]
    if stale:
        lines = "".join(f"- {text}.\n" for text in stale)
        parts.append(f"## Stale\n\nMeasured once, and no evidence any more:\n\n{lines}")
    return "\n".join(parts)


def describe_stale(result: Result, reason: str) -> str:
    text = f"`{result.recipe}` on {result.device}, {result.finished}: {reason}"
    if result.recipe not in recipes.list_aliases():  # it is gone
        return text
    return f"{text}; `make verify RECIPE={result.recipe}` measures it again"


def build_comparison(current: list[Result]) -> str:
    """A table for each dataset, with a line for each recipe."""
    tables = [
        "## By dataset\n\n"
        "One result stands for each recipe: that of the most seeds and datasets. Bases differ with "
        "the precision that a recipe loads them at. Each link leads to the details.\n\n"
        "*Minus r4*: the mean difference from the task's recipe `r4` with the same seeds on the "
        "same device, and its 95 % t interval over the seeds alone. It says whether other "
        "trainings would differ on these test rows, not whether other rows would.\n"
    ]
    for title, scored in results_figure.group_by_rows(results.choose_evidence(current)).items():
        majorities = {format_majority(entry) for _, entry in scored}
        known = f"; majority {', '.join(sorted(majorities))}" if majorities != {"–"} else ""
        heads = ["recipe", "device", "trained on, rows", "seeds"]
        heads += ["base", "base, examples", "adapter", "gain, points"]
        against = [results.compare_with_r4(result, entry, scored) for result, entry in scored]
        heads += ["minus r4, by seed"] if any(against) else []
        rows = []
        for (result, entry), difference in zip(scored, against, strict=True):
            trained = sum(data.rows for data in result.training_data)
            cells = [link_result(result), result.device, f"{trained:,}", str(len(result.trainings))]
            cells += format_sides(entry.main[1])
            rows.append(cells + ([format_score(difference, signed=True)] if any(against) else []))
        tables.append(f"### {title}{known}\n\n{format_markdown(heads, rows, 2)}")
    return "\n".join(tables)


def build_section(result: Result) -> str:
    """The heading, facts, table and notes of one result."""
    facts = "".join(f"- {fact}.\n" for fact in list_facts(result))
    notes = "".join(f"- {note}.\n" for note in list_notes(result))
    table = build_score_table(result)
    return f"## {name_heading(result)}\n\n{facts}\n{table}" + (f"\n{notes}" if notes else "")


def list_facts(result: Result) -> list[str]:
    """What was trained, on which rows, at what cost, with which versions."""
    rows = sum(data.rows for data in result.training_data)
    files = ", ".join(dict.fromkeys(data.source for data in result.training_data))
    validated = sum(data.rows for data in result.validation_data)
    speeds = [run.tokens_per_second for run in result.trainings.values() if run.tokens_per_second]
    cost = [f"{result.seconds / 60:.1f} minutes", f"{result.peak_memory_bytes / 1e9:.1f} GB"]
    cost += [f"{fmean(speeds):,.0f} tokens per second"] if speeds else []
    names = ("torch", "transformers", "peft", "bitsandbytes", "axolotl")
    versions = [f"{name} {result.packages[name]}" for name in names if name in result.packages]
    changed = " with changes" if result.is_changed else ""
    commit = f", commit {result.commit[:12]}{changed}" if result.commit else ""
    return [
        f"Version {result.version} ({result.digest[:12]}), {result.model} at {result.precision}",
        f"Trained on {rows:,} rows of {files}"
        + (f", validated on {validated:,}" if validated else "")
        + f"; seeds: {', '.join(map(str, result.trainings))}",
        f"One training: {', '.join(cost)}",
        f"{result.finished}, {', '.join(versions)}{commit}",
    ]


def build_score_table(result: Result) -> str:
    """A line for each dataset, metric and scoring."""
    shots = f"base, {result.shots} examples" if result.shots else ""
    published = {name: results.find_published(result, name) for name in result.datasets}
    sides = ["base", *([shots] if shots else []), "adapter", "each seed", "gain, points"]
    sides += ["published"] if any(published.values()) else []
    heads = ["test rows", "metric", "majority", *sides]
    rows = []
    for dataset, entry in result.datasets.items():
        for metric, scores, title in list_scorings(entry):
            base, with_examples, adapter, gain = format_sides(scores)
            seeds = ", ".join(f"{100 * score.value:.1f}" for score in scores.seeds.values())
            is_ours = not title.endswith(", FinLoRA's")
            majority = format_majority(entry) if is_ours else "–"
            cells = [f"{dataset}, {entry.rows:,}", title, majority, base]
            cells += [with_examples] if shots else []
            cells += [adapter, seeds, gain]
            if any(published.values()):
                score = published[dataset].get(metric)
                cells.append("–" if score is None else f"{100 * score:.1f}")
            rows.append(cells)
    return format_markdown(heads, rows, 2)


def list_scorings(entry: DatasetResult) -> list[tuple[str, MetricResult, str]]:
    """Metric, scores and title of each line; one line for both scorings where all scores agree."""
    titles = {metric: report.title(metric) for metric in entry.metrics}
    for metric in entry.metrics:
        ours = metric.removeprefix("finlora_")
        if ours != metric and entry.metrics.get(ours) == entry.metrics[metric]:
            del titles[ours]
            titles[metric] = f"{report.title(ours)}, also FinLoRA's"
    return [(metric, entry.metrics[metric], title) for metric, title in titles.items()]


def list_notes(result: Result) -> list[str]:
    """Why a dataset has no published score beside it, and prompts that lack examples."""
    method = results.find_published_method(result.recipe)
    datasets = [name for name in result.datasets if name in report.read_published().get(method, {})]
    reasons = {name: results.explain_no_comparison(result, name) for name in datasets}
    notes = [
        f"{name} is compared with no published score: {why}" for name, why in reasons.items() if why
    ]
    return notes + [
        f"{name}: {entry.fewer_examples} prompts of the base had room for fewer than "
        f"{result.shots} examples"
        for name, entry in result.datasets.items()
        if entry.fewer_examples
    ]


# ---- all of them


def write(check: bool = False) -> None:
    """Writes the pages and the figure; with `check`, raises JobFailed where they differ."""
    measured = [result for result in results.load_results() if not result.is_of_examples]
    evidence = [result for result in measured if not results.explain_stale(result)]
    readme = insert_block(README, BEGIN, build_readme_block(evidence), END)
    update_page(README, readme, "make results", check)
    update_page(PAGE, build_results_page(measured), "make results", check)
    featured = select_featured(evidence)
    drawn = results_figure.describe_drawn(featured) if featured else ""
    figures.update_figure(FIGURE, drawn, lambda: results_figure.draw(featured, FIGURE), check)
