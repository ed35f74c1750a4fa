"""The evidence for a recipe: what was measured, else what is planned, else that it was never run.

evidence.describe_evidence("llama-3.1-8b/ner_r4")      "planned: 2.6 h on one A5000 24GB"
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tools import recipes
from tools.train import scale

if TYPE_CHECKING:
    from evals.results import Measurement

LEGEND = """\
*Measured*: trained and scored; the figures are in `results/`. *Planned*: not measured; the hours
are for FinLoRA's rows ([assumptions](../../docs/scale.md)). *Never run*: no more than the memory is
planned."""


@cache
def read_measurements() -> dict[str, list[Measurement]]:
    """The measurements of each recipe, by its name."""
    from evals import results  # takes longer to import than a list of recipes

    measurements: dict[str, list[Measurement]] = {}
    for measurement in results.load_measurements():
        measurements.setdefault(measurement.recipe, []).append(measurement)
    return measurements


def describe_evidence(name: str) -> str:
    """The evidence for a recipe of the catalogue, as one line."""
    version = recipes.find_version(name)
    texts = [describe_measurement(row, version) for row in read_measurements().get(name, [])]
    return "; ".join(texts) or describe_plan(name)


def describe_measurement(measurement: Measurement, version: str) -> str:
    """A measurement as text, for a recipe whose present version is `version`."""
    earlier = f" as version {measurement.version}" if measurement.version != version else ""
    variant = f" with {measurement.variant}" if measurement.variant else ""
    figures = [
        f"{dataset} {result.metric.replace('_', ' ')} {100 * result.base.value:.1f} → "
        f"{100 * result.adapter.value:.1f} %"
        for dataset, result in measurement.datasets.items()
    ]
    if measurement.peak_memory_bytes:
        figures.append(f"{measurement.peak_memory_bytes / 1e9:.1f} GB")
    if measurement.seconds:
        figures.append(f"{measurement.seconds / 60:.1f} min")
    return f"measured{earlier}{variant}: {', '.join((*figures, measurement.device))}"


def describe_plan(name: str) -> str:
    """Planned hours where the task's rows are known and a card holds the recipe."""
    task = recipes.split_name(name)[1]
    training = scale.plan_training(name) if task in scale.TASKS else None
    if not training:
        return "never run"
    hours = f"{training.hours:.1f} h" if training.hours >= 0.1 else "under 0.1 h"
    return f"planned: {hours} on one {training.card.gpu}"
