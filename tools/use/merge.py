"""Merges an adapter into its base, so that any program can load the result without PEFT.

    python -m tools merge smollm2-135m/sentiment_r4
    python -m tools merge --adapter runs/hub/someone/some-adapter [--precision nf4]

The base is first what the adapter saw in training: its linear layers quantized and dequantized,
everything else unchanged. PEFT then adds the adapter's product. (`axolotl merge-lora` also
quantizes the embedding of a QLoRA adapter's base, which training never does; on SmolLM2 that moves
a logit by up to 10. It also takes a base for an MPT model if its path contains "mpt".) The result
is in `<run>/merged`; its tokenizer carries the chat template that renders prompts as the adapter
was trained on them.

`merged/merge.json` compares the merged model with base + adapter: the largest difference of a
logit, and what quantizing the merged weights again would change.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tools import adapters, models, prompts, subjects
from tools.common import (
    JobFailed,
    WrongInput,
    digest,
    naming,
    quiet,
    read_json,
    share,
    shown,
    write_json,
)

# Largest difference of a logit between the merged model and base + adapter. In float32 they add the
# same products in another order; bfloat16 rounds the sums to 3 digits, and an int8 base rounds
# activations to 8 bits, which the merged model does not.
TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0, "int8": 1.0}

TEXTS = [
    "What is the sentiment of this news? The company raised its forecast.",
    "Which tag belongs to the amount of 4.2 million that was paid in dividends?",
    "Net sales fell by 3 % to EUR 12 million, said the company on Monday.",
    "Compute the net present value of 100 a year for three years at 5 %.",
]


def logits(
    model: Any, tokenizer: Any, options: dict[str, Any] | None, form: str = "chat"
) -> list[Any]:
    """The logits of a model after each token of each text: (tokens, vocabulary), float32."""
    import torch

    outputs = []
    for text in TEXTS:
        ids = prompts.tokens(tokenizer, [{"role": "user", "content": text}], options, form)
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=model.device)
            outputs.append(model(input_ids=inputs).logits[0].float().cpu())
    return outputs


def difference(these: list[Any], those: list[Any]) -> dict[str, float]:
    """The largest difference of a logit, and the share of tokens with the same next token."""
    pairs = list(zip(these, those, strict=True))
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return {"largest_logit_difference": largest, "same_next_token": sum(same) / len(same)}


def merge(config: dict[str, Any], adapter: Path, form: str = "chat") -> Path:
    """Merges a PEFT folder into the base of an Axolotl config; returns the folder of the model.

    form: the prompt format that the adapter was trained on. Does nothing where `merged/` is up to
    date. Raises JobFailed where the merged model is not base + adapter within TOLERANCE.
    """
    target = adapter / "merged"
    origin = {
        "adapter_sha256": digest(adapter / adapters.WEIGHTS),
        "base_model": config["base_model"],
        "precision": models.precision(config),
        "prompt_format": form,
    }
    if (target / "merge.json").is_file():
        report = read_json(target / "merge.json")
        if report == report | origin:
            return target
    models.bring_base(config["base_model"])
    quiet()
    with tempfile.TemporaryDirectory(dir=adapter, prefix=".merging-") as name:
        work = Path(name)
        write_json(work / "merge.json", origin | merge_and_compare(config, adapter, form, work))
        share(work)
        shutil.rmtree(target, ignore_errors=True)
        work.chmod(adapter.stat().st_mode)
        os.rename(work, target)
        work.mkdir()  # which the temporary directory removes
    return target


def merge_and_compare(
    config: dict[str, Any], adapter: Path, form: str, folder: Path
) -> dict[str, Any]:
    """Writes the merged model to `folder`; returns how it differs from base + adapter."""
    options, precision = config.get("chat_template_kwargs"), models.precision(config)
    model, tokenizer = models.load(config, adapter)
    dtype = str(model.dtype).removeprefix("torch.")
    if template := prompts.template(tokenizer, form):
        tokenizer.chat_template = template
    # A base without a chat template can be merged too; the texts are then bare.
    shape = "chat" if tokenizer.chat_template else "bare"
    expected = logits(model, tokenizer, options, shape)
    base = model.unload()
    del model
    with naming(adapter / "merged"):
        write_merged(base, config, adapter, folder)
        tokenizer.save_pretrained(folder)
    del base
    gc.collect()

    def compare(merged_config: dict[str, Any]) -> dict[str, float]:
        merged, _ = models.load({"base_model": str(folder)} | merged_config)
        return difference(expected, logits(merged, tokenizer, options, shape))

    tolerance = TOLERANCE.get("int8" if precision == "int8" else dtype, 1.0)
    report: dict[str, Any] = {"computed_in": dtype, "tolerance": tolerance}
    report |= compare({"dtype": dtype})
    if precision == "nf4":
        report["quantized_again"] = compare(models.PRECISIONS["nf4"])
    if report["largest_logit_difference"] > tolerance:
        raise JobFailed(
            f"the merged model is not base + adapter: a logit differs by "
            f"{report['largest_logit_difference']:.3g}, more than {tolerance:g}; "
            "nothing is kept"
        )
    return report


def write_merged(base: Any, config: dict[str, Any], adapter: Path, folder: Path) -> None:
    """Writes base plus adapter to `folder`; changes the loaded `base`."""
    import torch

    if models.precision(config) in ("nf4", "fp4", "int8"):
        base = base.dequantize()
    checked = models.check_adapter(config, adapter)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if checked.touches_embeddings and head.weight is embedding.weight:
        # An adapter of one of them does not change the other.
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    merged = models.attach(base, adapter, checked).merge_and_unload(safe_merge=True)
    # transformers would restore the names of the quantized file, which fails.
    published = models.published_precision(str(config["base_model"]))
    merged.save_pretrained(folder, save_original_format=not published)


def merge_and_report(
    recipe: str | None, adapter: str | None, precision: str | None, prompt_format: str | None
) -> None:
    """Merges an adapter, named as in `subjects.find`, and prints how the two compare."""
    try:
        subject = subjects.find(recipe, adapter, precision, prompt_format)
    except subjects.NotRenderable:  # the weights can be merged, with the base's template
        subject = subjects.find(recipe, adapter, precision, "chat")
    if not subject.adapter:
        raise WrongInput(f"{subject.name} has no adapter to merge")
    print(f"merge      {subject.name} into {subject.config['base_model']}", flush=True)
    target = merge(subject.config, subject.adapter, subject.prompt_format)
    report = read_json(target / "merge.json")
    print(
        f"merge      {shown(target)}: logits differ from base + adapter by at most "
        f"{report['largest_logit_difference']:.2g} (tolerance {report['tolerance']:g})"
    )
    if again := report.get("quantized_again"):
        print(
            f"merge      quantized to 4 bits again it would differ by up to "
            f"{again['largest_logit_difference']:.2g}, with the same next token on "
            f"{again['same_next_token']:.0%}: serve it as it is, or base and adapter apart"
        )
