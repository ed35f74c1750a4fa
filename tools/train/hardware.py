"""What this machine has for training: GPUs, cores, memory, and packages that really import."""

import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

# NVIDIA's architecture from which flash-attn 2 has kernels: Ampere. T4 and V100 are older.
FLASH_CAPABILITY = (8, 0)
IMPORT_SECONDS = 120  # a package with CUDA kernels on a cold network disk
DRIVERS = ("nvidia-smi", "rocm-smi")  # a machine without either has no GPU that torch can use


@dataclass(frozen=True)
class Host:
    """The hardware of this machine. `gpus`: (name, bytes of memory) of each CUDA device."""

    gpus: list[tuple[str, int]]
    cores: int
    memory: int  # bytes
    capability: tuple[int, int] | None = None  # the lowest CUDA capability of the GPUs

    def __str__(self) -> str:
        if self.gpus:
            name, memory = self.gpus[0]
            return f"{len(self.gpus)} x {name} with {memory / 2**30:.0f} GiB"
        return f"{self.cores} CPU {self._unit} with {self.memory / 2**30:.0f} GiB and no GPU"

    def describe_machine(self, gpus: int | None = None) -> str:
        """The machine as results name it: so many of its GPUs, or its cores and memory.

        Never its host name.
        """
        if self.gpus:
            return f"{gpus or len(self.gpus)} x {self.gpus[0][0]}"
        memory = f"{self.memory / 1e9:.0f} GB"
        return f"{self.cores} {self._unit} ({platform.machine()}), {memory}, no GPU"

    @property
    def _unit(self) -> str:
        return "core" if self.cores == 1 else "cores"


def detect_host() -> Host:
    import psutil

    devices = []
    if any(map(shutil.which, DRIVERS)):  # importing torch takes seconds
        import torch

        count = torch.cuda.device_count()
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Host(
        gpus=[(device.name, device.total_memory) for device in devices],
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().total,
        capability=min(((device.major, device.minor) for device in devices), default=None),
    )


@cache
def explain_import(package: str) -> str:
    """Why a package does not import here, in words; empty where it does.

    A child process tries it: compiled kernels that do not match this torch or this CPU may end the
    process that loads them.
    """
    if not importlib.util.find_spec(package):
        return f"{package} is not installed"
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {package}"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"{package} does not import within {IMPORT_SECONDS} seconds"
    if done.returncode < 0:
        return f"{package} does not import: it ends with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"{package} does not import ({lines[-1].strip()[:200]})"
    return ""


def explain_no_flash(host: Host) -> str:
    """Why flash-attn is not used on this machine, in words; empty where it can be."""
    if not host.gpus:
        return "flash-attn needs a CUDA GPU"
    if host.capability and host.capability < FLASH_CAPABILITY:
        needed, present = (".".join(map(str, c)) for c in (FLASH_CAPABILITY, host.capability))
        return f"flash-attn needs compute capability {needed}, a GPU here has {present}"
    reason = explain_import("flash_attn")
    return f"{reason} (requirements/gpu.txt)" if reason.endswith("not installed") else reason
