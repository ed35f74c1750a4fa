"""Checks that a LoRA adapter is what its config says, before any of it is loaded.

    adapters.inspect(folder)                                          without knowing the base
    adapters.check(folder, architectures.find("meta-llama/Llama-3.1-8B-Instruct"))

Adapters come from strangers, so they are read as bytes: `adapter_config.json` must describe LoRA,
DoRA or rsLoRA that PEFT loads faithfully; the safetensors header must hold exactly the tensors that
this config gives on the base; and their numbers must be finite. PEFT is then handed
`Checked.peft_config`, in which every module is named and no expression is left. Nothing here
imports torch or PEFT.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tools import architectures, patterns
from tools.architectures import Model
from tools.common import WrongInput, parse_json, refuse_other_content, shown

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Bytes of a number, as safetensors names its type; adapters have no others.
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
LARGEST_HEADER = 4 * 2**20  # bytes; 80 layers with all modules and DoRA make 0.3 MB
MOST_ADDED_TOKENS = 2**16
# Where transformers keeps the decoder layers: alone, and inside a model with a vision tower.
# Values of --max-lora-rank in vLLM 0.32; `make serve` asks the vLLM that is installed.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
STEMS = ("model.layers", "model.language_model.layers", "language_model.model.layers")

# Initializations that leave the base's weights alone. The others (PiSSA, OLoRA, LoftQ, CorDA,
# LoRA-GA) rewrite them on loading, so that base and adapter would be scored on another model.
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys of a config that are read here.
READ = {
    *("peft_type", "task_type", "auto_mapping", "r", "lora_alpha", "bias", "init_lora_weights"),
    *("use_dora", "use_rslora", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
}
# Keys that change nothing once the adapter is trained, whatever they say. The settings of an
# initialization are among them: INITIALIZATIONS decides.
HARMLESS = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout"),
    *("fan_in_fan_out", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
}
LORA_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
EMBEDDING_TENSORS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# Where tokens were added, PEFT writes each module that was saved whole twice more: as it was before
# training, and under the name that it has in memory.
COPIES = ("original_module", "modules_to_save")


class Module(NamedTuple):
    """A module of a base that can have an adapter. An embedding maps `inputs` tokens to vectors."""

    kind: str  # linear, embedding, or head: the linear layer that gives the logits
    inputs: int
    outputs: int


Modules = dict[str, Module]


@dataclass(frozen=True)
class Plain:
    """What of an `adapter_config.json` decides which tensors there are."""

    rank: int
    dora: bool
    targets: tuple[str, ...] | str  # names or ends of names of modules, or a regular expression
    alpha: float = 1.0
    rslora: bool = False
    saved: tuple[str, ...] = ()  # modules that were trained whole
    more: dict[str, Any] = field(default_factory=dict)  # exclude_modules, rank_pattern, …

    def select(self, modules: Modules, where: str) -> dict[str, tuple[int, float]]:
        """{module: (rank, alpha)} of what has LoRA; raises WrongInput that names `where`."""
        targets: Any = self.targets if isinstance(self.targets, str) else list(self.targets)
        names = list(modules)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = names = [name for name, module in modules.items() if module.kind == "linear"]
        config = {"target_modules": targets, "r": self.rank, "lora_alpha": self.alpha}
        config |= {"modules_to_save": list(self.saved)} | self.more
        try:
            return patterns.select(config, names)
        except patterns.TooComplex:
            keys = ", ".join(k for k in patterns.EXPRESSIONS if _is_expression(config.get(k)))
            raise WrongInput(
                f"{where}: the regular expression in {keys} is malformed or takes too long; a "
                "simpler expression, or names of modules, are needed"
            ) from None


def _is_expression(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else list(value or ())
    return not all(patterns.NAME.fullmatch(text) for text in texts)


def settings(config: dict[str, Any], where: str) -> Plain:
    """What an `adapter_config.json` says; raises WrongInput if PEFT cannot load it faithfully."""

    def refuse(key: str, need: str) -> WrongInput:
        return WrongInput(f'{where}: "{key}" is {str(config.get(key))[:60]!r}; {need}')

    def texts(key: str, value: Any) -> list[str]:
        listed = [value] if isinstance(value, str) else list(value or ())
        if not all(isinstance(text, str) and 0 < len(text) <= 10_000 for text in listed):
            raise refuse(key, "names of modules are needed")
        if len(listed) > 10_000 or not isinstance(value, str | list | dict | None):
            raise refuse(key, "names of modules are needed")
        return listed

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA is needed")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise refuse("task_type", "only adapters of language models (CAUSAL_LM) are supported")
    if config.get("bias") not in ("none", None):
        raise refuse("bias", "none is needed")
    initialization = config.get("init_lora_weights")
    if type(initialization) in (int, float) or initialization not in INITIALIZATIONS:
        raise refuse(
            "init_lora_weights",
            "it may rewrite the base's weights on loading; save the adapter converted to plain "
            "LoRA (PEFT's path_initial_model_for_weight_conversion)",
        )
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library", "") if isinstance(mapping, dict) else None
    if library and str(library).split(".")[0] not in ("transformers", "peft"):
        raise refuse("auto_mapping", "it may name classes of transformers alone")
    for key in config.keys() - READ - HARMLESS:
        if config[key] not in (None, False, "") and config[key] != {} and config[key] != []:
            raise refuse(key, "adapters with this setting are not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = (_numbers(config.get(f"{key}_pattern")) for key in ("rank", "alpha"))
    if type(rank) is not int or not 1 <= rank <= 1024:
        raise refuse("r", "a rank from 1 to 1024 is needed")
    if not all(type(value) is int and 1 <= value <= 1024 for value in ranks):
        raise refuse("rank_pattern", "ranks from 1 to 1024 are needed")
    if not _is_scale(alpha):
        raise refuse("lora_alpha", "a positive number is needed")
    if not all(map(_is_scale, alphas)):
        raise refuse("alpha_pattern", "positive numbers are needed")
    for key in ("use_dora", "use_rslora"):
        if config.get(key) not in (True, False, None):
            raise refuse(key, "true or false is needed")
    targets = config.get("target_modules")
    if not texts("target_modules", targets) or isinstance(targets, dict):
        raise refuse("target_modules", "names of linear layers are needed")
    layers = config.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise refuse("layers_to_transform", "numbers of layers are needed")
    if numbers and isinstance(targets, str):
        raise refuse("layers_to_transform", "it needs a list of target_modules")
    keys = ("exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
    for key in keys:
        texts(key, config.get(key))
    saved = texts("modules_to_save", config.get("modules_to_save"))
    more = {key: config[key] for key in (*keys, "layers_to_transform") if config.get(key)}
    if config.get("layers_to_transform") == 0:
        more["layers_to_transform"] = [0]
    return Plain(
        rank=rank,
        dora=bool(config.get("use_dora")),
        targets=targets if isinstance(targets, str) else tuple(targets),  # type: ignore[arg-type]
        alpha=alpha,  # type: ignore[arg-type]
        rslora=bool(config.get("use_rslora")),
        saved=tuple(saved),
        more=more,
    )


def _numbers(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else [pattern] if pattern else []


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def modules_of(model: Model, stem: str) -> Modules:
    """The modules of a base that can have an adapter, by their full names."""
    around = stem.removesuffix("layers")
    head = "language_model.lm_head" if stem.startswith("language_model.") else "lm_head"
    modules = {f"{around}embed_tokens": Module("embedding", model.vocab, model.hidden)}
    for layer in range(model.layers):
        for name, shape in model.shapes.items():
            block = "self_attn" if name in architectures.MODULES[:4] else "mlp"
            modules[f"{stem}.{layer}.{block}.{name}"] = Module("linear", *shape)
    return modules | {head: Module("head", model.hidden, model.vocab)}


def expected(model: Model, plain: Plain, stem: str) -> dict[str, tuple[int, ...]]:
    """The LoRA tensors of an adapter on a decoder whose layers are at `stem`, by name."""
    modules = modules_of(model, stem)
    return lora_tensors(modules, plain, plain.select(modules, "the adapter"))


def lora_tensors(
    modules: Modules, plain: Plain, adapted: dict[str, tuple[int, float]]
) -> dict[str, tuple[int, ...]]:
    """{tensor: shape}: A (r, in) and B (out, r) of each layer, and DoRA's magnitudes (out,)."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rank, _) in adapted.items():
        kind, inputs, outputs = modules[name]
        names = EMBEDDING_TENSORS if kind == "embedding" else LORA_TENSORS
        shapes = ((rank, inputs), (outputs, rank), (outputs,))
        count = 3 if plain.dora else 2
        for tensor, shape in zip(names[:count], shapes[:count], strict=True):
            tensors[f"base_model.model.{name}.{tensor}"] = shape
    return tensors


def largest(model: Model, plain: Plain, where: str) -> int:
    """Bytes that the file of such an adapter has at most: 32-bit numbers and a header.

    Raises WrongInput that names `where` if the config adapts what the base does not have.
    """
    most = 0
    for stem in STEMS:
        modules = modules_of(model, stem)
        adapted = plain.select(modules, where)
        shapes = list(lora_tensors(modules, plain, adapted).values()) if adapted else []
        most = max(most, sum(4 * math.prod(shape) + 256 for shape in shapes))
    if not most:
        raise _adapts_nothing(plain, model.source, where)
    # Embedding and head may be in the file, too, with added tokens (see `_check_saved`).
    embeddings = (6 if plain.saved else 2) * 4 * (model.vocab + MOST_ADDED_TOKENS) * model.hidden
    embedded = plain.saved or any("embed" in t or "lm_head" in t for t in plain.targets)
    return most + 65536 + (embeddings if embedded else 0)


def _adapts_nothing(plain: Plain, base: str, where: str) -> WrongInput:
    targets = plain.targets if isinstance(plain.targets, str) else ", ".join(plain.targets)
    return WrongInput(
        f'{where}: "target_modules" is {targets[:60]!r}, which is no linear layer of {base}; names '
        "of its layers, or a simpler expression, are needed"
    )


def header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """The tensors of a safetensors file, {name: (dtype, shape, begin, end)}, and its data's place.

    Read with bounds, as https://huggingface.co/docs/safetensors#format has it: 8 bytes of length,
    that much JSON, and the numbers, without holes and without overlaps. Raises WrongInput.
    """
    tensors, start = entries(path)
    for name, (kind, _, _, _) in tensors.items():
        if kind not in DTYPES:
            raise WrongInput(
                f"{shown(path)}: {name[:80]!r} is {kind[:20]}, none of {', '.join(DTYPES)}"
            )
    return tensors, start


# Bits of a number of each type that safetensors knows.
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16}
BITS |= {"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {name: 8 * size for name, size in DTYPES.items()}


def entries(
    path: Path, largest_header: int = LARGEST_HEADER
) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """As `header`, of a safetensors file with numbers of any type."""
    size, where = path.stat().st_size, shown(path)
    with open(path, "rb") as file:
        refuse_other_content(file.read(512), where)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > largest_header:
            raise WrongInput(
                f"{where}: no safetensors file: its header claims {length:,} bytes of {size:,}"
            )
        if length > size - 8:
            raise WrongInput(
                f"{where}: the file is cut off: its header claims {length:,} bytes of {size:,}; "
                "download it again"
            )
        listed = parse_json(file.read(length), f"{where}, header")
    metadata = listed.pop("__metadata__", {})
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WrongInput(f"{where}: its metadata are no texts")
    for name, entry in listed.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise WrongInput(f"{where}: the entry of {name[:80]!r} is malformed") from None
        sound = all(type(number) is int and number >= 0 for number in numbers)
        bits = BITS.get(str(kind))
        if not sound or bits and 8 * (end - begin) != bits * math.prod(shape):
            raise WrongInput(f"{where}: the entry of {name[:80]!r} does not add up")
        tensors[name] = (str(kind), shape, begin, end)
    at = 0
    for _, _, begin, end in sorted(tensors.values(), key=lambda entry: entry[2]):
        if begin != at:
            raise WrongInput(f"{where}: its tensors overlap or leave holes")
        at = end
    if (there := size - 8 - length) < at:
        raise WrongInput(
            f"{where}: the file is cut off: its tensors end at byte {at:,} of {there:,}; download "
            "it again"
        )
    if there > at:
        raise WrongInput(f"{where}: its tensors end at byte {at:,} of {there:,}")
    return tensors, 8 + length


def finite(path: Path, dtype: str, start: int, end: int) -> bool:
    """Whether a file's bytes from `start` to `end`, numbers of `dtype`, hold no NaN or infinity."""
    import numpy as np

    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    count = (end - start) // DTYPES[dtype]
    if count == 0:
        return True
    values = np.memmap(path, kind, "r", offset=start, shape=(count,))
    if dtype == "BF16":  # eight exponent bits, all set for NaN and infinity
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


@dataclass(frozen=True)
class Checked:
    """An adapter that fits its config and its base."""

    plain: Plain
    modules: Modules
    adapted: dict[str, tuple[int, float]]  # module: (rank, alpha)
    saved: tuple[str, ...]  # modules whose whole weights are in the file
    copies: frozenset[str]  # names of tensors in the file that are not loaded (see COPIES)
    rows: int | None  # of embedding and head, where tokens were added to the vocabulary
    parameters: int

    @cached_property
    def peft_config(self) -> dict[str, Any]:
        """The LoraConfig that says the same without expressions or settings of no effect."""
        ranks = {f"^{re.escape(name)}": rank for name, (rank, _) in self.adapted.items()}
        alphas = {f"^{re.escape(name)}": alpha for name, (_, alpha) in self.adapted.items()}
        return {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.plain.rank,
            "lora_alpha": self.plain.alpha,
            "use_dora": self.plain.dora,
            "use_rslora": self.plain.rslora,
            "target_modules": list(self.adapted),
            "rank_pattern": {k: v for k, v in ranks.items() if v != self.plain.rank},
            "alpha_pattern": {k: v for k, v in alphas.items() if v != self.plain.alpha},
            "modules_to_save": list(self.saved) or None,
        }

    @property
    def unusual(self) -> str | None:
        """What it has beyond plain LoRA on linear layers, which vLLM does not serve."""
        if self.plain.dora:
            return "DoRA"
        if len(set(self.adapted.values())) > 1:
            return "ranks or alphas that differ between modules"
        if self.saved or any(self.modules[name].kind != "linear" for name in self.adapted):
            return "a trained embedding or head"
        return None

    @property
    def touches_embeddings(self) -> bool:
        kinds = {self.modules[name].kind for name in (*self.adapted, *self.saved)}
        return kinds != {"linear"}


def read(folder: Path) -> tuple[Plain, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """(what its config says, {tensor: (dtype, shape, place in the file)}) of a PEFT folder.

    Raises WrongInput where PEFT could load this adapter onto no base at all.
    """
    where, path = shown(folder / CONFIG), folder / WEIGHTS
    plain = settings(parse_json((folder / CONFIG).read_bytes(), where), where)
    tensors, start = header(path)
    if not tensors:
        raise WrongInput(f"{shown(path)} holds no tensors: it is no adapter")
    # Older versions of PEFT wrote DoRA's vector as the weight of a module.
    by_name = {
        re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name): (
            dtype,
            shape,
            start + a,
            start + b,
        )
        for name, (dtype, shape, a, b) in tensors.items()
    }
    return plain, by_name


def inspect(folder: Path) -> None:
    """Raises WrongInput where an adapter can fit no base: what can be told without knowing it."""
    _, tensors = read(folder)
    path = shown(folder / WEIGHTS)
    for name in tensors:
        if not name.startswith("base_model.model.") or re.search(
            r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)", name
        ):
            raise WrongInput(
                f"{path} holds the tensor {name[:120]!r}, a name that PEFT does not load; names "
                "such as base_model.model.….q_proj.lora_A.weight are needed"
            )


def check(folder: Path, model: Model) -> int:
    """Raises WrongInput unless the adapter in `folder` fits its config and `model`.

    Returns how many parameters it has.
    """
    plain, tensors = read(folder)
    most = largest(model, plain, shown(folder / CONFIG))
    size = (folder / WEIGHTS).stat().st_size
    if size > most:
        raise WrongInput(f"{shown(folder / WEIGHTS)}: its config implies {most:,} bytes at most")
    stem = next((s for s in STEMS if any(f".model.{s}." in name for name in tensors)), STEMS[0])
    return check_modules(folder, modules_of(model, stem), model.source).parameters


def check_modules(folder: Path, modules: Modules, base: str) -> Checked:
    """The adapter in `folder`; raises WrongInput unless it fits its config and a base's modules."""
    plain, tensors = read(folder)
    path, config = shown(folder / WEIGHTS), shown(folder / CONFIG)
    adapted = plain.select(modules, config)
    if not adapted:
        raise _adapts_nothing(plain, base, config)
    wanted = lora_tensors(modules, plain, adapted)
    saved, rows, whole = _check_saved(folder, plain, modules, adapted, tensors)
    wanted |= whole
    copies = {f"base_model.model.{name}.{copy}.weight" for name in saved for copy in COPIES}
    for name in sorted((tensors.keys() - copies) ^ wanted.keys()):
        verb, clause = (
            ("lacks", "which its config asks for")
            if name in wanted
            else ("holds", "which its config does not name")
        )
        raise WrongInput(f"{path} {verb} the tensor {name[:120]!r}, {clause}")
    for name, shape in wanted.items():
        dtype, there, begin, end = tensors[name]
        if there != shape:
            raise WrongInput(
                f"{path}: {name} has shape {list(there)}; its config gives {list(shape)} on {base}"
            )
        if not finite(folder / WEIGHTS, dtype, begin, end):
            raise WrongInput(f"{path}: {name} holds NaN or infinity")
    parameters = sum(math.prod(s) for n, s in wanted.items() if not n.endswith("base_layer.weight"))
    return Checked(plain, modules, adapted, saved, frozenset(copies), rows, parameters)


def _check_saved(
    folder: Path,
    plain: Plain,
    modules: Modules,
    adapted: dict[str, tuple[int, float]],
    tensors: dict[str, Any],
) -> tuple[tuple[str, ...], int | None, dict[str, tuple[int, ...]]]:
    """(modules saved whole, rows of a resized vocabulary, {tensor: shape} of whole weights).

    Embedding and head may be saved whole: as `modules_to_save`, and by PEFT itself where tokens
    were added. Beside LoRA on one of them PEFT also saves the base's own weight (`base_layer`),
    which must be the base's when it is loaded (tools/models.py).
    """
    path, config = shown(folder / WEIGHTS), shown(folder / CONFIG)
    ends = {name: module for name, module in modules.items() if module.kind != "linear"}
    for listed in plain.saved:
        if not any(name == listed or name.endswith(f".{listed}") for name in ends):
            raise WrongInput(
                f'{config}: "modules_to_save" names {listed[:60]!r}; only the embedding and the '
                f"head ({', '.join(ends)}) are supported"
            )
    saved: list[str] = []
    whole: dict[str, tuple[int, ...]] = {}
    rows: int | None = None
    for name, (kind, inputs, outputs) in ends.items():
        tensor = f"base_model.model.{name}.weight"
        beside = f"base_model.model.{name}.base_layer.weight"
        size, width = (inputs, outputs) if kind == "embedding" else (outputs, inputs)
        if name in adapted:
            whole |= {beside: (size, width)} if beside in tensors else {}
            continue
        asked = any(name == listed or name.endswith(f".{listed}") for listed in plain.saved)
        if not asked and tensor not in tensors:
            continue
        saved.append(name)
        there = tensors[tensor][1] if tensor in tensors else (size, width)
        if len(there) == 2 and there[1] == width and size < there[0] <= size + MOST_ADDED_TOKENS:
            if rows not in (None, there[0]):
                raise WrongInput(f"{path}: embedding and head have different numbers of rows")
            rows, size = there[0], there[0]
        whole[tensor] = (size, width)
    if rows and len(saved) < len(ends):
        other = next(name for name in ends if name not in saved)
        raise WrongInput(
            f"{path}: its vocabulary has {rows:,} tokens, more than the base's, and those of "
            f"{other} are not in the file; train with modules_to_save: [{', '.join(ends)}]"
        )
    if rows and not (folder / "tokenizer_config.json").is_file():
        raise WrongInput(
            f"{path}: its vocabulary has {rows:,} tokens, more than the base's; the tokenizer that "
            "it was trained with must lie beside it"
        )
    return tuple(saved), rows, whole


def vllm_rank(rank: int, ranks: Iterable[int] = RANKS) -> int | None:
    """The least of vLLM's values of --max-lora-rank that holds a rank; None where none does."""
    return next((most for most in ranks if most >= rank), None)
