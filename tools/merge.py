"""Merges an adapter into its base, so that any program can load the result without PEFT.

    python -m tools.merge smollm2-135m/sentiment_r4
    python -m tools.merge --adapter runs/hub/someone/some-adapter

The base is first written as the adapter saw it in training: the linear layers quantized and
dequantized, everything else as it is. Axolotl's merge-lora then adds the adapter's product. (Left
to itself it merges a QLoRA adapter into a base whose embedding is quantized too, which training
never does; on SmolLM2 that moves a logit by up to 10.) The result lies in `<run>/merged`.

Afterwards the merged model is compared with base + adapter: `merged/merge.json` holds the largest
difference of a logit, and what quantizing the merged weights anew would change.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tools import export, prompt, subject, weights
from tools.cli import JobFailed, command, digest, quiet, shown, write_json

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


def logits(model: Any, tokenizer: Any, options: dict[str, Any] | None) -> list[Any]:
    """The logits of a model after each token of each text: (tokens, vocabulary), float32."""
    import torch

    found = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if tokenizer.chat_template:
            ids = prompt.tokens(tokenizer, [{"role": "user", "content": text}], options)
        with torch.inference_mode():
            given = torch.tensor([ids], device=model.device)
            found.append(model(input_ids=given).logits[0].float().cpu())
    return found


def difference(these: list[Any], those: list[Any]) -> dict[str, float]:
    """The largest difference of a logit, and the share of places with the same likeliest token."""
    pairs = list(zip(these, those, strict=True))
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return {"largest_logit_difference": largest, "same_next_token": sum(same) / len(same)}


def merge(config: dict[str, Any], adapter: Path) -> Path:
    """Merges a PEFT folder into the base of an Axolotl config; returns the folder of the model.

    Does nothing where `merged/` was made of this adapter. Raises JobFailed where the merged model
    is not base + adapter within TOLERANCE.
    """
    target, sha = adapter / "merged", digest(adapter / "adapter_model.safetensors")
    if (target / "merge.json").is_file():
        told = yaml.safe_load((target / "merge.json").read_text())
        if told.get("adapter_sha256") == sha:
            return target
    export.ensure(config["base_model"])
    quiet()
    options = config.get("chat_template_kwargs")
    dtype = "float32"
    with tempfile.TemporaryDirectory(dir=adapter, prefix=".merging-") as name:
        work = Path(name)
        model, tokenizer = weights.load(config, adapter)
        dtype = str(model.dtype).removeprefix("torch.")
        expected = logits(model, tokenizer, options)
        base = model.unload()
        del model
        if weights.precision(config) in ("nf4", "fp4", "int8"):
            base = base.dequantize()
        base.save_pretrained(work / "base")
        tokenizer.save_pretrained(work / "base")
        del base
        gc.collect()
        _axolotl(config, adapter, work)
        merged, _ = weights.load({"base_model": str(work / "merged"), "dtype": dtype})
        found = difference(expected, logits(merged, tokenizer, options))
        del merged
        precision = weights.precision(config)
        told = {
            "adapter_sha256": sha,
            "base_model": config["base_model"],
            "precision": precision,
            "computed_in": dtype,
            "tolerance": TOLERANCE.get("int8" if precision == "int8" else dtype, 1.0),
            **found,
        }
        if weights.precision(config) == "nf4":
            again, _ = weights.load(weights.at({"base_model": str(work / "merged")}, "nf4"))
            told["quantized_again"] = difference(expected, logits(again, tokenizer, options))
            del again
        if told["largest_logit_difference"] > told["tolerance"]:
            raise JobFailed(
                f"the merged model is not base + adapter: a logit differs by "
                f"{told['largest_logit_difference']:.3g}, more than {told['tolerance']:g}; "
                "nothing is kept"
            )
        tokenizer.save_pretrained(work / "merged")
        write_json(work / "merged" / "merge.json", told)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(work / "merged", target)
    return target


def _axolotl(config: dict[str, Any], adapter: Path, work: Path) -> None:
    """Runs `axolotl merge-lora` on the base in work/base; it writes work/merged."""
    of_base = {"load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "deepspeed", "fsdp_config"}
    of_base |= {*prompt.TOKENIZER, "special_tokens", "base_model_config"}  # work/base has them
    content = {key: value for key, value in config.items() if key not in of_base}
    # Axolotl loads no plugin for a merge, and knows no keys of tools/plugin.py.
    for key in ("plugins", "dequantize_once", "answer_logits_only", "dtype"):
        content.pop(key, None)
    content |= {"base_model": str(work / "base"), "adapter": "lora", "output_dir": str(work)}
    content |= {"lora_model_dir": str(adapter), "dataset_prepared_path": str(work / "prepared")}
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(scripts / "axolotl"), "merge-lora", str(path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not (work / "merged").is_dir():
        last = (done.stderr.strip() or done.stdout.strip() or "no word of why").splitlines()[-1]
        raise JobFailed(f"axolotl merge-lora failed: {last}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="merge an adapter into its base")
    parser.add_argument("recipe", nargs="?", default="")
    parser.add_argument("--adapter", default="", help="a PEFT folder instead of a recipe's run")
    given = parser.parse_args()
    # The prompt's format does not matter for a merge.
    who = subject.find(given.recipe, given.adapter, form="bare")
    print(f"merge      {who.name} into {who.config['base_model']}", flush=True)
    target = merge(who.config, who.adapter or who.folder)
    told = yaml.safe_load((target / "merge.json").read_text())
    print(
        f"merge      {shown(target)}: logits differ from base + adapter by at most "
        f"{told['largest_logit_difference']:.2g} (tolerance {told['tolerance']:g})"
    )
    if again := told.get("quantized_again"):
        print(
            f"merge      quantized to 4 bits anew it would differ by up to "
            f"{again['largest_logit_difference']:.2g}, with the same next token on "
            f"{again['same_next_token']:.0%}: serve it as it is, or base and adapter apart"
        )


if __name__ == "__main__":
    main()
