"""The evidence for a recipe: what was measured, else what is planned, else "no result".

evidence.describe_evidence("llama-3.1-8b/ner_r4")      "planned: 2.6 h on one A5000 24GB"
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tools import recipes
from tools.train import scale

if TYPE_CHECKING:
    from evals.results import Result

LEGEND = """\
*Measured*: trained and scored by `make verify` ([results](../../docs/results.md)), from base to
adapter; the majority is the most frequent answer alone. *Planned*: not measured; the hours are for
FinLoRA's rows ([assumptions](../../docs/scale.md)). *No result*: not measured by `make verify`; at
most its memory is planned. Experiments ([methods](../../docs/methods.md)) may have trained it."""


@cache
def read_results() -> tuple[dict[str, list[Result]], dict[str, Result]]:
    """The results of each recipe without those of the examples, and the one that stands for it."""
    from evals import results  # takes longer to import than a list of recipes

    by_recipe: dict[str, list[Result]] = {}
    measured = [result for result in results.load_results() if not result.is_of_examples]
    for result in measured:
        by_recipe.setdefault(result.recipe, []).append(result)
    return by_recipe, {result.recipe: result for result in results.choose_evidence(measured)}


def describe_evidence(name: str) -> str:
    """The evidence for a recipe of the catalogue, as one line.

    Of several devices, one is told (`evals.results.choose_evidence`), and how many others there
    are. A stale result is none, but it is told with the reason.
    """
    from evals import results

    by_recipe, chosen = read_results()
    measured = by_recipe.get(name, [])
    if name in chosen:
        others = sum(not results.explain_stale(result) for result in measured) - 1
        more = f"; also on {others} other device{'s' if others > 1 else ''}" if others else ""
        return describe_result(chosen[name]) + more
    stale = f" (measured before: {results.explain_stale(measured[0])})" if measured else ""
    return f"{describe_plan(name)}{stale}"


def describe_result(result: Result) -> str:
    """A result as text: the first metric of each dataset, and what a training took.

    Majority: what the most frequent answer alone scores.
    """
    figures = []
    for dataset, entry in result.datasets.items():
        metric, scores = entry.main
        ends = f"{100 * scores.base.value:.1f} → {100 * scores.adapter.value:.1f} %"
        majority = "" if entry.majority is None else f" (majority {100 * entry.majority:.1f})"
        figures.append(f"{dataset} {metric.replace('_', ' ')} {ends}{majority}")
    count = len(result.trainings)
    figures.append(f"{count} seed{'s' if count > 1 else ''}")
    figures.append(f"{result.peak_memory_bytes / 1e9:.1f} GB, {result.seconds / 60:.1f} min")
    return f"measured: {', '.join((*figures, result.device))}"


def describe_plan(name: str) -> str:
    """Planned hours where the task's rows are known and a card holds the recipe."""
    task = recipes.split_name(name)[1]
    training = scale.plan_training(name) if task in scale.TASKS else None
    if not training:
        return "no result"
    hours = f"{training.hours:.1f} h" if training.hours >= 0.1 else "under 0.1 h"
    return f"planned: {hours} on one {training.card.gpu}"
