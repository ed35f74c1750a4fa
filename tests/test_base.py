"""What `make add-model` reads of a base, checks on it and writes for it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoTokenizer

from evals import results
from tests import tokenizers
from tests.conftest import make_adapter, run_first
from tests.hub_server import Hub
from tools import architectures, models, recipes, rendering
from tools.base import add, describe, tokens, trial
from tools.common import ROOT, JobFailed, WrongInput
from tools.train import hardware, memory, plan, twins, without_gpu
from tools.train.memory import Setup

QKV = ("q_proj", "k_proj", "v_proj")


def build_config(kind, **changes):
    """The config of a class of transformers with its default sizes."""
    text = {"text_config": changes} if kind in ("qwen3_5", "gemma3") else changes
    return transformers.AutoConfig.for_model(kind, **text)


@pytest.fixture
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def config():
    return recipes.build_config("smollm2-135m/sentiment_r4")


# ---- the tokenizer


def judge(check, config, tokenizer):
    finding = check(config, tokenizer)
    return finding.verdict, finding.detail


def test_a_sound_tokenizer_passes_every_check(config, tokenizer):
    findings = tokens.check_tokens(config, tokenizer)
    assert [finding.verdict for finding in findings[:-1]] == ["verified"] * 5


def test_an_end_that_is_not_trained_is_found(config, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    verdict, detail = judge(tokens.check_shapes, config, tokenizer)
    assert verdict == "failed" and "is trained, not" in detail


def test_a_prompt_that_no_training_began_with_is_found(config, tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}Think. {% endif %}"
    verdict, detail = judge(tokens.check_shapes, config, tokenizer)
    assert verdict == "failed" and "chat template" in detail


@pytest.mark.parametrize(
    ("pad", "words"), [("<|im_end|>", "ends an answer"), ("<|im_start|>", "stands in a row")]
)
def test_a_pad_token_that_would_mask_something_else_is_found(config, tokenizer, pad, words):
    tokenizer.pad_token = pad
    verdict, detail = judge(tokens.check_pad, config, tokenizer)
    assert verdict == "failed" and words in detail


def test_reasoning_that_a_prompt_opens_is_found(config, tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    verdict, detail = judge(tokens.check_thinking, config, tokenizer)
    assert verdict == "failed" and "<think>" in detail


def test_a_date_in_a_prompt_is_found_and_one_that_is_fixed_is_not(config, tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %B') }}" + tokenizer.chat_template
    assert judge(tokens.check_dates, config, tokenizer)[0] == "failed"
    fixed = recipes.build_config("smollm3-3b/sentiment_r4")["chat_template_jinja"]
    tokenizer.chat_template = fixed
    assert judge(tokens.check_dates, config, tokenizer)[0] == "verified"


def test_a_doubled_first_token_is_found(config, tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    verdict, detail = judge(tokens.check_start, config, tokenizer)
    assert (verdict, detail) == ("failed", "a prompt begins with <|endoftext|> twice")


def test_keys_over_a_budget_are_counted(tmp_path, monkeypatch, config, tokenizer):
    rows = [{"context": "x", "target": target} for target in ("positive", "a b " * 40)]
    (tmp_path / "data" / "test").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "test" / "fpb_test.jsonl").write_text(text)
    monkeypatch.setenv("FINLORA_DATA", str(tmp_path))
    long_keys, total = tokens.count_long_keys(tokenizer)
    assert long_keys["fpb"] == 1 and total >= 2
    assert "1 of fpb" in tokens.check_budgets(config, tokenizer).detail


@pytest.mark.parametrize(
    ("model", "settings"),
    run_first(
        1,
        [
            ("qwen3-8b", {"pad_token": "<|endoftext|>"}),
            ("gemma-3-4b", {"pad_token": "<pad>"}),
            ("qwen3.5-4b", {"pad_token": "<|endoftext|>"}),
        ],
    ),
)
def test_the_settings_of_a_new_base_are_those_of_the_catalogue(model, settings):
    folder = tokenizers.bring(model)
    if isinstance(folder, str):
        pytest.skip(folder)
    proposed = tokens.propose_settings(AutoTokenizer.from_pretrained(folder))
    assert proposed["special_tokens"] == settings
    catalogue = recipes.read_matrix()["models"][model]["settings"]
    assert proposed.get("chat_template_kwargs") == catalogue.get("chat_template_kwargs")


def test_smollm3_is_asked_as_its_own_template_asks():
    """The text that the base's template writes without reasoning, save for the day."""
    config = recipes.build_config("smollm3-3b/sentiment_r4")
    tokenizer = tokenizers.load("smollm3-3b")
    row = {"messages": [{"role": "system", "content": "SYS"}, *tokens.SHAPES["one turn"]]}
    tokenizer.chat_template = config["chat_template_jinja"]
    text = tokens.prompts.render_row(tokenizer, row)
    assert text == (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
        "Today Date: 08 July 2025\nReasoning Mode: /no_think\n\n## Custom Instructions\n\nSYS\n\n"
        f"<|im_start|>user\n{tokens.QUESTION['content']}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\npositive<|im_end|>\n"
    )


def test_gpt_oss_answers_in_the_channel_that_it_is_asked_in():
    folder = tokenizers.bring("gpt-oss-20b")
    if isinstance(folder, str):
        pytest.skip(folder)
    config = recipes.build_config("gpt-oss-20b/sentiment_r8_fp16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(config["special_tokens"])
    tokenizer.chat_template = config["chat_template_jinja"]
    findings = tokens.check_tokens(config, tokenizer)
    assert [finding.verdict for finding in findings[:-1]] == ["verified"] * 5, findings
    text = tokens.prompts.render(tokenizer, [tokens.QUESTION])
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>")


# ---- the architecture


@pytest.mark.parametrize(
    "model", ["qwen3-0.6b", "smollm3-3b", "llama-3.2-1b", "qwen3.5-4b", "gpt-oss-20b"]
)
def test_what_is_recorded_of_a_base_is_what_transformers_builds(model):
    base = recipes.read_matrix()["models"][model]["hub"]
    recorded = architectures.find(base)
    sizes = {
        "hidden_size": recorded.hidden,
        "intermediate_size": recorded.intermediate,
        "num_hidden_layers": recorded.layers,
        "num_attention_heads": recorded.heads,
        "num_key_value_heads": recorded.kv_heads,
        "head_dim": recorded.head_dim,
        "vocab_size": recorded.vocab,
        "tie_word_embeddings": recorded.tied,
    }
    config = build_config(recorded.model_type, **sizes)
    config.tie_word_embeddings = recorded.tied
    if recorded.experts:
        config = build_config(recorded.model_type, **sizes, num_local_experts=32)
    content = describe.describe_architecture(base, config)
    built = architectures.parse_architecture(content)
    assert built.list_layers() == recorded.list_layers()
    assert built.parameters == recorded.parameters


def test_experts_count_whole_in_memory_and_by_those_chosen_in_time():
    model = architectures.find("openai/gpt-oss-20b")
    layers = model.list_layers()
    assert model.experts == 24 * 32 * (3 * 2880 * 2880 + 3 * 2880)
    assert all(layer.active * 8 == layer.experts for layer in layers)
    multiplied = model.linear + model.experts // 8 + model.vocab * model.hidden
    assert plan.count_flops(model, Setup(rank=8, modules=QKV)) == 6 * multiplied
    four, sixteen = (
        memory.compute_memory(model, Setup(bits=bits, rank=8, modules=QKV)) for bits in (4, 16)
    )
    # Attention alone is quantized: 4 bits save almost nothing.
    assert four.peak > 0.9 * sixteen.peak > 2 * model.experts * 0.9


@pytest.mark.parametrize("kind", ["qwen3_5", "gpt_oss", "smollm3", "gemma3"])
def test_a_twin_has_every_kind_of_layer_and_peft_trains_what_is_planned(kind, tmp_path, tokenizer):
    from peft import LoraConfig, get_peft_model

    config = build_config(kind)
    twins.write_twin(config, tokenizer, tmp_path)
    tiny = transformers.AutoConfig.from_pretrained(tmp_path)
    text, whole = tiny.get_text_config(decoder=True), config.get_text_config(decoder=True)
    assert type(tiny) is type(config) and text.num_hidden_layers >= 2
    assert {*getattr(text, "layer_types", ())} == {*getattr(whole, "layer_types", ())}
    if kind == "smollm3":
        assert text.no_rope_layers == [1, 0]
    planned = architectures.parse_architecture(describe.describe_architecture("x/y", tiny))
    modules = [*architectures.MODULES, *architectures.LINEAR_ATTENTION]
    model = describe.build_empty(tiny)
    decoder = describe.find_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    pattern = rf"{re.escape(prefix)}\..*\.({'|'.join(modules)})"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=pattern))
    trained = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert trained == memory.count_trainable(planned, Setup(rank=4, modules=tuple(modules)))


def test_experts_that_stay_at_16_bits_are_named(tmp_path, tokenizer):
    twins.write_twin(build_config("gpt_oss"), tokenizer, tmp_path)
    config = {"base_model": str(tmp_path)} | models.PRECISIONS["nf4"]
    loaded, _ = models.load(config)
    (reason,) = trial.explain_unquantized(loaded, config)
    assert re.fullmatch(r"experts stay at 16 bits: \d\d% of a layer's parameters", reason)
    dense = {"base_model": str(tmp_path), "dtype": "float32"}
    assert not trial.explain_unquantized(models.load(dense)[0], dense)
    # A dense base under the name of a quantized one: its linear layers are named, too.
    assert trial.explain_unquantized(models.load(dense)[0], config)[1:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels for it")
def test_linear_attention_is_computed_without_a_gpu_in_the_class_that_axolotl_trains(
    tmp_path, tokenizer
):
    twins.write_twin(build_config("qwen3_5"), tokenizer, tmp_path)
    model, loaded = models.load({"base_model": str(tmp_path)})
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    ids = torch.tensor([loaded.encode("Sales rose.")])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    names = models.base_modules(str(tmp_path))
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv" in names


def test_a_matrix_that_no_step_has_changed_is_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_adapter(tiny, tmp_path / "adapter")
    assert not trial.explain_untrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, path)
    assert trial.explain_untrained(folder) == [f"{name} was not trained, with 0 others"]


# ---- the whole command


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    """A copy of the tables with two models, for a command that writes."""
    folder = tmp_path / "recipes"
    table = yaml.safe_load((recipes.FOLDER / "matrix.yaml").read_text())
    table["models"] = {name: table["models"][name] for name in ("llama-3.1-8b", "qwen3-8b")}
    table["files"] = []
    shutil.copytree(architectures.FOLDER, folder / "models")
    (folder / "matrix.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    monkeypatch.setattr(recipes, "FOLDER", folder)
    monkeypatch.setattr(recipes, "LOCAL", folder / "local")
    monkeypatch.setattr(architectures, "FOLDER", folder / "models")
    monkeypatch.setattr(add.scale, "write", lambda: None)  # docs/scale.md is not of this copy
    for clear in (recipes.clear_caches, architectures.read_architectures.cache_clear):
        clear()
    yield folder
    for clear in (recipes.clear_caches, architectures.read_architectures.cache_clear):
        clear()


@pytest.fixture
def base(tiny, tmp_path):
    """A folder of a base with config and tokenizer, and no weights."""
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_base_is_added_by_its_folder(catalogue, base, monkeypatch, capsys):
    monkeypatch.setattr(add.trial, "check_method", lambda *arguments: [])  # the slow test trains
    before = yaml.safe_load((catalogue / "matrix.yaml").read_text())
    add.add_model("somebody/Tiny-2-Instruct", base, None, None)
    after = yaml.safe_load((catalogue / "matrix.yaml").read_text())
    row = after["models"].pop("tiny-2")
    assert after == before
    assert (row["hub"], row["gated"]) == ("somebody/Tiny-2-Instruct", False)
    assert row["settings"] == {"special_tokens": {"pad_token": "<|endoftext|>"}}
    built = architectures.find("somebody/Tiny-2-Instruct")
    assert (built.layers, built.hidden, built.tied) == (2, 64, True)
    record = json.loads((catalogue / "checks" / "tiny-2.json").read_text())
    assert record["versions"]["transformers"] == transformers.__version__
    page = (catalogue / "tiny-2" / "README.md").read_text()
    assert "## Verified" in page and "the end of turn is trained | verified" in page
    said = capsys.readouterr().out
    assert "not verified whether it is gated" in said and "real weights" in said
    # Again, it is checked and its row is left alone.
    add.add_model("somebody/Tiny-2-Instruct", base, None, "r4")
    assert yaml.safe_load((catalogue / "matrix.yaml").read_text())["models"]["tiny-2"] == row


def test_a_check_that_fails_ends_the_command_and_is_on_the_page(catalogue, base, monkeypatch):
    monkeypatch.setattr(add.trial, "check_method", lambda *arguments: [])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    with pytest.raises(JobFailed, match="1 check failed, first tokenizer: the template writes"):
        add.add_model("somebody/Dated", base, None, None)
    assert "failed (the template writes today's date" in rendering.render_model_page("dated")


@pytest.mark.parametrize(
    ("hub", "folder", "words"),
    [("tiny", True, "a name on the Hub is needed"), ("a/b", False, "has no config.json")],
)
def test_wrong_input_is_one_line(catalogue, base, tmp_path, hub, folder, words):
    with pytest.raises(WrongInput, match=words) as refused:
        add.add_model(hub, base if folder else tmp_path, None, None)
    assert "\n" not in str(refused.value)


def test_config_and_tokenizer_come_from_the_hub_without_weights(tiny, tmp_path):
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    code = (
        "from tools.base.add import find_base_source; source = find_base_source('me/tiny', None);"
        "names = sorted(path.name for path in source.folder.iterdir());"
        "print(names, source.gated, source.revision)"
    )
    with Hub() as hub:
        token = hub.user("me")
        hub.put("me/tiny", files)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ
            | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token}
            | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    names, _, rest = done.stdout.partition("] ")
    assert "config.json" in names and "tokenizer.json" in names and "safetensors" not in names
    assert re.fullmatch(r"False [0-9a-f]{40}\n", rest)


def test_a_class_that_transformers_does_not_know_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(WrongInput, match="cannot read its config.json") as refused:
        describe.read_config(tmp_path)
    assert "\n" not in str(refused.value)


def list_trials():
    """(model, method) of what `make add-model` tries, and of every other method for slow tests."""
    kinds = {"qwen3-0.6b", "smollm3-3b", "qwen3.5-4b", "gpt-oss-20b", "llama-3.2-1b", "gemma-3-4b"}
    methods = list(recipes.read_matrix()["methods"])[:-1]
    rows = recipes.read_matrix()["models"]
    return [
        (model, method)
        for model in sorted(kinds)
        for method in methods
        if method in rows[model].get("methods", methods)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), list_trials())
def test_every_method_of_every_architecture_is_quantized_trained_scored_and_merged(
    model, method, tmp_path
):
    recorded = architectures.find(recipes.read_matrix()["models"][model]["hub"])
    config = build_config(recorded.model_type)
    config.tie_word_embeddings = recorded.tied
    # Qwen3's models have one tokenizer.
    folder = tokenizers.bring("qwen3-8b" if model == "qwen3-0.6b" else model)
    if isinstance(folder, str):
        pytest.skip(folder)
    recipe = tokens.build_base_config(model, method, str(folder))
    twins.write_twin(config, models.load_tokenizer(recipe), tmp_path / "twin")
    findings = trial.check_method(model, method, tmp_path / "twin", tmp_path)
    assert len(findings) == 5
    assert [finding.verdict for finding in findings] == ["verified"] * 5, findings


# ---- without a GPU


LAPTOP = hardware.Host([], 2, 24 * 2**30)


def test_a_small_model_is_not_refused_by_its_size(monkeypatch):
    from tools.train import checks, search, tune

    monkeypatch.setattr(without_gpu, "multiply", lambda: 3e11)  # two idle cores
    for name in ("qwen3-0.6b/formula_r4", "llama-3.2-1b/xbrl_term_r4"):
        said = checks.require_hardware(recipes.find(name), LAPTOP)
        assert re.search(
            r"^up to about \d+ (hours|minutes) and \d+ GB of memory on 2 CPU cores", said
        )
    with pytest.raises(
        WrongInput, match=r"about \d+ (hours|days) and \d+ GB of memory.*FORCE=1"
    ) as refused:
        checks.require_hardware(recipes.find("sentiment_r4"), LAPTOP)
    assert "make train RECIPE=smollm2-135m/sentiment_r4 " in str(refused.value)
    small = replace(LAPTOP, memory=2**31)
    with pytest.raises(WrongInput, match="needs a CUDA GPU"):
        checks.require_hardware(recipes.find("llama-3.2-1b/xbrl_term_r4"), small)
    monkeypatch.setattr(hardware, "detect_host", lambda: LAPTOP)
    with pytest.raises(WrongInput, match="needs a CUDA GPU(?!.*FORCE)"):  # which a search lacks
        tune.open_search("sentiment_r4", search.SearchRequest())


def test_the_time_follows_from_the_speed_of_the_machine(monkeypatch):
    recipe = recipes.find("qwen3-0.6b/formula_r4")
    hours = []
    for speed in (1e11, 2e11):
        monkeypatch.setattr(without_gpu, "multiply", lambda speed=speed: speed)
        hours.append(without_gpu.estimate_on_cpu(recipe, LAPTOP).hours)
    assert hours[0] == pytest.approx(2 * hours[1]) and hours[1] > 0


def test_the_memory_that_trainings_took_on_a_cpu_is_not_above_what_is_said(monkeypatch):
    """Every committed result of a CPU; FinLoRA's longest rows, whatever rows are here.

    Results from when training kept a mask for each layer are up to 6 % above it.
    """
    monkeypatch.setattr(without_gpu, "multiply", lambda: 1e11)
    monkeypatch.setattr(without_gpu, "list_training_files", lambda config: [Path("none")])
    shares = []
    for result in results.load_results():
        if "no GPU" not in result.device:
            continue
        said = without_gpu.estimate_on_cpu(recipes.find(result.recipe), LAPTOP).memory
        peaks = [training.peak_memory_bytes for training in result.trainings.values()]
        shares.append(max(peaks) / said)
    assert len(shares) >= 17
    assert min(shares) > 0.5 and max(shares) < 1.06, sorted(shares)


@pytest.mark.parametrize("loaded", [True, False])
def test_the_speed_is_measured_where_torch_has_computed_already_and_where_it_has_not(loaded):
    """A child that is forked from torch's threads waits for them for ever."""
    code = "import sys; from tools.train import without_gpu as w; loaded = 'torch' in sys.modules"
    code += "; assert not loaded; w.multiply()" * loaded
    code += "; print(w.run_in_child(w.multiply) > 1e8, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["True", str(loaded)], done.stderr


# ---- memory at 8 bits


def test_checkpoints_that_are_not_reentrant_keep_the_inputs_of_8_bit_layers():
    model = architectures.find("models/smollm2-135m")
    setup = Setup(bits=8, rank=4, modules=QKV, row=100)
    kept, released = (
        memory.compute_activation_bytes(model, replace(setup, reentrant=reentrant), True)
        for reentrant in (False, True)
    )
    inputs = 3 * model.hidden + model.intermediate  # of q, k, v; o; gate and up; down
    assert kept - released == 100 * model.layers * 2 * inputs
    at_4_bits = replace(setup, bits=4)
    assert memory.compute_activation_bytes(model, at_4_bits, True) == released
