"""Trains a tiny random model of a base's own class: what a method really quantizes and trains.

    check_method("qwen3-0.6b", "r4", twin, work)     a list of findings

The twin goes the whole way of a recipe: trained a few steps by Axolotl, scored, merged and loaded
again.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools import adapters, models, prompts, recipes
from tools.base.describe import find_decoder, list_expert_modules
from tools.base.findings import Finding, judge
from tools.base.tokens import build_base_config
from tools.common import JobFailed, WrongInput, quiet
from tools.runs import Run
from tools.train import hardware, launch, profiles
from tools.train.machines import Machines
from tools.use import merge

STEPS = 3
TEXTS = {
    "Net sales rose by a tenth.": "positive",
    "The plant will close in May.": "negative",
    "The annual meeting is on Monday.": "neutral",
    "Profit more than doubled.": "positive",
}
QUESTION = "What is the sentiment of this news? Answer with negative, neutral or positive.\n"


def write_trial_rows(path: Path) -> None:
    """A few chat rows, enough for every step."""
    rows = [
        [{"role": "user", "content": QUESTION + text}, {"role": "assistant", "content": label}]
        for text, label in TEXTS.items()
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * STEPS))


def build_twin_recipe(model: str, method: str, twin: Path, work: Path) -> recipes.Recipe:
    """The recipe of a method on the twin, for a few steps."""
    config = build_base_config(model, method, str(twin))
    rows = work / "rows.jsonl"
    write_trial_rows(rows)
    run = work / method
    schedule = ("test_datasets", "evals_per_epoch", "saves_per_epoch", "eval_steps")
    # The twin is not stored in the base's own format.
    stored = ("model_quantization_config", "model_quantization_config_kwargs")
    config = {key: value for key, value in config.items() if key not in schedule + stored}
    config |= {
        "datasets": [config["datasets"][0] | {"path": str(rows)}],
        "output_dir": str(run),
        "dataset_prepared_path": str(run / "prepared"),
        **{"num_epochs": 1, "max_steps": STEPS, "save_steps": STEPS, "warmup_steps": 1},
        **{"micro_batch_size": 2, "gradient_accumulation_steps": 1, "sequence_len": 1024},
    }
    return recipes.Recipe(f"{model}/{method}", None, config, "0")


def train_twin(recipe: recipes.Recipe) -> dict[str, Any]:
    """Trains a trial with this machine's profile; returns its merged config."""
    here = hardware.detect_host()
    profile, _, _ = profiles.choose(here, profiles.Choice(None, 1), 1)
    config = profiles.merge_config(recipe, profiles.Choice(profile), here)
    trial = replace(recipe, config=config)
    launch.execute(trial, config, profile, True, Machines())
    return config


def explain_unquantized(model: Any, config: dict[str, Any]) -> list[str]:
    """Which layers of a loaded base's decoder are not at the precision of its recipe."""
    import bitsandbytes as bnb
    import torch

    kinds = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
    precision = models.precision(config)
    if precision not in kinds:
        return []
    reasons = []
    for layer in find_decoder(model).layers:
        if experts := list_expert_modules(layer):
            weights = sum(w.numel() for module in experts for w in module.parameters())
            share = weights / count_weights(layer)
            reasons.append(f"experts stay at 16 bits: {share:.0%} of a layer's parameters")
        reasons += [
            f"{name} is not at {precision}"
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not isinstance(module, kinds[precision])
            and "lora_" not in name
        ]
    return list(dict.fromkeys(reasons))


def count_weights(layer: Any) -> int:
    """Parameters of a layer; those of a 4-bit tensor hold two numbers a byte."""
    return sum(
        w.numel() * (2 if getattr(w, "quant_state", None) is not None else 1)
        for w in layer.parameters()
    )


def explain_untrained(adapter: Path) -> list[str]:
    """Which matrices of an adapter no step has changed: LoRA's B, which training starts at zero."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / adapters.WEIGHTS)
    zeros = [name for name, tensor in tensors.items() if "lora_B" in name and not tensor.any()]
    return [f"{zeros[0]} was not trained, with {len(zeros) - 1} others"] if zeros else []


def answer_questions(model: Any, tokenizer: Any, config: dict[str, Any]) -> list[str]:
    """Answers to the trial's questions, as scoring asks them."""
    from lm_eval.api.instance import Instance

    from evals.model import Model

    settings = {"max_gen_toks": 4, "do_sample": False, "until": []}
    options = config.get("chat_template_kwargs")
    texts = [
        prompts.render(tokenizer, [{"role": "user", "content": QUESTION + text}], options)
        for text in TEXTS
    ]
    scorer = Model(model, tokenizer, "trial", len(texts))
    requests = [
        Instance("generate_until", {}, (text, dict(settings)), number)
        for number, text in enumerate(texts)
    ]
    return list(scorer.generate_until(requests))


def check_method(model: str, method: str, twin: Path, work: Path) -> list[Finding]:
    """Findings on a method with a base's twin; `work` is a folder for its run."""
    quiet()
    recipe = build_twin_recipe(model, method, twin, work)
    run = Run(Path(recipe.config["output_dir"]))
    try:
        config = train_twin(recipe)
        loaded, tokenizer = models.load(config, run.folder)
        losses = [line["loss"] for line in run.losses()]
        findings = [
            judge(method, "it trains", [], f"{len(losses)} steps"),
            judge(method, "its weights are quantized", explain_unquantized(loaded, config)),
            judge(method, "every adapter matrix is trained", explain_untrained(run.folder)),
        ]
        answers = answer_questions(loaded, tokenizer, config)
        findings.append(judge(method, "it is scored", [], f"{len(answers)} prompts"))
        del loaded
        target = merge.merge(config, run.folder)
        report = json.loads((target / "merge.json").read_text())
    except (WrongInput, JobFailed) as error:
        return [Finding(method, "it trains, is scored and merges", "failed", str(error)[:200])]
    except (ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Finding(method, "a library loads it", "failed", reason[:200])]
    difference = f"logits differ by {report['largest_logit_difference']:.1g}"
    return [
        *findings,
        judge(method, "merged and loaded again it has the same logits", [], difference),
    ]
