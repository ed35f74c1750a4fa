"""Networks whose attention does not reach back over every token answer in a batch as alone."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from evals.model import Model, RoomyLayer, count_cached
from evals.vllm_model import VllmModel, Worker
from tests.conftest import GPU, run_first

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
    assert lm.packs == (kind == "full attention")
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


PACKED = ["llama", "mistral", "qwen2", "qwen3"]
BEGINNING = list(range(100, 140))
PROMPTS = [
    *(
        [*BEGINNING, *text, question]
        for text in (range(20, 60), range(60, 99))
        for question in (1, 2)
    ),
    [*BEGINNING, *range(20, 60), 3, 4, 5],
    [*BEGINNING, *range(20, 60), 3, 4, 5],  # twice
    [*BEGINNING, 8, 9],
    [*BEGINNING, *range(200, 500)],  # much longer
]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("shared", [True, False], ids=["all begin alike", "one begins otherwise"])
@pytest.mark.parametrize("tokens", run_first(1, [64, 1024]))
def test_packed_prompts_have_the_keys_and_values_of_each_alone(kind, shared, tokens, tokenizer):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | {"vocab_size": len(tokenizer)})
    config.sliding_window = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    lm = Model(model, tokenizer, kind, 1)
    assert lm.packs
    lm.tokens = tokens
    prompts = PROMPTS if shared else [*PROMPTS, [7, 7, 7]]
    prefix = lm.compute_prefix(prompts)
    assert (prefix.get_seq_length() if prefix else 0) == (40 if shared else 0)
    rows = [prompts[row] for batch in lm.divide(prompts, 1) for row in batch]
    assert sorted(rows) == sorted(prompts)
    packs = list(lm.pack(rows, 40 if shared else 0))
    if tokens == 1024:  # counted by hand: 40 shared, 40 + 8 and 39 + 2 of the texts, 2, 300, 3
        assert [len(pack.ids) for pack in packs] == [391 if shared else 434]
    logits, cache = lm.compute_keys(rows, prefix)
    for number, row in enumerate(rows):
        with torch.inference_mode():
            alone = model(torch.tensor([row]), use_cache=True)
        torch.testing.assert_close(logits[number], alone.logits[0, -1], rtol=1e-5, atol=1e-5)
        for layer, expected in zip(cache.layers, alone.past_key_values.layers, strict=True):
            for states, of_row in ((layer.keys, expected.keys), (layer.values, expected.values)):
                own = states[number, :, states.shape[2] - len(row) :]
                torch.testing.assert_close(own, of_row[0], rtol=1e-5, atol=1e-5)


def test_a_layer_with_room_holds_what_transformers_layer_does():
    first, *others = (torch.randn(2, 2, 3, tokens, 4) for tokens in (5, 1, 2, 1))
    room = torch.cat([first, torch.full((2, 2, 3, 3, 4), torch.nan)], 3)
    layer, expected = RoomyLayer(*room, 5), transformers.cache_utils.DynamicLayer()
    expected.update(*first)
    for number, new in enumerate(others):
        assert layer.get_seq_length() == expected.get_seq_length()
        for own, other in zip(layer.update(*new), expected.update(*new), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0)
        # There is room for three tokens, and of four the last is copied.
        assert (layer.keys.data_ptr() == room[0].data_ptr()) == (number < 2)
    layer, expected = RoomyLayer(*room, 5), transformers.cache_utils.DynamicLayer()
    expected.update(*first)
    for each in (layer, expected):
        each.reorder_cache(torch.tensor([1, 1]))
    for own, other in zip(layer.update(*others[0]), expected.update(*others[0]), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_a_batch_holds_no_more_keys_and_values_than_its_rows_and_their_prefixes(tokenizer):
    network, config = build("full attention", len(tokenizer))
    lm = Model(network(config).eval(), tokenizer, "rows", 1)
    lm.cached = 16384

    def sizes(*lengths: int) -> list[int]:
        return [len(batch) for batch in lm.divide([[1] * length for length in lengths], 10)]

    assert sizes(*[4000] * 9) == [4, 4, 1]
    assert sizes(*[20_000] * 2) == [1, 1]
    assert sizes(*[118] * 256) == [128, 128]
    lm.packs, lm.cached = False, 1024
    assert sizes(*[118] * 10) == [8, 2]


def test_the_tokens_that_a_batch_may_hold_follow_from_the_bytes_of_a_cache(tokenizer):
    network, config = build("full attention", len(tokenizer))
    network = network(config).eval()
    with torch.inference_mode():
        cache = network(torch.ones(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert count_cached(network, size) == 7
    assert count_cached(network, size - 1) == 6


def test_vllm_gets_the_context_of_the_text_model(tokenizer):
    config = build("Gemma 3 with images", 100)[1]
    assert VllmModel(Worker(GPU, {}, config), tokenizer, None).max_length == 4096
