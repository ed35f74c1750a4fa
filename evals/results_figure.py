"""docs/results.svg: the scores of base and adapter, a line for each recipe and dataset."""

from pathlib import Path
from typing import Any

from evals import figures, report
from evals.results import DatasetResult, Result, Score

SIDES = {  # color and marker
    "base": ("#8a8f98", "o"),
    "base_with_examples": ("#c98a1b", "s"),
    "adapter": ("#1f6f8b", "D"),
}
GAP = 1.3  # lines above the first recipe of a dataset, which its title takes


def describe_drawn(featured: list[Result]) -> str:
    """What the figure is drawn from: the results, and the code that draws them."""
    return "".join([*(result.model_dump_json() for result in featured), Path(__file__).read_text()])


def group_by_rows(featured: list[Result]) -> dict[str, list[tuple[Result, DatasetResult]]]:
    """The scores that can be compared, under a title: by one metric on the same test rows."""
    groups: dict[tuple[str, str], list[tuple[Result, DatasetResult]]] = {}
    for result in featured:
        for dataset, entry in result.datasets.items():
            title = f"{dataset}, {report.title(entry.main[0])}, {entry.rows:,} test rows"
            groups.setdefault((title, entry.data.sha256), []).append((result, entry))
    titled = dict[str, list[tuple[Result, DatasetResult]]]()
    for (title, sha), scored in groups.items():
        titled[f"{title} of file {sha[:8]}" if title in titled else title] = scored
    return titled


def draw(featured: list[Result], file: Path) -> None:
    """For each dataset a line per recipe, from the base's score to the adapter's."""
    from matplotlib.figure import Figure

    groups = group_by_rows(featured)
    models = {result.recipe.split("/")[0] for result in featured}
    labels, places, place, shown_sides = [], [], -1.0, dict[str, Any]()
    height = 0.22 * (sum(len(result.datasets) for result in featured) + GAP * len(groups)) + 0.9
    with figures.use_defaults({"font.size": 9}):
        figure = Figure(figsize=(9, height), layout="constrained")
        axis = figure.add_subplot()
        for title, scored in groups.items():
            place += GAP
            axis.text(0.5, place - 0.75, title, fontweight="bold", va="center")
            for result, entry in scored:
                shown_sides |= draw_line(axis, entry, place)
                name = result.recipe
                labels.append(name.partition("/")[2] if len(models) == 1 else name)
                places.append(place)
                place += 1
        axis.set_yticks(places, labels)
        axis.set_ylim(place - 0.4, -0.9)  # the first on top
        axis.set_xlim(0, 100)
        model = f" of {models.pop()}" if len(models) == 1 else ""
        axis.set_xlabel(f"score{model} in %, with 95 % intervals")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        handles, names = list(shown_sides.values()), list(shown_sides)
        figure.legend(handles, names, loc="outside upper right", ncols=4, frameon=False)
        figures.save_svg(figure, file, describe_drawn(featured))


def draw_line(axis: Any, entry: DatasetResult, place: float) -> dict[str, Any]:
    """Draws a recipe's scores on a dataset at the height `place`; returns the marks by name."""
    scores, marks = entry.main[1], dict[str, Any]()
    ends = (100 * scores.base.value, 100 * scores.adapter.value)
    axis.plot(ends, (place, place), color="#c9ccd1", linewidth=2.5, zorder=1)
    for side, (color, marker) in SIDES.items():
        score: Score | None = getattr(scores, side)
        if score is None:
            continue
        if score.low is not None and score.high is not None:
            axis.hlines(place, 100 * score.low, 100 * score.high, color=color, alpha=0.6)
        dot = axis.scatter(100 * score.value, place, color=color, marker=marker, s=18, zorder=2)
        marks[side.replace("_", " ")] = dot
    if entry.majority is not None:
        style: dict[str, Any] = {"color": "#c0504d", "linewidth": 1.5, "zorder": 3}
        line = axis.vlines(100 * entry.majority, place - 0.5, place + 0.5, **style)
        marks["most frequent answer alone"] = line
    return marks
