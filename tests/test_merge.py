"""A merged checkpoint of 4 or 16 bits is what was merged, for any program that loads it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import METHODS, run
from tools import models, subjects
from tools.use import merge

# Each merge loads the base, and loads again what was written.
pytestmark = pytest.mark.slow


def merge_folder(folder, bits):
    subject = subjects.find("", str(folder))
    target = merge.merge(subject.config, folder, bits=bits)
    return subject, target, json.loads((target / "merge.json").read_text())


def load_plainly(folder):
    """A merged model as any user of transformers loads it, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_16_bits_is_base_and_adapter_rounded_to_bfloat16(adapters, method):
    subject, target, report = merge_folder(adapters[method], 16)
    assert target.name == "merged-16bit"
    stored = AutoModelForCausalLM.from_pretrained(target)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    loaded, tokenizer = load_plainly(target)
    adapted, _ = models.load(subject.config, subject.adapter)
    base, _ = models.load(subject.config)
    answers = [merge.compute_logits(model, tokenizer, None) for model in (loaded, adapted, base)]
    distance = merge.measure_difference(answers[0], answers[1])["largest_logit_difference"]
    assert distance == pytest.approx(report["largest_logit_difference"], abs=1e-4)
    # The adapter moves logits by far more than the rounding of the weights to 8 bits.
    moved = merge.measure_difference(answers[0], answers[2])["largest_logit_difference"]
    assert distance < 0.05 < moved


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_4_bits_loads_as_the_model_that_was_rounded(adapters, method):
    subject, target, report = merge_folder(adapters[method], 4)
    loaded, tokenizer = load_plainly(target)
    layers = {n: m for n, m in loaded.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 14  # seven of each layer
    assert loaded.config.quantization_config.bnb_4bit_quant_type == "nf4"
    adapted, _ = models.load(subject.config, subject.adapter)
    answers = merge.compute_logits(loaded, tokenizer, None)
    distance = merge.measure_difference(merge.compute_logits(adapted, tokenizer, None), answers)
    assert distance["largest_logit_difference"] == pytest.approx(
        report["largest_logit_difference"], abs=1e-4
    )
    assert distance["largest_logit_difference"] > 0.01  # rounding is seen and reported
    if not method.startswith("nf4"):
        return
    # Of a 4-bit base, layers without an adapter keep every bit; the others are the rounded sum.
    base, _ = models.load_base(subject.config)
    peft_model, _ = models.assemble(subject.config, subject.adapter)
    peft_model.merge_and_unload()
    sums = dict(peft_model.get_base_model().named_modules())
    for name, original in base.named_modules():
        if name in layers:
            same = torch.equal(original.weight, layers[name].weight)
            assert same == (not name.endswith(("q_proj", "k_proj", "v_proj"))), name
            assert torch.equal(sums[name].weight, layers[name].weight), name


def test_a_4_bit_checkpoint_that_loads_as_another_model_is_refused(adapters, tmp_path, monkeypatch):
    def save_another(merged, config, folder):
        for parameter in merged.parameters():
            if parameter.dtype == torch.float32:
                parameter.data += 0.1
        merged.save_pretrained(folder)

    monkeypatch.setattr(merge, "save", save_another)
    subject = subjects.find("", str(adapters["nf4"]))
    target = merge.Target(tmp_path, 4)
    with pytest.raises(merge.JobFailed, match="the merged model is not what was saved"):
        merge.merge_and_compare(subject.config, subject.adapter, "chat", target)


def test_an_adapter_that_rounding_takes_away_is_reported(adapters, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["nf4"], folder, ignore=shutil.ignore_patterns("merged*"))
    weights = load_file(folder / "adapter_model.safetensors")
    for name, weight in weights.items():
        weight *= 0.008 if "lora_B" in name else 1
    save_file(weights, folder / "adapter_model.safetensors")
    merge.merge_and_report(subjects.find("", str(folder)), 4, False)
    output = capsys.readouterr().out
    report = json.loads((folder / "merged-4bit" / "merge.json").read_text())
    assert report["from_base"]["largest_logit_difference"] < report["largest_logit_difference"]
    assert "rounding takes most of this adapter away: the next token is the base's on" in output
    # The adapter of the other tests is larger than a step, and survives.
    folder = merge_folder(adapters["nf4"], 4)[0].adapter
    merge.merge_and_report(subjects.find("", str(folder)), 4, False)
    assert "away" not in capsys.readouterr().out


def test_the_command_says_what_four_bits_cost(adapters):
    done = run("merge", "--adapter", adapters["full"], "--bits", "4")
    assert done.returncode == 0, done.stderr
    assert "merged-4bit" in done.stdout and "with the same next token on" in done.stdout
    done = run("merge", "--adapter", adapters["full"], "--bits", "8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "BITS" in done.stderr and "4" in done.stderr
