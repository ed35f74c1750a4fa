"""Checks that a LoRA adapter is what its config says, before any of it is loaded.

    adapters.inspect(folder)                                          without knowing the base
    adapters.check(folder, architectures.find("meta-llama/Llama-3.1-8B-Instruct"))

Adapters come from strangers. `adapter_config.json` must describe LoRA, DoRA or rsLoRA that PEFT
loads faithfully; the safetensors file must hold exactly the tensors that this config implies on the
base; all numbers must be finite. PEFT then receives `Checked.peft_config`, which names every module
and contains no regular expression. Nothing here imports torch or PEFT.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tools import patterns
from tools.architectures import Model, UnknownLayers
from tools.common import WrongInput, digest, parse_json, refuse_other_content, shown

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number; adapters have no other types
LARGEST_HEADER = 4 * 2**20  # bytes; 80 layers with all modules and DoRA take 0.3 MB
MOST_ADDED_TOKENS = 2**16
# Values of --max-lora-rank in vLLM 0.32; `make serve` asks the installed vLLM.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Where transformers keeps the decoder layers: alone, and inside a model with a vision tower.
STEMS = ("model.layers", "model.language_model.layers", "language_model.model.layers")
# Keys of a config that have no effect once the adapter is trained.
HARMLESS = {
    *("inference_mode", "peft_version", "lora_dropout", "fan_in_fan_out"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}
# Keys that say what an adapter is and not what it computes.
DESCRIPTIVE = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "init_lora_weights"),
    "peft_type",
}
# What renders and tokenizes prompts, beside an adapter or a base.
TOKENIZER_FILES = (
    *("chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    "special_tokens_map.json",
)
LORA_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
EMBEDDING_TENSORS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# With added tokens PEFT writes each whole module twice more: as it was before training, and under
# the name that it has in memory.
COPIES = ("original_module", "modules_to_save")

Rank = Annotated[int, Field(ge=1, le=1024)]
Scale = Annotated[int | float, Field(gt=0, lt=1e6)]
Name = Annotated[str, Field(min_length=1, max_length=10_000)]  # or a regular expression
BaseName = Annotated[str, Field(pattern=r"^[^\x00]{0,1000}$")]
Names = Annotated[list[Name], Field(max_length=10_000)]
Layer = Annotated[int, Field(ge=0)]


class Module(NamedTuple):
    """A module of a base that can have an adapter. An embedding maps `inputs` tokens to vectors."""

    kind: str  # linear, embedding, or head: the linear layer that gives the logits
    inputs: int
    outputs: int


Modules = dict[str, Module]


class AutoMapping(BaseModel):
    parent_library: Annotated[str, Field(pattern=r"^((transformers|peft)(\..*)?)?$")] | None = None


class Settings(BaseModel):
    """An `adapter_config.json` that PEFT can load faithfully."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    base: BaseName | None = Field(None, alias="base_model_name_or_path")
    revision: str | None = None  # of the base
    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    auto_mapping: AutoMapping | None = None
    bias: Literal["none"] | None = None
    # The other initializations (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) rewrite the base's weights on
    # loading, so that base and adapter would be scored on another model. An adapter that PEFT's
    # `replace_lora_weights_loftq` initialized names none of them: it leaves the base as it is.
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = None
    rank: Rank = Field(alias="r")
    alpha: Scale = Field(alias="lora_alpha")
    rank_pattern: dict[Name, Rank] | None = None
    alpha_pattern: dict[Name, Scale] | None = None
    dora: bool | None = Field(None, alias="use_dora")
    rslora: bool | None = Field(None, alias="use_rslora")
    targets: Name | Annotated[Names, Field(min_length=1)] = Field(alias="target_modules")
    exclude_modules: Name | Names | None = None
    saved: Names | None = Field(None, alias="modules_to_save")  # modules trained whole
    layers_to_transform: Layer | list[Layer] | None = None
    layers_pattern: Name | Names | None = None

    def select(self, modules: Modules, where: str) -> dict[str, tuple[int, float]]:
        """{module: (rank, alpha)} of what has LoRA; raises WrongInput that names `where`."""
        config, names = self.model_dump(by_alias=True), list(modules)
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            names = [name for name, module in modules.items() if module.kind == "linear"]
            config["target_modules"] = names
        try:
            return patterns.select(config, names)
        except patterns.TooComplex as error:
            raise WrongInput(
                f"{where}: the regular expression in {error} is malformed or takes too long; a "
                "simpler expression, or names of modules, are needed"
            ) from None


# What each key must be; a key that is not here holds names of modules.
NEEDS = {
    "base_model_name_or_path": "the name of a base is needed",
    "revision": "the name of a revision is needed",
    "peft_type": "LORA is needed",
    "task_type": "only adapters of language models (CAUSAL_LM) are supported",
    "auto_mapping": "it may only name classes of transformers",
    "bias": "none is needed",
    "init_lora_weights": "it may rewrite the base's weights on loading; save the adapter converted "
    "to plain LoRA (PEFT's path_initial_model_for_weight_conversion)",
    "r": "a rank from 1 to 1024 is needed",
    "lora_alpha": "a positive number is needed",
    "rank_pattern": "ranks from 1 to 1024 are needed",
    "alpha_pattern": "positive numbers are needed",
    "use_dora": "true or false is needed",
    "use_rslora": "true or false is needed",
    "target_modules": "names of linear layers are needed",
    "layers_to_transform": "numbers of layers are needed",
}


def parse_settings(config: dict[str, Any], where: str) -> Settings:
    """The settings in an `adapter_config.json`; raises WrongInput if PEFT cannot load it
    faithfully.
    """

    def refuse(key: str, need: str) -> WrongInput:
        return WrongInput(f'{where}: "{key}" is {str(config.get(key))[:60]!r}; {need}')

    try:
        settings = Settings.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise refuse(key, NEEDS.get(key, "names of modules are needed")) from None
    for key, value in (settings.model_extra or {}).items():
        if value and key not in HARMLESS:
            raise refuse(key, "adapters with this setting are not supported")
    if settings.layers_to_transform not in (None, []) and isinstance(settings.targets, str):
        raise refuse("layers_to_transform", "it needs a list of target_modules")
    return settings


def list_modules(model: Model, stem: str) -> Modules:
    """The modules of a base that can have an adapter, by full name; its layers are at `stem`."""
    around = stem.removesuffix("layers")
    head = "language_model.lm_head" if stem.startswith("language_model.") else "lm_head"
    modules = {f"{around}embed_tokens": Module("embedding", model.vocab, model.hidden)}
    for number, layer in enumerate(model.list_layers()):
        for name, shape in layer.linear.items():
            modules[f"{stem}.{number}.{name}"] = Module("linear", *shape)
    return modules | {head: Module("head", model.hidden, model.vocab)}


def list_lora_tensors(
    modules: Modules, adapted: dict[str, tuple[int, float]], dora: bool | None
) -> dict[str, tuple[int, ...]]:
    """{tensor: shape}: A (r, in) and B (out, r) of each module, and DoRA's magnitudes (out,)."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rank, _) in adapted.items():
        kind, inputs, outputs = modules[name]
        names = EMBEDDING_TENSORS if kind == "embedding" else LORA_TENSORS
        shapes = [(rank, inputs), (outputs, rank), (outputs,)]
        for tensor, shape in zip(names, shapes if dora else shapes[:2], strict=False):
            tensors[f"base_model.model.{name}.{tensor}"] = shape
    return tensors


def compute_largest_file(model: Model, settings: Settings, where: str) -> int:
    """The most bytes that such an adapter's file can have: 32-bit numbers and a header.

    Raises WrongInput that names `where` if the config adapts nothing in the base.
    """
    sizes = []
    for stem in STEMS:
        modules = list_modules(model, stem)
        adapted = settings.select(modules, where)
        shapes = list_lora_tensors(modules, adapted, settings.dora).values()
        sizes.append(sum(4 * math.prod(shape) + 256 for shape in shapes))
    if not max(sizes):
        raise adapts_nothing(settings, model.source, where)
    size = max(sizes) + 65536
    if settings.saved or any("embed" in name or "lm_head" in name for name in settings.targets):
        # Embedding and head may be in the file, with added tokens (see `find_whole_weights`).
        embedding = 4 * (model.vocab + MOST_ADDED_TOKENS) * model.hidden
        size += (6 if settings.saved else 2) * embedding
    return size


def adapts_nothing(settings: Settings, base: str, where: str) -> UnknownLayers:
    targets = settings.targets
    names = targets if isinstance(targets, str) else ", ".join(targets)
    return UnknownLayers(
        f'{where}: "target_modules" is {names[:60]!r}, which is no linear layer of {base}; name '
        "its layers, or use a simpler expression"
    )


class Tensor(NamedTuple):
    """A tensor in a safetensors file; `begin` and `end` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, largest_header: int = LARGEST_HEADER) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises WrongInput unless they fill the file exactly."""
    from safetensors import SafetensorError, safe_open

    where = shown(path)
    with open(path, "rb") as file:
        refuse_other_content(file.read(512), where)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > largest_header:
            raise WrongInput(
                f"{where}: no safetensors file: its header claims {length:,} bytes of "
                f"{path.stat().st_size:,}"
            )
        header = file.read(length)
    try:
        if len(header) < length:
            raise SafetensorError(f"its header claims {length:,} bytes of {len(header):,}")
        entries = parse_json(header, f"{where}, header")
        with safe_open(path, "np"):  # checks types, shapes and places
            pass
    except SafetensorError as error:
        raise WrongInput(
            f"{where}: the file is cut off, or its header does not add up ({error}); download it "
            "again"
        ) from None
    entries.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in places))
        for name, entry in entries.items()
        for places in [entry["data_offsets"]]
    }


def is_finite(path: Path, tensor: Tensor) -> bool:
    """Whether a tensor of one of DTYPES holds no NaN and no infinity."""
    import numpy as np

    if tensor.begin == tensor.end:
        return True
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    values = np.memmap(path, kind, "r", tensor.begin, (math.prod(tensor.shape),))
    if tensor.dtype == "BF16":  # eight exponent bits, all set for NaN and infinity
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


@dataclass(frozen=True)
class Checked:
    """An adapter that fits its config and its base."""

    settings: Settings
    modules: Modules
    adapted: dict[str, tuple[int, float]]  # module: (rank, alpha)
    whole: tuple[str, ...]  # modules whose whole weights are in the file
    copies: frozenset[str]  # names of tensors in the file that are not loaded (see COPIES)
    rows: int | None  # of embedding and head, where tokens were added to the vocabulary
    parameters: int
    rounded: bool = False  # trained with the sum of base and adapter rounded (`merge_aware`)

    @cached_property
    def peft_config(self) -> dict[str, Any]:
        """Arguments of an equivalent LoraConfig without expressions or settings of no effect."""
        ranks = {f"^{re.escape(name)}": rank for name, (rank, _) in self.adapted.items()}
        alphas = {f"^{re.escape(name)}": alpha for name, (_, alpha) in self.adapted.items()}
        return {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "use_dora": bool(self.settings.dora),
            "use_rslora": bool(self.settings.rslora),
            "target_modules": list(self.adapted),
            "rank_pattern": {k: v for k, v in ranks.items() if v != self.settings.rank},
            "alpha_pattern": {k: v for k, v in alphas.items() if v != self.settings.alpha},
            "modules_to_save": list(self.whole) or None,
        }

    @property
    def touches_embeddings(self) -> bool:
        return any(self.modules[name].kind != "linear" for name in (*self.adapted, *self.whole))

    @property
    def unusual(self) -> str | None:
        """What it has beyond plain LoRA on linear layers, which vLLM does not serve."""
        if self.settings.dora:
            return "DoRA"
        if self.rounded:
            return "sum of base and adapter that is rounded to 4 bits"
        if len(set(self.adapted.values())) > 1:
            return "ranks or alphas that differ between modules"
        return "a trained embedding or head" if self.touches_embeddings else None


def read_adapter(folder: Path) -> tuple[Settings, dict[str, Tensor]]:
    """(settings, {tensor's name: tensor}) of a PEFT folder.

    Raises WrongInput where PEFT could load this adapter onto no base at all.
    """
    where, path = shown(folder / CONFIG), folder / WEIGHTS
    settings = parse_settings(parse_json((folder / CONFIG).read_bytes(), where), where)
    tensors = read_header(path)
    if not tensors:
        raise WrongInput(f"{shown(path)} holds no tensors: it is no adapter")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise WrongInput(
                f"{shown(path)}: {name[:80]!r} is {tensor.dtype}, none of {', '.join(DTYPES)}"
            )
    # Older versions of PEFT wrote DoRA's vector as the weight of a module.
    old = "lora_magnitude_vector.weight"
    return settings, {
        name.removesuffix(".weight") if name.endswith(old) else name: tensor
        for name, tensor in tensors.items()
    }


def identify(folder: Path) -> dict[str, str]:
    """SHA-256 of what an adapter's answers depend on: weights, tokenizer files, and the settings
    of its config that have an effect, in whatever order they are written.
    """
    where = shown(folder / CONFIG)
    settings = parse_settings(parse_json((folder / CONFIG).read_bytes(), where), where)
    content = settings.model_dump(by_alias=True) | {"lora_alpha": float(settings.alpha)}
    effective = {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in content.items()
        if value and key not in HARMLESS | DESCRIPTIVE
    }
    text = json.dumps(effective, sort_keys=True)
    files = [folder / name for name in (WEIGHTS, *TOKENIZER_FILES)]
    found = {file.name: digest(file) for file in files if file.is_file()}
    return found | {CONFIG: hashlib.sha256(text.encode()).hexdigest()}


def inspect(folder: Path) -> Settings:
    """The settings of an adapter; raises WrongInput where it can fit no base."""
    settings, tensors = read_adapter(folder)
    for name in tensors:
        if not name.startswith("base_model.model.") or re.search(
            r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)", name
        ):
            raise WrongInput(
                f"{shown(folder / WEIGHTS)} holds the tensor {name[:120]!r}, a name that PEFT does "
                "not load; names such as base_model.model.….q_proj.lora_A.weight are needed"
            )
    return settings


def check(folder: Path, model: Model) -> int:
    """The parameters of the adapter in `folder`; raises WrongInput unless it fits its config and
    `model`.
    """
    settings, tensors = read_adapter(folder)
    largest = compute_largest_file(model, settings, shown(folder / CONFIG))
    if (folder / WEIGHTS).stat().st_size > largest:
        raise WrongInput(f"{shown(folder / WEIGHTS)}: its config implies {largest:,} bytes at most")
    stem = next((s for s in STEMS if any(f".model.{s}." in name for name in tensors)), STEMS[0])
    return check_modules(folder, list_modules(model, stem), model.source).parameters


def check_modules(folder: Path, modules: Modules, base: str) -> Checked:
    """The adapter in `folder`; raises WrongInput unless it fits its config and a base's modules."""
    settings, tensors = read_adapter(folder)
    path, config = shown(folder / WEIGHTS), shown(folder / CONFIG)
    adapted = settings.select(modules, config)
    if not adapted:
        raise adapts_nothing(settings, base, config)
    ends = {name: module for name, module in modules.items() if module.kind != "linear"}
    whole, rows = find_whole_weights(folder, settings, ends, adapted, tensors)
    expected = list_lora_tensors(modules, adapted, settings.dora) | whole
    saved = tuple(name for name in modules if f"base_model.model.{name}.weight" in whole)
    copies = {f"base_model.model.{name}.{copy}.weight" for name in saved for copy in COPIES}
    for name in sorted((tensors.keys() - copies) ^ expected.keys()):
        problem = ("lacks", "asks for") if name in expected else ("holds", "does not name")
        raise WrongInput(
            f"{path} {problem[0]} the tensor {name[:120]!r}, which its config {problem[1]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise WrongInput(
                f"{path}: {name} has shape {list(tensors[name].shape)}; its config gives "
                f"{list(shape)} on {base}"
            )
        if not is_finite(folder / WEIGHTS, tensors[name]):
            raise WrongInput(f"{path}: {name} holds NaN or infinity")
    trained = (math.prod(s) for name, s in expected.items() if not name.endswith(BASE_LAYER))
    return Checked(settings, modules, adapted, saved, frozenset(copies), rows, sum(trained))


BASE_LAYER = ".base_layer.weight"


def find_whole_weights(
    folder: Path,
    settings: Settings,
    ends: Modules,
    adapted: dict[str, tuple[int, float]],
    tensors: dict[str, Tensor],
) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """({tensor: shape} of whole weights in the file, rows of a resized vocabulary).

    The `ends` of a model, embedding and head, may be saved whole: as `modules_to_save`, and by PEFT
    itself where tokens were added. Beside LoRA on one of them PEFT also saves the base's own weight
    (`base_layer`), which must be the base's when it is loaded (tools/models.py).
    """
    path = shown(folder / WEIGHTS)
    listed = set()
    for name in settings.saved or ():
        if not (matches := {end for end in ends if f".{end}".endswith(f".{name}")}):
            raise WrongInput(
                f'{shown(folder / CONFIG)}: "modules_to_save" names {name[:60]!r}; only the '
                f"embedding and the head ({', '.join(ends)}) are supported"
            )
        listed |= matches
    whole: dict[str, tuple[int, ...]] = {}
    vocabularies, missing = set(), []
    for name, (kind, inputs, outputs) in ends.items():
        shape = (inputs, outputs) if kind == "embedding" else (outputs, inputs)
        tensor = f"base_model.model.{name}.weight"
        beside = tensor.removesuffix(".weight") + BASE_LAYER
        if name in adapted or not (name in listed or tensor in tensors):
            missing.append(name)
            whole |= {beside: shape} if name in adapted and beside in tensors else {}
            continue
        rows, *width = tensors[tensor].shape if tensor in tensors else shape
        if width == [shape[1]] and 0 < rows - shape[0] <= MOST_ADDED_TOKENS:
            vocabularies.add(rows)
            shape = (rows, shape[1])
        whole[tensor] = shape
    if len(vocabularies) > 1:
        raise WrongInput(f"{path}: embedding and head have different numbers of rows")
    if not vocabularies:
        return whole, None
    problem = f"{path}: its vocabulary has {max(vocabularies):,} tokens, more than the base's"
    if missing:
        raise WrongInput(
            f"{problem}, and those of {missing[0]} are not in the file; train with "
            f"modules_to_save: [{', '.join(ends)}]"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise WrongInput(f"{problem}; the tokenizer that it was trained with must lie beside it")
    return whole, max(vocabularies)


def vllm_rank(rank: int, ranks: Iterable[int] = RANKS) -> int | None:
    """The smallest value of vLLM's --max-lora-rank that holds a rank; None where none does."""
    return next((value for value in ranks if value >= rank), None)
