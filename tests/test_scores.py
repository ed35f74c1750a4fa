"""A score is kept, named as old, or left out for good reasons: by jobs that run at once, on a full
disk, with a base that is downloaded first, and from files that are damaged."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from evals import page as report_page
from evals import report
from evals import run as evaluation
from evals.answers import Answers, Prompts
from tests.conftest import call, run_first
from tests.hub_server import Hub
from tests.test_eval import Speaker, evaluate, key, trained, workplace  # noqa: F401
from tests.test_report import Page, runs  # noqa: F401
from tools import common, sources
from tools import runs as runs_module
from tools.data.chatfile import convert_rows
from tools.data.rules import load_test_rules

# ---- the code that scores

# Of the code's lines but comments. Where this test fails, a score may come out otherwise than
# before: then raise SCORING. If none can, the digest alone is renewed.
SCORING, DIGEST = 2, "62fcacb1f6883a41"
CODE = (
    *("evals/answers.py", "evals/choices.py", "evals/model.py", "evals/stats.py"),
    *("evals/tasks/utils.py", "evals/tasks/own.py", "tools/packs.py", "tools/segments.py"),
)


def test_the_version_of_scoring_stands_for_its_code():
    lines = [line for name in CODE for line in (common.ROOT / name).read_text().splitlines()]
    code = "\n".join(line for line in lines if line.strip() and not line.strip().startswith("#"))
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    assert (evaluation.SCORING, digest) == (SCORING, DIGEST)


# ---- old scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_version": 1.0}, "old: task version 1.0, now 1.1"),
        ({"scoring": 1}, "old: scored by an earlier version"),
        ({"scoring": None}, "old: scored by an earlier version"),
    ],
)
def test_an_old_score_is_shown_as_old_and_compared_with_no_new_one(runs, change, words):  # noqa: F811
    file = runs.file("base", "fpb", None)
    content = json.loads(file.read_text())
    depends = content["evaluated"] | change
    if depends["scoring"] is None:  # as in a file of before there was such a key
        del depends["scoring"]
    common.write_json(file, content | {"evaluated": depends})
    files = report_page.build(runs_module.RUNS / "report", lambda *_: {})
    text = files[0].read_text()
    rows = [row for row in Page(text).rows if len(row) == 9]
    (base,) = [
        row for row in rows if row[0].startswith("fpb") and row[2:4] == ["base nf4", "accuracy"]
    ]
    assert words in base[0]
    gains = {
        row[0].split()[0]: row[5] for row in rows if row[2:4] == ["sentiment_r4 nf4", "accuracy"]
    }
    assert gains["fpb"] == "–" and gains["fiqa"].startswith("+40.0")
    assert f"fpb: {words}; it is compared with no new score." in text


# ---- damaged score files

TEXTS = {
    "not JSON": lambda text: "<html>",
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "a number": lambda text: "7",
    "nested too deeply": lambda text: "[" * 100_000,
    "not a number": lambda text: text.replace('"value": ', '"value": NaN, "x": ', 1),
    "infinite": lambda text: text.replace('"value": ', '"value": Infinity, "x": ', 1),
    "a text for a number": lambda text: text.replace('"value": ', '"value": "1", "x": ', 1),
}
CHANGES = {
    "no metrics": lambda content: content.pop("metrics"),
    "no evaluated": lambda content: content.pop("evaluated"),
    "evaluated a list": lambda content: content.update(evaluated=[]),
    "no dataset": lambda content: content["evaluated"].pop("dataset"),
    "no interval": lambda content: content["metrics"]["accuracy"].pop("low"),
    "no rows": lambda content: content.update(predictions=[]),
    "rows that are missing": lambda content: content["predictions"].pop(),
    "a row that is a text": lambda content: content["predictions"].append("x"),
    "a value that is none": lambda c: c["predictions"][0]["values"].update(accuracy=None),
}


def damage(file, kind):
    text = file.read_text()
    if kind == "not UTF-8":
        file.write_bytes(b"\xff\xfe" + text.encode())
    elif kind in TEXTS:
        file.write_text(TEXTS[kind](text))
    else:
        content = json.loads(text)
        CHANGES[kind](content)
        file.write_text(json.dumps(content))


def test_a_damaged_score_file_is_named_and_left_out_of_the_page(runs, capsys):  # noqa: F811
    file = runs.file("adapter", "fpb", None)
    sound = file.read_bytes()
    for kind in (*TEXTS, *CHANGES, "not UTF-8"):
        file.write_bytes(sound)
        damage(file, kind)
        with pytest.raises(common.WrongInput):
            report.read(file)
        datasets = [set(scored.contents) for scored in report_page.find_scored()]
        (line,) = capsys.readouterr().err.splitlines()
        assert common.shown(file) in line and "`make eval` scores again" in line, kind
        assert datasets == [{"fpb", "fiqa"}, {"fiqa"}], kind


@pytest.mark.parametrize("kind", run_first(1, ["no metrics", "cut", "a list"]))
def test_a_damaged_score_is_scored_again(kind, trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "4")
    file = folder / "evals" / "fpb_sample4.json"
    before = file.read_text()
    damage(file, kind)
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "4")
    (line,) = capsys.readouterr().err.splitlines()
    assert "fpb_sample4.json is scored again" in line
    assert json.loads(file.read_text()) == json.loads(before)


# ---- disks, folders, and two jobs at once


@contextmanager
def limit_file_size(size):
    """No file may grow beyond `size` bytes: what the kernel says of a full disk, by a limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_runs_full_is_one_line_and_loses_no_answer(trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    arguments = (recipe, "--tasks", "fpb", "--limit", "12")
    monkeypatch.setattr("evals.model.count_cached", lambda model, size: 300)
    with limit_file_size(200), pytest.raises(SystemExit):  # not even the rows can be read in
        evaluate(monkeypatch, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written: file too large" in line
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "2")
    capsys.readouterr()
    with limit_file_size(2500), pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, *arguments)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "fpb_sample12.json cannot be written: file too large; what was answered is kept" in line
    (partial,) = folder.parent.rglob(".fpb_sample12.partial.jsonl")
    kept = partial.read_bytes()
    with limit_file_size(len(kept) // 2), pytest.raises(SystemExit):  # fuller still
        evaluate(monkeypatch, *arguments)
    assert partial.read_bytes() == kept
    evaluate(monkeypatch, *arguments)
    assert " of 12 prompts are answered already" in capsys.readouterr().out
    content = json.loads((folder / "evals" / "fpb_sample12.json").read_text())
    assert content["examples"] == 12


def test_a_folder_that_cannot_be_written_is_one_line_before_the_work(trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    (folder / "evals").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "4")
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err and len(printed.err.splitlines()) == 1
    assert "4/4" not in printed.out


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_report_into_a_read_only_folder_is_one_line(runs, monkeypatch, capsys):  # noqa: F811
    runs_module.RUNS.chmod(0o500)
    with pytest.raises(SystemExit):
        call(monkeypatch, "report")
    runs_module.RUNS.chmod(0o700)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written: permission denied; the scores are not touched" in line


def test_a_page_that_does_not_fit_on_the_disk_leaves_the_one_before(runs, monkeypatch, capsys):  # noqa: F811
    call(monkeypatch, "report")
    page = (runs_module.RUNS / "report" / "index.html").read_bytes()
    capsys.readouterr()
    with limit_file_size(5000), pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "report")
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written: file too large; the scores are not touched" in line
    assert (runs_module.RUNS / "report" / "index.html").read_bytes() == page


@pytest.mark.parametrize("torn", [b'{"prompt": "x", "ans', b"\x00\x00", b"[]\n", b"7\n", b"{}\n"])
def test_torn_lines_of_kept_answers_are_left_out(torn, tmp_path, workplace):  # noqa: F811
    file = tmp_path / ".fpb.partial.jsonl"
    rows, _ = evaluation.measure(Speaker(key), "fpb", 8, Prompts("chat"), Answers(file, {"m": 1}))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + torn + b"\n" + b"".join(lines[4:7]) + torn)
    again = Speaker(key)
    more, _ = evaluation.measure(again, "fpb", 8, Prompts("chat"), Answers(file, {"m": 1}))
    assert more == rows and len(again.asked) == 2


def test_a_score_that_another_job_writes_is_waited_for(tmp_path, capsys):
    waits, order = threading.Event(), []

    def score():
        with evaluation.locked(tmp_path / "fpb.json"):
            order.append("second")

    with evaluation.locked(tmp_path / "fpb.json"):
        other = threading.Thread(target=score)
        other.start()
        waits.wait(0.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    assert "waits for another job that scores" in capsys.readouterr().out


@pytest.fixture
def project(tmp_path, tiny):
    """A copy of the project with the tiny base and the sample's data; runs its commands."""
    root = tmp_path / "project"
    skip = shutil.ignore_patterns("__pycache__", "local")
    for part in ("tools", "evals", "recipes", "data/sample"):
        shutil.copytree(common.ROOT / part, root / part, ignore=skip)
    shutil.copy(common.ROOT / "data" / "sources.yaml", root / "data")
    shutil.copytree(tiny, root / "models" / "tiny")
    source = sources.SAMPLE / sources.tables()["datasets"]["fpb"]["file"]
    convert_rows(source, root / "data/chat/fpb_test.jsonl", load_test_rules("fpb", source))
    return root


def start(root, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tools", "eval", *map(str, arguments)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_base_recipe(root, base):
    import yaml

    from tools import recipes

    content = recipes.build_config("smollm2-135m/sentiment_r4")
    content |= {"base_model": base, "output_dir": str(root / "runs" / "tiny" / "r4")}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_two_jobs_that_share_a_base_score_it_once(project):
    recipe = write_base_recipe(project, "models/tiny")
    arguments = (recipe, "--base", "--tasks", "fpb", "--limit", "60")
    jobs = [start(project, *arguments) for _ in range(2)]
    outputs = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sum("fpb, base: 60/60" in out for out, _ in outputs) == 1, outputs
    folder = project / "runs" / "tiny" / "base_nf4" / "evals"
    assert [path.name for path in folder.iterdir()] == ["fpb_sample60.json"]
    assert all("fpb_sample60.json" in out for out, _ in outputs)


@pytest.mark.slow
def test_the_score_of_a_base_that_is_downloaded_first_is_kept(project, tmp_path):
    folder = project / "models" / "tiny"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    recipe = write_base_recipe(project, "someone/tiny")
    arguments = (recipe, "--base", "--tasks", "fpb", "--limit", "4")
    with Hub() as hub:
        commit = hub.put("someone/tiny", files)
        where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        outputs = []
        for _ in range(2):
            job = start(project, *arguments, **where)
            outputs.append(job.communicate(timeout=300))
            assert job.returncode == 0, outputs
    assert ["fpb, base: 4/4" in out for out, _ in outputs] == [True, False], outputs
    (file,) = project.rglob("fpb_sample4.json")
    depends = json.loads(file.read_text())["evaluated"]
    assert depends["base_revision"] == commit
    assert depends["device_class"].startswith(("cpu", "cuda"))
