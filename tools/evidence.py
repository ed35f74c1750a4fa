"""The evidence for a recipe: what was measured, else what is planned, else that it was never run.

    evidence.describe("llama-3.1-8b/ner_r4")      "planned: 2.6 h on one A5000 24GB"

A measurement is a JSON file in results/ that names its recipe. Only `read_measurements` knows its
keys.
"""

from dataclasses import dataclass
from functools import cache

from tools import recipes
from tools.common import ROOT, WrongInput, read_json, shown
from tools.train import scale

RESULTS = ROOT / "results"
LEGEND = """\
*Measured*: trained and scored; the figures are in `results/`. *Planned*: not measured; the hours
are for FinLoRA's rows ([assumptions](../../docs/scale.md)). *Never run*: no more than the memory is
planned."""


@dataclass(frozen=True)
class Measurement:
    """What the training and scoring of a recipe took and gave on one machine."""

    version: str
    device: str
    seconds: float
    peak_bytes: int
    scores: tuple[str, ...]  # such as "fpb accuracy 71.5 %"

    def __str__(self) -> str:
        memory, time = f"{self.peak_bytes / 1e9:.1f} GB", f"{self.seconds / 60:.1f} min"
        return ", ".join((*self.scores, memory, time, self.device))


@cache
def read_measurements() -> dict[str, list[Measurement]]:
    """The measurements of each recipe in results/; {} where the folder is missing."""
    measurements: dict[str, list[Measurement]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = read_json(path)
        if "recipe" not in content:
            continue  # an experiment of its own
        try:
            scores = tuple(
                f"{dataset} {row['metric']} {100 * row['adapter']['value']:.1f} %"
                for dataset, row in content["scores"].items()
            )
            measurement = Measurement(
                version=str(content["version"]),
                device=str(content["device"]),
                seconds=float(content["seconds"]),
                peak_bytes=int(content["peak_memory_bytes"]),
                scores=scores,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WrongInput(f"{shown(path)}: not a measurement of a recipe: {error!r}") from None
        measurements.setdefault(str(content["recipe"]), []).append(measurement)
    return measurements


def describe(name: str) -> str:
    """The evidence for a recipe of the catalogue, as one line."""
    measurements = read_measurements().get(name, [])
    current = [row for row in measurements if row.version == recipes.find_version(name)]
    if current:
        return f"measured: {'; '.join(map(str, current))}"
    earlier = "; ".join(f"version {row.version} measured: {row}" for row in measurements)
    status = describe_plan(name)
    return f"{status}; {earlier}" if earlier else status


def describe_plan(name: str) -> str:
    """Planned hours where the task's rows are known and a card holds the recipe."""
    task = recipes.split_name(name)[1]
    plan = scale.planned(name) if task in scale.TASKS else None
    if not plan:
        return "never run"
    hours = f"{plan['hours']:.1f} h" if plan["hours"] >= 0.1 else "under 0.1 h"
    return f"planned: {hours} on one {plan['card']}"
