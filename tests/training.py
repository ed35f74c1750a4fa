"""Starts `make train` beside a test, waits for it, kills it, and compares two runs."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import losses
from tools import common


def start(recipe: Path, *options: str, **kwargs) -> subprocess.Popen:
    """Runs `python -m tools train` in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "tools", "train", recipe, *options],
        cwd=common.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """Sends SIGKILL to all that the command started, and to the command.

    The training comes first: it would save and end, once the command that started it is gone.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, process]:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()


def count_steps(folder: Path) -> int:
    return max(losses(folder), default=0) if (folder / "progress.jsonl").exists() else 0


def assert_same(folder: Path, other: Path) -> None:
    """Two runs have the same losses and the same adapter, to the bit."""
    assert losses(folder) == losses(other)
    first, second = (common.digest(f / "adapter_model.safetensors") for f in (folder, other))
    assert first == second
