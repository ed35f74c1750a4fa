"""Set-up: locks that resolve for both builds of torch, the choice of a Python, indexes."""

import base64
import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import run_first, serve_files
from tools import setup
from tools.common import ROOT

UV = Path(sys.executable).parent / "uv"
VERSIONS = sorted(setup.SUPPORTED)


def write_wheel(folder: Path, name: str, version: str, requires: list[str] | None = None) -> Path:
    """A wheel of one empty module."""
    info, module = f"{name}-{version}.dist-info", f"{name}.py"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires or [])
    files = {
        module: "",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()},\n"
        for path, text in files.items()
    )
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)
    return target


# ---- the locks


@functools.cache
def index_is_missing() -> str | None:
    """Why nothing can be resolved here; None where it can."""
    if not UV.exists():
        return "uv is not in .venv; `make setup`"
    command = [str(UV), "pip", "compile", "-", "--no-header"]
    done = subprocess.run(
        command,
        input="packaging==26.0",
        capture_output=True,
        text=True,
        env=setup.uv_environment(sys.executable),
    )
    return None if done.returncode == 0 else "no package index can be reached"


def cpu_torch_requires() -> list[str]:
    """What torch's CPU build requires: what the CUDA build does, without CUDA and triton."""
    lines = importlib.metadata.requires("torch") or []
    return [
        line for line in lines if not re.match(r"nvidia|cuda|triton", line) and "extra" not in line
    ]


def resolve(version: str, folder: Path, *torch: str) -> set[str]:
    """The packages that requirements.txt and a lock give together, lower case."""
    if reason := index_is_missing():
        pytest.skip(reason)
    wanted = folder / "wanted.txt"
    wanted.write_text((ROOT / setup.REQUIREMENTS).read_text() + "\n".join(torch))
    command = [str(UV), "pip", "compile", str(wanted), "-c", setup.lock_path(version)]
    command += ["--override", setup.OVERRIDES, "--python-version", version]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate"]
    command += ["--find-links", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=setup.uv_environment(sys.executable) | {"UV_INDEX_STRATEGY": "unsafe-best-match"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.strip().lower() for line in done.stdout.splitlines() if "==" in line}


def lock(version: str) -> set[str]:
    lines = (ROOT / setup.lock_path(version)).read_text().lower().splitlines()
    return {line for line in lines if "==" in line}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_lock_is_what_the_cuda_build_of_torch_resolves_to(version, tmp_path):
    assert resolve(version, tmp_path) == lock(version)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cpu_build_takes_the_lock_without_the_packages_for_cuda(version, tmp_path):
    # The index offers no CPU build for every Python; its requirements are the same for all.
    number = setup.torch_pin().partition("==")[2]
    write_wheel(tmp_path, "torch", f"{number}+cpu", cpu_torch_requires())
    resolved = resolve(version, tmp_path, f"torch=={number}+cpu")
    expected = {line for line in lock(version) if not setup.CUDA_ONLY.match(line)}
    expected = expected - {f"torch=={number}"} | {f"torch=={number}+cpu"}
    # A package that nothing requires without CUDA may stay in the lock; none may be missing.
    assert resolved <= expected
    assert {name for name in expected - resolved if not name.startswith("setuptools")} == set()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_pin_of_the_requirements_is_in_the_lock(version):
    pins = {
        line.split()[0].split(";")[0].lower()
        for line in (ROOT / "requirements.txt").open()
        if "==" in line.split("#")[0]
    }
    names = {pin.split("==")[0].replace("_", "-") for pin in pins}
    locked = {line.split("==")[0].replace("_", "-") for line in lock(version)}
    assert names <= locked
    older = version == "3.11"
    assert f"axolotl=={'0.19.0' if older else '0.21.0'}" in lock(version)


# ---- the interpreter


def stand_in(folder: Path, name: str, version: str) -> Path:
    """A program that answers as an interpreter of that version does."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only(tmp_path, monkeypatch):
    """A PATH with nothing but the stand-ins that a test makes."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    return functools.partial(stand_in, tmp_path)


def test_the_newest_axolotl_comes_first(only):
    for version in ("3.11.7", "3.12.1", "3.13.0"):
        only(f"python{setup.series(version)}", version)
    path, version, reason = setup.choose_interpreter("", "cuda")
    assert (Path(path).name, version) == ("python3.12", "3.12.1")
    assert "newest Axolotl" in reason and "3.11.7" in reason and "3.13.0" in reason


def test_without_a_gpu_the_python_that_has_the_cpu_build_comes_first(only):
    only("python3.11", "3.11.7")
    only("python3.12", "3.12.1").write_text("#!/bin/sh\n[ $1 = -c ] && echo 3.12.1 || exit 1\n")
    path, version, reason = setup.choose_interpreter("", "cpu")
    assert version == "3.11.7" and "CPU build" in reason


def test_none_that_fits_is_one_line_with_what_to_install(only, capsys):
    only("python3", "3.9.18")
    with pytest.raises(SystemExit) as error:
        setup.choose_interpreter("", "cpu")
    message = str(error.value)
    assert "3.11, 3.12, 3.13" in message and "3.9.18" in message and "apt install" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [("/no/such/python", "no Python that starts"), ("python3.9", "Python 3.9.18")],
)
def test_a_named_python_that_does_not_fit_is_named(only, name, expected):
    only("python3.9", "3.9.18")
    with pytest.raises(SystemExit, match=expected):
        setup.choose_interpreter(name, "cpu")


def test_the_set_up_itself_runs_on_old_pythons():
    # It must be able to say which Python is needed; pyenv or the system may have an old one.
    old = [path for path in Path("~/.pyenv/versions").expanduser().glob("3.[89].*/bin/python")]
    if not old:
        pytest.skip("no Python 3.8 or 3.9 is here")
    done = subprocess.run(
        [old[0], "-m", "tools.setup", "--torch", "tpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "error: TORCH=tpu: cpu or cuda is needed\n", done.stderr


# ---- indexes and wheelhouses


@pytest.fixture
def private_index(tmp_path):
    """The address of a package index on loopback with a password and one package."""
    folder = tmp_path / "index" / "finlora-probe"
    folder.mkdir(parents=True)
    wheel = write_wheel(folder, "finlora_probe", "1.0")
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    with serve_files(folder.parent, "me:s3cret") as url:
        yield f"{url}/"


@pytest.mark.parametrize("tool", run_first(1, ["uv", "pip"]))
@pytest.mark.slow
def test_a_private_index_with_a_password_is_used_and_the_password_is_not_logged(
    tool, private_index, tmp_path, monkeypatch, capsys
):
    if tool == "uv" and not UV.exists():
        pytest.skip("uv is not in .venv")
    venv = setup.Environment(tmp_path / "venv")
    subprocess.run([sys.executable, "-m", "venv", venv.folder], check=True)
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nindex-url = {private_index}\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    installer = setup.Installer(venv, None)
    installer.uv = str(UV) if tool == "uv" else None
    venv.log.write_text("")
    assert installer.install("probe", "finlora-probe==1.0")
    assert list(venv.folder.glob("lib/python3*/site-packages/finlora_probe.py"))
    assert not installer.install("probe", "finlora-probe==2.0", must=False)
    written = venv.log.read_text() + capsys.readouterr().out
    assert "s3cret" not in written and written


def test_uv_hears_what_pip_is_told_and_its_own_variables_count_most(tmp_path, monkeypatch):
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nindex-url = https://mirror.example/simple\ntrusted-host = mirror.example\n"
        "extra-index-url =\n  https://a.example/cpu\n  https://b.example/cpu\n"
        "find-links = /wheels\ncert = /ca.pem\n"
    )
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_CERT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    environment = setup.uv_environment(sys.executable, only_torch=True)
    assert environment["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert environment["UV_INDEX"] == "https://a.example/cpu https://b.example/cpu"
    assert environment["UV_INSECURE_HOST"] == "mirror.example"
    assert environment["SSL_CERT_FILE"] == "/ca.pem"
    assert environment["UV_FIND_LINKS"] == "/mine"
    assert "UV_INDEX" not in setup.uv_environment(sys.executable)


def test_a_wheelhouse_that_was_changed_is_refused(tmp_path):
    wheel = write_wheel(tmp_path, "probe", "1.0")
    with pytest.raises(SystemExit, match="has no SHA256SUMS"):
        setup.verify_wheelhouse(tmp_path)
    (tmp_path / setup.SUMS).write_text(setup.list_sums(tmp_path))
    setup.verify_wheelhouse(tmp_path)
    checked = subprocess.run(["sha256sum", "-c", setup.SUMS], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0  # the format of coreutils
    added = write_wheel(tmp_path, "more", "1.0")
    with pytest.raises(SystemExit, match="more-1.0"):
        setup.verify_wheelhouse(tmp_path)
    added.unlink()
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="probe-1.0"):
        setup.verify_wheelhouse(tmp_path)


# ---- containers


def test_the_dockerfile_runs_the_commands_of_the_readme():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    readme = (ROOT / "README.md").read_text() + (ROOT / "docs" / "install.md").read_text()
    jobs = set(re.findall(r"\bmake ([a-z-]+)", re.sub(r"#.*", "", text)))
    assert {"setup"} <= jobs
    for job in jobs:
        assert f"make {job}" in readme
    for path in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", text, re.M):
        for name in path.split():
            assert (ROOT / name).exists(), name
    assert shutil.which("make")
