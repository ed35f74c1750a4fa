"""The plan is what PEFT and bitsandbytes allocate, and what FinLoRA and QLoRA published."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.memory import list_tensors
from tests.conftest import run, write_recipe
from tools import architectures, recipes, sources
from tools.common import ROOT, WrongInput
from tools.train.memory import (
    GIB,
    Setup,
    compute_linear_bytes,
    compute_memory,
    compute_weight_bytes,
    count_trainable,
    read_setup,
)
from tools.train.plan import (
    USABLE,
    Hardware,
    count_steps,
    count_training_rows,
    find_gpu,
    plan,
)
from tools.train.plan_table import describe_cost
from tools.train.tokens import RowLengths, measure_rows

MODELS = {path.stem: path for path in architectures.FOLDER.glob("*.json")}
METHODS = list(recipes.read_matrix()["methods"])
QKV = ("q_proj", "k_proj", "v_proj")


def find_model(name):
    return architectures.find(json.loads(MODELS[name].read_text())["source"])


def read_config(**changes):
    return recipes.find("sentiment_r4").config | changes


LLAMA = find_model("llama-3.1-8b")
LLAMA_65B = find_model("llama-65b")

# ---- the models

TOTALS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b": 4_022_468_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3.5-4b": 4_205_751_296,  # without the vision tower
    "qwen3.5-9b": 8_953_803_264,
    "smollm3-3b": 3_075_098_624,
    "gpt-oss-20b": 20_914_757_184,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-4b": 3_880_263_168,  # without the vision tower
    "smollm2-135m": 134_515_008,
    "llama-65b": 65_285_660_672,
}


def test_each_model_has_its_known_number_of_parameters():
    assert {name: find_model(name).parameters for name in MODELS} == TOTALS


def test_a_model_is_found_by_every_base_of_the_catalogue():
    for name, row in recipes.read_matrix()["models"].items():
        for base in {row["hub"], row.get("base_model", row["hub"])}:
            same = "qwen3-4b" if name == "qwen3-4b-2507" else name
            assert architectures.find(base) == find_model(same)


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


def build_ner_setup(rank, bits, batch):
    """FinLoRA's setting, with PEFT's float32 embedding and head (see the test on GiB)."""
    return Setup(
        bits=bits,
        kept_bits=32,
        rank=rank,
        modules=QKV,
        optimizer="paged_adamw_8bit",
        micro_batch=batch,
        row=NER_ROW,
    )


def test_trainable_parameters_are_the_published_ones():
    assert count_trainable(LLAMA, build_ner_setup(8, 8, 4)) == 4_718_592
    assert count_trainable(LLAMA, build_ner_setup(4, 4, 4)) == 2_359_296
    for rank, bits, count, *_ in FINLORA:
        planned = count_trainable(LLAMA, build_ner_setup(rank, bits, 4))
        assert planned == pytest.approx(count, rel=0.001)


@pytest.mark.parametrize(("bits", "size"), sorted({(row[1], row[5]) for row in FINLORA}))
def test_the_published_model_size_is_nominal_and_in_decimal_gb(bits, size):
    assert LLAMA.parameters * bits / 8 / 1e9 == pytest.approx(size, rel=0.03)
    assert LLAMA.parameters * bits / 8 / GIB < 0.95 * size


def test_the_real_size_at_4_bits_is_5_7_gb():
    planned = plan(read_config(), row=64)
    assert planned["nominal_bytes"] / 1e9 == pytest.approx(4.02, abs=0.01)
    assert planned["weight_bytes"] / 1e9 == pytest.approx(5.70, abs=0.01)


@pytest.mark.parametrize(("rank", "bits", "_", "four", "eight", "size"), QUANTIZED)
def test_the_peak_of_a_quantized_setting_is_the_published_one(rank, bits, _, four, eight, size):
    for batch, published in ((4, four), (8, eight)):
        peak = compute_memory(LLAMA, build_ner_setup(rank, bits, batch)).peak
        assert peak / GIB == pytest.approx(published, rel=0.03)


def test_the_published_memory_is_in_gib_and_keeps_embedding_and_head_at_32_bits():
    """What is left over the weights must not depend on their bits: only in GiB it does not.

    It is 2.95 GiB at batch 4 over 16-bit embedding and head. 0.4 GiB of it comes with 4 more rows,
    so 2.55 GiB with none: 1.96 GiB are the second half of a float32 embedding and head, which
    PEFT's `prepare_model_for_kbit_training` makes, and 0.6 the context and a dequantized layer.
    """
    over = {}
    for rank, bits, _, four, eight, _ in QUANTIZED:
        real = sum(compute_weight_bytes(LLAMA, Setup(bits=bits)))
        over[rank, bits] = (four - real / GIB, eight - real / GIB, four - real / 1e9)
    for rank in (4, 8):
        assert over[rank, 4][0] == pytest.approx(over[rank, 8][0], abs=0.02)
        assert over[rank, 4][1] == pytest.approx(over[rank, 8][1], abs=0.03)
        assert abs(over[rank, 4][2] - over[rank, 8][2]) > 0.2
        without_rows = 2 * over[rank, 4][0] - over[rank, 4][1]
        assert 0.4 < without_rows - 2 * LLAMA.unquantized / GIB < 0.7


@pytest.mark.parametrize("rank", [4, 8])
def test_the_16_bit_settings_were_measured_with_32_bit_weights_while_loading(rank):
    """30.9 whatever the batch: 29.9 GiB of float32 weights (32.1 GB, so it is GiB) and no rows."""
    assert 4 * LLAMA.parameters / GIB == pytest.approx(29.9, abs=0.05)
    for batch in (4, 8):
        wide = compute_memory(LLAMA, build_ner_setup(rank, 32, batch))
        assert wide.loading / GIB == pytest.approx(30.9, rel=0.02)
        assert wide.peak / GIB == pytest.approx(30.9, rel=0.03)
        assert compute_memory(LLAMA, build_ner_setup(rank, 16, batch)).peak / GIB < 0.55 * 30.9


# ---- QLoRA's claims (Dettmers et al. 2023, abstract and sec. 1)


def test_a_65b_model_is_fine_tuned_at_4_bits_on_one_48_gb_card():
    setup = Setup(bits=4, rank=64, optimizer="paged_adamw_32bit")
    need = compute_memory(LLAMA_65B, setup)
    assert need.peak / GIB < 48
    assert need.least <= 48 * GIB * USABLE
    assert compute_memory(LLAMA_65B, replace(setup, bits=8)).least > 48 * GIB


def test_full_16_bit_fine_tuning_of_a_65b_model_takes_more_than_780_gb():
    need = compute_memory(LLAMA_65B, Setup())
    parts = need.linear_weights + need.embedding_head_norms + need.gradients + need.optimizer
    assert 780e9 < parts < 790e9


def test_double_quantization_saves_0_37_bits_a_parameter():
    plain, double = (
        compute_linear_bytes((8192, 8192), 4, is_double)[1] * 8 / 2**26
        for is_double in (False, True)
    )
    assert plain == pytest.approx(0.5, abs=0.001)
    assert double == pytest.approx(0.127, abs=0.001)


# ---- the real objects

BASES = {
    "smollm2": find_model("smollm2-135m"),
    "tiny": architectures.Model("tiny", 2, 64, 128, 4, 2, 16, 49152, True),
}


def count_by_peft(folder, config):
    """(parameters of the base in `folder`, those that PEFT trains) by an Axolotl config."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = LoraConfig(
        r=config["lora_r"],
        target_modules=config["lora_target_modules"],
        layers_to_transform=config.get("peft_layers_to_transform"),
        rank_pattern=config.get("lora_rank_pattern", {}),
        modules_to_save=config.get("lora_modules_to_save"),
        use_dora=config.get("peft_use_dora", False),
        use_rslora=config.get("peft_use_rslora", False),
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        parameters = sum(parameter.numel() for parameter in base.parameters())
        if tokens := config.get("tokens"):
            base.resize_token_embeddings(base.config.vocab_size + len(tokens), mean_resizing=False)
        return parameters, get_peft_model(base, adapter).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_parameters_are_those_that_peft_counts(base, method, request):
    config = recipes.build_config(f"smollm2-135m/sentiment_{method}")
    trainable = count_trainable(BASES[base], read_setup(config, 64, 1))
    folder = request.getfixturevalue(base)
    assert count_by_peft(folder, config) == (BASES[base].parameters, trainable)


ADAPTED = {
    "layers": {"peft_layers_to_transform": [1]},
    "no layer": {"peft_layers_to_transform": [0], "lora_rank_pattern": {"layers.1.*": 16}},
    "rank by name": {"lora_rank_pattern": {"q_proj": 16}},
    "rank by layer": {"lora_rank_pattern": {r"model.layers.1.self_attn.\w+": 2, "v_proj": 8}},
    "expression": {"lora_target_modules": r".*\.(q|k)_proj", "lora_rank_pattern": {"q_proj": 16}},
    "a module twice": {"lora_target_modules": ["q_proj", "q_proj"]},
    "modules": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<a>", "<b>"]},
    "a layer": {"lora_modules_to_save": ["down_proj"], "peft_use_dora": True},
}


@pytest.mark.parametrize("changes", ADAPTED.values(), ids=ADAPTED)
def test_what_a_config_adapts_and_saves_is_what_peft_trains(changes, tiny):
    config = recipes.build_config("smollm2-135m/sentiment_r4") | {"base_model": str(tiny)} | changes
    assert count_by_peft(tiny, config)[1] == plan(config, row=64)["trainable_parameters"]


@pytest.mark.parametrize(("bits", "double"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("base", BASES)
def test_quantized_weights_take_what_bitsandbytes_allocates(base, bits, double):
    import bitsandbytes as bnb
    import torch

    model, totals = BASES[base], [0, 0]
    for size in model.shapes.values():  # one layer of the decoder: all layers are alike
        if bits == 4:
            options = {"compress_statistics": double, "quant_type": "nf4"}
            layer = bnb.nn.Linear4bit(*size, bias=False, **options)
        else:
            layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        torch.nn.init.normal_(layer.weight.data)
        weight, *constants = list_tensors(layer.to("cpu"))
        real = weight.nbytes, sum(tensor.nbytes for tensor in constants)
        assert compute_linear_bytes(size, bits, double) == pytest.approx(real, rel=0.01)
        totals = [total + model.layers * part for total, part in zip(totals, real, strict=True)]
    planned = compute_weight_bytes(model, Setup(bits=bits, double_quant=double))
    assert planned[:2] == pytest.approx(totals, rel=0.01)


def test_the_adapter_file_is_as_large_as_planned(tmp_path, tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="bfloat16")
    adapter = LoraConfig(r=64, target_modules=list(QKV), task_type="CAUSAL_LM")
    get_peft_model(base, adapter).save_pretrained(tmp_path)
    planned = 4 * count_trainable(BASES["tiny"], Setup(rank=64, modules=QKV))
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - planned
    assert 0 < header < 4096


# ---- what changes what


def test_a_larger_batch_no_checkpointing_and_longer_rows_take_more():
    setup = read_setup(read_config(), 1024, 1)
    peak = compute_memory(LLAMA, setup).peak
    for more in ({"micro_batch": 16}, {"row": 2048}, {"checkpointing": False}):
        assert compute_memory(LLAMA, replace(setup, **more)).peak > peak


@pytest.mark.parametrize(
    ("stage", "divided"), [(1, "optimizer"), (2, "gradients"), (3, "linear_weights")]
)
def test_a_zero_stage_divides_one_more_part_among_the_gpus(stage, divided):
    before, after = (compute_memory(LLAMA, Setup(gpus=4, zero=zero)) for zero in (stage - 1, stage))
    assert getattr(after, divided) == getattr(before, divided) // 4


def test_where_it_does_not_fit_the_first_change_that_helps_is_last_and_fits():
    config = recipes.find("sentiment_r8").config | {"gradient_checkpointing": False}
    planned = plan(config, Hardware("12GB"), row=300)
    changes, peaks = zip(*planned["changes"], strict=True)
    assert not planned["fits"]
    assert changes[0] == "gradient_checkpointing: true"
    assert changes[1] == "micro_batch_size: 4, gradient_accumulation_steps: 4"
    usable = planned["gpu"]["usable_bytes"]
    assert peaks[-1] <= usable and all(peak > usable for peak in peaks[:-1])


def test_packed_rows_are_as_long_as_the_sequence_and_unpacking_is_offered():
    config = read_config(sample_packing=True, micro_batch_size=1)
    planned = plan(config, Hardware("9GB"), row=100)
    assert planned["setup"]["row"] == 4096
    assert [change for change, _ in planned["changes"]] == ["sample_packing: false"]


def test_zero_is_offered_to_several_gpus_and_stage_3_not_to_an_8_bit_base():
    for method, stages in (("r8", "12"), ("r8_fp16", "123")):
        config = recipes.find(f"sentiment_{method}").config
        planned = plan(config, Hardware("4GB", 16), row=4096)
        changes = [change for change, _ in planned["changes"]]
        offered = [change for change in changes if "ZeRO" in change]
        assert offered == [f"deepspeed: ZeRO-{stage}" for stage in stages]
        assert changes[-2:] == [
            "sequence_len: 2048 (longer rows are dropped)",
            "load_in_4bit: true, adapter: qlora",
        ]


def test_steps_follow_rows_epochs_and_batch():
    config = read_config()  # 8 x 2 rows a step, 4 epochs
    assert count_steps(980, 50, config) == (4 * 62, 4 * 980 * 50)
    assert count_steps(980, 50, config | {"max_steps": 10}) == (10, 10 * 16 * 50)
    # transformers takes max_steps before num_epochs: 6 epochs of 62 steps, and 28 steps of 16 rows
    assert count_steps(980, 50, config | {"max_steps": 400}) == (400, (6 * 980 + 28 * 16) * 50)
    assert count_steps(980, 50, config | {"max_steps": -1}) == (4 * 62, 4 * 980 * 50)
    sharded = config | {"datasets": [entry | {"shards": 10} for entry in config["datasets"]]}
    assert count_steps(980, 50, sharded) == (4 * 7, 4 * 98 * 50)


def test_rows_that_validate_are_not_counted_as_steps():
    config = read_config()
    assert count_training_rows(config, 76772) == 75236
    del config["test_datasets"]
    assert count_training_rows(config, 1000) == 1000
    assert count_steps(1000, 50, config | {"val_set_size": 0.02}) == (4 * 62, 4 * 980 * 50)
    with pytest.raises(WrongInput, match="val_set_size: 1000 of 1,000 rows leaves none"):
        count_steps(1000, 50, config | {"val_set_size": 1000})
    assert count_steps(980, 50, config | {"num_epochs": None}) == (62, 980 * 50)


def test_several_gpus_share_the_batch_and_take_as_many_steps():
    alone, four = (
        plan(read_config(), Hardware(count=count), rows=1000, row=60) for count in (1, 4)
    )
    assert four["steps"] == alone["steps"]
    assert four["hours"] == pytest.approx(alone["hours"] / 4)
    assert (four["setup"]["micro_batch"], four["setup"]["accumulation"]) == (4, 1)
    with pytest.raises(WrongInput, match="3 processes cannot share the recipe's batch"):
        plan(read_config(), Hardware(count=3), rows=1000, row=60)


def test_only_large_states_are_paged_to_the_host():
    # The largest tensor of rank 4 on q, k, v is 4 x 4,096, below bitsandbytes' 100,000.
    assert compute_memory(LLAMA, read_setup(read_config(), 64, 1)).paged == 0
    config = read_config(lora_r=64, lora_target_modules=["q_proj", "k_proj"])
    need = compute_memory(LLAMA, read_setup(config, 64, 1))
    # q: A and B of 262,144 each; k: A of 262,144 and B of 65,536.
    assert need.paged == pytest.approx(need.optimizer * 3 * 262_144 / (3 * 262_144 + 65_536))


@pytest.mark.parametrize(
    ("key", "modules"),
    [
        ("lora_modules_to_save", ["score"]),
        ("lora_target_modules", ["qkv"]),
        ("lora_target_modules", "qkv"),
    ],
)
def test_a_module_that_cannot_be_planned_is_named(key, modules):
    name = modules if isinstance(modules, str) else modules[0]
    with pytest.raises(WrongInput, match=f'{key}: "{name}" cannot be planned'):
        plan(read_config(**{key: modules}), row=64)


def test_a_config_that_adapts_no_layer_is_not_planned():
    with pytest.raises(WrongInput, match="no layer is adapted: lora_target_modules"):
        plan(read_config(lora_target_modules=None), row=64)
    with pytest.raises(WrongInput, match="no layer is adapted"):
        plan(read_config(peft_layers_to_transform=[99]), row=64)


# ---- rows, tokens and hours


def test_a_base_is_planned_from_its_own_config_in_a_folder_and_in_the_hubs_cache(tiny, tmp_path):
    assert replace(architectures.find(str(tiny)), source="tiny") == BASES["tiny"]
    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_bytes((tiny / "config.json").read_bytes())
    recipe = write_recipe(tmp_path, "r4", Path("someone/small"), tmp_path / "none.jsonl")
    result = run("plan", recipe, "--json", HF_HUB_CACHE=str(tmp_path))
    assert json.loads(result.stdout)["parameters"] == BASES["tiny"].parameters, result.stderr
    (snapshot / "config.json").write_text(json.dumps({"num_local_experts": 8}))
    result = run("plan", recipe, HF_HUB_CACHE=str(tmp_path))
    assert result.returncode == 2
    assert "a mixture of experts cannot be planned" in result.stderr


def test_tokens_are_counted_by_the_tokenizer_and_otherwise_not_underestimated(
    tiny, chat_rows, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [json.loads(line)["messages"] for line in chat_rows.read_text().splitlines()]
    real = [len(tokenizer.encode(tokenizer.apply_chat_template(r, tokenize=False))) for r in rows]
    counted = measure_rows([chat_rows], str(tiny))
    assert counted.rows == len(rows) and counted.tokenizer.endswith("tokenizer.json")
    assert counted.mean == pytest.approx(sum(real) / len(real), abs=12)
    assert max(real) <= counted.longest < max(real) + 16
    estimated = measure_rows([chat_rows], "nobody/none")
    assert estimated.tokenizer is None
    assert estimated.mean >= counted.mean and estimated.longest >= counted.longest
    for content in ("{", "\n"):
        (tmp_path / "broken.jsonl").write_text(content)
        assert measure_rows([tmp_path / "broken.jsonl"], str(tiny)) == RowLengths()


def test_finloras_rows_are_not_underestimated_without_a_tokenizer(tiny):
    folder = ROOT.parent / "shared" / "finlora" / "data"
    if not folder.is_dir():
        pytest.skip("FinLoRA's rows are not at hand")
    for path in sorted(folder.glob("*/*.jsonl")):
        counted, estimated = measure_rows([path], str(tiny)), measure_rows([path], "nobody/none")
        assert estimated.mean >= 0.99 * counted.mean, path.name
        assert estimated.longest >= counted.longest, path.name


def test_hours_name_the_rows_they_are_for_and_finloras_whole_file_beside(tmp_path):
    file = tmp_path / "sentiment_train.jsonl"
    row = {"messages": [{"role": "user", "content": "up " * 60}]}
    file.write_text((json.dumps(row) + "\n") * 900)
    config = recipes.build_config("llama-3.1-8b/sentiment_r4")
    config["datasets"][0]["path"] = str(file)
    planned = plan(config, Hardware(price=0.26), data=[file])
    published = planned["published"]
    assert (planned["rows"], published["rows"]) == (900, 72_824)
    trained = count_training_rows(config, 72_824)
    assert published["usd"] == pytest.approx(planned["usd"] * trained / 900, rel=0.01)
    for whole in (72_824, trained):  # all rows, or those of them that do not validate
        assert plan(config, rows=whole, row=60)["published"] is None
    row = describe_cost("2 rows", planned | {"hours": 0.001}, planned)
    assert "under 0.01 hours" in row and "about" not in row


def test_the_rows_of_all_datasets_and_formats_are_planned(tiny, chat_rows, tmp_path):
    """Of a config from elsewhere: several datasets, Axolotl's `data_files`, indented JSON, CSV."""
    alpaca = [{"instruction": "Up or down?", "input": "Sales rose.", "output": "up"}] * 5
    (tmp_path / "rows.json").write_text(json.dumps(alpaca, indent=1))
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "Up or down?,up\n" * 7)
    entries = [
        {"path": str(chat_rows), "type": "chat_template"},
        {"path": "json", "data_files": str(tmp_path / "rows.json"), "type": "alpaca"},
        {"path": "csv", "data_files": [str(tmp_path / "*.csv")], "type": "alpaca"},
    ]
    config = read_config(base_model=str(tiny), datasets=recipes.list_entries(entries, "my.yaml"))
    files = sources.list_training_files(config)
    lengths = measure_rows(files, str(tiny))
    assert lengths.rows == len(chat_rows.read_text().splitlines()) + 5 + 7
    assert lengths.longest == measure_rows([chat_rows], str(tiny)).longest
    (tmp_path / "rows.txt").write_text("Sales rose.\nSales fell.\n")
    assert measure_rows([tmp_path / "rows.txt"], str(tiny)).rows == 2
    # FinLoRA's whole file is another training than its rows and others.
    named = [{"path": "data/chat/sentiment_train.jsonl"}, *entries[1:]]
    assert plan(config | {"datasets": named[:1]}, row=60)["published"]
    assert plan(config | {"datasets": named}, row=60)["published"] is None
    # With a dataset of the Hub the rows are not known, and no part of them is planned as all.
    config["datasets"].append({"path": "owner/rows", "type": "alpaca"})
    assert measure_rows(sources.list_training_files(config), str(tiny)) == RowLengths()


def test_what_the_caller_says_of_the_rows_goes_before_their_file(tiny, chat_rows):
    config = read_config(base_model=str(tiny))
    rows = measure_rows([chat_rows], str(tiny))
    for options, expected in (
        ({}, (rows.rows, rows.mean, rows.longest, rows.tokenizer)),
        ({"rows": 7}, (7, rows.mean, rows.longest, rows.tokenizer)),
        ({"row": 99}, (rows.rows, 99, 99, None)),
        ({"rows": 7, "row": 99}, (7, 99, 99, None)),
    ):
        planned = plan(config, data=[chat_rows], **options)
        shown = (planned["rows"], planned["tokens_per_row"], planned["setup"]["row"])
        assert (*shown, planned["tokenizer"]) == expected


def test_hours_are_operations_over_peak_and_utilisation():
    four = Hardware("A5000", 4, 0.26)
    planned = plan(read_config(), four, rows=76772, row=60)
    operations = 6 * 7.505e9 * planned["tokens"]  # forward, recomputed forward, backward
    hours = operations / (4 * 111.1e12 * 0.30) / 3600
    assert planned["hours"] == pytest.approx(hours, rel=0.001)
    assert planned["usd"] == pytest.approx(4 * 0.26 * hours, rel=0.001)
    planned = plan(read_config(gradient_checkpointing=False), four, rows=76772, row=60)
    assert planned["hours"] == pytest.approx(hours * 4 / 6, rel=0.001)


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
    assert find_gpu(typed).gib == gib


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("A500", "A5000 24GB"), ("A100", "A100 40GB, A100 80GB"), ("zzz", "T4 16GB")],
)
def test_an_unknown_gpu_is_answered_with_near_ones(typed, hint):
    with pytest.raises(WrongInput, match=hint):
        find_gpu(typed)


def test_the_command_prints_a_table_or_json_or_one_line():
    size = ("--rows", 900, "--tokens-per-row", 60, "--price", 0.26)
    table = run("plan", "sentiment_r4", *size)
    assert table.returncode == 0, table.stderr
    for part in ("2,359,296", "5.70 GB", "fits 1 x A5000 24GB", "USD", "an estimate"):
        assert part in table.stdout
    planned = json.loads(run("plan", "sentiment_r4", *size, "--json").stdout)
    assert (planned["recipe"], planned["fits"]) == ("llama-3.1-8b/sentiment_r4", True)
    for wrong in (("--gpu", "A500"), ("--nproc", 0), ("--rows", -1), ("--price", "nan")):
        result = run("plan", "sentiment_r4", *wrong)
        assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")


def test_the_plan_loads_no_heavy_library():
    code = (
        "import sys; from tools.__main__ import main\n"
        "sys.argv = ['tools', 'plan', 'sentiment_r4', '--json']; main()\n"
        "heavy = {'torch', 'transformers', 'axolotl', 'peft'} & set(sys.modules)\n"
        "print(*heavy, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr.strip()) == (0, "")
