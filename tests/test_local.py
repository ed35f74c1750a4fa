"""Rows and configs of one's own become tasks and recipes, and stay one's own."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import run
from tools import catalogue, custom, importer, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput
from tools.data import convert
from tools.data.rules import fingerprint


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Folders of one's own in a temporary place."""
    monkeypatch.setattr(recipes, "LOCAL", tmp_path / "recipes" / "local")
    monkeypatch.setattr(sources, "OWN", tmp_path / "recipes" / "local")
    monkeypatch.setattr(custom, "DATA", tmp_path / "data" / "local")
    monkeypatch.setattr(custom, "TASKS", tmp_path / "tasks" / "local")
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    recipes.clear_caches()
    sources.tables.cache_clear()
    yield tmp_path
    recipes.clear_caches()
    sources.tables.cache_clear()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TONES = [
    {"prompt": f"Is filing {n} late?\nAnswer: ", "completion": "Yes" if n % 3 else "No"}
    for n in range(60)
]


def test_rows_become_a_task_with_data_recipes_and_an_evaluation(mine, capsys):
    custom.create_task("late_filing", jsonl(mine / "rows.jsonl", TONES))
    capsys.readouterr()
    sources.tables.cache_clear()
    convert.convert_task("late_filing", mine)
    kept = {}
    for side in ("train", "val", "test"):
        path = sources.CHAT / f"late_filing_{side}.jsonl"
        rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
        kept |= {user["content"]: assistant["content"] for user, assistant in rows}
        assert len(rows) == {"train": 47, "val": 1, "test": 12}[side]
    assert kept == {row["prompt"].strip(): row["completion"] for row in TONES}

    recipe = recipes.find("qwen3-4b/late_filing_r8_dora")
    assert recipe.path == recipes.LOCAL / "qwen3-4b" / "late_filing_r8_dora.yaml"
    assert (recipe.task, recipe.config["peft_use_dora"]) == ("late_filing", True)
    assert recipes.find("late_filing_r4").name == "llama-3.1-8b/late_filing_r4"
    made = [name for name in recipes.list_names() if "late_filing" in name]
    methods = [row for row in recipes.read_matrix()["methods"].values() if "only" not in row]
    assert len(made) == len(recipes.read_matrix()["models"]) * len(methods)
    recipes.validate(recipe.config, "mine")
    task = yaml.safe_load((custom.TASKS / "late_filing.yaml").read_text())
    assert task["task"] == "finlora_late_filing"
    assert "(Yes|No)" in task["filter_list"][0]["filter"][0]["regex_pattern"]


def test_render_leaves_what_is_ones_own_as_it_is(mine, capsys):
    custom.create_task("late_filing", jsonl(mine / "rows.jsonl", TONES))
    path = recipes.find("smollm2-135m/late_filing_r4").path
    path.write_text(path.read_text().replace("lora_r: 4", "lora_r: 6"))
    before = files(recipes.LOCAL)
    catalogue.render()
    assert files(recipes.LOCAL) == before
    assert recipes.find("smollm2-135m/late_filing_r4").config["lora_r"] == 6
    assert "757 recipes: " in capsys.readouterr().out


def test_a_recipe_of_ones_own_task_needs_no_file_and_comes_back_as_it_was(mine, capsys):
    custom.create_task("late_filing", jsonl(mine / "rows.jsonl", TONES))
    written = recipes.find("qwen3-4b/late_filing_r8")
    written.path.unlink()
    rendered = recipes.find("qwen3-4b/late_filing_r8")
    assert rendered.path is None
    assert (rendered.config, rendered.digest) == (written.config, written.digest)


def test_an_imported_recipe_claims_no_value_as_finloras(mine, capsys):
    runs = {"x_4bits_r4": RUN | {"learning_rate": 3e-4, "lora_r": 5, "quant_bits": 4}}
    importer.import_runs(config(mine / "c.json", **runs))
    text = (recipes.LOCAL / "imported" / "x_4bits_r4.yaml").read_text()
    for line in ("learning_rate: 0.0003", "lora_r: 5"):
        (entry,) = [entry for entry in text.splitlines() if entry.startswith(line)]
        assert "  # " in entry and "FinLoRA" not in entry


@pytest.mark.parametrize(
    "base", ["a # b", "a\n\nb: c", "- a", "x" * 200 + " " + "y" * 200], ids=repr
)
def test_a_reason_never_becomes_part_of_a_value(mine, capsys, base):
    importer.import_runs(config(mine / "c.json", odd=RUN | {"base_model": base}))
    assert recipes.find("imported/odd").config["base_model"] == base


def test_one_prompt_is_never_on_both_sides():
    spelt = ("prompt {}", "Prompt  {}", "PROMPT {}\n")
    rows = [(spelt[n % 3].format(n % 20), f"answer {n}") for n in range(100)]
    train, test = custom.split_rows(rows)
    assert sorted(train + test) == list(range(100))
    sides = ({fingerprint(rows[n][0]) for n in side} for side in (train, test))
    assert not set.intersection(*sides)
    assert len(test) == 20


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["a"] * 6 + ["b"] * 9, ["b", "a"]),
        ([f"text {n}" for n in range(15)], []),
        (["a", "b"], []),
        (["x" * 61] * 30, []),
    ],
)
def test_labels_are_few_short_and_frequent(answers, labels):
    assert custom.find_labels(answers) == labels


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        ({"context": "q", "target": "a", "url": "x"}, ("q", "a")),
        ({"question": "q", "answer": 3}, ("q", 3)),
        ({"instruction": "q", "input": "more", "output": "a"}, ("q\n\nmore", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, ("q", "a")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ("q", "a"),
        ),
    ],
)
def test_rows_of_the_usual_shapes_are_taken(row, plain):
    assert tuple(custom.find_pair(row).values()) == plain


WRONG = {
    "no pair": ([*TONES, {"text": "x"}], "line 61: no prompt and answer"),
    "empty answer": ([*TONES, {"prompt": "p", "completion": " "}], "line 61: "),
    "three turns": (
        [*TONES, {"messages": [{"role": "system", "content": "s"}]}],
        "line 61: messages",
    ),
    "few": (TONES[:9], "at least 10 prompts are needed"),
}


@pytest.mark.parametrize(("rows", "said"), WRONG.values(), ids=WRONG)
def test_wrong_rows_are_named_and_nothing_is_written(mine, rows, said):
    source = jsonl(mine / "rows.jsonl", rows)
    before = files(mine)
    with pytest.raises(WrongInput) as error:
        custom.create_task("mine", source)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert files(mine) == before


@pytest.mark.parametrize(
    "task", ["", "My-Task", "../x", "sentiment", "fpb", "sentiment_r8", "x" * 50]
)
def test_a_name_that_would_be_ambiguous_or_unsafe_is_refused(mine, task):
    with pytest.raises(WrongInput, match="TASK"):
        custom.create_task(task, jsonl(mine / "rows.jsonl", TONES))


def test_a_task_that_is_there_is_not_overwritten(mine):
    source = jsonl(mine / "rows.jsonl", TONES)
    custom.create_task("mine", source)
    before = files(mine)
    with pytest.raises(WrongInput, match="mine.yaml is there already; delete it"):
        custom.create_task("mine", source)
    assert files(mine) == before


# ---- FinLoRA's config file

RUN = {
    "base_model": "meta-llama/Llama-3.1-8B-Instruct",
    "dataset_path": "../data/train/finlora_sentiment_train.jsonl",
    "lora_r": 8,
    "quant_bits": 8,
    "learning_rate": 1e-4,
    "num_epochs": 4,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
}


def config(path, **runs):
    path.write_text(json.dumps(runs))
    return path


def test_runs_like_the_catalogues_are_named_and_others_become_recipes(mine, capsys):
    source = config(
        mine / "configs.json",
        sentiment_llama_3_1_8b_8bits_r8=RUN,
        dora=RUN | {"peft_use_dora": True, "lora_alpha": 32},
        faster=RUN | {"learning_rate": 2e-4, "quant_bits": 4, "lora_r": 4},
        other=RUN | {"base_model": "tiiuae/Falcon3-7B-Instruct", "quant_bits": 16},
    )
    importer.import_runs(source)
    out = capsys.readouterr().out
    assert "sentiment_llama_3_1_8b_8bits_r8 is llama-3.1-8b/sentiment_r8\n" in out
    assert "dora is llama-3.1-8b/sentiment_r8_dora_a32\n" in out
    assert "differs from llama-3.1-8b/sentiment_r4 in learning_rate 0.0002 (there 0.0001)" in out
    assert "other: " in out and "nothing in the catalogue is like it" in out
    assert "4 runs: 2 in the catalogue, 2 local" in out
    recipes.clear_caches()
    made = recipes.find("imported/faster")
    twin = recipes.find("sentiment_r4")
    differ = {k for k in twin.config if made.config[k] != twin.config[k]}
    assert differ == {"learning_rate", "output_dir", "dataset_prepared_path"}
    for name in ("faster", "other"):
        recipes.validate(recipes.find(f"imported/{name}").config, name)
    assert recipes.find("other").config["bf16"] == "auto"


def test_a_file_of_ones_own_becomes_a_source(mine, capsys):
    jsonl(mine / "house_train.jsonl", [{"context": "q", "target": "a"}])
    importer.import_runs(config(mine / "c.json", house=RUN | {"dataset_path": "house_train.jsonl"}))
    sources.tables.cache_clear()
    convert.convert_task("house", mine)
    assert (sources.CHAT / "house_train.jsonl").is_file()
    recipes.clear_caches()
    assert (
        recipes.find("imported/house").config["datasets"][0]["path"]
        == "data/chat/house_train.jsonl"
    )


BROKEN = {
    "misspelt key": ({"lora_rank": 8}, "lora_rank: unknown key; did you mean lora_r, lora_alpha?"),
    "bits": ({"quant_bits": 3}, "quant_bits: 3 is none of 4, 8, 16"),
    "text": ({"lora_r": "8"}, 'lora_r: "8" is not int'),
    "truth": ({"num_epochs": True}, "num_epochs: true is not int"),
    "zero": ({"batch_size": 0}, "batch_size: 0 is empty or not above 0"),
    "no data": ({"dataset_path": None}, "dataset_path: null is not str"),
    "data not there": (
        {"dataset_path": "nowhere.jsonl"},
        "dataset_path: nowhere.jsonl is not there, and no file of FinLoRA's",
    ),
}


@pytest.mark.parametrize(("changed", "said"), BROKEN.values(), ids=BROKEN)
def test_a_wrong_run_is_named_with_its_key_and_the_others_are_imported(mine, changed, said, capsys):
    good = RUN | {"learning_rate": 5e-4}
    source = config(mine / "c.json", bad=RUN | changed, good=good)
    with pytest.raises(JobFailed) as error:
        importer.import_runs(source)
    assert f"1 of 2 runs are not imported; the first: bad: {said}" in str(error.value)
    assert recipes.find("imported/good").config["learning_rate"] == 5e-4
    assert "left out   bad: " in capsys.readouterr().out
    assert not (recipes.LOCAL / "imported" / "bad.yaml").exists()


def test_a_config_like_finloras_is_imported_but_for_the_run_without_a_file(mine, capsys):
    bases = ("meta-llama/Llama-3.1-8B-Instruct", "tiiuae/Falcon3-7B-Instruct")
    names = [Path(row["train"]).name for row in sources.published_tables()["tasks"].values()]
    runs = {
        f"{Path(file).stem}_{number}": RUN
        | {"base_model": base, "dataset_path": f"../data/train/{file}"}
        for file in names
        for number, base in enumerate(bases)
    }
    runs["lost"] = RUN | {"dataset_path": "../data/train/never_published_train.jsonl"}
    source = config(mine / "finetune_configs.json", **runs)
    written = []
    for _ in range(2):  # the second time nothing changes
        with pytest.raises(JobFailed, match="the first: lost: dataset_path: .*never_published"):
            importer.import_runs(source)
        assert f"{len(runs)} runs: " in (said := capsys.readouterr().out)
        assert ", 1 left out" in said
        written.append(files(recipes.LOCAL))
    assert written[0] == written[1] and len(written[0]) >= len(names)  # one base is not ours


def test_a_training_file_is_known_by_its_content_and_not_by_its_name(mine, capsys):
    own = jsonl(mine / "ner_train.jsonl", [{"context": "q", "target": "a"}])
    importer.import_runs(config(mine / "c.json", house=RUN | {"dataset_path": own.name}))
    recipes.clear_caches()
    data = recipes.find("imported/house").config["datasets"][0]["path"]
    assert data.startswith("data/chat/ner_") and data != "data/chat/ner_train.jsonl"
    assert "nothing in the catalogue is like it" in capsys.readouterr().out
    # Under another name, a pointer to FinLoRA's file in Git LFS is FinLoRA's file.
    sha = sources.published_tables()["files"]["train/xbrl_extract_train.jsonl"]["sha256"]
    for name, oid in (("pointer", sha), ("other", "0" * 64)):
        (mine / f"{name}.jsonl").write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 137747639\n"
        )
    importer.import_runs(config(mine / "d.json", x=RUN | {"dataset_path": "pointer.jsonl"}))
    assert (
        "data/chat/xbrl_extract_train.jsonl" in (recipes.LOCAL / "imported" / "x.yaml").read_text()
    )
    with pytest.raises(JobFailed, match="other.jsonl is a Git LFS pointer; `git lfs pull`"):
        importer.import_runs(config(mine / "e.json", y=RUN | {"dataset_path": "other.jsonl"}))


def test_importing_overwrites_no_task_and_no_recipe_of_ones_own(mine, capsys):
    custom.create_task("house", jsonl(mine / "house.jsonl", TONES))
    for folder in ("a", "b"):
        (mine / folder).mkdir()
        jsonl(mine / folder / "house_train.jsonl", [{"context": "q", "target": folder}])
    sources.tables.cache_clear()
    recipes.clear_caches()
    runs = {name: RUN | {"dataset_path": f"{name}/house_train.jsonl"} for name in ("a", "b")}
    before = files(mine / "recipes")
    importer.import_runs(config(mine / "c.json", **runs))
    after = files(mine / "recipes")
    assert after == after | before
    paths = {recipes.find(f"imported/{n}").config["datasets"][0]["path"] for n in ("a", "b")}
    assert len(paths) == 2 and "data/chat/house_train.jsonl" not in paths
    importer.import_runs(config(mine / "renamed.json", **runs))
    assert files(mine / "recipes") == after
    edited = recipes.LOCAL / "imported" / "a.yaml"
    edited.write_text(edited.read_text().replace("lora_r: 8", "lora_r: 9"))
    with pytest.raises(JobFailed, match="a.yaml says something else; delete it"):
        importer.import_runs(mine / "c.json")
    assert "lora_r: 9" in edited.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "an object is needed"),
        ("{}", "an object of run names"),
        ('{"a": {}, "a": {}}', 'the key "a" is repeated'),
    ],
)
def test_a_config_file_of_another_shape_is_refused(mine, text, said):
    (mine / "c.json").write_text(text)
    with pytest.raises(WrongInput) as error:
        importer.import_runs(mine / "c.json")
    assert said in str(error.value)


def test_ten_thousand_runs_are_read(mine, capsys):
    runs = {f"run_{n}": RUN for n in range(10_000)}
    importer.import_runs(config(mine / "c.json", **runs))
    assert "10000 runs: 10000 in the catalogue, 0 local" in capsys.readouterr().out


def test_the_commands_answer_with_one_line():
    for arguments, said in (
        (("new",), "TASK=my_task and DATA=my.jsonl are needed"),
        (("new", "x", "nowhere.jsonl"), "DATA=nowhere.jsonl is not there"),
        (("import",), "CONFIG=finetune_configs.json is needed"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert not (ROOT / "recipes" / "local" / "x.yaml").exists()
