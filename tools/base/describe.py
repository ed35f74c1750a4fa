"""Reads the architecture of a base from its config.json, as transformers builds it.

    describe_architecture("owner/name", read_config(folder))

It returns the content of recipes/models/<model>.json. The model is built without weights. Layers
that are not Llama's (linear attention, experts, layers that share keys and values) are written out
by kind, with the sizes that transformers gives them.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from tools import architectures, models
from tools.architectures import Layer, Model, parse_architecture
from tools.common import WrongInput
from tools.train.memory import GIB


def build_empty(config: Any) -> Any:
    """A model of a config on the meta device: its weights take no memory."""
    import torch

    with torch.device("meta"):
        return models.find_loader(config).from_config(config)


def find_decoder(model: Any) -> Any:
    """The language model of a model, whose `layers` are the decoder's."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise WrongInput(
            f"{type(model).__name__} has no decoder layers, and only decoders can be added"
        )
    return decoder


def list_expert_modules(layer: Any) -> list[Any]:
    """The modules of a layer whose own weights are tensors of three dimensions, one per expert."""
    import torch

    return [
        module
        for module in layer.modules()
        if not isinstance(module, torch.nn.Conv1d)
        and any(weight.dim() == 3 for weight in module.parameters(recurse=False))
    ]


def describe_layer(layer: Any, text: Any) -> Layer:
    """A decoder layer as the planner knows it; `text` is the config of the language model."""
    import torch

    linear = {
        name: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    state = experts = active = width = 0
    if any(name.startswith("linear_attn.") for name in linear):
        state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    for module in list_expert_modules(layer):
        weights = list(module.parameters(recurse=False))
        count = next(weight.shape[0] for weight in weights if weight.dim() == 3)
        chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", 1)
        experts += sum(weight.numel() for weight in weights)
        active += sum(weight.numel() for weight in weights) * chosen // count
        inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        width = max(width, chosen * inner)
    return Layer(linear, experts, active, width, state)


def name_kinds(layers: list[Layer], types: list[str]) -> tuple[dict[str, Layer], list[str]]:
    """({kind: layer}, the kind of each layer); kinds have the names of the base's config."""
    kinds: dict[str, Layer] = {}
    order = []
    for layer, name in zip(layers, types, strict=True):
        kind, number = name, 1
        while kinds.setdefault(kind, layer) != layer:
            number += 1
            kind = f"{name}_{number}"
        order.append(kind)
    return kinds, order


def count_parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def describe_architecture(base: str, config: Any) -> dict[str, Any]:
    """The content of recipes/models/<model>.json for a base with this config of transformers."""
    model = build_empty(config)
    decoder, text = find_decoder(model), config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    total = count_parameters(decoder) + (0 if tied else count_parameters(head))
    layers = [describe_layer(layer, text) for layer in decoder.layers]
    content: dict[str, Any] = {
        "source": base,
        "also": [],
        "model_type": config.model_type,
        "layers": len(layers),
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "vocab": text.vocab_size,
        "tied": tied,
    }
    traits = architectures.BY_TYPE.get(config.model_type, {})
    plain = Model(**content | {"also": ()} | traits)
    if plain.list_layers() == layers and plain.parameters == total:
        content |= {"norms_per_layer": plain.norms_per_layer, "qk_norm": plain.qk_norm}
    else:
        types = getattr(text, "layer_types", None) or ["decoder"] * len(layers)
        kinds, order = name_kinds(layers, types)
        content["order"] = [[kind, len(list(run))] for kind, run in groupby(order)]
        content["kinds"] = {name: describe_kind(layer) for name, layer in kinds.items()}
        linear = sum(rows * columns for layer in layers for rows, columns in layer.linear.values())
        experts = sum(layer.experts for layer in layers)
        content["other_parameters"] = total - linear - experts
    if note := describe_rest(count_parameters(model) - total, layers):
        content["note"] = note
    if parse_architecture(content).parameters != total:
        raise WrongInput(f"{base}: its layers do not add up to its {total:,} parameters")
    return content


def describe_kind(layer: Layer) -> dict[str, Any]:
    numbers = {key: value for key, value in vars(layer).items() if value and key != "linear"}
    return {"linear": {path: list(shape) for path, shape in layer.linear.items()}} | numbers


def describe_rest(rest: int, layers: list[Layer]) -> str:
    """What the plan leaves out of a model, in words."""
    notes = []
    if rest > 0:
        notes.append(
            f"The language model alone. Encoders of images and sound add {rest / 1e9:.2f} billion "
            f"frozen parameters, up to {2 * rest / GIB:.1f} GiB at 16 bits."
        )
    if any(layer.experts for layer in layers):
        notes.append("Experts stay at 16 bits whatever the method, and have no adapter.")
    if any(layer.state for layer in layers):
        notes.append("Linear attention is planned as the kernels of flash-linear-attention run it.")
    return " ".join(notes)


def read_config(folder: Path) -> Any:
    """The config in a folder; raises WrongInput where transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WrongInput(
            f"{folder}: transformers cannot read its config.json ({lines[0][:150]})"
        ) from None
