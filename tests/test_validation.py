"""Validation rows are held out by prompt: no prompt both trains and validates, in any task."""

import json
import math
import random
import shutil
from collections import Counter

import pytest

from tests.chat_files import read_turns, write_rows
from tools import custom, recipes, sources
from tools.common import ROOT, WrongInput, digest
from tools.data import convert
from tools.data.rules import fingerprint
from tools.runs import Run
from tools.train import checks, launch, profiles

TASKS = sources.tables()["tasks"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    return tmp_path


def count_prompts(path):
    return Counter(fingerprint(prompt) for prompt, _ in read_turns(path))


def count_sides(task):
    return count_prompts(sources.train_path(task)), count_prompts(sources.val_path(task))


def make_copies(count=300):
    """Rows like FinLoRA's: prompts in 1 to 21 copies, some spelt otherwise."""
    rows = []
    for n in range(count):
        copies = (1, 2, 6, 21)[n % 4]
        rows += [(f"Question {n}?", f"{n}")] * (copies - 1) + [(f"QUESTION  {n}? ", f"{n}")]
    return rows


@pytest.mark.parametrize("task", [name for name, spec in TASKS.items() if "parts" not in spec])
def test_no_prompt_is_on_two_sides(task, folder):
    convert.convert_task(task, sources.SAMPLE)
    trains, validates = count_sides(task)
    assert trains and validates and not trains.keys() & validates.keys()
    for dataset in TASKS[task]["eval"]:
        assert not count_prompts(sources.test_path(dataset)).keys() & (trains + validates).keys()
    manifest = sources.manifest(sources.train_path(task))
    rows = trains.total() + validates.total()
    assert (manifest["rows"], manifest["validation"]["rows"]) == (
        trains.total(),
        validates.total(),
    )
    assert validates.total() == math.ceil(0.02 * rows)  # what Axolotl's own split takes
    held_out = sources.manifest(sources.val_path(task))
    assert held_out["held_out_of"] == f"{task}_train.jsonl"
    assert held_out["sha256"] == manifest["validation"]["sha256"] == digest(sources.val_path(task))


@pytest.mark.parametrize("task", ["xbrl_term", "formula", "financebench", "sentiment"])
def test_no_prompt_of_finloras_files_is_on_two_sides(task, folder, monkeypatch):
    finlora = ROOT.parent / "shared" / "finlora"
    if not finlora.is_dir():
        pytest.skip("FinLoRA's files are not beside the repository, in ../shared/finlora")
    monkeypatch.setenv("FINLORA_DATA", str(finlora))
    convert.convert_task(task, sources.source_folder(task))
    trains, validates = count_sides(task)
    assert trains and validates and not trains.keys() & validates.keys()
    if task in ("xbrl_term", "sentiment"):
        tested = count_prompts(sources.test_path(TASKS[task]["eval"][0]))
        assert not tested.keys() & (trains + validates).keys()


def test_all_copies_of_a_prompt_go_together_and_the_share_is_kept_to_the_row(folder):
    rows = make_copies()
    write_rows(folder / "train" / "formula_train.jsonl", rows)
    convert.convert_task("formula", folder)
    trains, validates = count_sides("formula")
    assert not trains.keys() & validates.keys()
    assert len(trains) + len(validates) == 300
    assert validates.total() == math.ceil(0.02 * len(rows))
    assert trains.total() + validates.total() == len(rows)


def test_the_same_prompts_validate_in_whatever_order_the_rows_stand(folder):
    rows, seen = make_copies(), []
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        write_rows(folder / "train" / "formula_train.jsonl", rows)
        convert.convert_task("formula", folder)
        seen.append(count_sides("formula"))
    assert seen[0] == seen[1]


def test_where_every_prompt_has_more_copies_than_the_share_one_prompt_validates(folder):
    write_rows(
        folder / "train" / "formula_train.jsonl", [(f"Question {n}?", "1") for n in range(20)] * 9
    )
    convert.convert_task("formula", folder)
    assert list(map(len, count_sides("formula"))) == [19, 1]


def test_of_few_prompts_none_validates_and_an_older_file_goes(folder, capsys):
    path = folder / "train" / "formula_train.jsonl"
    write_rows(path, [(f"Question {n}?", "1") for n in range(20)])
    convert.convert_task("formula", folder)
    assert sources.val_path("formula").is_file()
    write_rows(path, [(f"Question {n}?", "1") for n in range(19)] * 5)
    convert.convert_task("formula", folder)
    assert not list(sources.CHAT.glob("formula_val*"))
    assert count_prompts(sources.train_path("formula")).total() == 95
    held_out = sources.manifest(sources.train_path("formula"))["validation"]
    assert held_out["reason"] == "19 prompts are too few: 20 are needed"
    assert "no validation rows: 19 prompts are too few" in capsys.readouterr().out


def test_a_task_without_its_source_leaves_no_validation_rows(folder):
    convert.convert_task("ner", sources.SAMPLE)
    convert.convert_task("ner", folder)
    assert list(sources.CHAT.glob("*")) == []


@pytest.mark.parametrize("task", [name for name, spec in TASKS.items() if "parts" in spec])
def test_the_validation_rows_of_the_parts_join_and_never_train(task, folder):
    for part in TASKS[task]["parts"]:
        convert.convert_task(part, sources.SAMPLE)
    convert.convert_task(task, sources.SAMPLE)
    trains, validates = count_sides(task)
    assert trains and validates and not trains.keys() & validates.keys()
    of_parts = [count_prompts(sources.val_path(part)) for part in TASKS[task]["parts"]]
    if "equal" in TASKS[task]:
        least = min(part.total() for part in of_parts)
        assert validates.total() == least * len(of_parts)
    else:
        assert validates == sum(of_parts, Counter())
    assert not trains.keys() & sum(of_parts, Counter()).keys()


def test_a_prompt_that_two_parts_share_does_not_train_where_one_validates_with_it(folder):
    for task in ("financebench", "xbrl_extract", "formula"):
        rows = [(f"Question {n} of {task}?", "1") for n in range(100)]
        write_rows(folder / "train" / f"{task}_train.jsonl", rows)
        convert.convert_task(task, folder)
    held_out = json.loads(sources.val_path("formula").read_text().splitlines()[0])
    shared = (held_out["messages"][0]["content"], "1")
    rows = [(f"Question {n} of financebench?", "1") for n in range(100)] + [shared]
    write_rows(folder / "train" / "financebench_train.jsonl", rows)
    convert.convert_task("financebench", folder)
    assert fingerprint(shared[0]) in count_sides("financebench")[0]
    convert.convert_task("analysis_multi", folder)
    trains, validates = count_sides("analysis_multi")
    assert not trains.keys() & validates.keys()
    removed = sources.manifest(sources.train_path("analysis_multi"))["removed"]
    assert [entry["rows"] for entry in removed] == [1]


def test_rows_of_ones_own_are_split_by_prompt_too(folder, monkeypatch):
    for module, name in ((custom, "DATA"), (custom, "TASKS"), (recipes, "LOCAL")):
        monkeypatch.setattr(module, name, folder / name.lower())
    monkeypatch.setattr(sources, "OWN", recipes.LOCAL)
    rows = make_copies(200)
    source = write_rows(folder / "mine.jsonl", rows)
    try:
        sources.tables.cache_clear()
        custom.create_task("house", source)
        sources.tables.cache_clear()
        convert.convert_task("house", folder)
        (entry,) = recipes.find("smollm2-135m/house_r4").config["test_datasets"]
        assert entry["path"] == "data/chat/house_val.jsonl"
        three = [*count_sides("house"), count_prompts(sources.test_path("house"))]
        assert all(three) and sum(map(len, three)) == len(set().union(*three)) == 200
    finally:
        sources.tables.cache_clear()
        recipes.clear_caches()


# ---- What a training makes of it


@pytest.fixture
def recipe(folder):
    config = recipes.build_config("smollm2-135m/formula_r4")
    for key, path in (("datasets", sources.train_path), ("test_datasets", sources.val_path)):
        config[key][0]["path"] = str(path("formula"))
    write_rows(folder / "train" / "formula_train.jsonl", make_copies())
    convert.convert_task("formula", folder)
    return recipes.Recipe("mine", folder / "mine.yaml", config, "1")


def test_an_unfinished_line_of_an_interrupted_search_is_taken_away(tmp_path):
    """Which the next evaluation would otherwise be written behind."""
    from types import SimpleNamespace

    from axolotl.utils.dict import DictDefault

    from tools.train.judge import Judge

    run = Run(tmp_path)
    lines = [{"step": step, "loss": 1.0} for step in (3, 6)]
    run.validation_file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    trainer = SimpleNamespace(evaluation_loop=None, prediction_step=None)
    trainer.callback_handler = SimpleNamespace(callbacks=[])
    judge = Judge(DictDefault(record_validation=True), trainer, run)
    judge.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=6), None)
    with open(run.validation_file, "a") as file:
        file.write(json.dumps({"step": 9, "loss": 0.9}) + "\n")
    assert [line["step"] for line in run.evaluations()] == [3, 6, 9]


def test_a_runs_identity_holds_the_validation_file(recipe):
    data = checks.describe_data(recipe)
    assert [entry["split"] for entry in data] == ["train", "validation"]
    paths = (sources.train_path("formula"), sources.val_path("formula"))
    assert [entry["sha256"] for entry in data] == list(map(digest, paths))
    assert (
        profiles.merge_config(recipe, profiles.Choice("cpu"))["test_datasets"]
        == recipe.config["test_datasets"]
    )


@pytest.mark.parametrize("damage", ["gone", "changed", "of another split"])
def test_a_validation_file_that_is_not_the_one_held_out_is_refused(recipe, damage, folder):
    path = sources.val_path("formula")
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes() * 2)
    else:  # a whole file, but of other rows
        place, sources.CHAT = sources.CHAT, folder / "other"
        write_rows(folder / "train" / "formula_train.jsonl", make_copies(400))
        convert.convert_task("formula", folder)
        for file in (
            sources.val_path("formula"),
            sources.manifest_path(sources.val_path("formula")),
        ):
            shutil.copy(file, place)
        sources.CHAT = place
    with pytest.raises(WrongInput, match=r"formula_val\.jsonl .*`make data` makes both"):
        checks.describe_data(recipe)


def test_the_file_that_changed_is_named(recipe):
    data = [entry["sha256"] for entry in checks.describe_data(recipe)]
    config = recipe.config
    message = launch.explain_change(
        {"config": config, "data": data}, {"config": config, "data": [data[0], "x"]}
    )
    assert message == f"the data changed ({sources.val_path('formula')})"


def test_a_set_too_small_to_validate_trains_without(recipe, folder):
    write_rows(folder / "train" / "formula_train.jsonl", [("Question?", "1"), ("Another?", "2")])
    convert.convert_task("formula", folder)
    content = profiles.merge_config(recipe, profiles.Choice("cpu"))
    assert not {"test_datasets", "eval_steps", "evals_per_epoch"} & content.keys()
    recipes.validate(content, "mine")
    assert [entry["split"] for entry in checks.describe_data(recipe)] == ["train"]
    why = sources.drop_missing_validation(recipe.config)[1]
    assert why == "2 prompts are too few: 20 are needed"
    others = folder / "others.jsonl"
    others.write_text("")
    recipe.config["test_datasets"].append({"path": str(others), "type": "chat_template"})
    left, _ = sources.drop_missing_validation(recipe.config)
    assert [entry["path"] for entry in left["test_datasets"]] == [str(others)]
    assert left["eval_steps"] == recipe.config["eval_steps"]


def test_ones_own_yaml_with_val_set_size_is_left_alone(recipe):
    del recipe.config["test_datasets"]
    recipe.config["val_set_size"] = 0.1
    content = profiles.merge_config(recipe, profiles.Choice("cpu"))
    assert content["val_set_size"] == 0.1 and "test_datasets" not in content
    recipes.validate(content, "mine")
    assert len(checks.describe_data(recipe)) == 1
