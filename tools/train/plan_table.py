"""Prints a plan as tables, and beside it what a finished run took.

python -m tools plan sentiment_r4 --gpu "A5000 24GB" --nproc 4 --price 0.26 --rows 72824
"""

import json
from typing import Any

from tools import recipes
from tools.common import format_table
from tools.sources import list_training_files
from tools.train.memory import GIB
from tools.train.plan import Hardware, count_training_rows, plan

# The parts of a plan's memory whose label is not their name.
LABELS = {
    "linear_weights": "linear weights, {bits} bits",
    "embedding_head_norms": "embedding, head, norms",
    "experts": "experts, not quantized",
    "cuda_context": "CUDA context",
    "activations_without_checkpointing": "(activations without checkpointing)",
    "loading": "peak while loading",
    "training": "peak while training",
    "peak": "peak on a GPU",
}


def describe_cost(rows: str, cost: dict[str, Any], planned: dict[str, Any]) -> str:
    """What a training on `rows` takes, as a line."""
    line = f"{rows}: {cost['tokens']:,} tokens in {cost['steps']:,} steps"
    if cost["hours"] is not None:
        share = f"{planned['utilisation']:.0%} of {planned['gpu']['tflops']:g} TFLOPS"
        hours = f"about {cost['hours']:.2f}" if cost["hours"] >= 0.01 else "under 0.01"
        line += f", {hours} hours (an estimate, at {share})"
    return line + (f", {cost['usd']:.2f} USD" if cost["usd"] is not None else "")


def list_lines(planned: dict[str, Any]) -> list[str]:
    """The lines below a plan's table: whether it fits, what to change, hours and cost."""
    setup, gpu, published = planned["setup"], planned["gpu"], planned["published"]
    fits = "fits" if planned["fits"] else "does not fit"
    paging = ", with the optimizer's states paged to the host" if planned["fits_by_paging"] else ""
    lines = [
        f"{fits} {setup['gpus']} x {gpu['name']}, micro-batch {setup['micro_batch']}, "
        f"rows ≤ {setup['row']} tokens{paging}"
    ]
    for change, peak in planned["changes"]:
        verdict = "fits" if peak <= gpu["usable_bytes"] else "not enough"
        lines.append(f"  {change}: {peak / GIB:.2f} GiB, {verdict}")
    if planned["tokens"] is None:
        lines.append("steps and hours: give --rows and --tokens-per-row, or make the data")
    else:
        source = f"counted by {planned['tokenizer']}" if planned["tokenizer"] else "estimated"
        lines.append(f"{planned['tokens_per_row']:,} tokens a row in the mean, {source}")
        lines.append(describe_cost(f"the {planned['rows']:,} rows at hand", planned, planned))
    if published and published["tokens"]:
        name = f"FinLoRA's whole file, {published['rows']:,} rows"
        lines.append(describe_cost(name, published, planned))
    return lines + ([planned["note"]] if planned["note"] else [])


def print_plan_table(recipe: str, planned: dict[str, Any]) -> None:
    adapter_size = planned["adapter_file_bytes"]
    rows = [
        ("parameters", f"{planned['parameters']:,}"),
        ("trainable", f"{planned['trainable_parameters']:,}"),
        *([("adapter on disk", f"{adapter_size / 1e6:.1f} MB")] if adapter_size else []),
        ("weights, nominal", f"{planned['nominal_bytes'] / 1e9:.2f} GB"),
        ("weights, real", f"{planned['weight_bytes'] / 1e9:.2f} GB"),
    ]
    for part, size in planned["memory"].items():
        if size and part != "paged":
            label = LABELS.get(part, part.replace("_", " ")).format(**planned["setup"])
            rows.append((label, f"{size / GIB:.2f} GiB"))
    title = f"{recipe} on {planned['model']}"
    print(title, format_table(rows, "<>"), *list_lines(planned), sep="\n")


def print_comparison(planned: dict[str, Any], run_info: dict[str, Any]) -> None:
    """Prints what a finished run took, from its run.json, beside its plan for one GPU."""
    hours, steps = planned["hours"], planned["steps"]
    peaks = planned["memory"]["peak"] / GIB, run_info["peak_memory_bytes"] / GIB
    trainable = planned["trainable_parameters"], run_info["trainable_parameters"]
    loss = run_info["train_loss"]
    rows = [
        ("", "planned", "took"),
        ("trainable", *(f"{count:,}" for count in trainable)),
        ("steps", f"{steps:,}" if steps else "", f"{run_info['steps']:,}"),
        ("peak memory, GiB", *(f"{peak:.2f}" for peak in peaks)),
        ("hours", "" if hours is None else f"{hours:.2f}", f"{run_info['seconds'] / 3600:.2f}"),
        ("tokens/s", "", f"{run_info['tokens_per_second']:,.0f}"),
        ("loss", "", "" if loss is None else f"{loss:.3f}"),
    ]
    print(
        f"\nplanned for one {planned['gpu']['name']}; trained as version "
        f"{run_info['recipe_version']} on {run_info['processes']} x {run_info['device']}, "
        f"{run_info['finished']}"
    )
    print(format_table(rows, "<>>"))


def print_plan(
    name: str, hardware: Hardware, rows: int | None, tokens_per_row: int | None, as_json: bool
) -> None:
    """Prints the plan of a recipe, as a table or as JSON. `rows`: of the whole training file."""
    recipe = recipes.find(name)
    data = list_training_files(recipe.config)
    trained = count_training_rows(recipe.config, rows) if rows else None
    planned = plan(recipe.config, hardware, rows=trained, row=tokens_per_row, data=data)
    if as_json:
        print(json.dumps({"recipe": recipe.name} | planned, indent=2))
    else:
        print_plan_table(recipe.name, planned)
