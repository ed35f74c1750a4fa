"""Runs `axolotl train` as a child process: shows progress, stops it gently, explains a failure."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tools.common import ROOT, SECRET, JobFailed, WrongInput, shown
from tools.runs import Run
from tools.train import plan
from tools.train.checkpoints import last_checkpoint
from tools.train.checks import FULL
from tools.train.machines import Machines
from tools.train.status import read_last_step

OUT_OF_MEMORY = "out of memory"
DISK_FULL = "no space left on the disk; {free} are free"
# What a log says when training fails, and what it means. The first match counts.
CAUSES = {
    r"tools\.train\.callbacks\.Stopped: (.+)": "{0}",
    # The last message is that of Rust (tokenizers), which aborts.
    r"OutOfMemoryError|CUDA out of memory|allocate memory|MemoryError|bad_alloc"
    r"|memory allocation of \d+ bytes failed": OUT_OF_MEMORY,
    r"No space left on device|os error 28": DISK_FULL,
    r"Disk quota exceeded|os error 122": "the disk quota of this user is used up",
    r"(?:PermissionError|Read-only file system).*": "{0}",
}
ERROR = re.compile("Error:|Exception:|Killed")
# Lines in which torchrun reports that a process failed, without the reason.
ECHO = re.compile(r"ChildFailedError|torch\.distributed\.elastic|error_file|CalledProcessError")


def follow(process: subprocess.Popen[bytes], run: Run) -> None:
    """Shows the newest training step until the process ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console()
    columns = ("train     ", BarColumn(24), MofNCompleteColumn(), "{task.description}")
    last_step, printed_at, is_running = 0, time.monotonic(), True
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        job = bar.add_task("loading the model", total=None)
        while is_running:
            is_running = process.poll() is None
            row = read_last_step(run.progress_file)
            if row and row["step"] != last_step:
                last_step, steps = row["step"], row["steps"]
                speed = row["real_tokens"] / max(row["seconds"], 1e-9)
                memory = row["memory"] / 1e9
                text = f"loss {row['loss']:.3f}  {speed:.0f} tokens/s  {memory:.1f} GB"
                bar.update(job, total=steps, completed=last_step, description=text)
                is_due = time.monotonic() - printed_at > 20 or not is_running
                if is_due and not console.is_terminal:
                    print(f"train      step {last_step}/{steps}  {text}", flush=True)
                    printed_at = time.monotonic()
            time.sleep(0.3 if is_running else 0)


def advise_memory(config: dict[str, Any], processes: int) -> str:
    """The planner's first suggestion to save memory."""
    changes = []
    with suppress(WrongInput):  # an architecture that cannot be planned
        changes = plan.plan(config, plan.Hardware("0GB", processes))["changes"]
    default = "a smaller sequence_len or a smaller model (`make plan`)"
    return f"{OUT_OF_MEMORY}; the plan's next step: {changes[0][0] if changes else default}"


def explain_failure(
    log: Path, start: int, code: int, config: dict[str, Any], processes: int
) -> str:
    """Why training ended: from its log after byte `start`, or from its exit code."""
    text = log.read_bytes()[start:].decode(errors="replace")
    free = shutil.disk_usage(log.parent).free
    for pattern, meaning in CAUSES.items():
        if match := re.search(pattern, text):
            if meaning == OUT_OF_MEMORY:
                return advise_memory(config, processes)
            groups = match.groups() or (match[0],)
            reason = meaning.format(*groups, free=f"{free / 1e9:.1f} GB")
            return SECRET.sub("***", reason.strip()[:400])
    if free < FULL:  # then the log cannot say so
        return DISK_FULL.format(free=f"{free / 1e9:.1f} GB")
    if code == -signal.SIGKILL:
        return f"it was killed, most often for memory: {advise_memory(config, processes)}"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    if code == 0:  # a signal made it save and exit
        return "it was interrupted"
    lines = [line for line in text.splitlines() if ERROR.search(line) and not ECHO.search(line)]
    error = lines[-1].strip()[:300] if lines else "it exited without an error message"
    return SECRET.sub("***", error)


def die_with_parent() -> None:
    """Runs in the child: when the parent dies, the child gets SIGTERM, so it saves and stops."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def is_rank(process: psutil.Process) -> bool:
    """Whether torchrun itself started a process; False for one that has ended.

    What a rank starts (workers that load data) inherits the variable, and must live until the step
    is finished.
    """
    with suppress(psutil.Error):
        parent, variable = process.parent(), "TORCHELASTIC_RUN_ID"
        return variable in process.environ() and not (parent and variable in parent.environ())
    return False


def find_trainers(leader: int) -> list[psutil.Process]:
    """The processes that train: those that torchrun started, else the leader itself."""
    try:
        first = psutil.Process(leader)
        return [child for child in first.children(recursive=True) if is_rank(child)] or [first]
    except psutil.Error:
        return []


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks every training process to save a checkpoint and exit; a second Ctrl-C kills them."""
    with suppress(OSError):  # stdout may be closed
        text = "the step is finished and saved (again to stop at once)"
        print(f"train      stopping: {text}", flush=True)
    # torchrun would wait and kill, so the processes that it started get the signal directly.
    for trainer in find_trainers(process.pid):
        with suppress(psutil.Error):
            trainer.send_signal(signal.SIGTERM)
    try:
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_axolotl(
    run: Run, place: Run, config: dict[str, Any], machines: Machines, lock: int
) -> None:
    """Runs `axolotl train` on the config in `place`; raises JobFailed unless it finishes."""
    arguments = ["train", shown(place.config_file), *machines.build_arguments()]
    print(f"train      axolotl {' '.join(arguments)}", flush=True)
    log = place.log_file
    start = log.stat().st_size if log.is_file() else 0
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "axolotl"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=machines.build_environment(config),
            pass_fds=[lock],
            process_group=0,  # Ctrl-C reaches this process alone, which then tells the others
            preexec_fn=die_with_parent,
        )
        try:
            follow(process, run)
        except BaseException:
            stop(process)
            if not run.stats_file.is_file():
                step = last_checkpoint(run)
                after = f"from step {step}" if step else "from the start"
                print(f"train      stopped; the same command continues {after}", flush=True)
            raise
    is_unfinished = machines.rank == 0 and not run.stats_file.is_file()
    if is_unfinished or process.returncode:
        reason = explain_failure(log, start, process.returncode, config, machines.processes)
        step = last_checkpoint(run) if is_unfinished else 0
        again = f"; the same command continues from step {step}" if step else ""
        raise JobFailed(f"training stopped: {reason}{again}; all of it is in {shown(log)}")
