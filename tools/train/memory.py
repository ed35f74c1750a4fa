"""The equations of a training's memory, each with its source.

    setup = read_setup(recipe.config, row=512, gpus=1)
    compute_memory(architectures.find(base), setup).peak       bytes on one GPU

Trainable parameters and bytes of weights are exact. Activations, logits and the CUDA context are a
model of the peak: within 3 % of the eight quantized settings that FinLoRA published, see
tests/test_plan.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tools.architectures import BLOCKS, LINEAR_ATTENTION, MODULES, Layer, Model
from tools.common import WrongInput
from tools.patterns import find_by_pattern

GIB = 2**30
# Driver context, kernels, cuBLAS and NCCL buffers in one process; 0.4 to 0.6 GiB on most cards.
CONTEXT = int(0.5 * GIB)
# Optimizer state in bytes per trainable parameter: two moments in float32 (Kingma & Ba, 2015), or
# in 8 bits with a float32 maximum per block of 256 (bitsandbytes; Dettmers et al. 2022, sec. 2).
OPTIMIZERS = {"adamw": 8.0, "8bit": 2 + 2 * 4 / 256}
CHUNK = 64  # tokens
PAGED_FROM = 100_000  # parameters of a tensor from which bitsandbytes pages its states


@dataclass(frozen=True)
class Setup:
    """The settings that memory and time depend on. `rank` 0: every parameter is trained."""

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
    reentrant: bool = True  # how checkpoints are made; Axolotl's default
    zero: int = 0
    gpus: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part; `activations_without_checkpointing` is for comparison."""

    linear_weights: int
    quantization_constants: int
    embedding_head_norms: int
    experts: int
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


# ---- What a config trains


NO_TARGETS = "no layer is adapted: lora_target_modules, or lora_target_linear: true, is needed"


def read_setup(config: dict[str, Any], row: int, gpus: int) -> Setup:
    """The Setup of an Axolotl config, for rows of up to `row` tokens."""
    bits = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else 16
    if bits == 16 and config.get("bf16") is False and not config.get("fp16"):
        bits = 32
    stage = re.search(r"zero(\d)", str(config.get("deepspeed") or ""))
    has_adapter = bool(config.get("adapter"))
    layers = config.get("peft_layers_to_transform")
    saved = config.get("lora_modules_to_save") or []
    four_bits = config.get("bnb_config_kwargs") or {}
    return Setup(
        bits=bits,
        # Axolotl's own default where the recipe does not say.
        double_quant=bool(four_bits.get("bnb_4bit_use_double_quant", True)),
        rank=(config.get("lora_r") or 8) if has_adapter else 0,
        modules=list_target_modules(config) if has_adapter else (),
        layers=tuple(layers) if layers is not None else None,
        ranks=tuple((config.get("lora_rank_pattern") or {}).items()),
        saved=tuple(dict.fromkeys([saved] if isinstance(saved, str) else saved)),
        tokens=len(config.get("tokens") or []),
        dora=bool(config.get("peft_use_dora")),
        optimizer=str(config.get("optimizer", "adamw_torch")),
        micro_batch=config.get("micro_batch_size") or 1,
        accumulation=config.get("gradient_accumulation_steps") or 1,
        row=row,
        checkpointing=bool(config.get("gradient_checkpointing")),
        reentrant=(config.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", True),
        zero=int(stage[1]) if stage else 0,
        gpus=gpus,
    )


def list_target_modules(config: dict[str, Any]) -> tuple[str, ...]:
    """The linear layers of a decoder layer that an Axolotl config adapts.

    PEFT reads a text as a regular expression over module names. It is matched against the names
    that transformers gives the layers, alone and inside a model with a vision tower. Raises
    WrongInput for what cannot be planned.
    """
    if config.get("lora_target_linear"):
        return MODULES + LINEAR_ATTENTION
    targets = config.get("lora_target_modules") or []
    if isinstance(targets, str):
        prefixes = ("model.layers.0.", "model.language_model.layers.0.")
        modules: tuple[str, ...] = tuple(
            name
            for name, block in BLOCKS.items()
            if any(re.fullmatch(targets, f"{prefix}{block}.{name}") for prefix in prefixes)
        )
        unplanned = [] if modules else [targets]
    else:
        modules = tuple(dict.fromkeys(targets))
        unplanned = [name for name in modules if name not in MODULES + LINEAR_ATTENTION]
    if not targets:
        raise WrongInput(NO_TARGETS)
    if unplanned:
        raise WrongInput(
            f'lora_target_modules: "{unplanned[0]}" cannot be planned; '
            f"a list of {', '.join(MODULES)} can"
        )
    return modules


def list_trained_sizes(model: Model, setup: Setup) -> list[int]:
    """Parameters of each trained tensor.

    LoRA: r·in and r·out for each targeted layer (Hu et al. 2021, sec. 4.1). DoRA adds a magnitude
    for each output (Liu et al. 2024, sec. 4.1). rsLoRA only scales. Modules that are saved whole
    count whole. Without an adapter: all parameters.
    """
    if not setup.rank:
        return [model.parameters]
    whole: dict[str, int] = {}
    for layer in model.list_layers():
        for path, shape in layer.linear.items():
            name = path.rpartition(".")[2]
            whole[name] = whole.get(name, 0) + math.prod(shape)
    whole |= dict.fromkeys(("embed_tokens", "lm_head"), (model.vocab + setup.tokens) * model.hidden)
    if unplanned := [name for name in setup.saved if name not in whole]:
        raise WrongInput(
            f'lora_modules_to_save: "{unplanned[0]}" cannot be planned; {", ".join(whole)} can'
        )
    sizes = [whole[name] for name in setup.saved]
    for number, layer in enumerate(model.list_layers()):
        if setup.layers is not None and number not in setup.layers:
            continue
        for name, (width, height) in select_targets(layer, setup).items():
            path = f"model.layers.{number}.{name}"
            rank = find_by_pattern(dict(setup.ranks), path, setup.rank)
            sizes += [rank * width, rank * height] + ([height] if setup.dora else [])
    return sizes


def select_targets(layer: Layer, setup: Setup) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of a decoder layer that a setup adapts."""
    targets = layer.linear.items()
    return {path: shape for path, shape in targets if path.rpartition(".")[2] in setup.modules}


def map_layers(model: Model, work: Callable[[Layer], int]) -> list[int]:
    """What `work` says of each decoder layer; it is asked once for all layers of a kind."""
    layers = model.list_layers()
    by_kind = {identity: work(layer) for identity, layer in {id(x): x for x in layers}.items()}
    return [by_kind[id(layer)] for layer in layers]


def count_trainable(model: Model, setup: Setup) -> int:
    """Trainable parameters."""
    return sum(list_trained_sizes(model, setup))


# ---- Bytes


def compute_linear_bytes(
    shape: tuple[int, int], bits: int, double_quant: bool = True
) -> tuple[int, int]:
    """Bytes of one linear layer's weights and of its quantization constants in bitsandbytes.

    4 bits: two weights a byte; a maximum for each block of 64 and a table of 16 values in float32.
    Double quantization (Dettmers et al. 2023, sec. 3) keeps the maxima in 8 bits instead, with a
    float32 maximum for each 256 of them, a table of 256 values and a mean.
    8 bits: one weight a byte, a float32 scale (SCB) an output (LLM.int8, Dettmers et al. 2022).
    """
    count = shape[0] * shape[1]
    if bits != 4:
        return count * bits // 8, 4 * shape[1] if bits == 8 else 0
    blocks = math.ceil(count / 64)
    maxima = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if double_quant else 4 * blocks
    return math.ceil(count / 2), maxima + 4 * 16


def compute_weight_bytes(model: Model, setup: Setup) -> tuple[int, int, int]:
    """Bytes of all linear layers' weights, of their quantization constants, and of the rest of the
    model while training: embedding, head, norms and experts.
    """
    layers = [
        compute_linear_bytes(shape, setup.bits, setup.double_quant)
        for layer in model.list_layers()
        for shape in layer.linear.values()
    ]
    weights, constants = map(sum, zip(*layers, strict=True))
    other_bits = setup.kept_bits if setup.bits < 16 else setup.bits
    return weights, constants, model.unquantized * other_bits // 8


def compute_activation_bytes(model: Model, setup: Setup, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of one micro-batch, without the logits.

    Counted over transformers' Llama layer as Korthikanti et al. 2022, sec. 4.1 count theirs, in
    mixed precision, with SDPA or flash attention (nothing grows with the square of the length) and
    frozen weights (a frozen layer keeps no input). A token and layer keep: two norms' float32
    inputs, 8·hidden; queries, keys, values and the attention's output, 2 bytes each; gate, its
    SiLU and up, 6·intermediate; for each targeted layer its input at 16 bits and a dropout mask,
    3·in; without an adapter every layer its input, 2·in. With checkpointing (Chen et al. 2016)
    each layer keeps its 16-bit input, 2·hidden, and one layer at a time is recomputed.
    """
    layers = map_layers(model, lambda layer: compute_layer_activations(model, layer, setup))
    tokens = setup.micro_batch * setup.row
    if not checkpointing:
        return tokens * sum(layers)
    size = model.layers * 2 * model.hidden
    if setup.bits == 8 and not setup.reentrant:
        # bitsandbytes' 8-bit product keeps its input as an attribute (`ctx.A`), where checkpoints
        # that are not reentrant cannot take it away: all layers' inputs stay.
        size += 2 * sum(map_layers(model, count_inputs))
    return tokens * (size + max(layers))


def count_inputs(layer: Layer) -> int:
    """Numbers that the linear layers of a decoder layer take; some take the same ones."""
    last = ("o_proj", "out_proj", "down_proj")
    taken = {
        path if path.rpartition(".")[2] in last else path.rpartition(".")[0]: width
        for path, (width, _) in layer.linear.items()
    }
    return sum(taken.values())


def compute_layer_activations(model: Model, layer: Layer, setup: Setup) -> int:
    """Bytes that a token keeps for the backward pass of a decoder layer.

    Attention of any kind keeps what its projections give and what its last one takes. Experts keep
    what a feed-forward layer of their common width keeps. Linear attention also makes its state at
    the end of each chunk of 64 tokens, at 16 bits (fla's chunk_gated_delta_rule).
    """
    feed_forward = layer.width
    attention = layer.state // CHUNK
    for path, (width, height) in layer.linear.items():
        block, _, name = path.rpartition(".")
        feed_forward += height if name == "gate_proj" else 0
        if block.endswith("attn"):
            attention += width if name in ("o_proj", "out_proj") else height
    size = 8 * model.hidden + 2 * attention + 6 * feed_forward
    size += 3 * sum(width for width, _ in select_targets(layer, setup).values())
    if not setup.rank:
        size += 2 * sum(width for width, _ in layer.linear.values())
    return size


def compute_memory(model: Model, setup: Setup) -> Memory:
    """Peak memory of one GPU.

    An adapter and its gradients are float32 (PEFT's `autocast_adapter_dtype`); a fully trained
    model has 16-bit weights and gradients (Dettmers et al. 2023 count so for their 780 GB).
    ZeRO (Rajbhandari et al. 2020, sec. 5) divides the optimizer's states (1), gradients too (2),
    weights too (3) among the GPUs. While it loads a quantized base, PEFT's
    `prepare_model_for_kbit_training` casts all that is not quantized to float32; Axolotl casts it
    back to 16 bits before the first step, plain PEFT does not (`kept_bits` 32).
    """
    sizes = list_trained_sizes(model, setup)
    count = sum(sizes)
    weights, constants, unquantized = compute_weight_bytes(model, setup)
    experts = unquantized * model.experts // model.unquantized
    quantized = setup.bits < 16
    states, gradients, parameters = (setup.gpus if setup.zero >= s else 1 for s in (1, 2, 3))
    per_parameter = OPTIMIZERS["8bit" if "8bit" in setup.optimizer else "adamw"]
    optimizer = int(count * per_parameter) // states
    large = sum(size for size in sizes if size >= PAGED_FROM)
    loaded = weights + constants + (4 * model.unquantized if quantized else unquantized)
    shapes = [shape for layer in model.list_layers() for shape in layer.linear.values()]
    largest = max(map(math.prod, shapes))
    return Memory(
        linear_weights=weights // parameters,
        quantization_constants=constants // parameters,
        embedding_head_norms=(unquantized - experts) // parameters,
        experts=experts // parameters,
        adapter=4 * count if setup.rank else 0,
        gradients=(4 if setup.rank else 2) * count // gradients,
        optimizer=optimizer,
        activations=compute_activation_bytes(model, setup, setup.checkpointing),
        # For each token and word of the vocabulary, transformers' causal loss holds the logits and
        # their gradient at 16 bits, the log-softmax and its gradient at 32. A fused loss such as
        # Liger's or cut cross entropy would save them.
        logits=12 * setup.micro_batch * setup.row * model.vocab,
        # bitsandbytes makes a layer's weights dense for its product; ZeRO-3 gathers them.
        dequantized_layer=2 * largest if quantized or parameters > 1 else 0,
        cuda_context=CONTEXT,
        activations_without_checkpointing=compute_activation_bytes(model, setup, False),
        loading=loaded // parameters + CONTEXT,
        paged=int(optimizer * (large / count)) if large and "paged" in setup.optimizer else 0,
    )


# ---- What to change where it does not fit


def list_reductions(setup: Setup, unpacked: int) -> Iterator[tuple[str, Setup]]:
    """Changes that take less memory, each on top of those before.

    Checkpointing, micro-batch and ZeRO change nothing that is learned and come first.
    `unpacked`: tokens of the longest row before packing.
    """
    if not setup.checkpointing:
        setup = replace(setup, checkpointing=True)
        yield "gradient_checkpointing: true", setup
    while setup.micro_batch > 1:
        half = setup.micro_batch // 2
        steps = math.ceil(setup.accumulation * setup.micro_batch / half)
        setup = replace(setup, micro_batch=half, accumulation=steps)
        yield f"micro_batch_size: {half}, gradient_accumulation_steps: {steps}", setup
    for stage in range(setup.zero + 1, 4) if setup.gpus > 1 else ():
        # ZeRO-3 cannot divide a base that bitsandbytes holds in 8 bits.
        if stage < 3 or setup.bits != 8:
            setup = replace(setup, zero=stage)
            yield f"deepspeed: ZeRO-{stage}", setup
    if unpacked < setup.row:
        setup = replace(setup, row=unpacked)
        yield "sample_packing: false", setup
    if setup.row > 512:
        setup = replace(setup, row=setup.row // 2)
        yield f"sequence_len: {setup.row} (longer rows are dropped)", setup
    if setup.bits > 4 and setup.rank:
        yield "load_in_4bit: true, adapter: qlora", replace(setup, bits=4, double_quant=True)


def suggest_changes(
    model: Model, setup: Setup, limit: float, unpacked: int
) -> list[tuple[str, int]]:
    """(change, new peak) for a setup over `limit` bytes, up to the first one that fits."""
    suggestions: list[tuple[str, int]] = []
    least = compute_memory(model, setup).least
    for text, changed in list_reductions(setup, unpacked):
        peak = compute_memory(model, changed).least
        if peak >= least:  # 4 bits, where most of the weights are experts, which PEFT makes float32
            continue
        suggestions.append((text, peak))
        least = peak
        if peak <= limit:
            break
    return suggestions
