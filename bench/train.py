"""A profile against FinLoRA's own settings: the same rows in the same order, one run, one table.

    python -m bench.train [smollm2-135m/sentiment_r4] [--steps 24] [--profile gpu] [--data FILE]

Where the profile packs rows (docs/shared-prefix.md), a third side trains without that. The sides
train one after the other, each in a process of its own. The first steps are left out (kernels
compile, memory is claimed). The table shows rows a second, real tokens a second (of the rows,
without padding), tokens that went through the model for each row, peak memory and the loss of the
last step; `runs/bench/<recipe>/result.json` holds it.

Without a RECIPE: SmolLM2 on a CPU; on a GPU Llama 3.1 8B, or where its weights are not at hand a
model of its shape with random ones, which takes the same time and memory. `--data` takes chat rows
of another file.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import performance
from tools import architectures, smollm2
from tools.common import (
    ROOT,
    WrongInput,
    command,
    format_table,
    json_lines,
    quiet,
    shown,
    write_json,
)
from tools.recipes import Recipe, find
from tools.runs import Run
from tools.train import launch, profiles, sharing
from tools.train.hardware import Host, detect_host
from tools.train.machines import Machines

FOLDER = ROOT / "runs" / "bench"
WARM = 4  # steps that are not timed
# What FinLoRA trained with (its Axolotl config): no packing, no flash attention, checkpointing on;
# the batch is the recipe's, which is its own. Kernels that its Axolotl did not have are off.
FINLORA = {
    "gradient_checkpointing": True,
    "sample_packing": False,
    "pad_to_sequence_len": False,
    "attn_implementation": "sdpa",
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
# What a CPU cannot do, and the optimizer that it has: FinLoRA's settings run nowhere without.
ON_CPU = ("bf16", "fp16", "tf32", "optimizer")
# A benchmark neither evaluates nor saves.
SCHEDULE = ("test_datasets", "eval_steps", "evals_per_epoch", "save_steps", "saves_per_epoch")


def build_configs(recipe: Recipe, profile: str, host: Host) -> dict[str, dict[str, Any]]:
    """The merged configs to compare, by name."""
    choice = profiles.Choice(profile)
    ours = profiles.merge_config(recipe, choice, host)
    finlora = recipe.config | FINLORA | {"plugins": [profiles.PLUGIN], "include_tkps": True}
    if not host.gpus:
        finlora |= {key: ours[key] for key in ON_CPU if key in ours}
    configs = {"FinLoRA's settings": finlora, f"profile {profile}": ours}
    if ours.get("shared_prefix"):
        plain = replace(recipe, config=recipe.config | {"shared_prefix": False})
        configs[f"profile {profile}, rows not packed"] = profiles.merge_config(plain, choice, host)
    else:
        print(f"bench      rows are not packed: {sharing.explain_no_sharing(ours)}", flush=True)
    return configs


def make_stand_in(base: str, folder: Path) -> None:
    """Writes a Llama of a base's shape with random 16-bit weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = architectures.find(base)
    smollm2.ensure(str(smollm2.FOLDER))
    tokenizer = AutoTokenizer.from_pretrained(smollm2.FOLDER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def replace_missing_base(recipe: Recipe, host: Host) -> Recipe:
    """The recipe on a model of its base's shape, where the base's weights are not here."""
    from huggingface_hub import try_to_load_from_cache

    base = recipe.config["base_model"]
    cached = try_to_load_from_cache(base, "model.safetensors.index.json")
    if (ROOT / base).is_dir() or isinstance(cached, str):
        return recipe
    if not host.gpus:
        raise WrongInput(f"{base} is not at hand, and too slow without a GPU")
    text = f"{base} is not at hand: a model of its shape with random weights"
    print(f"bench      {text}", flush=True)
    folder = FOLDER / f"shape-of-{Path(base).name}"
    if not (folder / "config.json").is_file():
        make_stand_in(base, folder)
    special_tokens = {"pad_token": smollm2.PAD}
    changed = {"base_model": shown(folder), "special_tokens": special_tokens}
    return replace(recipe, config=recipe.config | changed)


def compute_rates(lines: list[dict[str, Any]], rows: int) -> dict[str, float]:
    """Rates between the last warm-up step and the last step, of `rows` rows each."""
    steps = [line for line in lines if "loss" in line]
    first, last = steps[WARM - 1], steps[-1]
    seconds, count = last["seconds"] - first["seconds"], last["step"] - first["step"]
    real, trained, total = (
        last[f"{kind}_tokens"] - first[f"{kind}_tokens"] for kind in ("real", "trained", "total")
    )
    return {
        "seconds_per_step": seconds / count,
        "rows_per_second": rows * count / seconds,
        "real_tokens_per_second": real / seconds,
        "trained_tokens_per_second": trained / seconds,
        "real_tokens_per_row": real / (rows * count),
        "computed_tokens_per_row": total / (rows * count),
        "peak_memory_bytes": max(line["memory"] for line in lines),
        "loss": last["loss"],
    }


def train_config(recipe: Recipe, config: dict[str, Any], run: Run, steps: int) -> dict[str, float]:
    """Trains a merged config for `steps` steps; returns its rates."""
    shutil.rmtree(run.folder, ignore_errors=True)
    config = {key: value for key, value in config.items() if key not in SCHEDULE}
    config |= {"output_dir": str(run), "dataset_prepared_path": f"{run}/prepared"}
    config |= {"max_steps": steps, "val_set_size": 0, "save_strategy": "no"}
    trial = replace(recipe, config=config)
    launch.execute(trial, config, "bench", False, Machines())
    rows = config["micro_batch_size"] * config["gradient_accumulation_steps"]
    return compute_rates(json_lines(run.progress_file), rows)


def print_rates(rates: dict[str, dict[str, float]], host: Host) -> None:
    """The table, and how many times the others' rows the profile trains a second."""
    headings = ("", "s/step", "rows/s", "real tokens/s", "tokens a row", "peak GB", "loss")
    rows = [headings] + [
        (
            name,
            f"{row['seconds_per_step']:.2f}",
            f"{row['rows_per_second']:.2f}",
            f"{row['real_tokens_per_second']:.0f}",
            f"{row['computed_tokens_per_row']:.0f} for {row['real_tokens_per_row']:.0f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
            f"{row['loss']:.4f}",
        )
        for name, row in rates.items()
    ]
    print(format_table(rows, "<>>>>>>"))
    (finlora, first), (_, ours), *others = rates.items()
    for name, row in [(finlora, first), *others]:
        ratio = ours["rows_per_second"] / row["rows_per_second"]
        print(f"{ratio:.2f} times the rows per second of {name}")
    print(f"on {host}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="a profile against FinLoRA's settings")
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps")
    parser.add_argument("--profile")
    parser.add_argument("--data", help="chat rows to train on in place of the recipe's")
    parser.add_argument("--record", action="store_true", help="add the rates to results/")
    options = parser.parse_args()
    if options.steps < WARM + 2:
        raise WrongInput(f"--steps must be at least {WARM + 2}: {WARM} of them are not timed")
    quiet()
    host = detect_host()
    profile, _, _ = profiles.choose(host, profiles.Choice(options.profile), 1)
    recipe = find(options.recipe or ("sentiment_r4" if host.gpus else "smollm2-135m/sentiment_r4"))
    smollm2.ensure(recipe.config["base_model"])
    recipe = replace_missing_base(recipe, host)
    if options.data:
        entry = recipe.config["datasets"][0] | {"path": options.data}
        recipe = replace(recipe, config=recipe.config | {"datasets": [entry]})
    folder = FOLDER / recipe.name.replace("/", "_").removesuffix(".yaml").strip("_")
    rates = {}
    for number, (name, config) in enumerate(build_configs(recipe, profile, host).items()):
        print(f"bench      {name}", flush=True)
        rates[name] = train_config(recipe, config, Run(folder / f"{number}"), options.steps)
    print_rates(rates, host)
    data = recipe.config["datasets"][0]["path"]
    result = {"steps": options.steps, "data": data, "measured": rates}
    write_json(folder / "result.json", {"recipe": recipe.name, "machine": str(host), **result})
    if options.record:
        is_stand_in = str(recipe.config["base_model"]).startswith(shown(FOLDER))
        note = {"note": "a model of the base's shape with random weights"} if is_stand_in else {}
        performance.record("train", recipe.name, result | note)


if __name__ == "__main__":
    main()
