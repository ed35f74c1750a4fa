"""Merges an adapter into its base, so that any program can load the result without PEFT.

    python -m tools merge smollm2-135m/sentiment_r4
    python -m tools merge --adapter runs/hub/someone/some-adapter [--precision nf4]

The base is first what the adapter saw in training: its linear layers quantized and dequantized,
everything else as it is. PEFT then adds the adapter's product to that. (`axolotl merge-lora` merges
a QLoRA adapter into a base whose embedding is quantized, too, which training never does; on SmolLM2
that moves a logit by up to 10. And it takes a base for an MPT model where its path has an "mpt" in
it.) The result lies in `<run>/merged`; its tokenizer carries the chat template that renders prompts
as the adapter was trained on them.

The merged model is compared with base + adapter: `merged/merge.json` holds the largest difference
of a logit, and what quantizing the merged weights anew would change.
"""

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tools import models, prompts, subjects
from tools.common import (
    JobFailed,
    WrongInput,
    digest,
    naming,
    quiet,
    share,
    shown,
    write_json,
)

# Largest difference of a logit, merged against base + adapter, both computing in float32. They add
# the same products in another order; in bfloat16 the sums themselves are rounded to 3 digits, and
# an int8 base rounds its activations to 8 bits, which the merged model does not.
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
    """The largest difference of a logit, and the share of places with the same likeliest token."""
    pairs = list(zip(these, those, strict=True))
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return {"largest_logit_difference": largest, "same_next_token": sum(same) / len(same)}


def merge(config: dict[str, Any], adapter: Path, form: str = "chat") -> Path:
    """Merges a PEFT folder into the base of an Axolotl config; returns the folder of the model.

    form: the prompt format that the adapter was trained on. Does nothing where `merged/` was made
    of all this. Raises JobFailed where the merged model is not base + adapter within TOLERANCE.
    """
    target, precision = adapter / "merged", models.precision(config)
    origin = {
        "adapter_sha256": digest(adapter / "adapter_model.safetensors"),
        "base_model": config["base_model"],
        "precision": precision,
        "prompt_format": form,
    }
    if (target / "merge.json").is_file():
        made = json.loads((target / "merge.json").read_bytes())
        if all(made.get(key) == value for key, value in origin.items()):
            return target
    models.bring_base(config["base_model"])
    quiet()
    options = config.get("chat_template_kwargs")
    with tempfile.TemporaryDirectory(dir=adapter, prefix=".merging-") as name:
        work = Path(name)
        model, tokenizer = models.load(config, adapter)
        dtype = str(model.dtype).removeprefix("torch.")
        if custom := prompts.template(tokenizer, form):
            tokenizer.chat_template = custom
        # A base without a chat template is merged all the same; the texts are then bare.
        shape = "chat" if tokenizer.chat_template else "bare"
        expected = logits(model, tokenizer, options, shape)
        base = model.unload()
        del model
        with naming(target):
            write_merged(base, config, adapter, work)
            tokenizer.save_pretrained(work)
        del base
        gc.collect()
        merged, _ = models.load({"base_model": str(work), "dtype": dtype})
        made = {
            **origin,
            "computed_in": dtype,
            "tolerance": TOLERANCE.get("int8" if precision == "int8" else dtype, 1.0),
            **difference(expected, logits(merged, tokenizer, options, shape)),
        }
        del merged
        if precision == "nf4":
            again, _ = models.load(models.at({"base_model": str(work)}, "nf4"))
            made["quantized_again"] = difference(expected, logits(again, tokenizer, options, shape))
            del again
        if made["largest_logit_difference"] > made["tolerance"]:
            raise JobFailed(
                f"the merged model is not base + adapter: a logit differs by "
                f"{made['largest_logit_difference']:.3g}, more than {made['tolerance']:g}; "
                "nothing is kept"
            )
        write_json(work / "merge.json", made)
        share(work)
        shutil.rmtree(target, ignore_errors=True)
        work.chmod(adapter.stat().st_mode)
        os.rename(work, target)
        work.mkdir()  # which the temporary directory removes
    return target


def write_merged(base: Any, config: dict[str, Any], adapter: Path, folder: Path) -> None:
    """Writes a base with an adapter's product added to `folder`; changes the loaded `base`."""
    import torch

    if models.precision(config) in ("nf4", "fp4", "int8"):
        base = base.dequantize()
    checked = models.check_adapter(config, adapter)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if checked.touches_embeddings and head.weight is embedding.weight:
        # An adapter of one of them leaves the other as it is.
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    merged = models.attach(base, adapter, checked).merge_and_unload(safe_merge=True)
    # transformers would turn the names back into those of the quantized file, which it cannot.
    published = models.published_precision(str(config["base_model"]))
    merged.save_pretrained(folder, save_original_format=not published)


def run(
    recipe: str | None, adapter: str | None, precision: str | None, prompt_format: str | None
) -> None:
    """Merges an adapter that is named as in `subjects.find`, and prints how the two compare."""
    try:
        who = subjects.find(recipe, adapter, precision, prompt_format)
    except subjects.NotRenderable:  # the weights merge all the same, and the base's template stays
        who = subjects.find(recipe, adapter, precision, "chat")
    if not who.adapter:
        raise WrongInput(f"{who.name} has no adapter to merge")
    print(f"merge      {who.name} into {who.config['base_model']}", flush=True)
    target = merge(who.config, who.adapter, who.prompt_format)
    made = json.loads((target / "merge.json").read_bytes())
    print(
        f"merge      {shown(target)}: logits differ from base + adapter by at most "
        f"{made['largest_logit_difference']:.2g} (tolerance {made['tolerance']:g})"
    )
    if again := made.get("quantized_again"):
        print(
            f"merge      quantized to 4 bits anew it would differ by up to "
            f"{again['largest_logit_difference']:.2g}, with the same next token on "
            f"{again['same_next_token']:.0%}: serve it as it is, or base and adapter apart"
        )
