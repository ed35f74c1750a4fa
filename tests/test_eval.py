"""Scoring: lm-eval's answers are those of a plain generate loop, and the demo's gain is real."""

import json
import sys

import pytest

from evals import run as evaluation
from tests.conftest import run as command
from tests.conftest import write_recipe
from tools import chat, cli, convert, prompt, recipes, weights

NF4 = {"load_in_4bit": True, "adapter": "qlora"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty project folder: the sample's sentiment data is converted into it."""
    monkeypatch.setattr(convert, "CHAT", tmp_path / "data" / "chat")
    monkeypatch.chdir(tmp_path)
    convert.convert_task("sentiment", convert.SAMPLE)
    return tmp_path


def test_generation_stops_by_itself(smollm2):
    model, tokenizer = weights.load({"base_model": str(smollm2)})
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = chat.answer(model, tokenizer, "What is the capital of France?", budget=100)
    assert "Paris" in text
    assert len(tokenizer.encode(text)) < 60
    assert "<|im_start|>" not in text


def test_the_scorer_answers_as_a_plain_generate_loop_does(smollm2, workplace):
    """Shared prefix, sorted batches and padding change no answer of the 4-bit base."""
    model, tokenizer = weights.load({"base_model": str(smollm2)} | NF4)
    scored = evaluation.measure(model, tokenizer, "fpb", 24, "fpb")
    rows = [json.loads(line) for line in convert.test_path("fpb").open()]
    assert len({row["row"] for row in scored}) == 24
    assert {row["expected"] for row in scored} == {"negative", "neutral", "positive"}
    rows = [rows[row["row"]] for row in scored]
    plain = [chat.answer(model, tokenizer, row["messages"][0]["content"], 10) for row in rows]
    assert [row["answer"].strip() for row in scored] == plain
    assert [row["expected"] for row in scored] == [row["messages"][1]["content"] for row in rows]


def test_the_prompt_is_the_models_chat_template(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = prompt.render(tokenizer, [{"role": "user", "content": "Up 5 %.\nAnswer:"}])
    assert text.endswith("<|im_start|>user\nUp 5 %.\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert (
        tokenizer.decode(prompt.tokens(tokenizer, [{"role": "user", "content": "x"}])).count(
            "<|im_start|>"
        )
        == 3
    )


def test_an_untrained_recipe_and_an_unknown_dataset_are_one_line_each(tmp_path, tiny, chat_rows):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows)
    result = command("evals.run", recipe)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is not trained" in result.stderr
    with pytest.raises(cli.WrongInput, match="did you mean fpb"):
        evaluation.datasets(recipes.find(str(recipe)), "fbp")


def evaluate(recipe, monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["evals.run", str(recipe), *arguments])
    evaluation.main()


def test_a_score_is_kept_until_what_it_depends_on_changes(
    tiny, chat_rows, workplace, monkeypatch, capsys
):
    recipe = write_recipe(workplace, "r4", tiny, chat_rows, max_steps=1)
    result = command("tools.train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    evaluate(recipe, monkeypatch, "--tasks", "fpb,tfns", "--limit", "20")
    assert "fpb, base: 20/20" in capsys.readouterr().out
    file = workplace / "r4" / "evals" / "fpb_sample20.json"
    content = json.loads(file.read_text())
    assert content["examples"] == len(content["predictions"]) == 20
    assert content["evaluated"]["precision"] == "nf4"
    assert content["evaluated"]["data_sha256"] == cli.digest(convert.test_path("fpb"))
    right = sum(row["expected"] == row["answered"] for row in content["predictions"])
    assert content["metrics"]["accuracy"]["value"] == pytest.approx(right / 20)

    before = file.stat().st_mtime_ns
    evaluate(recipe, monkeypatch, "--tasks", "fpb", "--limit", "20")
    assert "fpb, base" not in capsys.readouterr().out.split("examples")[0]
    assert file.stat().st_mtime_ns == before

    lines = convert.test_path("fpb").read_text().splitlines(keepends=True)
    convert.test_path("fpb").write_text("".join(lines[1:]))
    convert.manifest_path(convert.test_path("fpb")).unlink()
    evaluate(recipe, monkeypatch, "--tasks", "fpb", "--limit", "20")
    assert file.stat().st_mtime_ns > before


@pytest.mark.slow
def test_the_adapter_of_the_demo_beats_its_base_by_20_points(
    smollm2, workplace, monkeypatch, capsys
):
    catalogue = recipes.config("smollm2-135m/sentiment_r4")
    kept = ("max_steps", "save_steps", "eval_steps", "warmup_steps")
    same = {key: catalogue[key] for key in kept}
    recipe = write_recipe(workplace, "r4", smollm2, convert.train_path("sentiment"), **same)
    result = command("tools.train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    evaluate(recipe, monkeypatch, "--tasks", "fpb")
    base = json.loads((workplace / "base_nf4/evals/fpb.json").read_text())
    adapter = json.loads((workplace / "r4/evals/fpb.json").read_text())
    gain = adapter["metrics"]["accuracy"]["value"] - base["metrics"]["accuracy"]["value"]
    print(capsys.readouterr().out)
    assert gain >= 0.20
