"""Training: every method really trains, a killed run goes on, a finished one stays as it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import losses, run, run_first, write_recipe
from tests.training import assert_same, count_steps, kill, start, wait_for
from tools import common, recipes
from tools.runs import Run
from tools.train import batches, checkpoints, checks, hardware, launch, machines, profiles

METHODS = run_first(1, ["r4", "r8", "r8_dora", "r8_rslora", "r8_fp16"])


@pytest.fixture(scope="module")
def runs(tiny, chat_rows, tmp_path_factory) -> dict[str, Path]:
    """Finished runs of 12 steps on the tiny Llama: method → folder; each trains when asked for."""
    folder = tmp_path_factory.mktemp("runs")

    class Runs(dict[str, Path]):
        def __missing__(self, method: str) -> Path:
            result = run("train", write_recipe(folder, method, tiny, chat_rows))
            assert result.returncode == 0, result.stdout + result.stderr
            assert result.stdout.count("these rows are this project's simple examples") == 1
            self[method] = folder / method
            return self[method]

    return Runs()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_adapter_that_peft_loads(runs, method):
    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(runs[method]))
    assert config.r == (4 if method == "r4" else 8)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj"}
    assert config.use_dora == (method == "r8_dora")
    assert config.use_rslora == (method == "r8_rslora")
    tensors = load_file(runs[method] / "adapter_model.safetensors")
    moved = [tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name]
    assert len(moved) == 6 and all(moved)  # 3 projections in 2 layers; B starts at zero


@pytest.mark.parametrize("place", ["FINLORA_DATA", "data/raw", "your own", None])
def test_rows_that_are_no_examples_are_not_called_that(place):
    assert launch.explain_examples([{"from": place}]) == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_what_was_done(runs, method, chat_rows):
    content = json.loads((runs[method] / "run.json").read_text())
    config = yaml.safe_load((runs[method] / "config.yaml").read_text())
    assert content["steps"] == 12
    assert content["data"][0]["sha256"] == common.digest(chat_rows)
    assert [entry["rows"] for entry in content["data"]] == [94, 2]
    assert content["data"][1]["split"] == "validation"
    assert content["last_eval_loss"] > 0
    identity = json.loads((runs[method] / "identity.json").read_text())
    val = chat_rows.with_name("sentiment_val.jsonl")
    assert identity["data"] == [common.digest(chat_rows), common.digest(val)]
    assert content["adapter_sha256"] == common.digest(runs[method] / "adapter_model.safetensors")
    assert content["seconds"] > 0 and content["tokens_per_second"] > 0
    assert content["packages"]["torch"].startswith("2.")
    assert content["machine"] == hardware.detect_host().describe_machine(1)
    rank = 4 if method == "r4" else 8
    assert (config["optimizer"], config["lora_r"]) == ("adamw_torch", rank)
    # q: 64 -> 64, k and v: 64 -> 32; two layers; DoRA adds a magnitude for each output.
    magnitudes = 64 + 32 + 32 if method == "r8_dora" else 0
    assert content["trainable_parameters"] == 2 * (rank * (128 + 96 + 96) + magnitudes)


def test_axolotl_trained_on_the_tokens_that_the_scorer_feeds(runs, tiny, chat_rows):
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    from tools import prompts

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = set()
    for line in chat_rows.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        fed = prompts.tokens(tokenizer, [user])
        answer = tokenizer.encode(assistant["content"], add_special_tokens=False)
        expected.add((tuple(fed), tuple(answer)))
    folders = [path for path in (runs["r4"] / "prepared").iterdir() if path.is_dir()]
    validation, trained = sorted((load_from_disk(str(path)) for path in folders), key=len)
    assert (len(validation), len(trained)) == (2, 94)
    newline = tokenizer.encode("\n")
    for row in trained:
        ids, labels = row["input_ids"], row["labels"]
        first = next(place for place, label in enumerate(labels) if label != -100)
        # The loss falls on the answer and its end token alone.
        answer = [label for label in labels if label != -100]
        assert answer[-1] == tokenizer.eos_token_id
        assert (tuple(ids[:first]), tuple(answer[:-1])) in expected
        assert ids[first : first + len(answer)] == answer
        assert ids[first + len(answer) :] == newline
        expected.discard((tuple(ids[:first]), tuple(answer[:-1])))
    assert not expected


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_adapter(runs, tiny, chat_rows, tmp_path):
    recipe, folder = write_recipe(tmp_path, "r4", tiny, chat_rows), tmp_path / "r4"
    process = start(recipe)
    wait_for(process, lambda: count_steps(folder) >= 6)
    kill(process)
    assert not (folder / "run.json").exists()
    step = checkpoints.last_checkpoint(Run(folder))
    assert step >= 4

    result = run("train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"continues from step {step}" in result.stdout
    assert_same(folder, runs["r4"])


@pytest.mark.slow
def test_packed_rows_train_what_padded_rows_do_in_fewer_tokens(tiny, chat_rows, tmp_path):
    """Without dropout, whose random numbers differ; with micro-batches that are merged."""
    batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "lora_dropout": 0.0}
    infos = {}
    for packs in (True, False):
        (tmp_path / str(packs)).mkdir()
        changes = batch if packs else {**batch, "shared_prefix": False}
        recipe = write_recipe(tmp_path / str(packs), "r4", tiny, chat_rows, **changes)
        result = run("train", recipe)
        assert result.returncode == 0, result.stdout + result.stderr
        infos[packs] = json.loads((tmp_path / str(packs) / "r4" / "run.json").read_text())
    packed, padded = (losses(tmp_path / str(packs) / "r4") for packs in (True, False))
    assert packed == pytest.approx(padded, abs=1e-4)
    assert infos[True]["last_eval_loss"] == pytest.approx(infos[False]["last_eval_loss"], abs=1e-4)
    for count in ("real_tokens", "trained_tokens"):
        assert infos[True][count] == infos[False][count]
    assert infos[True]["computed_tokens"] < 0.7 * infos[False]["computed_tokens"]
    assert infos[False]["computed_tokens"] >= infos[False]["real_tokens"]


def test_a_finished_run_is_left_alone(runs):
    before = (runs["r4"] / "run.json").read_bytes()
    result = run("train", runs["r4"].parent / "r4.yaml")
    assert result.returncode == 0 and "is finished" in result.stdout
    assert (runs["r4"] / "run.json").read_bytes() == before


def test_two_trainings_of_one_recipe_at_once_are_refused(tmp_path):
    refused = pytest.raises(common.JobFailed, match="under way")
    with Run(tmp_path / "run").lock(), refused, Run(tmp_path / "run").lock():
        pass


def test_a_recipe_for_a_gpu_is_refused_with_one_that_runs_here():
    if hardware.detect_host().gpus:
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        common.WrongInput, match=r"needs a CUDA GPU with \d+ GiB.*smollm2-135m"
    ) as refused:
        checks.require_hardware(recipes.find("sentiment_r4"), hardware.detect_host())
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_missing_data_and_a_misspelt_key_are_one_line_each(tiny, chat_rows, tmp_path):
    recipe = write_recipe(tmp_path, "r4", tiny, tmp_path / "sentiment_train.jsonl")
    result = run("train", recipe)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "make data TASKS=sentiment" in result.stderr

    result = run("train", write_recipe(tmp_path, "r4", tiny, chat_rows, lora_rank=4))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "lora_rank" in result.stderr and not (tmp_path / "r4").exists()


@pytest.mark.slow
def test_a_training_that_fails_says_why_and_is_no_finished_run(tiny, chat_rows, tmp_path):
    broken = tmp_path / "base"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    result = run("train", write_recipe(tmp_path, "r4", broken, chat_rows))
    assert result.returncode == 1
    assert "SafetensorError" in result.stderr and "train.log" in result.stderr
    assert not {"run.json", "stats.json"} & {path.name for path in (tmp_path / "r4").iterdir()}


@pytest.mark.parametrize(("dtype", "threshold"), [("float32", 6), ("bfloat16", 6), ("float32", 0)])
def test_an_8_bit_base_scores_with_its_own_numbers_on_a_cpu(dtype, threshold):
    """Bit for bit, for a row and many, with values beyond the threshold and without."""
    import torch
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    from tools import models

    torch.manual_seed(0)
    layer = Linear8bitLt(96, 160, has_fp16_weights=False, threshold=threshold)
    layer.weight = Int8Params(torch.randn(160, 96), requires_grad=False).to("cpu")
    model = torch.nn.Sequential(layer).eval()
    inputs = [torch.randn(shape) for shape in ((1, 1, 96), (1, 7, 96), (3, 50, 96), (5, 96))]
    inputs += [x.clone().index_fill_(-1, torch.tensor([3, 40]), 9.0) for x in inputs]
    inputs = [x.to(getattr(torch, dtype)) for x in inputs]
    with torch.no_grad():
        plain = [model(x) for x in inputs]
        is_slow = torch.backends.cpu.get_cpu_capability() != "AVX512"
        assert models.dequantize_once(model) == is_slow * 4 * 96 * 160
        for x, expected in zip(inputs, plain, strict=True):
            assert torch.equal(model(x), expected)
    x = torch.randn(2, 96, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("lever", "bits"), [("dequantize_once", 4), ("dequantize_once", 8), ("answer_logits_only", 4)]
)
def test_a_cpu_lever_changes_no_number(tiny, lever, bits):
    import torch
    from peft import LoraConfig, get_peft_model

    from tools import models

    def results(with_lever: bool):
        config = {"base_model": str(tiny), f"load_in_{bits}bit": True}
        undo = models.dequantize_once
        models.dequantize_once = lambda model: 0
        try:
            model, tokenizer = models.load(config)
        finally:
            models.dequantize_once = undo
        torch.manual_seed(0)
        wanted = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, wanted).train()
        if with_lever and lever == "dequantize_once":
            assert undo(model, training=True) != 0
        elif with_lever:
            batches.compute_answer_logits_only(model)
        ids = torch.randint(5, 40000, (4, 30), generator=torch.Generator().manual_seed(1))
        labels = torch.full_like(ids, -100)
        labels[:, -4:-1] = ids[:, -4:-1]
        labels[0, -6] = ids[0, -6]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        scored = model.eval()(input_ids=ids).logits if bits == 8 else torch.zeros(())
        return loss, [p.grad for p in model.parameters() if p.requires_grad], scored.detach()

    plain, with_lever = results(False), results(True)
    torch.testing.assert_close(with_lever[0], plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(with_lever[1], plain[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(with_lever[2], plain[2], rtol=0, atol=0)


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "float32"), (True, "float16")])
def test_an_8bit_base_computes_in_the_dtype_that_the_profile_names(bf16, dtype):
    import torch

    from tools.train.plugin import RunPlugin

    cfg = SimpleNamespace(load_in_8bit=True, bf16=bf16, fp16=False, torch_dtype=torch.float16)
    RunPlugin().pre_model_load(cfg)
    expected = torch.float16 if torch.cuda.is_available() else getattr(torch, dtype)
    assert cfg.torch_dtype == expected


@pytest.mark.slow
def test_plain_axolotl_trains_the_recipe_with_the_profile_as_flags(smollm2, chat_rows, tmp_path):
    """`axolotl train` on the file in recipes/, without any of this project's tools."""
    from axolotl.cli.main import cli as axolotl

    (tmp_path / "models").symlink_to(smollm2.parent)
    (tmp_path / "data" / "chat").mkdir(parents=True)
    for rows in (chat_rows, chat_rows.with_name("sentiment_val.jsonl")):
        shutil.copy(rows, tmp_path / "data" / "chat")
    own = {"dequantize_once", "answer_logits_only", "shared_prefix"}
    options = {option.name: option for option in axolotl.commands["train"].params}
    flags = ["--max-steps", "2"]
    for key, value in recipes.read_profile("cpu").items():
        if key not in own:
            off = options[key].secondary_opts  # --no-… where the option is a switch
            flags += off if off and value is False else [options[key].opts[0], str(value).lower()]
    result = subprocess.run(
        [
            Path(sys.executable).parent / "axolotl",
            "train",
            common.ROOT / "recipes/smollm2-135m/sentiment_r4.yaml",
            *("--launcher", "python"),
            *flags,
        ],
        cwd=tmp_path,
        env=machines.Machines().build_environment({}) | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "runs/smollm2-135m/sentiment_r4/adapter_model.safetensors").is_file()


def test_a_torn_line_of_the_progress_is_left_out(tmp_path):
    (tmp_path / "progress.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert common.json_lines(tmp_path / "progress.jsonl") == [{"step": 1, "loss": 2.5}]


def test_a_run_cut_off_after_training_is_finished_without_training_again(runs, tmp_path):
    content = json.loads((runs["r4"] / "run.json").read_text())
    copy = tmp_path / "r4"
    shutil.copytree(runs["r4"], copy)
    recipe = recipes.find(str(runs["r4"].parent / "r4.yaml"))
    moved = recipes.Recipe(recipe.name, recipe.path, recipe.config | {"output_dir": str(copy)}, "0")
    config = profiles.identity_of(profiles.merge_config(moved, profiles.Choice("cpu")))
    data = checks.describe_data(moved)
    common.write_json(
        copy / "identity.json", {"config": config, "data": [entry["sha256"] for entry in data]}
    )
    (copy / "run.json").unlink()
    common.write_json(copy / "stats.json", {"steps": content["steps"], "seconds": 1.0})
    merged = profiles.merge_config(moved, profiles.Choice("cpu"))
    again = launch.execute(moved, merged, "cpu", False, machines.Machines())
    assert again["adapter_sha256"] == content["adapter_sha256"]
    assert (copy / "run.json").is_file() and not (copy / "stats.json").exists()


def test_a_finished_run_moves_aside_where_it_is_trained_again(tmp_path, capsys):
    run = tmp_path / "run"
    recipe = recipes.Recipe("x", tmp_path / "x.yaml", {"output_dir": str(run)}, "1.0.0")
    config = {"lora_r": 4, "datasets": [{"path": "rows.jsonl"}]}
    first = {"config": config, "data": ["a"]}
    adapter = run / "adapter_model.safetensors"
    assert launch.prepare(recipe, first, force=False)
    changes = [
        (first, "FORCE=1"),
        (first, "the adapter is not the one that run.json describes"),
        (
            first | {"config": config | {"lora_r": 8}},
            "the recipe or the profile changed (lora_r 4 → 8)",
        ),
        (first | {"data": ["b"]}, "the data changed (rows.jsonl), and lora_r"),
    ]
    for identity, reason in changes:
        (run / "adapter_config.json").write_text("{}")
        adapter.write_bytes(b"weights")
        common.write_json(run / "run.json", {"adapter_sha256": common.digest(adapter)})
        assert not launch.prepare(recipe, json.loads((run / "identity.json").read_text()), False)
        if "adapter" in reason:
            adapter.write_bytes(b"other")
        assert launch.prepare(recipe, identity, force=reason == "FORCE=1")
        assert f"starts afresh: {reason}" in capsys.readouterr().out
        assert not (run / "run.json").exists()
    folders = {path.name for path in tmp_path.iterdir() if (path / "run.json").is_file()}
    assert folders == {"run.previous", *(f"run.previous-{n}" for n in (2, 3, 4))}


def test_few_rows_are_prepared_by_the_training_itself(tiny, tmp_path):
    few, many = tmp_path / "few_train.jsonl", tmp_path / "many_train.jsonl"
    few.write_text("{}\n")
    many.write_bytes(b"\n" * (profiles.FEW_BYTES + 1))
    for data, processes in ((few, 0), (many, None)):
        recipe = recipes.find(str(write_recipe(tmp_path, "r4", tiny, data, test_datasets=None)))
        config = profiles.merge_config(recipe, profiles.Choice("cpu"))
        assert config.get("dataset_num_proc") == processes
    chosen = write_recipe(tmp_path, "r4", tiny, few, test_datasets=None, dataset_num_proc=3)
    config = profiles.merge_config(recipes.find(str(chosen)), profiles.Choice("cpu"))
    assert config["dataset_num_proc"] == 3
    assert "dataset_num_proc" not in profiles.identity_of(config)
