"""Makes `.venv` with everything that the project needs; does nothing where it is up to date.

    python3 -m tools.setup [--python python3.12] [--torch cpu|cuda] [--wheelhouse DIR]
    python3 -m tools.setup --make-wheelhouse DIR     every package as a file, for another machine
    python3 -m tools.setup --lock                    resolves requirements/python-3.*.txt anew

Runs before there is an environment, on any Python 3.8 or newer, so it uses the standard library
alone. uv installs where it is on PATH, pip otherwise, both from the same lock. The environment
counts as ready once `.venv/.ready` holds the digest of the requirement files and while every
package that it names is there: an interrupted set-up goes on, a changed one is redone, a damaged
one is repaired.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / ".ready"
LOG = VENV / "setup.log"
REQUIREMENTS = "requirements.txt"
MODEL = "requirements/model.txt"
OVERRIDES = "requirements/overrides.txt"  # for the locks
SUMS = "SHA256SUMS"  # of a wheelhouse
# Packages of a lock that torch's CUDA build alone requires.
CUDA_ONLY = re.compile(r"(nvidia-(?!ml-py)|cuda-)")

# Best first: 3.12 and 3.13 have the newest Axolotl, and more was tested on 3.12.
SUPPORTED = ["3.12", "3.13", "3.11"]
# Decimal gigabytes that the set-up needs while it runs: packages and their downloads.
DISK = {"cpu": 6, "cuda": 11}
# pip's settings and what uv calls them. uv reads none of pip's by itself.
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


def fail(message: str) -> None:
    sys.exit("error: " + message)


def say(message: str) -> None:
    print("setup      " + message, flush=True)


# ---- Interpreters


def probe(interpreter: str) -> str | None:
    """The version of an interpreter; None where it does not start or cannot make environments."""
    try:
        done = subprocess.run([interpreter, "-c", PROBE], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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
    options = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    command = [interpreter, "-m", "pip", *options, "--disable-pip-version-check"]
    return subprocess.run([*command, torch_pin() + "+cpu"], capture_output=True).returncode == 0


def choose_interpreter(named: str, build: str) -> tuple[str, str, str]:
    """(path, version, reason) of the interpreter that `.venv` is made with."""
    if named:
        path = shutil.which(str(Path(named).expanduser()))
        version = probe(path) if path else None
        if not path or not version:
            fail(f"PYTHON={named} is no Python that starts and has the module venv")
        elif series(version) not in SUPPORTED:
            fail(f"PYTHON={named} is Python {version}; {' or '.join(sorted(SUPPORTED))} is needed")
        else:
            return path, version, "PYTHON"
    here = list_interpreters()
    usable = {series(version): path for path, version in reversed(here.items())}
    usable = {version: usable[version] for version in SUPPORTED if version in usable}
    if not usable:
        others = ", ".join(sorted(set(here.values()))) or "none"
        fail(
            f"Python {', '.join(sorted(SUPPORTED))} is needed with its module venv; here: {others}."
            " Install one (Debian, Ubuntu: apt install python3.12-venv; Fedora: dnf install"
            " python3.12; else pyenv install 3.12) or name one: make setup PYTHON=/path/to/python"
        )
    best = next(iter(usable))
    reason = "it has the newest Axolotl" if best != "3.11" else "no newer one is here"
    if build == "cpu" and len(usable) > 1:
        with_build = [version for version, path in usable.items() if has_cpu_torch(path)]
        if with_build and best not in with_build:
            best = with_build[0]
            reason = "no GPU is here, and of those here only it is offered torch's CPU build"
    others = ", ".join(here[path] for version, path in usable.items() if version != best)
    reason += f"; also here: {others} (PYTHON=… names another)" if others else ""
    return usable[best], here[usable[best]], reason


# ---- What the environment holds


def lock_path(version: str) -> str:
    return f"requirements/python-{series(version)}.txt"


def torch_pin() -> str:
    lines = (ROOT / REQUIREMENTS).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith("torch=="))


def locked(version: str, build: str) -> list[str]:
    """The lock's lines for a build of torch, torch itself aside."""
    lines = (ROOT / lock_path(version)).read_text().splitlines()
    lines = [line for line in lines if "==" in line and not line.startswith("torch==")]
    return [line for line in lines if build == "cuda" or not CUDA_ONLY.match(line)]


def venv_version() -> str:
    """The Python version that `.venv` was made with; empty without one."""
    path = VENV / "pyvenv.cfg"
    text = path.read_text() if path.is_file() else ""
    match = re.search(r"^version(?:_info)? *= *(\d+\.\d+\.\d+)", text, re.M)
    return match.group(1) if match else ""


def digest(version: str) -> str:
    """SHA-256 of what an environment for this Python version is made from."""
    names = [REQUIREMENTS, lock_path(version), MODEL]
    content = b"".join((ROOT / name).read_bytes() for name in names)
    return hashlib.sha256(content + version.encode()).hexdigest()


def list_packages() -> set[str]:
    """Names of the packages' metadata folders in the environment."""
    return {path.name for path in VENV.glob("lib/python3.*/site-packages/*.dist-info")}


def installed_build() -> str:
    """`cpu` or `cuda`: which torch the environment holds; empty without one."""
    names = [name for name in list_packages() if name.startswith("torch-")]
    return ("cpu" if "+cpu" in names[0] else "cuda") if names else ""


def ready(build: str = "") -> bool:
    """Whether `.venv` is complete and, where `build` is named, holds that build of torch."""
    version = venv_version()
    if not (READY.is_file() and PYTHON.exists() and series(version) in SUPPORTED):
        return False
    recorded, *packages = READY.read_text().splitlines()
    complete = recorded == digest(version) and list_packages() >= set(packages)
    return complete and build in ("", installed_build())


def healthy() -> bool:
    """Whether the environment's interpreter starts (a moved or half-made one does not)."""
    try:
        return subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


# ---- Installing


def pip_settings(interpreter: str | Path) -> dict[str, str]:
    """pip's own settings, from its files and the environment, which counts most."""
    command = [str(interpreter), "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    rows = [re.match(r"(\S+?)\.([\w-]+)=('.*'|\".*\")$", line) for line in lines]
    settings: dict[str, str] = {}
    for scope in ("global", "install", ":env:"):
        for row in rows:
            if row and row.group(1) == scope:
                settings[row.group(2)] = ast.literal_eval(row.group(3))
    return settings


def uv_environment(interpreter: str | Path, only_torch: bool = False) -> dict[str, str]:
    """The environment that makes uv look where pip would; what UV_ variables say stays.

    Extra indexes are asked for torch alone: pip merges the files of all indexes, and uv takes a
    version's files from the first index that has it, even if that one lacks the right wheel.
    """
    environment = {"UV_HTTP_TIMEOUT": "180"}
    environment.update({"UV_INDEX_STRATEGY": "unsafe-best-match"} if only_torch else {})
    for name, value in pip_settings(interpreter).items():
        if name in UV_NAMES and (only_torch or name != "extra-index-url"):
            separator = "," if name == "find-links" else " "
            environment[UV_NAMES[name]] = separator.join(value.split())
    return {**environment, **os.environ}


class Installer:
    """Installs into `.venv` with uv or pip; all output goes to the log, one line to the screen."""

    def __init__(self, wheelhouse: Path | None) -> None:
        self.wheelhouse = wheelhouse
        self.uv = shutil.which("uv")

    def command(self, arguments: list[str], uv: str | None) -> tuple[list[str], dict[str, str]]:
        """The command line and environment of an installation."""
        source = ["--no-index", "--find-links", str(self.wheelhouse)] if self.wheelhouse else []
        source.append("--no-deps")  # the lock names every package
        if uv:
            options = ["pip", "install", "--python", str(PYTHON), *source]
            only_torch = arguments[0].startswith("torch==")
            return [uv, *options, *arguments], uv_environment(PYTHON, only_torch)
        # Compiling 290 packages takes a minute; Python compiles what is imported when it is.
        options = ["-m", "pip", "install", "--disable-pip-version-check", "--no-compile", *source]
        return [str(PYTHON), *options, *arguments], dict(os.environ)

    def install(self, label: str, *arguments: str, must: bool = True) -> bool:
        """Installs; True where that succeeded. Where uv fails, pip tries the same."""
        start = time.monotonic()
        for uv in [self.uv, None] if self.uv and must else [self.uv]:
            command, environment = self.command(list(arguments), uv)
            if run_logged(label, command, environment):
                say(f"{label} done in {time.monotonic() - start:.0f} s{'':<60}")
                return True
            if uv and must:
                say(f"uv could not install {label} (.venv/setup.log says why); trying pip")
        if must:
            lines = [line for line in LOG.read_text().splitlines() if line.strip()]
            print("\n".join(map(hide_secrets, lines[-8:])), file=sys.stderr)
            fail(f"{label} could not be installed; .venv/setup.log says why; `make setup` goes on")
        return False


def hide_secrets(line: str) -> str:
    """A line without the passwords of the URLs in it."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", line)


def run_logged(label: str, command: list[str], environment: dict[str, str]) -> bool:
    """Runs a command with its output in the log and its progress on one line."""
    steps = r"\s*(Collecting|Downloading|Building|Installing|Resolved|Prepared|Installed) [^\s(]+"
    start, last, step = time.monotonic(), 0.0, ""
    with open(LOG, "a") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert process.stdout
        for line in process.stdout:
            log.write(hide_secrets(line))
            match = re.match(steps, line)
            step = match.group().strip()[:60] if match else step
            now = time.monotonic()
            if now - last > (0.2 if sys.stdout.isatty() else 20):
                end = "\r" if sys.stdout.isatty() else "\n"
                text = f"setup      {label} {now - start:4.0f} s  {step:<60}".rstrip()
                print(f"{text:<90}" if end == "\r" else text, end=end, flush=True)
                last = now
    return process.wait() == 0


def set_up(named: str, build: str, wheelhouse: Path | None) -> None:
    """Makes or repairs `.venv`."""
    wanted = build or ("cuda" if shutil.which("nvidia-smi") else "")
    same_python = not named or probe(named) == venv_version()
    if same_python and ready(wanted):
        READY.touch()
        return
    if wanted and installed_build() not in ("", wanted):
        say(f".venv holds torch's {installed_build()} build; it is made anew for {wanted}")
        shutil.rmtree(VENV)
    if not named and healthy() and series(venv_version()) in SUPPORTED:
        version, reason = venv_version(), "that of .venv"
    else:
        interpreter, version, reason = choose_interpreter(named, wanted or "cpu")
        if not healthy() or version != venv_version():
            shutil.rmtree(VENV, ignore_errors=True)
            done = subprocess.run([interpreter, "-m", "venv", VENV], capture_output=True, text=True)
            if done.returncode:
                fail(f"{interpreter} cannot make a virtual environment; install its venv package")
    READY.unlink(missing_ok=True)
    installer = Installer(wheelhouse)
    say(f"Python {version}: {reason}")
    say(f"installing with {'uv' if installer.uv else 'pip'} from {lock_path(version)}")
    check_disk(wanted or "cpu")
    if wheelhouse:
        verify_wheelhouse(wheelhouse)
    LOG.write_text("")
    torch = torch_pin()
    cpu = wanted != "cuda" and installer.install("torch, CPU build", torch + "+cpu", must=False)
    if not cpu:
        if wanted == "cpu":
            fail("TORCH=cpu: no CPU build of torch is offered; docs/install.md says where it is")
        if not wanted:
            say("no CPU build of torch is offered here; the CUDA build takes its place")
        check_disk("cuda")
        installer.install("torch, CUDA build", torch)
    lock = VENV / "lock.txt"
    lock.write_text("\n".join(locked(version, "cpu" if cpu else "cuda")) + "\n")
    installer.install("packages", "-r", str(lock), "-r", MODEL)
    READY.write_text("\n".join([digest(version), *sorted(list_packages())]) + "\n")


def check_disk(build: str) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK[build]:
        fail(f"{free:.1f} GB are free on this disk and the set-up needs {DISK[build]}")


# ---- A wheelhouse: every package as a file, for machines without a package index


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each wheel in a folder, by its name."""
    result = {}
    for path in sorted(folder.glob("*.whl")):
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                sha.update(block)
        result[path.name] = sha.hexdigest()
    return result


def verify_wheelhouse(folder: Path) -> None:
    """Stops unless a wheelhouse holds exactly the files that its SHA256SUMS names."""
    if not (folder / SUMS).is_file():
        fail(f"{folder} has no {SUMS}; `make wheelhouse` on a machine with an index makes one")
    rows = (line.split() for line in (folder / SUMS).read_text().splitlines())
    recorded = {name: value for value, name in rows}
    actual = sums(folder)
    for name in sorted(recorded.keys() | actual.keys()):
        if recorded.get(name) != actual.get(name):
            fail(f"{folder / name} is missing, added or not what {SUMS} records; copy it again")


def make_wheelhouse(folder: Path, build: str) -> None:
    """Collects every package for this machine's kind and `.venv`'s Python; builds what has no
    wheel."""
    if not ready():
        fail("`make setup` comes first: a wheelhouse is for the Python version of .venv")
    build = build or installed_build()
    check_disk(build)
    version = venv_version()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"collecting wheels for Python {series(version)}, torch's {build} build, in {folder}")
    torch = torch_pin() + ("+cpu" if build == "cpu" else "")
    lock = VENV / "wheelhouse.txt"
    lock.write_text("\n".join([torch, *locked(version, build)]) + "\n")
    pip = [str(PYTHON), "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "-w", str(folder), "-r", str(lock), "-r", MODEL]
    if not run_logged("packages", command, dict(os.environ)):
        fail("the wheels could not be collected; .venv/setup.log says why")
    wheels = sums(folder)
    text = "".join(f"{value}  {name}\n" for name, value in wheels.items())
    part = folder / (SUMS + ".part")
    part.write_text(text)
    part.replace(folder / SUMS)
    size = sum((folder / name).stat().st_size for name in wheels) / 1e9
    say(f"{len(wheels)} wheels, {size:.1f} GB; on the other machine: make setup WHEELHOUSE=…")


# ---- Locks


def write_locks() -> None:
    """Resolves requirements.txt for every supported Python with torch's CUDA build, on Linux.

    The CPU build of torch requires a subset of what the CUDA build does.
    """
    uv = VENV / "bin" / "uv"
    for version in sorted(SUPPORTED):
        path = ROOT / lock_path(version)
        command = [str(uv), "pip", "compile", REQUIREMENTS, "--no-annotate", "--no-header"]
        command += ["--python-version", version, "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--override", OVERRIDES]
        # Without --upgrade what the file says stays as it is where it still resolves.
        command += ["--output-file", str(path)]
        done = subprocess.run(
            command, cwd=ROOT, env=uv_environment(PYTHON), capture_output=True, text=True
        )
        if done.returncode:
            fail(f"{lock_path(version)}: {hide_secrets(done.stderr.strip())[-300:]}")
        say(f"{lock_path(version)} resolved: {len(path.read_text().splitlines())} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description="make .venv")
    parser.add_argument("--python", default="", help="the interpreter; the best one without it")
    parser.add_argument("--torch", default="", help="cpu or cuda; by this machine without it")
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
        fail("interrupted; `make setup` goes on from here")
