"""`merge_aware` trains the 4-bit model that a merge saves."""

from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.integrations import dequantize_bnb_weight
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import QKV, write_recipe
from tools import models, recipes, subjects
from tools.common import WrongInput
from tools.train import launch, machines, profiles
from tools.use import merge

NF4 = {"load_in_4bit": True}
IDS = torch.arange(40).reshape(2, 20) + 100


@pytest.fixture
def adapted(tiny):
    """A 4-bit base with an adapter that computes with rounded sums, and does something."""
    base, _ = models.load_base({"base_model": str(tiny)} | NF4)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=QKV, lora_dropout=0.0)
    model = get_peft_model(base, settings)
    models.round_in_forward(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.2 * torch.randn(weight.shape)
    return model


def save_run(model, tiny, folder):
    """A folder as `make train` leaves it."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    config = {"base_model": str(tiny), "adapter": "qlora", "lora_r": 4, "lora_alpha": 16} | NF4
    config |= {"datasets": [{"path": "x.jsonl", "type": "chat_template"}], "merge_aware": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text("{}")
    return subjects.find("", str(folder))


@pytest.mark.slow
def test_the_saved_4_bit_model_is_the_trained_one_bit_for_bit(adapted, tiny, tmp_path):
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = adapted.eval()(input_ids=IDS).logits
        with adapted.disable_adapter():
            base = adapted(input_ids=IDS).logits
    subject = save_run(adapted, tiny, tmp_path / "run")
    target = merge.merge(subject.config, subject.adapter, bits=4)
    saved = AutoModelForCausalLM.from_pretrained(target).eval()
    scored, _ = models.load(subject.config, subject.adapter)
    with torch.no_grad():
        assert torch.equal(saved(input_ids=IDS).logits, trained)
        assert torch.equal(scored(input_ids=IDS).logits, trained)
        with scored.disable_adapter():
            assert torch.equal(scored(input_ids=IDS).logits, base)
        # Beside the 4-bit base, without rounding the sum, the same adapter is another model.
        apart, _ = models.load({**subject.config, "merge_aware": None}, subject.adapter)
        assert (apart(input_ids=IDS).logits - trained).abs().max() > 0.01
    # A merge of 16 bits is the rounded sum as well.
    wide = merge.merge(subject.config, subject.adapter, bits=16)
    of_16_bits = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (of_16_bits(input_ids=IDS).logits - trained).abs().max() < 0.05


def test_gradients_are_those_of_the_sum_at_the_rounded_weight(adapted):
    layer = next(module for module in adapted.modules() if isinstance(module, Linear4bit))
    adapted.train()
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    factors = torch.randn(3, 5, layer.out_features)
    output = layer(x)
    (output * factors).sum().backward()
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradients = [weight.grad.clone() for weight in weights]
    of_input = x.grad.clone()
    for tensor in (x, *weights):
        tensor.grad = None
    # The estimator written out: rounding is added to the sum as a constant.
    packed = layer.get_base_layer().weight
    total = dequantize_bnb_weight(packed, packed.quant_state) + layer.get_delta_weight("default")
    eye = torch.eye(layer.in_features)
    with torch.no_grad():
        rounded = layer(eye).T
    weight = total + (rounded - total).detach()
    assert (rounded - total).abs().max() > 1e-3
    expected = x @ weight.T
    torch.testing.assert_close(output, expected)
    (expected * factors).sum().backward()
    torch.testing.assert_close(of_input, x.grad)
    for gradient, tensor in zip(gradients, weights, strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"load_in_4bit": None, "adapter": "lora"}, "load_in_4bit: true is needed"),
        ({"peft_use_dora": True}, "peft_use_dora"),
        ({"lora_dropout": 0.05}, "lora_dropout must be 0"),
        ({"fsdp_config": {}, "deepspeed": "recipes/deepspeed/zero3.json"}, "FSDP and ZeRO-3"),
    ],
)
def test_a_config_that_it_cannot_train_is_refused(change, text):
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    config = recipe.config | {"merge_aware": True, "lora_dropout": 0.0} | change
    with pytest.raises(WrongInput, match=text):
        profiles.refuse_unmergeable("mine", config)


def test_axolotls_kernels_that_pass_by_the_layers_are_off():
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    config = recipe.config | {"merge_aware": True, "lora_dropout": 0.0}
    content = profiles.merge_config(replace(recipe, config=config), profiles.Choice("gpu"))
    assert content["lora_qkv_kernel"] is content["lora_mlp_kernel"] is False
    assert content["merge_aware"] is True


@pytest.mark.slow
def test_a_run_is_scored_and_merged_as_it_was_trained(tiny, chat_rows, tmp_path):
    changes = {"merge_aware": True, "lora_dropout": 0.0, "max_steps": 4, "learning_rate": 0.01}
    path = write_recipe(tmp_path, "r4", tiny, chat_rows, **changes)
    recipe = recipes.find(str(path))
    launch.train(recipe, profiles.Choice("cpu"), machines.Machines(), False)
    subject = subjects.of_recipe(recipe)
    scored, _ = models.load(subject.config, subject.adapter)
    target = merge.merge(subject.config, subject.adapter, bits=4)
    saved = AutoModelForCausalLM.from_pretrained(target).eval()
    base, _ = models.load_base(subject.config)
    with torch.no_grad():
        logits = [model(input_ids=IDS).logits for model in (scored, saved, base.eval())]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
