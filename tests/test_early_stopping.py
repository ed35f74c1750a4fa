"""The best checkpoint and the end of a training by the task's own metric on validation rows."""

import json

import pytest
import yaml

from evals import run as evaluation
from evals.answers import Prompts
from evals.model import Model
from evals.validation import Scorer, keep_random_state
from tests.conftest import run, write_recipe
from tests.test_local import TONES, jsonl, mine  # noqa: F401
from tools import custom, models, recipes, sources
from tools.common import WrongInput
from tools.data.chatfile import convert_rows
from tools.data.rules import load_test_rules
from tools.train.callbacks import Progress, Watch


@pytest.mark.parametrize(
    ("choice", "keys"),
    [
        ("loss", {"early_stopping_patience": 2}),
        (
            "metric",
            {
                "early_stopping_patience": 2,
                "metric_for_best_model": "eval_accuracy",
                "greater_is_better": True,
            },
        ),
    ],
)
def test_a_task_of_ones_own_can_stop_early(mine, choice, keys):  # noqa: F811
    custom.create_task(
        "late", jsonl(mine / "rows.jsonl", TONES), custom.Choices(early_stopping=choice)
    )
    config = recipes.find("smollm2-135m/late_r4").config
    assert config == config | keys and config["load_best_model_at_end"]
    recipes.validate(config, "late")


def test_free_text_is_judged_by_its_own_first_metric(mine):  # noqa: F811
    rows = [
        {"prompt": f"Explain term {n}.", "completion": f"Term {n} is a word of {n * 7} letters."}
        for n in range(60)
    ]
    custom.create_task(
        "terms", jsonl(mine / "rows.jsonl", rows), custom.Choices(early_stopping="metric")
    )
    config = recipes.find("smollm2-135m/terms_r4").config
    assert config["metric_for_best_model"] == "eval_rouge_l"


def test_early_stopping_needs_validation_rows(mine):  # noqa: F811
    rows = jsonl(mine / "rows.jsonl", TONES[:15])
    with pytest.raises(WrongInput, match="EARLY_STOPPING=loss needs validation rows.* 20 prompts"):
        custom.create_task("late", rows, custom.Choices(early_stopping="loss"))
    assert not (recipes.LOCAL / "late.yaml").exists()


@pytest.mark.slow
def test_validation_rows_are_scored_as_test_rows_are(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    monkeypatch.chdir(tmp_path)
    source = sources.SAMPLE / sources.tables()["datasets"]["fpb"]["file"]
    convert_rows(
        source, tmp_path / "all.jsonl", load_test_rules("fpb", source), frozenset(range(16))
    )
    test = tmp_path / "data" / "chat" / "fpb_test.jsonl"
    test.parent.mkdir(parents=True)
    for path in (test, tmp_path / "fpb_test.jsonl"):
        path.write_bytes((tmp_path / "all.jsonl").read_bytes())
    model, tokenizer = models.load({"base_model": str(smollm2)})
    rows, _ = evaluation.measure(Model(model, tokenizer, "x", 16), "fpb", None, Prompts("chat"))
    expected = evaluation.score(rows)
    scores = Scorer("fpb", tmp_path / "all.jsonl").score(model, tokenizer, None)
    assert 0 < scores["accuracy"]["value"] < 1
    for metric, score in scores.items():
        assert score == expected[metric] | {"values": score["values"]}
        assert score["values"] == [row["values"][metric] for row in rows]


def test_scoring_leaves_the_random_numbers_of_a_training_as_they_are():
    import random

    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.random(), torch.rand(1).item()

    for module in (random, numpy.random):
        module.seed(1)
    torch.manual_seed(1)
    expected = draw()
    for module in (random, numpy.random):
        module.seed(1)
    torch.manual_seed(1)
    with keep_random_state():
        draw()
    assert draw() == expected


def test_an_evaluation_left_undone_can_still_find_the_best_checkpoint(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    options = {"metric_for_best_model": "loss", "greater_is_better": False, "report_to": "none"}
    args = TrainingArguments(
        str(tmp_path), eval_strategy="steps", save_strategy="steps", use_cpu=True, **options
    )
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    state = trainer.state
    state.global_step, state.best_model_checkpoint = 8, f"{tmp_path}/checkpoint-4"
    state.stateful_callbacks = {"TrainerControl": {"args": {"should_evaluate": True}}}
    for best, folder in ((100.0, "checkpoint-8"), (0.001, "checkpoint-4")):
        state.best_metric, state.best_model_checkpoint = best, f"{tmp_path}/checkpoint-4"
        Watch(None, trainer, Progress(tmp_path)).finish_step(args, state, trainer.control)
        assert state.best_model_checkpoint == f"{tmp_path}/{folder}"


@pytest.mark.slow
def test_a_training_ends_where_the_metric_gets_no_better(tiny, chat_rows, tmp_path):
    recipe = write_recipe(
        tmp_path,
        "r4",
        tiny,
        chat_rows,
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        early_stopping_patience=2,
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
    )
    result = run("train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    info = json.loads((tmp_path / "r4" / "run.json").read_text())
    lines = map(json.loads, (tmp_path / "r4" / "progress.jsonl").read_text().splitlines())
    scores = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    # A random model answers no row right, before the first step as after it.
    assert scores == dict.fromkeys(range(0, info["steps"] + 1, 2), 0.0)
    assert 4 <= info["steps"] <= 6

    content = yaml.safe_load(recipe.read_text()) | {"metric_for_best_model": "eval_rouge_l"}
    recipe.write_text(yaml.safe_dump(content))
    result = run("train", recipe)
    assert result.returncode == 2
    assert (
        "metric_for_best_model: eval_rouge_l: there are eval_loss, eval_accuracy" in result.stderr
    )
