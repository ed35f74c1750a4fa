"""Lists what trains now, what is done, and what was interrupted.

    python -m tools status

A training holds the lock of its run; a finished run has a `run.json`; `make train` resumes the
others.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import runs
from tools.common import WrongInput, format_table
from tools.runs import Run, step_of

STATES = ["training", "interrupted", "unreadable", "finished"]  # in the order of the table
BLOCK = 1 << 16  # bytes at the end of a progress file: some hundred lines


@dataclass(frozen=True)
class Status:
    run: str
    state: str  # of STATES; a sweep adds "failed"
    note: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    seconds: float = 0.0


def read_last_step(path: Path) -> dict[str, Any]:
    """The newest row of a progress file that has a loss; {} without one.

    Only the end of the file is read. A training may be writing it, so a line without its end is
    skipped, and so is one that a crash of the machine left unreadable.
    """
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - BLOCK)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):
            row: dict[str, Any] = json.loads(line)
            if "loss" in row:
                return row
    return {}


def read_status(run: Run) -> Status:
    """The status of a run; "unreadable" with the reason where its files cannot be read."""
    try:
        last = read_last_step(run.progress_file)
        step, steps, seconds = last.get("step", 0), last.get("steps"), last.get("seconds", 0.0)
        progress = (step, steps, last.get("loss"), seconds)
        if run.is_training:
            note = f"{seconds / step * (steps - step) / 60:.0f} min left" if step else "starting"
            return Status(run.name, "training", note, *progress)
        if info := run.info:
            count, steps = info.get("processes", 1), info["steps"]
            note = f"{count} x {info['device']}" if count > 1 else info["device"]
            progress = (steps, steps, info.get("last_loss"), info["seconds"])
            return Status(run.name, "finished", note, *progress)
        saved = run.checkpoints()
        note = f"continues from step {step_of(saved[0])}" if saved else "nothing saved yet"
        return Status(run.name, "interrupted", note, *progress)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    except (WrongInput, ValueError, KeyError, TypeError) as error:
        reason = f"damaged: {error}"
    return Status(run.name, "unreadable", reason)


def list_statuses() -> list[Status]:
    """The status of every run, training ones first.

    Without runs that were moved aside, and those of experiments, in hidden folders.
    """
    statuses = []

    def add_unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            name = Run(Path(error.filename)).name
            statuses.append(Status(name, "unreadable", str(error.strerror)))

    for folder, folders, files in os.walk(runs.RUNS, onerror=add_unreadable):
        folders[:] = [name for name in folders if name[0] != "."]  # trials of a search
        run = Run(Path(folder))
        if run.identity_file.name in files:
            folders.clear()  # checkpoints and prepared data
            if ".previous" not in run.name:
                statuses.append(read_status(run))
    return sorted(statuses, key=lambda status: (STATES.index(status.state), status.run))


def print_statuses(statuses: list[Status]) -> None:
    rows = [("run", "state", "step", "loss", "minutes", "")]
    for row in statuses:
        steps = f"{row.step}/{row.steps or '?'}"
        loss = "-" if row.loss is None else f"{row.loss:.3f}"
        rows.append((row.run, row.state, steps, loss, f"{row.seconds / 60:.1f}", row.note))
    print(format_table(rows, "<<>>><"))


def print_all() -> None:
    """Prints the status of every run."""
    if statuses := list_statuses():
        print_statuses(statuses)
    else:
        print("no run yet; `make train RECIPE=…` makes one")
