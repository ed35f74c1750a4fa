"""Measures the memory of a base at 32, 16, 8 and 4 bits and of a training step on it.

    python -m bench.memory [--rows 8] [--tokens 147] [--record]

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench import performance
from tools import architectures, recipes, smollm2
from tools.common import WrongInput, command, format_table, quiet
from tools.train.memory import compute_memory, compute_weight_bytes, read_setup

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


def load_model(folder: Path, bits: int, double_quant: bool, dtype: Any = None) -> Any:
    """The model in `folder`: linear layers at `bits` bits, all else and the computation in `dtype`.

    Without a dtype: float32 at 32 bits, bfloat16 below.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype or (torch.float32 if bits == 32 else torch.bfloat16)
    quantization = None
    if bits < 16:
        quantization = BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )


def list_tensors(model: Any) -> list[Any]:
    """A model's parameters, buffers and constants of quantization."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        if (scales := getattr(weight, "SCB", None)) is not None:  # 8 bits
            tensors.append(scales)
        if state := getattr(weight, "quant_state", None):  # 4 bits
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def count_bytes(model: Any) -> int:
    """Bytes of a model's tensors; a storage that several share counts once."""
    storages = (tensor.untyped_storage() for tensor in list_tensors(model))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def name_optimizer() -> str:
    """The optimizer of the recipe on a GPU, of the profile `cpu` on a CPU."""
    import torch

    config = recipes.build_config(RECIPE)
    return (config if torch.cuda.is_available() else recipes.read_profile("cpu"))["optimizer"]


def make_optimizer(parameters: list[Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(optim=name_optimizer(), learning_rate=5e-4, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **options)


def measure_step(step: Callable[[], None], before: int) -> int:
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
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes, initial=before))


def measure(bits: int, double_quant: bool, rows: int, tokens: int) -> dict[str, int]:
    """Bytes of the base, of its adapter, of the peak of a training step, and of this process."""
    quiet()
    import torch
    from peft import LoraConfig, get_peft_model

    from tools.train.callbacks import measure_peak_memory

    config = recipes.build_config(RECIPE)
    model = load_model(smollm2.FOLDER, bits, double_quant)
    base = count_bytes(model)
    adapter = LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["lora_target_modules"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator).to(model.device)

    # The optimizer makes its states in its first step: here one without a gradient.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = (value for state in optimizer.state.values() for value in state.values())
    before = count_bytes(model) + sum(s.nbytes for s in states if torch.is_tensor(s))

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bits < 32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "base": base,
        "adapter": sum(parameter.nbytes for parameter in trained),
        "peak": measure_step(step, before),
        "process": measure_peak_memory(),
    }


def plan_bytes(bits: int, double_quant: bool, rows: int, tokens: int) -> dict[str, int]:
    """The same as the planner computes it, without the CUDA context."""
    config = recipes.build_config(RECIPE) | {"micro_batch_size": rows}
    config["gradient_checkpointing_kwargs"] = {"use_reentrant": False}  # as it is measured
    model = architectures.find(config["base_model"])
    setup = replace(
        read_setup(config, tokens, 1),
        bits=bits,
        double_quant=double_quant,
        optimizer=name_optimizer(),
    )
    need = compute_memory(model, setup)
    base = sum(compute_weight_bytes(model, setup))
    return {"base": base, "adapter": need.adapter, "peak": need.training - need.cuda_context}


def print_results(results: dict[str, dict[str, dict[str, int]]]) -> None:
    rows: list[tuple[str, ...]] = [("MB", "base", "planned", "peak", "planned", "process")]
    for name, result in results.items():
        real, planned = result["measured"], result["planned"]
        sizes = (real["base"], planned["base"], real["peak"], planned["peak"], real["process"])
        rows.append((name, *(f"{size / 1e6:.1f}" for size in sizes)))
    print(format_table(rows, "<>>>>>"))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="measure memory beside the plan")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a row")
    parser.add_argument("--record", action="store_true", help="add them to results/")
    options = parser.parse_args()
    if options.rows < 1 or options.tokens < 2:
        raise WrongInput("--rows must be at least 1 and --tokens at least 2")
    smollm2.ensure(str(smollm2.FOLDER))
    results = {}
    for name, precision in PRECISIONS.items():
        print(f"memory     {name}", file=sys.stderr, flush=True)
        setting = (*precision, options.rows, options.tokens)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure, *setting).result()
        results[name] = {"measured": measured, "planned": plan_bytes(*setting)}
    print_results(results)
    if options.record:
        subject = f"{RECIPE}, {options.rows} rows of {options.tokens} tokens"
        performance.record("memory", subject, {"sizes": results})


if __name__ == "__main__":
    main()
