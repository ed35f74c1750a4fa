"""make smoke: the real config for a few steps on the longest rows, and what it says of them."""

import json
import re

import pytest
from transformers import AutoTokenizer

from tests.conftest import run, write_recipe
from tools import recipes
from tools.common import WrongInput
from tools.train import smoke
from tools.train.tokens import TEMPLATE_TOKENS


@pytest.mark.slow
def test_a_recipe_is_tried_on_its_longest_rows_and_nothing_stays(tiny, chat_rows, tmp_path):
    result = run("smoke", write_recipe(tmp_path, "r4", tiny, chat_rows))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^smoke      (.{13}) (.*)$", result.stdout, re.M)
    texts = {label.strip(): text for label, text in lines}
    total = len(chat_rows.read_text().splitlines())
    assert f"8 longest of {total}" in texts["rows"]
    losses = [float(number) for number in re.findall(r"\d+\.\d+", texts["trains"])]
    assert len(losses) == 2 and 0 < losses[1] < 20
    assert float(re.search(r"[\d.]+", texts["peak memory"])[0]) > 0.2
    # The recipe stops after 12 steps.
    assert texts["whole run"].startswith(f"12 steps on {total} rows")
    assert "ready" in texts
    assert not smoke.FOLDER.exists() and not (tmp_path / "r4").exists()


def test_the_rows_are_the_longest_that_fit_and_fill_a_batch(tiny, chat_rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lines = chat_rows.read_bytes().splitlines()
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in lines
    ]
    sizes = {line: len(tokenizer.encode(text)) for line, text in zip(lines, texts, strict=True)}
    ordered = sorted(sizes.values(), reverse=True)
    config = {"sequence_len": ordered[3], "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = smoke.pick_longest({"path": str(chat_rows)}, config, tokenizer)
    fitting = [size for size in ordered if size <= ordered[3]]
    parsed = [json.loads(line) for line in lines]
    assert [sizes[lines[parsed.index(row)]] for row in rows.rows] == fitting[:4]
    assert rows.too_long == sum(size > ordered[3] for size in ordered)

    few = {"path": str(tmp_path / "few.jsonl")}
    (tmp_path / "few.jsonl").write_bytes(b"\n".join(lines[:3]))
    rows = smoke.pick_longest(few, {"micro_batch_size": 8}, tokenizer)
    assert len(rows.rows) == 8 and {parsed.index(row) for row in rows.rows} == {0, 1, 2}


def test_rows_of_another_format_are_measured_with_room_for_their_template(tiny, tmp_path):
    rows = [{"instruction": "Up or down?", "output": "up " * n} for n in range(1, 9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    entry = {"path": str(tmp_path / "rows.json"), "ds_type": "json", "type": "alpaca"}
    picked = smoke.pick_longest(entry, {"micro_batch_size": 2}, AutoTokenizer.from_pretrained(tiny))
    assert picked.rows == [rows[-1], rows[-2]] and picked.total == 8
    assert picked.longest > TEMPLATE_TOKENS
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(WrongInput, match="rows are needed"):
        smoke.pick_longest(entry, {}, None)


def test_a_trial_has_its_own_evaluations_and_logs_each_step(tmp_path, monkeypatch):
    """Whatever the recipe says of them: its metric needs the validation rows of a task."""
    own = {"metric_for_best_model": "accuracy", "early_stopping_patience": 2, "logging_steps": 10}
    own |= {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    entry = recipe.config["datasets"][0]
    rows = smoke.LongestRows(entry, [{"messages": []}] * 8, 8, 1, 0)
    monkeypatch.setattr(smoke, "FOLDER", tmp_path)
    own |= {"sample_packing": True, "eval_sample_packing": False}
    config = smoke.build_trial(recipe, recipe.config | own, rows).config
    assert config["eval_sample_packing"] is False
    assert not {"metric_for_best_model", "early_stopping_patience", "save_strategy"} & set(config)
    assert "eval_strategy" not in config and not config["load_best_model_at_end"]
    assert config["logging_steps"] == 1 and config["max_steps"] == config["eval_steps"]


def test_what_is_planned_of_rows_on_the_hub_is_not_guessed(tiny, chat_rows, monkeypatch, capsys):
    steps = [{"seconds": 1.0, "real_tokens": 10}, {"seconds": 3.0, "real_tokens": 90}]
    monkeypatch.setattr(type(smoke.TRIAL), "losses", lambda self: steps)
    config = recipes.build_config("smollm2-135m/sentiment_r4") | {"base_model": str(tiny)}
    config["datasets"] = [{"path": str(chat_rows)}, {"path": "owner/rows"}]
    smoke.report_sizes(config, {"device": "cpu", "peak_memory_bytes": 2**30}, is_twin=False)
    printed = capsys.readouterr().out
    assert "40 tokens/s" in printed and "not planned: some rows are on the Hub" in printed


@pytest.mark.slow
def test_a_base_that_is_too_large_is_tried_by_its_tiny_twin(tiny, chat_rows, tmp_path):
    base = "meta-llama/Llama-3.1-8B-Instruct"
    recipe = write_recipe(tmp_path, "r8_dora", tiny, chat_rows, base_model=base)
    result = run("smoke", recipe, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "a tiny random model stands in" in result.stdout, result.stderr
    assert re.search(r"trains +3 steps", result.stdout), result.stdout + result.stderr
    assert "saves, loads" in result.stdout and "whole run" not in result.stdout
    # The weights of the real base cannot be had here, and that is not called ready.
    assert result.returncode == 1 and result.stderr.startswith("error: base: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_row_that_is_too_long_for_every_batch_is_one_line(tiny, tmp_path):
    file = tmp_path / "long_train.jsonl"
    turns = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    result = run("smoke", write_recipe(tmp_path, "r4", tiny, file, sequence_len=64))
    assert result.returncode == 2
    assert "over the sequence_len of 64 tokens" in result.stderr
    assert result.stderr.count("\n") == 1
