"""`make verify`: which data and runs count, what is done again, and a recipe from data to pages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evals import results
from evals.results import Result
from tests.conftest import losses
from tests.test_results import DEVICE, describe_result, describe_rows
from tools import common, recipes, runs, sources
from tools.common import ROOT, JobFailed, WrongInput
from tools.data import convert
from tools.runs import Run
from tools.train import checks, hardware, launch, profiles, status, verify
from tools.train.verify import Verification

NAME = "smollm2-135m/sentiment_r4"


# ---- a recipe with another seed


def test_another_seed_is_the_same_recipe_with_a_run_of_its_own():
    recipe = recipes.find(NAME)
    other = recipe.with_seed(43)
    assert recipe.with_seed(recipe.seed) is recipe
    changed = {key for key in recipe.config if recipe.config[key] != other.config[key]}
    assert changed == {"seed", "output_dir", "dataset_prepared_path"}
    assert (other.name, other.seed) == (NAME, 43) and other.digest != recipe.digest
    assert other.run.folder == ROOT / "runs" / f"{NAME}.seed43"
    assert replace(recipe, config=recipe.config | {"seed": None}).seed == 42
    zero = replace(recipe, config=recipe.config | {"seed": 0})
    assert zero.seed == 0 and zero.with_seed(42).config["seed"] == 42


def test_a_run_of_another_seed_is_no_recipe_of_its_own_and_has_its_place_in_the_status(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    experiment = tmp_path / ".parity" / "runs" / "nf4"
    for folder in (tmp_path / NAME, tmp_path / f"{NAME}.seed43", experiment):
        folder.mkdir(parents=True)
        common.write_json(folder / "identity.json", {})
    assert [run.name for run in runs.list_runs()] == [NAME]
    assert [row.run for row in status.list_statuses()] == [NAME, f"{NAME}, seed 43"]


# ---- what counts


@pytest.fixture
def trained(tmp_path):
    """A recipe on two small files, and the finished run of it on this machine."""
    entries = []
    for split in ("train", "val"):
        file = tmp_path / f"sentiment_{split}.jsonl"
        file.write_text('{"messages": []}\n' * 3)
        entries.append({"path": str(file), "type": "chat_template"})
    config = recipes.build_config(NAME) | {"output_dir": str(tmp_path / "run")}
    config |= {"datasets": entries[:1], "test_datasets": entries[1:]}
    recipe = recipes.Recipe(NAME, None, config, "1.1.0")
    recipe.run.folder.mkdir()
    recipe.run.adapter_file.write_bytes(b"adapter")
    gpus = hardware.detect_host().gpus
    info = {"recipe_digest": recipe.digest, "data": checks.describe_data(recipe), "processes": 1}
    info |= {"adapter_sha256": common.digest(recipe.run.adapter_file)}
    info |= {"device": gpus[0][0] if gpus else "cpu"}
    common.write_json(recipe.run.info_file, info)
    return recipe


def test_a_finished_run_of_the_same_recipe_and_data_counts_wherever_its_data_lies(trained):
    assert verify.is_trained(trained, 1)
    info = trained.run.info
    info["data"][0]["path"] = "data/chat/sentiment_train.jsonl"
    common.write_json(trained.run.info_file, info)
    assert verify.is_trained(trained, 1)


@pytest.mark.parametrize(
    "change",
    ["recipe", "data", "adapter", "device", "processes", "pulled", "unfinished"],
)
def test_a_run_of_anything_else_does_not_count(trained, change):
    run, processes = trained.run, 1
    if change == "recipe":
        trained = replace(trained, config=trained.config | {"lora_r": 16})
    elif change == "data":
        Path(trained.config["datasets"][0]["path"]).write_text('{"messages": []}\n')
    elif change == "adapter":
        run.adapter_file.write_bytes(b"another adapter")
    elif change == "device":
        common.write_json(run.info_file, run.info | {"device": "NVIDIA A40"})
    elif change == "processes":
        processes = 2
    elif change == "pulled":
        common.write_json(run.origin_file, {"repo": "someone/adapter"})
    else:
        run.info_file.unlink()
    assert not verify.is_trained(trained, processes)


@pytest.mark.parametrize(
    ("change", "request_", "reason"),
    [
        ({}, Verification(seeds=2), ""),
        ({}, Verification(seeds=1, shots=0), ""),
        ({}, Verification(seeds=3), "it has 2 of 3 seeds"),
        ({"shots": 0}, Verification(2, 3), "the base is to be scored with 3 examples"),
        ({"digest": "0" * 64}, Verification(seeds=2), "the recipe has changed since version 1.1.0"),
        (
            {"training_data": [describe_rows("sentiment_train.jsonl") | {"sha256": "1" * 64}]},
            Verification(seeds=2),
            "the data has changed (sentiment_train.jsonl)",
        ),
        ({"training_data": [describe_rows("more.jsonl")]}, Verification(seeds=2), "more.jsonl"),
    ],
)
def test_a_result_is_finished_with_the_same_recipe_and_data_and_enough_seeds(
    change, request_, reason
):
    data = Result.model_validate(describe_result()).data
    result = Result.model_validate(describe_result() | change)
    text = verify.explain_unfinished(result, data, list(result.datasets), request_)
    assert reason in text and bool(reason) == bool(text)


@pytest.fixture
def measured_on_two() -> Result:
    """A result of two seeds on fpb and fiqa."""
    return Result.model_validate(describe_result(datasets=("fpb", "fiqa")))


def test_a_result_that_holds_more_than_is_wanted_is_finished(measured_on_two):
    data = [rows for rows in measured_on_two.data if rows.file != "fiqa_test.jsonl"]
    request_ = Verification(seeds=1, shots=0)
    assert verify.explain_unfinished(measured_on_two, data, ["fpb"], request_) == ""
    text = verify.explain_unfinished(measured_on_two, data, ["fpb", "tfns", "ner"], request_)
    assert text == "tfns, ner are to be scored, too"


def test_evidence_is_replaced_by_no_less(measured_on_two, tmp_path, monkeypatch):
    """A seed of one dataset does not take the place of two seeds of two."""
    monkeypatch.setattr(verify.run, "find_rows", lambda name: tmp_path / f"{name}_test.jsonl")
    for name in ("fpb", "tfns"):
        (tmp_path / f"{name}_test.jsonl").touch()
    request_ = Verification(seeds=1, shots=0)
    with pytest.raises(WrongInput, match=r"scores of fiqa, whose rows are not here: .*FORCE=1"):
        verify.include_measured(measured_on_two, ["tfns"], request_)
    (tmp_path / "fiqa_test.jsonl").touch()
    datasets, wider = verify.include_measured(measured_on_two, ["tfns"], request_)
    assert datasets == ["fpb", "fiqa", "tfns"]
    assert (wider.seeds, wider.shots) == (2, measured_on_two.shots)


def test_evidence_is_not_replaced_by_a_measurement_on_other_rows(measured_on_two):
    data = measured_on_two.data
    verify.refuse_other_rows(measured_on_two, data, ["fpb", "fiqa"])
    fewer = [rows for rows in data if rows.file != "fiqa_test.jsonl"]
    verify.refuse_other_rows(measured_on_two, fewer, ["fpb"])
    other = [rows.model_copy(update={"sha256": "1" * 64}) for rows in data]
    for changed, name in (
        (other[:1] + data[1:], data[0].file),
        (data[:-1] + other[-1:], data[-1].file),
    ):
        with pytest.raises(WrongInput, match=rf"other rows \({name}\); .*FORCE=1"):
            verify.refuse_other_rows(measured_on_two, changed, ["fpb", "fiqa"])
    new = data[0].model_copy(update={"file": "tfns_test.jsonl"})
    verify.refuse_other_rows(measured_on_two, [*data, new], ["fpb", "fiqa", "tfns"])


def test_rows_of_datasets_that_were_not_asked_for_count_too(measured_on_two, tmp_path, monkeypatch):
    """fiqa has other rows, and TASKS=fpb SEEDS=3 would measure it again."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    device = hardware.detect_host().describe_machine(1)
    result = measured_on_two.model_copy(update={"device": device})
    results.write_result(result)
    changed = [
        rows.model_copy(update={"sha256": "1" * 64}) if rows.file == "fiqa_test.jsonl" else rows
        for rows in result.data
    ]

    def list_data(recipe, datasets):
        return [rows for rows in changed if "fiqa" in datasets or "fiqa" not in rows.file]

    monkeypatch.setattr(verify, "prepare_data", lambda task: None)
    monkeypatch.setattr(verify, "list_data", list_data)
    monkeypatch.setattr(verify, "set_aside", lambda outdated: pytest.fail("of a refused request"))
    monkeypatch.setattr(verify.run, "choose_datasets", lambda task, names: names)
    monkeypatch.setattr(verify.run, "find_rows", lambda name: tmp_path / f"{name}_test.jsonl")
    for name in ("fpb", "fiqa"):
        (tmp_path / f"{name}_test.jsonl").touch()
    with pytest.raises(WrongInput, match=r"other rows \(fiqa_test\.jsonl\)"):
        verify.verify(NAME, Verification(seeds=3, datasets=("fpb",)))


def test_nothing_is_set_aside_while_one_of_the_runs_is_trained(trained):
    second = trained.with_seed(43)
    shutil.copytree(trained.run.folder, second.run.folder)
    with second.run.lock(), pytest.raises(JobFailed, match="is under way"):
        verify.set_aside([trained, second])
    assert trained.run.is_finished and second.run.is_finished


def test_the_number_of_examples_stays_that_of_the_result_or_of_the_one_set_aside(tmp_path):
    path, previous = tmp_path / "1-core.json", tmp_path / "1-core.json.previous"
    assert verify.choose_shots(path, previous) == verify.SHOTS == 3
    for file, shots, expected in ((previous, 5, 5), (path, 4, 4), (path, 0, 5)):
        file.write_text(json.dumps(describe_result(shots=shots)))
        assert verify.choose_shots(path, previous) == expected
    path.write_text("damaged")
    assert verify.choose_shots(path, previous) == 5


def test_a_wrong_option_moves_no_run_and_no_result(trained, tmp_path, monkeypatch):
    """3 processes cannot share the recipe's batch of 8 rows."""
    recipe, path = trained, tmp_path / "results" / "1-core.json"
    common.write_json(path, describe_result())
    monkeypatch.setattr(verify, "find_named_recipe", lambda name: recipe)
    monkeypatch.setattr(verify, "prepare_data", lambda task: None)
    monkeypatch.setattr(verify, "list_data", lambda recipe, datasets: [])
    monkeypatch.setattr(verify.run, "choose_datasets", lambda task, names: names)
    monkeypatch.setattr(verify.results, "locate_result", lambda *_: path)
    wrong = Verification(datasets=("fpb",), force=True, shots=0, choice=profiles.Choice("cpu", 3))
    with pytest.raises(WrongInput, match="3 processes cannot share the recipe's batch"):
        verify.verify(NAME, wrong)
    assert recipe.run.is_finished and path.is_file()


def test_a_result_names_the_machine_of_the_training_that_it_counts(trained, monkeypatch):
    """Not that of the call, to which `taskset` may give other cores."""
    recipe, named = trained, []

    def locate(name, device, *_):
        named.append(device)
        raise JobFailed("far enough")

    monkeypatch.setattr(verify, "find_named_recipe", lambda name: recipe)
    monkeypatch.setattr(verify, "prepare_data", lambda task: None)
    monkeypatch.setattr(verify, "list_data", lambda recipe, datasets: [])
    monkeypatch.setattr(verify.run, "choose_datasets", lambda task, names: names)
    monkeypatch.setattr(verify.results, "locate_result", locate)
    here, there = hardware.detect_host().describe_machine(1), "64 cores (x86_64), 9 GB, no GPU"
    before = recipe.run.info  # of a version that did not record it
    for info, force in ((before, False), (before | {"machine": there}, False), (before, True)):
        common.write_json(recipe.run.info_file, info)
        with pytest.raises(JobFailed, match="far enough"):
            verify.verify(NAME, Verification(datasets=("fpb",), force=force))
    common.write_json(recipe.run.info_file, before | {"machine": there, "recipe_digest": "0"})
    with pytest.raises(JobFailed, match="far enough"):
        verify.verify(NAME, Verification(datasets=("fpb",)))
    assert named == [here, there, here, here]


def test_more_examples_than_there_are_rows_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    convert.convert_task("formula", sources.SAMPLE)
    rows = len(sources.train_path("formula").read_text().splitlines())
    verify.refuse_impossible_examples(["financial_math"], 3)
    with pytest.raises(WrongInput, match=rf"^SHOTS={rows + 1}: .* too many: .*; SHOTS=0 measures"):
        verify.refuse_impossible_examples(["financial_math"], rows + 1)


def test_a_loss_that_was_never_logged_is_none():
    """With logging_steps above the steps that were trained."""
    info = {"steps": 3, "seconds": 1.0, "peak_memory_bytes": 1, "tokens_per_second": 1.0}
    training = verify.describe_training(info | {"train_loss": None, "last_eval_loss": 0.12345})
    assert (training.train_loss, training.validation_loss) == (None, 0.1235)


def test_all_seeds_are_trained_with_the_same_versions(trained, monkeypatch):
    """One that was trained with others is set aside, unless all were."""
    now, old = launch.list_packages(), {name: "0" for name in launch.list_packages()}
    second = trained.with_seed(43)
    shutil.copytree(trained.run.folder, second.run.folder)
    info = trained.run.info
    monkeypatch.setattr(verify, "is_trained", lambda recipe, processes: recipe.run.is_finished)
    for first, other, outdated in ((now, now, []), (old, old, []), (old, now, [trained])):
        for recipe, packages in ((trained, first), (second, other)):
            common.write_json(recipe.run.info_file, info | {"packages": packages})
        assert verify.list_outdated([trained, second], 1, False) == outdated
    missing = trained.with_seed(44)
    assert verify.list_outdated([trained, second, missing], 1, False) == [trained]
    assert verify.list_outdated([trained, second, missing], 1, True) == [trained, second]
    verify.set_aside([trained, second])
    assert not trained.run.folder.exists() and not second.run.folder.exists()
    assert trained.run.folder.with_name(f"{trained.run.folder.name}.previous").is_dir()
    assert verify.list_outdated([trained, second, missing], 1, False) == []


def test_a_recipe_without_a_name_or_a_task_is_refused_before_anything_is_done(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipes.build_config(NAME)))
    with pytest.raises(WrongInput, match="mine.yaml: a result is filed under the name"):
        verify.find_named_recipe(str(file))
    assert verify.find_named_recipe("sentiment_r4").name == "llama-3.1-8b/sentiment_r4"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine_r4", "mine_r4.yaml: it trains on rows of no task"),
        ("my recipe", "my recipe.yaml: the name of a recipe with a result has letters, digits"),
    ],
)
def test_a_recipe_that_no_result_can_be_of_is_refused(name, reason, tmp_path, monkeypatch):
    file = tmp_path / "tiny" / f"{name}.yaml"
    file.parent.mkdir()
    config = recipes.build_config(NAME)
    config["datasets"][0]["path"] = "rows.jsonl"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(recipes, "LOCAL", tmp_path)
    recipes.clear_caches()
    try:
        with pytest.raises(WrongInput, match=reason):
            verify.find_named_recipe(f"tiny/{name}")
    finally:
        monkeypatch.undo()
        recipes.clear_caches()


def test_a_result_stays_until_the_one_that_replaces_it_is_whole(tmp_path, monkeypatch):
    """With FORCE=1 and a training that fails."""
    device = hardware.detect_host().describe_machine(1)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write_result(Result.model_validate(describe_result(device=device)))
    path = results.locate_result(NAME, device)
    before = path.read_bytes()

    def fail(*_):
        raise JobFailed("out of memory")

    monkeypatch.setattr(verify, "prepare_data", lambda task: None)
    monkeypatch.setattr(verify, "list_data", lambda recipe, datasets: [])
    monkeypatch.setattr(verify.run, "choose_datasets", lambda task, names: names)
    monkeypatch.setattr(verify.launch, "train", fail)
    monkeypatch.setattr(verify, "set_aside", lambda outdated: None)  # of this project's runs
    request_ = Verification(datasets=("fpb",), force=True)
    with pytest.raises(JobFailed, match="out of memory"):
        verify.verify(NAME, request_)
    assert not path.exists()  # the same command without FORCE=1 goes on
    path.write_text("damaged")
    with pytest.raises(WrongInput, match="1.*json"):
        verify.verify(NAME, replace(request_, force=False))
    with pytest.raises(JobFailed, match="out of memory"):
        verify.verify(NAME, request_)  # what is damaged can be replaced, too
    assert not path.exists()
    previous = path.with_name(f"{path.name}.previous")
    previous.write_bytes(before)
    assert path.with_name(f"{path.name}.previous").read_bytes() == before
    assert results.load_results() == []


def test_a_commit_is_told_with_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert verify.describe_commit() == (None, False)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text("1\n")
    name = ("-c", "user.name=me", "-c", "user.email=me@example.com")
    for arguments in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "First"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit, is_changed = verify.describe_commit()
    assert len(commit) == 40 and not is_changed
    (tmp_path / "README.md").write_text("a page\n")
    assert verify.describe_commit() == (commit, False)
    (tmp_path / "tools" / "a.py").write_text("2\n")
    assert verify.describe_commit() == (commit, True)


# ---- the command, in a copy of the project

WORDS = {"positive": "rose", "negative": "fell", "neutral": "stayed"}
TINY = "tiny/sentiment_r4"


def write_rows(file: Path, count: int, start: int) -> None:
    """Rows as FinLoRA writes them: a sentence on each of `count` companies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lines:
        for number in range(start, start + count):
            label, word = list(WORDS.items())[number % 3]
            text = f"What is the sentiment of this news?\nInput: Profit {number} {word}.\nAnswer: "
            lines.write(json.dumps({"context": text, "target": label}) + "\n")


class Project:
    """A copy of the project with a recipe that trains a tiny model, and rows of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.result = root / "results" / TINY / f"{common.slugify(DEVICE)}.json"

    def start(self, verb: str, *arguments: object) -> subprocess.Popen[str]:
        environment = os.environ | {"FINLORA_DATA": str(self.root / "finlora"), "PYTHONPATH": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "tools", verb, *map(str, arguments)],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str, *arguments: object, status: int = 0) -> tuple[str, str]:
        process = self.start(verb, *arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, out + err
        return out, err


@pytest.fixture(scope="module")
def project(smollm2, tiny, tmp_path_factory) -> Project:
    root = tmp_path_factory.mktemp("verify") / "project"
    skip = shutil.ignore_patterns("__pycache__", "local")
    for part in ("tools", "evals", "recipes", "data/sample", "docs"):
        shutil.copytree(ROOT / part, root / part, ignore=skip)
    for file in ("README.md", "Makefile", "data/sources.yaml"):
        shutil.copy(ROOT / file, root / file)
    (root / "models").symlink_to(smollm2.parent)
    config = recipes.build_config(NAME) | {"base_model": str(tiny), "output_dir": f"runs/{TINY}"}
    config |= {"dataset_prepared_path": f"runs/{TINY}/prepared", "warmup_steps": 1}
    config |= {"max_steps": 12, "save_steps": 4, "eval_steps": 12}
    path = root / "recipes" / "local" / f"{TINY}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(config))
    write_rows(root / "finlora/data/train/finlora_sentiment_train.jsonl", 96, 0)
    write_rows(root / "finlora/data/test/fpb_test.jsonl", 40, 1000)
    write_rows(root / "finlora/data/test/fiqa_test.jsonl", 20, 2000)
    return Project(root)


@pytest.mark.slow
def test_a_recipe_is_measured_resumed_and_left_alone_once_it_is_finished(project):
    """One seed by `make train`; verify trains the next, is stopped, goes on, and writes the result.

    The examples are refused first; their chat rows then give way to FinLoRA's.
    """
    root, examples = project.root, sources.SAMPLE.relative_to(ROOT)
    folder = root / "finlora"
    folder.rename(root / "aside")
    (folder / "data").mkdir(parents=True)
    _, err = project.run("verify", TINY, status=2)
    assert "`make fetch TASKS=sentiment`" in err and err.count("\n") == 1
    assert not project.result.parent.exists() and (root / examples).is_dir()
    shutil.rmtree(folder)
    (root / "aside").rename(folder)

    project.run("data", "sentiment")
    project.run("train", TINY)
    process = project.start("verify", TINY, "--seeds", 2, "--shots", 0)
    seed43 = Run(root / "runs" / f"{TINY}.seed43")
    deadline = time.monotonic() + 240
    while not seed43.checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "trained before: runs/tiny/sentiment_r4\n" in out, out + err
    assert process.returncode == 130 and "the same command continues from here" in err
    assert not project.result.exists() and not seed43.is_finished

    out, _ = project.run("verify", TINY, "--seeds", 2, "--shots", 0)
    assert "trained before: runs/tiny/sentiment_r4\n" in out and "continues from step" in out
    assert sorted(losses(seed43.folder)) == list(range(1, 13))

    (path,) = project.result.parent.glob("*.json")
    content = path.read_text()
    result = Result.model_validate_json(content)
    assert list(result.trainings) == [42, 43] and list(result.datasets) == ["fpb", "fiqa"]
    assert result.datasets["fpb"].rows == 40 and "Profit" not in content
    assert all(training.seconds > 0 for training in result.trainings.values())
    assert {data.place for data in result.data} == {"FINLORA_DATA"}
    pages = {name: (root / name).read_text() for name in ("README.md", "docs/results.md")}
    assert all("fpb, 40 | accuracy" in text for text in pages.values())
    project.run("results")
    assert pages == {name: (root / name).read_text() for name in pages}

    before = path.stat().st_mtime_ns
    out, _ = project.run("verify", TINY, "--seeds", 2, "--shots", 0)
    assert "is of this recipe and data" in out and "train " not in out
    assert path.stat().st_mtime_ns == before

    recipe = root / "recipes" / "local" / f"{TINY}.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 12", "max_steps: 11"))
    project.run("results")
    readme, page = ((root / name).read_text() for name in ("README.md", "docs/results.md"))
    assert "fpb, 40" not in readme + page and "the recipe has changed since version 0" in page
