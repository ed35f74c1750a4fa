"""The architectures of the bases: what the planner and the adapter checker compute with.

    architectures.find("meta-llama/Llama-3.1-8B-Instruct").parameters      8,030,261,248

They come from recipes/models/<model>.json, or from the config.json of a base that is on this
machine. No weights are read, and neither torch nor transformers is loaded.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tools import recipes
from tools.common import ROOT, WrongInput, nearest, parse_json, shown

FOLDER = ROOT / "recipes" / "models"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = {name: "self_attn" if name in MODULES[:4] else "mlp" for name in MODULES}


@dataclass(frozen=True)
class Model:
    """The architecture of a Llama-like decoder. `norms_per_layer` counts those of size `hidden`."""

    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norms_per_layer: int = 2
    qk_norm: bool = False
    model_type: str = "llama"  # as the base's config.json names it
    also: tuple[str, ...] = ()
    note: str = ""

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

    @property
    def linear(self) -> int:
        """Parameters that a quantized base quantizes: the linear layers without the head."""
        return self.layers * sum(a * b for a, b in self.shapes.values())

    @property
    def kept(self) -> int:
        """Parameters that stay unquantized: embedding, head (where it is another), norms."""
        norms = self.layers * self.norms_per_layer * self.hidden + self.hidden
        norms += self.layers * 2 * self.head_dim if self.qk_norm else 0
        return (1 if self.tied else 2) * self.vocab * self.hidden + norms

    @property
    def parameters(self) -> int:
        return self.linear + self.kept


@cache
def models() -> dict[str, Model]:
    """The architectures of recipes/models/, by each of their names in lower case."""
    found: dict[str, Model] = {}
    for path in sorted(FOLDER.glob("*.json")):
        facts = json.loads(path.read_bytes())
        model = Model(**facts | {"also": tuple(facts.get("also", ()))})
        found |= {name.lower(): model for name in (model.source, *model.also)}
    return found


def find_file(base: str, name: str) -> Path | None:
    """A file of a base: in its folder, or in the Hub's cache; None where it is in neither."""
    if (ROOT / base).is_dir():
        path = ROOT / base / name
        return path if path.is_file() else None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    if not (cache / f"models--{base.replace('/', '--')}").is_dir():
        return None  # without the Hub's library, which takes longer to load than a plan takes
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, name)
    return Path(cached) if isinstance(cached, str) else None


# What a base's config.json does not say of its architecture, by its `model_type`.
BY_TYPE: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True},
    "gemma3": {"qk_norm": True, "norms_per_layer": 4},
    "gemma3_text": {"qk_norm": True, "norms_per_layer": 4},
}


def find(base: str) -> Model:
    """The architecture of a base, from the JSON that names it or from the base's own config.json;
    WrongInput without either.
    """
    if model := models().get(recipes.canonical(base).lower()):
        return model
    if path := find_file(base, "config.json"):
        content = parse_json(path.read_bytes(), shown(path))
        text = content.get("text_config") or content
        if any(key in text for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise WrongInput(f"{shown(path)}: a mixture of experts cannot be planned")
        kind = str(content.get("model_type"))
        extra = BY_TYPE.get(kind, {}) | {"model_type": kind}
        return replace(of_config(base, content), **extra)
    hint = nearest(base, [name for m in models().values() for name in (m.source, *m.also)])
    raise WrongInput(
        f'{shown(FOLDER)} has no JSON for the base "{base}", and its config.json is neither in a '
        f"folder of that name nor in the Hub's cache{hint}"
    )


def of_config(name: str, config: dict[str, Any]) -> Model:
    """The architecture that a base's own `config.json` gives; WrongInput where it has none."""
    found = config.get("text_config", config)
    text = found if isinstance(found, dict) else {}

    def number(key: str, other: int = 0) -> int:
        value = text.get(key) or other
        if type(value) is not int or not 0 < value < 10**7:
            raise WrongInput(f"{name}: its config.json has no {key} that a decoder could have")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    return Model(
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
