"""Measures the memory of a base at 32, 16, 8 and 4 bits and of a training step on it.

    python -m bench.memory [--rows 8] [--tokens 147] [--json FILE]

Each figure is printed beside what `tools/train/memory.py` computes, and each precision runs in a
process of its own.

base   bytes of all tensors that the loaded model holds, with the quantization's constants.
peak   the most bytes of tensors alive at once in a training step of a rank-4 adapter on q, k, v,
       with gradient checkpointing: the recipe `smollm2-135m/sentiment_r4` at each precision. On a
       GPU PyTorch's allocator counts them, on a CPU its profiler. The driver's context is left out
       of the plan as well.
process  the process's peak resident memory, with Python, the libraries and loading.

At 32 bits everything is computed in float32; otherwise in bfloat16 (autocast), as on a GPU. The
optimizer is the recipe's on a GPU and the `cpu` profile's on a CPU. MB are 10^6 bytes.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools import architectures, recipes, smollm2
from tools.common import WrongInput, command, quiet, write_json
from tools.train import plan

RECIPE = "smollm2-135m/sentiment_r4"
# Name: bits of the linear layers, double quantization.
PRECISIONS = {
    "32 bits": (32, False),
    "16 bits": (16, False),
    "8 bits": (8, False),
    "4 bits": (4, False),
    "4 bits, double quantization": (4, True),
}
ROWS, TOKENS = 8, 147  # the micro-batch, and the longest row that `make plan` finds in FPB


def load(folder: str, bits: int, double: bool, dtype: Any = None) -> Any:
    """The model in `folder`: linear layers at `bits` bits, all else and the computation in `dtype`.

    Without a dtype: float32 at 32 bits, bfloat16 below.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype or (torch.float32 if bits == 32 else torch.bfloat16)
    quantization = None
    if bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )


def tensors(model: Any) -> list[Any]:
    """Every tensor that a model holds: parameters, buffers and the constants of quantization."""
    found = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        found.append(getattr(weight, "SCB", None))  # 8 bits
        if state := getattr(weight, "quant_state", None):  # 4 bits
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in found if tensor is not None]


def held(model: Any) -> int:
    """Bytes of a model's tensors; a storage that several share counts once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(model)
    }
    return sum(storages.values())


def optimizer_of(parameters: list[Any]) -> Any:
    """The optimizer of the recipe on a GPU, of the profile `cpu` on a CPU."""
    import torch
    from transformers import Trainer, TrainingArguments

    name = recipes.build_config(RECIPE)["optimizer"]
    if not torch.cuda.is_available():
        name = recipes.read_profile("cpu")["optimizer"]
    arguments = TrainingArguments(optim=name, learning_rate=5e-4, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **options)


def peak_of(step: Any, before: int) -> int:
    """The most bytes of tensors alive at once while `step` runs; `before` are alive already."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = before
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def measure(folder: str, bits: int, double: bool, rows: int, tokens: int) -> dict[str, int]:
    """Bytes of the base, of the base with its adapter, and the peak of a training step."""
    quiet()
    import torch
    from peft import LoraConfig, get_peft_model

    from tools.train.callbacks import measure_peak_memory

    config = recipes.build_config(RECIPE)
    model = load(folder, bits, double)
    base = held(model)
    model = get_peft_model(
        model,
        LoraConfig(
            r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            target_modules=config["lora_target_modules"],
            task_type="CAUSAL_LM",
        ),
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        5, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator
    )
    ids = ids.to(model.device)

    # The optimizer makes its states in its first step: here one without a gradient.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = [s for each in optimizer.state.values() for s in each.values() if torch.is_tensor(s)]

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bits < 32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_of(step, held(model) + sum(s.nbytes for s in states))
    return {"base": base, "adapter": sum(p.nbytes for p in trained), "peak": peak} | {
        "process": measure_peak_memory()
    }


def planned(folder: str, bits: int, double: bool, rows: int, tokens: int) -> dict[str, int]:
    """The same from tools/train/plan.py, without the CUDA context."""
    import torch

    config = recipes.build_config(RECIPE)
    model = architectures.find(config["base_model"])
    setup = plan.setup_of(config | {"micro_batch_size": rows}, tokens, 1)
    setup = replace(setup, bits=bits, double_quant=double)
    if not torch.cuda.is_available():
        setup = replace(setup, optimizer=recipes.read_profile("cpu")["optimizer"])
    need = plan.memory(model, setup)
    base = sum(plan.weight_bytes(model, setup)) + plan.kept_bytes(model, setup)
    return {"base": base, "adapter": need.adapter, "peak": need.training - need.cuda_context}


def show(results: dict[str, dict[str, dict[str, int]]]) -> None:
    head = ("base", "planned", "peak", "planned", "process")
    print(f"{'MB':28}" + "".join(f"{name:>9}" for name in head))
    for name, both in results.items():
        real, ours = both["measured"], both["planned"]
        numbers = (real["base"], ours["base"], real["peak"], ours["peak"], real["process"])
        print(f"{name:28}" + "".join(f"{number / 1e6:9.1f}" for number in numbers))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="measure memory beside the plan")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a row")
    parser.add_argument("--json", default="", help="write the bytes to this file")
    given = parser.parse_args()
    if given.rows < 1 or given.tokens < 2:
        raise WrongInput("--rows must be at least 1 and --tokens at least 2")
    smollm2.ensure(str(smollm2.FOLDER))
    spawn = multiprocessing.get_context("spawn")
    results = {}
    for name, (bits, double) in PRECISIONS.items():
        print(f"memory     {name}", file=sys.stderr, flush=True)
        setting = (str(smollm2.FOLDER), bits, double, given.rows, given.tokens)
        with ProcessPoolExecutor(1, spawn) as pool:
            measured = pool.submit(measure, *setting).result()
        results[name] = {"measured": measured, "planned": planned(*setting)}
    show(results)
    if given.json:
        write_json(Path(given.json), results)


if __name__ == "__main__":
    main()
