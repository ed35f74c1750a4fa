"""A run: the folder that a training leaves. Only this module knows what lies in one.

    run = Run(RUNS / "smollm2-135m/sentiment_r4")
    run.info["last_loss"]                  from run.json; {} while the run is not finished
    [run.name for run in list_runs() if run.is_finished]

    identity.json            the config and the data that the run was started with
    config.yaml              the merged config that Axolotl got
    progress.jsonl           a line for each logged step
    validation.jsonl         the losses and scores of the rows, for each evaluation of a search
    train.log                what Axolotl printed
    checkpoint-<step>/       the newest two
    stats.json               what was measured; there from the last step until run.json is written
    adapter_*, tokenizer*    as PEFT and transformers save them
    run.json                 written last: a folder that has one is a finished run
    hub.json                 where a pulled run comes from
    evals/<dataset>.json     scores

Beside it lie `.<run>.lock`, which the training holds, `<run>.previous`, a run moved aside, and
`<run>.seed<number>`, a run of the same recipe with another seed.
"""

import fcntl
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.common import (
    ROOT,
    JobFailed,
    digest,
    json_lines,
    name_owner,
    read_json,
    read_yaml,
    shown,
)

RUNS = ROOT / "runs"
INFO, CONFIG = "run.json", "config.yaml"
UNKNOWN = "unknown"  # the precision in run.json of an adapter that was pulled without one
# C's `struct flock` (type, whence, start, length, process, padding), and a lock of a whole file.
FLOCK = "hhqqi4x"
WHOLE_FILE = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
# Folders inside a run, or hidden ones, that hold no run.
NO_RUNS = ("checkpoint-", "damaged-", "evals", "prepared", ".")
OTHER_SEED = re.compile(r"(?P<run>.+)\.seed(?P<seed>\d+)")


class RunFile:
    """The path of a file in a run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "Run", owner: type) -> Path:
        return run.folder / self.name


@dataclass(frozen=True)
class Run:
    """The run in `folder`, whether it exists or not."""

    folder: Path

    info_file = RunFile(INFO)
    config_file = RunFile(CONFIG)
    identity_file = RunFile("identity.json")
    progress_file = RunFile("progress.jsonl")
    validation_file = RunFile("validation.jsonl")
    stats_file = RunFile("stats.json")
    log_file = RunFile("train.log")
    adapter_file = RunFile("adapter_model.safetensors")
    tokenizer_file = RunFile("tokenizer.json")
    origin_file = RunFile("hub.json")
    scores_folder = RunFile("evals")

    def __str__(self) -> str:
        return shown(self.folder)

    @property
    def name(self) -> str:
        """`<model>/<recipe>`, with another seed `…, seed 43`; the path of a run elsewhere."""
        inside = self.folder.is_relative_to(RUNS)
        name = str(self.folder.relative_to(RUNS) if inside else self.folder)
        other = OTHER_SEED.fullmatch(name)
        return f"{other['run']}, seed {other['seed']}" if inside and other else name

    def with_seed(self, seed: int) -> "Run":
        """The run of the same recipe with another seed, which lies beside this one."""
        return Run(self.folder.with_name(f"{self.folder.name}.seed{seed}"))

    @property
    def lock_file(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def is_finished(self) -> bool:
        return self.info_file.is_file()

    @property
    def has_tokenizer(self) -> bool:
        """Whether it is a run, not only a PEFT folder, with a tokenizer of its own.

        A pulled folder is one if it was published as a run: `make pull` adds what is missing.
        """
        if not (self.tokenizer_file.is_file() and self.is_finished):
            return False
        if not self.origin_file.is_file():
            return True
        published = read_json(self.origin_file).get("remote")
        return isinstance(published, dict) and {INFO, CONFIG} <= published.keys()

    @property
    def is_recognized(self) -> bool:
        """Whether `make train` or plain Axolotl made the folder."""
        names = ("identity.json", "adapter_config.json", "checkpoint-*")
        return any(next(self.folder.glob(name), None) for name in names)

    @property
    def info(self) -> dict[str, Any]:
        """The run.json; {} of a run that is not finished."""
        return read_json(self.info_file) if self.is_finished else {}

    @property
    def identity(self) -> dict[str, Any] | None:
        return read_json(self.identity_file) if self.identity_file.is_file() else None

    @property
    def config(self) -> dict[str, Any]:
        return read_yaml(self.config_file)

    @property
    def score_files(self) -> list[Path]:
        return sorted(self.scores_folder.glob("*.json"))

    @property
    def is_intact(self) -> bool:
        """Whether the adapter is the one that run.json describes."""
        path = self.adapter_file
        return path.is_file() and digest(path) == self.info.get("adapter_sha256")

    @property
    def is_training(self) -> bool:
        """Whether a process holds the lock; does not take it, even for a moment."""
        if not self.lock_file.is_file():
            return False
        with open(self.lock_file, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, WHOLE_FILE)
        return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Holds the lock and yields its file descriptor; raises JobFailed where another holds it.

        The lock belongs to the open file: a training that inherits the descriptor keeps it.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.lock_file, "ab")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(Path(error.filename), str(error.strerror)) from None
        with file:
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, WHOLE_FILE)
            except (BlockingIOError, PermissionError):
                raise JobFailed(f"another training of {self} is under way") from None
            place = self.folder if self.folder.exists() else self.folder.parent
            if not os.access(place, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
                raise self._unwritable(place, "Permission denied")
            yield file.fileno()

    def _unwritable(self, path: Path, reason: str) -> JobFailed:
        return JobFailed(
            f"{self}, the output_dir, cannot be written to: {reason}{name_owner(path)}"
        )

    def losses(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl that have a training loss."""
        return [line for line in json_lines(self.progress_file) if "loss" in line]

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of validation.jsonl by step; a step that was repeated counts once."""
        lines = {line["step"]: line for line in json_lines(self.validation_file)}
        return [lines[step] for step in sorted(lines)]

    def checkpoints(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("checkpoint-[0-9]*"), key=step_of, reverse=True)

    def remove_weights(self) -> None:
        """Removes checkpoints and adapter; logs and figures stay."""
        for folder in self.checkpoints():
            shutil.rmtree(folder)
        self.adapter_file.unlink(missing_ok=True)

    def move_aside(self) -> "Run":
        """Renames the folder to `<run>.previous` or the next free name; returns the moved run."""
        number, place = 1, self.folder.with_name(f"{self.folder.name}.previous")
        while place.exists():
            number += 1
            place = self.folder.with_name(f"{self.folder.name}.previous-{number}")
        os.replace(self.folder, place)
        return Run(place)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_runs() -> list[Run]:
    """The runs below runs/, started or finished or pulled.

    Without those moved aside, and those of another seed than the recipe's.
    """
    runs = []
    for place, folders, files in os.walk(RUNS):
        folders[:] = [
            name
            for name in folders
            if not (name.startswith(NO_RUNS) or ".previous" in name or OTHER_SEED.fullmatch(name))
        ]
        if {INFO, "identity.json"} & set(files):
            runs.append(Run(Path(place)))
    return sorted(runs, key=lambda run: run.folder)
