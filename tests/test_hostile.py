"""Every verb on a disk that is full or read-only, among another user's files, and with files from
the future: one line that says why, nothing lost, and no half file under a final name.

The project lies on a small disk of its own. A verb that failed is run once more with room, and what
it left behind must be what it writes then.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_adapter
from tests.hub_server import Hub
from tests.test_hub import RECIPE, REPO, finish, trained  # noqa: F401
from tools import common, recipes, sources

FUTURE = 4_000_000_000  # seconds since 1970: in the year 2096
SOMEBODY = 65534


@dataclass(frozen=True)
class Verb:
    arguments: tuple[str, ...]
    writes: bool = True
    room: int = 0  # bytes that the full disk still has, so that it fails half-way


VERBS = {
    "fetch": Verb(("fetch", "ner"), room=8192),
    "data": Verb(("data", "sentiment"), room=8192),
    "audit": Verb(("audit", "ner"), room=8192),
    "new": Verb(("new", "mine", "mine.jsonl"), room=131_072),
    "import": Verb(("import", "configs.json")),
    "render": Verb(("render",)),
    "recipes": Verb(("recipes",), writes=False),
    "plan": Verb(("plan", "sentiment_r4"), writes=False),
    "push": Verb(("push", RECIPE, "--namespace", "me"), writes=False),
    "pull": Verb(("pull", "--adapter", REPO), room=131_072),
    "chat": Verb(("chat", "", "Good?", "--adapter", "adapter"), writes=False),
    "merge": Verb(("merge", "--adapter", "adapter"), room=1_000_000),
    "serve": Verb(("serve", "--adapter", "adapter"), room=1_000_000),
}
LINES = {
    "full": r"no space left on the disk for (?!the output)",
    "read-only": r"is on a disk that is read-only|cannot be written to: Read-only",
    "of somebody else": r"no permission .*: \S+ belongs to \w+|cannot be written to: Permission",
}
# How many of its states `make test` tries a verb in that takes seconds; the others try all.
TRIED = {"chat": 0, "merge": 0, "serve": 0, "render": 0, "new": 0, "pull": 1, "push": 1, "audit": 1}
CASES = [
    pytest.param(verb, state, marks=[pytest.mark.slow] * (number >= TRIED.get(verb, 99)))
    for verb in VERBS
    for number, state in enumerate([*LINES, "from the future"])
    if not (verb == "serve" and state == "from the future")  # it would go on serving
]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def project(hub, smollm2, tiny, trained, tmp_path_factory) -> Path:  # noqa: F811
    """The project and what its verbs work on: rows, a config file, an adapter, a finished run."""
    root = tmp_path_factory.mktemp("hostile") / "project"
    root.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "local")
    for part in ("tools", "evals", "recipes", "data/sample", "docs", "results"):
        shutil.copytree(common.ROOT / part, root / part, ignore=skip)
    shutil.copy(common.ROOT / "Makefile", root)
    (root / "models").symlink_to(smollm2.parent)
    (root / "mirror").mkdir()
    (root / "mirror" / "data").symlink_to(sources.SAMPLE)
    table = yaml.safe_load((common.ROOT / "data" / "sources.yaml").read_text())
    for name, row in table["files"].items():
        if (path := sources.SAMPLE / name).is_file():
            row.pop("sha256", None)
            row |= {"blob": common.git_blob(path), "bytes": path.stat().st_size}
    (root / "data" / "sources.yaml").write_text(yaml.safe_dump(table))
    rows = [{"question": f"Is {n} up or down?", "answer": f"up by {n}"} for n in range(60)]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"base_model": "tiiuae/Falcon3-7B-Instruct", "lora_r": 8, "quant_bits": 16}
    run |= {"dataset_path": "../data/train/finlora_sentiment_train.jsonl", "num_epochs": 4}
    run |= {"learning_rate": 1e-4, "batch_size": 8, "gradient_accumulation_steps": 2}
    (root / "configs.json").write_text(json.dumps({"other": run}))
    stale = root / "recipes" / "qwen3-8b" / "ner_r4.yaml"
    stale.write_text(stale.read_text() + "# an older version\n")

    make_adapter(tiny, root / "adapter", target_modules=["q_proj"])
    (root / "adapter" / "config.yaml").write_text(
        yaml.safe_dump(
            {"base_model": str(tiny), "adapter": "lora"}
            | {"datasets": [{"path": "x.jsonl", "type": "chat_template"}]}
        )
    )
    shutil.copytree(trained, root / "runs" / RECIPE)
    # The folder that it is copied from is private, and PEFT's weights are.
    (root / "runs" / RECIPE).chmod(0o755)
    for folder in (root / "runs" / RECIPE, root / "adapter"):
        common.share(folder)
    finish(root / "runs" / RECIPE, recipes.find(RECIPE))
    published = call(root, hub, "push")
    assert published.returncode == 0, published.stderr
    shutil.rmtree(root / "cache", ignore_errors=True)
    return root


def call(root: Path, hub: Hub, verb: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(root / "cache"), "HF_ENDPOINT": hub.url, "PYTHONPATH": ""}
    environment |= {"HF_TOKEN": hub.user("me"), "PATH": "/usr/bin:/bin", "DEBUG": ""}
    environment |= {"FINLORA_BASE_URL": f"file://{root}/mirror", "FINLORA_DATA": ""}
    return subprocess.run(
        [*prefix, sys.executable, "-B", "-m", "tools", *VERBS[verb].arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def mount(*arguments: object) -> bool:
    return not subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode


@pytest.fixture
def disk(project, tmp_path) -> Iterator[Path]:
    """A copy of the project on a small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=96m", "tmpfs", place):
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        yield Path(shutil.copytree(project, place / "project", symlinks=True))
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def list_files(root: Path) -> dict[str, str]:
    """{path: SHA-256} of all files but locks and Python's own."""
    paths = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    files = {path.relative_to(root).as_posix(): path for path in paths}
    return {
        name: common.digest(path)
        for name, path in files.items()
        if not name.endswith(".lock") and "__pycache__" not in name
    }


def fill(disk: Path, room: int) -> Path:
    """Fills a disk but for `room` bytes."""
    space = os.statvfs(disk)
    path = disk.parent / "filling"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - room)
    return path


@pytest.mark.parametrize(("verb", "state"), CASES)
def test_a_verb_says_in_one_line_what_it_cannot_do_and_loses_nothing(verb, state, disk, hub):
    before, prefix, filling = list_files(disk), [], None
    if state == "full":
        filling = fill(disk, VERBS[verb].room)
    elif state == "read-only":
        assert mount("-o", "remount,ro", disk.parent)
    elif state == "of somebody else":
        subprocess.run(["chown", "-R", str(SOMEBODY), disk], check=True)
        # Without its capabilities root is a user like any other.
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    else:
        for path in [disk, *disk.rglob("*")]:
            os.utime(path, (FUTURE, FUTURE), follow_symlinks=False)
    done = call(disk, hub, verb, *prefix)
    if state not in LINES or not VERBS[verb].writes:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), done.stderr
    assert re.search(LINES[state], lines[0]), done.stderr
    assert len(lines) <= (3 if verb == "fetch" else 1), done.stderr  # fetch has one for each file

    if state == "read-only":
        assert mount("-o", "remount,rw", disk.parent)
    if filling:
        filling.unlink()
    left = list_files(disk)
    assert {name: left.get(name) for name in before} == before
    if verb == "serve":
        assert left == before
        return
    done = call(disk, hub, verb)
    assert done.returncode == 0, done.stderr
    after = list_files(disk)
    resumable = {name for name in left if name.endswith((".part", ".incomplete"))}
    assert {name: left[name] for name in left.keys() - resumable - before.keys()}.items() <= (
        after.items()
    )
    assert verb in ("fetch", "pull") or not resumable


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tools", *VERBS["recipes"].arguments],
            cwd=common.ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    message = "no space left on the disk for the output; free some and run it again"
    assert done.stderr == f"error: {message}\n"
