"""What the whole catalogue takes on 1, 4 and 64 GPUs, by `tools.train.plan`, for docs/scale.md.

    python -m tools render

A recipe trains on the smallest kind of card that holds it, as many cards as `CARDS` gives; several
GPUs train several recipes at once, the longest first. Rows and tokens of a task are in `TASKS`.
"""

import heapq
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tools import recipes
from tools.common import ROOT, JobFailed, atomic, shown
from tools.train import plan

DOC = ROOT / "docs" / "scale.md"
START, END = "<!-- numbers: python -m tools render -->", "<!-- end of numbers -->"
GPUS = (1, 4, 64)

# Rows of the training set, mean tokens of a row, and where both are from.
TASKS = {
    "sentiment": (76772, 100, "rows: FinLoRA; tokens: counted on its test sets"),
    "headline": (82161, 80, "rows: FinLoRA; tokens: assumed"),
    "ner": (13549, 130, "rows: FinLoRA; tokens: assumed"),
    "finer": (10000, 1800, "assumed"),
    "xbrl_extract": (10000, 3800, "rows: assumed; tokens: FinLoRA"),
    "xbrl_term": (5856, 103, "counted"),
    "formula": (800, 161, "counted"),
    "financebench": (86, 1209, "counted"),
}
# Cards to try, USD for one GPU and hour. 0.26 is what FinLoRA paid; the other is an assumption.
CARDS = (("A5000 24GB", 1, 0.26), ("A100 80GB", 1, 1.80))
SETS = {
    "the default, Llama 3.1 8B": "llama-3.1-8b/*",
    "of it, QLoRA (r4)": "llama-3.1-8b/*_r4",
    "all bases up to 8B": "*",
    "of them, QLoRA (r4)": "*_r4",
}
LARGE = ("llama-3.1-70b/*", "smollm2-135m/*")  # FSDP or a laptop: not in these sums


def planned(name: str) -> dict[str, Any] | None:
    """The plan of a recipe on the first card that holds it, with `card` and `usd`."""
    _, task, _ = recipes.parts(name)
    rows, tokens, _ = TASKS[task]
    config = recipes.config(name)
    rows = plan.count_training_rows(config, rows)
    longest = recipes.matrix()["tasks"][task]["longest"]
    for card, gpus, price in CARDS:
        made = plan.plan(config, plan.Hardware(card, gpus, price), rows, longest)
        if made["fits"]:
            # The peak is that of the longest row, the hours are those of the mean one.
            hours = plan.plan(config, plan.Hardware(card, gpus, price), rows, tokens)
            return {"card": card, "hours": hours["hours"], "usd": hours["usd"]}
    return None


def makespan(hours: list[float], gpus: int) -> float:
    """Hours until all are done: the longest start first, each on the GPU that is free first."""
    free = [0.0] * gpus
    for each in sorted(hours, reverse=True):
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def numbers() -> str:
    """The part of docs/scale.md that is computed."""
    lines = ["| task | rows | tokens a row | from |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {t} | {r:,} | {n:,} | {source} |" for t, (r, n, source) in TASKS.items()]
    heads = " | ".join(f"hours on {n}" for n in GPUS)
    lines += ["", f"| recipes | number | card | GPU-hours | {heads} | USD |"]
    lines += ["| --- | ---: | --- | ---: | " + "---: | " * len(GPUS) + "---: |"]
    names = [n for n in recipes.names() if recipes.parts(n)[1] in TASKS]
    names = [n for n in names if not any(fnmatchcase(n, large) for large in LARGE)]
    plans = {name: planned(name) for name in names}
    for title, pattern in SETS.items():
        for card, _, price in CARDS:
            chosen = [
                p for n, p in plans.items() if p and p["card"] == card and fnmatchcase(n, pattern)
            ]
            if not chosen:
                continue
            hours = [p["hours"] for p in chosen]
            spans = " | ".join(f"{makespan(hours, n):,.1f}" for n in GPUS)
            cost = f"{sum(p['usd'] for p in chosen):,.0f}"
            row = f"| {title} | {len(chosen)} | {card} at {price:.2f} | {sum(hours):,.0f}"
            lines.append(f"{row} | {spans} | {cost} |")
    none = sum(p is None for p in plans.values())
    lines += ["", f"{none} of these {len(plans)} recipes fit neither card." if none else ""]
    return "\n".join(lines).rstrip()


def written(text: str) -> str:
    """The document with its numbers as they are now."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{numbers()}\n\n{END}{after}"


def write(check: bool = False) -> None:
    """Writes the numbers of docs/scale.md; with `check`, raises JobFailed where they are old."""
    text = DOC.read_text(encoding="utf-8")
    new = written(text)
    if check and new != text:
        raise JobFailed(f"{shown(DOC)} has old numbers; `make render` writes it")
    if new != text:
        with atomic(Path(DOC)) as file:
            file.write(new.encode())
