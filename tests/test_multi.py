"""Several processes train what one does: DDP and DeepSpeed over gloo, and two hosts on a wire."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import losses, run, write_recipe
from tests.training import count_steps, kill, start, wait_for
from tools import architectures, common, models, recipes
from tools.runs import Run
from tools.train import checkpoints, hardware, plan, profiles
from tools.train import machines as machines_module

# Without dropout, whose random numbers each process draws for itself. 94 rows in batches of 8 are
# 11 whole steps of an epoch; the twelfth is filled up among several processes.
EXACT = {"lora_dropout": 0.0, "max_steps": 11, "eval_steps": 11, "save_steps": 6}


@pytest.fixture(scope="module")
def single_run(tiny, chat_rows, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("single")
    result = run("train", write_recipe(folder, "r4", tiny, chat_rows, **EXACT))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "r4"


def assert_agrees(folder: Path, single: Path) -> dict:
    """Two processes had the losses of one, and the adapter; returns their run.json."""
    from safetensors.torch import load_file

    info = json.loads((folder / "run.json").read_text())
    assert info["processes"] == 2
    assert losses(folder) == pytest.approx(losses(single), abs=1e-4)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, single))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].allclose(theirs[name], atol=1e-4) for name in ours)
    single_info = json.loads((single / "run.json").read_text())
    assert info["trained_tokens"] == single_info["trained_tokens"]
    assert info["real_tokens"] == single_info["real_tokens"]
    return info


@pytest.mark.parametrize(("micro", "accumulation"), [(4, 2), (8, 1)])
@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(
    single_run, tiny, chat_rows, tmp_path, micro, accumulation
):
    """By halving the accumulation, or where there is none to halve, the micro-batch."""
    batch = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **EXACT, **batch)
    result = run("train", recipe, "--nproc", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    config = yaml.safe_load((tmp_path / "r4" / "config.yaml").read_text())
    assert (config["micro_batch_size"], config["gradient_accumulation_steps"]) == (4, 1)
    info = json.loads((tmp_path / "r4" / "run.json").read_text())
    first, second = info["weights_of_processes"]
    assert first == second and len(first) == 64
    if accumulation == 1:
        assert_agrees(tmp_path / "r4", single_run)
    else:  # the mean over each micro-batch of 4 and then over both: what one process does, too
        (tmp_path / "alone").mkdir()
        alone = write_recipe(tmp_path / "alone", "r4", tiny, chat_rows, **EXACT, **batch)
        assert run("train", alone).returncode == 0
        assert_agrees(tmp_path / "r4", tmp_path / "alone" / "r4")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_what_one_process_does(single_run, tiny, chat_rows, tmp_path, stage):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **EXACT)
    result = run("train", recipe, "--nproc", 2, "--profile", f"cpu,zero{stage}")
    assert result.returncode == 0, result.stdout + result.stderr
    info = assert_agrees(tmp_path / "r4", single_run)
    # It was DeepSpeed, with its states apart; ZeRO-3 divides the weights, so none are compared.
    shards = tmp_path / "r4" / "checkpoint-6" / "global_step6"
    assert len(list(shards.glob("*zero_pp_rank_*_optim_states.pt"))) == 2
    assert len(set(info["weights_of_processes"])) == 1
    assert (info["weights_of_processes"][0] is None) == (stage == 3)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["cpu", "cpu,zero1"])
def test_two_processes_killed_in_the_second_epoch_go_on(tiny, chat_rows, tmp_path, profile):
    """With dropout, and rows in an order of their own in each epoch."""
    changes = {"max_steps": 20, "eval_steps": 20, "save_steps": 3}
    (tmp_path / "once").mkdir(), (tmp_path / "killed").mkdir()
    once = write_recipe(tmp_path / "once", "r4", tiny, chat_rows, **changes)
    options = ("--nproc", "2", "--profile", profile)
    assert run("train", once, *options).returncode == 0
    recipe = write_recipe(tmp_path / "killed", "r4", tiny, chat_rows, **changes)
    folder = tmp_path / "killed" / "r4"
    process = start(recipe, *options)
    wait_for(process, (folder / "checkpoint-15").is_dir)
    kill(process)
    result = run("train", recipe, *options)
    assert result.returncode == 0 and "continues from step" in result.stdout, result.stderr
    assert losses(folder) == losses(tmp_path / "once" / "r4")


@pytest.mark.slow
def test_two_processes_told_to_stop_save_together(tiny, chat_rows, tmp_path):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, max_steps=200, save_steps=200)
    folder = tmp_path / "r4"
    process = start(recipe, "--nproc", "2")
    wait_for(process, lambda: count_steps(folder) > 0)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    saved = checkpoints.last_checkpoint(Run(folder))
    assert process.returncode == 130 and saved > 0 and f"continues from step {saved}" in output
    assert not (folder / "stats.json").exists()  # it would make the run a finished one
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(folder / f"checkpoint-{saved}"))


def test_a_batch_that_cannot_be_shared_is_refused_with_what_can():
    config = {"micro_batch_size": 8, "gradient_accumulation_steps": 2}
    for processes, micro, steps, parts in [(1, 8, 2, 1), (2, 8, 1, 1), (4, 4, 1, 2), (16, 1, 1, 8)]:
        shared = plan.divide_batch(config, processes)
        assert shared == {
            "processes": processes,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": steps,
            "micro_batch_parts": parts,
        }
        assert processes * micro * steps == 16
    with pytest.raises(
        common.WrongInput, match=r"3 processes .* 16 rows .*NPROC may be 1, 2, 4, 8, 16"
    ):
        plan.divide_batch(config, 3)


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        pytest.param("cpu", "they would train apart", marks=pytest.mark.slow),
        pytest.param("cpu,zero1", "trains without it", marks=pytest.mark.slow),
    ],
)
def test_training_apart_is_refused(tiny, chat_rows, tmp_path, profile, reason):
    """Plain `torchrun` without, and with, the variable that accelerate wants on a CPU."""
    recipe = recipes.find(str(write_recipe(tmp_path, "r4", tiny, chat_rows, **EXACT)))
    recipe.run.folder.mkdir()
    content = profiles.merge_config(recipe, profiles.Choice(profile, 2))
    recipe.run.config_file.write_text(yaml.safe_dump(content))
    machines = machines_module.Machines(nproc=2)
    environment = machines.build_environment({"output_dir": "."})
    if profile == "cpu":
        del environment["ACCELERATE_USE_CPU"]
    done = subprocess.run(
        [Path(sys.executable).parent / "axolotl", "train", recipe.run.config_file]
        + machines.build_arguments(),
        cwd=common.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and reason in done.stderr
    assert not list(recipe.run.folder.glob("adapter_model*"))


@pytest.mark.slow
def test_different_data_on_two_processes_is_refused(tmp_path):
    """The watch over a training, alone, in two real processes over gloo."""
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys, types, torch, torch.distributed as dist\n"
        "from tools.train.callbacks import Watch\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        f"path = f'{tmp_path}/data-{{rank}}.jsonl'\n"
        "open(path, 'w').write(str(rank if sys.argv[1] == 'data' else 0))\n"
        "model = torch.nn.Linear(2, 2)\n"
        "torch.nn.init.constant_(model.weight, rank); torch.nn.init.zeros_(model.bias)\n"
        "state = types.SimpleNamespace(global_step=1)\n"
        "trainer = types.SimpleNamespace(model=model, state=state)\n"
        "cfg = types.SimpleNamespace(output_dir='.', datasets=[{'path': path}])\n"
        "cfg.test_datasets = None\n"
        "watch = Watch(cfg, trainer, None)\n"
        "watch.check_data()\n"
        "watch.check_weights()\n"
    )
    for what, reason in (("data", "different data"), ("weights", "different weights at step 1")):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*torchrun, "--nproc_per_node=2", script, what],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(common.ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and reason in done.stderr


@pytest.fixture
def hosts():
    """Two network namespaces with a wire between them: their names, and the first one's address."""
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    names = [f"finlora{os.getpid()}{side}" for side in "ab"]
    steps = [f"netns add {name}" for name in names]
    steps += [f"link add vethf netns {names[0]} type veth peer vethfx netns {names[1]}"]
    for name, device, address in zip(names, ("vethf", "vethfx"), (1, 2), strict=True):
        steps += [f"-n {name} addr add 10.77.0.{address}/24 dev {device}"]
        steps += [f"-n {name} link set {device} up", f"-n {name} link set lo up"]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this machine makes no network namespaces: {done.stderr.strip()}")
        yield names, "10.77.0.1"
    except FileNotFoundError:
        pytest.skip("`ip` of iproute2 is not installed")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_over_the_wire_what_one_process_does(
    hosts, single_run, tiny, chat_rows, tmp_path
):
    names, address = hosts
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **EXACT)
    options = ["--profile", "cpu", "--nnodes", "2", "--rdzv", f"{address}:29411"]
    command = [sys.executable, "-m", "tools", "train", recipe, *options]
    both = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command, "--node-rank", str(rank)],
            cwd=common.ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": device},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (name, device) in enumerate(zip(names, ("vethf", "vethfx"), strict=True))
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert_agrees(tmp_path / "r4", single_run)


def test_every_profile_is_valid_for_axolotl():
    for name in ("gpu", "multi_gpu", "multi_node", "multi_gpu,zero1", "multi_gpu,zero2"):
        for recipe in ("sentiment_r4", "sentiment_r8", "sentiment_r8_dora", "sentiment_r8_fp16"):
            assert_valid(recipe, name)
    for name in ("multi_gpu,zero3", "multi_node,zero3", "multi_gpu,fsdp"):
        assert_valid("sentiment_r4", name)
        with pytest.raises(common.WrongInput, match="8-bit weights cannot be divided"):
            profiles.merge_config(recipes.find("sentiment_r8"), profiles.Choice(name, 2))


def test_axolotl_knows_the_ray_options_of_the_scale_document():
    ray = {"use_ray": True, "ray_num_workers": 4, "resources_per_worker": {"GPU": 1}}
    recipes.validate(recipes.find("sentiment_r4").config | ray, "sentiment_r4 with Ray Train")


def assert_valid(name: str, profile: str) -> None:
    from axolotl.integrations.liger.args import LigerArgs

    content = recipes.find(name).config | profiles.read_profiles(profile)
    liger = {key: content.pop(key) for key in list(content) if key.startswith("liger_")}
    assert liger and set(liger) <= set(LigerArgs.model_fields)
    content.pop("plugins")
    recipes.validate(content, f"{name} with {profile}")


@pytest.mark.parametrize(
    "base", sorted({model.source for model in architectures.read_architectures().values()})
)
def test_fsdp_wraps_the_decoder_layers_of_the_base(base):
    """By the class of the model that Axolotl trains, built without weights."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    layers = profiles.find_decoder_layers(base).split(",")
    config = CONFIG_MAPPING[architectures.find(base).model_type]()
    with torch.device("meta"):
        model = models.find_loader(config).from_config(config)
    sizes = {}
    for module in model.modules():
        sizes.setdefault(type(module).__name__, []).append(module)
    (decoder,) = (name for name in layers if "Vision" not in name and "Siglip" not in name)
    assert len(sizes[decoder]) == config.get_text_config().num_hidden_layers
    assert set(layers) <= sizes.keys()


def test_fsdp_reads_the_class_of_a_base_that_lies_here(tmp_path):
    from transformers import Gemma3TextConfig, Mistral3Config, Phi3Config

    expected = {"Phi3DecoderLayer": Phi3Config(), "Gemma3DecoderLayer": Gemma3TextConfig()}
    expected["MistralDecoderLayer"] = (
        Mistral3Config()
    )  # its class names no layers, its text part's does
    recipe = recipes.find("sentiment_r4")
    for name, config in expected.items():
        config.save_pretrained(tmp_path / name)
        other = replace(
            recipe, config=recipe.config | {"base_model": str(tmp_path / name)}, name="mine"
        )
        content = profiles.merge_config(other, profiles.Choice("multi_gpu,fsdp", 2))
        assert content["fsdp_config"]["transformer_layer_cls_to_wrap"] == name
    with pytest.raises(
        common.WrongInput, match="decoder layers of .*nowhere, whose config.json cannot"
    ):
        profiles.find_decoder_layers(str(tmp_path / "nowhere"))


def test_the_layers_that_a_recipe_names_for_fsdp_are_kept():
    recipe = recipes.find("sentiment_r4")
    fsdp = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "Mine"}
    own = replace(recipe, config=recipe.config | {"fsdp_version": 2, "fsdp_config": fsdp})
    assert profiles.merge_config(own, profiles.Choice("multi_gpu", 2))["fsdp_config"] == fsdp


CARDS = hardware.Host([("a card", 24 << 30)], 8, 64 << 30, (8, 6))


@pytest.fixture(autouse=True)
def forget_imports():
    hardware.explain_import.cache_clear()
    yield
    hardware.explain_import.cache_clear()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("", ""),
        ("import libcudart_of_another_version", "No module named 'libcudart_of_another_version'"),
        ("import ctypes; ctypes.CDLL('libnone.so')", "OSError: libnone.so"),
        ("raise ImportError('flash.so: undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import os; os.kill(os.getpid(), 11)", "it ends with SIGSEGV"),
    ],
)
def test_flash_attn_counts_where_it_imports(tmp_path, monkeypatch, module, reason):
    (tmp_path / "flash_attn.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipes.find("sentiment_r4")
    explanation = hardware.explain_no_flash(CARDS)
    assert reason in explanation and bool(explanation) == bool(reason)
    content = profiles.merge_config(recipe, profiles.Choice("gpu"), CARDS)
    used = "sdpa" if reason else "flash_attention_2"
    assert content["attn_implementation"] == used
    assert reason in profiles.explain_settings(content, CARDS, 1)["attention"]


def test_flash_attn_needs_a_gpu_that_it_has_kernels_for(tmp_path, monkeypatch):
    recipe = recipes.find("sentiment_r4")
    assert "not installed" in hardware.explain_no_flash(CARDS)
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    hardware.explain_import.cache_clear()
    for capability, reason in (
        ((7, 5), "needs compute capability 8.0, a GPU here has 7.5"),
        ((9, 0), ""),
    ):
        here = replace(CARDS, capability=capability)
        assert reason in hardware.explain_no_flash(here)
        content = profiles.merge_config(recipe, profiles.Choice("gpu"), here)
        assert content["attn_implementation"] == ("sdpa" if reason else "flash_attention_2")
    assert "needs a CUDA GPU" in hardware.explain_no_flash(replace(CARDS, gpus=[]))


def test_a_package_that_is_broken_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    for package in ("trackio", "deepspeed"):
        (tmp_path / f"{package}.py").write_text("raise OSError('libbroken.so')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    for options in ({"tracker": "trackio"}, {"profile": "cpu,zero1"}):
        with pytest.raises(common.WrongInput, match=r"does not import \(OSError: libbroken.so\)"):
            profiles.merge_config(recipe, profiles.Choice(**{"profile": "cpu"} | options))


def test_the_70b_qlora_fits_two_cards_of_24_gb_by_fsdp():
    """The config as Axolotl's schema takes it; two cards hold 40 GB of weights in half each."""
    from tools.train import plan

    recipe = recipes.find("sentiment_r4")
    base = {"base_model": "meta-llama/Llama-3.1-70B-Instruct"}
    large = recipes.Recipe("70b", recipe.path, recipe.config | base, "0")
    content = profiles.merge_config(large, profiles.Choice("multi_gpu,fsdp", 2))
    assert content["fsdp_version"] == 2 and content["load_in_4bit"]
    assert content["fsdp_config"]["transformer_layer_cls_to_wrap"] == "LlamaDecoderLayer"
    assert plan.plan(large.config)["weight_bytes"] == pytest.approx(40e9, rel=0.06)


def test_a_profile_is_chosen_by_what_is_there():
    cards = hardware.Host([("A5000", 24 << 30)] * 4, 8, 64 << 30)
    none, Choice = replace(cards, gpus=[]), profiles.Choice
    assert profiles.choose(none, Choice(), 1)[:2] == ("cpu", 1)
    assert profiles.choose(none, Choice(None, 2), 1)[:2] == ("cpu", 2)
    assert profiles.choose(cards, Choice(), 1)[:2] == ("gpu", 1)
    assert profiles.choose(cards, Choice(None, 4), 1)[:2] == ("multi_gpu", 4)
    assert profiles.choose(cards, Choice("multi_gpu,zero2"), 1)[:2] == ("multi_gpu,zero2", 4)
    assert profiles.choose(cards, Choice(None, 4), 2)[:2] == ("multi_node", 4)
    # Every GPU of each of several machines, unless it is told how many.
    assert profiles.choose(cards, Choice(), 2)[:2] == ("multi_node", 4)
    assert profiles.choose(cards, Choice("multi_node,zero3"), 2)[:2] == ("multi_node,zero3", 4)
    assert profiles.choose(cards, Choice("gpu"), 2)[:2] == ("gpu", 4)
    assert profiles.choose(cards, Choice(None, 1), 2)[:2] == ("multi_node", 1)
    assert profiles.choose(cards, Choice("cpu"), 2)[:2] == ("cpu", 1)
    assert profiles.choose(none, Choice(), 2)[:2] == ("cpu", 1)
    with pytest.raises(common.WrongInput, match="4 GPUs"):
        profiles.choose(cards, Choice(None, 8), 1)


def test_checkpoints_of_activations_are_on_only_where_the_plan_needs_them(tmp_path):
    recipe = recipes.find("sentiment_r4")
    config = recipe.config | {"sequence_len": 256}
    config |= {"datasets": [{"path": str(tmp_path / "rows of 256 tokens are planned for")}]}
    short = recipes.Recipe(recipe.name, recipe.path, config, recipe.version)
    for gib, needed in ((16, True), (80, False)):
        here = hardware.Host([("a card", gib << 30)], 8, 64 << 30)
        content = profiles.merge_config(short, profiles.Choice("gpu"), here)
        assert content["gradient_checkpointing"] == needed
        assert profiles.fits_gpus(content, here, 1)


@pytest.mark.slow
def test_make_profile_says_what_is_used_and_why():
    done = run("profile", "smollm2-135m/sentiment_r4", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    for text in ("no GPU", "cpu (no CUDA GPU was found)", "2, DDP", "2 x 4 rows x 1 steps = 8"):
        assert text in done.stdout
    done = run("profile", "smollm2-135m/sentiment_r4", "--nproc", 3)
    assert done.returncode == 2 and "NPROC may be 1, 2, 4, 8" in done.stderr
    done = run("profile", "--profile", "gpus")
    assert done.returncode == 2 and 'unknown PROFILE "gpus"' in done.stderr
