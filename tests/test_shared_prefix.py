"""Rows that share a beginning train as padded rows do: the same loss, the same gradients."""

import json
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import run_first
from tools import recipes
from tools.packs import TESTED
from tools.segments import Segments
from tools.train import profiles
from tools.train import shared_prefix as sharing
from tools.train.batches import count_real_tokens
from tools.train.hardware import Host
from tools.train.sharing import explain_base


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
LONG_AND_SHORT = "long and short rests, and a long beginning"
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
    "long rests": [([*PROMPT, *range(50, 150)] * 3, [3]), ([*PROMPT, *range(9, 99)] * 2, [4, 5])],
    LONG_AND_SHORT: [
        ([*PROMPT * 8, *rest], [3]) for rest in (range(12, 15), range(20, 29), PROMPT[::-1] * 7)
    ],
    "no answer in one": [(PROMPT, [3]), ([*PROMPT, 8], [])],
}
MIXED = BATCHES["nested beginnings"] + BATCHES[LONG_AND_SHORT]


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


def build_config(kind: str, **sizes: object):
    from transformers import AutoConfig

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160}
    if kind == "gemma3":
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
        return AutoConfig.for_model(kind, text_config=shape | sizes, vision_config=vision)
    return AutoConfig.for_model(kind, **shape | sizes)


def add_adapter(model, **changes: object):
    """The model with an adapter whose B is not zero, ready for packs."""
    from peft import LoraConfig, get_peft_model

    modules = r"^(?!.*vision).*\.(q|k|v)_proj$"
    lora = {"r": 4, "target_modules": modules, "init_lora_weights": False, "lora_alpha": 16}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**lora | changes)).train()
    sharing.accept_packs(model)
    return model


def build_model(kind: str = "llama", **sizes: object):
    """A tiny random model of an architecture with an adapter."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    torch.manual_seed(0)
    config = build_config(kind, **sizes)
    return add_adapter(loader.from_config(config, attn_implementation="sdpa"))


def test_long_rests_are_causal_batches_of_their_own_without_a_mask():
    """A mask of 1,000 by 1,000 for each layer is most of the memory of such a step."""
    rests = [(300, 340), (700, 740), (9, 99)]  # (queries, keys) behind beginnings of 40 and 90
    lengths, paths = [90], [[*range(90)]]
    for queries, keys in rests:
        place = sum(lengths)
        paths.append([*range(keys - queries), *range(place, place + queries)])
        lengths.append(queries)
    segments = Segments(*map(torch.tensor, (lengths, [*map(len, paths)], [*chain(*paths)])))
    segments.pad()
    assert sorted(len(group.own) for group in segments.groups) == [99, 300, 700]
    assert [group.mask is None for group in segments.groups] == [True, True, False]
    places = torch.cat([group.queries[group.own] for group in segments.groups])
    assert places[segments.order].tolist() == list(range(sum(lengths)))
    behind_a_cache = Segments(*map(torch.tensor, ([300], [340], [*range(340)])))
    behind_a_cache.pad()
    assert behind_a_cache.groups[0].mask is not None


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_packed_rows_train_as_padded_rows_do(rows):
    model, batch = build_model(), build_batch(rows)
    assert_same(compute(model, pack(batch)), compute(model, batch))


def test_conversations_of_several_turns_train_as_padded_rows_do():
    """Each assistant turn is trained: the labels are not at a row's end alone."""
    model = build_model()
    batch = build_batch([([*PROMPT, *PROMPT, end], [end, 3]) for end in (10, 11, 12)])
    for place in (30, 31, 60):
        batch["labels"][:, place] = batch["input_ids"][:, place]
    assert_same(compute(model, pack(batch)), compute(model, batch))


@pytest.mark.parametrize("kind", sorted(TESTED))
def test_every_architecture_that_is_packed_trains_the_same(kind):
    model, batch = build_model(kind), build_batch(MIXED)
    assert_same(compute(model, pack(batch)), compute(model, batch))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gemma3"])
def test_a_row_longer_than_the_sliding_window_is_not_packed(kind):
    batch = build_batch([(PROMPT, [3]), (PROMPT, [4])])
    longest = len(PROMPT)  # the label's own token is not computed
    for window, packs in ((longest, True), (longest - 1, False)):
        model = build_model(kind, sliding_window=window)
        inputs = sharing.Packer(sharing.find_window(model.config)).pack_step([batch])[0]
        assert ("segment_lengths" in inputs) == packs
        inputs.pop("real_tokens", None)
        assert_same(compute(model, inputs), compute(model, batch))


@pytest.mark.parametrize("bits", run_first(2, [4, 8, 16]))
@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_every_precision_and_method_trains_the_same(bits, method, tiny):
    """The base as it is loaded on a CPU, in float32 compute."""
    from tools import models

    model, _ = models.load_base(
        {"base_model": str(tiny)} | ({} if bits == 16 else {f"load_in_{bits}bit": True})
    )
    model, batch = add_adapter(model, **method), build_batch(MIXED)
    assert_same(compute(model, pack(batch)), compute(model, batch))


def test_gradient_checkpointing_trains_the_same():
    model, batch = build_model(), build_batch(MIXED)
    expected = compute(model, batch)
    for reentrant in (True, False):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(compute(model, pack(batch)), expected)


def test_rows_padded_on_the_left_and_rows_without_labels_train_the_same():
    model, batch = build_model(), build_batch(BATCHES["no answer in one"])
    flipped = {key: value.clone() for key, value in batch.items()}
    for number, count in enumerate(batch["attention_mask"].sum(1).tolist()):
        for value in flipped.values():
            value[number] = value[number].roll(value.shape[1] - count)
    assert_same(compute(model, pack(flipped)), compute(model, batch))


@pytest.mark.parametrize("items", [None, 7])
def test_micro_batches_of_a_step_are_merged_and_their_loss_stays(items):
    """The trainer divides by the number of micro-batches, or hands on the labels of the step."""
    model = build_model()
    batches = [build_batch(BATCHES[name]) for name in ("equal", "equal prompts", "one row")]
    steps = sharing.Packer(budget=200).pack_step(batches, items)
    assert [step["input_ids"].numel() == 0 for step in steps] == [True, True, False]
    steps[-1].pop("real_tokens")
    model.zero_grad()
    for batch in batches:
        count = (batch["labels"] != -100).sum() if items else 1
        loss = model(**batch).loss
        (loss * count / items if items else loss).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    _, gradients = compute(model, steps[-1])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_micro_batches_are_merged_only_where_no_more_tokens_are_held_at_once():
    wide = build_batch([(list(range(number, number + 60)), [3]) for number in (10, 80)])
    assert wide["input_ids"].numel() == 124
    steps = sharing.Packer(budget=124).pack_step([wide, wide, wide])
    assert [step["input_ids"].numel() for step in steps] == [0, 0, 2 * 59 + 6]
    other = build_batch([(list(range(number, number + 60)), [3]) for number in (30, 50)])
    steps = sharing.Packer(budget=124).pack_step([wide, other])
    assert [step["input_ids"].numel() for step in steps] == [120, 120]  # 60 of each row


def test_what_rows_share_is_computed_once():
    inputs = pack(build_batch(BATCHES["nested beginnings"]))
    # 20 tokens of all; then 20 (twice) that three share; then each row's last token of the prompt
    # and the answer's first. The third group's middle is empty.
    assert inputs["input_ids"].numel() == 20 + 2 * 20 + 9 * 2
    pieces = inputs["segment_lengths"][0].tolist()
    assert sorted(pieces, reverse=True)[:3] == [20, 20, 20]


def test_batches_with_keys_of_their_own_and_batches_without_labels_stay_as_they_are():
    batch = build_batch(BATCHES["equal"])
    for other in (
        batch | {"position_ids": batch["input_ids"]},
        batch | {"labels": torch.full_like(batch["labels"], -100)},
    ):
        assert sharing.Packer().pack_step([other])[0] is other


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is set"),
        ({"sample_packing": True}, "sample_packing is set"),
        ({"attn_implementation": "eager"}, "attn_implementation is eager"),
        ({"eager_attention": True}, "eager_attention is set"),
        ({"micro_batch_size": 1, "gradient_accumulation_steps": 1}, "a step has one row"),
        ({"base_model": "nobody/nothing"}, "the architecture of nobody/nothing is unknown"),
    ],
    ids=str,
)
def test_what_is_not_packed_says_why(changes, reason):
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    merge, here = profiles.merge_config, Host("", [], 2, 0)
    assert merge(recipe, profiles.Choice("cpu"), here)["shared_prefix"] is True
    changed = replace(recipe, config=recipe.config | changes)
    content = merge(changed, profiles.Choice("cpu"), here)
    assert "shared_prefix" not in content
    assert reason in profiles.explain_settings(content, here, 1)["shared prefix"]


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"model_type": "gpt_oss"}, "packs were not tested on the architecture gpt_oss"),
        ({"model_type": "qwen3_next"}, "packs were not tested on the architecture qwen3_next"),
        ({"num_local_experts": 8}, "or a mixture of experts"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rotary embedding (dynamic) depends"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, None),
    ],
    ids=str,
)
def test_bases_that_cannot_be_packed_say_why(architecture, reason, tiny, tmp_path):
    content = json.loads((tiny / "config.json").read_text()) | architecture
    (tmp_path / "config.json").write_text(json.dumps(content))
    told = explain_base(str(tmp_path))
    assert told is None if reason is None else reason in told


def test_flash_attn_trains_the_same():
    """Its kernel computes in bfloat16: the bound is what that rounds."""
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        build_config("llama"), attn_implementation="flash_attention_2", dtype=torch.bfloat16
    )
    model = add_adapter(base.cuda())
    batch = {key: value.cuda() for key, value in build_batch(BATCHES["equal prompts"]).items()}
    assert_same(compute(model, pack(batch)), compute(model, batch), loss=2e-2, gradient=5e-2)


@pytest.mark.parametrize("counts_labels", [True, False])
def test_transformers_trainer_takes_the_same_steps(counts_labels, smollm2, tmp_path):
    """With the loss as a mean over all labels of a step, or over those of each micro-batch."""
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def train(packs: bool) -> list[float]:
        model = build_model()
        rows = [row for rows in BATCHES.values() for row in rows if row[1]]
        data = []
        for prompt, answer in rows:
            labels = [-100] * len(prompt) + answer + [-100]
            data.append({"input_ids": [*prompt, *answer, 9], "labels": labels})
        folder = tmp_path / str(packs)
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=9,
            logging_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no",
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(smollm2))
        trainer = Trainer(
            model, arguments, train_dataset=Dataset.from_list(data), data_collator=collate
        )
        trainer.model_accepts_loss_kwargs = counts_labels
        count_real_tokens(trainer, SimpleNamespace(real_tokens=0))
        if packs:
            sharing.share_prefixes(trainer)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    packed, padded = train(True), train(False)
    assert packed == pytest.approx(padded, abs=1e-4) and len(packed) == 9
    assert padded[-1] < padded[0]
