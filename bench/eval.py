"""Measures how fast answers are scored, against FinLoRA's way, plain lm-eval and a bare prefill.

    python -m bench.eval [sentiment_r4] [--dataset fpb] [--limit 312] [--base] [--record]
    python -m bench.eval smollm2-135m/sentiment_r4 --limit 300 --vllm

All answer the same rows with the same loaded base and adapter, in turn; the best round counts.

    ours       evals.model.Model, as `make eval` uses it
    FinLoRA's  batches of 8 in file order, padded on the left, the task's new tokens each, and
               quantized weights converted in every pass
    lm-eval    its HFLM, in batches of 16
    prefill    all prompt tokens through the model once, in batches of 16: no answer, but the least
               that answering whole prompts costs
    packed prefill
               the same in our packs: the least that answering prompts costs where what they
               begin with is computed once
    vLLM       with --vllm, against ours alone: at the same precision, in its own environment

Without a trained run the adapter is a random one of the recipe's shape. Labels are read as the task
reads them; where one differs from ours, the exit status is 1. vLLM adds numbers in another order:
one in a hundred of its labels may differ. Each of these is listed with the logits of both models at
the first token in which their answers differ.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from lm_eval.models.huggingface import HFLM

from bench import performance
from evals import backends, run
from evals.answers import Prompts
from evals.backends import OpenModel
from evals.model import Model
from evals.vllm_model import VllmModel
from tools import models, recipes, smollm2, subjects
from tools.common import JobFailed, WrongInput, command, format_table, quiet

FINLORAS_BATCH = 8
BATCH = 16


def load_model(recipe: recipes.Recipe, base_only: bool) -> tuple[Any, Any, str]:
    """The recipe's base with its adapter, the tokenizer, and which adapter it is."""
    smollm2.ensure(recipe.config["base_model"])
    if base_only:
        return *models.load(recipe.config), "no adapter"
    if recipe.run.adapter_file.is_file():
        return *models.load(recipe.config, recipe.run.folder), "its adapter"
    from peft import LoraConfig, get_peft_model

    model, tokenizer = models.load(recipe.config)
    torch.manual_seed(0)
    modules = recipe.config["lora_target_modules"]
    shape = LoraConfig(r=recipe.config["lora_r"], target_modules=modules, init_lora_weights=False)
    return get_peft_model(model, shape).eval(), tokenizer, "a random adapter"


@contextmanager
def remove_dense_copies(model: Any) -> Iterator[None]:
    """Removes the dense copies of quantized weights, so that every pass converts them."""
    dense = {
        module: vars(module).pop("forward")
        for module in model.modules()
        if isinstance(module, Linear4bit | Linear8bitLt) and "forward" in vars(module)
    }
    try:
        yield
    finally:
        for module, forward in dense.items():
            module.forward = forward


class Padded(HFLM):  # type: ignore[misc]
    """Answers in batches padded on the left, in the order of `sort_key`."""

    batch = BATCH

    def sort_key(self, text: str) -> int:
        return -len(self.tokenizer.encode(text))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        order = sorted(range(len(requests)), key=lambda n: self.sort_key(requests[n].args[0]))
        answers = [""] * len(requests)
        for start in range(0, len(order), self.batch):
            batch = order[start : start + self.batch]
            texts = [requests[n].args[0] for n in batch]
            options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
            inputs = self.tokenizer(texts, **options).to(self.device)
            budget = requests[batch[0]].args[1]["max_gen_toks"]
            for n, text in zip(batch, self.answer(inputs, budget), strict=True):
                answers[n] = text
        return answers


class FinLoRAs(Padded):
    batch = FINLORAS_BATCH

    def sort_key(self, text: str) -> int:
        return 0

    def answer(self, inputs: Any, budget: int) -> list[str]:
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        with remove_dense_copies(self.model):
            ids = self.model.generate(**inputs, max_new_tokens=budget, **options)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


class Prefill(Padded):
    def answer(self, inputs: Any, budget: int) -> list[str]:
        with torch.inference_mode():
            self.model(**inputs, use_cache=True, logits_to_keep=1)
        return [""] * len(inputs["input_ids"])


class PackedPrefill(Model):
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        prefix = self.compute_prefix(prompts)
        for batch in self.divide(prompts, requests[0].args[1]["max_gen_toks"]):
            rows = [prompts[row] for row in batch]
            for pack in self.pack(rows, prefix.get_seq_length() if prefix else 0):
                self.compute_pack(pack, prefix)
        return [""] * len(requests)


def build_contenders(
    model: Any, tokenizer: Any, rows: int, open_vllm: OpenModel | None
) -> dict[str, Any]:
    """An lm-eval model for each way to answer, by name."""
    if open_vllm:
        side = "adapter" if hasattr(model, "peft_config") else "base"
        opened = open_vllm(side, "vLLM", rows).__enter__()
        return {"ours": Model(model, tokenizer, "ours", rows), "vLLM": opened}
    loaded = {"pretrained": model, "tokenizer": tokenizer, "batch_size": BATCH}
    contenders = {
        "ours": Model(model, tokenizer, "ours", rows),
        "FinLoRA's": FinLoRAs(**loaded),
        "lm-eval": HFLM(**loaded),
        "prefill": Prefill(**loaded),
    }
    if contenders["ours"].packs:
        contenders["packed prefill"] = PackedPrefill(model, tokenizer, "packed prefill", rows)
    return contenders


def time_answers(
    lm: Any, dataset: str, limit: int, prompts: Prompts
) -> tuple[float, list[str], list[str]]:
    """Seconds that a model takes to answer, the labels that it answers and the prompts, by row."""
    generate = lm.generate_until
    seconds: list[float] = []
    texts: list[str] = []

    def generate_until(requests: list[Any], **options: Any) -> list[str]:
        start = time.perf_counter()
        answers = generate(requests, disable_tqdm=True)
        seconds.append(time.perf_counter() - start)
        texts.extend(request.args[0] for request in requests)
        return answers

    lm.generate_until = generate_until
    rows, _ = run.measure(lm, dataset, limit, prompts)
    return seconds[0], [row["answered"] for row in rows], texts


def compare_logits(ours: Model, vllm: VllmModel, text: str) -> str:
    """Both models' logits of the two tokens in which their answers to a prompt first differ."""
    prompt = ours.tok_encode(text)
    sampling = {"max_tokens": BATCH, "temperature": 0.0, "stop_token_ids": [ours.eot_token_id]}

    def ask_vllm(ids: list[int], **changes: Any) -> dict[str, Any]:
        answers = vllm.worker.answer([ids], vllm.adapter, sampling | changes, vllm.max_length)
        return answers[0]

    theirs = ask_vllm(prompt)["tokens"]
    ids = torch.tensor([prompt], device=ours.device)
    options = {"do_sample": False, "pad_token_id": ours.tokenizer.pad_token_id}
    own = ours.model.generate(ids, max_new_tokens=BATCH, **options)[0, len(prompt) :].tolist()
    place = next(
        (n for n, pair in enumerate(zip(own, theirs, strict=False)) if len({*pair}) > 1), None
    )
    if place is None:
        return "alone, both answer the same"
    tokens = [own[place], theirs[place]]
    prompt += own[:place]
    with torch.inference_mode():
        logits = ours.model(input_ids=torch.tensor([prompt], device=ours.device)).logits[0, -1]
    step = ask_vllm(prompt, max_tokens=1, logprob_token_ids=tokens)["logits"][0]
    rows = {"ours": logits[tokens].tolist(), "vLLM": [step[str(token)] for token in tokens]}
    words = [repr(ours.tokenizer.decode([token])) for token in tokens]
    return "; ".join(
        f"{name}: " + ", ".join(f"{word} {x:.4f}" for word, x in zip(words, values, strict=True))
        for name, values in rows.items()
    )


def list_differences(
    contenders: dict[str, Any], labels: dict[str, list[str]], texts: list[str]
) -> None:
    """Prints the logits of both models for each row to which vLLM answers another label."""
    for text, own, other in zip(texts, labels["ours"], labels["vLLM"], strict=True):
        if own != other:
            logits = compare_logits(contenders["ours"], contenders["vLLM"], text)
            print(f"ours {own}, vLLM {other}: {logits}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="the speed of scoring")
    parser.add_argument("recipe", nargs="?", default="smollm2-135m/sentiment_r4")
    parser.add_argument("--dataset", default="fpb", help=", ".join(run.read_tasks()))
    parser.add_argument("--limit", type=int, default=312)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--base", action="store_true", help="without an adapter")
    parser.add_argument("--vllm", action="store_true", help="compare ours with vLLM")
    parser.add_argument("--record", action="store_true", help="add the rates to results/")
    options = parser.parse_args()
    run.choose_datasets(None, [options.dataset])
    if options.vllm and options.record:
        raise WrongInput("--record goes without --vllm: the page shows the other contenders")
    if options.limit < 1 or options.rounds < 1:
        raise WrongInput("--limit and --rounds are numbers from 1")
    quiet()
    recipe = recipes.find(options.recipe)
    model, tokenizer, adapter = load_model(recipe, options.base)
    rows = len(run.pick_rows(options.dataset, options.limit))
    precision = models.precision(recipe.config)
    print(f"{recipe.name} with {adapter}, {precision}, {rows} rows of {options.dataset}")
    prompts = Prompts("chat", recipe.config.get("chat_template_kwargs"))
    open_vllm = None
    if options.vllm:
        open_vllm = backends.open_vllm(subjects.find(recipe.name, base_only=options.base))
    best: dict[str, float] = {}
    labels: dict[str, list[str]] = {}
    for number in range(options.rounds + 1):
        # The first round warms up, on a few rows.
        limit = options.limit if number else BATCH
        contenders = build_contenders(model, tokenizer, rows, open_vllm)
        for name, lm in contenders.items():
            seconds, labels[name], texts = time_answers(lm, options.dataset, limit, prompts)
            if number:
                best[name] = min(seconds, best.get(name, seconds))
        print(f"round {number}, load {os.getloadavg()[0]:.1f}", flush=True)
    table = [("", "rows/s", "ours is … times as fast", "other labels")]
    differing = {
        name: sum(a != b for a, b in zip(labels[name], labels["ours"], strict=True))
        for name in best
        if "prefill" not in name
    }
    for name, seconds in best.items():
        other = f"{differing[name]} of {rows}" if name in differing else ""
        table.append((name, f"{rows / seconds:.2f}", f"{seconds / best['ours']:.2f}", other))
    print(f"\n{format_table(table, '<>>>')}")
    if options.record:
        rates = {name: rows / seconds for name, seconds in best.items()}
        figures = {"precision": precision, "rows": rows, "rows_per_second": rates, "note": adapter}
        performance.record("eval", f"{recipe.name}, {options.dataset}", figures)
    if open_vllm:
        list_differences(contenders, labels, texts)
    allowed = {"vLLM": rows / 100}
    if wrong := [name for name, count in differing.items() if count > allowed.get(name, 0)]:
        raise JobFailed(f"labels differ from ours: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
