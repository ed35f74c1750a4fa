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
from tools.train import plan, progress
from tools.train.checkpoints import last_checkpoint
from tools.train.checks import FULL
from tools.train.machines import Machines

# What a log says when training fails, and what it means. The first match counts.
CAUSES = {
    r"tools\.train\.callbacks\.Stopped: (.+)": "{0}",
    # The last is Rust's (tokenizers), which aborts.
    r"OutOfMemoryError|CUDA out of memory|allocate memory|MemoryError|bad_alloc"
    r"|memory allocation of \d+ bytes failed": "{memory}",
    r"No space left on device|os error 28": "no space left on the disk; {free} are free",
    r"Disk quota exceeded|os error 122": "the disk quota of this user is used up",
    r"(?:PermissionError|Read-only file system).*": "{0}",
}
# Lines in which torchrun reports that a process failed, without the reason.
ECHOES = ("ChildFailedError", "torch.distributed.elastic", "error_file", "CalledProcessError")


def follow(process: subprocess.Popen[bytes], run: Run) -> None:
    """Shows the training's progress until its process ends."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    columns = (
        TextColumn("train     "),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    tail, last_step, printed = progress.Tail(run.progress_file), 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        job = bar.add_task("loading the model", total=None)
        while True:
            ended = process.poll() is not None
            losses = [row for row in tail.read() if "loss" in row]
            if losses and losses[-1]["step"] != last_step:
                last = losses[-1]
                last_step = last["step"]
                speed = last["real_tokens"] / max(last["seconds"], 1e-9)
                text = (
                    f"loss {last['loss']:.3f}  {speed:.0f} tokens/s  {last['memory'] / 1e9:.1f} GB"
                )
                bar.update(job, total=last["steps"], completed=last_step, description=text)
                if not console.is_terminal and (time.monotonic() - printed > 20 or ended):
                    print(f"train      step {last_step}/{last['steps']}  {text}", flush=True)
                    printed = time.monotonic()
            if ended:
                tail.close()
                return
            time.sleep(0.3)


def advise_memory(config: dict[str, Any], processes: int) -> str:
    """The planner's first suggestion after memory ran out."""
    try:
        planned = plan.plan(config, plan.Hardware(count=processes))
        less = f"{planned['memory']['peak'] / 2**30 * 0.8 / plan.USABLE:.1f}GB"
        changes = plan.plan(config, plan.Hardware(less, processes))["changes"]
    except WrongInput:
        changes = []
    return "out of memory; the plan's next step: " + (
        changes[0][0] if changes else "a smaller sequence_len or a smaller model (`make plan`)"
    )


def explain_failure(
    log: Path, start: int, code: int, config: dict[str, Any], processes: int
) -> str:
    """Why training ended: from its log after byte `start`, or from the signal that ended it."""
    text = log.read_bytes()[start:].decode(errors="replace")
    facts = {"free": f"{shutil.disk_usage(log.parent).free / 1e9:.1f} GB"}
    for pattern, meaning in CAUSES.items():
        if match := re.search(pattern, text):
            if "{memory}" in meaning:
                facts["memory"] = advise_memory(config, processes)
            groups = match.groups() or (match[0],)
            return SECRET.sub("***", meaning.format(*groups, **facts).strip()[:400])
    if shutil.disk_usage(log.parent).free < FULL:  # then the log cannot say so
        return CAUSES[r"No space left on device|os error 28"].format(**facts)
    if code == -signal.SIGKILL:
        return f"it was killed, most often for memory: {advise_memory(config, processes)}"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    if code == 0:  # it was asked to stop, and saved
        return "it was interrupted"
    names = ("Error:", "Exception:", "Killed")
    errors = [line.strip() for line in text.splitlines() if any(name in line for name in names)]
    errors = [line for line in errors if not any(echo in line for echo in ECHOES)]
    return SECRET.sub("***", errors[-1][:300]) if errors else "it exited without an error message"


def die_with_parent() -> None:
    """Runs in the child: when this process dies, training is asked to save and stop."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_torchrun(process: psutil.Process) -> bool:
    """Whether torchrun started a process; False where it has ended or cannot be inspected."""
    try:
        return "TORCHELASTIC_RUN_ID" in process.environ()
    except psutil.Error:
        return False


def find_trainers(leader: int) -> list[psutil.Process]:
    """The processes that train: those that torchrun started, else the leader itself.

    What these started in turn (workers that load data) must live until the step is finished.
    A process that ends meanwhile is left out, whatever it is.
    """
    try:
        first = psutil.Process(leader)
        family = [first, *first.children(recursive=True)]
    except psutil.Error:
        return []
    inside = {process.pid: process for process in family if in_torchrun(process)}
    ranks = []
    for process in inside.values():
        with suppress(psutil.Error):
            if process.ppid() not in inside:
                ranks.append(process)
    return ranks or [first]


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
    arguments = ["train", shown(place.config_file), *machines.launcher()]
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
                print(f"train      stopped; the same command goes on {after}", flush=True)
            raise
    if machines.rank == 0 and not run.stats_file.is_file():
        why = explain_failure(log, start, process.returncode, config, machines.processes)
        step = last_checkpoint(run)
        on = f"; the same command goes on from step {step}" if step else ""
        raise JobFailed(f"training stopped: {why}{on}; all of it is in {shown(log)}")
    if process.returncode:
        why = explain_failure(log, start, process.returncode, config, machines.processes)
        raise JobFailed(f"training stopped: {why}; all of it is in {shown(log)}")
