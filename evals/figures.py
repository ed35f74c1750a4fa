"""The figures of the report: gains, scores against the plan, and losses.

Each function returns {"figure", "caption"}, or None where the figure would show nothing or a single
point.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.report import Gains
from tools.common import JobFailed, atomic, shown

INK = "#59626d"  # grey in a PNG; evals/page.py replaces it with the page's colour
COLOURS = ("#3b74c4", "#c8553d", "#3f8f5b", "#8a5fb0", "#a8790b", "#2a8c97")
MARKERS = "osD^vP"
WINDOW = 10  # steps of the mean that smooths a loss

Drawing = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of scores against the plan: its label, its title, and the GPU."""

    label: str
    title: str
    gpu: str = ""


def _make_figure(height: float) -> tuple[Any, Any]:
    """(figure, axes) of one width, in inches, in this project's style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "text.parse_math": False,  # names are not formulas
        "svg.fonttype": "none",
        "font.size": 11,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    mpl.rcParams.update(settings)
    figure = Figure(figsize=(5.4, height), layout="constrained")
    return figure, figure.add_subplot()


def use_defaults(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Draws with matplotlib's defaults and these settings, whatever was drawn before.

    Text stays text.
    """
    from matplotlib.style import context

    return context(["default", {"svg.fonttype": "none"} | settings], after_reset=True)


def save_svg(figure: Any, file: Path, drawn: str = "") -> None:
    """Writes a figure, the same bytes each time, and in it a digest of what it is drawn from."""
    import matplotlib as mpl

    metadata = {"Date": None, "Creator": None, "Description": drawn and _mark(drawn) or None}
    with atomic(file) as out, mpl.rc_context({"svg.hashsalt": "figure"}):
        figure.savefig(out, format="svg", metadata=metadata)


def update_figure(file: Path, drawn: str, draw: Callable[[], None], check: bool = False) -> None:
    """Draws a figure unless `save_svg` wrote it with the same `drawn`; without any, removes it.

    With `check`, raises JobFailed in place of either.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if (_mark(drawn) in text) if drawn else not text:
        return
    if check:
        raise JobFailed(f"{shown(file)} is out of date; `make results` writes it")
    draw() if drawn else file.unlink()


def _mark(drawn: str) -> str:
    return f"drawn from sha256 {hashlib.sha256(drawn.encode()).hexdigest()}"


def finish(figure: Any, caption: str) -> Drawing:
    """Adds a grid, few ticks, and the legend below."""
    axes = figure.axes[0]
    axes.grid(alpha=0.25)
    axes.locator_params(axis="x", nbins=5)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", fontsize=10)
    return {"figure": figure, "caption": caption}


def _style(place: int) -> dict[str, Any]:
    """How an adapter's points look, by its place in the report."""
    color, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {"color": color, "marker": marker, "ls": "", "ms": 6, "capsize": 3}


def _measure_reach(value: dict[str, Any]) -> tuple[float, list[list[float]]]:
    """(point, [[below], [above]]) of a value in %, as matplotlib's errorbar takes them."""
    point = 100 * value["value"]
    low, high = (100 * value.get(end, value["value"]) for end in ("low", "high"))
    return point, [[point - low], [high - point]]


def draw_gains(names: Sequence[str], gains: Sequence[Gains]) -> Drawing | None:
    """The gain of each adapter over its base by dataset, in points of the first metric."""
    datasets = list(dict.fromkeys(dataset for gain in gains for dataset in gain))
    if not datasets:
        return None
    scored = [place for place, gain in enumerate(gains) if gain]
    figure, axes = _make_figure(1.6 + 0.16 * len(datasets) * (1 + len(scored)) + 0.2 * len(scored))
    axes.axvline(0, color=INK, lw=1)
    for order, place in enumerate(scored):
        offset = (order - (len(scored) - 1) / 2) * 0.7 / len(scored)
        label: str | None = names[place]
        for dataset, metrics in gains[place].items():
            point, reach = _measure_reach(next(iter(metrics.values())))
            height = datasets.index(dataset) + offset
            axes.errorbar(point, height, xerr=reach, label=label, **_style(place))
            label = None
    axes.set_yticks(range(len(datasets)), datasets)
    axes.set_ylim(len(datasets) - 0.4, -0.6)
    axes.set_xlabel("points")
    return finish(
        figure, "Gain over the base by dataset, in points of its first metric, 95 % intervals."
    )


def draw_scores(
    names: Sequence[str],
    means: dict[int, dict[str, float]],
    values: dict[int, float],
    axis: Axis,
    label: str,
) -> Drawing | None:
    """Scores (`means`, by place) against planned `values`; a single point compares nothing."""
    if len(values) < 2:
        return None
    figure, axes = _make_figure(3.4 + 0.2 * len(values))
    for place, value in values.items():
        point, reach = _measure_reach(means[place])
        axes.errorbar(value, point, yerr=reach, label=names[place], **_style(place))
    axes.set_xlabel(axis.label)
    axes.set_ylabel(label)
    axes.margins(x=0.2)
    caption = f"Score against the planned {axis.title} of the training"
    caption += f" on one {axis.gpu}." if axis.gpu else "."
    missing = [names[place] for place in means if place not in values]
    return finish(figure, caption + (f" Not planned: {'; '.join(missing)}." if missing else ""))


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and up to WINDOW - 1 before it."""
    parts = (losses[max(0, end - WINDOW) : end] for end in range(1, len(losses) + 1))
    return [sum(part) / len(part) for part in parts]


def draw_losses(curves: dict[int, tuple[str, list[dict[str, Any]]]]) -> Drawing | None:
    """The losses of runs, (name, lines of progress.jsonl) by place, smoothed over the raw lines."""
    if not curves:
        return None
    figure, axes = _make_figure(3.4 + 0.2 * len(curves))
    for place, (name, lines) in curves.items():
        colour = COLOURS[place % len(COLOURS)]
        trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color=colour, lw=1, alpha=0.3)
        axes.plot(steps, smooth(losses), color=colour, lw=1.6, label=name)
        validated = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        if validated:
            axes.plot(*zip(*validated, strict=True), "o", color=colour)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    return finish(
        figure,
        f"Training loss (lines: each step, and the mean of {WINDOW} steps) and validation loss "
        "(points).",
    )


class Tried(NamedTuple):
    """A candidate of a search: its learning rate, what judged it, and whether it was finished."""

    rate: float | None
    value: float
    state: str


def draw_search(tried: Sequence[Tried], judged_by: str) -> Drawing | None:
    """What judged the candidates of a search against their learning rate, the recipe first."""
    from matplotlib.ticker import LogFormatter

    points = [candidate for candidate in tried if candidate.rate is not None]
    if len({candidate.rate for candidate in points}) < 2:
        return None
    figure, axes = _make_figure(3.6)
    groups = {
        "the recipe": (points[:1], COLOURS[1], "D"),
        "finished": ([c for c in points[1:] if c.state == "finished"], COLOURS[0], "o"),
        "stopped early": ([c for c in points[1:] if c.state != "finished"], INK, "x"),
    }
    for label, (group, colour, marker) in groups.items():
        if group:
            rates, values = zip(*((c.rate, c.value) for c in group), strict=True)
            axes.plot(rates, values, marker, color=colour, label=label)
    axes.set_xscale("log")
    # matplotlib's usual labels of this scale are formulas, which are not parsed here.
    axes.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation {judged_by}")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=3, fontsize=10)
    return {"figure": figure, "caption": "Candidates of a search by their learning rate."}
