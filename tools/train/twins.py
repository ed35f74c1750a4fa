"""Writes tiny models with random weights that have a base's class and all its kinds of layers."""

from pathlib import Path
from typing import Any

from tools import models

# Sizes of a twin, as transformers' configs name them.
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    # Linear attention.
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    # Experts.
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2},
    "moe_intermediate_size": 32,
    "sliding_window": 32,
}
TOWER = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1},
    **{"num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14},
    **{"out_hidden_size": SIZES["hidden_size"], "num_position_embeddings": 16},
}
# Of a rotary embedding in sections for text, height and width, and heads that they fit into.
SECTIONS, SECTIONED_HEAD = [2, 1, 1], 32


def pick_layers(text: dict[str, Any]) -> dict[str, Any]:
    """Layers of a language model's config: each of its kinds, and at least two."""
    kinds = list(dict.fromkeys(text.get("layer_types") or []))
    # Models end with a layer that attends to all tokens.
    kinds.sort(key=lambda kind: kind == "full_attention")
    order = kinds if len(kinds) > 1 else 2 * kinds
    changes: dict[str, Any] = {"num_hidden_layers": len(order) or 2}
    if kinds:
        changes["layer_types"] = order
    if text.get("no_rope_layers"):
        changes["no_rope_layers"] = [1, 0]
    return changes


def shrink_config(config: Any, vocabulary: int, ids: dict[str, int | None]) -> Any:
    """A tiny config of the same class. `ids`: the numbers of its special tokens."""
    content = config.to_dict()
    text = content.get("text_config") or content
    sizes = SIZES | ids | {"vocab_size": vocabulary}
    text |= {key: value for key, value in sizes.items() if text.get(key) is not None or key in ids}
    text |= pick_layers(text)
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        rope["mrope_section"], text["head_dim"] = SECTIONS, SECTIONED_HEAD
    for name in ("vision_config", "audio_config"):
        tower = content.get(name)
        if isinstance(tower, dict):
            tower |= {key: value for key, value in TOWER.items() if key in tower}
    content.pop("quantization_config", None)
    return type(config).from_dict(content)


def write_twin(config: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a twin of a base with its tokenizer to a folder."""
    import torch

    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny = shrink_config(config, len(tokenizer), ids)
    torch.manual_seed(0)
    models.find_loader(tiny).from_config(tiny).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
