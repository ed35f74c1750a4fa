"""Rows that share a beginning train as padded rows do: the same loss, the same gradients."""

import pytest
import torch

from tools.train import shared_prefix as sharing


def build_batch(rows: list[tuple[list[int], list[int]]], pad: int = 0) -> dict:
    """A padded micro-batch of (prompt, answer); the answer and a last untrained token follow."""
    length = max(len(prompt) + len(answer) + 1 for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for number, (prompt, answer) in enumerate(rows):
        whole = [*prompt, *answer, 9]
        ids[number, : len(whole)] = torch.tensor(whole)
        labels[number, len(prompt) : len(whole) - 1] = torch.tensor(answer)
        mask[number, : len(whole)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


PROMPT = list(range(100, 140))
BATCHES = {
    "share nothing": [(list(range(start, start + 30)), [start, 7]) for start in (20, 60, 100)],
    "equal": [(PROMPT, [3, 4])] * 3,
    "one row": [(PROMPT, [3])],
    "one begins the other": [(PROMPT[:25], [3]), (PROMPT, [3, 4]), ([*PROMPT, 3], [4])],
    "equal prompts": [(PROMPT, [3, 4]), (PROMPT, [5]), (PROMPT, [3, 6, 7])],
    "nested beginnings": [
        ([*PROMPT[:20], *middle, end], [end, 5])
        for middle in (range(20, 40), range(40, 60), [])
        for end in (11, 12, 13)
    ],
    "no answer in one": [(PROMPT, [3]), ([*PROMPT, 8], [])],
}


def compute(model, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def pack(batch: dict, **options) -> dict:
    inputs = sharing.Packer(**options).pack_step([batch])[0]
    assert "segment_lengths" in inputs
    return {key: value for key, value in inputs.items() if key != "real_tokens"}


def assert_same(packed, padded, loss=1e-5, gradient=1e-4) -> None:
    torch.testing.assert_close(packed[0], padded[0], rtol=loss, atol=loss)
    scale = max(float(each.abs().max()) for each in padded[1])
    assert scale > 0
    for one, other in zip(packed[1], padded[1], strict=True):
        assert float((one - other).abs().max()) <= gradient * scale


def build_model(kind: str = "llama", **changes):
    """A tiny random model of an architecture, with an adapter whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160}
    model_changes = {key: changes.pop(key) for key in list(changes) if key in ("sliding_window",)}
    config = AutoConfig.for_model(kind, **sizes | model_changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    lora = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**lora | changes)).train()
    sharing.accept_packs(model)
    return model


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_packed_rows_train_as_padded_rows_do(rows):
    model, batch = build_model(), build_batch(rows)
    assert_same(compute(model, pack(batch)), compute(model, batch))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_architecture_trains_the_same(kind):
    model, batch = build_model(kind), build_batch(BATCHES["nested beginnings"])
    assert_same(compute(model, pack(batch)), compute(model, batch))
