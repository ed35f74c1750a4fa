"""docs/methods.svg: validation score against learning rate, a line for each method."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals import report
from evals.figures import COLOURS, MARKERS, save_svg, use_defaults

if TYPE_CHECKING:
    from bench.methods import Experiment


def describe_drawn(experiments: list["Experiment"]) -> str:
    """What the figure is drawn from, data and code, as text."""
    drawn = {
        experiment.task: {
            cell.name: {key: value for key, value in score.items() if key != "values"}
            for cell in experiment.list_all_rate_cells()
            for score in (cell.content["scores"]["validation"],)
        }
        for experiment in experiments
    }
    data = json.dumps([drawn, experiments[0].spec["methods"]], sort_keys=True)
    return data + Path(__file__).read_text()


def draw_rates(experiments: list["Experiment"], file: Path) -> None:
    """Validation score against rate: a panel for each task, a line for each method."""
    from matplotlib.figure import Figure

    with use_defaults({}):
        figure = Figure(figsize=(5.4 * len(experiments), 4.2), layout="constrained")
        panels = figure.subplots(1, len(experiments), squeeze=False)[0]
        for axes, experiment in zip(panels, experiments, strict=True):
            draw_task(axes, experiment)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        save_svg(figure, file, describe_drawn(experiments))


def draw_task(axes: Any, experiment: "Experiment") -> None:
    for place, (method, entry) in enumerate(experiment.spec["methods"].items()):
        cells = experiment.list_rate_cells(method).items()
        done = [(rate, cell.content["scores"]["validation"]) for rate, cell in cells]
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
