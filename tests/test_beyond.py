"""The search beyond FinLoRA's recipe: its candidates, its division of the rows, its figures."""

import json

import pytest
import yaml

from bench import beyond
from tools import recipes
from tools.common import ROOT, WrongInput

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
    content = beyond.build_candidate(SPEC, name, files)
    recipes.validate(content, name)
    for key, value in SPEC["candidates"][name].items():
        assert content[key] == value
    assert content["base_model"] == recipes.build_config(SPEC["recipe"])["base_model"]
    judged = [entry["path"] for entry in content["test_datasets"]]
    trained = [entry["path"] for entry in content["datasets"]]
    assert judged[0].endswith("validation.jsonl") and trained[0].endswith("train.jsonl")


def test_test_scores_are_paired_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "ROOT", tmp_path)
    spec = {"recipe": "m/old", "confirm": {"recipe": "m/new", "sets": {"a": 0, "b": 40}}}
    with pytest.raises(FileNotFoundError):
        beyond.compare_on_test_rows(spec)
    right = {"base_nf4": 10, "old": 20, "new": 30}
    for run, number in right.items():
        for name in ("a", "b_sample40"):
            rows = [{"values": {"accuracy": float(at < number)}} for at in range(40)]
            content = {"predictions": rows, "metrics": {"accuracy": {"value": number / 40}}}
            file = tmp_path / "runs/m" / run / "evals" / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
        (file.parent.parent / "run.json").write_text(json.dumps({"seconds": 60.4}))
    results = beyond.compare_on_test_rows(spec)
    assert results["seconds"] == [60, 60]
    assert results["sets"]["a"]["base"] == 0.25 and results["sets"]["a"]["accuracy"] == [0.5, 0.75]
    assert results["sets"]["a"]["difference"]["p"] == pytest.approx(2 * 2 / 2**10, abs=1e-5)  # Holm
    assert results["sets"]["all"]["rows"] == 80
    assert results["sets"]["all"]["difference"]["p"] == pytest.approx(2 / 2**20, abs=1e-5)
    text = beyond.format_test_scores({"spec": spec, "confirmed": results})
    assert "| a, 40 | 25.0 | 50.0 | 75.0 | +25.0 (" in text


def test_figures_are_those_of_the_log(tmp_path):
    log = [
        {"step": 0, "seconds": 10.0, "eval_loss": 3.0},
        {"step": 1, "seconds": 14.0, "loss": 2.0, "real_tokens": 100},
        {"step": 2, "seconds": 18.0, "loss": 1.0, "real_tokens": 190},
        {"step": 2, "seconds": 25.0, "eval_loss": 0.5},
        {"step": 2, "seconds": 26.0},
    ]
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    results = beyond.read_figures({"output_dir": str(tmp_path)})
    assert results == {"validation_loss": 0.5, "seconds": 8, "steps": 2, "real_tokens": 190}
    other = results | {"validation_loss": 0.25, "seconds": 10}
    content = {"spec": {"baseline": "a"}, "candidates": {"a": results, "b": other}}
    assert beyond.format_candidates(content).splitlines()[2:] == [
        "| b | 0.250 | 2 | 125 % |",
        "| a | 0.500 | 2 | 100 % |",
    ]


def test_the_page_shows_the_committed_figures():
    content = json.loads(beyond.RESULTS.read_text())
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert beyond.format_candidates(content) in page
    assert beyond.format_test_scores(content) in page
