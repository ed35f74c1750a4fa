"""The search beyond FinLoRA's recipe: its candidates, its division of the rows, its figures."""

import json

import pytest
import yaml

from bench import beyond
from tools import recipes
from tools.cli import WrongInput

SPEC = yaml.safe_load(beyond.SPEC.read_text())


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "RUNS", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"row": n}) + "\n" for n in range(900)))
    return beyond.divide(rows, 200)


def test_no_row_both_trains_and_judges(files, tmp_path):
    train, validation = (files[name].read_bytes().splitlines() for name in ("train", "validation"))
    assert (len(train), len(validation)) == (700, 200)
    assert len(set(train) | set(validation)) == 900
    again = beyond.divide(tmp_path / "rows.jsonl", 200)
    assert again["validation"].read_bytes().splitlines() == validation
    with pytest.raises(WrongInput, match="900 rows"):
        beyond.divide(tmp_path / "rows.jsonl", 900)


@pytest.mark.parametrize("name", SPEC["candidates"])
def test_every_candidate_is_a_recipe_that_axolotl_takes(files, name):
    content = beyond.config(SPEC, name, files)
    recipes.validate(content, name)
    for key, value in SPEC["candidates"][name].items():
        assert content[key] == value
    assert content["base_model"] == recipes.config(SPEC["recipe"])["base_model"]
    judged = [entry["path"] for entry in content["test_datasets"]]
    trained = [entry["path"] for entry in content["datasets"]]
    assert judged[0].endswith("validation.jsonl") and trained[0].endswith("train.jsonl")


def test_figures_are_those_of_the_log(tmp_path):
    log = [
        {"step": 0, "seconds": 10.0, "eval_loss": 3.0},
        {"step": 1, "seconds": 14.0, "loss": 2.0, "real_tokens": 100},
        {"step": 2, "seconds": 18.0, "loss": 1.0, "real_tokens": 190},
        {"step": 2, "seconds": 25.0, "eval_loss": 0.5},
        {"step": 2, "seconds": 26.0},
    ]
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    found = beyond.measured({"output_dir": str(tmp_path)})
    assert found == {"validation_loss": 0.5, "seconds": 8, "steps": 2, "real_tokens": 190}
    other = found | {"validation_loss": 0.25, "seconds": 10}
    content = {"spec": {"baseline": "a"}, "candidates": {"a": found, "b": other}}
    assert beyond.table(content).splitlines()[2:] == [
        "| b | 0.250 | 2 | 125 % |",
        "| a | 0.500 | 2 | 100 % |",
    ]
