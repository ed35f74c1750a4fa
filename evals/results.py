"""Results: what `make verify` measured of a recipe on one device, a small JSON file each.

    results.load_results()                         every file of results/<model>/<recipe>/
    results.explain_stale(result)                  why it is no evidence any more; empty while it is

`Result` is the schema. A file holds scores, time, memory and versions, and no row of any data. It
is evidence while the recipe, the rules of its data, its tasks and the scoring are those of today.
bench/ and `make tune` write the other files, in formats of their own: results/*.json, and folders
whose names begin with an underscore.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evals import report, stats
from evals.run import SCORING, find_cluster_pattern, find_rows, read_tasks
from tools import recipes, sources
from tools.common import ROOT, JobFailed, WrongInput, parse_json, shown, slugify, write_text

FOLDER = ROOT / "results"
EXAMPLES = "data/sample"  # where rows are from that were written for this project
LARGEST = 64_000  # bytes of a file; the largest set, of ten datasets and ten seeds, needs half
WIDTH = 100  # characters of a line of a file
ENOUGH_SEEDS = 3  # for evidence that pages show before any other
DECIMALS = 5  # of a score

NAME = r"^[\w./+-]{1,100}$"
Name = Annotated[str, Field(pattern=NAME)]
# Text that stands in tables of Markdown as it is; `clean_text` makes it.
Text = Annotated[str, Field(pattern=r"^[\w .,;:()+/@-]*$", max_length=300)]
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(Strict):
    """A metric from 0 to 1 (a gain: from -1), and its 95 % interval if there is one."""

    value: float = Field(ge=-1, le=1)
    low: float | None = Field(default=None, ge=-1, le=1)
    high: float | None = Field(default=None, ge=-1, le=1)

    @model_validator(mode="after")
    def check_interval(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high belong together")
        return self


class MetricResult(Strict):
    """A metric on one dataset, of the base and of the adapter of each seed, on the same rows."""

    base: Score
    base_with_examples: Score | None  # the base with worked examples in its prompts
    seeds: dict[int, Score] = Field(min_length=1)
    adapter: Score  # the mean over the seeds; the interval is over rows and seeds
    gain: Score  # adapter - base


class ChatRows(Strict):
    """A file of chat rows that a recipe is trained, validated or scored on."""

    file: Text
    rows: int = Field(gt=0)
    sha256: Sha
    source: Text  # the file that they were converted from
    place: Text | None  # where that lay: FINLORA_DATA, data/raw, data/sample


class DatasetResult(Strict):
    data: ChatRows
    task_version: Name  # of the task in evals/tasks/ that scored them
    rows: int = Field(gt=0)  # that were scored, on all sides
    clusters: int | None = Field(default=None, gt=0)  # of these rows, where they have any
    selected: Text | None  # which of the published rows those are, where they are not all
    # Rows whose prompt with examples had room for fewer; None where that was not recorded.
    fewer_examples: int | None = Field(default=None, ge=0)
    # The accuracy of answering nothing but the most frequent key, where answers are one label.
    majority: float | None = Field(default=None, ge=0, le=1)
    metrics: dict[Name, MetricResult] = Field(min_length=1)  # the main one first, FinLoRA's after

    @property
    def main(self) -> tuple[str, MetricResult]:
        """The main metric, by its name."""
        return next(iter(self.metrics.items()))


class TrainingResult(Strict):
    """What the training of one seed took."""

    steps: int = Field(gt=0)
    seconds: float = Field(gt=0)
    peak_memory_bytes: int = Field(gt=0)
    tokens_per_second: float | None
    train_loss: float | None  # None where fewer steps than logging_steps were trained
    validation_loss: float | None


class Result(Strict):
    """What `make verify` measured of a recipe on one device."""

    recipe: Name
    version: Name
    digest: Sha  # of what the recipe learns
    model: Text  # the base's name on the Hub, or that of its folder
    precision: Name  # of the base, in training and scoring
    rules: Sha  # of what decides the rows of its data: `sources.digest_rules`
    scoring: int  # version of the scoring code
    device: Text
    finished: Text
    commit: Name | None  # of this project; None outside a repository
    is_changed: bool  # whether files differed from that commit
    python: Name
    packages: dict[Name, Name]
    shots: int = Field(ge=0)  # worked examples in the prompts of `base_with_examples`
    training_data: list[ChatRows] = Field(min_length=1)
    validation_data: list[ChatRows]
    trainings: dict[int, TrainingResult] = Field(min_length=1)  # by seed
    datasets: dict[Name, DatasetResult] = Field(min_length=1)

    @model_validator(mode="after")
    def check_seeds(self) -> Self:
        for name, dataset in self.datasets.items():
            for metric, entry in dataset.metrics.items():
                if entry.seeds.keys() != self.trainings.keys():
                    raise ValueError(f"{name}, {metric}: not the seeds of the trainings")
        return self

    @property
    def path(self) -> Path:
        return locate_result(self.recipe, self.device, self.is_of_examples)

    @property
    def is_of_examples(self) -> bool:
        """Whether any of its rows were written for this project, which makes it no evidence."""
        return any(data.place == EXAMPLES for data in self.data)

    @property
    def data(self) -> list[ChatRows]:
        """All data that it rests on."""
        tested = [entry.data for entry in self.datasets.values()]
        return [*self.training_data, *self.validation_data, *tested]

    @property
    def seconds(self) -> float:
        """Of one training: the mean over seeds."""
        return fmean(training.seconds for training in self.trainings.values())

    @property
    def peak_memory_bytes(self) -> int:
        return max(training.peak_memory_bytes for training in self.trainings.values())


# ---- files


def locate_result(recipe: str, device: str, is_of_examples: bool = False) -> Path:
    """results/<model>/<recipe>/<device>.json, with `_examples` where it is no evidence."""
    return FOLDER / recipe / f"{slugify(device)}{'_examples' if is_of_examples else ''}.json"


def load_results() -> list[Result]:
    """All results in results/, by recipe in the catalogue's order, then by device.

    Raises WrongInput that names the file and the key where one is not of the schema.
    """
    if strays := sorted(FOLDER.glob("[!_]*/*.json")):
        raise WrongInput(
            f"{shown(strays[0])}: results lie in results/<model>/<recipe>/<device>.json"
        )
    results = [load_result(path) for path in sorted(FOLDER.glob("[!_]*/*/*.json"))]
    order = {name: place for place, name in enumerate(recipes.list_names())}
    return sorted(results, key=lambda result: order.get(result.recipe, len(order)))


def load_result(path: Path) -> Result:
    if path.stat().st_size > LARGEST:
        raise WrongInput(f"{shown(path)}: over {LARGEST:,} bytes; `make verify` writes less")
    content = path.read_bytes()
    parse_json(content, shown(path))
    try:
        result = Result.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise WrongInput(f"{shown(path)}: {key}: {first['msg']}") from None
    if path != result.path:
        raise WrongInput(f"{shown(path)}: by recipe and device it belongs in {shown(result.path)}")
    return result


def write_result(result: Result) -> None:
    write_text(result.path, f"{format_json(result.model_dump(mode='json'))}\n")


def format_json(content: Any, indent: int = 0) -> str:
    """JSON in which an object or list stands on one line if it fits there."""
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if not isinstance(content, dict | list) or len(line) + indent <= WIDTH - 20:
        return line
    inner = " " * (indent + 2)
    if isinstance(content, dict):
        parts = [
            f"{inner}{json.dumps(key)}: {format_json(value, indent + 2)}"
            for key, value in content.items()
        ]
    else:
        parts = [f"{inner}{format_json(value, indent + 2)}" for value in content]
    first, last = "{}" if isinstance(content, dict) else "[]"
    lines = ",\n".join(parts)
    return f"{first}\n{lines}\n{' ' * indent}{last}"


# ---- what is evidence


def explain_stale(result: Result) -> str:
    """Why a result is no evidence any more, in words; empty while it is."""
    try:
        recipe = read_recipe(result.recipe)
    except WrongInput:
        return "the recipe is not there any more"
    if recipe.name != result.recipe:
        return f"the recipe is named {recipe.name} now"
    if recipe.digest != result.digest:
        return f"the recipe has changed since version {result.version}"
    if recipe.task is None or recipe.task not in sources.tables()["tasks"]:
        return "its task is not there any more"
    if sources.digest_rules(recipe.task) != result.rules:
        return "the rules of its data have changed"
    if result.scoring != SCORING:
        return "answers are scored otherwise now"
    tasks = read_tasks()
    for name, dataset in result.datasets.items():
        if name not in tasks:
            return f"the task of {name} is not there any more"
        if (version := str(tasks[name]["metadata"]["version"])) != dataset.task_version:
            return f"{name} has task version {version} now, and had {dataset.task_version}"
        if find_cluster_pattern(name) and not dataset.clusters:
            return f"rows of {name} that ask about one text count as one now"
    return ""


def choose_evidence(measured: Sequence[Result]) -> list[Result]:
    """For each recipe the result that stands for it, in their order; a stale one never does.

    Seeds count first, up to `ENOUGH_SEEDS`; then datasets, examples beside the base, and any more
    seeds. Of results that are level, the device with the most results counts, so that recipes are
    compared on one.
    """
    current = [result for result in measured if not explain_stale(result)]
    by_device = Counter(result.device for result in current)

    def weigh(result: Result) -> tuple[int, int, bool, int, int]:
        seeds = len(result.trainings)
        main = [entry.main[1] for entry in result.datasets.values()]
        has_examples = result.shots > 0 and any(score.base_with_examples for score in main)
        enough = min(seeds, ENOUGH_SEEDS)
        return enough, len(result.datasets), has_examples, seeds, by_device[result.device]

    best: dict[str, Result] = {}
    for result in current:
        best[result.recipe] = max(best.get(result.recipe, result), result, key=weigh)
    return list(best.values())


def read_recipe(name: str) -> recipes.Recipe:
    """A recipe as the tables give it, and one of the user's own from its file.

    Files of the catalogue are rendered with what is said here of their results.
    """
    if name in recipes.list_names() and not recipes.is_local(name):
        return recipes.Recipe(name, None, recipes.build_config(name), recipes.find_version(name))
    return recipes.find(name)


# ---- against other scores


def compare_with_r4(
    result: Result, entry: DatasetResult, others: Sequence[tuple[Result, DatasetResult]]
) -> Score | None:
    """The adapter's main score minus that of its task's `r4`, which is among `others`.

    Over seeds alone (`stats.compare_seeds`). None without a result of `r4` on the same device with
    the same seeds, two or more, and for `r4` itself.
    """
    if result.recipe not in recipes.list_names():
        return None
    model, task, method = recipes.split_name(result.recipe)
    metric, scores = entry.main
    for other, its_entry in others:
        its_metric, its_scores = its_entry.main
        its_setting = (other.recipe, other.device, its_metric, set(its_scores.seeds))
        setting = (f"{model}/{task}_r4", result.device, metric, set(scores.seeds))
        if its_setting != setting or method == "r4" or len(scores.seeds) < 2:
            continue
        pairs = [(its_scores.seeds[seed].value, scores.seeds[seed].value) for seed in scores.seeds]
        first, second = zip(*pairs, strict=True)
        return round_score(stats.compare_seeds(first, second, entry.rows))
    return None


def find_published(result: Result, dataset: str) -> dict[str, float]:
    """FinLoRA's scores of the recipe's method on Llama 3.1 8B; {} where they are not compared."""
    method = find_published_method(result.recipe)
    scores = report.read_published().get(method, {}).get(dataset, {})
    return {} if explain_no_comparison(result, dataset) else scores


def find_published_method(recipe: str) -> str:
    """FinLoRA's name of a recipe's method; empty for a method or recipe that it does not have."""
    if recipe not in recipes.list_names() or recipes.is_local(recipe):
        return ""
    method = recipes.split_name(recipe)[2]
    return str(recipes.read_matrix()["methods"][method].get("finlora") or "")


def explain_no_comparison(result: Result, dataset: str) -> str:
    """Why a score is compared with no published one that there is; empty where it is."""
    if selected := result.datasets[dataset].selected:
        return f"it was scored on {selected} of the published file"
    if reason := report.explain_incomparable(dataset):
        return reason
    method = find_published_method(result.recipe)
    published = report.read_published().get(method, {}).get(dataset, {})
    if published and published.keys().isdisjoint(result.datasets[dataset].metrics):
        names = " and ".join(report.title(metric) for metric in published)
        return f"FinLoRA publishes its {names}, which was not measured"
    return ""


# ---- from manifests and score files


def describe_chat_rows(path: Path) -> ChatRows:
    """A file of chat rows, as its manifest tells of it."""
    manifest = sources.manifest(path)
    place, source = manifest.get("from"), str(manifest["source"])
    if place not in ("FINLORA_DATA", "data/raw", EXAMPLES):  # a folder of the user's
        source = Path(source).name
    return ChatRows(
        file=clean_text(path.name),
        rows=manifest["rows"],
        sha256=manifest["sha256"],
        source=clean_text(source),
        place=clean_text(place) if place else None,
    )


def clean_text(text: str) -> str:
    """A text with an underscore for each character that `Text` does not permit."""
    # A power or a fraction is a \w for `re`, and none for Pydantic.
    return "".join(sign if _is_permitted(sign) else "_" for sign in text)[:300]


def _is_permitted(sign: str) -> bool:
    return sign in "_ .,;:()+/@-" or sign.isalpha() or sign.isdecimal()


def measure_dataset(
    base: report.Content,
    adapters: dict[int, report.Content],
    with_examples: report.Content | None,
) -> DatasetResult:
    """What the score files of a base, and of its adapters by seed, say together.

    Kept are the dataset's first metric and those by FinLoRA's scoring. Raises JobFailed where the
    files hold answers to other rows.
    """
    evaluated = base["evaluated"]
    dataset = evaluated["dataset"]
    if not all(report.paired(base, content) for content in adapters.values()):
        raise JobFailed(f"the scores of {dataset} are not of the same rows; FORCE=1 scores again")
    selected = evaluated["data_selected"]
    sides = [base, *adapters.values()]
    metrics = choose_metrics(sides)
    numbers = set(report.list_shared_rows(metrics[0], sides))
    _, clusters = report.select_shared(metrics[0], sides)
    rows = [row for row in base["predictions"] if row["row"] in numbers]
    majority = report.measure_majority({"predictions": rows})
    return DatasetResult(
        data=describe_chat_rows(find_rows(dataset)),
        task_version=str(evaluated["task_version"]),
        rows=len(numbers),
        clusters=len(set(clusters)) if clusters else None,
        selected=clean_text(selected) if selected else None,
        fewer_examples=with_examples.get("rows_with_fewer_examples") if with_examples else None,
        majority=None if majority is None else round(majority, DECIMALS),
        metrics={
            metric: measure_metric(metric, base, adapters, with_examples) for metric in metrics
        },
    )


def choose_metrics(contents: Sequence[report.Content]) -> list[str]:
    """The first metric that all score files have, and FinLoRA's: it publishes them."""
    first, *others = (list(content["metrics"]) for content in contents)
    shared = [metric for metric in first if all(metric in names for names in others)]
    published = {"finlora_accuracy", "finlora_f1_weighted", "bertscore"}
    return [metric for metric in shared if metric == shared[0] or metric in published]


def measure_metric(
    metric: str,
    base: report.Content,
    adapters: dict[int, report.Content],
    with_examples: report.Content | None,
) -> MetricResult:
    sides = [base, *adapters.values()]
    (values_of_base, *columns), clusters = report.select_shared(metric, sides)
    few_shots = None
    if with_examples and metric in with_examples["metrics"]:
        (values, *_), its_clusters = report.select_shared(metric, [with_examples, *sides])
        few_shots = stats.estimate(metric, values, its_clusters) if values else None
    return MetricResult(
        base=round_score(stats.estimate(metric, values_of_base, clusters)),
        base_with_examples=round_score(few_shots) if few_shots else None,
        seeds={
            seed: round_score(stats.estimate(metric, values, clusters))
            for seed, values in zip(adapters, columns, strict=True)
        },
        adapter=round_score(stats.estimate_mean(metric, columns, clusters=clusters)),
        gain=round_score(stats.estimate_mean(metric, columns, values_of_base, clusters)),
    )


def round_score(value: dict[str, Any]) -> Score:
    ends = ("value", "low", "high")
    return Score(**{end: round(value[end], DECIMALS) for end in ends if end in value})
