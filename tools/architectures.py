"""The architectures of the bases, for the planner and the adapter checker.

    architectures.find("meta-llama/Llama-3.1-8B-Instruct").parameters      8,030,261,248

An architecture comes from recipes/models/<model>.json, or from the config.json of a base on this
machine. No weights are read, and neither torch nor transformers is imported.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tools import recipes
from tools.common import ROOT, WrongInput, nearest, read_json, shown

FOLDER = ROOT / "recipes" / "models"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = {name: "self_attn" if name in MODULES[:4] else "mlp" for name in MODULES}
# Linear layers of other kinds of attention, which can have an adapter as well.
LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `linear`: (in, out) of its linear layers, by name such as self_attn.q_proj.

    Experts are tensors of three dimensions, which bitsandbytes leaves at 16 bits.
    """

    linear: dict[str, tuple[int, int]]
    experts: int = 0  # their parameters
    active: int = 0  # of them, those that a token passes through
    width: int = 0  # of the experts' products that a token passes through, together
    state: int = 0  # numbers that linear attention keeps instead of keys and values


@dataclass(frozen=True)
class Model:
    """The architecture of a decoder: a Llama-like one, or one with layers of several `kinds`."""

    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norms_per_layer: int = 2  # norms of size `hidden`
    qk_norm: bool = False
    model_type: str = "llama"  # as the base's config.json names it
    also: tuple[str, ...] = ()  # other names of bases with this architecture
    note: str = ""  # what the plan leaves out
    # Where the layers are not Llama's: each kind, the kind of each layer, and the parameters in no
    # linear layer and no expert. `make add-model` writes them.
    kinds: dict[str, Layer] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    other_parameters: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers in one decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def list_layers(self) -> list[Layer]:
        """The decoder layers, from the first to the last."""
        if self.kinds:
            return [self.kinds[kind] for kind in self.order]
        named = {f"{BLOCKS[name]}.{name}": shape for name, shape in self.shapes.items()}
        return [Layer(named)] * self.layers

    @property
    def linear(self) -> int:
        """Parameters of the linear layers without the head, which are quantized."""
        layers = self.list_layers()
        return sum(rows * columns for layer in layers for rows, columns in layer.linear.values())

    @property
    def experts(self) -> int:
        """Parameters of the experts, which are not quantized."""
        return sum(layer.experts for layer in self.list_layers())

    @property
    def unquantized(self) -> int:
        """Parameters that are not quantized: embedding, head (unless tied), norms, experts."""
        if self.kinds:
            return self.other_parameters + self.experts
        norms = self.layers * self.norms_per_layer * self.hidden + self.hidden
        norms += self.layers * 2 * self.head_dim if self.qk_norm else 0
        return (1 if self.tied else 2) * self.vocab * self.hidden + norms

    @property
    def parameters(self) -> int:
        return self.linear + self.unquantized


def parse_architecture(content: dict[str, Any]) -> Model:
    """The architecture in a file of recipes/models/."""
    kinds = {}
    for name, layer in content.get("kinds", {}).items():
        shapes = {path: tuple(shape) for path, shape in layer["linear"].items()}
        kinds[name] = Layer(**layer | {"linear": shapes})
    order = [name for name, count in content.get("order", []) for _ in range(count)]
    lists = {"also": tuple(content.get("also", ())), "kinds": kinds, "order": tuple(order)}
    return Model(**content | lists)


@cache
def read_architectures() -> dict[str, Model]:
    """The architectures of recipes/models/, by each of their names in lower case."""
    architectures: dict[str, Model] = {}
    for path in sorted(FOLDER.glob("*.json")):
        model = parse_architecture(json.loads(path.read_bytes()))
        architectures |= {name.lower(): model for name in (model.source, *model.also)}
    return architectures


def base_folder(base: str) -> Path | None:
    """Where a base's files are: a folder of this machine or a snapshot in the Hub's cache."""
    if (ROOT / base).is_dir():
        return ROOT / base
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}").is_dir():
        return None  # the rest of the Hub's library takes longer to import than a whole plan
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def find_file(base: str, name: str) -> Path | None:
    """A file of a base in its `base_folder`; None where it is not there."""
    folder = base_folder(base)
    return folder / name if folder and (folder / name).is_file() else None


# What a base's config.json does not say about its architecture, by `model_type`.
BY_TYPE: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True},
    "gemma3": {"qk_norm": True, "norms_per_layer": 4},
    "gemma3_text": {"qk_norm": True, "norms_per_layer": 4},
}
# Keys of a config.json that only an architecture with layers of several kinds has.
SEVERAL_KINDS = {
    "a mixture of experts": {"num_experts", "num_local_experts", "n_routed_experts"},
    "linear attention": {"linear_num_value_heads"},
    "shared keys and values": {"num_kv_shared_layers"},
}


def find(base: str) -> Model:
    """The architecture of a base, from the JSON that names it or from the base's own config.json.

    Raises WrongInput where there is neither, and for layers that no config.json describes.
    """
    architectures = read_architectures()
    if model := architectures.get(recipes.resolve_mirror(base).lower()):
        return model
    path = find_file(base, "config.json")
    if not path:
        names = [name for model in architectures.values() for name in (model.source, *model.also)]
        raise WrongInput(
            f'{shown(FOLDER)} has no JSON for the base "{base}", and its config.json is neither in '
            f"a folder of that name nor in the Hub's cache{nearest(base, names)}"
        )
    content = read_json(path)
    text = find_text_part(content)
    for what, keys in SEVERAL_KINDS.items():
        if any(text.get(key) for key in keys):
            raise WrongInput(
                f"{shown(path)}: {what} cannot be planned from it; "
                "`make add-model` writes its architecture"
            )
    kind = str(content.get("model_type"))
    return replace(parse_config(base, content), model_type=kind, **BY_TYPE.get(kind, {}))


def find_text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that describes the language model."""
    text = config.get("text_config") or config
    return text if isinstance(text, dict) else {}


class UnknownLayers(WrongInput):
    """The layers of a base are not those of a Llama-like decoder."""


def parse_config(base: str, config: dict[str, Any]) -> Model:
    """The architecture in a base's own `config.json`; raises WrongInput where it has none."""
    text = find_text_part(config)

    def read_size(key: str, default: int = 0) -> int:
        value = text.get(key) or default
        if type(value) is not int or not 0 < value < 10**7:
            raise UnknownLayers(f"{base}: its config.json has no {key} that a decoder could have")
        return value

    heads, hidden = read_size("num_attention_heads"), read_size("hidden_size")
    return Model(
        source=base,
        layers=read_size("num_hidden_layers"),
        hidden=hidden,
        intermediate=read_size("intermediate_size"),
        heads=heads,
        kv_heads=read_size("num_key_value_heads", heads),
        head_dim=read_size("head_dim", hidden // heads),
        vocab=read_size("vocab_size"),
        tied=bool(text.get("tie_word_embeddings")),
    )
