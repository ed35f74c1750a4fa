"""The evidence for a recipe: what was measured, else what is planned, else that it was never run.

    evidence.describe("llama-3.1-8b/ner_r4")      "planned: 2.6 h on one A5000 24GB"

A measurement is a JSON file in results/<model>/. Only `read_measurements` knows its keys.
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
    variant: str | None  # what was changed in the recipe
    device: str
    seconds: float | None
    peak_bytes: int | None
    scores: list[str]  # such as "fpb accuracy 28.5 → 71.5 %", base and adapter

    def describe(self, version: str) -> str:
        """The measurement as text, for a recipe whose present version is `version`."""
        earlier = f" as version {self.version}" if self.version != version else ""
        variant = f" with {self.variant}" if self.variant else ""
        figures = [*self.scores]
        figures += [f"{self.peak_bytes / 1e9:.1f} GB"] if self.peak_bytes else []
        figures += [f"{self.seconds / 60:.1f} min"] if self.seconds else []
        return f"measured{earlier}{variant}: {', '.join((*figures, self.device))}"


@cache
def read_measurements() -> dict[str, list[Measurement]]:
    """The measurements of each recipe, results/<model>/*.json; {} where the folder is missing."""
    measurements: dict[str, list[Measurement]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        content = read_json(path)
        try:
            scores = [
                f"{dataset} {row['metric'].replace('_', ' ')} {100 * row['base']['value']:.1f} → "
                f"{100 * row['adapter']['value']:.1f} %"
                for dataset, row in content["datasets"].items()
            ]
            measurement = Measurement(
                version=content["version"],
                variant=content["variant"],
                device=content["device"],
                seconds=content["seconds"],
                peak_bytes=content["peak_memory_bytes"],
                scores=scores,
            )
            measurements.setdefault(content["recipe"], []).append(measurement)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WrongInput(f"{shown(path)}: not a measurement of a recipe: {error!r}") from None
    return measurements


def describe(name: str) -> str:
    """The evidence for a recipe of the catalogue, as one line."""
    version = recipes.find_version(name)
    measurements = read_measurements().get(name, [])
    return "; ".join(row.describe(version) for row in measurements) or describe_plan(name)


def describe_plan(name: str) -> str:
    """Planned hours where the task's rows are known and a card holds the recipe."""
    task = recipes.split_name(name)[1]
    training = scale.plan_training(name) if task in scale.TASKS else None
    if not training:
        return "never run"
    hours = f"{training.hours:.1f} h" if training.hours >= 0.1 else "under 0.1 h"
    return f"planned: {hours} on one {training.card.gpu}"
