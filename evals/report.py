"""Shows the scores of a base and its adapter side by side, from their score files."""

import json
import sys
from pathlib import Path

from evals import stats
from tools.cli import shown

TITLES = {"accuracy": "accuracy", "f1_weighted": "weighted F1"}


def percent(value: dict[str, float], signed: bool = False) -> str:
    plus = "+" if signed else ""
    point, low, high = (100 * value[key] for key in ("value", "low", "high"))
    return f"{point:{plus}.1f}  [dim]{low:{plus}.1f} … {high:{plus}.1f}[/dim]"


def show(recipe: str, files: dict[str, list[Path]]) -> None:
    """Prints a table of datasets; `files` maps each to the score files of base and adapter."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{recipe}: %, with 95 % intervals", title_justify="left", box=None)
    table.add_column("dataset")
    table.add_column("metric")
    for heading in ("base", "adapter", "difference", "examples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for dataset, pair in files.items():
        base, adapter = (json.loads(file.read_text()) for file in pair)
        rows = list(zip(base["predictions"], adapter["predictions"], strict=True))
        expected = [row["expected"] for row, _ in rows]
        answers = [[row[side]["answered"] for row in rows] for side in (0, 1)]
        for metric, title in TITLES.items():
            gain = stats.difference(metric, expected, *answers)
            examples = base["evaluated"]["data_from"] == "data/sample"
            table.add_row(
                f"{dataset} (examples)" if examples else dataset,
                title,
                percent(base["metrics"][metric]),
                percent(adapter["metrics"][metric]),
                percent(gain, signed=True),
                f"{base['examples']:,}",
            )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(table)
    console.print()
    for dataset, pair in files.items():
        for name, file in zip(("base", "adapter"), pair, strict=True):
            console.print(f"scores     {dataset}, {name}: {shown(file)}", highlight=False)
