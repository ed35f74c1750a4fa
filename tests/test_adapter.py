"""Every door takes an adapter that PEFT loads faithfully, and names the reason where it does not.

Real adapters, made with PEFT on a tiny random base.
"""

import json
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import GPU, QKV, run, run_first
from tests.conftest import make_adapter as make
from tools import adapters, architectures, common, models, patterns, prompts, recipes, subjects
from tools.common import ROOT, WrongInput
from tools.use import chat, merge, serve

ADAPTERS = ROOT.parent / "shared" / "finlora" / "adapters.tsv"


def change(folder: Path, **settings) -> Path:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def rename(folder: Path, pattern: str, replacement: str) -> Path:
    tensors = load_file(folder / adapters.WEIGHTS)
    renamed = {re.sub(pattern, replacement, name): t for name, t in tensors.items()}
    save_file(renamed, folder / adapters.WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> Path:
    return make(tiny, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def logits(model, tokenizer):
    return merge.compute_logits(model, tokenizer, None, "bare")


def largest(these, those) -> float:
    return merge.measure_difference(these, those)["largest_logit_difference"]


FROZEN = re.compile(r"\.(base_layer|original_module|modules_to_save)\.")
LAYER = r"model\.layers\.\d+\.self_attn\."
KINDS = {
    "plain": {},
    "ranks and alphas": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, r"^model\.layers\.1\..*k_proj": 2},
        "alpha_pattern": {"v_proj": 40},
    },
    "DoRA": {"use_dora": True},
    "both saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "added tokens": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "tokens": ["<bull>", "<bear>"],
    },
    "an expression": {"target_modules": rf".*({LAYER})(q|v)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded modules": {"exclude_modules": rf"{LAYER}k_proj"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "the first layer": {"layers_to_transform": 0},
    "rsLoRA with ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "added tokens, saved by PEFT": {"tokens": ["<bull>"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no task type": {"task_type": None},
    "rank 320": {"r": 320, "lora_alpha": 320},
}


@pytest.mark.parametrize("kind", run_first(2, KINDS))
def test_what_peft_loads_is_loaded_merged_and_leaves_the_base_as_it_is(tiny, tmp_path, kind):
    """Its logits are PEFT's own, the merged model has the same, and without it the base answers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.model import Model

    folder = make(tiny, tmp_path / "adapter", **KINDS[kind])
    subject = subjects.find("", str(folder), "fp32")
    model, tokenizer = models.load(subject.config, subject.adapter)

    plain_base = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    base_logits = logits(plain_base, AutoTokenizer.from_pretrained(tiny))
    size = len(base_logits[0][0])
    if "tokens" in KINDS[kind]:
        plain_base.resize_token_embeddings(len(tokenizer))
        assert len(tokenizer) == size + len(KINDS[kind]["tokens"])
    theirs = PeftModel.from_pretrained(plain_base, str(folder)).eval()
    ours = logits(model, tokenizer)
    assert largest(ours, logits(theirs, tokenizer)) < 1e-5
    with model.disable_adapter():
        without = [text[:, :size] for text in logits(model, tokenizer)]
    assert largest(without, base_logits) < 1e-5
    assert largest([text[:, :size] for text in ours], base_logits) > 1e-2

    Model(model, tokenizer, "as it is scored", 1)
    assert largest(logits(model, tokenizer), ours) == 0

    target = merge.merge(subject.config, folder, subject.prompt_format)
    merged, merged_tokenizer = models.load({"base_model": str(target), "dtype": "float32"})
    assert largest(ours, logits(merged, merged_tokenizer)) < 1e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "added tokens, saved by PEFT"])
def test_the_tensors_that_a_config_gives_are_those_that_peft_writes(tiny, tmp_path, kind):
    """On the architecture as `make pull` knows it, without torch."""
    folder = make(tiny, tmp_path / "adapter", **KINDS[kind])
    shape = json.loads((tiny / "config.json").read_text())
    count = adapters.check(folder, architectures.parse_config("x/tiny", shape))
    with safe_open(folder / adapters.WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if not FROZEN.search(name)]  # noqa: SIM118
        assert count == sum(file.get_tensor(name).numel() for name in names)


HARMLESS = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    },
    "eva_config": {"rho": 2.0, "tau": 0.99},
    "corda_config": {"cache_file": None},
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "megatron_core": "megatron.core",
    "peft_version": "9.9.9",
    "a_key_of_a_newer_version": None,
    "another_one": False,
    "init_lora_weights": "eva",
}


def test_settings_without_effect_on_loading_are_accepted(copy):
    change(copy, **HARMLESS)
    subject = subjects.find("", str(copy), "fp32")
    model, tokenizer = models.load(subject.config, subject.adapter)
    with model.disable_adapter():
        base = logits(model, tokenizer)
    assert largest(logits(model, tokenizer), base) > 1e-2


REFUSED = {
    "peft_type": ("IA3", "LORA is needed"),
    "init_lora_weights": ("pissa", "rewrite the base's weights"),
    "revision": (9, "the name of a revision is needed"),
    "use_qalora": (True, "not supported"),
    "lora_bias": (True, "not supported"),
    "trainable_token_indices": ([1, 2], "not supported"),
    "layer_replication": ([[0, 1], [0, 2]], "not supported"),
    "target_parameters": (["experts.gate"], "not supported"),
    "alora_invocation_tokens": ([1], "not supported"),
    "use_something_new": (True, "use_something_new.*not supported"),
    "bias": ("all", "none is needed"),
    "task_type": ("SEQ_CLS", "CAUSAL_LM"),
    "r": (True, "rank from 1"),
    "lora_alpha": (-16.0, "positive number"),
    "rank_pattern": ({"q_proj": 0}, "ranks from 1"),
    "alpha_pattern": ({"q_proj": "16"}, "positive numbers"),
    "target_modules": ([], "names of linear layers"),
    "auto_mapping": ({"parent_library": "os", "base_model_class": "system"}, "auto_mapping"),
}
INITIALIZATIONS = ["olora", "pissa_niter_16", "loftq", "corda", "lora_ga", "a_new_one", 1, "PISSA"]
CASES = [(key, *case) for key, case in REFUSED.items()]
CASES += [("init_lora_weights", value, "rewrite the base's") for value in INITIALIZATIONS]


@pytest.mark.parametrize("door", ["chat", "merge", "serve", "eval"])
def test_every_door_refuses_in_one_line_before_it_loads_anything(copy, door):
    change(copy, init_lora_weights="pissa", base_model_name_or_path="nobody/has-this")
    done = run(door, "--adapter", str(copy), "--precision", "nf4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "adapter_config.json: \"init_lora_weights\" is 'pissa'" in done.stderr


@pytest.mark.parametrize(("key", "value", "why"), CASES)
def test_settings_that_would_not_be_loaded_faithfully_are_refused_by_name(copy, key, value, why):
    with pytest.raises(WrongInput, match=why) as refusal:
        subjects.find("", str(change(copy, **{key: value})), "fp32")
    assert key in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_converted_pissa_adapter_is_plain_lora(tiny, tmp_path):
    """PEFT's conversion doubles the rank and takes the base's weights as they were."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny)
    before = [text.clone() for text in logits(base, models.load({"base_model": str(tiny)})[1])]
    config = LoraConfig(r=4, target_modules=QKV, init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.2 * torch.ones_like(weight)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    expected = logits(model.eval(), models.load({"base_model": str(tiny)})[1])
    subject = subjects.find("", str(tmp_path / "converted"), "fp32")
    loaded, tokenizer = models.load(subject.config, subject.adapter)
    assert largest(logits(loaded, tokenizer), expected) < 1e-3
    with loaded.disable_adapter():
        assert largest(logits(loaded, tokenizer), before) < 1e-5


BROKEN_NAMES = {
    "the adapter's name": (r"(lora_[AB])\.weight", r"\1.default.weight", "does not load"),
    "no prefix": (r"^base_model\.model\.", "", "does not load"),
    "another prefix": (r"^base_model\.model\.", "base_model.model.module.", "tensor"),
    "a compiled model": (r"^base_model\.model\.", "_orig_mod.base_model.model.", "does not load"),
    "twice the prefix": (r"^", "base_model.model.", "tensor"),
    "another layer": (r"layers\.1\.", "layers.7.", "lacks|holds"),
}


@pytest.mark.parametrize("case", BROKEN_NAMES)
def test_tensors_that_peft_would_leave_out_are_refused(copy, case):
    pattern, replacement, why = BROKEN_NAMES[case]
    with pytest.raises(WrongInput, match=why):
        subject = subjects.find("", str(rename(copy, pattern, replacement)), "fp32")
        models.load(subject.config, subject.adapter)


def test_an_adapter_without_tensors_or_with_some_of_them_is_refused(copy):
    tensors = load_file(copy / adapters.WEIGHTS)
    save_file({k: v for k, v in tensors.items() if ".1." not in k}, copy / adapters.WEIGHTS)
    subject = subjects.find("", str(copy), "fp32")
    with pytest.raises(WrongInput, match="lacks the tensor 'base_model.model.model.layers.1"):
        models.load(subject.config, subject.adapter)
    save_file({}, copy / adapters.WEIGHTS)
    with pytest.raises(WrongInput, match="holds no tensors"):
        subjects.find("", str(copy), "fp32")


def test_pefts_own_result_of_a_load_decides(tiny, copy):
    """Whatever the checker said: what was not set, or set in the base, is an error."""
    base, _ = models.load_base({"base_model": str(tiny)})
    checked = models.check_adapter({"base_model": str(tiny)}, copy)
    rename(copy, r"layers\.1\.(.*lora_[AB])\.weight", r"layers.7.\1.weight")
    with pytest.raises(WrongInput, match="lacks 6 tensors"):
        models.attach(base, copy, checked)


def test_an_embedding_that_is_not_the_bases_is_refused(tiny, tmp_path):
    """PEFT saves the base's own embedding beside LoRA on it, and would write it into this base."""
    folder = make(tiny, tmp_path / "adapter", target_modules=["embed_tokens"])
    tensors = load_file(folder / adapters.WEIGHTS)
    name = next(name for name in tensors if "base_layer" in name)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, folder / adapters.WEIGHTS)
    subject = subjects.find("", str(folder), "fp32")
    with pytest.raises(WrongInput, match="changes the base's own weights"):
        models.load(subject.config, subject.adapter)


def test_added_tokens_without_their_tokenizer_or_their_weights_are_refused(tiny, tmp_path):
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    folder = make(tiny, tmp_path / "adapter", tokens=["<bull>"], **both)
    tensors = load_file(folder / adapters.WEIGHTS)
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(WrongInput, match="the tokenizer that it was trained with"):
        models.check_adapter({"base_model": str(tiny)}, tmp_path / "bare")
    change(folder, modules_to_save=["embed_tokens"])
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, folder / adapters.WEIGHTS)
    with pytest.raises(WrongInput, match="lm_head are not in the file"):
        models.check_adapter({"base_model": str(tiny)}, folder)


def test_tokens_in_spare_rows_of_a_base_and_another_end_token_are_taken(tiny, tmp_path, capsys):
    """Many bases have more rows than tokens: added tokens need no new weights there."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(base)
    folder = make(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<bull>"])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    subject = subjects.find("", str(folder), "fp32")
    loaded, own = models.load(subject.config, subject.adapter)
    assert own.tokenize("<bull>") == ["<bull>"] and own.eos_token == "<|endoftext|>"
    with torch.no_grad():
        ids = own("<bull> up", return_tensors="pt").input_ids
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
    merged = merge.merge(subject.config, folder, "chat")
    ends = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert own.eos_token_id in ends
    assert AutoTokenizer.from_pretrained(merged).tokenize("<bull>") == ["<bull>"]

    tokenizer.add_tokens([f"<more {n}>" for n in range(20)])  # more than there are rows
    tokenizer.save_pretrained(folder)
    with pytest.raises(WrongInput, match="its tokenizer has .* tokens and its weights"):
        models.load(subject.config, subject.adapter)
    other = folder / "tokenizer.json"
    content = json.loads(other.read_text())
    content["added_tokens"][0]["content"] = "<another>"
    other.write_text(json.dumps(content).replace('"<|endoftext|>"', '"<another>"'))
    (folder / "tokenizer_config.json").unlink()
    base_tokenizer = models.load_tokenizer(subject.config)
    for text in (None, "{}", "version https://git-lfs.github.com/spec/v1"):
        if text:
            other.write_text(text)
        assert models.load_own_tokenizer(folder, base_tokenizer) is base_tokenizer
        assert "its tokenizer does not extend the base's: not used" in capsys.readouterr().out


def test_tokens_of_a_tokenizer_in_the_slow_format_are_taken(tiny, tmp_path, capsys):
    folder = make(tiny, tmp_path / "adapter")
    base_tokenizer = models.load_tokenizer({"base_model": str(tiny)})
    content = json.loads((tiny / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps({"<bull>": len(base_tokenizer)}))
    assert models.load_own_tokenizer(folder, base_tokenizer) is base_tokenizer
    assert "its tokenizer does not extend the base's: not used" in capsys.readouterr().out

    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    files = {
        "vocab.json": json.dumps(content["model"]["vocab"]),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "added_tokens.json": json.dumps(added | {"<bull>": len(base_tokenizer)}),
        "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    own = models.load_own_tokenizer(folder, base_tokenizer)
    assert own.tokenize("<bull>") == ["<bull>"] and not capsys.readouterr().out


def test_an_adapter_of_another_template_or_tokens_has_a_score_of_the_base_of_its_own(
    tiny, tmp_path
):
    """With another template the base answers other prompts, which is another score."""

    def find(change=None, name="adapter"):
        folder = make(tiny, tmp_path / name)
        if change:
            change(folder)
        return subjects.find("", str(folder), "fp32").with_own_prompts()

    plain = find()
    template = models.load_tokenizer({"base_model": str(tiny)}).chat_template

    def write(text):
        return lambda folder: (folder / "chat_template.jinja").write_text(text)

    def end_otherwise(folder):
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)

    assert plain.base_folder.name == "base_fp32" and not plain.prompting
    assert find(write(template), "same").base_folder == plain.base_folder
    other = find(write("Q: {{ messages[0].content }} A:"), "other")
    ends = find(end_otherwise, "ends")
    begins = find(write("{{ bos_token }}Q: {{ messages[0].content }} A:"), "begins")
    folders = {subject.base_folder for subject in (plain, other, ends, begins)}
    assert len(folders) == 4 and other.base_folder.name == f"base_fp32_{other.prompting}"
    assert other.file("base", "fpb", None) != plain.file("base", "fpb", None)
    # Prompts without a template are the base's own, and a pad token is in none.
    bare = subjects.find("", str(tmp_path / "other"), "fp32", "bare").with_own_prompts()
    assert not bare.prompting

    def pad(folder):
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)

    assert not find(pad, "pad").prompting
    # Two folders of one name are two adapters.
    assert find(name="x/last").folder != find(name="y/last").folder


def test_all_that_an_adapter_answers_with_identifies_it(copy, tiny):
    first = adapters.identify(copy)
    change(copy, peft_version="9", base_model_name_or_path="elsewhere", inference_mode=False)
    targets = json.loads((copy / adapters.CONFIG).read_text())["target_modules"]
    change(copy, target_modules=targets[::-1], lora_bias=False, rank_pattern={}, lora_alpha=16.0)
    change(copy, task_type=None, modules_to_save=None, exclude_modules=[])
    assert adapters.identify(copy) == first
    change(copy, base_model_name_or_path=str(tiny))
    seen = [first]
    change(copy, lora_alpha=999)
    seen.append(adapters.identify(copy))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(adapters.identify(copy))
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (copy / name).write_text("{}")
        seen.append(adapters.identify(copy))
    change(copy, rank_pattern={"q_proj": 2})
    seen.append(adapters.identify(copy))
    assert all(a != b for n, a in enumerate(seen) for b in seen[:n])


def test_an_adapter_whose_config_changed_is_merged_again(copy):
    config = subjects.find("", str(copy), "fp32").config

    def read(target):
        return load_file(target / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]

    first = read(merge.merge(config, copy))
    change(copy, lora_alpha=64)
    assert largest([first], [read(merge.merge(config, copy))]) > 1e-4


def test_a_base_whose_weights_changed_is_merged_again(tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    folder = make(base, tmp_path / "adapter")
    config = subjects.find("", str(folder), "fp32").config
    report = merge.merge(config, folder) / "merge.json"
    before = report.stat().st_mtime_ns
    merge.merge(config, folder)
    assert report.stat().st_mtime_ns == before
    weights = load_file(base / "model.safetensors")
    save_file(
        {n: t * 1.1 for n, t in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    merge.merge(config, folder)
    assert report.stat().st_mtime_ns != before


def test_values_that_are_not_finite_are_no_answers(tiny, tmp_path):
    """Each number of the file is finite, and what the model makes of them is not."""
    for name, size in (("product", 1e25), ("logits", 1e18)):
        folder = make(tiny, tmp_path / name)
        tensors = load_file(folder / adapters.WEIGHTS)
        save_file(
            {n: torch.full_like(t, size) for n, t in tensors.items()}, folder / adapters.WEIGHTS
        )
        config = subjects.find("", str(folder), "fp32").config
        with pytest.raises(common.JobFailed, match="not finite .* nothing is kept"):
            merge.merge(config, folder)
        assert not (folder / "merged").exists()

        from evals.model import Model

        lm = Model(*models.load(config, folder), "fpb", 1)
        settings = {"max_gen_toks": 2, "do_sample": False, "until": []}
        request = Instance("generate_until", {}, ("Good?", settings), 0)
        with pytest.raises(common.JobFailed, match="no answer: the model computes values"):
            lm.generate_until([request])


def test_one_of_two_tied_weights_alone_is_refused(tiny, tmp_path):
    """PEFT would change the head of a tied base with its embedding."""
    folder = make(tiny, tmp_path / "adapter")
    tensors = load_file(folder / adapters.WEIGHTS)
    weight = AutoModelForCausalLM.from_pretrained(tiny).get_input_embeddings().weight
    name = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {name: weight.detach() + 0.1}, folder / adapters.WEIGHTS)
    with pytest.raises(WrongInput, match="one weight for embedding and head; save both"):
        models.load(subjects.find("", str(folder), "fp32").config, folder)


def test_a_base_that_cannot_be_had_is_one_line_in_scoring(copy, monkeypatch):
    from evals import backends

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for base in ("lab/gone", "lab/gone/"):
        subject = subjects.find("", str(change(copy, base_model_name_or_path=base)), "fp32")
        assert subject.config["base_model"] == "lab/gone"
        with pytest.raises(common.JobFailed, match="the base lab/gone is not in the Hub's cache"):
            backends.open_transformers(subject)
    for base in ("a\0b", "x" * 5000):
        with pytest.raises(WrongInput, match="the name of a base is needed"):
            subjects.find("", str(change(copy, base_model_name_or_path=base)), "fp32")


def test_a_name_of_finloras_is_said_and_that_of_a_folder_above_does_not_count(
    plain, tmp_path, capsys
):
    name = "sentiment_llama_3_1_8b_8bits_r8"
    folder = Path(shutil.copytree(plain, tmp_path / name))
    assert subjects.find("", str(folder)).prompt_format == "finlora"
    assert "is named like an adapter of FinLoRA's: 8bits, [INST]" in capsys.readouterr().err
    inner = Path(shutil.copytree(plain, folder / "mine"))
    with pytest.raises(WrongInput, match="PRECISION= is one of"):
        subjects.find("", str(inner))
    cached = tmp_path / f"models--someone--{name}" / "snapshots" / ("a" * 40)
    assert subjects.find("", str(shutil.copytree(plain, cached))).prompt_format == "finlora"


def test_another_revision_of_the_base_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "1" * 40
    files = tmp_path / "models--me--base"
    (files / "refs").mkdir(parents=True)
    (files / "refs" / "main").write_text(commit)
    (files / "snapshots" / commit).mkdir(parents=True)
    (files / "snapshots" / commit / "config.json").write_text("{}")
    for same in (None, "main", commit):
        models.print_revision("me/base", same)
    assert not capsys.readouterr().out
    models.print_revision("me/base", "v9")
    assert "names revision v9 of me/base; 111111111111 is loaded" in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_said(copy, capsys):
    tensors = load_file(copy / adapters.WEIGHTS)
    zeros = {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(zeros, copy / adapters.WEIGHTS)
    subject = subjects.find("", str(copy), "fp32")
    models.load(subject.config, subject.adapter)
    assert "lora_B is all zeros, so the adapter changes nothing" in capsys.readouterr().out


def test_a_stray_config_beside_an_adapter_is_not_its_training(copy):
    (copy / "config.yaml").write_text("base_model: nobody/has-this\n")
    with pytest.raises(WrongInput, match="at which precision"):
        subjects.find("", str(copy))
    assert "nobody" not in subjects.find("", str(copy), "fp32").config["base_model"]


def test_the_default_of_several_templates_is_taken_and_other_bytes_are_named(copy):
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert models.read_template(copy) == "d"
    for content, read in (({"default": "d", "rag": "r"}, "d"), ("d", "d"), (None, None)):
        (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
        assert models.read_template(copy) == read
    for content in (["d"], named[:1], {"rag": "r"}, 5):
        (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
        with pytest.raises(WrongInput, match="tokenizer_config.json: chat_template is neither"):
            models.read_template(copy)
    (copy / "chat_template.jinja").write_text("d", encoding="utf-8-sig")
    assert models.read_template(copy) == "d"
    (copy / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(WrongInput, match=r"chat_template\.jinja: not UTF-8 at byte 1"):
        models.read_template(copy)


NESTED = "".join(f"({c}|({c}))" for c in "model.layers.0.self_attn.q_projX".replace(".", "_"))
SLOW = ["(.*)*(.*)*(.*)*(.*)*(.*)*x", "(([a-z._0-9])*)*X", "(" * 5000 + ")" * 5000, "(unclosed"]


@pytest.mark.parametrize("expression", run_first(1, SLOW))
@pytest.mark.parametrize("key", run_first(1, ["target_modules", "exclude_modules", "rank_pattern"]))
def test_untrusted_expressions_end_in_bounded_time(tiny, copy, expression, key):
    change(copy, **{key: {expression: 8} if key == "rank_pattern" else expression})
    start = time.monotonic()
    with pytest.raises(WrongInput, match=f"{key} is malformed or takes too long"):
        models.check_adapter({"base_model": str(tiny)}, copy)
    assert time.monotonic() - start < 3 * patterns.SECONDS


def test_a_nested_alternation_is_tried_and_adapts_nothing(tiny, copy):
    with pytest.raises(WrongInput, match="is no linear layer"):
        models.check_adapter({"base_model": str(tiny)}, change(copy, target_modules=NESTED))


def test_peft_receives_names_and_no_expression(tiny, tmp_path):
    folder = make(tiny, tmp_path / "adapter", **KINDS["ranks and alphas"])
    checked = models.check_adapter({"base_model": str(tiny)}, folder)
    assert all(patterns.NAME.fullmatch(name) for name in checked.peft_config["target_modules"])
    scales = {name.removeprefix("model.layers."): scale for name, scale in checked.adapted.items()}
    assert scales["0.self_attn.q_proj"] == (7, 16)
    assert scales["1.self_attn.k_proj"] == (2, 16)
    assert scales["1.self_attn.v_proj"] == (4, 40)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n"
OTHER_FILES = {
    "a Git LFS pointer": (POINTER, "Git LFS pointer"),
    "an empty file": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>", "web page"),
    "an archive": (b"PK\x03\x04", "pickle"),
    "a pickle": (pickle.dumps({"weight": [0.0] * 8}, 2), "pickle"),
    "a pickle of today": (pickle.dumps({"weight": [0.0] * 8}), "pickle"),
}


@pytest.mark.parametrize("name", [adapters.WEIGHTS, adapters.CONFIG])
@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_content_in_place_of_a_file_is_called_what_it_is(copy, name, case):
    content, why = OTHER_FILES[case]
    (copy / name).write_bytes(content)
    with pytest.raises(WrongInput, match=f"{name}: .*{why}"):
        subjects.find("", str(copy), "fp32")


@pytest.mark.parametrize("second", range(2, 6))
def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_read(tmp_path, second):
    path, length = tmp_path / adapters.WEIGHTS, 0x80 + 256 * second
    for size in range(length):  # its header is padded to a multiple of eight bytes
        save_file({"weight": torch.ones(2)}, path, {"text": "x" * size})
        if path.read_bytes()[:2] == bytes([0x80, second]):
            break
    assert path.read_bytes()[:3] == bytes([0x80, second, 0])
    assert list(adapters.read_header(path)) == ["weight"]


@pytest.mark.parametrize("keep", [7, 300, 0.5, -1])
def test_a_file_that_is_cut_off_is_called_so(copy, keep):
    content = (copy / adapters.WEIGHTS).read_bytes()
    end = int(len(content) * keep) if isinstance(keep, float) else keep
    (copy / adapters.WEIGHTS).write_bytes(content[:end])
    with pytest.raises(WrongInput, match="cut off|no safetensors"):
        subjects.find("", str(copy), "fp32")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("case", OTHER_FILES)
def test_a_bases_files_are_called_what_they_are(tiny, tmp_path, name, case):
    content, why = OTHER_FILES[case]
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / name).write_bytes(content)
    with pytest.raises(WrongInput, match=f"{name}: .*{why}"):
        models.load({"base_model": str(base)})
    if name == "model.safetensors":
        (base / name).write_bytes((tiny / name).read_bytes()[:-5])
        with pytest.raises(WrongInput, match="cut off"):
            models.load({"base_model": str(base)})


# --- Precision and prompt format ---


def finlora_adapters() -> list[dict[str, str]]:
    if not ADAPTERS.is_file():
        return []
    lines = [line.split("\t") for line in ADAPTERS.read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def stand_in(folder: Path, base: str, rank: int, **settings) -> Path:
    """A PEFT folder for a base that is not at hand, with one small tensor."""
    import torch

    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": 16}
    content |= {"target_modules": QKV, "task_type": "CAUSAL_LM"} | settings
    (folder / adapters.CONFIG).write_text(json.dumps(content))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(rank, 8)}, folder / adapters.WEIGHTS)
    return folder


@pytest.mark.parametrize("row", finlora_adapters() or [None], ids=lambda row: row and row["folder"])
def test_finloras_adapters_have_their_precision_and_prompt_format(tmp_path, row):
    if row is None:
        pytest.skip(f"{ADAPTERS} is not here")
    numbers = {"lora_alpha": int(row["alpha"]), "lora_dropout": float(row["dropout"])}
    flags = {"use_dora": row["dora"] == "True", "use_rslora": row["rslora"] == "True"}
    folder = stand_in(tmp_path / row["folder"], row["base"], int(row["rank"]), **numbers, **flags)
    subject = subjects.find("", str(folder))
    bits = re.search("4bits|8bits|fp16", row["folder"])[0]
    expected = {"4bits": "nf4", "8bits": "int8", "fp16": "full"}[bits]
    assert (models.precision(subject.config), subject.prompt_format) == (expected, "finlora")
    model = "llama-3.1-70b" if "70b" in row["folder"] else "llama-3.1-8b"
    assert subject.config["base_model"] == recipes.read_matrix()["models"][model]["hub"]
    assert (
        subject.base_folder.name == f"base_{expected}" and subject.base_folder.parent.name == model
    )
    assert recipes.find_published_settings(folder.name) == numbers

    from tools.hub import pull

    config = pull.guess_config(folder.name, row["base"])
    assert models.precision(config) == expected


def test_a_mirror_is_its_base_and_other_names_are_themselves():
    from tools.hub import client

    llama = "meta-llama/Llama-3.1-8B-Instruct"
    mirror = "NousResearch/Meta-Llama-3.1-8B-Instruct"
    assert recipes.resolve_mirror(mirror) == recipes.resolve_mirror(mirror.lower()) == llama
    assert client.find_hub_name(mirror) == llama
    assert architectures.find(mirror) == architectures.find(llama)
    assert recipes.resolve_mirror("me/mine") == "me/mine"
    for hub_id in recipes.read_matrix()["mirrors"]:
        assert recipes.find_base(hub_id)[0], hub_id


@pytest.mark.slow
def test_a_precision_is_asked_for_and_taken_at_every_door(copy):
    for door in ("chat", "merge", "serve", "eval"):
        done = run(door, "--adapter", str(copy))
        assert done.returncode == 2 and "PRECISION= is one of" in done.stderr, done.stderr
        done = run(door, "--adapter", str(copy), "--precision", "int3")
        assert "PRECISION: 'int3' is not one of" in done.stderr
    done = run("merge", "--adapter", str(copy), "--precision", "nf4")
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "merged" / "merge.json").read_text())["precision"] == "nf4"
    done = run("merge", "--adapter", str(copy), "--precision", "fp32")
    assert json.loads((copy / "merged" / "merge.json").read_text())["precision"] == "fp32"
    done = run("chat", "", "Good?", "--adapter", str(copy), "--precision", "int8")
    assert done.returncode == 0 and "adapter, int8" in done.stdout, done.stderr


@pytest.mark.parametrize("bits", run_first(1, [4, 8]))
def test_a_base_that_was_published_quantized_is_known_as_such(tiny, tmp_path, bits):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    base = tmp_path / "quantized"
    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    folder = change(make(tiny, tmp_path / "adapter"), base_model_name_or_path=str(base))
    subject = subjects.find("", str(folder))  # nothing has to be asked
    own = "nf4" if bits == 4 else "int8"
    assert models.precision(subject.config) == own and subject.base_folder.name == f"base_{own}"
    with pytest.raises(WrongInput, match=f"published quantized to {own}"):
        subjects.find("", str(folder), "fp32")
    target = merge.merge(subject.config, folder)
    assert json.loads((target / "merge.json").read_text())["precision"] == own
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_a_recipe_that_puts_an_adapter_on_another_base_is_noted(tmp_path, capsys):
    own = recipes.read_matrix()["models"]["llama-3.1-8b"]["hub"]
    folder = str(stand_in(tmp_path / "a", own, 4))
    subjects.find("llama-3.1-8b/sentiment_r4", folder)
    assert not capsys.readouterr().err
    subject = subjects.find("qwen3-8b/sentiment_r4", folder)
    base = subject.config["base_model"]
    said = f"was trained on {own}; RECIPE=qwen3-8b/sentiment_r4 puts it on {base}\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_bases_name_says_that_it_is_quantized_before_it_is_here(tmp_path):
    base = "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"
    subject = subjects.find("", str(stand_in(tmp_path / "a", base, 4)))
    assert models.precision(subject.config) == "nf4"
    with pytest.raises(WrongInput, match="quantized with gptq"):
        subjects.find("", str(stand_in(tmp_path / "b", "x/Llama-3-GPTQ", 4)))


@pytest.mark.slow
def test_the_prompt_format_is_the_same_in_scoring_chat_merge_and_serve(tiny, tmp_path):
    from transformers import AutoTokenizer

    from evals.answers import Prompts

    folder = make(tiny, tmp_path / "ner_llama_3_1_8b_4bits_r4")
    subject = subjects.find("", str(folder))
    assert subject.prompt_format == "finlora"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turn = [{"role": "user", "content": "Is it good?"}]
    text = prompts.render(tokenizer, turn, None, "finlora")
    assert text == "[INST] Is it good? [/INST]"
    assert Prompts("finlora").text(tokenizer, "Is it good?") == text

    target = merge.merge(subject.config, folder, subject.prompt_format)
    merged = AutoTokenizer.from_pretrained(target)
    assert merged.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == text
    line = serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)
    template = Path(line[line.index("--chat-template") + 1]).read_text()
    assert tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False) == text

    model, tokenizer = models.load(subject.config, subject.adapter)
    answer = chat.answer(model, tokenizer, turn, chat.Style(form="finlora"))
    assert answer != chat.answer(model, tokenizer, turn)
    assert run("chat", "", "Is it good?", "--adapter", str(folder)).returncode == 0


def test_a_format_starts_with_the_token_that_the_tokenizer_puts_before_a_text(tiny):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.bos_token = "<|endoftext|>"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    end = tokenizer.eos_token
    assert prompts.render(tokenizer, messages, None, "bare") == f"a b{end}c"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    text = prompts.render(tokenizer, messages, None, "finlora")
    assert text == f"<|endoftext|>[INST] a [/INST] b{end}[INST] c [/INST]"
    ids = prompts.tokens(tokenizer, messages[:1], None, "finlora")
    assert ids == tokenizer.encode("[INST] a [/INST]")


@pytest.mark.parametrize(
    "name", run_first(2, ["prompt", "mistral", "attempt", "falcon", "pixtral", "llama"])
)
def test_merging_does_not_care_about_words_in_a_path(tiny, tmp_path, name):
    base = Path(shutil.copytree(tiny, tmp_path / name / "base"))
    folder = make(base, tmp_path / name / "adapter")
    merge.merge(subjects.find("", str(folder), "fp32").config, folder)


@pytest.mark.slow
def test_a_base_without_a_chat_template_is_merged_and_other_doors_say_what_is_needed(
    tiny, tmp_path
):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    folder = make(base, tmp_path / "adapter")
    done = run("merge", "--adapter", str(folder), "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    arguments = ("", "Good?", "--adapter", str(folder), "--precision", "fp32")
    done = run("chat", *arguments)
    assert done.returncode == 2 and "no chat template; PROMPT_FORMAT=" in done.stderr
    assert run("chat", *arguments, "--prompt-format", "bare").returncode == 0


@pytest.mark.parametrize("rank", [4, 320, 512, 1024])
def test_an_adapter_of_any_rank_is_served(tiny, tmp_path, rank):
    folder = make(tiny, tmp_path / "adapter", r=rank)
    subject = subjects.find("", str(folder), "nf4")
    line = serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)
    if rank > 512:
        assert line[2] == str(folder / "merged")
    else:
        assert line[line.index("--max-lora-rank") + 1] == str(max(rank, 8))


@pytest.mark.slow
def test_vllm_gets_merged_what_it_would_serve_otherwise_than_trained(tiny, tmp_path):
    from evals import backends

    for kind in ("ranks and alphas", "head saved whole", "DoRA"):
        folder = make(tiny, tmp_path / kind, **KINDS[kind])
        subject = subjects.find("", str(folder), "fp32")
        assert serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)[2] == str(
            folder / "merged"
        ), kind
        with pytest.raises(WrongInput, match="vLLM has no"):
            backends.vllm_arguments(subject, GPU)


def test_an_adapter_that_ends_answers_otherwise_is_merged_for_vllm(tiny, tmp_path):
    folder = make(tiny, tmp_path / "adapter")
    subject = subjects.find("", str(folder), "fp32")
    assert serve.explain_merged(subject, GPU) == ""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    assert "end token, and this adapter has another" in serve.explain_merged(subject, GPU)


# --- Secrets ---


KEYS = [
    *("hf_" + "aB3d" * 8, "sk-" + "aB3dE" * 8, "sk-proj-" + "aB3-dE_f9hijklmnop" * 4),
    *("sk-ant-api03-" + "Zz9" * 12, "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2c3" * 5),
    *("AKIA" + "ABCD2345" * 2, "sk-" + "x" * 40),
]
PROSE = [
    *("risk-adjusted-return-on-capital-employed", "task-specific-instruction-tuning-2024"),
    *("a disk-based-sort-and-merge-of-2-files", "desk-research-and-due-diligence"),
    *("sk-learn-based-pipelines-of-ours", "shelf_registrations", "MAKIA0123456789"),
]


def test_real_keys_are_masked_and_not_published_and_ordinary_prose_is_no_secret():
    from tools.hub import push

    for key in KEYS:
        for text in (key, f"token={key}", f'"{key}"', f"Bearer {key}."):
            assert key not in common.SECRET.sub("***", text)
            with pytest.raises(WrongInput, match="looks like a secret"):
                push.refuse_secrets({"README.md": text.encode()})
    for text in PROSE:
        assert common.SECRET.sub("***", text) == text
        push.refuse_secrets({"README.md": text.encode()})


# --- A base's path that Axolotl misreads ---


def test_a_training_whose_base_axolotl_would_misread_is_refused(tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "attempt"))
    content = recipes.build_config("smollm2-135m/ner_r4") | {"base_model": str(base)}
    content |= {"gradient_checkpointing": True}
    with pytest.raises(WrongInput, match='"mpt" in its path; rename'):
        recipes.validate(yaml.safe_load(yaml.safe_dump(content)), "mine.yaml")
    recipes.validate(content | {"gradient_checkpointing": False}, "mine.yaml")
