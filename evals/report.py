"""Shows scores from their files: base and adapter side by side, and what the differences mean.

A pair of score files is compared on the same rows, and the p-values of a metric are corrected over
all datasets of the comparison (Holm). FinLoRA's published scores are compared with ours by its own
scoring. `differences` and `against_published` are what other reports are made from.
"""

import json
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from evals import stats
from tools import recipes, sources
from tools.common import ROOT, WrongInput, shown

PUBLISHED = ROOT / "evals" / "published.tsv"
TITLES = {
    "accuracy": "accuracy",
    "f1_weighted": "weighted F1",
    "f1_macro": "macro F1",
    "exact_match": "exact match",
    "numeric_accuracy": "numeric accuracy",
    "bertscore": "BERTScore F1",
    "rouge_l": "ROUGE-L",
    "token_f1": "token F1",
    "item_f1": "item F1",
    "ece": "ECE (biased upwards), lower is better",
}
Content = dict[str, Any]  # of a score file
NO_INTERVAL = "no interval"


class Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Metric(Part):
    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    no_interval: str = ""

    @model_validator(mode="after")
    def check_interval(self) -> Self:
        if (self.low is None) != (self.high is None) or (self.low is None) != bool(
            self.no_interval
        ):
            raise ValueError("low and high are needed, or no_interval")
        return self


class Evaluated(Part):
    dataset: str
    data_sha256: str
    precision: str
    limit: int | None
    data_from: str | None


class Prediction(Part):
    row: int
    values: dict[str, FiniteFloat | list[tuple[str, str]] | list[tuple[FiniteFloat, FiniteFloat]]]


class ScoreFile(Part):
    """What every reader of a score file relies on."""

    evaluated: Evaluated
    metrics: dict[str, Metric] = Field(min_length=1)
    examples: int
    predictions: list[Prediction] = Field(min_length=1)

    @model_validator(mode="after")
    def check_rows(self) -> Self:
        if self.examples != len(self.predictions):
            raise ValueError(f"examples is {self.examples}, and there are {len(self.predictions)}")
        for metric in self.metrics:
            if not any(metric in row.values for row in self.predictions):
                raise ValueError(f"no row has a value of {metric}")
        return self


def read(file: Path) -> Content:
    """A score file; raises WrongInput that says what is wrong where it is damaged."""
    try:
        text = file.read_bytes()
        ScoreFile.model_validate_json(text)
        content: Content = json.loads(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise WrongInput(
            f"no sound score file: {place}: {first['msg'].lower()}; `make eval` scores again"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WrongInput(f"cannot be read: {reason}; `make eval` scores again") from None
    return content


def title(metric: str) -> str:
    plain = metric.removeprefix("finlora_")
    known = TITLES.get(plain, plain.replace("_", " "))
    return f"{known}, FinLoRA's" if plain != metric else known


def format_percent(value: dict[str, Any], signed: bool = False) -> tuple[str, str | None]:
    """(value, interval) in %, as text; the interval is None where the value has none."""
    plus = "+" if signed else ""
    point = f"{100 * value['value']:{plus}.1f}"
    if value.get("no_interval"):
        return point, None
    return point, f"{100 * value['low']:{plus}.1f} … {100 * value['high']:{plus}.1f}"


def percent(value: dict[str, Any], signed: bool = False) -> str:
    """A value with its interval, for a table in the terminal."""
    point, interval = format_percent(value, signed)
    return f"{point}  [dim]{interval or NO_INTERVAL}[/dim]"


# What two scores must share to be compared; a file of an earlier version may lack some.
SAME = ("data_sha256", "task_version", "task", "scoring")


def paired(first: Content, second: Content) -> bool:
    """Whether two score files hold answers to the same rows, read and scored in the same way."""
    numbers = ([row["row"] for row in one["predictions"]] for one in (first, second))
    sides = (first["evaluated"], second["evaluated"])
    same = all(sides[0].get(key) == sides[1].get(key) for key in SAME)
    return same and len({tuple(one) for one in numbers}) == 1


def values(content: Content, metric: str) -> list[Any]:
    """The rows' values of a metric, of those rows that have one."""
    rows = [row["values"] for row in content["predictions"]]
    return [row[metric] for row in rows if metric in row]


def differences(
    first: dict[str, Content], second: dict[str, Content]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Second minus first, for each dataset and metric that both have on the same rows.

    {dataset: {metric: what `stats.compare` gives, "corrected": p after Holm's correction over the
    datasets, "family": how many they are}}.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dataset in first:
        one, other = first[dataset], second.get(dataset)
        if other and paired(one, other):
            both = {
                metric: (values(one, metric), values(other, metric))
                for metric in one["metrics"]
                if metric in other["metrics"]
            }
            found[dataset] = {
                metric: stats.compare(metric, *columns)
                for metric, columns in both.items()
                if len(columns[0]) == len(columns[1])
            }
    return correct(found)


def correct(
    found: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Adds "corrected" and "family" to differences by dataset and metric that have a p."""
    for metric in {metric for gains in found.values() for metric in gains}:
        family = [g[metric] for g in found.values() if metric in g and g[metric]["p"] is not None]
        for gain, corrected in zip(family, stats.holm([g["p"] for g in family]), strict=True):
            gain |= {"corrected": corrected, "family": len(family)}
    return found


@cache
def published() -> dict[str, dict[str, dict[str, float]]]:
    """FinLoRA's scores, 0 to 1: {method or "base": {dataset: {metric: score}}}."""
    lines = [li for li in PUBLISHED.read_text().splitlines() if li and not li.startswith("#")]
    heads = lines[0].split("\t")[1:]
    found: dict[str, dict[str, dict[str, float]]] = {head: {} for head in heads}
    for dataset, *cells in (line.split("\t") for line in lines[1:]):
        for head, (accuracy, f1) in zip(heads, (c.split("/") for c in cells), strict=True):
            found[head][dataset] = (
                {"bertscore": float(f1)}
                if accuracy == "-"
                else {
                    "finlora_accuracy": float(accuracy) / 100,
                    "finlora_f1_weighted": float(f1),
                }
            )
    return found


def against_published(
    contents: dict[str, Content], method: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores against FinLoRA's of the same method (`4bits_r4`, or `base`), on its own data.

    {dataset: {metric: what `stats.against` gives, "published", "corrected", "family"}}. Only whole
    datasets count, not the project's examples, and no dataset that is `incomparable`.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dataset, theirs in published().get(method, {}).items():
        content = contents.get(dataset)
        if not content or explain_incomparable(dataset):
            continue
        told = content["evaluated"]
        if told["limit"] or told["data_selected"] or told["data_from"] == "data/sample":
            continue
        for metric, score in theirs.items():
            if metric in content["metrics"]:
                gain = stats.against(metric, values(content, metric), score)
                found.setdefault(dataset, {})[metric] = gain | {"published": score}
    return correct(found)


def explain_incomparable(dataset: str) -> str:
    """Why a score on a dataset is compared with no published one; empty where it may be."""
    row = sources.tables()["datasets"].get(dataset, {})
    return str(row.get("incomparable", ""))


def method(name: str) -> tuple[str, str] | None:
    """FinLoRA's names (model, method) of a recipe or of its own adapter, where it has both."""
    known, last = recipes.list_names(), name.rsplit("/", 1)[-1]
    found = [entry for entry in known if entry == name or recipes.find_finlora_name(entry) == last]
    if not found:
        return None
    model, _, how = recipes.split_name(found[0])
    table = recipes.read_matrix()
    names = table["models"][model].get("finlora"), table["methods"][how].get("finlora")
    return (str(names[0]), str(names[1])) if all(names) else None


def share(value: Any) -> float:
    """How much of a row is right, 0 to 1: of pairs (expected, answered), or of a number."""
    if isinstance(value, list):
        return sum(e == a for e, a in value) / len(value)
    return float(value)


def differing(content: Content) -> int | None:
    """On how many rows FinLoRA's rule finds another share of right answers than ours."""
    pairs = [row["values"] for row in content["predictions"]]
    if not all({"accuracy", "finlora_accuracy"} <= row.keys() for row in pairs):
        return None
    return sum(share(row["accuracy"]) != share(row["finlora_accuracy"]) for row in pairs)


def sentences(gains: dict[str, dict[str, dict[str, Any]]], contents: dict[str, Content]) -> Any:
    """(dataset, metric, verdict) on the first metric of each dataset."""
    for dataset, of_dataset in gains.items():
        metric = next(iter(of_dataset), None)
        if metric is None:
            continue
        found = of_dataset[metric]
        rows = contents[dataset]["examples"]
        told = stats.verdict(found, found.get("corrected"), found.get("family", 0), rows)
        yield dataset, metric, told


def notes_on(content: Content) -> list[str]:
    """What a reader of a score must know beside it."""
    notes = [
        f"labels of the {part} rows: {text}"
        for part, text in content.get("label_checks", {}).items()
    ]
    if rows := differing(content):
        notes.append(f"FinLoRA's rule scores {rows} rows otherwise")
    notes += [f"{title(metric)} {why}" for metric, why in content.get("left_out", {}).items()]
    reasons: dict[str, list[str]] = {}
    for metric, value in content["metrics"].items():
        if reason := value.get("no_interval"):
            reasons.setdefault(reason, []).append(title(metric))
    notes += [f"no interval of {', '.join(names)}: {why}" for why, names in reasons.items()]
    if content.get("cut_prompts"):
        notes.append(f"{content['cut_prompts']} prompts were cut in their middle to fit")
    if rows := content.get("refused_rows"):
        notes.append(f"{rows} rows were refused and count as no answer")
    if rows := content.get("unscored_rows"):
        notes.append(f"{rows} rows could not be scored and do not count")
    return notes


def show(name: str, files: dict[str, dict[str, Path]]) -> None:
    """Prints the scores of a subject: `files` maps dataset → side (base, adapter) → score file."""
    from rich.console import Console
    from rich.table import Table

    scored = {
        dataset: {side: read(file) for side, file in sides.items()}
        for dataset, sides in files.items()
    }
    sides = list(next(iter(files.values())))
    of_side = {side: {name: both[side] for name, both in scored.items()} for side in sides}
    gains = differences(of_side["base"], of_side["adapter"]) if len(sides) == 2 else {}

    table = Table(title=f"{name}: %, with 95 % intervals", title_justify="left", box=None)
    table.add_column("dataset")
    table.add_column("metric")
    for heading in (*sides, *(["difference"] if gains else []), "examples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for dataset, both in scored.items():
        one = both[sides[-1]]
        own = one["evaluated"]["data_from"] == "data/sample"
        for metric in one["metrics"]:
            cells = [
                percent(both[side]["metrics"][metric]) if metric in both[side]["metrics"] else "–"
                for side in sides
            ]
            gain = gains.get(dataset, {}).get(metric)
            cells += [percent(gain, signed=True) if gain else "–"] if gains else []
            label = f"{dataset} (examples)" if own else dataset
            theirs = metric.startswith("finlora_")
            table.add_row(
                label,
                title(metric),
                *cells,
                f"{len(values(one, metric)):,}",
                style="dim" if theirs else "",
            )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print()
    console.print(table)
    console.print()
    for dataset, metric, told in sentences(gains, of_side[sides[-1]]):
        console.print(f"{dataset}, {title(metric)}: {told}.", soft_wrap=True)
    theirs = method(name)
    known = recipes.read_matrix()["models"]["llama-3.1-8b"].get("finlora")
    for side in sides:
        if not theirs or theirs[0] != known:
            break
        contents = of_side[side]
        told_of = against_published(contents, "base" if side == "base" else theirs[1])
        for dataset, metric, told in sentences(told_of, contents):
            score = 100 * told_of[dataset][metric]["published"]
            console.print(
                f"{dataset}, {side}, {title(metric)}: against FinLoRA's published {score:.1f}: "
                f"{told}.",
                soft_wrap=True,
            )
    for dataset, both in scored.items():
        if theirs and theirs[0] == known and (why := explain_incomparable(dataset)):
            console.print(
                f"{dataset}: compared with no published score: {why}.", soft_wrap=True, markup=False
            )
        for side, content in both.items():
            for note in notes_on(content):
                console.print(f"{dataset}, {side}: {note}.", soft_wrap=True, markup=False)
    console.print()
    for dataset, places in files.items():
        for side, file in places.items():
            console.print(f"scores     {dataset}, {side}: {shown(file)}", soft_wrap=True)


def between(scored: dict[str, dict[str, dict[str, Path]]]) -> None:
    """Compares adapters with each other, where they have the same base at the same precision."""

    def load(files: dict[str, dict[str, Path]]) -> dict[str, Content]:
        return {
            dataset: read(sides["adapter"])
            for dataset, sides in files.items()
            if "adapter" in sides
        }

    adapters = {name: load(files) for name, files in scored.items()}
    for first, second in combinations(adapters, 2):
        one, other = adapters[first], adapters[second]
        same = {
            dataset: content
            for dataset, content in one.items()
            if dataset in other
            and all(
                content["evaluated"].get(key) == other[dataset]["evaluated"].get(key)
                for key in ("base_model", "precision", "device_class", "backend")
            )
        }
        if not same:
            continue
        print(f"\n{second} against {first}")
        for dataset, metric, told in sentences(differences(same, other), same):
            print(f"{dataset}, {title(metric)}: {told}.")
