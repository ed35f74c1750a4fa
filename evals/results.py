"""Measured recipes: one JSON file each in results/<model>/, and the README's table and figure.

    python -m tools results            writes the README's table and docs/results.svg
    python -m tools results --check    fails where they do not match results/

`Measurement` is the schema. Other formats have the files that bench/ writes, results/beyond.json (a
search made by hand) and results/_tune/ (of `make tune`).
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evals import report
from tools.common import ROOT, JobFailed, WrongInput, atomic, read_json, shown

FOLDER = ROOT / "results"
PAGE = ROOT / "README.md"
FIGURE = ROOT / "docs" / "results.svg"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(Strict):
    """A metric from 0 to 1 (a difference: from -1), and its 95 % interval if there is one."""

    value: float = Field(ge=-1, le=1)
    low: float | None = Field(default=None, ge=-1, le=1)
    high: float | None = Field(default=None, ge=-1, le=1)

    @property
    def is_interval(self) -> bool:
        return self.low is not None and self.high is not None


class DatasetResult(Strict):
    metric: str
    rows: int = Field(gt=0)  # test rows
    seeds: list[int] = Field(min_length=1)  # of the trainings; an adapter's score is their mean
    base: Score
    adapter: Score
    difference: Score  # adapter - base, on the same rows


class Measurement(Strict):
    """What one recipe scored on one machine."""

    recipe: str
    version: str
    digest: str | None  # None where the run was made before digests were recorded
    variant: str | None  # what was changed in the recipe; None for the recipe as it stands
    model: str
    device: str
    trained_on: str
    datasets: dict[str, DatasetResult]
    seconds: float | None = Field(gt=0)  # of one training; the mean over seeds
    peak_memory_bytes: int | None = Field(gt=0)
    source: str  # the file, page and date that the figures come from


def load_measurements() -> list[Measurement]:
    """All measurements in results/; raises WrongInput that names the file and the key."""
    return [load_measurement(path) for path in sorted(FOLDER.glob("[!_]*/*.json"))]


def load_measurement(path: Path) -> Measurement:
    try:
        return Measurement.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise WrongInput(f"{shown(path)}: {key}: {first['msg']}") from None


# ---- table


def format_points(score: Score, signed: bool = False) -> str:
    """`28.5 (23.8 … 33.8)`: percent, with the interval if there is one."""
    missing = "" if score.is_interval else "not measured"
    value, interval = report.format_percent(score.model_dump() | {"no_interval": missing}, signed)
    return f"{value} ({interval})" if interval else value


def format_label(measurement: Measurement) -> str:
    variant = f", {measurement.variant}" if measurement.variant else ""
    return f"`{measurement.recipe}`{variant}"


def build_table(measurements: list[Measurement]) -> str:
    rows = [
        ["recipe", "test rows", "metric", "base, %", "adapter, %", "gain, points"],
        ["---", "---", "---", "---:", "---:", "---:"],
    ]
    for measurement in measurements:
        for dataset, result in measurement.datasets.items():
            scores = [format_points(result.base), format_points(result.adapter)]
            scores.append(format_points(result.difference, signed=True))
            name = f"{dataset}, {result.rows}"
            rows.append([format_label(measurement), name, report.title(result.metric), *scores])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_caption(measurements: list[Measurement]) -> str:
    """Which models and versions, on which machine, and how to read the table."""
    models, versions, devices = (
        ", ".join(sorted({getattr(m, key) for m in measurements}))
        for key in ("model", "version", "device")
    )
    return (
        f"{models}, version {versions} of the recipes, on {devices}. In brackets: 95 % intervals, "
        "where they were measured. Recipes with a note were trained as it says, and the scores of "
        "their adapters are means over seeds. [results/](results/) holds seeds, training rows, "
        "time and memory.\n"
    )


def format_block(measurements: list[Measurement]) -> str:
    return (
        f"![Score of base and adapter]({FIGURE.relative_to(ROOT)})\n\n"
        f"{build_table(measurements)}\n{format_caption(measurements)}"
    )


def insert_block(text: str, block: str) -> str:
    """The page with `block` between its markers; raises JobFailed where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise JobFailed(f"{shown(PAGE)} has no lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + block + end + after


# ---- figure


def draw(measurements: list[Measurement], file: Path, mark: str) -> None:
    """A line for each recipe and dataset from the base's score to the adapter's.

    `mark` goes into the file's description; a figure of older results is recognized by it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(m, name, result) for m in measurements for name, result in m.datasets.items()]
    labels = [
        f"{format_label(m).replace('`', '')}: {name}, {report.title(result.metric)} ({result.rows})"
        for m, name, result in rows
    ]
    with plt.rc_context({"svg.hashsalt": "results", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
        sides = (("base", "#8a8f98", "o"), ("adapter", "#1f6f8b", "D"))
        for place, (_, _, result) in enumerate(rows):
            ends = (100 * result.base.value, 100 * result.adapter.value)
            axis.plot(ends, (place, place), color="#c9ccd1", linewidth=2.5, zorder=1)
            for side, color, marker in sides:
                score: Score = getattr(result, side)
                if score.low is not None and score.high is not None:
                    axis.hlines(place, 100 * score.low, 100 * score.high, color=color, alpha=0.6)
                axis.scatter(100 * score.value, place, color=color, marker=marker, s=26, zorder=2)
        axis.set_yticks(range(len(rows)), labels)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("%, with 95 % intervals; in brackets: test rows")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        handles = [
            plt.Line2D([], [], color=color, marker=marker, linestyle="", label=side)
            for side, color, marker in sides
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
        with atomic(file) as out:
            metadata = {"Date": None, "Creator": None, "Description": mark}
            figure.savefig(out, format="svg", metadata=metadata)
        plt.close(figure)


def write(check: bool = False) -> None:
    """Writes the README's table and the figure; with `check`, raises JobFailed if they differ."""
    measurements = load_measurements()
    block = format_block(measurements)
    mark = f"sha256 of the table: {hashlib.sha256(block.encode()).hexdigest()}"
    text = PAGE.read_text(encoding="utf-8")
    page = insert_block(text, block)
    is_drawn = FIGURE.is_file() and mark in FIGURE.read_text(encoding="utf-8")
    if check:
        for path, is_current in ((PAGE, page == text), (FIGURE, is_drawn)):
            if not is_current:
                raise JobFailed(f"{shown(path)} does not match results/; `make results` writes it")
        return
    if page != text:
        with atomic(PAGE) as file:
            file.write(page.encode())
    if not is_drawn:
        draw(measurements, FIGURE, mark)
