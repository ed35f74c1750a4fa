"""Says before a run what it trains, how much memory it takes, and what it costs.

    plan(recipe.config, Hardware("A5000 24GB", 4, 0.26), rows=72824)["usd"]

It computes from the recipe and recipes/models/<model>.json and loads neither torch nor the model.
Memory is computed by tools/train/memory.py. Hours are an estimate: they rest on an assumed
utilisation of the GPU.

Bytes are bytes; a GPU of "24 GB" has 24 GiB of memory, as its driver counts it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools import architectures, sources
from tools.architectures import Model
from tools.common import WrongInput, nearest
from tools.train import memory
from tools.train.memory import GIB, Setup
from tools.train.tokens import RowLengths, measure_rows


class Gpu(NamedTuple):
    name: str
    gib: float
    tflops: float | None = None  # None of a size such as "24GB"


# Memory in GiB, dense BF16 tensor TFLOPS (FP16 on the T4, which has no BF16), from NVIDIA's data
# sheets; half of the figure "with sparsity" where a sheet gives only that one.
GPUS = (
    Gpu("T4 16GB", 16, 65.0),
    Gpu("L4 24GB", 24, 121.0),
    Gpu("A5000 24GB", 24, 111.1),
    Gpu("RTX 4090 24GB", 24, 165.2),
    Gpu("A100 40GB", 40, 312.0),
    Gpu("A6000 48GB", 48, 154.8),
    Gpu("A100 80GB", 80, 312.0),
    Gpu("H100 80GB", 80, 989.4),
    Gpu("H200 141GB", 141, 989.4),
)
DEFAULT_GPU = "A5000 24GB"
# The share of it that a program gets: ECC and the driver keep the rest (T4 and L4: 6 %).
USABLE = 0.93
# Share of the peak that training reaches: an assumption, the same for every card and method. Short
# rows, 8-bit bases and slow links between cards reach less, long packed rows on big cards more.
UTILISATION = 0.30


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a plan: `count` of one kind (see `find_gpu`), each for `price` USD an hour."""

    gpu: str = DEFAULT_GPU
    count: int = 1
    price: float | None = None


ONE_GPU = Hardware()


def find_gpu(name: str) -> Gpu:
    """A GPU of the table, with or without its memory in the name, or of a size like "24GB"."""

    def squeeze(text: str) -> str:
        return text.replace(" ", "").lower()

    typed = squeeze(name)
    matches = [
        gpu for gpu in GPUS if typed in map(squeeze, (gpu.name, gpu.name.rsplit(maxsplit=1)[0]))
    ]
    if len(matches) == 1:
        return matches[0]
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b)?", typed):
        return Gpu(f"{size[1]} GB", float(size[1]))
    names = [gpu.name for gpu in matches or GPUS]
    hint = f"; did you mean {', '.join(names)}?" if matches else nearest(name, names)
    hint = hint or f"; there are {', '.join(names)}"
    raise WrongInput(f'unknown GPU "{name}"{hint}; or a size: 24GB')


# ---- Steps and hours


def divide_batch(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """The options that let `processes` share the recipe's batches.

    Gradient accumulation is divided first. Where that is not enough, a micro-batch is divided among
    `micro_batch_parts` processes, whose losses tools/train/plugin.py weighs by their tokens. Raises
    WrongInput for a number of processes that does not divide the batch.
    """
    micro = config.get("micro_batch_size") or 1
    steps = config.get("gradient_accumulation_steps") or 1
    parts = processes // math.gcd(steps, processes)
    if micro % parts:
        fits = [n for n in range(1, micro * steps + 1) if micro % (n // math.gcd(steps, n)) == 0]
        raise WrongInput(
            f"{processes} processes cannot share the recipe's batch of {micro * steps} rows "
            f"(micro_batch_size {micro}, gradient_accumulation_steps {steps}); "
            f"NPROC may be {', '.join(map(str, fits))}"
        )
    return {
        "processes": processes,
        "micro_batch_size": micro // parts,
        "gradient_accumulation_steps": steps * parts // processes,
        "micro_batch_parts": parts,
    }


def count_training_rows(config: dict[str, Any], rows: int) -> int:
    """Rows of a task's file that train: without those that `make data` holds out."""
    share = sources.tables()["validation"]["share"] if config.get("test_datasets") else 0
    return rows - math.ceil(rows * share)


@cache
def read_published_rows() -> dict[str, int | None]:
    """Rows of FinLoRA's own training files, by name of the chat file; None where unknown."""
    tables = sources.published_tables()
    return {
        f"{task}_train.jsonl": tables["files"][row["train"]].get("rows")
        for task, row in tables["tasks"].items()
    }


def count_steps(rows: int, row: int, config: dict[str, Any]) -> tuple[int, int]:
    """(optimizer steps, tokens) of a training on `rows` rows of `row` tokens each.

    Rows that `shards` or `val_set_size` leaves out are not trained on; WrongInput where these are
    all. Packing fills each row up to sequence_len. Padding is not counted. Several GPUs share the
    config's batch, so they take as many steps.
    """
    shards = {entry.get("shards") or 1 for entry in config["datasets"]}
    if len(shards) == 1:  # a part of each file; of several files their sizes are not known here
        rows = math.ceil(rows / int(shards.pop()))
    share = config.get("val_set_size") or 0
    held_out = math.ceil(rows * share) if share < 1 else int(share)
    if held_out >= rows > 0:
        raise WrongInput(f"val_set_size: {share} of {rows:,} rows leaves none to train on")
    rows -= held_out
    if config.get("sample_packing"):
        length = config.get("sequence_len", row)
        rows, row = math.ceil(rows * row / length), length
    batch = config.get("processes", 1) * (config.get("micro_batch_size") or 1)
    batch *= config.get("gradient_accumulation_steps") or 1
    epochs, steps_of_epoch = config.get("num_epochs") or 1, max(1, math.ceil(rows / batch))
    if (most := config.get("max_steps") or 0) > 0:  # transformers then passes over num_epochs
        whole, rest = divmod(most, steps_of_epoch)
        return most, (whole * rows + min(rest * batch, rows)) * row
    return math.ceil(math.ceil(rows / batch) * epochs), int(rows * epochs) * row


def count_flops(model: Model, setup: Setup) -> int:
    """Operations a token: 2 a parameter forward (Kaplan et al. 2020, sec. 2.1), 2 backward to the
    activations, 2 more for the gradients of trained weights, and 2 to recompute a checkpoint.

    Of the unquantized parameters only the head and the experts that a token passes through are
    multiplied. Attention's own products are left out: they are small for rows of some hundred
    tokens.
    """
    passes = 2 + 2 + (2 if setup.checkpointing else 0) + (0 if setup.rank else 2)
    active = sum(layer.active for layer in model.list_layers())
    return passes * (model.linear + active + model.vocab * model.hidden)


def estimate_cost(
    config: dict[str, Any], hardware: Hardware, flops: int, rows: int | None, row: int | None
) -> dict[str, Any]:
    """Steps, tokens, hours and USD of a training on `rows` rows of `row` tokens.

    `flops`: operations a token. A figure that depends on something unknown is None.
    """
    cost: dict[str, Any] = dict.fromkeys(("rows", "tokens", "steps", "hours", "usd"))
    cost["rows"] = rows
    if rows is None or row is None:
        return cost
    cost["steps"], cost["tokens"] = count_steps(rows, row, config)
    if tflops := find_gpu(hardware.gpu).tflops:
        speed = tflops * 1e12 * UTILISATION * hardware.count
        cost["hours"] = flops * cost["tokens"] / speed / 3600
        if hardware.price is not None:
            cost["usd"] = cost["hours"] * hardware.count * hardware.price
    return cost


# ---- The whole plan


def plan_published(
    config: dict[str, Any], hardware: Hardware, flops: int, rows: int | None, row: int | None
) -> dict[str, Any] | None:
    """The cost of FinLoRA's own file of the training data; None where `rows` are that file, or for
    other or more data.
    """
    names = [Path(str(entry.get("path"))).name for entry in config.get("datasets") or ()]
    published_rows = read_published_rows().get(names[0]) if len(names) == 1 else None
    if not published_rows:
        return None
    trained = count_training_rows(config, published_rows)
    if rows in (published_rows, trained):
        return None
    return estimate_cost(config, hardware, flops, trained, row) | {"rows": published_rows}


def plan(
    config: dict[str, Any],
    hardware: Hardware = ONE_GPU,
    rows: int | None = None,
    row: int | None = None,
    data: Sequence[Path] = (),
) -> dict[str, Any]:
    """The whole plan of an Axolotl config, as it is printed in JSON: bytes, hours and USD.

    `row` is the tokens of a row, mean and longest alike; without it they come from the files
    `data`, and without those the peak is for rows of sequence_len.
    """
    base = str(config["base_model"])
    model = architectures.find(base)
    if hardware.count > 1 and "processes" not in config:
        config = config | divide_batch(config, hardware.count)
    is_unknown = rows is None or row is None
    lengths = measure_rows(data, base) if data and is_unknown else RowLengths()
    if rows is not None:
        lengths = replace(lengths, rows=rows)
    if row is not None:
        lengths = replace(lengths, mean=row, longest=row, tokenizer=None)
    most = int(config.get("sequence_len") or 2048)
    unpacked = most if config.get("pad_to_sequence_len") else min(lengths.longest or most, most)
    longest = most if config.get("sample_packing") else unpacked
    setup = memory.read_setup(config, longest, hardware.count)
    gpu = find_gpu(hardware.gpu)
    need = memory.compute_memory(model, setup)
    usable = gpu.gib * GIB * USABLE
    fits = need.least <= usable
    trainable = memory.count_trainable(model, setup)
    if not trainable:
        raise WrongInput(memory.NO_TARGETS)
    flops = count_flops(model, setup)
    mean = None if lengths.mean is None else min(lengths.mean, most)
    return {
        "model": model.source,
        "note": model.note,
        "parameters": model.parameters,
        "trainable_parameters": trainable,
        "adapter_file_bytes": 4 * trainable if setup.rank else None,
        "nominal_bytes": model.parameters * setup.bits // 8,
        "weight_bytes": sum(memory.compute_weight_bytes(model, setup)),
        "setup": asdict(setup),
        "memory": asdict(need) | {"training": need.training, "peak": need.peak},
        "gpu": {
            "name": gpu.name,
            "gib": gpu.gib,
            "usable_bytes": int(usable),
            "tflops": gpu.tflops,
        },
        "fits": fits,
        "fits_by_paging": fits and usable < need.peak,
        "changes": [] if fits else memory.suggest_changes(model, setup, usable, unpacked),
        **estimate_cost(config, hardware, flops, lengths.rows, mean),
        "tokens_per_row": lengths.mean,
        "tokenizer": lengths.tokenizer,
        "utilisation": UTILISATION,
        "published": plan_published(config, hardware, flops, lengths.rows, mean),
    }
