"""What an adapter costs elsewhere: passages of prose, keys behind their prompts, both sides."""

import json

import pytest

from bench import forgetting, sections
from tests.conftest import make_adapter
from tools import prompts, recipes, runs, sources
from tools.common import WrongInput
from tools.runs import Run


def test_the_prose_is_the_pinned_one():
    passages = forgetting.read_prose()
    assert len(passages) > 90
    assert all(len(passage.split()) >= forgetting.SHORTEST for passage in passages)
    assert len(set(passages)) == len(passages)


def test_another_text_is_refused(monkeypatch):
    monkeypatch.setattr(forgetting, "SHORTEST", 61)
    with pytest.raises(WrongInput, match="not that of the pinned version .*make setup"):
        forgetting.read_prose()


def test_paragraphs_of_prose_are_kept_once_and_nothing_else():
    prose = "A sentence of plain words that goes on and on. " * 8
    code, short = "x = [1, 2, 3]; print(x[0])\n" * 20, "Too short."
    table, listed = "| a | b |\n" * 40, "- " + prose
    text = "\n\n".join([prose, code, short, table, listed, prose])
    assert forgetting.select_passages([text, text]) == [" ".join(prose.split())]


ROW = {
    "messages": [
        {"role": "user", "content": "What is the sentiment?"},
        {"role": "assistant", "content": "positive"},
    ]
}


@pytest.mark.parametrize("place", ["data/sample", "FINLORA_DATA", None])
def test_runs_of_the_examples_are_no_evidence(place, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    folder = tmp_path / forgetting.MODEL / "sentiment_r4"
    folder.mkdir(parents=True)
    content = {"data": [{"split": "train", "from": place}]}
    Run(folder).info_file.write_text(json.dumps(content))
    assert bool(forgetting.group_finished_runs()) == (place != "data/sample")


def test_an_entry_of_more_datasets_is_not_replaced():
    fuller, poorer = ({"files": dict.fromkeys(names, "sha")} for names in (["fpb", "ner"], ["fpb"]))
    assert forgetting.name_lost_datasets(fuller, poorer) == "ner"
    assert (
        forgetting.name_lost_datasets(poorer, fuller)
        == forgetting.name_lost_datasets(fuller, fuller)
        == ""
    )


def test_a_key_ends_with_the_token_that_ends_its_turn(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt, answer = forgetting.split_row(tokenizer, ROW, None)
    whole = prompts.render_row(tokenizer, ROW)
    assert tokenizer.decode(prompt + answer) == whole.rstrip("\n")
    assert tokenizer.decode(answer) == "positive<|im_end|>"


def test_losses_are_those_of_the_answers_tokens_and_of_two_sides(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tools import models

    adapter = make_adapter(tiny, tmp_path / "adapter")
    model, _ = models.load({"base_model": str(tiny)}, adapter)
    pair = [5, 6, 7], [8, 9, 10, 11]
    losses = forgetting.measure_sides(model, [pair, ([1], [2, 3])])
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokens = torch.tensor([pair[0] + pair[1]])
    labels = tokens.clone()
    labels[:, : len(pair[0])] = -100
    with torch.inference_mode():
        loss = float(base(tokens, labels=labels).loss)
    assert losses["base"][0] == pytest.approx(loss, rel=1e-4)
    assert abs(losses["adapter"][0] - loss) > 1e-3


def write_run(name):
    run = Run(runs.RUNS / forgetting.MODEL / name)
    run.folder.mkdir(parents=True)
    run.info_file.write_text(json.dumps({"adapter_sha256": name}))
    return run


def test_finished_runs_are_measured_with_all_their_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    for name in ("sentiment_r4", "sentiment_r4.seed43", "sentiment_r8", "sentiment_r4.previous"):
        write_run(name)
    (tmp_path / forgetting.MODEL / "base_nf4").mkdir()

    def list_names(names):
        return [run.folder.name for run in forgetting.choose_runs(names)]

    assert list_names("") == ["sentiment_r4", "sentiment_r4.seed43", "sentiment_r8"]
    assert list_names("sentiment_r4") == ["sentiment_r4", "sentiment_r4.seed43"]
    with pytest.raises(WrongInput, match="unknown finished run ner_r4; there are sentiment_r4, "):
        list_names("sentiment_r4,ner_r4")


def test_an_entry_is_measured_again_where_its_rows_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    run = write_run("sentiment_r4")
    before = forgetting.identify_run(run)
    assert before["files"] == {}
    sources.test_path("fpb").write_text(json.dumps(ROW) + "\n")
    assert forgetting.identify_run(run)["files"].keys() == {"fpb"}


def test_datasets_of_one_file_count_once_and_the_own_ones_are_those_of_the_tasks_files(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    for name in ("fpb", "tfns", "tfns_as_published", "tfns_rest", "ner"):
        sources.test_path(name).write_text(json.dumps(ROW) + "\n")
    assert forgetting.list_datasets() == ["fpb", "tfns", "ner"]
    assert forgetting.list_own_datasets("sentiment") == ["fpb", "tfns"]
    assert forgetting.list_own_datasets("tfns_as_published") == ["tfns"]
    assert forgetting.list_own_datasets(None) == []


def write_results(path, **differences):
    """A result with these ends of the difference by dataset."""
    losses = {
        name: {
            "texts": 100,
            "base": 3.0,
            "adapter": 3.0 + value,
            "difference": {"value": value, "low": value - 0.1, "high": value + 0.1, "p": 0.01},
        }
        for name, value in differences.items()
    }
    recipe = recipes.find("smollm2-135m/sentiment_r4").with_seed(43)
    entry = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "seed": 43,
        "machine": "1 x NVIDIA A40",
        "precision": "nf4",
        "own_datasets": ["fpb"],
        "losses": losses,
        "identity": {"prose": forgetting.SHA256, "rows": forgetting.ROWS},
    }
    path.write_text(json.dumps({"runs": {"smollm2-135m/sentiment_r4": entry}}))
    return entry


def test_the_page_counts_what_is_worse_and_leaves_the_own_task_apart(tmp_path, monkeypatch):
    path = tmp_path / "forgetting.json"
    monkeypatch.setattr(forgetting, "RESULTS", path)
    assert "Not measured yet" in "\n".join(sections.build_forgetting())
    entry = write_results(path, prose=0.2, ner=0.5, formula=0.05, fpb=-2.0)
    section = "\n".join(sections.build_forgetting())
    assert "+0.200 nats a token on average over 1 run; 1 of them" in section
    assert "of 2 pairs of run and dataset 1 are worse than the base and 0 better" in section
    assert "| fpb | 100 | -2.000 (-2.100 … -1.900), its own task |" in section
    assert "Measured: `smollm2-135m/sentiment_r4` at nf4, 1 run, on 1 x NVIDIA A40." in section
    assert "Left out" not in section
    assert "too narrow: `smollm2-135m/sentiment_r4` on ner.\n" in section
    entry["losses"]["ner"]["clusters"] = 48
    path.write_text(json.dumps({"runs": {"run": entry}}))
    assert "too narrow" not in "\n".join(sections.build_forgetting())
    other_rows = entry["identity"] | {"rows": 1}
    for change in ({"recipe_digest": "other"}, {"recipe": "none"}, {"identity": other_rows}):
        path.write_text(json.dumps({"runs": {"run": entry, "old run": entry | change}}))
        section = "\n".join(sections.build_forgetting())
        assert "Left out, since recipe or texts changed: `old run`." in section
        assert "on average over 1 run;" in section


def test_a_recipe_stands_in_one_column_with_the_outermost_ends_of_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "RESULTS", tmp_path / "forgetting.json")
    first = write_results(forgetting.RESULTS, prose=0.2, ner=-0.5)
    second = write_results(forgetting.RESULTS, prose=0.3)
    other = first | {"recipe": "smollm2-135m/sentiment_r8"}
    other["recipe_digest"] = recipes.find(other["recipe"]).with_seed(43).digest
    runs = {"run": first, "run, seed 44": second, "other": other}
    forgetting.RESULTS.write_text(json.dumps({"runs": runs}))
    lines = sections.build_forgetting()
    assert "| prose | 100 | +0.250 (+0.100 … +0.400) | +0.200 (+0.100 … +0.300) |" in lines
    assert "| ner | 100 | -0.500 (-0.600 … -0.400) | -0.500 (-0.600 … -0.400) |" in lines
    text = "at nf4, 2 runs, on 1 x NVIDIA A40; `smollm2-135m/sentiment_r8` at nf4, 1 run, on"
    assert text in "\n".join(lines)


def test_intervals_of_a_difference_are_paired():
    base = [2.0 + 0.1 * number for number in range(60)]
    adapter = [value + 0.05 + 0.001 * (number % 7) for number, value in enumerate(base)]
    compared = forgetting.compare_sides({"base": base, "adapter": adapter})
    difference = compared["difference"]
    assert "clusters" not in compared
    clustered = forgetting.compare_sides({"base": base, "adapter": adapter}, [*range(30)] * 2)
    assert clustered["clusters"] == 30
    assert 0.05 < difference["low"] < difference["value"] < difference["high"] < 0.056
