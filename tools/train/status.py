"""What trains now, what is done, and what was interrupted.

    python -m tools.train.status

A run that trains holds its lock; a finished one has a `run.json`; anything else that was begun goes
on with `make train`.
"""

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

from tools.common import ROOT, json_lines

RUNS = ROOT / "runs"


def training(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    lock = run.with_name(f".{run.name}.lock")
    if not lock.is_file():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def status(run: Path) -> dict[str, Any]:
    """State, steps, loss, seconds and what more there is to say of one run folder."""
    lines = [line for line in json_lines(run / "progress.jsonl") if "loss" in line]
    last = lines[-1] if lines else {}
    row = {
        "run": str(run.relative_to(RUNS) if run.is_relative_to(RUNS) else run),
        "state": "interrupted",
        "step": last.get("step", 0),
        "steps": last.get("steps"),
        "loss": last.get("loss"),
        "seconds": last.get("seconds", 0.0),
        "note": "",
    }
    if training(run):
        left = row["seconds"] / row["step"] * (row["steps"] - row["step"]) if row["step"] else None
        row |= {
            "state": "training",
            "note": "starting" if left is None else f"{left / 60:.0f} min left",
        }
    elif (run / "run.json").is_file():
        told = json.loads((run / "run.json").read_text())
        count = told.get("processes", 1)
        device = f"{count} x {told['device']}" if count > 1 else told["device"]
        row |= {"state": "finished", "step": told["steps"], "steps": told["steps"]}
        row |= {"loss": told.get("last_loss"), "seconds": told["seconds"], "note": device}
    else:
        saved = [int(p.name[11:]) for p in run.glob("checkpoint-*") if p.name[11:].isdigit()]
        row["note"] = f"goes on from step {max(saved)}" if saved else "nothing saved yet"
    return row


def all_runs() -> list[dict[str, Any]]:
    """The status of every run, training ones first; what FORCE=1 moved aside is left out."""
    folders = {path.parent for path in RUNS.glob("**/identity.json")}
    rows = [status(run) for run in sorted(folders) if ".previous" not in run.name]
    order = ["training", "interrupted", "finished"]
    return sorted(rows, key=lambda row: order.index(row["state"]))


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "step", "loss", "minutes", ""):
        table.add_column(
            heading, justify="right" if heading in ("step", "loss", "minutes") else "left"
        )
    for row in rows:
        steps = f"{row['step']}/{row['steps'] or '?'}"
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        minutes = f"{row['seconds'] / 60:.1f}"
        table.add_row(row["run"], row["state"], steps, loss, minutes, row["note"])
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def show_all() -> None:
    """Prints the status of every run."""
    rows = all_runs()
    show(rows) if rows else print("no run yet; `make train RECIPE=…` makes one")
