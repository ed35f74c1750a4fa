"""Measures a recipe with its profile against FinLoRA's own settings, on this machine.

    python -m bench.train [smollm2-135m/sentiment_r4] [--steps 24] [--profile gpu]

Both train the same rows in the same order, one after the other, each in a process of its own. The
first steps are left out (kernels compile, memory is claimed). A table shows real tokens a second
(without padding), trained ones (those that the loss falls on), peak memory and the loss after the
last step; `runs/bench/<recipe>/result.json` holds it.

Without a RECIPE: SmolLM2 on a CPU; on a GPU Llama 3.1 8B, or where its weights are not at hand a
model of its shape with random ones, which takes the same time and memory.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tools import architectures, recipes, smollm2
from tools.common import ROOT, WrongInput, command, quiet, shown, write_json
from tools.train import hardware, launch, machines, plan, profiles

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


def settings(recipe: recipes.Recipe, profile: str, here: hardware.Host) -> dict[str, Any]:
    """The two merged configs to compare, by name."""
    ours = profiles.merge_config(recipe, profiles.Choice(profile), here)
    theirs = (
        recipe.config
        | FINLORA
        | {"plugins": ["tools.train.plugin.RunPlugin"], "include_tkps": True}
    )
    if not here.gpus:
        theirs |= {key: ours[key] for key in ON_CPU}
    return {"FinLoRA's settings": theirs, f"profile {profile}": ours}


def stand_in(base: str, folder: Path) -> None:
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


def at_hand(base: str) -> bool:
    """Whether a base's weights are a folder here, or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(base, f) for f in ("model.safetensors.index.json",)]
    return (ROOT / base).is_dir() or any(isinstance(path, str) for path in cached)


def measured(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Rates between the last warm-up step and the last one of a progress file; seconds, tokens."""
    steps = [line for line in lines if "loss" in line]
    first, last = steps[WARM - 1], steps[-1]
    seconds = last["seconds"] - first["seconds"]
    rate = {
        name: (last[f"{name}_tokens"] - first[f"{name}_tokens"]) / seconds
        for name in ("real", "trained", "total")
    }
    return {
        "seconds_per_step": seconds / (last["step"] - first["step"]),
        "real_tokens_per_second": rate["real"],
        "trained_tokens_per_second": rate["trained"],
        "padding": 1 - rate["real"] / rate["total"],
        "peak_memory_bytes": max(line["memory"] for line in lines),
        "loss": last["loss"],
    }


def bench(recipe: recipes.Recipe, profile: str, steps: int, here: hardware.Host) -> dict[str, Any]:
    """Trains both settings for `steps` steps; returns what was measured, by name."""
    found = {}
    for number, (name, content) in enumerate(settings(recipe, profile, here).items()):
        run = FOLDER / recipe.name.replace("/", "_").removesuffix(".yaml").strip("_") / f"{number}"
        shutil.rmtree(run, ignore_errors=True)
        content |= {"output_dir": shown(run), "dataset_prepared_path": shown(run / "prepared")}
        content |= {"max_steps": steps, "val_set_size": 0, "save_strategy": "no"}
        evaluation = ("test_datasets", "eval_steps", "evals_per_epoch")
        for key in (*evaluation, "save_steps", "saves_per_epoch"):
            content.pop(key, None)
        print(f"bench      {name}", flush=True)
        trial = recipes.Recipe(recipe.name, recipe.path, content, recipe.version)
        launch.execute(trial, content, profile, False, machines.Machines())
        lines = (run / "progress.jsonl").read_text().splitlines()
        found[name] = measured([json.loads(line) for line in lines])
    return found


def show(found: dict[str, Any], where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    headings = ("", "s/step", "real tokens/s", "trained tokens/s", "padding", "peak GB", "loss")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['seconds_per_step']:.2f}",
            f"{row['real_tokens_per_second']:.0f}",
            f"{row['trained_tokens_per_second']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
            f"{row['loss']:.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    theirs, ours = (row["real_tokens_per_second"] for row in found.values())
    console.print(table)
    console.print(f"{ours / theirs:.2f} times the real tokens per second, on {where}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="a profile against FinLoRA's settings")
    parser.add_argument("recipe", nargs="?", default="")
    parser.add_argument("--steps", default="", help="optimizer steps, 24 without it")
    parser.add_argument("--profile", default="")
    given = parser.parse_args()
    steps = int(plan.number("--steps", given.steps, least=WARM + 2) or 24)
    quiet()
    here = hardware.detect_host()
    profile, _, _ = profiles.choose(here, given.profile, "", 1)
    name = "sentiment_r4" if here.gpus else "smollm2-135m/sentiment_r4"
    recipe = recipes.find(given.recipe or name)
    base = recipe.config["base_model"]
    smollm2.ensure(base)
    if not at_hand(base):
        folder = FOLDER / f"shape-of-{Path(base).name}"
        if not here.gpus:
            raise WrongInput(f"{base} is not at hand, and too slow without a GPU")
        print(
            f"bench      {base} is not at hand: a model of its shape with random weights",
            flush=True,
        )
        if not (folder / "config.json").is_file():
            stand_in(base, folder)
        config = recipe.config | {"base_model": shown(folder)}
        config["special_tokens"] = {"pad_token": smollm2.PAD}
        recipe = recipes.Recipe(recipe.name, recipe.path, config, recipe.version)
    found = bench(recipe, profile, steps, here)
    where = here
    show(found, where)
    made = {"recipe": recipe.name, "machine": where, "steps": steps, "measured": found}
    write_json(FOLDER / recipe.name.replace("/", "_") / "result.json", made)


if __name__ == "__main__":
    main()
