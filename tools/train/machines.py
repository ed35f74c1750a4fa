"""How many processes train, on which machines, and how Axolotl is started for them."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.common import ROOT, WrongInput
from tools.train import hardware

GRACE = 110  # seconds to finish a step and save it; launch/slurm.sh asks for a signal 120 before


@dataclass(frozen=True)
class Machines:
    """`nproc` processes on each of `nnodes` machines, of which this is number `rank`.

    `rdzv` is host:port of machine 0. Raises WrongInput where several machines could not meet.
    """

    nproc: int = 1
    nnodes: int = 1
    rank: int = 0
    rdzv: str | None = None

    def __post_init__(self) -> None:
        if self.nnodes > 1 and (self.rank >= self.nnodes or not self.address):
            raise WrongInput("NNODES needs RDZV=host:port of machine 0, and NODE_RANK below NNODES")

    @property
    def address(self) -> re.Match[str] | None:
        return re.fullmatch(r"(.+):(\d+)", self.rdzv or "")

    @property
    def processes(self) -> int:
        return self.nproc * self.nnodes

    def build_arguments(self) -> list[str]:
        """Axolotl's arguments: one process needs no launcher, more are started by torchrun."""
        if self.processes == 1:
            return ["--launcher", "python"]
        where = ["--standalone"]
        if address := self.address:
            # Ranks by machine number: rank 0, which writes the run, is on machine 0.
            where = [f"--nnodes={self.nnodes}", f"--node_rank={self.rank}"]
            where += [f"--master_addr={address[1]}", f"--master_port={address[2]}"]
        return ["--launcher", "torchrun", "--", f"--nproc_per_node={self.nproc}", *where]

    def build_environment(self, config: dict[str, Any]) -> dict[str, str]:
        """Axolotl's environment: `accelerate` on PATH, the plugin on PYTHONPATH."""
        folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PATH": folders, "PYTHONPATH": modules}
        if self.processes > 1 and not hardware.detect_host().gpus:
            # Without the variable each process silently trains alone; with accelerate's, it
            # silently leaves DeepSpeed out. callbacks.Watch detects both.
            cpu = {"DS_ACCELERATOR": "cpu"} if config.get("deepspeed") else None
            environment |= cpu or {"ACCELERATE_USE_CPU": "true"}
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.nproc))
        # Slurm's SIGTERM also reaches torchrun, which would kill its processes after 30 seconds.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
        if config.get("use_wandb") or config.get("wandb_project"):  # either turns it on
            environment["WANDB_MODE"] = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            environment["WANDB_DIR"] = str(ROOT / config["output_dir"])
        if config.get("use_trackio"):
            environment.pop("TRACKIO_DISABLED", None)
            environment["TRACKIO_DIR"] = str(ROOT / config["output_dir"] / "trackio")
        return environment
