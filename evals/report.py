"""Reads score files, and says what they and their differences mean.

Two score files are compared on the same rows; the p-values of a metric are corrected over all
datasets of the comparison (Holm). FinLoRA's published scores are compared with scores by its rule.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

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
Files = dict[str, dict[str, Path]]  # score files by dataset and side (base, adapter)
Gains = dict[str, dict[str, dict[str, Any]]]  # differences by dataset and metric
NO_INTERVAL = "no interval"
# What two scores must share to be compared; a file of an earlier version may lack some.
SAME_SCORING = ("data_sha256", "task_version", "task", "scoring", "constrained_to")
SAME_BASE = ("base_model", "precision", "device_class", "backend")


class Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Metric(Part):
    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    no_interval: str = ""

    @model_validator(mode="after")
    def check_interval(self) -> Self:
        if not (self.low is None) == (self.high is None) == bool(self.no_interval):
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
    cluster: int | None = None  # the same in rows that ask about one text
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
    """The content of a score file; raises WrongInput where it is damaged."""
    try:
        text = file.read_bytes()
        ScoreFile.model_validate_json(text)
        return dict(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise WrongInput(
            f"no sound score file: {place}: {first['msg'].lower()}; `make eval` scores again"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WrongInput(f"cannot be read: {reason}; `make eval` scores again") from None


def title(metric: str) -> str:
    """A metric as people call it."""
    name = metric.removeprefix("finlora_")
    text = TITLES.get(name, name.replace("_", " "))
    return f"{text}, FinLoRA's" if name != metric else text


def append_conditions(side: str, evaluated: dict[str, Any]) -> str:
    """`base`, `base, 3 examples` (worked ones in a prompt), or `adapter, constrained` to labels.

    `own prompts`: of an adapter that brings a template or tokens of its own.
    """
    shots = evaluated.get("shots")
    parts = [describe_shots(shots)] if shots else []
    parts += ["constrained"] if evaluated.get("constrained_to") else []
    parts += ["own prompts"] if evaluated.get("prompting") else []
    return ", ".join([side, *parts])


def describe_shots(shots: int) -> str:
    return f"{shots} example{'s' if shots > 1 else ''}"


def format_percent(value: dict[str, Any], signed: bool = False) -> tuple[str, str | None]:
    """(value, interval) in %, as text; the interval is None where the value has none."""
    plus = "+" if signed else ""
    point = f"{100 * value['value']:{plus}.1f}"
    if value.get("no_interval"):
        return point, None
    return point, f"{100 * value['low']:{plus}.1f} … {100 * value['high']:{plus}.1f}"


# ---- differences


def _have_same(keys: Iterable[str], first: Content, second: Content) -> bool:
    sides = first["evaluated"], second["evaluated"]
    return all(sides[0].get(key) == sides[1].get(key) for key in keys)


def paired(first: Content, second: Content) -> bool:
    """Whether two score files hold answers to the same rows, read and scored in the same way."""
    rows = ([row["row"] for row in content["predictions"]] for content in (first, second))
    return _have_same(SAME_SCORING, first, second) and next(rows) == next(rows)


def values(content: Content, metric: str) -> list[Any]:
    """The rows' values of a metric, of those rows that have one."""
    rows = [row["values"] for row in content["predictions"]]
    return [row[metric] for row in rows if metric in row]


def differences(first: dict[str, Content], second: dict[str, Content]) -> Gains:
    """Second minus first, for each dataset and metric that both have on the same rows.

    Each holds what `stats.compare` returns, "corrected" (its p after Holm's correction over the
    datasets) and "family" (how many datasets those are).
    """
    gains: Gains = {}
    for dataset, content in first.items():
        other = second.get(dataset)
        if other and paired(content, other):
            gains[dataset] = {}
            for metric in content["metrics"]:
                (ours, theirs), clusters = select_shared(metric, [content, other])
                if metric in other["metrics"] and ours:
                    gains[dataset][metric] = stats.compare(metric, ours, theirs, clusters)
    return _correct(gains)


def select_shared(
    metric: str, contents: Sequence[Content]
) -> tuple[list[list[Any]], stats.Clusters]:
    """The values of a metric in each score file, of the rows that have one in all of them.

    Also returns the clusters of these rows; None where no file names them.
    """
    shared = list_shared_rows(metric, contents)
    tables = [{row["row"]: row for row in content["predictions"]} for content in contents]
    columns = [[table[number]["values"][metric] for number in shared] for table in tables]
    for table in tables:  # one of an earlier version names none
        if shared and all("cluster" in table[number] for number in shared):
            return columns, [table[number]["cluster"] for number in shared]
    return columns, None


def list_shared_rows(metric: str, contents: Sequence[Content]) -> list[int]:
    """The numbers of the rows that have a value of a metric in all score files."""
    numbers = [
        [row["row"] for row in content["predictions"] if metric in row["values"]]
        for content in contents
    ]
    shared = set.intersection(*map(set, numbers))
    return [row for row in numbers[0] if row in shared]


def _correct(gains: Gains) -> Gains:
    """Adds "corrected" and "family" to the differences that have a p."""
    for metric in {metric for by_metric in gains.values() for metric in by_metric}:
        tests = [by_metric[metric] for by_metric in gains.values() if metric in by_metric]
        tests = [test for test in tests if test["p"] is not None]
        for test, corrected in zip(tests, stats.holm([t["p"] for t in tests]), strict=True):
            test |= {"corrected": corrected, "family": len(tests)}
    return gains


def sentences(gains: Gains, contents: dict[str, Content]) -> Iterator[tuple[str, str, str]]:
    """(dataset, metric, verdict) on the first metric of each dataset."""
    for dataset, by_metric in gains.items():
        for metric, gain in list(by_metric.items())[:1]:
            rows = contents[dataset]["examples"]
            corrected, family = gain.get("corrected"), gain.get("family", 0)
            yield dataset, metric, stats.verdict(gain, corrected, family, rows)


def format_sentences(gains: Gains, contents: dict[str, Content]) -> list[str]:
    return [
        f"{dataset}, {title(metric)}: {verdict}."
        for dataset, metric, verdict in sentences(gains, contents)
    ]


# ---- FinLoRA's published scores


@cache
def read_published() -> dict[str, dict[str, dict[str, float]]]:
    """FinLoRA's scores, 0 to 1: {method or "base": {dataset: {metric: score}}}."""
    lines = [li for li in PUBLISHED.read_text().splitlines() if li and not li.startswith("#")]
    _, *methods = lines[0].split("\t")
    published: dict[str, dict[str, dict[str, float]]] = {method: {} for method in methods}
    for dataset, *cells in (line.split("\t") for line in lines[1:]):
        for method, cell in zip(methods, cells, strict=True):
            accuracy, f1 = cell.split("/")
            scores = {"finlora_accuracy": float(accuracy) / 100} if accuracy != "-" else {}
            scores["finlora_f1_weighted" if scores else "bertscore"] = float(f1)
            published[method][dataset] = scores
    return published


def find_method(name: str) -> tuple[str, str] | None:
    """FinLoRA's names (model, method) of a recipe or of its own adapter, where it has both."""
    last = name.rsplit("/", 1)[-1]
    for recipe in recipes.list_names():
        if recipe == name or recipes.find_finlora_name(recipe) == last:
            model, _, method = recipes.split_name(recipe)
            matrix = recipes.read_matrix()
            names = matrix["models"][model].get("finlora"), matrix["methods"][method].get("finlora")
            return (str(names[0]), str(names[1])) if all(names) else None
    return None


def find_tested_method(name: str) -> str:
    """FinLoRA's method of an adapter that it published scores for; else empty."""
    model, method = find_method(name) or ("", "")
    return method if model == recipes.read_matrix()["models"]["llama-3.1-8b"]["finlora"] else ""


def against_published(contents: dict[str, Content], method: str) -> Gains:
    """Scores minus FinLoRA's of the same method (`4bits_r4`, or `base`).

    Each holds what `stats.against` returns, "published", "corrected" and "family". Only scores on
    FinLoRA's whole data count, without worked examples and a constraint, and no dataset that
    `explain_incomparable` explains.
    """
    gains: Gains = {}
    for dataset, scores in read_published().get(method, {}).items():
        content = contents.get(dataset)
        if not content or explain_incomparable(dataset):
            continue
        evaluated = content["evaluated"]
        is_whole = not (evaluated["limit"] or evaluated["data_selected"] or is_sample(content))
        if not is_whole or evaluated.get("shots") or evaluated.get("constrained_to"):
            continue
        by_metric = {}
        for metric, score in scores.items():
            if metric in content["metrics"]:
                (ours,), clusters = select_shared(metric, [content])
                gain = stats.against(metric, ours, score, clusters)
                by_metric[metric] = gain | {"published": score}
        gains |= {dataset: by_metric} if by_metric else {}
    return _correct(gains)


def explain_incomparable(dataset: str) -> str:
    """Why a score on a dataset is compared with no published one; empty where it may be."""
    return str(sources.tables()["datasets"].get(dataset, {}).get("incomparable", ""))


def is_sample(content: Content) -> bool:
    """Whether the rows were written for this project."""
    return bool(content["evaluated"]["data_from"] == "data/sample")


# ---- notes


def share(value: Any) -> float:
    """How much of a row is right, 0 to 1: of pairs (expected, answered), or of a number."""
    if isinstance(value, list):
        return sum(e == a for e, a in value) / len(value)
    return float(value)


def count_differing(content: Content) -> int | None:
    """On how many rows FinLoRA's rule finds another share of right answers than ours."""
    rows = [row["values"] for row in content["predictions"]]
    if not all({"accuracy", "finlora_accuracy"} <= row.keys() for row in rows):
        return None
    return sum(share(row["accuracy"]) != share(row["finlora_accuracy"]) for row in rows)


def measure_majority(content: Content) -> float | None:
    """The accuracy, 0 to 1, of answering nothing but the most frequent key.

    None where an answer is not one label or number. Rows that could not be scored do not count.
    """
    rows = [row["values"] for row in content["predictions"]]
    metric = "f1_macro" if any("f1_macro" in values for values in rows) else "f1_weighted"
    pairs = [values[metric] for values in rows if metric in values]
    if not pairs or not all(len(row) == 1 for row in pairs):
        return None
    keys = Counter(expected for ((expected, _),) in pairs)
    return max(keys.values()) / len(pairs)


def describe_majority(contents: dict[str, Content]) -> list[str]:
    """What a model that knows only the most frequent answer would score, by dataset."""
    found = {dataset: measure_majority(content) for dataset, content in contents.items()}
    return [
        f"{dataset}: the most frequent answer alone has an accuracy of {100 * majority:.1f} %."
        for dataset, majority in found.items()
        if majority is not None
    ]


def _list_notes(content: Content) -> list[str]:
    """What a reader of a score must know beside it."""
    checks = content.get("label_checks", {}).items()
    notes = [f"labels of the {part} rows: {text}" for part, text in checks]
    if labels := content["evaluated"].get("constrained_to"):
        notes.append(f"CONSTRAIN=1: an answer could only be {', '.join(labels)}")
    if rows := count_differing(content):
        notes.append(f"FinLoRA's rule scores {rows} rows otherwise")
    notes += [f"{title(metric)} {why}" for metric, why in content.get("left_out", {}).items()]
    reasons: dict[str, list[str]] = {}
    for metric, value in content["metrics"].items():
        if reason := value.get("no_interval"):
            reasons.setdefault(reason, []).append(title(metric))
    notes += [f"no interval of {', '.join(names)}: {why}" for why, names in reasons.items()]
    if tokens := content["evaluated"].get("reasoning_tokens"):
        notes.append(f"up to {tokens:,} tokens of reasoning, sampled at the endpoint's temperature")
    if (usage := content.get("usage")) and usage["replies"] > usage["unreported"]:
        cost = f", {usage['usd']:.4f} USD" if "usd" in usage else ""
        notes.append(f"{usage['tokens_in']:,} tokens in, {usage['tokens_out']:,} out{cost}")
    if content.get("cut_prompts"):
        notes.append(f"{content['cut_prompts']} prompts were cut in their middle to fit")
    if rows := content.get("rows_with_fewer_examples"):
        shots = describe_shots(content["evaluated"]["shots"])
        notes.append(f"{rows} rows had less than {shots}, which would not fit into the context")
    if rows := content.get("refused_rows"):
        notes.append(f"{rows} rows were refused and count as no answer")
    if rows := content.get("unscored_rows"):
        notes.append(f"{rows} rows could not be scored and do not count")
    return notes


def list_remarks(contents: dict[str, Content], method: str, side: str = "") -> list[str]:
    """Sentences on scores against FinLoRA's of a method ("" for none), and the notes on them."""
    label = f", {side}" if side else ""
    gains = against_published(contents, method)
    remarks = []
    for dataset, metric, verdict in sentences(gains, contents):
        against = f"against FinLoRA's published {100 * gains[dataset][metric]['published']:.1f}"
        remarks.append(f"{dataset}{label}, {title(metric)}: {against}: {verdict}.")
    for dataset, content in contents.items():
        remarks += [f"{dataset}{label}: {note}." for note in _list_notes(content)]
    return remarks


def explain_unpublished(datasets: Iterable[str]) -> list[str]:
    reasons = {dataset: explain_incomparable(dataset) for dataset in datasets}
    return [
        f"{name}: compared with no published score: {why}." for name, why in reasons.items() if why
    ]


# ---- in the terminal


def show(name: str, files: Files) -> None:
    """Prints the scores of a subject, what their differences mean, and where the files are."""
    from rich.console import Console
    from rich.markup import escape

    scores = {
        dataset: {side: read(file) for side, file in sides.items()}
        for dataset, sides in files.items()
    }
    sides = list(next(iter(files.values())))
    by_side = {side: {name: scores[name][side] for name in scores} for side in sides}
    gains = differences(by_side["base"], by_side["adapter"]) if len(sides) == 2 else {}
    method = find_tested_method(name)
    lines = format_sentences(gains, by_side[sides[-1]])
    lines += describe_majority(by_side[sides[-1]])
    lines += explain_unpublished(scores) if method else []
    for side, contents in by_side.items():
        label = append_conditions(side, next(iter(contents.values()))["evaluated"])
        lines += list_remarks(contents, "base" if method and side == "base" else method, label)

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    parts = (_tabulate(name, scores, gains), escape("\n".join(lines)))
    for part in parts:
        console.print()
        console.print(part, soft_wrap=isinstance(part, str))
    console.print()
    for dataset, places in files.items():
        for side, file in places.items():
            console.print(f"scores     {dataset}, {side}: {shown(file)}", soft_wrap=True)


def _tabulate(name: str, scores: dict[str, dict[str, Content]], gains: Gains) -> Any:
    """A rich table with a row for each dataset and metric, and a column for each side."""
    from rich.table import Table

    def cell(value: dict[str, Any] | None, signed: bool = False) -> str:
        if not value:
            return "–"
        point, interval = format_percent(value, signed)
        return f"{point}  [dim]{interval or NO_INTERVAL}[/dim]"

    table = Table(title=f"{name}: %, with 95 % intervals", title_justify="left", box=None)
    table.add_column("dataset")
    table.add_column("metric")
    sides = list(next(iter(scores.values())))
    first = next(iter(scores.values()))
    headings = [append_conditions(side, first[side]["evaluated"]) for side in sides]
    for heading in (*headings, *(["difference"] if gains else []), "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    for dataset, contents in scores.items():
        last = contents[sides[-1]]
        label = f"{dataset} (examples)" if is_sample(last) else dataset
        for metric in last["metrics"]:
            cells = [cell(contents[side]["metrics"].get(metric)) for side in sides]
            cells += [cell(gains.get(dataset, {}).get(metric), signed=True)] if gains else []
            style = "dim" if metric.startswith("finlora_") else ""
            rows = f"{len(values(last, metric)):,}"
            table.add_row(label, title(metric), *cells, rows, style=style)
    return table


def show_comparisons(scored: dict[str, Files]) -> None:
    """Prints adapters against each other, where they have the same base at the same precision."""
    adapters = {
        name: {
            dataset: read(sides["adapter"])
            for dataset, sides in files.items()
            if "adapter" in sides
        }
        for name, files in scored.items()
    }
    for (first, contents), (second, others) in combinations(adapters.items(), 2):
        same = {
            dataset: content
            for dataset, content in contents.items()
            if dataset in others and _have_same(SAME_BASE, content, others[dataset])
        }
        if same:
            lines = format_sentences(differences(same, others), same)
            print("\n".join(["", f"{second} against {first}", *lines]))
