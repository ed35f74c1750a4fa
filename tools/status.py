"""What trains now, what is done, and what was interrupted.

    python -m tools.status

A run that trains holds its lock; a finished one has a `run.json`; anything else that was begun goes
on with `make train`.
"""

import argparse
import fcntl
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

from tools import progress
from tools.cli import ROOT, command

RUNS = ROOT / "runs"
STATES = ["training", "interrupted", "unreadable", "finished"]
# C's `struct flock` for the whole file: type, whence, start, length, process, and padding.
FLOCK = "hhqqi4x"


def lock_file(run: Path) -> Path:
    """The file beside a run folder whose lock the training holds."""
    return run.with_name(f".{run.name}.lock")


def take_lock(descriptor: int) -> bool:
    """Takes the lock of an open file for as long as any process has this descriptor open.

    False where another has it. It belongs to the open file as flock's does, so a child process
    inherits it; unlike flock's, it can be asked for without being taken (`training`).
    """
    request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def training(run: Path) -> bool:
    """Whether a process holds the run's lock; looking does not keep a training from taking it."""
    try:
        file = open(lock_file(run), "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    with file:
        request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)


def status(run: Path) -> dict[str, Any]:
    """State, steps, loss, seconds and what more there is to say of one run folder."""
    last = progress.last_step(run / "progress.jsonl")
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


def status_or_reason(run: Path) -> dict[str, Any]:
    """The status of a run, or why it cannot be read: one of many does not hide the others."""
    try:
        return status(run)
    except OSError as error:
        return unreadable(run, f"{error.strerror}: {error.filename}")
    except (ValueError, KeyError, TypeError) as error:
        return unreadable(run, f"damaged: {error}")


def unreadable(run: Path, reason: str) -> dict[str, Any]:
    """The row of a folder that this user may not read, or whose files are damaged."""
    name = str(run.relative_to(RUNS) if run.is_relative_to(RUNS) else run)
    row = {"run": name, "state": "unreadable", "step": 0, "steps": None, "loss": None}
    return row | {"seconds": 0.0, "note": reason}


def all_runs() -> list[dict[str, Any]]:
    """The status of every run, training ones first; what FORCE=1 moved aside is left out."""
    rows = []

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            rows.append(unreadable(Path(error.filename), str(error.strerror)))

    for name, folders, files in os.walk(RUNS, onerror=note):
        run = Path(name)
        if "identity.json" not in files:
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


@command
def main() -> None:
    argparse.ArgumentParser(
        description="what trains, what is done, what was interrupted"
    ).parse_args()
    rows = all_runs()
    show(rows) if rows else print("no run yet; `make train RECIPE=…` makes one")


if __name__ == "__main__":
    main()
