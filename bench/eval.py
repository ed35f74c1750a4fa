"""Measures how fast answers are scored, against FinLoRA's way, plain lm-eval and pure prefill.

    python -m bench.eval [sentiment_r4] [--dataset fpb] [--limit 64] [--rounds 2] [--base]

All answer the same rows with the same loaded base and adapter, one after the other in each round;
the best round counts. What is timed is `generate_until`, with tokens made and read.

    ours       evals.model.Model, as `make eval` uses it
    FinLoRA's  batches of 8 in file order, padded on the left, the task's new tokens each, and 4-bit
               weights dequantized in every pass
    lm-eval    its HFLM, in batches of 16
    prefill    all prompt tokens through the model once, in batches of 16, and nothing generated:
               not an answer, but what answering whole prompts costs at the least

Without a trained run the adapter is a random one of the recipe's shape. Predictions are the labels
as the task reads them; where one differs from ours, the exit status is 1.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evals import run
from evals.answers import Prompts
from tools import models, recipes, smollm2
from tools.common import JobFailed, WrongInput, command, quiet

FINLORAS_BATCH = 8
BATCH = 16


def load(recipe: recipes.Recipe, base: bool = False) -> tuple[Any, Any, str]:
    """The recipe's base with its adapter, the tokenizer, and which adapter it is."""
    smollm2.ensure(recipe.config["base_model"])
    if base:
        return *models.load(recipe.config), "no adapter"
    if recipe.run.adapter_file.is_file():
        return *models.load(recipe.config, recipe.run.folder), "its adapter"
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = models.load(recipe.config)
    torch.manual_seed(0)
    modules = recipe.config["lora_target_modules"]
    shape = LoraConfig(
        r=recipe.config["lora_r"], target_modules=modules, init_lora_weights=False, lora_dropout=0
    )
    return get_peft_model(model, shape).eval(), tokenizer, "a random adapter"


@contextmanager
def dequantizing(model: Any) -> Iterator[None]:
    """Takes the dense copies of 4-bit weights away, so that every pass makes them anew."""
    dense = {
        module: vars(module).pop("forward")
        for module in model.modules()
        if hasattr(module, "quant_state") and "forward" in vars(module)
    }
    try:
        yield
    finally:
        for module, forward in dense.items():
            module.forward = forward


def ways(model: Any, tokenizer: Any, rows: int) -> dict[str, Any]:
    """An lm-eval model for each way to answer, by name."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from evals.model import Model

    class FinLoRAs(HFLM):
        batch, sort = FINLORAS_BATCH, False

        def answers(self, ids: Any, budget: int) -> list[str]:
            with dequantizing(model):
                told = model.generate(
                    **ids,
                    max_new_tokens=budget,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = told[:, ids["input_ids"].shape[1] :]
            return tokenizer.batch_decode(new, skip_special_tokens=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            order = list(range(len(requests)))
            if self.sort:
                order.sort(key=lambda n: -len(tokenizer.encode(requests[n].args[0])))
            found = [""] * len(requests)
            for start in range(0, len(order), self.batch):
                batch = order[start : start + self.batch]
                texts = [requests[n].args[0] for n in batch]
                ids = tokenizer(
                    texts, return_tensors="pt", padding=True, add_special_tokens=False
                ).to(model.device)
                budget = requests[batch[0]].args[1]["max_gen_toks"]
                for n, text in zip(batch, self.answers(ids, budget), strict=True):
                    found[n] = text
            return found

    class Prefill(FinLoRAs):
        batch, sort = BATCH, True

        def answers(self, ids: Any, budget: int) -> list[str]:
            with torch.inference_mode():
                model(**ids, use_cache=True, logits_to_keep=1)
            return [""] * len(ids["input_ids"])

    loaded = {"pretrained": model, "tokenizer": tokenizer}
    return {
        "ours": Model(model, tokenizer, "ours", rows),
        "FinLoRA's": FinLoRAs(**loaded, batch_size=FINLORAS_BATCH),
        "lm-eval": HFLM(**loaded, batch_size=BATCH),
        "prefill": Prefill(**loaded, batch_size=BATCH),
    }


def timed(lm: Any, dataset: str, limit: int, form: Prompts) -> tuple[float, list[str]]:
    """Seconds that a model takes to answer, and the labels that it answers, by row."""
    plain, seconds = lm.generate_until, []

    def generate_until(requests: list[Any], **options: Any) -> list[str]:
        start = time.perf_counter()
        told = plain(requests, disable_tqdm=True)
        seconds.append(time.perf_counter() - start)
        return told

    lm.generate_until = generate_until
    rows, _ = run.measure(lm, dataset, limit, form)
    del lm.generate_until
    return seconds[0], [row["answered"] for row in rows]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="the speed of scoring")
    parser.add_argument("recipe", nargs="?", default="smollm2-135m/sentiment_r4")
    parser.add_argument("--dataset", default="fpb", help=", ".join(run.tasks()))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--base", action="store_true", help="without an adapter")
    given = parser.parse_args()
    run.datasets(None, given.dataset)
    if given.limit < 1 or given.rounds < 1:
        raise WrongInput("--limit and --rounds are numbers from 1")
    quiet()
    recipe = recipes.find(given.recipe)
    model, tokenizer, which = load(recipe, given.base)
    precision = models.precision(recipe.config)
    rows = len(run.picked(given.dataset, given.limit))
    print(f"{recipe.name} with {which}, {precision}, {rows} rows of {given.dataset}")
    best: dict[str, float] = {}
    labels: dict[str, list[str]] = {}
    for number in range(given.rounds + 1):
        for name, lm in ways(model, tokenizer, rows).items():
            # The first round warms up, on a few rows.
            limit = given.limit if number else BATCH
            options = recipe.config.get("chat_template_kwargs")
            took, labels[name] = timed(lm, given.dataset, limit, Prompts("chat", options))
            if number:
                best[name] = min(took, best.get(name, took))
        print(f"round {number}, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{'':<10} rows/s   ours is … times as fast   other labels")
    differ = {}
    for name, took in best.items():
        differ[name] = sum(a != b for a, b in zip(labels[name], labels["ours"], strict=True))
        told = "" if name == "prefill" else f"{differ[name]} of {rows}"
        print(f"{name:<10} {rows / took:6.2f} {took / best['ours']:15.2f} {told:>23}")
    wrong = [name for name in ("FinLoRA's", "lm-eval") if differ[name]]
    if wrong:
        raise JobFailed(f"labels differ from ours: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
