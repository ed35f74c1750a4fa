"""The plan is what PEFT and bitsandbytes allocate, and what FinLoRA and QLoRA published."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import run, write_recipe
from tools import architectures, recipes
from tools.common import ROOT, WrongInput
from tools.train import plan
from tools.train.plan import GIB, Setup

QKV = ("q_proj", "k_proj", "v_proj")
METHODS = list(recipes.read_matrix()["methods"])


def model(name):
    return architectures.find(
        json.loads((architectures.FOLDER / f"{name}.json").read_text())["source"]
    )


def of_recipe(name, row=64, **changed):
    return plan.setup_of(recipes.find(name).config | changed, row, 1)


# ---- the models

TOTALS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b": 4_022_468_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-4b": 3_880_263_168,  # without the vision tower
    "smollm2-135m": 134_515_008,
    "llama-65b": 65_285_660_672,
}


def test_each_model_has_its_known_number_of_parameters():
    assert {p.stem for p in architectures.FOLDER.glob("*.json")} == set(TOTALS)
    assert {name: model(name).parameters for name in TOTALS} == TOTALS


def test_a_model_is_found_by_every_base_of_the_catalogue():
    for name, row in recipes.read_matrix()["models"].items():
        for base in {row["hub"], row.get("base_model", row["hub"])}:
            assert architectures.find(base) == model(name)


# ---- FinLoRA's table: Llama 3.1 8B on NER, LoRA on q, k, v

# rank, bits, trainable, "GB" at batch 4 and 8, "model size".
FINLORA = [
    (8, 16, 4.72e6, 30.91, 30.91, 16.08),
    (8, 8, 4.72e6, 11.41, 11.81, 8.04),
    (8, 4, 4.72e6, 8.26, 8.65, 4.02),
    (4, 16, 2.36e6, 30.90, 30.90, 16.07),
    (4, 8, 2.36e6, 11.40, 11.78, 8.03),
    (4, 4, 2.36e6, 8.25, 8.61, 4.02),
]
QUANTIZED = [row for row in FINLORA if row[1] < 16]
# Tokens of the longest row of a batch. Assumed: the NER rows of data/sample have 57 on average, 62
# at most (SmolLM2's tokenizer); FinLoRA adds [INST] and [/INST].
NER_ROW = 64


def ner(rank, bits, batch, **changed):
    """FinLoRA's setting, with PEFT's float32 embedding and head (see the test on GiB)."""
    made = Setup(bits=bits, rank=rank, modules=QKV, micro_batch=batch, row=NER_ROW, kept_bits=32)
    return replace(made, optimizer="paged_adamw_8bit", **changed)


def test_trainable_parameters_are_the_published_ones():
    llama = model("llama-3.1-8b")
    assert plan.trainable(llama, ner(8, 8, 4)) == 4_718_592
    assert plan.trainable(llama, ner(4, 4, 4)) == 2_359_296
    for rank, bits, count, *_ in FINLORA:
        assert plan.trainable(llama, ner(rank, bits, 4)) == pytest.approx(count, rel=0.001)


@pytest.mark.parametrize(("rank", "bits", "size"), [(r[0], r[1], r[5]) for r in FINLORA])
def test_the_published_model_size_is_nominal_and_in_decimal_gb(rank, bits, size):
    llama = model("llama-3.1-8b")
    assert llama.parameters * bits / 8 / 1e9 == pytest.approx(size, rel=0.03)
    assert llama.parameters * bits / 8 / GIB < 0.95 * size


def test_the_real_size_at_4_bits_is_5_7_gb():
    made = plan.plan(recipes.find("sentiment_r4").config, row=64)
    assert made["nominal_bytes"] / 1e9 == pytest.approx(4.02, abs=0.01)
    assert made["weight_bytes"] / 1e9 == pytest.approx(5.70, abs=0.01)


@pytest.mark.parametrize(("rank", "bits", "_", "four", "eight", "size"), QUANTIZED)
def test_the_peak_of_a_quantized_setting_is_the_published_one(rank, bits, _, four, eight, size):
    llama = model("llama-3.1-8b")
    for batch, published in ((4, four), (8, eight)):
        assert plan.memory(llama, ner(rank, bits, batch)).peak / GIB == pytest.approx(
            published, rel=0.03
        )


def test_the_published_memory_is_in_gib_and_keeps_embedding_and_head_at_32_bits():
    """What is left over the weights must not depend on their bits: only in GiB it does not.

    It is 2.95 GiB at batch 4 over 16-bit embedding and head. 0.4 GiB of it comes with 4 more rows,
    so 2.55 GiB with none: 1.96 GiB are the second half of a float32 embedding and head, which
    PEFT's `prepare_model_for_kbit_training` makes, and 0.6 the context and a dequantized layer.
    """
    llama = model("llama-3.1-8b")
    over = {}
    for rank, bits, _, four, eight, _ in QUANTIZED:
        real = sum(plan.weight_bytes(llama, ner(rank, bits, 4))) + 2 * llama.unquantized
        over[rank, bits] = (four - real / GIB, eight - real / GIB, four - real / 1e9)
    for rank in (4, 8):
        assert over[rank, 4][0] == pytest.approx(over[rank, 8][0], abs=0.02)
        assert over[rank, 4][1] == pytest.approx(over[rank, 8][1], abs=0.03)
        assert abs(over[rank, 4][2] - over[rank, 8][2]) > 0.2
        without_rows = 2 * over[rank, 4][0] - over[rank, 4][1]
        assert 0.4 < without_rows - 2 * llama.unquantized / GIB < 0.7


@pytest.mark.parametrize("rank", [4, 8])
def test_the_16_bit_settings_were_measured_with_32_bit_weights_while_loading(rank):
    """30.9 whatever the batch: 29.9 GiB of float32 weights (32.1 GB, so it is GiB) and no rows."""
    llama = model("llama-3.1-8b")
    assert 4 * llama.parameters / GIB == pytest.approx(29.9, abs=0.05)
    for batch in (4, 8):
        wide = plan.memory(llama, ner(rank, 32, batch))
        assert wide.loading / GIB == pytest.approx(30.9, rel=0.02)
        assert wide.peak / GIB == pytest.approx(30.9, rel=0.03)
        assert plan.memory(llama, ner(rank, 16, batch)).peak / GIB < 0.55 * 30.9


# ---- QLoRA's claims (Dettmers et al. 2023, abstract and sec. 1)


def test_a_65b_model_is_fine_tuned_at_4_bits_on_one_48_gb_card():
    llama, made = model("llama-65b"), Setup(bits=4, rank=64, optimizer="paged_adamw_32bit")
    need = plan.memory(llama, made)
    assert need.peak / GIB < 48
    assert need.least <= 48 * GIB * plan.USABLE
    assert plan.memory(llama, replace(made, bits=8)).least > 48 * GIB


def test_full_16_bit_fine_tuning_of_a_65b_model_takes_more_than_780_gb():
    need = plan.memory(model("llama-65b"), Setup())
    parts = need.linear_weights + need.embedding_head_norms + need.gradients + need.optimizer
    assert 780e9 < parts < 790e9


def test_double_quantization_saves_0_37_bits_a_parameter():
    plain, double = (plan.linear_bytes((8192, 8192), 4, on)[1] * 8 / 2**26 for on in (False, True))
    assert plain == pytest.approx(0.5, abs=0.001)
    assert double == pytest.approx(0.127, abs=0.001)


# ---- the real objects


@pytest.fixture(scope="module")
def tiny_model():
    return architectures.Model("tiny", 2, 64, 128, 4, 2, 16, 49152, True)


def config_of(which, request):
    from transformers import AutoConfig

    folder = ROOT / "models" / "smollm2-135m"
    if which == "tiny":
        folder = request.getfixturevalue("tiny")
    elif not (folder / "config.json").is_file():
        pytest.skip("SmolLM2 is not exported; `make model` does it")
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["smollm2-135m", "tiny"])
def test_parameters_are_those_that_peft_counts(which, method, request, tiny_model):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ours = tiny_model if which == "tiny" else model(which)
    config = recipes.build_config(f"smollm2-135m/sentiment_{method}")
    architecture = config_of(which, request)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
        assert sum(p.numel() for p in base.parameters()) == ours.parameters
        wrapped = get_peft_model(
            base,
            LoraConfig(
                r=config["lora_r"],
                target_modules=config["lora_target_modules"],
                use_dora=config.get("peft_use_dora", False),
                use_rslora=config.get("peft_use_rslora", False),
                task_type="CAUSAL_LM",
            ),
        )
    expected = plan.trainable(ours, plan.setup_of(config, 64, 1))
    assert wrapped.get_nb_trainable_parameters()[0] == expected


def held(layer):
    """Bytes of each tensor that a quantized layer holds: (weights, constants)."""
    weight = layer.weight
    if state := getattr(weight, "quant_state", None):
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
    else:
        tensors = [layer.state.SCB if weight.SCB is None else weight.SCB]
    return weight.data.nbytes, sum(t.nbytes for t in tensors)


KINDS = [(4, True), (4, False), (8, True)]


@pytest.mark.parametrize(("bits", "double"), KINDS)
@pytest.mark.parametrize("which", ["smollm2-135m", "tiny"])
def test_quantized_weights_take_what_bitsandbytes_allocates(
    which, bits, double, request, tiny_model
):
    import bitsandbytes as bnb
    import torch

    config_of(which, request)
    ours = tiny_model if which == "tiny" else model(which)
    weights = constants = 0
    for size in ours.shapes.values():  # one layer of the decoder: all layers are alike
        if bits == 4:
            layer = bnb.nn.Linear4bit(
                *size, bias=False, compress_statistics=double, quant_type="nf4"
            )
        else:
            layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        torch.nn.init.normal_(layer.weight.data)
        real = held(layer.to("cpu"))
        assert plan.linear_bytes(size, bits, double) == pytest.approx(real, rel=0.01)
        weights, constants = weights + real[0], constants + real[1]
    planned = plan.weight_bytes(ours, Setup(bits=bits, double_quant=double))
    assert planned == pytest.approx((ours.layers * weights, ours.layers * constants), rel=0.01)


def test_the_adapter_file_is_as_large_as_planned(tmp_path, tiny, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="bfloat16")
    kwargs = {"target_modules": list(QKV), "task_type": "CAUSAL_LM"}
    get_peft_model(base, LoraConfig(r=64, **kwargs)).save_pretrained(tmp_path)
    planned = 4 * plan.trainable(tiny_model, Setup(rank=64, modules=QKV))
    file = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 < file - planned < 4096  # the header


# ---- what changes what


def test_a_larger_batch_no_checkpointing_and_longer_rows_take_more():
    llama, made = model("llama-3.1-8b"), of_recipe("sentiment_r4", row=1024)
    peak = plan.memory(llama, made).peak
    for more in ({"micro_batch": 16}, {"row": 2048}, {"checkpointing": False}):
        assert plan.memory(llama, replace(made, **more)).peak > peak


@pytest.mark.parametrize(
    ("stage", "divided"), [(1, "optimizer"), (2, "gradients"), (3, "linear_weights")]
)
def test_a_zero_stage_divides_one_more_part_among_the_gpus(stage, divided):
    llama, made = model("llama-3.2-1b"), Setup(gpus=4)
    before = plan.memory(llama, replace(made, zero=stage - 1))
    after = plan.memory(llama, replace(made, zero=stage))
    assert getattr(after, divided) == getattr(before, divided) // 4


def test_where_it_does_not_fit_the_first_change_that_helps_is_last_and_fits():
    config = recipes.find("sentiment_r8").config | {"gradient_checkpointing": False}
    made = plan.plan(config, plan.Hardware("12GB"), row=300)
    texts = [text for text, _ in made["changes"]]
    assert not made["fits"]
    assert texts[0] == "gradient_checkpointing: true"
    assert texts[1] == "micro_batch_size: 4, gradient_accumulation_steps: 4"
    assert all(peak > made["gpu"]["usable_bytes"] for _, peak in made["changes"][:-1])
    assert made["changes"][-1][1] <= made["gpu"]["usable_bytes"]


def test_packed_rows_are_as_long_as_the_sequence_and_unpacking_is_offered():
    config = recipes.find("sentiment_r4").config | {"sample_packing": True, "micro_batch_size": 1}
    made = plan.plan(config, plan.Hardware("9GB"), row=100)
    assert made["setup"]["row"] == 4096
    assert [text for text, _ in made["changes"]] == ["sample_packing: false"]


def test_steps_follow_rows_epochs_and_batch():
    config = recipes.find("sentiment_r4").config  # 8 x 2 rows a step, 4 epochs
    assert plan.steps_of(980, 50, config) == (4 * 62, 4 * 980 * 50)
    assert plan.steps_of(980, 50, config | {"max_steps": 10}) == (10, 10 * 16 * 50)


def test_rows_that_validate_are_not_counted_as_steps():
    config = recipes.find("sentiment_r4").config
    assert plan.count_training_rows(config, 76772) == 75236
    own = {key: value for key, value in config.items() if key != "test_datasets"}
    assert plan.count_training_rows(own, 1000) == 1000
    assert plan.steps_of(1000, 50, own | {"val_set_size": 0.02}) == (4 * 62, 4 * 980 * 50)


def test_several_gpus_share_the_batch_and_take_as_many_steps():
    config = recipes.find("sentiment_r4").config
    one, four = (plan.plan(config, plan.Hardware(count=gpus), rows=1000, row=60) for gpus in (1, 4))
    assert four["steps"] == one["steps"]
    assert four["hours"] == pytest.approx(one["hours"] / 4)
    assert (four["setup"]["micro_batch"], four["setup"]["accumulation"]) == (4, 1)
    with pytest.raises(WrongInput, match="3 processes cannot share the recipe's batch"):
        plan.plan(config, plan.Hardware(count=3), rows=1000, row=60)


ADAPTED = {
    "layers": {"peft_layers_to_transform": [1]},
    "no layer": {"peft_layers_to_transform": [0], "lora_rank_pattern": {"layers.1.*": 16}},
    "rank by name": {"lora_rank_pattern": {"q_proj": 16}},
    "rank by layer": {"lora_rank_pattern": {r"model.layers.1.self_attn.\w+": 2, "v_proj": 8}},
    "modules": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<a>", "<b>"]},
    "a layer": {"lora_modules_to_save": ["down_proj"], "peft_use_dora": True},
}


@pytest.mark.parametrize("changed", ADAPTED.values(), ids=ADAPTED)
def test_what_a_config_adapts_and_saves_is_what_peft_trains(changed, tiny):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = recipes.build_config("smollm2-135m/sentiment_r4") | {"base_model": str(tiny)} | changed
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
        if tokens := config.get("tokens"):
            base.resize_token_embeddings(base.config.vocab_size + len(tokens), mean_resizing=False)
        wrapped = get_peft_model(
            base,
            LoraConfig(
                r=config["lora_r"],
                target_modules=config["lora_target_modules"],
                layers_to_transform=config.get("peft_layers_to_transform"),
                rank_pattern=config.get("lora_rank_pattern", {}),
                modules_to_save=config.get("lora_modules_to_save"),
                use_dora=config.get("peft_use_dora", False),
                task_type="CAUSAL_LM",
            ),
        )
    planned = plan.plan(config, row=64)
    assert planned["trainable_parameters"] == wrapped.get_nb_trainable_parameters()[0]


def test_a_module_to_save_that_cannot_be_planned_is_named():
    config = recipes.build_config("smollm2-135m/sentiment_r4") | {"lora_modules_to_save": ["score"]}
    with pytest.raises(WrongInput, match='lora_modules_to_save: "score" cannot be planned'):
        plan.plan(config, row=64)


def test_a_base_is_planned_from_its_own_config_in_a_folder_and_in_the_hubs_cache(
    tiny, tiny_model, tmp_path
):
    assert replace(architectures.find(str(tiny)), source="tiny") == tiny_model
    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_bytes((tiny / "config.json").read_bytes())
    recipe = write_recipe(tmp_path, "r4", Path("someone/small"), tmp_path / "none.jsonl")
    done = run("plan", recipe, "--json", HF_HUB_CACHE=str(tmp_path))
    assert json.loads(done.stdout)["parameters"] == tiny_model.parameters, done.stderr
    (snapshot / "config.json").write_text(json.dumps({"num_local_experts": 8}))
    done = run("plan", recipe, HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 2 and "a mixture of experts cannot be planned" in done.stderr


def test_tokens_are_counted_by_the_tokenizer_and_otherwise_not_underestimated(
    tiny, chat_rows, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [json.loads(line)["messages"] for line in chat_rows.read_text().splitlines()]
    real = [len(tokenizer.encode(tokenizer.apply_chat_template(r, tokenize=False))) for r in rows]
    counted = plan.measure(chat_rows, str(tiny))
    assert counted.rows == len(rows) and counted.tokenizer.endswith("tokenizer.json")
    assert counted.mean == pytest.approx(sum(real) / len(real), abs=12)
    assert max(real) <= counted.longest < max(real) + 16
    guessed = plan.measure(chat_rows, "nobody/none")
    assert guessed.tokenizer is None
    assert guessed.mean >= counted.mean and guessed.longest >= counted.longest
    (tmp_path / "broken.jsonl").write_text("{")
    assert plan.measure(tmp_path / "broken.jsonl", str(tiny)) is None


def test_finloras_rows_are_not_underestimated_without_a_tokenizer(tiny):
    folder = ROOT.parent / "shared" / "finlora" / "data"
    if not folder.is_dir():
        pytest.skip("FinLoRA's rows are not at hand")
    for path in sorted(folder.glob("*/*.jsonl")):
        counted, guessed = plan.measure(path, str(tiny)), plan.measure(path, "nobody/none")
        assert guessed.mean >= 0.99 * counted.mean, path.name
        assert guessed.longest >= counted.longest, path.name


def test_hours_name_the_rows_they_are_for_and_finloras_whole_file_beside(tmp_path):
    rows = tmp_path / "sentiment_train.jsonl"
    text = {"messages": [{"role": "user", "content": "up " * 60}]}
    rows.write_text((json.dumps(text) + "\n") * 900)
    config = recipes.build_config("llama-3.1-8b/sentiment_r4")
    config["datasets"][0]["path"] = str(rows)
    made = plan.plan(config, plan.Hardware(price=0.26), data=rows)
    assert (made["rows"], made["published"]["rows"]) == (900, 72_824)
    trained = plan.count_training_rows(config, 72_824)
    assert made["published"]["usd"] == pytest.approx(made["usd"] * trained / 900, rel=0.01)
    assert "published" in made and plan.plan(config, rows=72_824, row=60)["published"] is None


def test_hours_are_operations_over_peak_and_utilisation():
    four = plan.Hardware("A5000", 4, 0.26)
    made = plan.plan(recipes.find("sentiment_r4").config, four, rows=76772, row=60)
    operations = 6 * 7.505e9 * made["tokens"]  # forward, recomputed forward, backward
    hours = operations / (4 * 111.1e12 * 0.30) / 3600
    assert made["hours"] == pytest.approx(hours, rel=0.001)
    assert made["usd"] == pytest.approx(4 * 0.26 * hours, rel=0.001)
    faster = recipes.find("sentiment_r4").config | {"gradient_checkpointing": False}
    made = plan.plan(faster, plan.Hardware("A5000", 4), rows=76772, row=60)
    assert made["hours"] == pytest.approx(hours * 4 / 6, rel=0.001)


# ---- the command


def test_a_base_without_a_json_is_named():
    with pytest.raises(
        WrongInput, match=r'recipes/models has no JSON for the base "Qwen/Qwen3-9B"'
    ):
        architectures.find("Qwen/Qwen3-9B")


@pytest.mark.parametrize(
    ("typed", "gib"), [("A5000 24GB", 24), ("a5000", 24), ("24GB", 24), ("h200", 141), ("16", 16)]
)
def test_a_gpu_is_found_by_name_or_size(typed, gib):
    assert plan.find_gpu(typed)[1] == gib


@pytest.mark.parametrize(
    ("typed", "said"),
    [("A500", "A5000 24GB"), ("A100", "A100 40GB, A100 80GB"), ("zzz", "T4 16GB")],
)
def test_an_unknown_gpu_is_answered_with_near_ones(typed, said):
    with pytest.raises(WrongInput, match=said):
        plan.find_gpu(typed)


def test_a_module_that_is_not_known_is_named():
    with pytest.raises(WrongInput, match='"qkv" cannot be planned'):
        of_recipe("sentiment_r4", lora_target_modules=["qkv"])


def test_the_command_prints_a_table_or_json_or_one_line():
    size = ("--rows", 900, "--tokens-per-row", 60, "--price", 0.26)
    shown = run("plan", "sentiment_r4", *size)
    assert shown.returncode == 0, shown.stderr
    for part in ("2,359,296", "5.70 GB", "fits 1 x A5000 24GB", "USD", "an estimate"):
        assert part in shown.stdout
    made = json.loads(run("plan", "sentiment_r4", *size, "--json").stdout)
    assert (made["recipe"], made["fits"]) == ("llama-3.1-8b/sentiment_r4", True)
    for wrong in (("--gpu", "A500"), ("--nproc", 0), ("--rows", -1), ("--price", "nan")):
        done = run("plan", "sentiment_r4", *wrong)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


def test_the_plan_loads_no_heavy_library():
    code = (
        "import sys; from tools.__main__ import main;"
        "sys.argv = ['tools', 'plan', 'sentiment_r4', '--json']; main();"
        "heavy = {'torch', 'transformers', 'axolotl', 'peft'};"
        "print(*(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_only_large_states_are_paged_to_the_host():
    # The largest tensor of rank 4 on q, k, v is 4 x 4,096, below bitsandbytes' 100,000.
    assert plan.memory(model("llama-3.1-8b"), of_recipe("sentiment_r4")).paged == 0
    made = of_recipe("sentiment_r4", lora_r=64, lora_target_modules=["q_proj", "k_proj"])
    whole = plan.memory(model("llama-3.1-8b"), made)
    # q: A and B of 262,144 each; k: A of 262,144 and B of 65,536.
    assert whole.paged == pytest.approx(whole.optimizer * 3 * 262_144 / (3 * 262_144 + 65_536))
