"""Numbers and sentences that the sections of docs/methods.md share."""

from collections.abc import Sequence
from typing import Any

from bench.cells import Cell, collect_columns

ROUNDED = 1e-4  # shares in files of results have four decimals


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
