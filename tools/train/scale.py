"""Plans what the whole catalogue takes on 1, 4 and 64 GPUs, and writes it to docs/scale.md.

    python -m tools render

A recipe trains on the first kind of card in `CARDS` that holds it; several GPUs train several
recipes at once, the longest first. Rows and tokens of a task are in `TASKS`.
"""

import heapq
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tools import recipes
from tools.common import ROOT, insert_block, update_page
from tools.train.plan import Hardware, count_training_rows, plan

DOC = ROOT / "docs" / "scale.md"
START, END = "<!-- numbers: python -m tools render -->", "<!-- end of numbers -->"
GPU_COUNTS = (1, 4, 64)

# Rows of the training set, mean tokens of a row, and where both are from. FinLoRA's "76.8K" rows of
# sentiment belong to the file that its training file replaced.
TASKS = {
    "sentiment": (
        72824,
        100,
        "rows: the [script](../data/README.md#sentiment) that builds the file; "
        "tokens: counted on its test sets",
    ),
    "headline": (82161, 80, "rows: FinLoRA; tokens: assumed"),
    "ner": (13549, 130, "rows: FinLoRA; tokens: assumed"),
    "finer": (10000, 1800, "assumed"),
    "xbrl_extract": (10000, 3800, "rows: assumed; tokens: FinLoRA"),
    "xbrl_term": (5856, 103, "counted"),
    "formula": (800, 161, "counted"),
    "financebench": (86, 1209, "counted"),
}
# USD for one GPU and hour: 0.26 is what FinLoRA paid; the other is an assumption.
CARDS = (Hardware("A5000 24GB", price=0.26), Hardware("A100 80GB", price=1.80))
SETS = {
    "the default, Llama 3.1 8B": "llama-3.1-8b/*",
    "of it, QLoRA (r4)": "llama-3.1-8b/*_r4",
    "all bases but Llama 3.1 70B and SmolLM2": "*",
    "of them, QLoRA (r4)": "*_r4",
}
LARGE = ("llama-3.1-70b/*", "smollm2-135m/*")  # FSDP or a laptop: not in these sums


@dataclass(frozen=True)
class Training:
    recipe: str
    card: Hardware
    hours: float
    usd: float


def plan_training(recipe: str) -> Training | None:
    """The training of a recipe on the first card that holds it."""
    _, task, _ = recipes.split_name(recipe)
    all_rows, tokens, _ = TASKS[task]
    config = recipes.build_config(recipe)
    rows = count_training_rows(config, all_rows)
    longest = recipes.read_matrix()["tasks"][task]["longest"]
    for card in CARDS:
        # The peak is that of the longest row, the hours are those of the mean one.
        if plan(config, card, rows, longest)["fits"]:
            cost = plan(config, card, rows, tokens)
            return Training(recipe, card, cost["hours"], cost["usd"])
    return None


def compute_makespan(hours: list[float], gpus: int) -> float:
    """Hours until all are done: the longest start first, each on the GPU that is free first."""
    busy_until = [0.0] * gpus
    for duration in sorted(hours, reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + duration)
    return max(busy_until)


def format_numbers() -> str:
    """The part of docs/scale.md that is computed."""
    lines = ["| task | rows | tokens a row | from |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {t} | {r:,} | {n:,} | {source} |" for t, (r, n, source) in TASKS.items()]
    headings = " | ".join(f"hours on {count} GPU{'s' * (count > 1)}" for count in GPU_COUNTS)
    lines += ["", f"| recipes | number | card, USD an hour | GPU-hours | {headings} | USD |"]
    lines += ["| --- | ---: | --- | ---: | " + "---: | " * len(GPU_COUNTS) + "---: |"]
    names = [name for name, (_, task, _) in recipes.list_names().items() if task in TASKS]
    names = [name for name in names if not any(fnmatchcase(name, large) for large in LARGE)]
    trainings = [training for name in names if (training := plan_training(name))]
    for title, pattern in SETS.items():
        matches = [training for training in trainings if fnmatchcase(training.recipe, pattern)]
        for card in CARDS:
            if hours := [training.hours for training in matches if training.card == card]:
                usd = sum(training.usd for training in matches if training.card == card)
                spans = " | ".join(f"{compute_makespan(hours, n):,.1f}" for n in GPU_COUNTS)
                row = f"| {title} | {len(hours)} | {card.gpu}, {card.price:.2f} "
                lines.append(f"{row}| {sum(hours):,.0f} | {spans} | {usd:,.0f} |")
    if too_large := len(names) - len(trainings):
        lines += ["", f"{too_large} of these {len(names)} recipes fit neither card."]
    return "\n".join(lines)


def write(check: bool = False) -> None:
    """Writes the numbers of docs/scale.md; with `check`, raises JobFailed where they are old."""
    page = insert_block(DOC, START, f"\n\n{format_numbers()}\n\n", END)
    update_page(DOC, page, "make render", check)
