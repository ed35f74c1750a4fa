"""Makes the model card of a run: metadata for the Hub, and a text for people.

    make_card(publication)    →  huggingface_hub.ModelCard

The run's files, its recipe and data/sources.yaml determine the card. The text is the Jinja template
tools/hub/card.md.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import adapters, recipes, sources
from tools.common import ROOT, WrongInput, shown
from tools.subjects import CONSTRAINED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

TEMPLATE = ROOT / "tools" / "hub" / "card.md"
TAG = "finlora-recipes"
# Parts of data licences that restrict what is made from the data, the strictest first.
STRICT = ("-NC-ND-", "-ND-", "-NC-SA-", "-NC-", "-SA-")
EXAMPLES = {
    "name": "the examples of finlora-recipes",
    "attribution": "written for that project",
    "licence": "MIT",
    "commercial": True,
}
# The Hub's names of metrics; others keep theirs.
METRICS = {"f1_weighted": "f1", "f1_macro": "f1", "token_f1": "f1", "rouge_l": "rouge"}

# {`name_scores`: {"adapter": score file, "base": score file}}
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Publication:
    """A finished run, and where it is published."""

    recipe: recipes.Recipe
    run_info: dict[str, Any]  # its run.json
    config: dict[str, Any]  # its merged Axolotl config
    scores: Scores
    base: str  # the base's name on the Hub
    revision: str  # of the base
    repo: str
    price: float | None = None  # USD for an hour of one device

    @property
    def tag(self) -> str:
        return f"v{self.run_info.get('recipe_version')}"

    @property
    def data(self) -> list[dict[str, Any]]:
        return self.run_info.get("data") or []


def list_origins(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lists the origins of a run's data files, each once, as rows of data/sources.yaml.

    A file that data/sources.yaml does not list is the user's own; its licence is unknown.
    """
    tables = sources.tables()
    origins: dict[str, dict[str, Any]] = {}
    for entry in data:
        if entry.get("from") == "data/sample":
            origins["data/sample"] = EXAMPLES
            continue
        source = str(entry.get("source") or entry["path"])
        rows = tables.get("files", {}).items()
        row = next((row for f, row in rows if f == source or f.endswith(f"/{source}")), None)
        if row is None:
            name = Path(source).name
            origins[name] = {"name": name, "licence": None, "commercial": None}
            continue
        for name in row.get("origins", ()):
            origins[name] = tables["origins"][name] | {"published": row.get("published", True)}
    return list(origins.values())


def rank_licence(origin: dict[str, Any]) -> int:
    """Returns the place of an origin's licence in STRICT; len(STRICT) if it restricts nothing."""
    text = f"{origin.get('licence') or ''}-".upper()
    return next((place for place, part in enumerate(STRICT) if part in text), len(STRICT))


def explain_forbidden(data: list[dict[str, Any]]) -> str | None:
    """Says why an adapter trained on this data must not be public; None if it may be."""
    for origin in list_origins(data):
        if not origin.get("published", True) and not origin.get("licence"):
            return f"{origin['name']} is under copyright and not published"
        if "-ND" in (origin.get("licence") or ""):
            return f"{origin['name']} is {origin['licence']}: nothing derived from it may be shared"
    return None


def choose_licence(base: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the card's `license` metadata: the base's licence, unless the data's is stricter.

    It is `other`, with a name and a link, if base and data both have terms of their own or those of
    the data are unknown.
    """
    name, table = recipes.resolve_mirror(base), recipes.read_matrix()["licences"]
    row = next((row for start, row in table.items() if name.startswith(start)), ["unknown"])
    base_licence, link = row[0], row[1] if len(row) > 1 else None
    origins = list_origins(data)
    strictest = min(origins, key=rank_licence, default=EXAMPLES)
    has_terms = rank_licence(strictest) < len(STRICT)
    data_licence = str(strictest["licence"]).lower() if has_terms else ""
    if not has_terms and any(origin.get("commercial") is not True for origin in origins):
        data_licence = "terms-of-the-data"
    if not data_licence and base_licence != "unknown":
        return {"license": base_licence} | ({"license_link": link} if link else {})
    if data_licence.startswith("cc-") and base_licence in ("apache-2.0", "mit"):
        return {"license": data_licence}
    return {
        "license": "other",
        "license_name": "-and-".join(filter(None, [base_licence, data_licence])),
        "license_link": link or f"https://huggingface.co/{base}",
    }


def read_scores(file: Path, verb: str) -> dict[str, Any] | None:
    """Reads a score file; None for a damaged one, which stderr names."""
    from evals import report

    try:
        return report.read(file)
    except WrongInput as error:
        print(f"{verb:<10} {shown(file)} left out: {error}", file=sys.stderr)
        return None


def name_scores(evaluated: dict[str, Any]) -> str:
    """The name of a published score file: a dataset's, or that of its answers under CONSTRAIN=1."""
    dataset = str(evaluated["dataset"])
    return f"{dataset}_{CONSTRAINED}" if evaluated.get("constrained_to") else dataset


def read_dataset(pair: dict[str, Any]) -> str:
    return str(pair["adapter"]["evaluated"]["dataset"])


def is_free(pair: dict[str, Any]) -> bool:
    """Whether answers could be any text."""
    return not pair["adapter"]["evaluated"].get("constrained_to")


def format_interval(value: dict[str, Any] | None, missing: str, signed: bool = False) -> str:
    from evals import report

    if value is None:
        return missing
    point, interval = report.format_percent(value, signed)
    return f"{point} ({interval or 'no interval: ' + value['no_interval']})"


def tabulate_scores(scores: Scores) -> tuple[list[dict[str, str]], list[str]]:
    """Makes the rows of the card's table of scores, and sentences on what the differences mean."""
    from evals import report

    rows, verdicts = [], []
    # Free answers and those under CONSTRAIN=1 are two families of tests, corrected apart.
    for free in (True, False):
        names = [name for name in scores if is_free(scores[name]) == free]
        contents = {name: scores[name]["adapter"] for name in names}
        bases = {name: scores[name]["base"] for name in names if "base" in scores[name]}
        gains = report.differences(bases, contents)
        labels = {
            name: report.append_conditions(read_dataset(scores[name]), content["evaluated"])
            for name, content in contents.items()
        }
        for name, content in contents.items():
            base_metrics = bases.get(name, {}).get("metrics", {})
            for metric, value in content["metrics"].items():
                row = {"dataset": labels[name], "metric": report.title(metric)}
                row["base"] = format_interval(base_metrics.get(metric), "not scored")
                row["adapter"] = format_interval(value, "–")
                gain = gains.get(name, {}).get(metric)
                row["difference"] = format_interval(gain, "–", signed=True)
                rows.append(row | {"examples": f"{content['examples']:,}"})
        verdicts += [
            f"{labels[name]}, {report.title(metric)}: {text}."
            for name, metric, text in report.sentences(gains, contents)
        ]
        verdicts += report.describe_majority(
            {labels[name]: content for name, content in contents.items()}
        )
    return rows, verdicts


def list_results(scores: Scores) -> list["EvalResult"]:
    """Lists every score with its interval, as the Hub's model-index has them."""
    from huggingface_hub import EvalResult

    from evals import report

    results = []
    for pair in scores.values():
        content, dataset = pair["adapter"], read_dataset(pair)
        row = sources.tables()["datasets"].get(dataset, {})
        labels = content["evaluated"].get("constrained_to")
        data_from = content["evaluated"].get("data_from")
        file = {"from": data_from, "source": row.get("file", dataset), "path": dataset}
        origin = list_origins([file])[0]
        collection = origin["name"] if data_from == "data/sample" else "FinLoRA"
        for name, value in content["metrics"].items():
            arguments = {"interval": [value.get("low"), value.get("high")], "confidence": 0.95}
            if value.get("no_interval"):
                arguments = {"no_interval": value["no_interval"]}
            arguments["examples"] = len(report.values(content, name))
            arguments["precision"] = content["evaluated"].get("precision")
            arguments |= {"constrained_to": labels} if labels else {}
            kind = name.removeprefix("finlora_")
            results.append(
                EvalResult(
                    task_type="text-classification" if row.get("labels") else "text-generation",
                    dataset_type=find_hub_dataset(origin) or dataset,
                    dataset_name=f"{dataset} ({collection})",
                    dataset_config=dataset,
                    dataset_split="test",
                    metric_type=METRICS.get(kind, kind),
                    metric_name=report.append_conditions(report.title(name), content["evaluated"]),
                    metric_value=value["value"],
                    metric_args=arguments,
                )
            )
    return results


def find_hub_dataset(origin: dict[str, Any]) -> str | None:
    """Returns `owner/name` of an origin that is a dataset on the Hub, else None."""
    _, start, name = str(origin.get("url", "")).partition("https://huggingface.co/datasets/")
    return name if start else None


def read_titles(recipe: recipes.Recipe) -> dict[str, str]:
    """Reads the titles of a recipe's model, task and method."""
    try:
        names = dict(zip(("model", "task", "method"), recipes.split_name(recipe.name), strict=True))
    except WrongInput:
        return {
            "model": str(recipe.config["base_model"]).rstrip("/").rsplit("/", 1)[-1],
            "task": recipe.task or recipe.run.folder.name,
            "method": str(recipe.config.get("adapter")),
        }
    return {part: recipes.read_matrix()[f"{part}s"][name]["title"] for part, name in names.items()}


def read_example(task: str | None) -> str:
    """Reads a prompt of the task from the example rows."""
    tables = sources.tables()
    for dataset in tables["tasks"].get(task, {}).get("eval", ()):
        path = sources.SAMPLE / tables["datasets"][dataset]["file"]
        if path.is_file():
            with open(path, encoding="utf-8") as file:
                return str(json.loads(file.readline())["context"]).strip()
    return "What is the sentiment of this news? Sales rose by 8 % in the third quarter.\nAnswer:"


def describe_repair(pair: dict[str, Any]) -> str:
    """Says how the labels of a scored dataset were repaired; empty if they were not."""
    text = read_label_check(pair)
    return text if text.startswith(("repaired", "REPAIR=1")) else ""


def collect_label_checks(
    data: list[dict[str, Any]], scores: Scores, repairs: dict[str, str]
) -> dict[str, str]:
    """Collects what was decided on swapped labels, for training rows and unrepaired test sets."""
    pairs = {read_dataset(pair): pair for pair in scores.values()}
    checks = {name: read_label_check(pair) for name, pair in pairs.items() if name not in repairs}
    checks["training"] = next((e["label_check"] for e in data if e.get("label_check")), "")
    return {rows: text for rows, text in checks.items() if text}


def read_label_check(pair: dict[str, Any]) -> str:
    return str(pair["adapter"].get("label_checks", {}).get("test", ""))


def describe_scores(scores: Scores) -> dict[str, Any]:
    """Returns the template's variables about scores."""
    from evals import report, stats

    tests = sources.tables()["datasets"]
    pairs = {read_dataset(pair): pair for pair in scores.values()}
    label_sets = (tests.get(name, {}).get("labels") for name in pairs)
    rows, verdicts = tabulate_scores(scores)
    incomparable = {name: report.explain_incomparable(name) for name in pairs}
    return {
        "rows": rows,
        "verdicts": verdicts,
        "constrained": not all(map(is_free, scores.values())),
        "small": [n for n, pair in pairs.items() if pair["adapter"]["examples"] < stats.SMALL],
        "answers": next(filter(None, label_sets), None),
        "incomparable": {name: reason for name, reason in incomparable.items() if reason},
    }


def describe_data(data: list[dict[str, Any]], scores: Scores) -> dict[str, Any]:
    """Returns the template's variables about the data of training and scores."""
    pairs = {read_dataset(pair): pair for pair in scores.values()}
    repairs = {name: text for name, pair in pairs.items() if (text := describe_repair(pair))}
    places = [entry.get("from") for entry in data]
    places += [pair["adapter"]["evaluated"].get("data_from") for pair in scores.values()]
    return {
        "data": data,
        "origins": list_origins(data),
        "forbidden": explain_forbidden(data),
        "repairs": repairs,
        "label_checks": collect_label_checks(data, scores, repairs),
        "sample": "data/sample" in places,
    }


def make_card(publication: Publication) -> "ModelCard":
    """Makes the model card of a run; raises WrongInput if it does not read back as written."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe, config = publication.recipe, publication.config
    results = list_results(publication.scores)
    datasets = filter(None, map(find_hub_dataset, list_origins(publication.data)))
    metadata = ModelCardData(
        base_model=publication.base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        language="en",
        datasets=list(datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=[TAG, "finance", "lora", "axolotl", str(config.get("adapter", "lora"))],
        eval_results=results or None,
        model_name=publication.repo.rsplit("/", 1)[-1] if results else None,
        **choose_licence(publication.base, publication.data),
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        publication=publication,
        short_name=recipe.name.removeprefix(f"{recipes.DEFAULT_MODEL}/"),
        prompt=read_example(recipe.task),
        vllm_rank=adapters.vllm_rank(config["lora_r"]),
        **read_titles(recipe),
        **describe_data(publication.data, publication.scores),
        **describe_scores(publication.scores),
    )
    if ModelCard(str(card)).data.to_dict() != metadata.to_dict():
        raise WrongInput("the model card does not read back as it was written")
    return card
