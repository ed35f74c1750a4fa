"""Networks whose attention does not reach back over every token answer in a batch as alone."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from evals import backends
from evals.model import CACHED, Model
from tools.subjects import Subject

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # so that answers depend on the prompt
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def build(kind, vocabulary):
    """(model class, config) of a network with random weights."""
    shape = TINY | {"vocab_size": vocabulary}
    if kind == "Gemma 3":
        config = transformers.Gemma3TextConfig(**shape, sliding_window=8, layer_types=MIXED)
        return transformers.Gemma3ForCausalLM, config
    if kind == "Gemma 3 with images":
        text = shape | {"sliding_window": 8, "layer_types": MIXED}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4
        )
        return transformers.Gemma3ForConditionalGeneration, config
    if kind == "Qwen 3":
        config = transformers.Qwen3Config(
            **shape, use_sliding_window=True, sliding_window=8, max_window_layers=2
        )
        return transformers.Qwen3ForCausalLM, config
    if kind == "LFM 2":
        plain = {name: size for name, size in shape.items() if name != "head_dim"}
        mixed = ["conv", "conv", "full_attention", "full_attention"]
        return transformers.Lfm2ForCausalLM, transformers.Lfm2Config(**plain, layer_types=mixed)
    window = 8 if kind == "Mistral" else None
    config = transformers.MistralConfig(**shape, sliding_window=window)
    return transformers.MistralForCausalLM, config


class Request:
    def __init__(self, text, budget=6):
        self.args = (text, {"max_gen_toks": budget, "do_sample": False, "until": []})


INSTRUCTION = "What is the sentiment of this news? Answer with negative, neutral or positive. " * 2
NEWS = ["Profit rose.", "The firm will cut 200 jobs in Turku by May, it says.", "Sales", "No."]


@pytest.fixture
def tokenizer(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.padding_side = "left"
    return tokenizer


KINDS = ["Gemma 3", "Gemma 3 with images", "Qwen 3", "LFM 2", "Mistral", "full attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_answered_as_each_row_alone(kind, tokenizer):
    torch.manual_seed(0)
    network, config = build(kind, len(tokenizer))
    model = network(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    lm = Model(model, tokenizer, kind, len(NEWS))
    assert lm.share == (kind == "full attention")
    assert lm.max_length == 4096
    together = lm.generate_until([Request(INSTRUCTION + news) for news in NEWS])
    alone = []
    for news in NEWS:
        ids = torch.tensor([tokenizer.encode(INSTRUCTION + news)])
        output = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        alone.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert together == alone
    assert len(set(alone)) > 1


def test_a_batch_holds_no_more_keys_and_values_than_its_rows_and_their_prefixes(tokenizer):
    network, config = build("full attention", len(tokenizer))
    lm = Model(network(config).eval(), tokenizer, "rows", 1)
    lm.tokens = 16384
    assert lm.batch_size_of(longest=4000, shared=3900, budget=10) * 4010 <= CACHED
    assert lm.batch_size_of(longest=100, shared=0, budget=28) == 128
    assert lm.batch_size_of(longest=20_000, shared=0, budget=10) == 1


def test_vllm_gets_the_context_of_the_text_model(tmp_path):
    build("Gemma 3 with images", 100)[1].save_pretrained(tmp_path)
    config = {"base_model": str(tmp_path)}
    base = Subject("a base", config, None, tmp_path, tmp_path, None, "chat")
    assert backends.vllm_arguments(base)["max_model_len"] == 4096
