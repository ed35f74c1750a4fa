"""Tells whether a LoRA adapter is what its config says, before any of it is loaded.

    adapter.check(folder, plan.find_model("meta-llama/Llama-3.1-8B-Instruct"))

What comes from a stranger is read as bytes: `adapter_config.json` must describe plain LoRA, DoRA or
rsLoRA; the safetensors header must hold exactly the tensors that this config gives on the base's
architecture, and its numbers must be finite. Nothing here imports torch or PEFT.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import plan
from tools.cli import WrongInput, shown

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Bytes of a number, as safetensors names its type; adapters have no others.
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
LARGEST_HEADER = 4 * 2**20  # bytes; 80 layers with all modules and DoRA make 0.3 MB
# Where transformers keeps the decoder layers: alone, and inside a model with a vision tower.
STEMS = ("model.layers", "model.language_model.layers", "language_model.model.layers")
# Options of PEFT that change which tensors there are, or what is imported; none is plain LoRA.
UNUSED = [
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "corda_config"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "layer_replication"),
    *("layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config"),
    *("modules_to_save", "monteclora_config", "rank_pattern", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where a key stands in it twice."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`; raises WrongInput that names `where`."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WrongInput(f"{where}: not JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise WrongInput(f"{where}: an object is needed")
    return found


@dataclass(frozen=True)
class Plain:
    """What of an `adapter_config.json` decides which tensors there are."""

    rank: int
    dora: bool
    targets: tuple[str, ...] | str  # names or ends of names of modules, or a regular expression

    def adapts(self, module: str) -> bool:
        """Whether a linear layer of the base, by its full name, has an adapter, as PEFT decides."""
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or bool(re.fullmatch(self.targets, module))
        return any(module == name or module.endswith(f".{name}") for name in self.targets)


def settings(config: dict[str, Any], where: str) -> Plain:
    """What an `adapter_config.json` says; raises WrongInput if it is not plain LoRA."""

    def refuse(key: str, need: str) -> WrongInput:
        return WrongInput(f'{where}: "{key}" is {str(config.get(key))[:60]!r}; {need}')

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA is needed")
    if config.get("bias") not in ("none", None):
        raise refuse("bias", "none is needed")
    for key in UNUSED:
        if config.get(key):
            raise refuse(key, "only plain LoRA, DoRA and rsLoRA are taken")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 1024:
        raise refuse("r", "a rank from 1 to 1024 is needed")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise refuse("lora_alpha", "a positive number is needed")
    modules = config.get("target_modules")
    targets = [modules] if isinstance(modules, str) else modules
    if not isinstance(targets, list) or not 0 < len(targets) <= 1000:
        raise refuse("target_modules", "names of linear layers are needed")
    if not all(isinstance(name, str) and 0 < len(name) <= 500 for name in targets):
        raise refuse("target_modules", "names of linear layers are needed")
    if isinstance(modules, str):
        # A regular expression of a stranger must not take for ever: `\d+` is all that may repeat.
        try:
            sound = not re.search(r"[*+?{\[]", modules.replace(r"\d+", "")) and re.compile(modules)
        except re.error:
            sound = False
        if not sound:
            raise refuse("target_modules", "a simpler expression is needed")
    return Plain(
        rank, bool(config.get("use_dora")), modules if isinstance(modules, str) else tuple(targets)
    )


def linear(model: plan.Model, stem: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(full name, (in, out)) of every linear layer of a base's decoder."""
    for layer in range(model.layers):
        for name, shape in model.shapes.items():
            block = "self_attn" if name in plan.MODULES[:4] else "mlp"
            yield f"{stem}.{layer}.{block}.{name}", shape


def expected(model: plan.Model, plain: Plain, stem: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter, by name: A (r, in) and B (out, r) of each layer, DoRA's (out,)."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (width, height) in linear(model, stem):
        if plain.adapts(module):
            found[f"base_model.model.{module}.lora_A.weight"] = (plain.rank, width)
            found[f"base_model.model.{module}.lora_B.weight"] = (height, plain.rank)
            if plain.dora:
                found[f"base_model.model.{module}.lora_magnitude_vector"] = (height,)
    return found


def largest(model: plan.Model, plain: Plain, where: str) -> int:
    """Bytes that the file of such an adapter has at most: 32-bit numbers and a header.

    Raises WrongInput that names `where` if the config adapts what the base does not have.
    """
    modules = [name for stem in STEMS for name, _ in linear(model, stem)]
    for each in (
        [plain.targets] if isinstance(plain.targets, str) else [(n,) for n in plain.targets]
    ):
        if not any(Plain(1, False, each).adapts(module) for module in modules):
            raise WrongInput(f"{where}: {str(each)[:60]} is no linear layer of {model.source}")
    kinds = [expected(model, plain, stem) for stem in STEMS]
    return max(sum(4 * math.prod(s) + 256 for s in shapes.values()) for shapes in kinds) + 65536


def header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """The tensors of a safetensors file, {name: (dtype, shape, begin, end)}, and its data's place.

    Read with bounds, as https://huggingface.co/docs/safetensors#format has it: 8 bytes of length,
    that much JSON, and the numbers, without holes and without overlaps. Raises WrongInput.
    """
    size, where = path.stat().st_size, shown(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise WrongInput(f"{where}: its header claims {length:,} bytes of {size:,}")
        listed = read_json(file.read(length), where)
    metadata = listed.pop("__metadata__", {})
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WrongInput(f"{where}: its metadata are no texts")
    for name, entry in listed.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise WrongInput(f"{where}: the entry of {name[:80]!r} is malformed") from None
        if kind not in DTYPES:
            raise WrongInput(
                f"{where}: {name[:80]!r} is {str(kind)[:20]}, none of {', '.join(DTYPES)}"
            )
        sound = all(type(number) is int and number >= 0 for number in numbers)
        if not sound or end - begin != DTYPES[kind] * math.prod(shape):
            raise WrongInput(f"{where}: the entry of {name[:80]!r} does not add up")
        found[name] = (kind, shape, begin, end)
    at = 0
    for _, _, begin, end in sorted(found.values(), key=lambda entry: entry[2]):
        if begin != at:
            raise WrongInput(f"{where}: its tensors overlap or leave holes")
        at = end
    if at != size - 8 - length:
        raise WrongInput(f"{where}: its tensors end at byte {at:,} of {size - 8 - length:,}")
    return found, 8 + length


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


def check(folder: Path, model: plan.Model) -> int:
    """Raises WrongInput unless the adapter in `folder` fits its config and `model`.

    Returns how many parameters it has.
    """
    path = folder / WEIGHTS
    content = read_json((folder / CONFIG).read_bytes(), shown(folder / CONFIG))
    plain = settings(content, shown(folder / CONFIG))
    found, start = header(path)
    # Older versions of PEFT wrote DoRA's vector as the weight of a module.
    by_name = {
        re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name): entry
        for name, entry in found.items()
    }
    stem = next((s for s in STEMS if any(f".{s}." in name for name in by_name)), STEMS[0])
    most = largest(model, plain, shown(folder / CONFIG))
    if path.stat().st_size > most:
        raise WrongInput(f"{shown(path)}: its config implies {most:,} bytes at most")
    wanted = expected(model, plain, stem)
    for name in sorted(by_name.keys() ^ wanted.keys()):
        verb = "lacks" if name in wanted else "holds"
        against = (
            "which its config asks for" if name in wanted else "which its config does not name"
        )
        raise WrongInput(f"{shown(path)} {verb} the tensor {name[:120]!r}, {against}")
    for name, shape in wanted.items():
        dtype, there, begin, end = by_name[name]
        if there != shape:
            raise WrongInput(
                f"{shown(path)}: {name} has shape {list(there)}; its config gives {list(shape)} "
                f"on {model.source}"
            )
        if not finite(path, dtype, start + begin, start + end):
            raise WrongInput(f"{shown(path)}: {name} holds NaN or infinity")
    return sum(math.prod(shape) for shape in wanted.values())


def architecture(name: str, config: dict[str, Any]) -> plan.Model:
    """The architecture that a base's own `config.json` gives; WrongInput where it has none."""
    found = config.get("text_config", config)
    text = found if isinstance(found, dict) else {}

    def number(key: str, other: int = 0) -> int:
        value = text.get(key) or other
        if type(value) is not int or not 0 < value < 10**7:
            raise WrongInput(f"{name}: its config.json has no {key} that a decoder could have")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    return plan.Model(
        source=name,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocab=number("vocab_size"),
        tied=bool(text.get("tie_word_embeddings")),
    )
