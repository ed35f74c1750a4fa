"""What trains now, what is done, and what was interrupted.

    python -m tools.train.status

A run that trains holds its lock; a finished one has a `run.json`; anything else that was begun goes
on with `make train`.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tools import runs
from tools.common import WrongInput
from tools.runs import Run, step_of
from tools.train import progress

STATES = ["training", "interrupted", "unreadable", "finished"]


def status(run: Run) -> dict[str, Any]:
    """State, steps, loss, seconds and what more there is to say of one run folder."""
    last = progress.last_step(run.progress_file)
    row = {
        "run": run.name,
        "state": "interrupted",
        "step": last.get("step", 0),
        "steps": last.get("steps"),
        "loss": last.get("loss"),
        "seconds": last.get("seconds", 0.0),
        "note": "",
    }
    if run.is_training:
        left = row["seconds"] / row["step"] * (row["steps"] - row["step"]) if row["step"] else None
        row |= {
            "state": "training",
            "note": "starting" if left is None else f"{left / 60:.0f} min left",
        }
    elif info := run.info:
        count = info.get("processes", 1)
        device = f"{count} x {info['device']}" if count > 1 else info["device"]
        row |= {"state": "finished", "step": info["steps"], "steps": info["steps"]}
        row |= {"loss": info.get("last_loss"), "seconds": info["seconds"], "note": device}
    else:
        saved = run.checkpoints()
        row["note"] = f"goes on from step {step_of(saved[0])}" if saved else "nothing saved yet"
    return row


def status_or_reason(run: Run) -> dict[str, Any]:
    """The status of a run, or why it cannot be read: one of many does not hide the others."""
    try:
        return status(run)
    except OSError as error:
        return unreadable(run, f"{error.strerror}: {error.filename}")
    except (WrongInput, ValueError, KeyError, TypeError) as error:
        return unreadable(run, f"damaged: {error}")


def unreadable(run: Run, reason: str) -> dict[str, Any]:
    """The row of a folder that this user may not read, or whose files are damaged."""
    row = {"run": run.name, "state": "unreadable", "step": 0, "steps": None, "loss": None}
    return row | {"seconds": 0.0, "note": reason}


def all_runs() -> list[dict[str, Any]]:
    """The status of every run, training ones first; what FORCE=1 moved aside is left out."""
    rows = []

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            rows.append(unreadable(Run(Path(error.filename)), str(error.strerror)))

    for name, folders, files in os.walk(runs.RUNS, onerror=note):
        run = Run(Path(name))
        if run.identity_file.name not in files:
            continue
        folders.clear()  # checkpoints and prepared data
        if ".previous" not in run.name:
            rows.append(status_or_reason(run))
    return sorted(rows, key=lambda row: (STATES.index(row["state"]), row["run"]))


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
