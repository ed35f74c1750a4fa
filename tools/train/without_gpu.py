"""What a training takes on this machine's CPUs, before it starts.

    estimate_on_cpu(recipe, here)      Estimate(memory=9.1e9, hours=31.0)

The memory is the planner's, with the 32 bits that CPUs compute in. The time is the operations of
the plan, divided by the speed at which this machine multiplies matrices now.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import architectures, recipes
from tools.common import run_in_child
from tools.sources import list_training_files
from tools.train import memory, plan, profiles
from tools.train.hardware import Host

# Python, torch, Axolotl and what they load, measured: SmolLM2's training without its tensors.
LIBRARIES = 1.2e9  # bytes
# Times the plan's activations that a CPU keeps, without the fused kernels of GPUs: 2.8 of
# FinanceBench's long rows, 1.2 to 2.0 of packed rows of sentiment (results/).
KEPT = 3
# The share of a bare product's speed that a training reaches. SmolLM2 reached 0.4 on two cores
# (`python -m bench.train smollm2-135m/sentiment_r4`), per token that it computed.
SHARE = 0.4
SECONDS = 0.2  # of multiplying, to measure the speed
SIZE = 768  # of the matrices
LONGEST_HOURS = 7 * 24  # a longer training starts only with FORCE=1


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory and hours; `hours` is None where the number of rows is unknown."""

    memory: float
    hours: float | None

    def __str__(self) -> str:
        if self.hours is None:
            time_needed = ""
        elif self.hours < 1:
            time_needed = f"about {max(self.hours * 60, 1):.0f} minutes and "
        elif self.hours < 48:
            time_needed = f"about {self.hours:.0f} hours and "
        else:
            time_needed = f"about {self.hours / 24:.0f} days and "
        return f"{time_needed}{self.memory / 1e9:.0f} GB of memory"


def multiply() -> float:
    """Operations a second of torch's float32 matrix products on all cores."""
    import torch

    matrix = torch.ones(SIZE, SIZE)
    matrix @ matrix
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        matrix @ matrix
        count += 1
    return count * 2 * SIZE**3 / (time.perf_counter() - start)


def compute_cpu_memory(model: architectures.Model, setup: memory.Setup, here: Host) -> float:
    """Bytes on a CPU. All but the quantized weights has 32 bits.

    The quantized weights have a dense copy, of 32 bits, where it fits into half of the memory.
    """
    need = memory.compute_memory(model, replace(setup, kept_bits=32))
    total = LIBRARIES + need.training - need.cuda_context + (KEPT - 1) * need.activations
    total -= need.logits  # the profile cpu has them at answers alone
    dense = 4 * model.linear if setup.bits < 16 else 0
    return total + (dense if dense < here.memory / 2 else 0)


def plan_recipe(recipe: recipes.Recipe, config: dict[str, Any]) -> dict[str, Any]:
    """The plan of a recipe's config on its rows here, or on FinLoRA's at their longest."""
    data = list_training_files(config)
    if all(map(Path.is_file, data)):
        return plan.plan(config, data=data)
    rows = plan.read_published_rows().get(data[0].name) if len(data) == 1 else None
    return plan.plan(config, rows=rows, row=recipes.find_longest_row(recipe.name, config))


def estimate_on_cpu(recipe: recipes.Recipe, here: Host) -> Estimate:
    """What a recipe of the catalogue takes on this machine's CPUs; measures their speed."""
    config = profiles.apply_profiles(recipe.config, profiles.read_profiles("cpu"))
    model, planned = architectures.find(str(config["base_model"])), plan_recipe(recipe, config)
    setup = memory.read_setup(config, planned["setup"]["row"], 1)
    hours = None
    if tokens := planned["tokens"]:
        hours = plan.count_flops(model, setup) * tokens / (run_in_child(multiply) * SHARE) / 3600
    return Estimate(compute_cpu_memory(model, setup, here), hours)
