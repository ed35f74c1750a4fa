"""Rows and configs of one's own become tasks and recipes, and stay one's own."""

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import run
from tools import catalogue, custom, importer, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput
from tools.data import convert, intake
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
        assert len(rows) == {"train": 43, "val": 5, "test": 12}[side]
    assert kept == {row["prompt"].strip(): row["completion"] for row in TONES}

    recipe = recipes.find("qwen3-4b/late_filing_r8_dora")
    assert recipe.path == recipes.LOCAL / "qwen3-4b" / "late_filing_r8_dora.yaml"
    assert (recipe.task, recipe.config["peft_use_dora"]) == ("late_filing", True)
    assert recipes.find("late_filing_r4").name == "llama-3.1-8b/late_filing_r4"
    made = [name for name in recipes.list_names() if "late_filing" in name]
    methods = [row for row in recipes.read_matrix()["methods"].values() if "only" not in row]
    models = recipes.read_matrix()["models"].values()
    assert len(made) == sum(len(row.get("methods", methods)) for row in models)
    recipes.validate(recipe.config, "mine")
    task = yaml.safe_load((custom.TASKS / "late_filing.yaml").read_text())
    assert task["task"] == "finlora_late_filing"
    assert task["filter_list"][0]["filter"][0]["labels"] == ["Yes", "No"]


@pytest.mark.slow
def test_render_leaves_what_is_ones_own_as_it_is(mine, capsys):
    custom.create_task("late_filing", jsonl(mine / "rows.jsonl", TONES))
    path = recipes.find("smollm2-135m/late_filing_r4").path
    path.write_text(path.read_text().replace("lora_r: 4", "lora_r: 6"))
    before = files(recipes.LOCAL)
    catalogue.render()
    assert files(recipes.LOCAL) == before
    assert recipes.find("smollm2-135m/late_filing_r4").config["lora_r"] == 6
    assert "1394 recipes: " in capsys.readouterr().out


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


def read_sides(task):
    """{side: [(prompt, answer), …]} of a task's converted rows."""
    sides = {}
    for side in ("train", "val", "test"):
        path = sources.CHAT / f"{task}_{side}.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line)["messages"] for line in lines]
        sides[side] = [(row[-2]["content"], row[-1]["content"]) for row in rows]
    return sides


def test_one_prompt_is_never_on_two_sides(mine, capsys):
    spelt = ("prompt {}", "Prompt  {}", "PROMPT {}\n")
    rows = [
        {"prompt": spelt[n % 3].format(n % 40), "completion": f"answer {n}"} for n in range(200)
    ]
    custom.create_task("mine", jsonl(mine / "rows.jsonl", rows))
    sides = read_sides("mine")
    assert sum(map(len, sides.values())) == 200 and all(sides.values())
    marks = {side: {fingerprint(prompt) for prompt, _ in pairs} for side, pairs in sides.items()}
    assert sum(map(len, marks.values())) == len(set.union(*marks.values())) == 40


def test_sides_are_stratified_by_label_and_the_order_of_the_file_decides_nothing(mine, capsys):
    rows = [{"text": f"t {n}", "label": "rare" if n % 10 == 0 else "often"} for n in range(300)]
    custom.create_task("one", jsonl(mine / "one.jsonl", rows))
    custom.create_task("two", jsonl(mine / "two.jsonl", rows[::-1]))
    first, second = read_sides("one"), read_sides("two")
    assert [answer for _, answer in first["test"]].count("rare") == 6 and len(first["test"]) == 60
    assert [answer for _, answer in first["val"]].count("rare") == 2
    assert {side: sorted(rows) for side, rows in first.items()} == {
        side: sorted(rows) for side, rows in second.items()
    }


def test_a_group_is_never_on_two_sides_and_the_newest_rows_test(mine, capsys):
    rows = [
        {"question": f"q {n}", "answer": f"a {n}", "firm": f"f {n % 25}", "day": f"20{n:02}-01-31"}
        for n in range(100)
    ]
    source = jsonl(mine / "rows.jsonl", rows)
    custom.create_task("grouped", source, custom.Choices(group="firm"))
    firms = {
        side: {int(prompt[2:]) % 25 for prompt, _ in pairs}
        for side, pairs in read_sides("grouped").items()
    }
    assert sum(map(len, firms.values())) == 25 and all(firms.values())
    custom.create_task("timed", source, custom.Choices(time="day"))
    sides = read_sides("timed")
    numbers = {side: [int(prompt[2:]) for prompt, _ in pairs] for side, pairs in sides.items()}
    assert max(numbers["train"]) < min(numbers["val"]) <= max(numbers["val"]) < min(numbers["test"])
    assert len(numbers["test"]) == 20
    with pytest.raises(WrongInput, match='GROUP: .* has no column "frim"; did you mean firm'):
        custom.create_task("x", source, custom.Choices(group="frim"))
    mixed = jsonl(mine / "mixed.jsonl", [*rows[:60], *(row | {"day": "2025"} for row in rows[60:])])
    with pytest.raises(WrongInput, match='"day" is .2025., a number, and a date in the first row'):
        custom.create_task("x", mixed, custom.Choices(time="day"))
    with pytest.raises(WrongInput, match='"firm" is .f 0., no date such as'):
        custom.create_task("x", source, custom.Choices(time="firm"))


def test_a_test_file_of_ones_own_tests_and_none_of_its_prompts_train(mine, capsys):
    source = jsonl(mine / "rows.jsonl", TONES)
    test = jsonl(mine / "test.jsonl", [*TONES[:5], {"prompt": "new", "completion": "yes"}])
    custom.create_task("mine", source, custom.Choices(test=str(test)))
    sides = read_sides("mine")
    assert [prompt for prompt, _ in sides["test"]][-1] == "new" and len(sides["test"]) == 6
    assert sides["test"][-1][1] == "Yes"  # spelled as the other rows spell it
    assert len(sides["train"]) + len(sides["val"]) == 55
    out = capsys.readouterr().out
    assert "5 rows do not train: their prompts test or validate" in out


def test_bad_rows_are_listed_with_the_files_own_columns_and_may_be_left_out(mine, capsys):
    bad = [{"question": f"b {n}", "reply": value} for n, value in enumerate(["", None, "nan"] * 5)]
    good = [{"question": f"q {n}", "reply": f"a {n}"} for n in range(40)]
    good[3]["reply"] += "<|im_end|>"
    good[4]["question"] = "page one\fpage two"
    source = jsonl(mine / "rows.jsonl", [*bad, *good, {"question": "<|im_start|>x", "reply": "y"}])
    named = custom.Choices(mapping="prompt=question,answer=reply")
    before = files(mine)
    with pytest.raises(WrongInput, match='line 1: "reply" is empty; 15 more rows cannot be used'):
        custom.create_task("mine", source, named)
    assert files(mine) == before
    out = capsys.readouterr().out
    assert 'line 2: "reply" is null' in out and "line 11" not in out
    assert '5 rows: "reply" is null' in out
    custom.create_task("mine", source, replace(named, quarantine=True))
    assert sum(map(len, read_sides("mine").values())) == 40
    out = capsys.readouterr().out
    assert "1 rows: end tokens taken off answers" in out
    assert "1 rows: page breaks made line breaks" in out
    refused = (custom.DATA / "mine.refused.jsonl").read_text().splitlines()
    assert len(refused) == 16 and json.loads(refused[-1])["place"] == "line 56"


def test_the_last_answer_alone_is_trained_on_where_that_is_asked(mine, capsys):
    turns = [{"role": r, "content": r} for r in ("user", "assistant")]
    rows = [
        {"messages": [{"role": "user", "content": f"q {n}"}, *turns[1:], *turns]} for n in range(30)
    ]
    custom.create_task("mine", jsonl(mine / "rows.jsonl", rows), custom.Choices(last_only=True))
    line = (sources.CHAT / "mine_train.jsonl").read_text().splitlines()[0]
    assert [turn.get("train") for turn in json.loads(line)["messages"]] == [None, False, None, None]
    entry = recipes.find("smollm2-135m/mine_r4").config["datasets"][0]
    assert entry["message_field_training"] == "train"


def test_long_rows_are_refused_cut_or_left_out_and_counted_for_each_base(mine, smollm2, capsys):
    rows = [
        {"question": f"q {n} " + "word " * (5000 if n == 7 else 3), "answer": f"a {n}"}
        for n in range(30)
    ]
    source = jsonl(mine / "rows.jsonl", rows)
    with pytest.raises(
        WrongInput, match=r"line 8: 5,0\d\d tokens for smollm2-135m, more than 4,096"
    ):
        custom.create_task("mine", source)
    custom.create_task("mine", source, custom.Choices(cut=True))
    out = capsys.readouterr().out
    assert "smollm2-135m: 1 rows over sequence_len (4,096 tokens)" in out
    assert "not counted for llama-3.1-8b" in out or "llama-3.1-8b: " in out
    pairs = [pair for pairs in read_sides("mine").values() for pair in pairs]
    assert len(pairs) == 30 and sum("[…]" in prompt for prompt, _ in pairs) == 1
    custom.create_task("other", source, custom.Choices(quarantine=True))
    assert sum(map(len, read_sides("other").values())) == 29


@pytest.mark.parametrize(("rows", "epochs"), [(40, 10), (300, 6), (5000, 4), (50_000, 2)])
def test_steps_follow_from_the_rows(rows, epochs):
    settings = custom.build_settings(900, rows, True)
    assert (settings["num_epochs"], settings["max_steps"]) == (epochs, None)
    assert settings["load_best_model_at_end"]
    assert custom.build_settings(900, rows, False)["load_best_model_at_end"] is None
    assert settings["sequence_len"] == 1536 and settings["eval_steps"] == settings["save_steps"]


def test_a_recipe_of_ones_own_task_has_no_steps_of_the_demos(mine, capsys):
    custom.create_task("late_filing", jsonl(mine / "rows.jsonl", TONES))
    config = recipes.find("smollm2-135m/late_filing_r4").config
    assert "max_steps" not in config
    assert (config["num_epochs"], config["learning_rate"]) == (10, 0.0005)
    assert config["save_steps"] == config["eval_steps"] == 6


WRONG = {
    "no pair": ([*TONES, {"text": "x"}], 'line 61: "prompt" is null'),
    "empty answer": ([*TONES, {"prompt": "p", "completion": " "}], "line 61: "),
    "three turns": (
        [{"messages": [{"role": "system", "content": "s"}]}],
        'row 1: "messages" ends with the system',
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
    with pytest.raises(WrongInput, match="the task mine already exists.* rm -f ") as refused:
        custom.create_task("mine", source)
    assert files(mine) == before
    (recipes.LOCAL / "mine.yaml").unlink()  # the recipes are still there
    recipes.clear_caches()
    with pytest.raises(WrongInput, match="the task mine already exists"):
        custom.create_task("mine", source)

    # What the message says works, and nothing of the old rows is left.
    subprocess.run(["bash", "-c", str(refused.value).partition("again: ")[2]], check=True)
    custom.forget_tables()
    fewer = [{"prompt": f"Is report {n} out?", "completion": "Yes"} for n in range(12)]
    custom.create_task("mine", jsonl(mine / "fewer.jsonl", fewer))
    sides = read_sides("mine")
    assert sum(map(len, sides.values())) == 12 and not sides["val"]


def test_prompts_list_the_labels_of_the_rows_that_are_taken(mine, capsys):
    rows = [{"text": f"t {n}", "label": ("Positive", "negative")[n % 2]} for n in range(40)]
    rows += [{"text": "", "label": "JUNK"}]
    tested = [{"text": f"u {n}", "label": "positive"} for n in range(30)]
    test = jsonl(mine / "test.jsonl", tested)
    choices = custom.Choices(test=str(test), quarantine=True)
    custom.create_task("mine", jsonl(mine / "rows.jsonl", rows), choices)
    pairs = [pair for side in read_sides("mine").values() for pair in side]
    assert {answer for _, answer in pairs} == {"positive", "negative"}
    asked = {prompt.partition("\n\n")[2] for prompt, _ in pairs}
    assert asked == {"Answer with one of: negative, positive."}
    assert "merged: Positive → positive" in capsys.readouterr().out


def test_what_cannot_be_divided_or_scored_is_one_line(mine, capsys):
    rows = [{"text": f"t {n}", "label": ("good", "bad")[n % 2], "g": 1} for n in range(40)]
    source = jsonl(mine / "rows.jsonl", rows)
    with pytest.raises(WrongInput, match="GROUP: too few groups"):
        custom.create_task("mine", source, custom.Choices(group="g"))
    unlabelled = jsonl(mine / "test.jsonl", [{"text": "u", "headline": "x"}])
    with pytest.raises(WrongInput, match=r"test\.jsonl: no column holds answers"):
        custom.create_task("mine", source, custom.Choices(test=str(unlabelled)))
    with pytest.raises(WrongInput, match="0 prompts that do not test or validate"):
        custom.create_task("mine", source, custom.Choices(test=str(source)))
    others = [{"text": f"u {n}", "label": n % 2} for n in range(10)]
    test = jsonl(mine / "others.jsonl", others)
    custom.create_task("mine", source, custom.Choices(test=str(test)))
    assert "no training row has these labels of the test rows: 0, 1" in capsys.readouterr().out


def test_test_rows_with_other_columns_are_worded_and_named_as_the_others(mine, capsys):
    rows = [{"text": f"t {n}", "label": n % 2 + 1} for n in range(40)]
    tested = [{"headline": f"u {n}", "sentiment": n % 2 + 1} for n in range(10)]
    test = str(jsonl(mine / "test.jsonl", tested))
    named = custom.Choices(test=test, labels="1=bad,2=good", template="{text}?\\n{labels}")
    custom.create_task("mine", jsonl(mine / "rows.jsonl", rows), named)
    assert read_sides("mine")["test"][:2] == [
        ("u 0?\nbad, good", "bad"),
        ("u 1?\nbad, good", "good"),
    ]
    passages = [{"question": f"q {n}", "passage": f"p {n}", "answer": "a"} for n in range(40)]
    bare = str(
        jsonl(mine / "bare.jsonl", [{"question": f"r {n}", "answer": "a"} for n in range(9)])
    )
    with pytest.raises(WrongInput, match="bare.jsonl has no column passage, which prompts hold"):
        custom.create_task("read", jsonl(mine / "p.jsonl", passages), custom.Choices(test=bare))


def test_where_no_row_can_be_used_the_first_reason_is_named(mine):
    source = jsonl(mine / "rows.jsonl", [{"prompt": "p", "completion": ""}] * 20)
    with pytest.raises(WrongInput, match='no row can be used; line 1: "completion" is empty'):
        custom.create_task("mine", source, custom.Choices(quarantine=True))
    unwanted = [*TONES, TONES[0]]
    labelled = [row | {"label": n > 3} for n, row in enumerate(unwanted)]
    with pytest.raises(WrongInput, match="label says which completions are wanted"):
        custom.create_task("mine", jsonl(mine / "kto.jsonl", labelled))
    preferred = jsonl(mine / "dpo.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 20)
    with pytest.raises(WrongInput, match="rows of preferences .*; MAP= trains on one"):
        custom.create_task("mine", preferred)


def test_unix_time_orders_rows_and_the_rule_says_what_the_newest_do(mine, capsys):
    start = 1_700_000_000
    rows = [{"text": f"t {n}", "label": "ab"[n % 2], "at": str(start + n)} for n in range(200)]
    custom.create_task("mine", jsonl(mine / "rows.jsonl", rows), custom.Choices(time="at"))
    newest = {prompt.split("\n")[0] for prompt, _ in read_sides("mine")["test"]}
    assert newest == {f"t {n}" for n in range(160, 200)}
    test = jsonl(mine / "test.jsonl", [{"text": "new", "label": "a", "at": "1"}] * 5)
    custom.create_task("dated", mine / "rows.jsonl", custom.Choices(time="at", test=str(test)))
    assert "by time (at), the newest rows validate" in capsys.readouterr().out


def test_rows_that_a_task_would_overwrite_are_not_its_source(mine):
    custom.DATA.mkdir(parents=True)
    source = jsonl(custom.DATA / "mine_train.jsonl", TONES)
    with pytest.raises(WrongInput, match="the task mine writes this file"):
        custom.create_task("mine", source)
    assert source.is_file()


def test_a_refused_row_may_hold_any_number(mine):
    rows = [*TONES, {"prompt": "", "completion": "x", "id": 10**30}]
    source = jsonl(mine / "rows.jsonl", rows)
    custom.create_task("mine", source, custom.Choices(quarantine=True))
    assert str(10**30) in (custom.DATA / "mine.refused.jsonl").read_text()


def test_the_budget_is_that_of_the_longest_of_many_answers():
    counted = intake.Intake(io.BytesIO())
    for number in range(intake.MOST_ANSWERS + 50):
        counted.add_answer("long " * 200 if number == 1 else f"answer {number}")
    assert "long " * 200 in counted.list_answers()


@pytest.mark.parametrize("has_test", [True, False])
def test_a_datasets_own_splits_test_and_validate(mine, capsys, has_test):
    from datasets import Dataset, DatasetDict

    def build(numbers):
        rows = [{"prompt": f"Late? {n}", "completion": "Yes" if n % 3 else "No"} for n in numbers]
        return Dataset.from_list(rows)

    # Prompt 0 is in all splits, prompt 100 in two of them.
    splits = {"train": build(range(60)), "validation": build([0, 100, *range(110, 120)])}
    if has_test:
        splits["test"] = build([0, 100, *range(200, 220)])
    DatasetDict(splits).save_to_disk(mine / "set")
    custom.create_task("late", mine / "set")
    prompts = {
        side: {
            json.loads(line)["messages"][0]["content"]
            for line in (custom.DATA / f"late_{side}.jsonl").read_text().splitlines()
        }
        for side in ("train", "val", "test")
    }
    assert prompts["train"].isdisjoint(prompts["val"] | prompts["test"])
    assert prompts["val"].isdisjoint(prompts["test"])
    if has_test:
        assert (len(prompts["test"]), len(prompts["val"])) == (22, 10)
        assert (
            "2 rows do not validate: their prompts are in the test rows" in capsys.readouterr().out
        )
    else:
        assert len(prompts["val"]) == 12 and prompts["test"] < {f"Late? {n}" for n in range(1, 60)}


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
    "zero": ({"batch_size": 0}, "batch_size: 0 is not a number above 0"),
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
        (("new", "x", "nowhere.jsonl"), "nowhere.jsonl is not there"),
        (("import",), "CONFIG=finetune_configs.json is needed"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert not (ROOT / "recipes" / "local" / "x.yaml").exists()


CASES = ROOT.parent / "shared" / "cases" / "data"
# Of each file: rows that train and test, and what is printed; or the refusal.
TAKEN = {
    "Sentences_AllAgree.txt": (60, "latin-1"),
    "alpaca_pretty.json": (60, "Alpaca: prompt instruction, answer output, context input"),
    "eos.jsonl": (60, "60 rows: end tokens taken off answers"),
    "formfeed.jsonl": (20, "20 rows: page breaks made line breaks"),
    "label_case.jsonl": (60, "answers: 3 labels"),
    "letters.jsonl": (60, "answers: 4 labels: A, B, C, D"),
    "list_answers.jsonl": (60, "answers: lists"),
    "multiturn.jsonl": (60, "messages"),
    "numeric.jsonl": (40, "answers: numbers"),
    "qa_context.jsonl": (40, "not used: ticker, filing"),
    "sharegpt.json": (60, "ShareGPT: messages conversations"),
    "system.jsonl": (60, "answers: 3 labels"),
    "text_label.csv": (60, "csv; text and label: prompt text, answer label"),
}


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases/data is not at hand")
@pytest.mark.parametrize("name", TAKEN)
def test_the_rows_of_a_case_are_taken(mine, name, capsys):
    custom.create_task("mine", CASES / name)
    rows, said = TAKEN[name]
    sides = read_sides("mine")
    assert sum(map(len, sides.values())) == rows and all(sides.values())
    assert said in capsys.readouterr().out
    if name == "qa_context.jsonl":
        assert all("PASSAGE-" in prompt for prompt, _ in sides["train"])
    if name == "eos.jsonl":
        assert {answer for _, answer in sides["train"]} == {"negative", "neutral", "positive"}


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases/data is not at hand")
def test_the_rows_of_a_case_that_are_wrong_are_refused_and_may_be_left_out(mine, capsys):
    with pytest.raises(WrongInput, match='no row can be read; .*line 1: the key "answer"'):
        custom.create_task("mine", CASES / "dupkey.jsonl")
    with pytest.raises(WrongInput, match='line 11: "answer" is empty; 2 more rows'):
        custom.create_task("mine", CASES / "empties.jsonl")
    custom.create_task("mine", CASES / "empties.jsonl", custom.Choices(quarantine=True))
    assert sum(map(len, read_sides("mine").values())) == 57
