"""Makes `.venv` with everything that the project needs; does nothing where it is up to date.

    python3 -m tools.setup [--python python3.12] [--torch cpu|cuda] [--wheelhouse DIR]
    python3 -m tools.setup --make-wheelhouse DIR     every package as a file, for another machine
    python3 -m tools.setup --lock                    resolves requirements/python-3.*.txt again

Uses only the standard library and runs on Python 3.8 or newer, because there is no environment yet.
uv installs where it is on PATH, else pip, both from the same lock. The environment is ready while
`.venv/.ready` holds the digest of the requirement files and every package that it lists is present:
an interrupted set-up continues, a changed one is redone, a damaged one is repaired.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = "requirements.txt"
MODEL = "requirements/model.txt"
OVERRIDES = "requirements/overrides.txt"  # for the locks
SUMS = "SHA256SUMS"  # of a wheelhouse
# Packages of a lock that only torch's CUDA build requires.
CUDA_ONLY = re.compile(r"(nvidia-(?!ml-py)|cuda-)")

# Best first: 3.12 and 3.13 have the newest Axolotl, and 3.12 is tested more.
SUPPORTED = ["3.12", "3.13", "3.11"]
# Decimal gigabytes that the set-up needs while it runs: packages and their downloads.
DISK = {"cpu": 6, "cuda": 11}
# pip's settings and uv's names for them; uv reads none of pip's.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
PROBE = "import sys, venv, ensurepip; print(sys.version.split()[0])"
PIP_OPTION = "--disable-pip-version-check"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, whether it exists or not."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder / "setup.log"

    @property
    def ready_file(self) -> Path:
        """Holds the digest of what the environment was made from, and its packages."""
        return self.folder / ".ready"

    @property
    def version(self) -> str:
        """The Python version that it was made with; "" where it does not exist."""
        path = self.folder / "pyvenv.cfg"
        text = path.read_text() if path.is_file() else ""
        match = re.search(r"^version(?:_info)? *= *(\d+\.\d+\.\d+)", text, re.M)
        return match.group(1) if match else ""

    def list_packages(self) -> set[str]:
        """Names of the packages' metadata folders."""
        return {path.name for path in self.folder.glob("lib/python3.*/site-packages/*.dist-info")}

    @property
    def torch_build(self) -> str:
        """`cpu` or `cuda`: which torch it holds; "" without one."""
        names = [name for name in self.list_packages() if name.startswith("torch-")]
        return ("cpu" if "+cpu" in names[0] else "cuda") if names else ""

    def holds(self, digest: str) -> bool:
        """Whether it is complete, and was made from what has this digest."""
        if not (self.ready_file.is_file() and self.python.exists()):
            return False
        recorded, *packages = self.ready_file.read_text().splitlines()
        return recorded == digest and self.list_packages() >= set(packages)

    def record(self, digest: str) -> None:
        lines = [digest, *sorted(self.list_packages())]
        self.ready_file.write_text("\n".join(lines) + "\n")


VENV = Environment(ROOT / ".venv")


def fail(message: str) -> NoReturn:
    sys.exit("error: " + message)


def say(message: str) -> None:
    print("setup      " + message, flush=True)


def run_quietly(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a command; exit status 127 where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return subprocess.CompletedProcess(command, 127, "", "")


# ---- Interpreters


def probe(interpreter: str) -> str:
    """The version of an interpreter; "" where it does not start or cannot make environments."""
    process = run_quietly([interpreter, "-c", PROBE])
    return "" if process.returncode else process.stdout.strip()


def series(version: str) -> str:
    """`3.12` of `3.12.1`."""
    return ".".join(version.split(".")[:2])


def list_interpreters() -> dict[str, str]:
    """Every Python 3 of this machine, {path: version}: those on PATH, and pyenv's."""
    names = ["python" + version for version in SUPPORTED] + ["python3", "python"]
    paths = [path for path in map(shutil.which, names) if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    paths += [str(path) for path in sorted(pyenv.glob("3.*/bin/python"), reverse=True)]
    versions: dict[str, str] = {}
    for path in [*paths, sys.executable]:
        version = probe(path)
        if version and version not in versions.values():
            versions[path] = version
    return versions


def has_cpu_torch(interpreter: str) -> bool:
    """Whether pip offers this interpreter torch's CPU build."""
    options = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", PIP_OPTION]
    return run_quietly([interpreter, "-m", "pip", *options, torch_pin() + "+cpu"]).returncode == 0


def choose_interpreter(named: str, build: str) -> tuple[str, str, str]:
    """(path, version, reason) of the interpreter that `.venv` is made with."""
    if named:
        path = shutil.which(str(Path(named).expanduser()))
        version = probe(path) if path else ""
        if not path or not version:
            fail(f"PYTHON={named} is no Python that starts and has the module venv")
        if series(version) not in SUPPORTED:
            fail(f"PYTHON={named} is Python {version}; {' or '.join(sorted(SUPPORTED))} is needed")
        return path, version, "PYTHON"
    here = list_interpreters()
    by_series = {series(version): path for path, version in reversed(here.items())}
    usable = [by_series[version] for version in SUPPORTED if version in by_series]
    if not usable:
        others = ", ".join(sorted(set(here.values()))) or "none"
        fail(
            f"Python {', '.join(sorted(SUPPORTED))} is needed with its module venv; here: {others}."
            " Install one (Debian, Ubuntu: apt install python3.12-venv; Fedora: dnf install"
            " python3.12; else pyenv install 3.12) or name one: make setup PYTHON=/path/to/python"
        )
    best = usable[0]
    newest = series(here[best]) != "3.11"
    reason = "it has the newest Axolotl" if newest else "no newer one is here"
    if build == "cpu" and len(usable) > 1:
        with_cpu_torch = next(filter(has_cpu_torch, usable), best)
        if with_cpu_torch != best:
            best = with_cpu_torch
            reason = "no GPU is here, and pip offers torch's CPU build for it"
    others = ", ".join(here[path] for path in usable if path != best)
    reason += f"; also here: {others} (PYTHON=… names another)" if others else ""
    return best, here[best], reason


# ---- What the environment holds


def lock_path(version: str) -> str:
    return f"requirements/python-{series(version)}.txt"


def torch_pin() -> str:
    lines = (ROOT / REQUIREMENTS).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith("torch=="))


def write_lock(path: Path, version: str, build: str, *first: str) -> None:
    """Writes `first` and the lock's lines for a build of torch, without torch itself."""
    lines = (ROOT / lock_path(version)).read_text().splitlines()
    lines = [line for line in lines if "==" in line and not line.startswith("torch==")]
    lines = [line for line in lines if build == "cuda" or not CUDA_ONLY.match(line)]
    path.write_text("\n".join([*first, *lines]) + "\n")


def digest_requirements(version: str) -> str:
    """SHA-256 of what an environment for this Python version is made from."""
    names = [REQUIREMENTS, lock_path(version), MODEL]
    content = b"".join((ROOT / name).read_bytes() for name in names)
    return hashlib.sha256(content + version.encode()).hexdigest()


def ready(build: str = "") -> bool:
    """Whether `.venv` is complete and, where `build` is named, holds that build of torch."""
    version = VENV.version
    if series(version) not in SUPPORTED or not VENV.holds(digest_requirements(version)):
        return False
    return build in ("", VENV.torch_build)


# ---- Installing


def uv_environment(interpreter: str | Path, only_torch: bool = False) -> dict[str, str]:
    """The environment that makes uv look where pip would; existing UV_ variables take precedence.

    Extra indexes serve torch only: pip merges the files of all indexes, but uv takes a version's
    files from the first index that has it, even if that one lacks the right wheel.
    """
    environment = {"UV_HTTP_TIMEOUT": "180"}
    environment.update({"UV_INDEX_STRATEGY": "unsafe-best-match"} if only_torch else {})
    lines = run_quietly([interpreter, "-m", "pip", "config", "list"]).stdout.splitlines()
    rows = [re.match(r"(global|install|:env:)\.([\w-]+)=('.*'|\".*\")$", line) for line in lines]
    # The environment takes precedence over the section for `install`, and that over the global one.
    for row in sorted(filter(None, rows), key=lambda row: "gi:".index(row.group(1)[0])):
        name = row.group(2)
        if name in UV_NAMES and (only_torch or name != "extra-index-url"):
            separator = "," if name == "find-links" else " "
            environment[UV_NAMES[name]] = separator.join(ast.literal_eval(row.group(3)).split())
    return {**environment, **os.environ}


class Installer:
    """Installs into an environment with uv or pip; output goes to its log, a line to the screen."""

    def __init__(self, venv: Environment, wheelhouse: Path | None) -> None:
        self.venv = venv
        self.source = ["--no-deps"]  # the lock names every package
        if wheelhouse:
            self.source += ["--no-index", "--find-links", str(wheelhouse)]
        self.uv = shutil.which("uv")

    def install(self, label: str, *arguments: str, must: bool = True) -> bool:
        """Installs; True where that succeeded. Where uv fails, pip tries the same."""
        start = time.monotonic()
        uv = [self.uv, "pip", "install", "--python", str(self.venv.python)] if self.uv else []
        # Compiling 290 packages takes a minute; Python compiles what is imported anyway.
        python = self.venv.python
        pip = [str(python), "-m", "pip", "install", PIP_OPTION, "--no-compile"]
        log = shown(self.venv.log)
        for command in [uv, pip] if uv and must else [uv or pip]:
            only_torch = arguments[0].startswith("torch==")
            environment = uv_environment(python, only_torch) if command is uv else dict(os.environ)
            line = [*command, *self.source, *arguments]
            if run_logged(label, line, environment, self.venv.log):
                say(f"{label} done in {time.monotonic() - start:.0f} s{'':<60}")
                return True
            if command is uv and must:
                say(f"uv could not install {label} ({log} says why); trying pip")
        if must:
            lines = [line for line in self.venv.log.read_text().splitlines() if line.strip()]
            print("\n".join(map(hide_secrets, lines[-8:])), file=sys.stderr)
            fail(f"{label} could not be installed; {log} says why; the same command continues")
        return False


def shown(path: Path) -> str:
    """A path as messages name it: below the project, without the project's."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def hide_secrets(line: str) -> str:
    """A line without the passwords of the URLs in it."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", line)


def run_logged(label: str, command: list[str], environment: dict[str, str], log: Path) -> bool:
    """Runs a command with its output in the log and its progress on one line."""
    steps = r"\s*(Collecting|Downloading|Building|Installing|Resolved|Prepared|Installed) [^\s(]+"
    start, last, step = time.monotonic(), 0.0, ""
    on_terminal = sys.stdout.isatty()
    with open(log, "a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout or ():
            file.write(hide_secrets(line))
            match = re.match(steps, line)
            step = match.group().strip()[:60] if match else step
            now = time.monotonic()
            if now - last > (0.2 if on_terminal else 20):
                text = f"setup      {label} {now - start:4.0f} s  {step:<60}".rstrip()
                print(f"{text:<90}" if on_terminal else text, end="\r" if on_terminal else "\n")
                sys.stdout.flush()
                last = now
    return process.wait() == 0


def make_venv(venv: Environment, named: str, build: str) -> tuple[str, str]:
    """Makes an environment, or keeps one that works; returns (its Python version, the reason)."""
    # An environment that was moved or half made does not start.
    works = run_quietly([venv.python, "-c", "import pip"]).returncode == 0
    if works and not named and series(venv.version) in SUPPORTED:
        return venv.version, f"that of {venv.folder.name}"
    interpreter, version, reason = choose_interpreter(named, build)
    if not works or version != venv.version:
        shutil.rmtree(venv.folder, ignore_errors=True)
        if run_quietly([interpreter, "-m", "venv", venv.folder]).returncode:
            fail(f"{interpreter} cannot make a virtual environment; install its venv package")
    return version, reason


def set_up(named: str, build: str, wheelhouse: Path | None) -> None:
    """Makes or repairs `.venv`."""
    build = build or ("cuda" if shutil.which("nvidia-smi") else "")
    if (not named or probe(named) == VENV.version) and ready(build):
        VENV.ready_file.touch()
        return
    if build and VENV.torch_build not in ("", build):
        say(f".venv holds torch's {VENV.torch_build} build; it is made again for {build}")
        shutil.rmtree(VENV.folder)
    version, reason = make_venv(VENV, named, build or "cpu")
    VENV.ready_file.unlink(missing_ok=True)
    installer = Installer(VENV, wheelhouse)
    say(f"Python {version}: {reason}")
    say(f"installing with {'uv' if installer.uv else 'pip'} from {lock_path(version)}")
    require_space(build or "cpu")
    if wheelhouse:
        verify_wheelhouse(wheelhouse)
    VENV.log.write_text("")
    torch = torch_pin()
    cpu = build != "cuda" and installer.install("torch, CPU build", torch + "+cpu", must=False)
    if not cpu:
        if build == "cpu":
            fail("TORCH=cpu: no CPU build of torch is offered; docs/install.md says where it is")
        if not build:
            say("no CPU build of torch is offered here; installing the CUDA build")
        require_space("cuda")
        installer.install("torch, CUDA build", torch)
    lock = VENV.folder / "lock.txt"
    write_lock(lock, version, "cpu" if cpu else "cuda")
    installer.install("packages", "-r", str(lock), "-r", MODEL)
    VENV.record(digest_requirements(version))


def require_space(build: str) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK[build]:
        fail(f"{free:.1f} GB are free on this disk and the set-up needs {DISK[build]}")


# ---- A wheelhouse: every package as a file, for machines without a package index


def list_sums(folder: Path) -> str:
    """SHA-256 and name of each wheel in a folder, as `sha256sum` prints them."""
    lines = []
    for path in sorted(folder.glob("*.whl")):
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                sha.update(block)
        lines.append(f"{sha.hexdigest()}  {path.name}\n")
    return "".join(lines)


def verify_wheelhouse(folder: Path) -> None:
    """Stops unless a wheelhouse holds exactly the files that its SHA256SUMS names."""
    if not (folder / SUMS).is_file():
        fail(f"{folder} has no {SUMS}; `make wheelhouse` on a machine with an index makes one")
    recorded = (folder / SUMS).read_text().splitlines()
    for line in sorted(set(recorded) ^ set(list_sums(folder).splitlines())):
        name = line.split()[-1]
        fail(f"{folder / name} is missing, added or not what {SUMS} records; copy it again")


def make_wheelhouse(folder: Path, build: str) -> None:
    """Collects a wheel of every package for this kind of machine and `.venv`'s Python."""
    if not ready():
        fail("`make setup` comes first: a wheelhouse is for the Python version of .venv")
    build = build or VENV.torch_build
    require_space(build)
    version = VENV.version
    folder.mkdir(parents=True, exist_ok=True)
    say(f"collecting wheels for Python {series(version)}, torch's {build} build, in {folder}")
    lock = VENV.folder / "wheelhouse.txt"
    write_lock(lock, version, build, torch_pin() + ("+cpu" if build == "cpu" else ""))
    pip = [str(VENV.python), "-m", "pip", "wheel", PIP_OPTION, "--no-deps"]
    command = [*pip, "-w", str(folder), "-r", str(lock), "-r", MODEL]
    if not run_logged("packages", command, dict(os.environ), VENV.log):
        fail("the wheels could not be collected; .venv/setup.log says why")
    part = folder / (SUMS + ".part")
    part.write_text(list_sums(folder))
    part.replace(folder / SUMS)
    sizes = [path.stat().st_size for path in folder.glob("*.whl")]
    say(
        f"{len(sizes)} wheels, {sum(sizes) / 1e9:.1f} GB; on the other machine: "
        "make setup WHEELHOUSE=…"
    )


# ---- Locks


def write_locks() -> None:
    """Resolves requirements.txt for every supported Python with torch's CUDA build, on Linux.

    The CPU build of torch requires a subset of what the CUDA build does.
    """
    for version in sorted(SUPPORTED):
        environment = uv_environment(VENV.python)
        options = ["--python-version", version, "--override", OVERRIDES]
        write_resolved(lock_path(version), REQUIREMENTS, options, environment)


def write_resolved(
    lock: str, requirements: str, options: list[str], environment: dict[str, str]
) -> None:
    """Resolves a file of requirements for Linux with uv; writes the lock."""
    command = [str(VENV.folder / "bin" / "uv"), "pip", "compile", requirements]
    command += ["--python-platform", "x86_64-manylinux_2_28", *options]
    # Without --upgrade, versions in the file stay where they still resolve.
    command += ["--no-annotate", "--no-header", "--output-file", lock]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        fail(f"{lock}: {hide_secrets(process.stderr.strip())[-300:]}")
    say(f"{lock} resolved: {len((ROOT / lock).read_text().splitlines())} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description="make .venv")
    parser.add_argument("--python", default="", help="the interpreter; the best one if omitted")
    parser.add_argument("--torch", default="", help="cpu or cuda; chosen for this machine")
    parser.add_argument("--wheelhouse", default="", help="a folder from `make wheelhouse`")
    parser.add_argument("--make-wheelhouse", default="", metavar="DIR")
    parser.add_argument("--lock", action="store_true")
    options = parser.parse_args()
    if options.torch not in ("", "cpu", "cuda"):
        fail(f"TORCH={options.torch}: cpu or cuda is needed")
    wheelhouse = Path(options.wheelhouse).expanduser().resolve() if options.wheelhouse else None
    if wheelhouse and not wheelhouse.is_dir():
        fail(f"WHEELHOUSE={options.wheelhouse} is no folder")
    if options.lock:
        write_locks()
    elif options.make_wheelhouse:
        make_wheelhouse(Path(options.make_wheelhouse).expanduser().resolve(), options.torch)
    else:
        set_up(options.python, options.torch, wheelhouse)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; `make setup` continues from here")
