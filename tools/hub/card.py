"""Makes the model card of a run: what the Hub reads as metadata, and what a person reads.

    card.make(recipe, told, scores, base, revision, repo, tag)   →  huggingface_hub.ModelCard

Everything in it comes from the run's own files, the recipe and data/sources.yaml, so the same run
gives the same card. The text is tools/hub/card.md, a Jinja template.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import adapters, recipes
from tools import sources as sources_module
from tools.common import ROOT, WrongInput

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = ROOT / "tools" / "hub" / "card.md"
TAG = "finlora-recipes"

# The licence of a base, by the start of its name on the Hub: (identifier on the Hub, address).
LLAMA = "https://huggingface.co/meta-llama/{}/blob/main/LICENSE"
BASES = {
    "meta-llama/Llama-3.1": ("llama3.1", LLAMA.format("Llama-3.1-8B-Instruct")),
    "meta-llama/Llama-3.2": ("llama3.2", LLAMA.format("Llama-3.2-1B-Instruct")),
    "meta-llama/Llama-3.3": ("llama3.3", LLAMA.format("Llama-3.3-70B-Instruct")),
    "google/gemma-3": ("gemma", "https://ai.google.dev/gemma/terms"),
    "Qwen/Qwen3": ("apache-2.0", None),
    "mistralai/Mistral-7B": ("apache-2.0", None),
    "HuggingFaceTB/SmolLM2": ("apache-2.0", None),
}
# What a data licence asks of what is made from it, the strictest first; others ask nothing.
STRICT = ("-NC-ND-", "-ND-", "-NC-SA-", "-NC-", "-SA-")
OWN = {
    "name": "the examples of finlora-recipes",
    "attribution": "written for that project",
    "licence": "MIT",
    "commercial": True,
}
# What the Hub calls a metric; others keep their names.
METRICS = {"f1_weighted": "f1", "f1_macro": "f1", "token_f1": "f1", "rouge_l": "rouge"}


def origins(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the rows of a run's data files are from: rows of data/sources.yaml, each once.

    A file that data/sources.yaml does not know is somebody's own, and its licence is unknown.
    """
    table, found = sources_module.tables(), {}
    for entry in data:
        source = str(entry.get("source") or entry["path"])
        if entry.get("from") == "data/sample":
            found["data/sample"] = OWN
            continue
        known = [f for f in table.get("files", {}) if f == source or f.endswith(f"/{source}")]
        row = table["files"][known[0]] if known else {}
        for name in row.get("origins", ()):
            found[name] = table["origins"][name] | {"published": row.get("published", True)}
        if not known:
            name = Path(source).name
            found[name] = {"name": name, "licence": None, "commercial": None}
    return list(found.values())


def strictness(origin: dict[str, Any]) -> int:
    """The place of an origin's licence in STRICT; len(STRICT) where it asks nothing."""
    text = f"{origin.get('licence') or ''}-".upper()
    return next((place for place, part in enumerate(STRICT) if part in text), len(STRICT))


def forbidden(data: list[dict[str, Any]]) -> str | None:
    """Why an adapter made from this data must not be made public; None where nothing forbids it."""
    for origin in origins(data):
        if not origin.get("published", True):
            return f"{origin['name']} is under copyright and not published"
        if "-ND" in (origin.get("licence") or ""):
            return f"{origin['name']} is {origin['licence']}: nothing derived from it may be shared"
    return None


def licence(base: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The card's `license` metadata: the base's, unless the data's asks for more.

    Where base and data both have terms of their own, or those of the data are unknown, it is
    `other`, with a name and where to read more.
    """
    name = recipes.resolve_mirror(base)
    of_base, link = next((v for k, v in BASES.items() if name.startswith(k)), ("unknown", None))
    rows = origins(data)
    strict = min(rows, key=strictness, default=OWN)
    of_data = str(strict["licence"]).lower() if strictness(strict) < len(STRICT) else ""
    if not of_data and any(row.get("commercial") is not True for row in rows):
        of_data = "terms-of-the-data"
    plain = of_base in ("apache-2.0", "mit")
    if not of_data and of_base != "unknown":
        return {"license": of_base} | ({"license_link": link} if link else {})
    if of_data.startswith("cc-") and plain:
        return {"license": of_data}
    return {
        "license": "other",
        "license_name": "-and-".join(filter(None, [of_base, of_data])),
        "license_link": link or f"https://huggingface.co/{base}",
    }


def interval(value: dict[str, Any], signed: bool = False) -> str:
    plus = "+" if signed else ""
    point = f"{100 * value['value']:{plus}.1f}"
    if value.get("no_interval"):
        return f"{point} (no interval: {value['no_interval']})"
    return f"{point} ({100 * value['low']:{plus}.1f} … {100 * value['high']:{plus}.1f})"


def metrics(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of a score file that have a value, and an interval or why there is none."""
    return {
        name: value
        for name, value in content["metrics"].items()
        if isinstance(value, dict) and "value" in value and {"high", "no_interval"} & value.keys()
    }


def table(scores: dict[str, dict[str, Any]]) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the card's table of scores, and sentences on what the differences mean."""
    from evals import report

    rows: list[dict[str, str]] = []
    adapters = {dataset: pair["adapter"] for dataset, pair in scores.items()}
    bases = {dataset: pair["base"] for dataset, pair in scores.items() if "base" in pair}
    gains = report.differences(bases, adapters)
    for dataset, content in adapters.items():
        there = metrics(bases[dataset]) if dataset in bases else {}
        for name, value in metrics(content).items():
            gain = gains.get(dataset, {}).get(name)
            rows.append(
                {
                    "dataset": dataset,
                    "metric": report.title(name),
                    "base": interval(there[name]) if name in there else "not scored",
                    "adapter": interval(value),
                    "difference": interval(gain, signed=True) if gain else "–",
                    "examples": f"{content['examples']:,}",
                }
            )
    told = report.sentences(gains, adapters)
    return rows, [f"{dataset}, {report.title(name)}: {text}." for dataset, name, text in told]


def results(scores: dict[str, dict[str, Any]]) -> list[Any]:
    """Every score with its interval, as the Hub's model-index has them."""
    from huggingface_hub import EvalResult

    from evals import report

    found, sources = [], sources_module.tables()
    for dataset, pair in scores.items():
        content, row = pair["adapter"], sources["datasets"].get(dataset, {})
        source = {"from": content["evaluated"].get("data_from"), "source": row.get("file", dataset)}
        where = origins([source | {"path": dataset}])[0]
        address = str(where.get("url", ""))
        own = content["evaluated"].get("data_from") == "data/sample"
        for name, value in metrics(content).items():
            kind = name.removeprefix("finlora_")
            found.append(
                EvalResult(
                    task_type="text-classification" if row.get("labels") else "text-generation",
                    dataset_type=hub_dataset(address) or dataset,
                    dataset_name=f"{dataset} ({where['name'] if own else 'FinLoRA'})",
                    dataset_config=dataset,
                    dataset_split="test",
                    metric_type=METRICS.get(kind, kind),
                    metric_name=report.title(name),
                    metric_value=value["value"],
                    metric_args={
                        **(
                            {"no_interval": value["no_interval"]}
                            if value.get("no_interval")
                            else {"interval": [value["low"], value["high"]], "confidence": 0.95}
                        ),
                        "examples": len(report.values(content, name)),
                        "precision": content["evaluated"].get("precision"),
                    },
                )
            )
    return found


def hub_dataset(address: str) -> str | None:
    """`owner/name` of a data set's address on the Hub."""
    start = "https://huggingface.co/datasets/"
    return address.removeprefix(start) if address.startswith(start) else None


def titles(recipe: recipes.Recipe) -> dict[str, str]:
    """The names of model, task and method as a person reads them."""
    try:
        model, task, method = recipes.split_name(recipe.name)
    except WrongInput:
        return {
            "model": str(recipe.config["base_model"]).rstrip("/").rsplit("/", 1)[-1],
            "task": recipe.task or recipe.run.folder.name,
            "method": str(recipe.config.get("adapter")),
        }
    rows = recipes.read_matrix()
    return {
        "model": rows["models"][model]["title"],
        "task": rows["tasks"][task]["title"],
        "method": rows["methods"][method]["title"],
    }


def example(task: str | None) -> str:
    """A prompt of the task, from the examples that were written for this project."""
    spec = sources_module.tables()["tasks"].get(task, {})
    for dataset in spec.get("eval", ()):
        path = sources_module.SAMPLE / sources_module.tables()["datasets"][dataset]["file"]
        if path.is_file():
            with open(path, encoding="utf-8") as file:
                return str(json.loads(file.readline())["context"]).strip()
    return "What is the sentiment of this news? Sales rose by 8 % in the third quarter.\nAnswer:"


def describe_repair(dataset: str, pair: dict[str, Any]) -> str:
    """How the labels of a scored dataset were repaired; empty where they were not.

    Score files without `label_checks` are of a time when only the published file was repaired.
    """
    reason = (
        sources_module.tables()["datasets"].get(dataset, {}).get("repair", {}).get("reason", "")
    )
    if "label_checks" not in pair["adapter"]:
        return str(reason).strip()
    text = read_label_check(pair)
    return text if text.startswith(("repaired", "REPAIR=1")) else ""


def collect_label_checks(
    data: list[dict[str, Any]], scores: dict[str, dict[str, Any]], repairs: dict[str, str]
) -> dict[str, str]:
    """What was decided on swapped labels, of the training rows and of each unrepaired test set."""
    checks = {name: read_label_check(pair) for name, pair in scores.items() if name not in repairs}
    checks["training"] = next((e["label_check"] for e in data if e.get("label_check")), "")
    return {rows: text for rows, text in checks.items() if text}


def read_label_check(pair: dict[str, Any]) -> str:
    """What was decided on swapped labels of the rows that an adapter was scored on."""
    return str(pair["adapter"].get("label_checks", {}).get("test", ""))


def hours(told: dict[str, Any]) -> float | None:
    seconds = told.get("seconds")
    return seconds * told.get("processes", 1) / 3600 if seconds else None


def make(
    recipe: recipes.Recipe,
    told: dict[str, Any],
    config: dict[str, Any],
    scores: dict[str, dict[str, Any]],
    *,
    base: str,
    revision: str,
    repo: str,
    price: float | None = None,
) -> "ModelCard":
    """The card of a run.

    told: its run.json. config: its merged Axolotl config. scores: {dataset: {"adapter": score file,
    "base": score file}}. base, revision: the base on the Hub. price: USD for an hour of one device.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from evals import report, stats

    data = told.get("data") or []
    rows = origins(data)
    names = titles(recipe)
    tests = sources_module.tables()["datasets"]
    labels = [tests.get(name, {}).get("labels") for name in scores]
    repairs = {name: text for name, pair in scores.items() if (text := describe_repair(name, pair))}
    sample = any(entry.get("from") == "data/sample" for entry in data)
    sample = sample or any(
        pair["adapter"]["evaluated"].get("data_from") == "data/sample" for pair in scores.values()
    )
    found, (shown_scores, verdicts) = results(scores), table(scores)
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        language="en",
        datasets=[d for row in rows if (d := hub_dataset(str(row.get("url", ""))))] or None,
        metrics=sorted({result.metric_type for result in found}) or None,
        tags=[TAG, "finance", "lora", "axolotl", str(config.get("adapter", "lora"))],
        eval_results=found or None,
        model_name=repo.rsplit("/", 1)[-1] if found else None,
        **licence(base, data),
    )
    spent = hours(told)
    made = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        **names,
        recipe=recipe.name,
        typed=recipe.name.removeprefix(f"{recipes.DEFAULT_MODEL}/"),
        repo=repo,
        tag=f"v{told.get('recipe_version')}",
        told=told,
        config=config,
        data=data,
        origins=rows,
        forbidden=forbidden(data),
        revision=revision,
        local_base=Path(str(config.get("base_model"))).as_posix() != base,
        rows=shown_scores,
        verdicts=verdicts,
        small=[n for n, pair in scores.items() if pair["adapter"]["examples"] < stats.SMALL],
        answers=next((row for row in labels if row), None),
        repairs=repairs,
        label_checks=collect_label_checks(data, scores, repairs),
        incomparable={name: why for name in scores if (why := report.explain_incomparable(name))},
        sample=sample,
        prompt=example(recipe.task),
        template_kwargs=config.get("chat_template_kwargs") or {},
        lora_rank=adapters.vllm_rank(config["lora_r"]),
        hours=spent,
        cost=None if spent is None or price is None else spent * price,
        price=price,
        data_licence=[f"{row['name']}: {row.get('licence') or 'none stated'}" for row in rows],
    )
    check(made)
    return made


def check(made: "ModelCard") -> None:
    """Raises WrongInput where the library reads other metadata from a card than went into it.

    The Hub's own rules are asked by huggingface_hub before a commit (`/api/validate-yaml`).
    """
    from huggingface_hub import ModelCard

    try:
        again = ModelCard(str(made))
    except (ValueError, TypeError) as error:
        raise WrongInput(f"the model card's metadata: {str(error).splitlines()[0]}") from None
    if again.data.to_dict() != made.data.to_dict() or not again.text.strip():
        raise WrongInput("the model card does not read back as it was written")
