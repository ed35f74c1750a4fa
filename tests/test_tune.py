"""make tune: what it tries, what judges, what it costs, and what it says at the end."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from tests.conftest import call, write_recipe
from tools import custom, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput, digest, write_json
from tools.data.rules import fingerprint, fingerprint_row
from tools.runs import Run
from tools.train import checks, hardware, launch, search, trial, tune
from tools.train.heldout import hold_out
from tools.train.space import Range, Space, Validation, read_settings

SMALL = "validation: {least: 20, most: 40}\nspace:\n  learning_rate: [0.0005, 0.005]\n"


def write_chat(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_prompts(path: Path) -> list[bytes]:
    rows = map(json.loads, path.read_text().splitlines())
    return [fingerprint(row["messages"][0]["content"]) for row in rows]


@pytest.fixture
def small(tmp_path) -> Path:
    file = tmp_path / "space.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where searches and results go."""
    monkeypatch.setattr(search, "FOLDER", tmp_path / "tune")
    monkeypatch.setattr(tune, "RESULTS", tmp_path / "results")
    return tmp_path


# ---- the space


def test_the_recipe_is_a_point_of_the_space_and_stays_itself_there():
    for name in (
        "smollm2-135m/sentiment_r4",
        "gemma-3-4b/finer_qlora_all",
        "llama-3.1-8b/formula_r8",
    ):
        config = recipes.build_config(name)
        space = Space(read_settings(None).space, config)
        assert space.apply(space.own) == config, name
        space.build_distributions()


def test_a_point_changes_the_keys_that_it_names_and_no_others():
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    space = Space(read_settings(None).space, config)
    modules = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    point = space.own | {"lora_r": 16, "batch": 32, "learning_rate": 0.00123456}
    changed = space.apply(point | {"lora_target_modules": modules})
    assert changed == config | {
        "lora_r": 16,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 0.00123,
        "lora_target_modules": modules.split(),
    }
    assert space.apply(space.own | {"batch": 4})["micro_batch_size"] == 4


def test_modules_of_a_base_with_a_vision_tower_are_named_in_full():
    config = recipes.build_config("gemma-3-4b/finer_r4")
    space = Space(read_settings(None).space, config)
    point = space.own | {"lora_target_modules": "q_proj k_proj v_proj o_proj"}
    pattern = space.apply(point)["lora_target_modules"]
    assert pattern == config["lora_target_modules"].replace("v_proj", "v_proj|o_proj")


def test_a_space_is_widened_to_what_the_recipe_has():
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    config |= {"learning_rate": 0.01, "lora_r": 5, "lora_dropout": 0.3}
    space = Space(read_settings(None).space, config)
    distributions = space.build_distributions()
    assert distributions["learning_rate"].high == 0.01
    assert 5 in distributions["lora_r"].choices and 0.3 in distributions["lora_dropout"].choices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {max_steps: [10]}", "max_steps is the same for all"),
        ("space: {batch: [0, 8]}", "batch needs a list of whole numbers"),
        ("space: {learning_rate: {low: 1, high: 0.1}}", "low must be below high"),
        ("space: {learning_rate: {low: 0, high: 1, log: true}}", "above 0"),
        ("space: {lora_r: [8, 8]}", "each once"),
        ("spaces: {}", "spaces: "),
        ("validation: {least: 50, most: 20}", "least must not be above most"),
        ("[1, 2]", "sections"),
        ("evaluations: 1", "greater than or equal to 2"),
        ("space: {logging_steps: [1, 10]}", "logging_steps is the same for all"),
        ("space: {learning_rate: [1e-4, 0.0001]}", "each once"),  # YAML reads the first as text
        ("space: {learning_rate: [0.1, .nan]}", "learning_rate needs finite numbers"),
        ("space: {weight_decay: {low: 0, high: .inf}}", "low must be below high"),
    ],
)
def test_a_wrong_space_is_named_with_file_and_key(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(WrongInput, match=rf"mine\.yaml.*{words}"):
        read_settings(file)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("space: {learning_rate: [1e-4, 1e-3], lr_scheduler: [linear]}")
    assert read_settings(file).space == {"learning_rate": [1e-4, 1e-3], "lr_scheduler": ["linear"]}


@pytest.mark.parametrize(
    ("key", "entry", "own", "words"),
    [
        ("learning_rate", {"low": 0.1, "high": 1}, None, "range and the recipe has None"),
        ("learning_rate", {"low": 0.1, "high": 1}, float("inf"), "the recipe has inf"),
        ("weight_decay", {"low": 0.1, "high": 1, "log": True}, 0.0, "logarithmic .* has 0.0"),
        ("special_tokens", [None], {"pad_token": "x"}, "leave it out of the space"),
    ],
)
def test_a_space_that_the_recipe_does_not_fit_is_refused(key, entry, own, words):
    config = recipes.build_config("smollm2-135m/sentiment_r4") | {key: own}
    entry = Range(**entry) if isinstance(entry, dict) else entry
    with pytest.raises(WrongInput, match=f"space: {key} .*{words}"):
        Space({key: entry}, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("peft_init_lora_weights", "pissa"), ("adapter", "lora"), ("rl", "dpo")],
)
def test_a_space_offers_nothing_that_a_training_refuses(key, value):
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    with pytest.raises(WrongInput, match=f"^mine, space: .*{key}"):
        tune.validate_points(Space({key: [value]}, config), "mine")


def test_axolotl_takes_every_value_of_the_default_space_and_a_misspelt_key_is_named():
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    space = Space(read_settings(None).space, config)
    assert len(space.list_extremes()) == 23
    tune.validate_points(space, "mine")
    with pytest.raises(WrongInput, match="mine, space: Axolotl has no key lora_rank"):
        tune.validate_points(Space({"lora_rank": [4]}, config), "mine")


@pytest.mark.parametrize(
    ("entry", "rates"),
    [
        ({"low": 0.00005, "high": 0.005, "log": True}, [0.0005, 0.001, 0.002, 0.00025]),
        ({"low": 0.0004, "high": 0.001, "log": True}, [0.0005, 0.001]),
        ({"low": 0.001, "high": 0.002, "log": True}, [0.0005, 0.001, 0.002]),
        ([0.001, 0.01], [0.0005]),
    ],
)
def test_other_learning_rates_of_a_range_are_tried_first(entry, rates):
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    space = Space({"learning_rate": Range(**entry) if isinstance(entry, dict) else entry}, config)
    assert [point["learning_rate"] for point in space.list_first()] == pytest.approx(rates)
    whole = Space({**read_settings(None).space}, config).list_first()
    assert all(point | {"learning_rate": 0.0005} == whole[0] for point in whole)
    assert Space({"lora_r": [4, 8]}, config).list_first() == [{"lora_r": 4}]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_a_search_needs_time(monkeypatch, capsys, minutes):
    with pytest.raises(SystemExit):
        call(monkeypatch, "tune", "smollm2-135m/sentiment_r4", f"--minutes={minutes}")
    assert "error: MINUTES: " in (text := capsys.readouterr().err) and "a number above 0" in text


# ---- rows


@pytest.fixture
def divided(tmp_path):
    """Divides rows: {prompts that validate already} and training rows in three copies each."""

    def divide(train: int, own: int, copies: int = 1) -> tuple:
        folder = tmp_path / f"{train}-{own}"
        folder.mkdir()
        pairs = [(f"Row {n // copies}?", str(n % 3)) for n in range(train)]
        config = recipes.build_config("smollm2-135m/formula_r4")
        path = write_chat(folder / "formula_train.jsonl", pairs)
        config["datasets"][0]["path"] = str(path)
        val = write_chat(folder / "formula_val.jsonl", [(f"Own {n}?", "1") for n in range(own)])
        config["test_datasets"][0]["path"] = str(val)
        recipe = recipes.Recipe("mine.yaml", folder / "mine.yaml", config, "1")
        return recipe, hold_out(recipe, Validation(least=100, most=200), folder / "out")

    return divide


@pytest.mark.parametrize(
    ("train", "own", "judged", "held_back"),
    [(900, 18, 183, 165), (900, 150, 150, 0), (5000, 5, 200, 195), (90, 0, 30, 30)],
)
def test_a_hundred_rows_and_more_judge_where_there_are_enough(
    divided, train, own, judged, held_back
):
    _, division = divided(train, own)
    assert (division.judged, division.held_back) == (judged, held_back)
    assert division.trained == train - held_back
    assert f"{judged} judge" in str(division)


def test_of_many_validation_rows_two_hundred_judge_and_the_others_do_not_train(divided):
    _, division = divided(900, 500)
    assert (division.trained, division.judged, division.held_back) == (900, 200, 0)


def test_validation_rows_that_cannot_be_read_are_not_passed_over(divided):
    recipe, division = divided(900, 150)
    recipe.config["test_datasets"].append({"path": "owner/rows", "type": "chat_template"})
    with pytest.raises(WrongInput, match="owner/rows has others"):
        hold_out(recipe, Validation(least=100, most=200), division.train.parent)


def test_no_prompt_both_trains_and_judges(divided):
    recipe, division = divided(900, 6, copies=3)
    trains, judges = (read_prompts(path) for path in (division.train, division.validation))
    assert not set(trains) & set(judges)
    assert len(trains) + len(judges) == 906 and 100 <= len(judges) <= 200
    assert {Path(path).name for path in (division.train, division.validation)} == {
        "formula_train.jsonl",
        "formula_val.jsonl",
    }
    before = digest(division.validation)
    hold_out(recipe, Validation(least=100, most=200), division.train.parent)
    assert digest(division.validation) == before


def test_rows_about_one_sentence_are_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "find_task", lambda config: "ner")  # whatever the files' folder

    def ask(number):
        return f"What is 'E{number}'?\nInput: Sentence {number // 9}.\nAnswer:", "person"

    config = recipes.build_config("smollm2-135m/ner_r4")
    files = {"datasets": range(20, 900), "test_datasets": range(17)}
    for key, numbers in files.items():
        path = write_chat(tmp_path / f"ner_{key}.jsonl", [ask(number) for number in numbers])
        config[key][0]["path"] = str(path)
    recipe = recipes.Recipe("smollm2-135m/ner_r4", None, config, "1")
    division = hold_out(recipe, Validation(least=100, most=200), tmp_path / "out")
    texts = [path.read_text() for path in (division.train, division.validation)]
    trains, judges = (set(re.findall(r"Sentence \d+\.", text)) for text in texts)
    assert trains and judges and not trains & judges and 100 <= division.judged <= 200


def test_prompts_are_compared_by_all_turns_before_the_answer():
    def mark(*turns):
        return fingerprint_row(
            {"chat": [{"role": "user", "content": text} for text in turns]}, "chat"
        )

    assert mark("A b", "c") == mark("a  B", "d") != mark("a", "b", "c")


@pytest.fixture
def hold_out_of(tmp_path):
    """Divides 50 rows, each a text with the row's number in place of N."""

    def divide(text: str, **entry):
        path = tmp_path / "plain.jsonl"
        path.write_text("".join(text.replace("N", str(n)) + "\n" for n in range(50)))
        config = recipes.build_config("smollm2-135m/formula_r4")
        config["datasets"][0] |= {"path": str(path)} | entry
        config["test_datasets"] = None  # or rows in data/chat would validate, where there are any
        recipe = recipes.Recipe("mine", tmp_path / "mine.yaml", config, "1")
        return hold_out(recipe, Validation(least=2, most=9), tmp_path)

    return divide


SHARE_GPT = '{"messages": [{"from": "human", "value": "N?"}, {"from": "gpt", "value": "N"}]}'


@pytest.mark.parametrize(
    "text",
    ['{"text": "N"}', '{"messages": ["a", "b"]}', '{"messages": "N"}', '{"messages": []}', "[1]"]
    + [SHARE_GPT],
)
def test_rows_without_turns_are_refused(hold_out_of, text):
    words = r"JSONL rows with turns under messages, each with role and content; .*plain\.jsonl"
    with pytest.raises(WrongInput, match=words):
        hold_out_of(text)


def test_turns_may_have_the_names_that_the_recipe_says(hold_out_of):
    names = {"role": "from", "content": "value"}
    division = hold_out_of(SHARE_GPT, message_property_mappings=names)
    assert (division.trained, division.judged) == (41, 9)


# ---- judging


def test_the_rule_that_fits_the_validation_rows_scores_them(tmp_path):
    from evals.validation import find_scorer

    three = write_chat(tmp_path / "a.jsonl", [("Up?", "positive"), ("Down?", "negative")])
    seven = write_chat(tmp_path / "b.jsonl", [("Up?", "mildly positive")])
    other = write_chat(tmp_path / "c.jsonl", [("Up?", "who knows")])
    assert (find_scorer("sentiment", three).dataset, find_scorer("sentiment", three).metric) == (
        "fpb",
        "accuracy",
    )
    assert find_scorer("sentiment", seven).dataset == "nwgi"
    with pytest.raises(WrongInput, match=r"no evaluation of sentiment .*c\.jsonl"):
        find_scorer("sentiment", other)
    with pytest.raises(WrongInput, match="general_multi is several tasks"):
        find_scorer("general_multi", three)
    with pytest.raises(WrongInput, match="no task of the tables"):
        find_scorer(None, three)


@pytest.mark.parametrize("task", ["xbrl_term", "financebench"])
def test_where_the_metrics_model_is_missing_the_refusal_says_so(tmp_path, monkeypatch, task):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    rows = write_chat(tmp_path / f"{task}_val.jsonl", [("What?", "A word"), ("Who?", "Another")])
    with pytest.raises(WrongInput, match="JUDGE=metric: bertscore is .*`hf download .*the loss"):
        search.name_metric_of_rows(task, rows)
    config = {"datasets": [{"path": f"{task}_train.jsonl"}], "greater_is_better": True}
    config |= {"test_datasets": [{}], "metric_for_best_model": "eval_bertscore"}
    with pytest.raises(WrongInput, match="^mine: .*eval_bertscore: .*`hf download .*eval_loss"):
        checks.refuse_unscorable(config, "mine", 1)
    checks.refuse_unscorable(config | {"metric_for_best_model": "eval_rouge_l"}, "mine", 1)


def test_a_metric_for_the_best_checkpoint_must_be_the_tasks(tmp_path):
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    good = config | {"metric_for_best_model": "eval_accuracy", "greater_is_better": True}
    checks.refuse_unscorable(config, "mine", 4)
    checks.refuse_unscorable(config | {"metric_for_best_model": "eval_loss"}, "mine", 4)
    checks.refuse_unscorable(good, "mine", 1)
    for changes, processes, words in (
        ({"metric_for_best_model": "eval_bleu"}, 1, "there are eval_loss, eval_accuracy"),
        ({}, 2, "needs one process"),
        ({"greater_is_better": None}, 1, "needs greater_is_better: true"),
        ({"test_datasets": None}, 1, "needs validation rows"),
        ({"datasets": [{"path": "my.jsonl"}]}, 1, "of no task with a metric"),
    ):
        with pytest.raises(WrongInput, match=f"^mine: metric_for_best_model: .*{words}"):
            checks.refuse_unscorable(good | changes, "mine", processes)


# ---- the search, on files of trainings


@pytest.fixture
def opened(place, tiny, chat_rows, small):
    """A search of the tiny Llama, whose trainings are written by hand."""
    recipe = recipes.find(str(write_recipe(place, "r4", tiny, chat_rows)))

    def open_search(**request) -> search.Search:
        request = search.SearchRequest(**{"equal": "steps", "space": small} | request)
        opened = search.Search(recipe, request, "cpu", read_settings(small))
        opened.open()
        return opened

    return open_search


def stop(*_):
    raise KeyboardInterrupt


def evaluate(opened, number, losses, steps=12):
    """Writes the evaluations of a training: `losses` are means over rows that differ by 0.1."""
    run = Run(opened.folder / f"{number:03d}")
    run.folder.mkdir(exist_ok=True)
    with open(run.validation_file, "a") as file:
        for place, loss in enumerate(losses, 1):
            rows = [loss + 0.1 * (row % 2) - 0.05 for row in range(30)]
            line = {"step": 3 * place, "steps": steps, "loss": loss, "losses": rows, "scores": {}}
            file.write(json.dumps(line) + "\n")
    return run


def finish(opened, losses, seconds=60.0, state="COMPLETE", **attributes):
    """A candidate as a search leaves it."""
    from optuna.trial import TrialState

    trial = opened.study.ask(opened.space.build_distributions())
    run = evaluate(opened, trial.number, losses)
    would_stop = opened.pass_on(trial, run)
    for name, value in {"seconds": seconds, "steps": 12, **attributes}.items():
        trial.set_user_attr(name, value)
    opened.study.tell(trial, losses[-1] if state == "COMPLETE" else None, state=TrialState[state])
    return would_stop


def test_the_first_candidate_is_the_recipe_as_it_stands(opened):
    first = opened()
    trial = first.study.ask(first.space.build_distributions())
    assert trial.params == first.space.own
    assert first.candidate(0).config == first.recipe.config
    assert first.choose_steps(trial) is None


def test_a_search_asks_for_multiples_of_the_rate_first_and_waiting_ones_do_not_count(opened, small):
    rates = "{low: 0.00001, high: 0.1, log: true}"
    small.write_text(SMALL.replace("[0.0005, 0.005]", rates) + "  lora_r: [4, 8]\n")
    first = opened()
    assert not first.list_trials()
    own = first.space.own
    for number, factor in enumerate((1, 2, 4, 0.5), 1):
        finish(first, [3.0, 2.0])
        (*_, last) = first.list_trials()
        assert last.params["learning_rate"] == pytest.approx(factor * own["learning_rate"])
        assert last.params["lora_r"] == own["lora_r"] and len(first.list_trials()) == number
        first = opened()  # the others wait on the disk, too


def test_a_candidate_that_falls_behind_is_stopped_and_one_that_leads_goes_on(opened):
    first = opened()
    finish(first, [3.0, 2.5, 2.2, 2.0])
    assert finish(first, [3.1], state="PRUNED")
    assert not finish(first, [2.9, 2.4, 2.1, 1.9])


def test_a_search_goes_on_where_it_was_left(opened):
    first = opened()
    finish(first, [3.0, 2.0])
    left = first.study.ask(first.space.build_distributions())
    again = opened()
    assert [trial.state.name for trial in again.list_trials()] == ["COMPLETE", "RUNNING"]
    assert again.list_trials()[1].params == left.params
    assert again.study.best_value == 2.0


def test_a_candidate_goes_on_that_was_interrupted_while_it_was_chosen(opened, monkeypatch):
    opened().study._pop_waiting_trial_id()  # as `ask` begins
    again = opened()
    monkeypatch.setattr(again, "try_candidate", stop)
    with pytest.raises(KeyboardInterrupt):
        again.run(lambda: None)
    (trial,) = again.list_trials()
    assert (trial.state.name, trial.params) == ("RUNNING", again.space.own)


def test_where_the_recipe_fails_the_same_command_goes_on_once_the_cause_is_gone(
    opened, monkeypatch
):
    def fail(*_):
        raise JobFailed("no space left on the disk")

    def train(file, *_):
        run = evaluate(first, int(file.stem), [3.0, 2.0])
        write_json(run.info_file, {"steps": 12})
        return True

    first = opened(trials=2)
    for _ in range(2):
        monkeypatch.setattr(search, "train_candidate", fail)
        with pytest.raises(JobFailed, match="^the recipe itself cannot be trained: no space left"):
            first.run(lambda: None)
        first = opened(trials=2)
    monkeypatch.setattr(search, "train_candidate", train)
    first.run(lambda: None)
    assert [trial.state.name for trial in first.list_trials()] == ["COMPLETE", "COMPLETE"]
    content = yaml.safe_load((first.folder / "000.yaml").read_text())
    assert content["logging_steps"] == 1


def list_children() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "tools.train.trial" in child.cmdline()
    ]


def terminate_children():
    for child in list_children():
        child.terminate()


@pytest.mark.parametrize("interrupt", [stop, terminate_children])
def test_an_interruption_of_a_candidate_ends_it_and_is_no_failure(tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(trial, "POLL", 0.01)  # before it finds that its file is not there
    with pytest.raises(KeyboardInterrupt):
        trial.train_candidate(tmp_path / "none.yaml", "cpu", interrupt)
    assert not list_children()


def test_a_log_that_a_crash_cut_goes_on_from_its_whole_lines(opened):
    first = opened()
    finish(first, [3.0, 2.0])
    log = first.folder / "search.log"
    whole = log.read_bytes()
    for damage in (b'{"op_code":', b'{"op_code":\n', b"\x00garbage\n"):
        log.write_bytes(whole + damage)
        again = opened()
        assert log.read_bytes().startswith(whole + b"{")
        assert all(map(json.loads, log.read_text().splitlines()))
        assert [trial.state.name for trial in again.list_trials()] == ["COMPLETE"]
    log.write_bytes(b"\x00garbage\n" + whole)
    with pytest.raises(WrongInput, match=r"search\.log, line 1: damaged; move .*r4 away"):
        opened()


def test_recipe_files_of_one_name_do_not_share_a_search(opened, tmp_path):
    first = opened()
    path = tmp_path / "elsewhere" / "r4.yaml"
    path.parent.mkdir()
    path.write_bytes(first.recipe.path.read_bytes())
    recipe = recipes.find(str(path))
    with pytest.raises(WrongInput, match=r"tune/r4 holds the search of .*r4\.yaml, .*rename"):
        search.Search(recipe, first.request, "cpu", first.settings).open()


def test_a_search_of_other_evaluations_starts_afresh_if_another_checkpoint_would_count(opened):
    first = opened()
    config = first.recipe.config
    changes = {"eval_steps": config["save_steps"]}
    assert search.keeps_best(config) != search.keeps_best(config | changes)
    recipe = replace(first.recipe, config=config | changes)
    other = search.Search(recipe, first.request, "cpu", first.settings)
    assert other.identify() != first.identify()


def test_a_search_of_other_rows_or_settings_starts_afresh(opened, capsys):
    finish(opened(), [3.0, 2.0])
    changed = opened(equal="time")
    assert not changed.list_trials()
    assert "starts afresh" in capsys.readouterr().out
    assert Run(changed.folder.with_name("r4.previous")).identity_file.is_file()


def test_the_budget_leaves_time_for_the_winners_second_training(opened):
    timed = opened(minutes=4.5)
    finish(timed, [3.0, 2.0])
    assert timed.has_budget()  # a recipe alone is no search
    finish(timed, [3.0, 2.0])
    assert timed.has_budget()  # 2 minutes and 2 more of a candidate and the second training
    finish(timed, [3.0, 2.0])
    assert not timed.has_budget()


def test_the_number_of_candidates_counts_those_that_failed(opened):
    counted = opened(trials=3)
    finish(counted, [3.0, 2.0])
    finish(counted, [3.0], state="FAIL", reason="out of memory")
    assert counted.has_budget()
    finish(counted, [3.0, 2.0])
    assert not counted.has_budget()


def test_steps_fit_the_recipes_time_where_a_candidate_of_the_same_cost_was_timed(opened):
    timed = opened(equal="time")
    attributes = {"steps": 12, "tokens_per_row": 100.0, "training_seconds": 60.0}
    finish(timed, [3.0, 2.0], **attributes)
    like_the_recipe = timed.study.ask(timed.space.build_distributions())
    assert timed.choose_steps(like_the_recipe) == 12  # only the rate can differ
    cost = {"lora_r": 64}
    like_the_recipe.set_user_attr("cost", cost)
    like_the_recipe.set_user_attr("seconds_per_token", 0.01)
    assert timed.find_rate(cost) == 0.01 and timed.find_rate({"lora_r": 4}) is None


def test_the_report_says_what_was_gained_and_how_much_is_luck(opened, capsys):
    found = opened()
    finish(found, [3.0, 2.0])
    finish(found, [2.5, 1.5])
    again = found.judge(evaluate(found, 7, [2.6, 1.6]))
    report = tune.build_report(found, again)
    assert report["recipe_itself"]["value"] == 2.0 and report["winner"]["number"] == 1
    assert report["recipe_itself"]["half_width"] == pytest.approx(1.96 * 0.0508 / 30**0.5, rel=0.01)
    assert report["winner"]["gain"]["value"] == pytest.approx(-0.5)
    assert report["winner"]["another_seed"]["gain"]["value"] == pytest.approx(-0.4)
    assert report["winner"]["another_seed"]["seed"] == 43
    assert report["rows"]["judged"] == found.division.judged >= 20
    json.dumps(report, allow_nan=False)
    tune.print_winner(report)
    printed = capsys.readouterr().out
    assert "with seed 43: 1.6000, -0.4000" in printed and "has seed 42; the interval" in printed
    table = tune.format_trials(report).splitlines()
    assert table[1].startswith("recipe") and table[1].split()[1:3] == ["finished", "2.0000"]
    tune.draw(report, found.folder / "figure.svg")
    assert "validation loss" in (found.folder / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("rates", "labels"),
    [
        ([0.0005, 0.001, 0.002, 0.00025, 0.000281], "3e-04 4e-04 6e-04 1e-03 2e-03"),
        ([0.00005, 0.0003, 0.005], "1e-04 1e-03"),
        ([0.00001, 0.08], "1e-05 1e-04 1e-03 1e-02 1e-01"),
        ([0.0005, 0.00052, 0.0007], "5e-04 6e-04 7e-04"),
    ],
)
def test_the_figure_labels_learning_rates_with_few_plain_numbers(tmp_path, rates, labels):
    trials = [
        {"point": {"learning_rate": rate}, "value": 0.3 + rate, "state": "finished"}
        for rate in rates
    ]
    tune.draw({"trials": trials, "judged_by": "loss"}, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text().replace("\N{MINUS SIGN}", "-")
    assert sorted(re.findall(r">(\de-\d\d)</text>", text), key=float) == labels.split()
    assert "$" not in text


def test_a_report_takes_the_place_of_no_fuller_one_and_that_of_examples_of_none(opened):
    found = opened()
    finish(found, [3.0, 2.0])
    finish(found, [2.5, 1.5])
    report = tune.build_report(found, "failed")
    report["rows"]["from"] = ["FINLORA_DATA"]
    public, own = tune.RESULTS / "r4.json", found.folder / "report.json"
    assert tune.choose_file(found, report) == (public, "")
    examples = report | {"rows": report["rows"] | {"from": ["data/sample"]}}
    assert tune.choose_file(found, examples) == (own, "its rows are this project's examples")
    other = [trial | {"value": 9.0} for trial in report["trials"]]
    for changes, reason in (
        ({}, ""),
        ({"trials": report["trials"][:1]}, ""),  # the same search, which went on
        ({"trials": other}, "has as many candidates"),
        ({"trials": [*other, *other]}, "has as many candidates"),
        ({"trials": other[:1]}, ""),
        ({"trials": other, "recipe_digest": "0"}, ""),
    ):
        write_json(public, report | changes)
        file, words = tune.choose_file(found, report)
        assert file == (own if reason else public) and reason in words, changes


def test_a_search_by_time_stays_on_one_machine_and_each_on_its_versions(opened, monkeypatch):
    timed, counted = opened(equal="time"), opened(equal="steps")
    before = timed.identify(), counted.identify()
    monkeypatch.setattr(hardware.Host, "describe_machine", lambda *_: "another")
    assert timed.identify() != before[0] and counted.identify() == before[1]
    monkeypatch.setattr(launch, "list_packages", lambda: {"torch": "0"})
    assert counted.identify() != before[1]


def test_a_winner_that_fails_with_another_seed_is_told(opened, capsys):
    found = opened()
    finish(found, [3.0, 2.0])
    finish(found, [2.5, 1.5])
    tune.print_winner(tune.build_report(found, "out of memory"))
    assert "with seed 43 it failed: out of memory" in capsys.readouterr().out


def test_where_nothing_is_better_the_recipe_stays_and_is_not_trained_again(opened, capsys):
    found = opened()
    finish(found, [3.0, 2.0])
    finish(found, [4.0], state="PRUNED")
    report = tune.build_report(found, found.confirm())
    assert report["changes"] == {} and report["next_version"] == found.recipe.version
    assert report["winner"]["another_seed"] is None
    tune.print_winner(report)
    printed = capsys.readouterr().out
    assert "no candidate of 1 learned more" in printed and "stays as it is" in printed
    assert "trained with another seed" not in printed


# ---- what comes of it


@pytest.mark.parametrize(
    ("config", "ratio", "rows", "changes"),
    [
        ({"max_steps": 110, "eval_steps": 55, "save_steps": 20}, 1.0, 0.5, {}),
        (
            {"max_steps": 110, "eval_steps": 55, "save_steps": 20},
            1.5,
            1.0,
            {"max_steps": 165, "eval_steps": 82, "save_steps": 30},
        ),
        ({"num_epochs": 4}, 2.0, 1.0, {}),
        ({"num_epochs": 4}, 1.0, 0.5, {"num_epochs": 2.0}),
        (
            {"num_epochs": 4, "eval_steps": 7, "save_steps": 14},
            0.5,
            0.5,
            {"num_epochs": 2.0, "eval_steps": 4, "save_steps": 8},
        ),
    ],
)
def test_the_schedule_follows_the_steps_of_the_winner(config, ratio, rows, changes):
    assert tune.scale_schedule(config, ratio, rows) == changes


def test_the_entries_for_the_matrix_give_the_winners_recipe(monkeypatch):
    name = "gemma-3-4b/finer_r4"
    own = recipes.build_config(name)
    space = Space(read_settings(None).space, own)
    modules = "q_proj k_proj v_proj o_proj"
    point = space.own | {"lora_target_modules": modules, "lora_r": 16}
    wanted = space.apply(point)
    changes = {key: value for key, value in wanted.items() if own.get(key) != value}
    report = {"recipe": name, "changes": changes, "next_version": "1.2.0"}
    entries = yaml.safe_load(tune.format_entries(report | {"winner": {"point": point}}))
    matrix = recipes.read_matrix()
    tables = {key: matrix[key] | entries[key] for key in ("versions", "overrides")}
    monkeypatch.setattr(recipes, "read_matrix", lambda: matrix | tables)
    assert recipes.build_config(name) == wanted and wanted != own
    assert recipes.find_version(name) == "1.2.0"


def test_the_next_version_is_a_minor_one():
    assert [tune.raise_version(v) for v in ("1.1.0", "2.9.3", "0")] == ["1.2.0", "2.10.0", "0.1.0"]


def test_the_winner_becomes_a_recipe_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(sources, "OWN", tmp_path / "local")
    recipes.clear_caches()
    try:
        recipe = recipes.find("smollm2-135m/sentiment_r4")
        changes = {"learning_rate": 0.002, "group_by_length": None}
        custom.write_tuned(recipe, changes, "1.2.0")
        custom.write_tuned(recipe, changes, "1.2.0")  # again: the same file
        tuned = recipes.find("smollm2-135m/sentiment_r4_tuned")
        assert tuned.version == "1.2.0" and tuned.config["learning_rate"] == 0.002
        assert "group_by_length" not in tuned.config
        assert tuned.run.name == "smollm2-135m/sentiment_r4_tuned"
        recipes.validate(tuned.config, "tuned")
        with pytest.raises(WrongInput, match="says something else; delete it"):
            custom.write_tuned(recipe, {"learning_rate": 0.003}, "1.2.0")
        custom.write_tuned(recipe, {}, "1.1.0")
        assert "stays as it is" in capsys.readouterr().out
    finally:
        recipes.clear_caches()


# ---- a whole search

HOOK = """
import os, sys
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".jsonl"):
        with open(os.environ["OPENED"] + str(os.getpid()), "a") as file:
            file.write(arguments[0] + "\\n")
sys.addaudithook(note)
"""
SEARCH = """
import sys
from pathlib import Path
from tools.common import command
from tools.train import search, tune
search.FOLDER, tune.RESULTS = Path(sys.argv[2]) / "tune", Path(sys.argv[2]) / "results"
request = search.SearchRequest(trials=4, space=Path(sys.argv[3]), profile="cpu")
command(lambda: tune.tune(sys.argv[1], request))()
"""


class WholeSearch:
    """A search that was interrupted once and then came to its end."""

    def __init__(self, folder: Path, recipe: Path):
        self.folder, self.recipe = folder, recipe
        (folder / "sitecustomize.py").write_text(HOOK)
        self.space = folder / "space.yaml"
        self.space.write_text(
            "validation: {least: 20, most: 40}\nspace:\n"
            "  learning_rate: [0.0005, 0.005]\n  lora_dropout: [1.5, 0.05]\n  lora_r: [4, 8]\n"
        )
        self.place = folder / "tune" / "r4"

    def start(self) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": f"{self.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OPENED": str(self.folder / "opened."),
        }
        return subprocess.Popen(
            [sys.executable, "-c", SEARCH, self.recipe, self.folder, self.space],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def list_opened(self) -> set[str]:
        texts = (file.read_text() for file in self.folder.glob("opened.*"))
        return {Path(name).name for text in texts for name in text.splitlines()}


@pytest.fixture(scope="module")
def whole(tiny, chat_rows, tmp_path_factory) -> WholeSearch:
    from tests.training import count_steps, wait_for

    folder = tmp_path_factory.mktemp("search")
    for path in (chat_rows, chat_rows.with_name("sentiment_val.jsonl")):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "sentiment_test.jsonl").write_bytes(chat_rows.read_bytes())
    recipe = write_recipe(folder, "r4", tiny, folder / chat_rows.name)
    result = WholeSearch(folder, recipe)
    process = result.start()
    wait_for(process, lambda: count_steps(result.place / "000") >= 5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "continues from here" in errors
    assert not Run(result.place / "000").is_finished
    result.interrupted_at = count_steps(result.place / "000")
    process = result.start()
    result.output, errors = process.communicate()
    assert process.returncode == 0, result.output + errors
    result.report = json.loads((folder / "results" / "r4.json").read_text())
    return result


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_its_end(whole):
    trials = whole.report["trials"]
    assert len(trials) == 4 and trials[0]["state"] == "finished"
    assert trials[0]["steps"] == 12
    lines = (whole.place / "000" / "progress.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == list(range(1, 13))
    log = (whole.place / "000" / "train.log").read_text()
    assert "Resuming" in log or "resume" in log.lower()


@pytest.mark.slow
def test_a_candidate_that_fails_counts_as_failed_and_the_search_goes_on(whole):
    states = {trial["point"]["lora_dropout"]: trial["state"] for trial in whole.report["trials"]}
    assert states[1.5] == "failed" and states[0.05] != "failed"
    failed = next(trial for trial in whole.report["trials"] if trial["state"] == "failed")
    assert "dropout" in failed["reason"]


@pytest.mark.slow
def test_no_test_row_is_read_and_validation_rows_are(whole):
    opened = whole.list_opened()
    assert {"sentiment_train.jsonl", "sentiment_val.jsonl", "validation.jsonl"} <= opened
    assert not {name for name in opened if "test" in name}


@pytest.mark.slow
def test_the_winner_was_trained_with_two_seeds(whole):
    winner = whole.report["winner"]
    assert winner["another_seed"]["seed"] == 43 and winner["another_seed"]["value"] > 0
    assert winner["another_seed"]["value"] != winner["value"]
    config = yaml.safe_load((whole.place / f"{winner['number']:03d}-again.yaml").read_text())
    assert config["seed"] == 43
    assert f"with seed 43: {winner['another_seed']['value']:.4f}" in whole.output


@pytest.mark.slow
def test_candidates_share_the_prepared_rows_and_are_judged_row_by_row(whole):
    for number in (0, whole.report["winner"]["number"]):
        run = Run(whole.place / f"{number:03d}")
        last = run.evaluations()[-1]
        steps = [line["step"] for line in run.evaluations()]
        assert len(steps) == 4 and steps[0] > 0  # none before the first step
        assert last["step"] == last["steps"] and len(last["losses"]) == 20
        assert last["loss"] == pytest.approx(sum(last["losses"]) / 20, rel=1e-5)
        assert run.info["last_eval_loss"] == pytest.approx(last["loss"])
        assert not (run.folder / "prepared").exists() and not run.adapter_file.exists()
    assert len([path for path in (whole.place / "prepared").iterdir() if path.is_dir()]) == 2


def test_a_log_repeats_no_line_while_a_step_lasts(monkeypatch, capsys):
    trial = {"number": 0, "point": {"lora_r": 4}, "state": "running", "reason": None}
    monkeypatch.setattr(tune, "describe_trial", lambda *_: trial)
    measures = SimpleNamespace(metric="")
    table = tune.LiveTable(SimpleNamespace(list_trials=lambda *_: [trial], measures=measures))
    for step in (3, 3, 3, 4):
        table.describe_step = lambda _, step=step: f"the recipe: step {step}/9"
        table.printed_at = float("-inf")  # a line is due
        table.show()
    assert capsys.readouterr().out.count("tune") == 2
