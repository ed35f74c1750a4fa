"""Checks a base's tokenizer and chat template with Axolotl's own preparation of rows.

    check_tokens(config, tokenizer)     a list of findings; `config` is that of a recipe of the base

Rows are tokenized as Axolotl trains them and compared, token by token, with the prompts that are
scored.
"""

import copy
import json
import logging
import os
from itertools import groupby
from typing import Any

from evals.run import read_tasks
from tools import prompts, recipes, sources
from tools.base.findings import Finding, judge
from tools.common import WrongInput, quiet
from tools.data.look import load_strategy

PART = "tokenizer"
QUESTION = {"role": "user", "content": "Is it good?\nNet sales rose 12.5 %.\nAnswer:"}
ANSWER = {"role": "assistant", "content": "positive"}
SHAPES = {
    "one turn": [QUESTION, ANSWER],
    "a system turn": [{"role": "system", "content": "You label news."}, QUESTION, ANSWER],
    "three turns": [QUESTION, ANSWER, {"role": "user", "content": "And now?"}, ANSWER],
}
# What a template's clock may say: prompts of both days must be the same.
DATES = ("01 January 2001", "31 December 2042")


def compare_tokens(strategy: Any, tokenizer: Any, options: Any, shape: str) -> str:
    """How the tokens that are trained differ from those that are scored; "" where they do not."""
    turns = SHAPES[shape]
    row = strategy.tokenize_prompt({"messages": copy.deepcopy(turns)})
    ids, labels = list(row["input_ids"]), list(row["labels"])
    fed = prompts.tokens(tokenizer, turns[:-1], options)
    if ids[: len(fed)] != fed:
        place = len(os.path.commonprefix([ids, fed]))
        return f"{shape}: token {place} is {tokenizer.decode(fed[place])!r} in the prompt alone"
    if labels[len(fed) - 1] != -100:
        return f"{shape}: the last token of the prompt is trained"
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    wanted = [answer + tokenizer.eos_token for answer in answers]
    trained = read_trained(tokenizer, labels)
    return "" if trained == wanted else f"{shape}: {trained} is trained, not {wanted}"


def read_trained(tokenizer: Any, labels: list[int]) -> list[str]:
    """The texts that the loss falls on, without blanks at their ends."""
    runs = groupby(labels, key=lambda label: label != -100)
    return [tokenizer.decode(list(run)).strip() for is_trained, run in runs if is_trained]


def check_shapes(config: dict[str, Any], tokenizer: Any) -> Finding:
    """Training begins with the prompt that is scored; answers and their ends are trained alone."""
    quiet()
    logging.getLogger("axolotl").setLevel(logging.ERROR)
    strategy, options = load_strategy(tokenizer, config), config.get("chat_template_kwargs")
    reasons: list[str] = []
    shapes = []
    for shape, turns in SHAPES.items():
        if prompts.explain_unrenderable(tokenizer, {"messages": turns}, options):
            continue
        shapes.append(shape)
        reasons += filter(None, [compare_tokens(strategy, tokenizer, options, shape)])
    if "one turn" not in shapes:
        reasons = ["the chat template does not render a question and its answer"]
    what = "what is trained begins with the prompt that is scored; the end of turn is trained"
    return judge(PART, what, reasons, ", ".join(shapes))


def check_pad(config: dict[str, Any], tokenizer: Any) -> Finding:
    """The pad token ends no answer and stands in no row, so masking it masks nothing else."""
    options, pad = config.get("chat_template_kwargs"), tokenizer.pad_token_id
    reasons = []
    if pad is None:
        reasons.append("there is no pad token")
    elif pad == tokenizer.eos_token_id:
        reasons.append(f"{tokenizer.pad_token} pads a batch and ends an answer")
    elif len(tokenizer) > max(tokenizer.get_vocab().values()) + 1:
        reasons.append(f"{tokenizer.pad_token} is not in the base's vocabulary")
    else:
        text = prompts.render_row(tokenizer, {"messages": SHAPES["three turns"]}, options)
        if pad in tokenizer.encode(text, add_special_tokens=False):
            reasons.append(f"{tokenizer.pad_token} stands in a row")
    return judge(PART, "the pad token is masked and nothing else is", reasons, tokenizer.pad_token)


def check_thinking(config: dict[str, Any], tokenizer: Any) -> Finding:
    """The answer follows the prompt at once: no reasoning is open where it begins."""
    text = prompts.render(tokenizer, [QUESTION], config.get("chat_template_kwargs"))
    opened = text.count(prompts.THOUGHT.replace("/", ""))
    reasons = []
    if opened != text.count(prompts.THOUGHT):
        reasons.append(
            "the prompt ends inside a <think> block; enable_thinking: false may close it"
        )
    return judge(PART, "no reasoning is asked for", reasons)


def check_dates(config: dict[str, Any], tokenizer: Any) -> Finding:
    """A prompt is the same on every day."""
    options = config.get("chat_template_kwargs") or {}
    texts = [
        prompts.render(tokenizer, [QUESTION], options | {"strftime_now": lambda _, date=date: date})
        for date in DATES
    ]
    reasons = []
    if texts[0] != texts[1]:
        reasons.append("the template writes today's date; give the recipes a template without it")
    return judge(PART, "a prompt is the same on every day", reasons)


def check_start(config: dict[str, Any], tokenizer: Any) -> Finding:
    """A prompt begins with the BOS token at most once."""
    ids = prompts.tokens(tokenizer, [QUESTION], config.get("chat_template_kwargs"))
    doubled = ids[0] == ids[1] == tokenizer.bos_token_id
    reasons = [f"a prompt begins with {tokenizer.bos_token} twice"] if doubled else []
    return judge(PART, "no doubled first token", reasons)


def count_long_keys(tokenizer: Any) -> tuple[dict[str, int], int]:
    """({dataset: keys over its answer budget}, keys) of FinLoRA's test files that are at hand."""
    long_keys, total = {}, 0
    for dataset, row in sources.tables()["datasets"].items():
        paths = [folder / row["file"] for folder in sources.list_folders().values()]
        path = next(filter(lambda path: path.is_file(), paths), None)
        task = read_tasks().get(dataset)
        if not path or not task:
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        keys = [str(line.get("target")) for line in lines if isinstance(line, dict)]
        budget = task["generation_kwargs"]["max_gen_toks"]
        sizes = [len(ids) for ids in tokenizer(keys, add_special_tokens=False)["input_ids"]]
        total += len(sizes)
        if count := sum(size > budget for size in sizes):
            long_keys[dataset] = count
    return long_keys, total


def check_budgets(config: dict[str, Any], tokenizer: Any) -> Finding:
    """The answer budgets of the evaluations hold the keys of FinLoRA's files."""
    long_keys, total = count_long_keys(tokenizer)
    what = "the answer budgets hold the keys of FinLoRA's test files at hand"
    if not total:
        return Finding(PART, what, "not verified", "no such file is at hand")
    cut = ", ".join(f"{count:,} of {name}" for name, count in long_keys.items())
    detail = f"{total:,} keys" + (f", but for {cut}, which cannot be given" if cut else "")
    return Finding(PART, what, "verified", detail)


CHECKS = (check_shapes, check_pad, check_thinking, check_dates, check_start, check_budgets)


def check_tokens(config: dict[str, Any], tokenizer: Any) -> list[Finding]:
    """All findings on a tokenizer, as the recipe `config` sets it."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check(config, tokenizer))
        except WrongInput as error:
            what = "the chat template renders a conversation"
            findings.append(Finding(PART, what, "failed", str(error)))
    return findings


# ---- settings of a new base


def find_end(tokenizer: Any, options: dict[str, Any]) -> str:
    """The token with which a template ends an answer."""
    text = prompts.render_row(tokenizer, {"messages": SHAPES["one turn"]}, options)
    after = text.rpartition(ANSWER["content"])[2]
    ids = tokenizer.encode(after, add_special_tokens=False)
    special = [token for token in ids if token in tokenizer.all_special_ids] or ids
    return str(tokenizer.convert_ids_to_tokens(special[0])) if special else ""


# Tokens that may pad, in this order, where a tokenizer names none.
PADS = ("<|endoftext|>", "<|end_of_text|>", "<pad>", "<|pad|>", "<unk>")


def propose_settings(tokenizer: Any) -> dict[str, Any]:
    """The row of a base's settings in recipes/matrix.yaml, from its tokenizer and its template."""
    template = str(tokenizer.chat_template or "")
    options: dict[str, Any] = {}
    if "enable_thinking" in template:
        options["enable_thinking"] = False
    if "date_string" in template:
        options["date_string"] = "26 Jul 2024"
    end = find_end(tokenizer, options)
    tokens = {"eos_token": end} if end and end != tokenizer.eos_token else {}
    vocabulary = tokenizer.get_vocab()
    names = [tokenizer.pad_token, *PADS, tokenizer.unk_token]
    pads = [name for name in names if name in vocabulary and name != (end or tokenizer.eos_token)]
    if pads:
        tokens["pad_token"] = pads[0]
    settings: dict[str, Any] = {"special_tokens": tokens} if tokens else {}
    return settings | ({"chat_template_kwargs": options} if options else {})


def build_base_config(model: str, method: str, base: str) -> dict[str, Any]:
    """The config of a model's first recipe of a method, on the files of `base`."""
    task = next(iter(recipes.read_matrix()["tasks"]))
    return recipes.build_config(f"{model}/{task}_{method}") | {"base_model": base}
