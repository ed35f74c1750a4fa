"""How much less CPU time a step takes on packed rows; fit for a machine that does other work, too.

    python -m bench.shared_prefix smollm2-135m/sentiment_r4 [--data rows.jsonl]

One process and one thread; FinLoRA's settings, padded rows and packed rows take turns on the same
steps (of short, middling and long rows), and CPU seconds are counted, not those of a clock.
`python -m bench.train` measures whole trainings on an idle machine.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tools import models, packs, recipes, smollm2
from tools.common import ROOT, WrongInput, command, format_table, read_json, write_json
from tools.train import batches, shared_prefix, sharing
from tools.train.hardware import detect_host

RESULTS = ROOT / "results" / "shared_prefix.json"
PLACES = (0.2, 0.5, 0.8)  # of the measured steps among those sorted by the length of their rows
Batch = dict[str, torch.Tensor]


def build_model(config: dict[str, Any], as_finlora: bool) -> Any:
    """The recipe's base with its adapter, as FinLoRA's settings or as the profile cpu train it."""
    model, _ = models.load_base(config)
    model.config.use_cache = False
    adapter = LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["lora_target_modules"],
        use_dora=bool(config.get("peft_use_dora")),
        use_rslora=bool(config.get("peft_use_rslora")),
    )
    if not as_finlora:
        models.dequantize_once(model, training=True)
    model = get_peft_model(model, adapter).train()
    if as_finlora:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    else:
        batches.compute_answer_logits_only(model)
        shared_prefix.accept_packs(model)
    return model


def pad_rows(rows: list[packs.Row], pad: int) -> Batch:
    """A padded micro-batch of whole rows, without the template's last line break."""
    whole = [[*row.ids, row.labels[-1]] for row in rows]
    length = max(map(len, whole))
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), packs.IGNORED)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for number, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        labels[number, 1 : len(tokens)] = torch.tensor(row.labels)
        mask[number, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pick_steps(config: dict[str, Any]) -> list[list[Batch]]:
    """The measured steps: for each its padded micro-batches."""
    rows = sharing.read_sample(config)
    micro, count = config["micro_batch_size"], config["gradient_accumulation_steps"]
    size = micro * count
    if len(rows) < size * len(PLACES):
        raise WrongInput(f"{config['datasets'][0]['path']} has too few rows; make data writes them")
    rows.sort(key=lambda row: len(row.ids))
    steps = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    chosen = [steps[int(place * len(steps))] for place in PLACES]
    return [
        [pad_rows(step[start : start + micro], 0) for start in range(0, size, micro)]
        for step in chosen
    ]


def count_seconds(model: Any, step: list[Batch]) -> float:
    """CPU seconds of the forward and backward passes of a step."""
    start = time.process_time()
    for batch in step:
        inputs = {key: value for key, value in batch.items() if key != "real_tokens"}
        if inputs["input_ids"].numel():
            model(**inputs).loss.backward()
    model.zero_grad()
    return time.process_time() - start


def compare(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rows for each CPU second and tokens for each row, by side."""
    steps = pick_steps(config)
    widest = max(batch["input_ids"].numel() for step in steps for batch in step)
    packer = shared_prefix.Packer(budget=widest if len(steps[0]) > 1 else 0)
    ours, finlora = build_model(config, False), build_model(config, True)
    sides: dict[str, tuple[Any, Callable[[list[Batch]], list[Batch]]]] = {
        "FinLoRA's settings": (finlora, list),
        "padded rows": (ours, list),
        "packed rows": (ours, packer.pack_step),
    }
    for model, build in sides.values():
        count_seconds(model, build(steps[0][:1]))  # not counted: libraries and memory warm up
    seconds, tokens = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    for step in steps:
        for name, (model, build) in sides.items():
            built = build(step)
            seconds[name] += count_seconds(model, built)
            tokens[name] += sum(batch["input_ids"].numel() for batch in built)
    rows = sum(len(batch["input_ids"]) for step in steps for batch in step)
    return {
        name: {
            "rows_per_cpu_second": round(rows / seconds[name], 3),
            "tokens_per_row": round(tokens[name] / rows, 1),
        }
        for name in sides
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of packed rows against padded ones")
    parser.add_argument("recipe")
    parser.add_argument("--data", help="chat rows to measure in place of the recipe's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipes.find(options.recipe)
    config = recipe.config
    if options.data:
        config = config | {"datasets": [config["datasets"][0] | {"path": options.data}]}
    smollm2.ensure(config["base_model"])
    sides = compare(config)
    ours = sides["packed rows"]["rows_per_cpu_second"]
    rows = [("", "rows / CPU second", "tokens a row", "packed rows are")]
    for name, side in sides.items():
        rate = side["rows_per_cpu_second"]
        times = f"{ours / rate:.2f} times as fast" if rate != ours else ""
        rows.append((name, f"{rate:.2f}", f"{side['tokens_per_row']:.0f}", times))
    print(format_table(rows, "<>>>"))
    content = read_json(RESULTS) if RESULTS.is_file() else {}
    measured = {
        "data": config["datasets"][0]["path"],
        "machine": detect_host().describe_machine(),
        "sides": sides,
    }
    write_json(RESULTS, content | {recipe.name: measured})


if __name__ == "__main__":
    main()
