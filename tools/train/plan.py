"""Says before a run what it trains, how much memory it takes, and what it costs.

    python -m tools.train.plan sentiment_r4 --gpu "A5000 24GB" --nproc 4 --price 0.26 --rows 76772

It computes from the recipe and recipes/models/<model>.json and loads neither torch nor the model.
Trainable parameters and bytes of weights are exact. Activations, logits and the CUDA context are a
model of the peak (within 3 % of the eight quantized settings that FinLoRA published, see
tests/test_plan.py). Hours are an estimate: they rest on an assumed utilisation of the GPU.

Bytes are bytes; a GPU of "24 GB" has 24 GiB of memory, as its driver counts it.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from tools import architectures, recipes, sources
from tools.architectures import BLOCKS, MODULES, Model
from tools.common import ROOT, WrongInput, nearest, read_yaml, shown

MODELS = ROOT / "recipes" / "models"
GIB = 2**30

# Memory in GiB, dense BF16 tensor TFLOPS (FP16 on the T4, which has no BF16), from NVIDIA's data
# sheets; half of the figure "with sparsity" where a sheet gives only that one.
GPUS = {
    "T4 16GB": (16, 65.0),
    "L4 24GB": (24, 121.0),
    "A5000 24GB": (24, 111.1),
    "RTX 4090 24GB": (24, 165.2),
    "A100 40GB": (40, 312.0),
    "A6000 48GB": (48, 154.8),
    "A100 80GB": (80, 312.0),
    "H100 80GB": (80, 989.4),
    "H200 141GB": (141, 989.4),
}
DEFAULT_GPU = "A5000 24GB"
# What a program gets of it: ECC and the driver keep the rest (T4 and L4: 6 %; the others: less).
USABLE = 0.93
# Driver context, kernels, cuBLAS and NCCL buffers in one process; 0.4 to 0.6 GiB on most cards.
CONTEXT = int(0.5 * GIB)
# Share of the peak that training reaches: an assumption, the same for every card and method. Short
# rows, 8-bit bases and slow links between cards reach less, long packed rows on big cards more.
UTILISATION = 0.30
# To guess tokens from a data file where no tokenizer is at hand. Ten of FinLoRA's files (14,973
# rows) have 3.0 (financebench) to 5.0 characters a token of SmolLM2's tokenizer, and no row has
# fewer than 1.85: hours are for the least of the files, the peak is for the least of the rows.
# SmolLM2's chat template adds 32 tokens.
CHARACTERS_PER_TOKEN, LEAST_CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 2.9, 1.8, 40
SAMPLED, LONGEST = 1000, 64  # rows whose tokens are counted: from all over the file; the longest

# Optimizer state in bytes per trainable parameter: two moments in float32 (Kingma & Ba, 2015), or
# in 8 bits with a float32 maximum per block of 256 (bitsandbytes; Dettmers et al. 2022, sec. 2).
OPTIMIZERS = {"adamw": 8.0, "8bit": 2 + 2 * 4 / 256}


@dataclass(frozen=True)
class Setup:
    """What of a recipe memory and time depend on. `rank` 0: every parameter is trained."""

    bits: int = 16  # of the linear layers: 4, 8, 16 or 32
    double_quant: bool = True
    kept_bits: int = 16  # of embedding, head, norms while training
    rank: int = 0
    modules: tuple[str, ...] = MODULES
    layers: tuple[int, ...] | None = None  # the decoder layers that are adapted; None: all
    ranks: tuple[tuple[str, int], ...] = ()  # (pattern of a module's name, its rank)
    saved: tuple[str, ...] = ()  # modules that are trained whole, beside the adapter
    tokens: int = 0  # that the config adds to the vocabulary
    dora: bool = False
    optimizer: str = "adamw_torch"
    micro_batch: int = 1
    accumulation: int = 1
    row: int = 512  # tokens of the longest row, which the peak depends on
    checkpointing: bool = True
    zero: int = 0
    gpus: int = 1


@dataclass(frozen=True)
class Hardware:
    """What a plan is for: `count` GPUs of one kind (see `find_gpu`), each for `price` USD an hour."""

    gpu: str = DEFAULT_GPU
    count: int = 1
    price: float | None = None


ONE_GPU = Hardware()


@dataclass(frozen=True)
class Measured:
    """A file of rows: how many, tokens of the mean and of the longest, and whose tokens they are.

    Without a `tokenizer` they are guessed from characters, rather too many than too few.
    """

    rows: int
    mean: int
    longest: int
    tokenizer: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part; `activations_without_checkpointing` is for comparison."""

    linear_weights: int
    quantization_constants: int
    embedding_head_norms: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    dequantized_layer: int
    cuda_context: int
    activations_without_checkpointing: int
    loading: int  # the peak before the first step
    paged: int  # of the optimizer's bytes, those that move to the host where memory is short

    @property
    def training(self) -> int:
        apart = ("activations_without_checkpointing", "loading", "paged")
        return sum(value for name, value in vars(self).items() if name not in apart)

    @property
    def peak(self) -> int:
        return max(self.training, self.loading)

    @property
    def least(self) -> int:
        """The peak with a paged optimizer's states on the host."""
        return max(self.training - self.paged, self.loading)


def adapted(model: Model, setup: Setup) -> Counter[tuple[str, int]]:
    """How many decoder layers have a module adapted at a rank, by (module, rank)."""
    layers = range(model.layers) if setup.layers is None else setup.layers
    if not setup.ranks:
        return Counter({(name, setup.rank): len(layers) for name in setup.modules})
    counts: Counter[tuple[str, int]] = Counter()
    for layer in layers:
        for name in setup.modules:
            full = f"model.layers.{layer}.{BLOCKS[name]}.{name}"
            # As PEFT matches a pattern: the end of the name counts.
            ranks = (rank for key, rank in setup.ranks if re.match(rf"(.*\.)?({key})$", full))
            counts[name, next(ranks, setup.rank)] += 1
    return counts


def saved_parameters(model: Model, setup: Setup) -> int:
    """Parameters of the modules that are trained whole (`lora_modules_to_save`)."""
    sizes = {name: model.layers * math.prod(shape) for name, shape in model.shapes.items()}
    sizes |= dict.fromkeys(("embed_tokens", "lm_head"), (model.vocab + setup.tokens) * model.hidden)
    for name in setup.saved:
        if name not in sizes:
            known = ", ".join(sizes)
            raise WrongInput(f'lora_modules_to_save: "{name}" cannot be planned; {known} can')
    return sum(sizes[name] for name in setup.saved)


def trainable(model: Model, setup: Setup) -> int:
    """Trainable parameters.

    LoRA: r·(in + out) for each targeted layer (Hu et al. 2021, sec. 4.1). DoRA adds a magnitude for
    each output (Liu et al. 2024, sec. 4.1). rsLoRA only scales. Modules that are saved whole count
    whole. Without an adapter: all.
    """
    if not setup.rank:
        return model.parameters
    total = saved_parameters(model, setup)
    for (name, rank), layers in adapted(model, setup).items():
        width, height = model.shapes[name]
        total += layers * (rank * (width + height) + (height if setup.dora else 0))
    return total


def pageable(model: Model, setup: Setup) -> float:
    """The share of the optimizer's states that bitsandbytes pages: of tensors from 100,000 on."""
    if not setup.rank:
        return 1.0
    large = saved_parameters(model, setup)
    for (name, rank), layers in adapted(model, setup).items():
        sizes = [rank * side for side in model.shapes[name]]
        large += layers * sum(size for size in sizes if size >= 100_000)
    return large / trainable(model, setup)


def linear_bytes(shape: tuple[int, int], bits: int, double_quant: bool = True) -> tuple[int, int]:
    """Bytes of one linear layer's weights and of its quantization constants, as bitsandbytes has.

    4 bits: two weights a byte; a maximum for each block of 64 and a table of 16 values in float32.
    Double quantization (Dettmers et al. 2023, sec. 3) keeps the maxima in 8 bits instead, with a
    float32 maximum for each 256 of them, a table of 256 values and a mean.
    8 bits: one weight a byte, a float32 scale (SCB) an output (LLM.int8, Dettmers et al. 2022).
    """
    count = shape[0] * shape[1]
    if bits == 4:
        blocks, table = math.ceil(count / 64), 4 * 16
        constants = (
            blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if double_quant else 4 * blocks
        )
        return math.ceil(count / 2), constants + table
    return count * bits // 8, 4 * shape[1] if bits == 8 else 0


def weight_bytes(model: Model, setup: Setup) -> tuple[int, int]:
    """Bytes of all linear layers' weights and of their quantization constants."""
    each = [linear_bytes(s, setup.bits, setup.double_quant) for s in model.shapes.values()]
    return model.layers * sum(w for w, _ in each), model.layers * sum(c for _, c in each)


def kept_bytes(model: Model, setup: Setup) -> int:
    """Bytes of embedding, head and norms while training."""
    return model.unquantized * (setup.kept_bits if setup.bits < 16 else setup.bits) // 8


def activation_bytes(model: Model, setup: Setup, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of one micro-batch, without the logits.

    Counted over transformers' Llama layer as Korthikanti et al. 2022, sec. 4.1 count theirs, in
    mixed precision, with SDPA or flash attention (nothing grows with the square of the length) and
    frozen weights (a frozen layer keeps no input). A token and layer keep: two norms' float32
    inputs, 8·hidden; queries, keys, values and the attention's output, 2 bytes each; gate, its
    SiLU and up, 6·intermediate; for each targeted layer its input at 16 bits and a dropout mask,
    3·in; without an adapter every layer its input, 2·in. With checkpointing (Chen et al. 2016)
    each layer keeps its 16-bit input, 2·hidden, and one layer at a time is recomputed.
    """
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = 8 * model.hidden + 2 * (2 * query + 2 * key) + 6 * model.intermediate
    layer += 3 * sum(model.shapes[name][0] for name in setup.modules)
    layer += 0 if setup.rank else 2 * sum(a for a, _ in model.shapes.values())
    tokens = setup.micro_batch * setup.row
    if checkpointing:
        return tokens * (model.layers * 2 * model.hidden + layer)
    return tokens * model.layers * layer


def logit_bytes(model: Model, setup: Setup) -> int:
    """Bytes around the loss: 12 for each token and word of the vocabulary.

    transformers' causal loss holds the logits and their gradient at 16 bits, the log-softmax and
    its gradient at 32 (a fused loss such as Liger's or cut cross entropy would save them).
    """
    return 12 * setup.micro_batch * setup.row * model.vocab


def memory(model: Model, setup: Setup) -> Memory:
    """Peak memory of one GPU.

    An adapter and its gradients are float32 (PEFT's `autocast_adapter_dtype`); a fully trained
    model has 16-bit weights and gradients (Dettmers et al. 2023 count so for their 780 GB).
    ZeRO (Rajbhandari et al. 2020, sec. 5) divides the optimizer's states (1), gradients too (2),
    weights too (3) among the GPUs. While it loads a quantized base, PEFT's
    `prepare_model_for_kbit_training` casts all that is not quantized to float32; Axolotl casts it
    back to 16 bits before the first step, plain PEFT does not (`kept_bits` 32).
    """
    count = trainable(model, setup)
    weights, constants = weight_bytes(model, setup)
    quantized = setup.bits < 16
    share = [setup.gpus if setup.zero >= stage else 1 for stage in (1, 2, 3)]
    kept = kept_bytes(model, setup)
    per_parameter = OPTIMIZERS["8bit" if "8bit" in setup.optimizer else "adamw"]
    optimizer = int(count * per_parameter) // share[0]
    largest = max(a * b for a, b in model.shapes.values())
    before = weights + constants + (4 * model.unquantized if quantized else kept)
    return Memory(
        linear_weights=weights // share[2],
        quantization_constants=constants // share[2],
        embedding_head_norms=kept // share[2],
        adapter=4 * count if setup.rank else 0,
        gradients=(4 if setup.rank else 2) * count // share[1],
        optimizer=optimizer,
        activations=activation_bytes(model, setup, setup.checkpointing),
        logits=logit_bytes(model, setup),
        # bitsandbytes makes a layer's weights dense for its product; ZeRO-3 gathers them.
        dequantized_layer=2 * largest if quantized or share[2] > 1 else 0,
        cuda_context=CONTEXT,
        activations_without_checkpointing=activation_bytes(model, setup, False),
        loading=before // share[2] + CONTEXT,
        paged=int(optimizer * pageable(model, setup)) if "paged" in setup.optimizer else 0,
    )


def changes(model: Model, setup: Setup, limit: float, unpacked: int) -> list[tuple[str, int]]:
    """What to change where the peak is over `limit` bytes: (change, new peak), up to one that fits.

    Each on top of those before. Checkpointing, micro-batch and ZeRO change nothing that is learned
    and come first. `unpacked`: tokens of the longest row before packing.
    """
    tried: list[tuple[str, int]] = []

    def attempt(text: str, other: Setup) -> Setup:
        tried.append((text, memory(model, other).least))
        return other

    def short() -> bool:
        return not tried or tried[-1][1] > limit

    if not setup.checkpointing:
        setup = attempt("gradient_checkpointing: true", replace(setup, checkpointing=True))
    while setup.micro_batch > 1 and short():
        half = setup.micro_batch // 2
        steps = math.ceil(setup.accumulation * setup.micro_batch / half)
        text = f"micro_batch_size: {half}, gradient_accumulation_steps: {steps}"
        setup = attempt(text, replace(setup, micro_batch=half, accumulation=steps))
    for stage in (1, 2, 3):
        # ZeRO-3 cannot divide a base that bitsandbytes holds in 8 bits.
        usable = setup.gpus > 1 and setup.zero < stage and not (stage == 3 and setup.bits == 8)
        if usable and short():
            setup = attempt(f"deepspeed: ZeRO-{stage}", replace(setup, zero=stage))
    if unpacked < setup.row and short():
        setup = attempt("sample_packing: false", replace(setup, row=unpacked))
    if setup.row > 512 and short():
        text = f"sequence_len: {setup.row // 2} (longer rows are dropped)"
        setup = attempt(text, replace(setup, row=setup.row // 2))
    if setup.bits > 4 and setup.rank and short():
        attempt("load_in_4bit: true, adapter: qlora", replace(setup, bits=4, double_quant=True))
    return tried


def steps_of(rows: int, row: int, config: dict[str, Any]) -> tuple[int, int]:
    """(optimizer steps, tokens) of a training on `rows` rows of `row` tokens each.

    Rows that `val_set_size` splits off are not trained on; packing fills each row up to
    sequence_len. Padding is not counted. Several GPUs share the config's batch, so they take as
    many steps.
    """
    share = config.get("val_set_size") or 0
    rows -= math.ceil(rows * share) if share < 1 else int(share)
    if config.get("sample_packing"):
        packed = math.ceil(rows * row / config.get("sequence_len", row))
        rows, row = packed, config.get("sequence_len", row)
    batch = config.get("processes", 1) * (config.get("micro_batch_size") or 1)
    batch *= config.get("gradient_accumulation_steps") or 1
    steps = math.ceil(math.ceil(rows / batch) * config.get("num_epochs", 1))
    most = config.get("max_steps") or steps
    if most < steps:
        return most, most * batch * row
    return steps, int(rows * config.get("num_epochs", 1)) * row


def count_training_rows(config: dict[str, Any], rows: int) -> int:
    """Rows of a task's file that train: without those that `make data` holds out."""
    held = sources.tables()["validation"]["share"] if config.get("test_datasets") else 0
    return rows - math.ceil(rows * held)


def divided(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """The options that let `processes` share the recipe's batches; raises WrongInput where they
    cannot.

    Gradient accumulation is divided first. Where that is not enough, a micro-batch is divided among
    `micro_batch_parts` processes, whose losses tools/train/plugin.py weighs by their tokens.
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


def flops_per_token(model: Model, setup: Setup) -> int:
    """Operations a token: 2 a parameter forward (Kaplan et al. 2020, sec. 2.1), 2 backward to the
    activations, 2 more for the gradients of trained weights, and 2 to recompute a checkpoint.

    Of the kept parameters only the head is multiplied. Attention's own products are left out:
    they are small for rows of some hundred tokens.
    """
    passes = 2 + 2 + (2 if setup.checkpointing else 0) + (0 if setup.rank else 2)
    return passes * (model.linear + model.vocab * model.hidden)


def find_gpu(name: str) -> tuple[str, float, float | None]:
    """(name, GiB, TFLOPS) of a GPU of the table, or of a size like "24GB", which has no TFLOPS."""
    plain = {key.replace(" ", "").lower(): key for key in GPUS}
    typed = name.replace(" ", "").lower()
    found = [
        key
        for p, key in plain.items()
        if typed in (p, key.rsplit(maxsplit=1)[0].replace(" ", "").lower())
    ]
    if len(found) == 1:
        return found[0], *GPUS[found[0]]
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b)?", typed):
        return f"{size[1]} GB", float(size[1]), None
    near = f"; did you mean {', '.join(found)}?" if found else nearest(name, list(GPUS))
    raise WrongInput(
        f'unknown GPU "{name}"{near or "; there are " + ", ".join(GPUS)}; or a size: 24GB'
    )


def targeted(config: dict[str, Any]) -> tuple[str, ...]:
    """The linear layers of a decoder layer that an Axolotl config adapts.

    A text is a regular expression over module names, as PEFT takes it: it is tried on the names
    that transformers gives the layers, alone and inside a model with a vision tower.
    """
    named = config.get("lora_target_modules") or []
    if config.get("lora_target_linear"):
        return MODULES
    if isinstance(named, str):
        found = tuple(
            name
            for name in MODULES
            for stem in ("model.layers", "model.language_model.layers")
            if re.fullmatch(named, f"{stem}.0.{BLOCKS[name]}.{name}")
        )
        unknown = [] if found else [named]
    else:
        found = tuple(named)
        unknown = [name for name in found if name not in MODULES]
    if unknown:
        known = ", ".join(MODULES)
        raise WrongInput(
            f'lora_target_modules: "{unknown[0]}" cannot be planned; a list of {known} can'
        )
    return found


def setup_of(config: dict[str, Any], row: int, gpus: int) -> Setup:
    """The Setup of an Axolotl config, for rows of up to `row` tokens."""
    bits = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else 16
    if bits == 16 and config.get("bf16") is False and not config.get("fp16"):
        bits = 32
    modules = targeted(config)
    four = config.get("bnb_config_kwargs") or {}
    stage = re.search(r"zero(\d)", str(config.get("deepspeed") or ""))
    lora = bool(config.get("adapter"))
    layers = config.get("peft_layers_to_transform")
    return Setup(
        bits=bits,
        # Axolotl's own default where the recipe does not say.
        double_quant=bool(four.get("bnb_4bit_use_double_quant", True)),
        rank=(config.get("lora_r") or 8) if lora else 0,
        modules=modules if lora else (),
        layers=tuple(layers) if layers is not None else None,
        ranks=tuple((config.get("lora_rank_pattern") or {}).items()),
        saved=tuple(dict.fromkeys(config.get("lora_modules_to_save") or [])),
        tokens=len(config.get("tokens") or []),
        dora=bool(config.get("peft_use_dora")),
        optimizer=str(config.get("optimizer", "adamw_torch")),
        micro_batch=config.get("micro_batch_size") or 1,
        accumulation=config.get("gradient_accumulation_steps") or 1,
        row=row,
        checkpointing=bool(config.get("gradient_checkpointing")),
        zero=int(stage[1]) if stage else 0,
        gpus=gpus,
    )


def texts_of(value: Any) -> list[str]:
    """The texts of a row of any shape, without the names of roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        parts = (part for key, part in value.items() if key not in ("role", "from"))
        return [text for part in parts for text in texts_of(part)]
    return [text for part in value for text in texts_of(part)] if isinstance(value, list) else []


def measure(path: Path, base: str) -> Measured | None:
    """The rows of a JSONL file and their tokens, by the base's tokenizer where it is at hand."""
    if not path.is_file():
        return None
    try:
        values = [orjson.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except ValueError:
        return None  # no JSONL; training names the line
    rows = sorted(("\n".join(texts_of(value)) for value in values), key=len)
    if not rows:
        return None
    tokenizer = architectures.find_file(base, "tokenizer.json")
    if tokenizer is None:
        mean = sum(map(len, rows)) / len(rows) / CHARACTERS_PER_TOKEN
        longest = len(rows[-1]) / LEAST_CHARACTERS_PER_TOKEN
        return Measured(len(rows), int(mean) + TEMPLATE_TOKENS, int(longest) + TEMPLATE_TOKENS)
    from tokenizers import Tokenizer

    counter = Tokenizer.from_file(str(tokenizer))
    counter.no_truncation()
    counter.no_padding()
    # Sorted by length, so rows at equal distances have the file's mean.
    step = math.ceil(len(rows) / SAMPLED)
    sample, long = (
        [len(row.ids) for row in counter.encode_batch(some, add_special_tokens=False)]
        for some in (rows[step // 2 :: step], rows[-LONGEST:])
    )
    mean, longest = sum(sample) / len(sample), max(long)
    return Measured(
        len(rows), int(mean) + TEMPLATE_TOKENS, longest + TEMPLATE_TOKENS, shown(tokenizer)
    )


@cache
def published_rows() -> dict[str, int]:
    """Rows of FinLoRA's own training files where they are known, by the name of the chat file."""
    tables = read_yaml(ROOT / "data" / "sources.yaml")
    files = tables["files"]
    counts = {task: files[row["train"]].get("rows") for task, row in tables["tasks"].items()}
    return {f"{task}_train.jsonl": count for task, count in counts.items() if count}


def plan(
    config: dict[str, Any],
    hardware: Hardware = ONE_GPU,
    rows: int | None = None,
    row: int | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """The whole plan of an Axolotl config, as JSON has it. Bytes, hours, and USD.

    `row` is the tokens of a row, mean and longest alike; without it they come from the file `data`,
    and without that the peak is for rows of sequence_len.
    """
    gpus, price = hardware.count, hardware.price
    model = architectures.find(str(config["base_model"]))
    if gpus > 1 and "processes" not in config:
        config = config | divided(config, gpus)
    base = str(config["base_model"])
    measured = measure(data, base) if data and (rows is None or row is None) else None
    most = int(config.get("sequence_len") or 2048)
    rows = measured.rows if rows is None and measured else rows
    mean = row if row is not None else measured.mean if measured else None
    longest = row if row is not None else measured.longest if measured else most
    unpacked = most if config.get("pad_to_sequence_len") else min(longest, most)
    setup = setup_of(config, most if config.get("sample_packing") else unpacked, gpus)
    name, gib, tflops = find_gpu(hardware.gpu)
    need = memory(model, setup)
    limit = gib * GIB * USABLE
    count = trainable(model, setup)

    def cost(count: int | None) -> dict[str, Any]:
        """Steps, tokens, hours and USD of a training on `count` rows."""
        steps = tokens = hours = None
        if count is not None and mean is not None:
            steps, tokens = steps_of(count, min(mean, most), config)
        if tokens is not None and tflops is not None:
            operations = flops_per_token(model, setup) * tokens
            hours = operations / (tflops * 1e12 * UTILISATION * gpus) / 3600
        usd = hours * gpus * price if hours is not None and price is not None else None
        return {"rows": count, "tokens": tokens, "steps": steps, "hours": hours, "usd": usd}

    entries = config.get("datasets") or [{}]
    whole = published_rows().get(Path(str(entries[0].get("path"))).name)
    published = None
    if whole and whole != rows:
        published = cost(count_training_rows(config, whole)) | {"rows": whole}
    return {
        "model": model.source,
        "note": model.note,
        "parameters": model.parameters,
        "trainable_parameters": count,
        "adapter_file_bytes": 4 * count if setup.rank else None,
        "nominal_bytes": model.parameters * setup.bits // 8,
        "weight_bytes": sum(weight_bytes(model, setup)) + kept_bytes(model, setup),
        "setup": asdict(setup),
        "memory": asdict(need) | {"training": need.training, "peak": need.peak},
        "gpu": {"name": name, "gib": gib, "usable_bytes": int(limit), "tflops": tflops},
        "fits": need.least <= limit,
        "fits_by_paging": need.least <= limit < need.peak,
        "changes": [] if need.least <= limit else changes(model, setup, limit, unpacked),
        **cost(rows),
        "tokens_per_row": mean,
        "tokenizer": measured.tokenizer if measured and row is None else None,
        "utilisation": UTILISATION,
        "published": published,
    }


def compare(made: dict[str, Any], told: dict[str, Any]) -> None:
    """Prints what a finished run took, from its run.json, beside what is planned for it.

    The plan is for one GPU; on other hardware memory and time say what was, not how good it is.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "planned", "took"):
        table.add_column(heading, justify="right" if heading else "left")
    planned_hours = "" if made["hours"] is None else f"{made['hours']:.2f}"
    for label, planned, took in (
        ("trainable", f"{made['trainable_parameters']:,}", f"{told['trainable_parameters']:,}"),
        ("steps", f"{made['steps'] or '':,}" if made["steps"] else "", f"{told['steps']:,}"),
        (
            "peak memory, GiB",
            f"{made['memory']['peak'] / GIB:.2f}",
            f"{told['peak_memory_bytes'] / GIB:.2f}",
        ),
        ("hours", planned_hours, f"{told['seconds'] / 3600:.2f}"),
        ("tokens/s", "", f"{told['tokens_per_second']:,.0f}"),
        ("loss", "", f"{told['train_loss']:.3f}"),
    ):
        table.add_row(label, planned, took)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    gpu, version = made["gpu"]["name"], told["recipe_version"]
    console.print(
        f"\nplanned for one {gpu}; trained as version {version} on {told['processes']} x "
        f"{told['device']}, {told['finished']}"
    )
    console.print(table)


PARTS = {
    "linear_weights": "linear weights, {bits} bits",
    "embedding_head_norms": "embedding, head, norms",
    "cuda_context": "CUDA context",
    "activations_without_checkpointing": "(activations without checkpointing)",
    "loading": "peak while loading",
    "training": "peak while training",
    "peak": "peak on a GPU",
}


def describe_cost(rows: str, cost: dict[str, Any], made: dict[str, Any]) -> str:
    """What a training on `rows` takes, as a line."""
    line = f"{rows}: {cost['tokens']:,} tokens in {cost['steps']:,} steps"
    if cost["hours"] is not None:
        share = f"{made['utilisation']:.0%} of {made['gpu']['tflops']:g} TFLOPS"
        line += f", about {cost['hours']:.2f} hours (an estimate, at {share})"
    return line + (f", {cost['usd']:.2f} USD" if cost["usd"] is not None else "")


def show(recipe: str, made: dict[str, Any]) -> None:
    """Prints a plan as a table."""
    from rich.console import Console
    from rich.table import Table

    setup, gpu, need = made["setup"], made["gpu"], made["memory"]
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{made['parameters']:,}")
    table.add_row("trainable", f"{made['trainable_parameters']:,}")
    if made["adapter_file_bytes"]:
        table.add_row("adapter on disk", f"{made['adapter_file_bytes'] / 1e6:.1f} MB")
    table.add_row("weights, nominal", f"{made['nominal_bytes'] / 1e9:.2f} GB")
    table.add_row("weights, real", f"{made['weight_bytes'] / 1e9:.2f} GB")
    for part, size in need.items():
        if size and part != "paged":
            label = PARTS.get(part, part.replace("_", " ")).format(**setup)
            table.add_row(label, f"{size / GIB:.2f} GiB")
    console.print(f"{recipe} on {made['model']}")
    console.print(table)
    fits = "fits" if made["fits"] else "does not fit"
    paging = ", with the optimizer's states paged to the host" if made["fits_by_paging"] else ""
    count, row, micro = setup["gpus"], setup["row"], setup["micro_batch"]
    console.print(
        f"{fits} {count} x {gpu['name']}, micro-batch {micro}, rows ≤ {row} tokens{paging}"
    )
    for text, peak in made["changes"]:
        verdict = "fits" if peak <= gpu["usable_bytes"] else "not enough"
        console.print(f"  {text}: {peak / GIB:.2f} GiB, {verdict}")
    if made["tokens"] is None:
        console.print("steps and hours: give --rows and --tokens-per-row, or make the data")
    else:
        counted = f"counted by {made['tokenizer']}" if made["tokenizer"] else "estimated"
        console.print(f"{made['tokens_per_row']:,} tokens a row in the mean, {counted}")
        console.print(describe_cost(f"the {made['rows']:,} rows at hand", made, made))
    if made["published"] and made["published"]["tokens"]:
        name = f"FinLoRA's whole file, {made['published']['rows']:,} rows"
        console.print(describe_cost(name, made["published"], made))
    if made["note"]:
        console.print(made["note"])


def print_plan(
    name: str, hardware: Hardware, rows: int | None, tokens_per_row: int | None, as_json: bool
) -> None:
    """Prints the plan of a recipe, as a table or as JSON. `rows`: of the whole training file."""
    recipe = recipes.find(name)
    data = ROOT / recipe.config["datasets"][0]["path"]
    trained = count_training_rows(recipe.config, rows) if rows else None
    made = plan(recipe.config, hardware, rows=trained, row=tokens_per_row, data=data)
    if as_json:
        print(json.dumps({"recipe": recipe.name} | made, indent=2))
    else:
        show(recipe.name, made)
