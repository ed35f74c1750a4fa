"""Scoring: every task scores its own keys as right, what is interrupted goes on, and a score says
what it depends on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval.api.model import LM

from evals import report, stats
from evals import run as evaluation
from evals.answers import Answers, Prompts
from tests.conftest import call, write_recipe
from tests.conftest import run as command
from tools import common, models, recipes, runs, sources
from tools import prompts as prompt
from tools import subjects as subject_of
from tools.data import convert
from tools.data.chatfile import convert_rows
from tools.data.rows import Rules
from tools.data.rules import load_test_rules

NF4 = {
    "load_in_4bit": True,
    "adapter": "qlora",
    "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


class Speaker(LM):
    """An lm-eval model that gives a function of the row for an answer, in batches of 4."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    tokenizer_name = "none"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_history[-1]["content"]

    def generate_until(self, requests, **options):
        answers = []
        for start in range(0, len(requests), 4):
            batch = requests[start : start + 4]
            spoken = [self.answer(request.doc) for request in batch]
            for request, text in zip(batch, spoken, strict=True):
                self.asked.append(request.args[0])
                self.cache_hook.add_partial("generate_until", request.args, text)
            answers += spoken
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def key(doc):
    return doc["messages"][1]["content"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty project folder: the sample's data is converted into it, and runs lie in it."""
    monkeypatch.setattr(sources, "CHAT", tmp_path / "data" / "chat")
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for name, row in sources.tables()["datasets"].items():
        source = sources.SAMPLE / row["file"]
        convert_rows(source, sources.test_path(name), load_test_rules(name, source))
    return tmp_path


@pytest.fixture
def trained(workplace, tiny):
    """Makes a finished run of the tiny model: an adapter that PEFT saved, with a recipe."""

    def make(name="r4", seed=1):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        data = sources.CHAT / "sentiment_train.jsonl"
        path = write_recipe(workplace, name.replace("x", ""), tiny, data)
        folder = workplace / "runs" / "tiny" / name
        content = yaml.safe_load(path.read_text()) | {"output_dir": str(folder)}
        path = workplace / f"recipe_{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        shape = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, shape).save_pretrained(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        sha = common.digest(folder / "adapter_model.safetensors")
        common.write_json(folder / "run.json", {"recipe": str(path), "adapter_sha256": sha})
        return path, folder

    return make


def evaluate(monkeypatch, *arguments):
    call(monkeypatch, "eval", *arguments)


# ---- the tasks


def test_every_dataset_has_a_task_and_stands_in_a_group():
    datasets = set(sources.tables()["datasets"])
    assert datasets <= set(evaluation.read_tasks())
    groups = {}
    for path in evaluation.TASKS.glob("finlora*.yaml"):
        content = yaml.safe_load(path.read_text())
        groups[content["group"]] = content["task"]
    four = [f"finlora_{name}" for name in ("general", "certificate", "reporting", "analysis")]
    assert groups["finlora"] == four
    grouped = [name.removeprefix("finlora_") for group in four for name in groups[group]]
    # Of each file FinLoRA's dataset counts (of TFNS the repaired labels), and NWGI counts with
    # both its classes.
    first = {row["file"]: name for name, row in reversed(sources.tables()["datasets"].items())}
    assert sorted(grouped) == sorted({*first.values(), "nwgi_folded"})
    for name in evaluation.read_tasks():
        content = evaluation.read_tasks()[name]
        assert content["task"] == f"finlora_{name}"
        assert float(content["metadata"]["version"]) >= 1


def test_the_answer_budgets_are_finloras():
    result = {
        name: content["generation_kwargs"]["max_gen_toks"]
        for name, content in evaluation.read_tasks().items()
    }
    labels = ["fpb", "fiqa", "tfns", "tfns_as_published", "nwgi", "nwgi_folded", "headline", "ner"]
    labels += ["tfns_rest", "tfns_rest_as_published"]
    others = {"financial_math_worked": 100}  # not FinLoRA's: a calculation is longer than a number
    others |= {"tags": 20, "value": 20, "formula_construction": 30, "formula_calculations": 30}
    expected = dict.fromkeys(labels, 10) | others | {"finer": 100, "fnxl": 100}
    assert result == {name: expected.get(name, 50) for name in result}


@pytest.mark.parametrize(
    ("pattern", "words"), [("Input: (.*", "missing [)]"), ("Input: .*", "no group in brackets")]
)
def test_a_wrong_pattern_of_clusters_is_told_before_anything_is_scored(
    trained, monkeypatch, pattern, words
):
    tables = json.loads(json.dumps(sources.tables()))
    tables["datasets"]["fpb"]["cluster"] = pattern
    monkeypatch.setattr(sources, "tables", lambda: tables)
    subject = subject_of.of_recipe(recipes.find(str(trained()[0])))
    with pytest.raises(common.WrongInput, match=f"^fpb: cluster: .*{words}"):
        evaluation.identify(subject, "base", "fpb", None)


@pytest.mark.parametrize("limit", [None, 30])
def test_rows_that_ask_about_one_text_are_one_cluster(workplace, limit):
    rows, _ = evaluation.measure(Speaker(key), "ner", limit, Prompts("chat"))
    lines = sources.test_path("ner").read_text().splitlines()
    prompts = [json.loads(lines[row["row"]])["messages"][0]["content"] for row in rows]
    texts = [re.search("Input: (.*)\nAnswer:", prompt)[1] for prompt in prompts]
    first = [texts.index(text) for text in texts]
    assert [row["cluster"] for row in rows] == first and len(set(first)) < len(rows)
    scores = evaluation.score(rows)
    values, clusters = [row["values"]["f1_weighted"] for row in rows], [r["cluster"] for r in rows]
    assert scores["f1_weighted"] == stats.estimate("f1_weighted", values, clusters)
    rows, _ = evaluation.measure(Speaker(key), "financial_math", None, Prompts("chat"))
    assert 1 < len({row["cluster"] for row in rows}) < len(rows)
    rows, _ = evaluation.measure(Speaker(key), "fpb", 12, Prompts("chat"))
    assert not any("cluster" in row for row in rows)


@pytest.mark.parametrize("task", evaluation.read_tasks())
def test_the_keys_of_a_dataset_are_right_and_no_answer_is_wrong(task, workplace):
    rows, left_out = evaluation.measure(Speaker(key), task, 12, Prompts("chat"))
    result = evaluation.score(rows)
    assert len(rows) == 12 and set(left_out) <= {"bertscore"}
    assert {name: value["value"] for name, value in result.items()} == dict.fromkeys(result, 1)
    assert report.count_differing({"predictions": rows}) in (0, None)
    rows, _ = evaluation.measure(Speaker(lambda doc: ""), task, 12, Prompts("chat"))
    result = evaluation.score(rows)
    assert {name: value["value"] for name, value in result.items()} == dict.fromkeys(result, 0)


def test_where_finloras_rule_differs_from_ours_the_rows_are_counted(workplace):
    def inside(doc):  # FinLoRA's rule finds labels inside of words; ours does not
        return key(doc) + ("ish" if key(doc) == "neutral" else "")

    rows, _ = evaluation.measure(Speaker(inside), "fpb", None, Prompts("chat"))
    result = evaluation.score(rows)
    assert result["finlora_accuracy"]["value"] == 1
    assert result["accuracy"]["value"] == pytest.approx(72 / 172)  # 100 of 172 are neutral
    assert report.count_differing({"predictions": rows}) == 100


def test_nwgi_counts_at_seven_levels_and_at_three_classes(workplace):
    def milder(doc):
        return key(doc).replace("strong", "mildly").replace("moderately", "mildly")

    seven, _ = evaluation.measure(Speaker(milder), "nwgi", None, Prompts("chat"))
    three, _ = evaluation.measure(Speaker(milder), "nwgi_folded", None, Prompts("chat"))
    assert evaluation.score(seven)["accuracy"]["value"] == pytest.approx(12 / 28)
    assert evaluation.score(three)["accuracy"]["value"] == 1
    assert {row["expected"] for row in three} == {"negative", "neutral", "positive"}


def test_a_new_dataset_is_a_file_of_yaml(workplace, monkeypatch):
    monkeypatch.setattr(evaluation, "TASKS", workplace / "tasks")
    shutil.copytree(common.ROOT / "evals" / "tasks", workplace / "tasks")
    evaluation.read_tasks.cache_clear()
    rows = [{"context": f"Bill {n}\nAnswer:", "target": ["paid", "due"][n % 2]} for n in range(20)]
    source = workplace / "bills.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_rows(source, sources.CHAT / "bills_test.jsonl", Rules())
    (workplace / "tasks" / "local").mkdir(exist_ok=True)
    (workplace / "tasks" / "local" / "bills.yaml").write_text(
        """include: ../_labels.yaml
task: finlora_bills
dataset_kwargs: {data_files: {test: data/chat/bills_test.jsonl}}
filter_list:
  - name: label
    filter:
      - {function: regex, regex_pattern: "(?i)\\\\b(paid|due)\\\\b", fallback: "[none]"}
      - {function: take_first}
"""
    )
    assert evaluation.choose_datasets(None, ["bills"]) == ["bills"]
    scored, _ = evaluation.measure(Speaker(lambda doc: "Paid!"), "bills", None, Prompts("chat"))
    result = evaluation.score(scored)
    assert result["accuracy"]["value"] == 0.5
    assert result["f1_macro"]["value"] == pytest.approx(1 / 3)
    evaluation.read_tasks.cache_clear()


@pytest.mark.slow
def test_plain_lm_eval_scores_a_task_without_this_projects_code(workplace, tiny):
    arguments = ["--model", "hf", "--model_args", f"pretrained={tiny}", "--limit", "3"]
    arguments += ["--include_path", str(common.ROOT / "evals" / "tasks"), "--tasks", "finlora_fpb"]
    arguments += ["--apply_chat_template", "--batch_size", "3", "--output_path", "scores"]
    program = Path(sys.executable).with_name("lm_eval")
    quiet = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = workplace.glob("scores/**/results_*.json")
    result = json.loads(file.read_text())["results"]["finlora_fpb"]
    assert {"accuracy,label", "f1_weighted,label", "accuracy,finlora"} <= result.keys()


# ---- prompts


def generated(model, tokenizer, text, budget):
    """The greedy answer to one user turn, by transformers alone."""
    ids = prompt.tokens(tokenizer, [{"role": "user", "content": text}])
    output = model.generate(
        input_ids=model.dummy_inputs["input_ids"].new_tensor([ids]),
        max_new_tokens=budget,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def test_generation_stops_by_itself(smollm2):
    model, tokenizer = models.load({"base_model": str(smollm2)})
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = generated(model, tokenizer, "What is the capital of France?", 100)
    assert "Paris" in text
    assert len(tokenizer.encode(text)) < 60
    assert "<|im_start|>" not in text


@pytest.mark.parametrize("base", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_the_scorer_answers_as_a_plain_generate_loop_does(base, workplace, request):
    """Shared prefix, sorted batches and padding change no answer of the 4-bit base."""
    from evals.model import Model

    model, tokenizer = models.load({"base_model": str(request.getfixturevalue(base))} | NF4)
    lm = Model(model, tokenizer, "fpb", 16)
    lm.tokens, lm.cached = 200, 500  # a few rows a batch, and of those a few a pack
    scored, _ = evaluation.measure(lm, "fpb", 16, Prompts("chat"))
    rows = [json.loads(line) for line in sources.test_path("fpb").open()]
    assert len({row["row"] for row in scored}) == 16
    rows = [rows[row["row"]] for row in scored]
    plain = [generated(model, tokenizer, row["messages"][0]["content"], 10) for row in rows]
    assert [row["answer"].strip() for row in scored] == plain
    assert [row["expected"] for row in scored] == [key(row) for row in rows]


def test_a_model_that_is_trained_answers_as_it_does_outside_of_a_training(tiny, workplace):
    """Its hooks tell the packs of a training from those of scoring, which validates by a metric."""
    from evals.model import Model
    from tools.train.batches import compute_answer_logits_only
    from tools.train.shared_prefix import accept_packs

    model, tokenizer = models.load({"base_model": str(tiny)})

    def answer():
        scored, _ = evaluation.measure(Model(model, tokenizer, "x", 16), "fpb", 16, Prompts("chat"))
        return [row["answer"] for row in scored]

    outside = answer()
    compute_answer_logits_only(model)
    accept_packs(model)
    assert answer() == outside


def test_the_probabilities_of_labels_are_those_of_a_plain_forward_pass(tiny, workplace, tmp_path):
    import torch

    from evals.model import Model, first_tokens

    model, tokenizer = models.load({"base_model": str(tiny)} | NF4)
    lm = Model(model, tokenizer, "fpb", 16)
    lm.tokens, lm.cached = 200, 500
    answers = Answers(tmp_path / "kept.jsonl", {})
    scored, _ = evaluation.measure(lm, "fpb", 16, Prompts("chat"), answers)
    rows = [json.loads(line) for line in sources.test_path("fpb").open()]
    labels = ["negative", "neutral", "positive"]
    ids = first_tokens(tokenizer, labels)
    for row in scored:
        turn = [{"role": "user", "content": rows[row["row"]]["messages"][0]["content"]}]
        prompt_ids = tokenizer.encode(prompt.render(tokenizer, turn), add_special_tokens=False)
        with torch.inference_mode():
            shares = model(torch.tensor([prompt_ids])).logits[0, -1].softmax(-1)
        expected = {label: float(shares[ids[label]].sum()) for label in labels}
        total = sum(expected.values())
        likeliest = max(expected, key=expected.get)
        assert row["probabilities"] == pytest.approx(
            {label: share / total for label, share in expected.items()}, abs=1e-5
        )
        ((share, right),) = row["values"]["ece"]
        assert share == row["probabilities"][likeliest]
        assert right == (likeliest == row["expected"])
    # They are kept with the answers.
    silent = Model(model, tokenizer, "fpb", 16)
    silent._model_generate = None
    answers = Answers(tmp_path / "kept.jsonl", {})
    again, _ = evaluation.measure(silent, "fpb", 16, Prompts("chat"), answers)
    assert [row["values"] for row in again] == [row["values"] for row in scored]


def test_labels_that_begin_alike_have_no_probabilities(smollm2):
    from transformers import AutoTokenizer

    from evals.model import first_tokens

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(first_tokens(tokenizer, ["negative", "neutral", "positive"])) == 3
    assert first_tokens(tokenizer, ["moderately negative", "moderately positive"]) == {}
    assert first_tokens(tokenizer, ["positive"]) == first_tokens(tokenizer, []) == {}


def test_the_prompt_is_the_models_chat_template(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = Prompts("chat").text(tokenizer, "Up 5 %.\nAnswer:")
    assert text.endswith("<|im_start|>user\nUp 5 %.\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert text == prompt.render(tokenizer, [{"role": "user", "content": "Up 5 %.\nAnswer:"}])
    assert text.count("<|im_start|>") == 3
    assert Prompts("finlora").text(tokenizer, "Up.\nAnswer:") == "[INST] Up.\nAnswer: [/INST]"


def test_a_prompt_that_is_too_long_loses_its_middle_and_says_so(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    content = "Which tag? " + " ".join(f"fact{n}" for n in range(900)) + "\nAnswer:"
    prompts = Prompts("chat")
    text = prompts.fit(tokenizer, content, 400)
    assert 380 < len(tokenizer.encode(text)) <= 400
    assert "Which tag? fact0" in text and "fact899\nAnswer:<|im_end|>" in text
    assert text.startswith(prompts.text(tokenizer, "")[:40])
    assert prompts.cut[text] > 1000
    whole = prompts.fit(tokenizer, content, 8000)
    assert content in whole and whole not in prompts.cut
    with pytest.raises(common.WrongInput, match="no room"):
        prompts.fit(tokenizer, content, 20)


# ---- answers are kept


def test_scoring_that_was_cut_off_goes_on_from_its_last_batch(tmp_path, workplace):
    whole, _ = evaluation.measure(Speaker(key), "fpb", 20, Prompts("chat"))
    file = tmp_path / "kept" / ".fpb.partial.jsonl"
    spoken = []

    def until_the_plug_is_pulled(doc):
        if len(spoken) == 9:
            raise KeyboardInterrupt
        spoken.append(doc)
        return key(doc)

    first = Speaker(until_the_plug_is_pulled)
    with pytest.raises(KeyboardInterrupt):
        evaluation.measure(first, "fpb", 20, Prompts("chat"), Answers(file, {"model": 1}))
    assert len(first.asked) == 8  # two batches of four
    file.write_bytes(file.read_bytes() + b'{"prompt": "torn')
    second = Speaker(key)
    rows, _ = evaluation.measure(second, "fpb", 20, Prompts("chat"), Answers(file, {"model": 1}))
    assert rows == whole
    assert len(second.asked) == 12 and not set(first.asked) & set(second.asked)


def test_answers_of_another_model_are_thrown_away(tmp_path, workplace):
    file = tmp_path / ".fpb.partial.jsonl"
    evaluation.measure(Speaker(key), "fpb", 8, Prompts("chat"), Answers(file, {"model": 1}))
    other = Speaker(lambda doc: "")
    rows, _ = evaluation.measure(other, "fpb", 8, Prompts("chat"), Answers(file, {"model": 2}))
    assert len(other.asked) == 8
    assert {row["answer"] for row in rows} == {""}


def test_datasets_with_the_same_prompts_are_answered_once(tmp_path, workplace):
    known = {}
    first, second = Speaker(key), Speaker(key)
    for lm, name in ((first, "tfns"), (second, "tfns_as_published")):
        answers = Answers(tmp_path / name, {}, known)
        evaluation.measure(lm, name, None, Prompts("chat"), answers)
    assert (len(first.asked), second.asked) == (28, [])


# ---- commands


def test_an_untrained_recipe_and_an_unknown_dataset_are_one_line_each(tmp_path, tiny, chat_rows):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows)
    result = command("eval", recipe)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is not trained" in result.stderr
    with pytest.raises(common.WrongInput, match="did you mean fpb"):
        evaluation.choose_datasets(recipes.find(str(recipe)).task, ["fbp"])


def test_a_score_is_kept_until_what_it_depends_on_changes(trained, workplace, monkeypatch, capsys):
    recipe, folder = trained()
    evaluate(monkeypatch, recipe, "--tasks", "fpb,xbrl_term", "--limit", "6")
    printed = capsys.readouterr().out
    assert "fpb, base: 6/6" in printed and "xbrl_term, adapter: 6/6" in printed
    assert "fpb, accuracy: no difference shown" in printed and "Small: only 6 rows" in printed
    file = folder / "evals" / "fpb_sample6.json"
    content = json.loads(file.read_text())
    assert content["examples"] == len(content["predictions"]) == 6
    depends = content["evaluated"]
    assert (depends["precision"], depends["prompt_format"]) == ("nf4", "chat")
    assert depends["data_sha256"] == common.digest(sources.test_path("fpb"))
    assert depends["adapter_sha256"] == common.digest(folder / "adapter_model.safetensors")
    right = sum(row["expected"] == row["answered"] for row in content["predictions"])
    assert content["metrics"]["accuracy"]["value"] == pytest.approx(right / 6)
    base = json.loads((workplace / "runs/tiny/base_nf4/evals/xbrl_term_sample6.json").read_text())
    assert base["evaluated"]["adapter_sha256"] is None
    assert "bertscore" in base["metrics"].keys() | base["left_out"].keys()
    assert not list(folder.glob("evals/.*.jsonl"))  # answers that are in no score yet

    before = file.stat().st_mtime_ns
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "6")
    assert "fpb, base: 6" not in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    settings = json.loads((folder / "adapter_config.json").read_text())
    common.write_json(folder / "adapter_config.json", settings | {"lora_alpha": 1000})
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "6")
    assert "fpb, adapter: 6/6" in capsys.readouterr().out
    common.write_json(folder / "adapter_config.json", settings)

    lines = sources.test_path("fpb").read_text().splitlines(keepends=True)
    sources.test_path("fpb").write_text("".join(lines[1:]))
    sources.manifest_path(sources.test_path("fpb")).unlink()
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "6")
    assert file.stat().st_mtime_ns > before


def test_another_precision_is_recorded_and_leaves_the_scores_at_its_own(trained, monkeypatch):
    recipe, folder = trained()
    evaluate(monkeypatch, recipe, "--tasks", "fpb", "--limit", "2", "--precision", "fp32")
    (file,) = folder.glob("evals/*.json")
    assert file.name == "fpb_fp32_sample2.json"
    evaluated = json.loads(file.read_text())["evaluated"]
    assert (evaluated["precision"], evaluated["quantization"]) == ("fp32", {"dtype": "float32"})
    assert (folder.parent / "base_fp32/evals/fpb_sample2.json").is_file()
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, recipe, "--precision", "int3")


def test_a_base_is_loaded_at_the_precision_that_is_asked_for(tiny):
    import torch
    from bitsandbytes.nn import Linear4bit

    config = {"base_model": str(tiny)} | NF4
    assert models.at(config, "nf4") is config
    model, _ = models.load(config)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    model, _ = models.load(models.at(config, "bf16"))
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    names = [models.precision(models.at(config, name)) for name in models.PRECISIONS]
    assert names == list(models.PRECISIONS)


def test_the_base_alone_needs_no_training(workplace, tiny, chat_rows, monkeypatch, capsys):
    recipe = write_recipe(workplace, "r4", tiny, chat_rows)
    evaluate(monkeypatch, recipe, "--base", "--tasks", "headline", "--limit", "2")
    printed = capsys.readouterr().out
    assert "headline, base: 2/2" in printed and "difference" not in printed
    assert (workplace / "base_nf4/evals/headline_sample2.json").is_file()


def test_without_a_recipe_all_finished_runs_are_scored_and_compared(trained, monkeypatch, capsys):
    trained("r4", seed=1)
    trained("r4x", seed=2)
    evaluate(monkeypatch, "--tasks", "headline", "--limit", "2")
    printed = capsys.readouterr().out
    assert printed.count("headline, base: 2/2") == 1  # one base for both
    assert printed.count("headline, adapter: 2/2") == 2
    assert "\nheadline, accuracy: no difference shown" in printed.split(" against ")[1]


def test_an_adapter_of_finloras_gets_its_prompt_and_precision(
    trained, workplace, tiny, monkeypatch
):
    _, folder = trained()
    theirs = workplace / "models--wangd12--headline_llama_3_1_8b_4bits_r4" / "snapshots" / "abc"
    theirs.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, theirs / name)
    evaluate(monkeypatch, "--adapter", theirs, "--limit", "2")
    (file,) = (workplace / "runs").glob(
        "*/adapter_headline_llama_3_1_8b_4bits_r4_*/evals/headline_finlora_sample2.json"
    )
    evaluated = json.loads(file.read_text())["evaluated"]
    assert (evaluated["prompt_format"], evaluated["precision"]) == ("finlora", "nf4")
    assert evaluated["base_model"] == str(tiny)


def test_the_prompt_that_a_pulled_adapter_tells_of_is_taken(trained, monkeypatch):
    recipe, folder = trained()
    info = json.loads((folder / "run.json").read_text()) | {"prompt_format": "finlora"}
    common.write_json(folder / "run.json", info)
    assert subject_of.find("", str(folder)).prompt_format == "finlora"
    assert subject_of.find(str(recipe)).prompt_format == "finlora"
    assert subject_of.find(str(recipe), form="chat").prompt_format == "chat"
    with pytest.raises(common.WrongInput, match="make pull ADAPTER=owner/name"):
        subject_of.find("", "nobody/nothing")


def test_any_other_adapter_needs_a_precision(trained, workplace, monkeypatch, capsys):
    _, folder = trained()
    other = workplace / "some_adapter"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, other / name)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "--adapter", other)
    assert "PRECISION= is one of nf4, int8" in capsys.readouterr().err
    subject = subject_of.of_folder(other, None, "int8", "")
    assert (subject.prompt_format, models.precision(subject.config)) == ("chat", "int8")
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    with pytest.raises(common.WrongInput, match="no other format is read"):
        subject_of.of_folder(other, None, "int8", "")


# ---- FinLoRA's published scores


def test_published_scores_are_read_for_every_dataset_and_method():
    result = report.read_published()
    assert list(result) == ["base", "8bits_r8", "4bits_r4", "8bits_r8_dora", "8bits_r8_rslora"]
    assert {len(rows) for rows in result.values()} == {19}
    assert all(set(rows) <= set(evaluation.read_tasks()) for rows in result.values())
    assert result["4bits_r4"]["fpb"] == {"finlora_accuracy": 0.8416, "finlora_f1_weighted": 0.909}
    assert result["base"]["xbrl_term"] == {"bertscore": 0.574}


def test_a_recipe_and_an_adapter_of_finloras_are_known_by_its_names():
    theirs = ("llama_3_1_8b", "4bits_r4")
    assert report.find_method("llama-3.1-8b/sentiment_r4") == theirs
    assert report.find_method("hub/wangd12/sentiment_llama_3_1_8b_4bits_r4") == theirs
    assert report.find_method("hub/someone/sentiment_r4") is None
    assert report.find_method("smollm2-135m/sentiment_r4") is None


def test_scores_are_compared_with_the_published_ones_on_finloras_data_alone(workplace):
    rows, _ = evaluation.measure(Speaker(key), "fpb", None, Prompts("chat"))
    content = {"examples": len(rows), "metrics": evaluation.score(rows), "predictions": rows}
    real = {"data_from": "FinLoRA or your own", "data_selected": None, "limit": None}
    result = report.against_published({"fpb": content | {"evaluated": real}}, "4bits_r4")["fpb"]
    assert result["finlora_accuracy"]["value"] == pytest.approx(1 - 0.8416)
    assert result["finlora_accuracy"]["p"] == pytest.approx(0.8416**172, rel=0.01)
    # Not the examples, nor a sample, nor what is left of a test set of which a part was trained on.
    others = ({"data_from": "data/sample"}, {"limit": 172}, {"data_selected": "312 chosen rows"})
    for other in others:
        assert not report.against_published({"fpb": content | {"evaluated": real | other}}, "base")


def test_differences_are_corrected_over_the_datasets(workplace):
    def content(task, speaker):
        rows, _ = evaluation.measure(speaker, task, None, Prompts("chat"))
        evaluated = {"data_sha256": task, "base_model": "tiny", "precision": "nf4"}
        return {"evaluated": evaluated, "metrics": evaluation.score(rows), "predictions": rows}

    names = ("fiqa", "headline", "tfns")
    first = {name: content(name, Speaker(lambda doc: "Yes neutral")) for name in names}
    second = {name: content(name, Speaker(key)) for name in names}
    result = report.differences(first, second)
    plain = [result[name]["accuracy"]["p"] for name in names]
    assert [result[name]["accuracy"]["corrected"] for name in names] == stats.holm(plain)
    assert result["tfns"]["accuracy"]["family"] == 3
    assert max(plain) < 0.001
    fewer = second["tfns"] | {"predictions": second["tfns"]["predictions"][1:]}
    assert "tfns" not in report.differences(first, second | {"tfns": fewer})


def test_a_difference_pairs_rows_by_their_number_where_some_could_not_be_scored():
    def content(left_out):
        rows = [
            {"row": n, "values": {} if n == left_out else {"accuracy": n % 2}} for n in range(40)
        ]
        return {"evaluated": {}, "metrics": {"accuracy": {}}, "predictions": rows}

    gains = report.differences({"fpb": content(0)}, {"fpb": content(39)})
    change = gains["fpb"]["accuracy"]
    assert (change["value"], change["p"]) == (0, 1)
    assert report.differences({"fpb": content(0)}, {"fpb": content(None)})["fpb"]["accuracy"]


@pytest.mark.slow
def test_the_adapter_of_the_demo_beats_its_base_by_20_points(
    smollm2, workplace, monkeypatch, capsys
):
    convert.convert_task("sentiment", sources.SAMPLE)
    catalogue = recipes.build_config("smollm2-135m/sentiment_r4")
    kept = ("max_steps", "save_steps", "eval_steps", "warmup_steps")
    same = {key: catalogue[key] for key in kept}
    recipe = write_recipe(workplace, "r4", smollm2, sources.train_path("sentiment"), **same)
    result = command("train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    evaluate(monkeypatch, recipe, "--tasks", "fpb")
    base = json.loads((workplace / "base_nf4/evals/fpb.json").read_text())
    adapter = json.loads((workplace / "r4/evals/fpb.json").read_text())
    gain = adapter["metrics"]["accuracy"]["value"] - base["metrics"]["accuracy"]["value"]
    print(capsys.readouterr().out)
    assert gain >= 0.20


@pytest.mark.parametrize("first", ["evals.run", "tools.train.verify", "tools.__main__"])
def test_no_bar_of_a_library_stands_among_the_lines(first):
    code = f"import {first}, lm_eval.api.task as task; print(task.tqdm([1]).disable)"
    clean = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr
