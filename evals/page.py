"""Makes a page of all scores: runs/report/index.html, one file that asks nothing of a network.

    python -m tools report [--gpu "A100 80GB"] [--price 1.19]

It reads the score files of every run and base, what was planned and the losses, and scores nothing.
Its figures lie beside it as PNGs. Prompts and answers are hostile input: all text is escaped, and
what steers a page or a terminal is spelled out.
"""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from evals import figures, report, stats
from evals import run as evaluation
from evals.tasks.own import write_prompt
from tools import recipes, sources
from tools import runs as runs_module
from tools.common import ROOT, WrongInput, atomic, json_lines, read_yaml, shown

TEMPLATE = ROOT / "evals" / "page.html"
WRONG = 25  # wrong answers shown of each model and dataset
TEXT = 3000  # characters shown of each prompt and answer
LABELS = 12  # classes up to which a confusion matrix can be read
Content = report.Content
# The plan of a config that is trained on so many rows of a file; training lies above this module.
Planner = Callable[[dict[str, Any], int | None, Path], dict[str, Any]]


@dataclass(frozen=True)
class Scored:
    """What was scored: a base or an adapter, at one precision, prompt format and limit."""

    folder: Path
    model: str
    method: str
    setting: str
    adapter: bool
    contents: dict[str, Content]  # dataset → its score file

    @property
    def name(self) -> str:
        return f"{self.model}/{self.method}, {self.setting}"

    @property
    def recipe(self) -> str:
        return str(self.told.get("recipe") or "")

    @property
    def told(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}


# ---- what was scored


def read(file: Path) -> Content:
    """A score file; WrongInput where it is damaged, or of an adapter that was trained again."""
    content = report.read(file)
    run = file.parent.parent / "run.json"
    now = json.loads(run.read_text()).get("adapter_sha256") if run.is_file() else None
    if now and content["evaluated"].get("adapter_sha256") not in (None, now):
        raise WrongInput("of an adapter that was trained again; `make eval` scores it")
    return content


def everything() -> list[Scored]:
    """All that was scored, bases before their adapters; files that cannot count are named."""
    found: dict[tuple[Path, str], dict[str, Content]] = {}
    for file in sorted(runs_module.RUNS.glob("**/evals/*.json")):
        parts = file.relative_to(runs_module.RUNS).parts
        if any(part.startswith(".") or ".previous" in part for part in parts):
            continue
        try:
            content = read(file)
        except WrongInput as error:
            print(f"report     {shown(file)} left out: {error}", file=sys.stderr)
            continue
        dataset = str(content["evaluated"]["dataset"])
        suffix = file.stem.removeprefix(dataset)
        found.setdefault((file.parent.parent, suffix), {})[dataset] = content
    order = list(sources.tables()["datasets"])
    made = []
    for (folder, _), contents in found.items():
        told = next(iter(contents.values()))["evaluated"]
        form = told.get("prompt_format", "chat")
        limit = f"{told['limit']} rows" if told["limit"] else ""
        setting = [told["precision"], form if form != "chat" else "", limit]
        adapter = bool(told.get("adapter_sha256"))
        model = str(told.get("base_model") or folder.parent.name).rsplit("/", 1)[-1]
        method = folder.name if adapter or not folder.name.startswith("base_") else "base"
        if folder.parent == runs_module.RUNS / "endpoint":
            method = "endpoint"
        names = sorted(contents, key=lambda n: (order.index(n) if n in order else len(order), n))
        ordered = {name: contents[name] for name in names}
        kept = ", ".join(str(part) for part in setting if part)
        made.append(Scored(folder, model, method, kept, adapter, ordered))
    return sorted(made, key=lambda one: (one.model, one.adapter, one.method, one.setting))


def comparable(one: Content, other: Content) -> bool:
    """Whether nothing but the adapter differs between two scores."""
    both = ({**content["evaluated"], "adapter_sha256": None} for content in (one, other))
    return next(both) == next(both)


def base_of(scored: Scored, all_scored: list[Scored]) -> dict[str, Content]:
    """The base's scores that an adapter's can be compared with, by dataset."""
    return {
        dataset: base.contents[dataset]
        for base in all_scored
        if not base.adapter
        for dataset, content in scored.contents.items()
        if dataset in base.contents and comparable(base.contents[dataset], content)
    }


# ---- tables


def numbers(value: dict[str, Any] | None, signed: bool = False) -> dict[str, Any] | None:
    """A value with an interval for the page: text in %, and the number to sort by."""
    if not value:
        return None
    point, interval = report.format_percent(value, signed)
    return {"point": point, "range": interval or report.NO_INTERVAL, "sort": value["value"]}


def published(scored: Scored) -> dict[str, dict[str, float]]:
    """FinLoRA's scores of the same method on Llama 3.1 8B, by dataset; {} where it has none."""
    if not scored.adapter:
        return report.published()["base"] if scored.method == "base" else {}
    try:
        method = recipes.split_name(recipes.find(scored.recipe).name)[2]
        theirs = str(recipes.read_matrix()["methods"][method].get("finlora"))
    except WrongInput:
        named = report.method(scored.folder.name)
        theirs = named[1] if named else ""
    return report.published().get(theirs, {})


def table(scored: Scored, gains: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each dataset and metric of what was scored."""
    rows, theirs = [], published(scored)
    for dataset, content in scored.contents.items():
        own = content["evaluated"]["data_from"] == "data/sample"
        told = ["examples" if own else content["evaluated"].get("data_selected")]
        told.append(evaluation.explain_old(content))
        for place, (metric, value) in enumerate(content["metrics"].items()):
            gain = gains.get(dataset, {}).get(metric)
            score = (
                None
                if report.explain_incomparable(dataset)
                else theirs.get(dataset, {}).get(metric)
            )
            rows.append(
                {
                    "dataset": dataset,
                    "note": "; ".join(filter(None, told)),
                    "model": scored.model,
                    "method": scored.method,
                    "setting": scored.setting,
                    "metric": report.title(metric),
                    "main": place == 0,
                    "score": numbers(value),
                    "gain": numbers(gain, signed=True),
                    "better": gain and (gain["value"] > 0) != (metric in stats.LOWER_IS_BETTER),
                    "p": gain.get("corrected") if gain else None,
                    "published": score,
                    "rows": len(report.values(content, metric)),
                }
            )
    return rows


def verdicts(scored: Scored, gains: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What the differences from the base and from FinLoRA's published scores mean, in sentences."""
    said = [
        f"{dataset}, {report.title(metric)}: {told}."
        for dataset, metric, told in report.sentences(gains, scored.contents)
    ]
    llama = recipes.read_matrix()["models"]["llama-3.1-8b"]
    theirs = report.method(scored.recipe or scored.folder.name)
    told_base = next(iter(scored.contents.values()))["evaluated"].get("base_model")
    if scored.adapter:
        method = theirs[1] if theirs and theirs[0] == llama["finlora"] else ""
    else:
        method = "base" if told_base == llama["hub"] else ""
    against = report.against_published(scored.contents, method)
    for dataset, metric, told in report.sentences(against, scored.contents):
        score = 100 * against[dataset][metric]["published"]
        text = (
            f"{dataset}, {report.title(metric)}: against FinLoRA's published {score:.1f}: {told}."
        )
        said.append(text)
    for dataset, content in scored.contents.items():
        if published(scored) and (why := report.explain_incomparable(dataset)):
            said.append(f"{dataset}: compared with no published score: {why}.")
        if old := evaluation.explain_old(content):
            said.append(f"{dataset}: {old}; it is compared with no new score.")
        said += [f"{dataset}: {note}." for note in report.notes_on(content)]
    return said


def between(adapters: list[Scored]) -> list[str]:
    """Adapters against each other, where they have the same base at the same precision."""
    said = []
    for one, other in combinations(adapters, 2):
        same = {
            dataset: content
            for dataset, content in one.contents.items()
            if dataset in other.contents and comparable(content, other.contents[dataset])
        }
        gains = report.differences(same, other.contents)
        said += [
            f"{other.name} against {one.name}: {dataset}, {report.title(metric)}: {told}."
            for dataset, metric, told in report.sentences(gains, same)
        ]
    return said


def confusion(content: Content) -> dict[str, Any] | None:
    """How often each label was answered for each that was expected; None where there are none.

    {"labels", "rows": [(expected, [(count, share of the row)…])]}; the last count of a row is of
    answers that are no label.
    """
    pairs = [row["values"].get("f1_weighted") or [] for row in content["predictions"]]
    if not all(len(each) == 1 for each in pairs):
        return None
    labels = sorted({each[0][0] for each in pairs})
    if len(labels) > LABELS:
        return None
    counts = {label: dict.fromkeys([*labels, None], 0) for label in labels}
    for ((expected, answered),) in pairs:
        counts[expected][answered if answered in counts else None] += 1
    rows = []
    for label, row in counts.items():
        total = sum(row.values())
        rows.append((label, [(count, count / total) for count in row.values()]))
    return {"labels": labels, "rows": rows}


@cache
def prompts(dataset: str, sha256: str) -> list[str] | str:
    """The prompts that a dataset was scored on, in their order, or why they are not at hand."""
    if dataset not in evaluation.tasks():
        return "its task is not there any more"
    path = evaluation.test_path(dataset)
    try:
        manifest = sources.manifest(path)
    except WrongInput as error:
        return str(error)
    if manifest["sha256"] != sha256:
        return f"{shown(path)} is not the data that was scored"
    return list(map(write_prompt, json_lines(path)))


def clip(text: str) -> str:
    left_out = len(text) - TEXT
    if left_out <= 0:
        return text
    return f"{text[: TEXT // 2]}\n… {left_out:,} characters left out …\n{text[-TEXT // 2 :]}"


def wrong(scored: Scored) -> list[dict[str, Any]]:
    """For each dataset, the rows whose first metric is not full, the worst first: WRONG of them."""
    found = []
    for dataset, content in scored.contents.items():
        metric = next(iter(content["metrics"]))
        shares = [(report.share(row["values"][metric]), row) for row in content["predictions"]]
        missed = sorted(
            ((share, row) for share, row in shares if share < 1),
            key=lambda each: (each[0], each[1]["row"]),
        )
        known = prompts(dataset, content["evaluated"]["data_sha256"])
        rows = []
        for share, row in missed[:WRONG]:
            here = not isinstance(known, str) and row["row"] < len(known)
            rows.append(
                {
                    "number": row["row"],
                    "share": share,
                    "prompt": clip(known[row["row"]]) if here else f"(not at hand: {known})",
                    "expected": clip(row["expected"]),
                    "answered": clip(row["answered"]),
                    "answer": clip(row["answer"]),
                }
            )
        if rows:
            told = {"dataset": dataset, "name": scored.name, "metric": report.title(metric)}
            found.append(told | {"total": len(missed), "rows": rows})
    return found


# ---- figures


def planned(scored: Scored, planner: Planner) -> dict[str, Any]:
    """The plan of the training that made an adapter; {} where it cannot be planned."""
    path = scored.folder / "config.yaml"
    try:
        config = recipes.find(scored.recipe).config if scored.recipe else read_yaml(path)
        data = (scored.told.get("data") or [{}])[0]
        file = sources.CHAT / Path(config["datasets"][0]["path"]).name
        return planner(config, data.get("rows"), file)
    except (WrongInput, OSError, KeyError):
        return {}


def limited(scored: Scored) -> bool:
    """Whether only some rows of the datasets were scored."""
    return any(content["evaluated"]["limit"] for content in scored.contents.values())


def mean_scores(adapters: list[Scored]) -> tuple[list[str], list[dict[str, float]]]:
    """The datasets that all adapters were scored on, and the mean of each over their first metrics.

    The half-widths of intervals of different datasets add in quadrature; where one has none, the
    mean has none.
    """
    common = [
        dataset
        for dataset, content in (adapters[0].contents if adapters else {}).items()
        if all(
            dataset in one.contents and report.paired(one.contents[dataset], content)
            for one in adapters
        )
    ]
    means = []
    for one in adapters if common else []:
        first = [next(iter(one.contents[dataset]["metrics"].values())) for dataset in common]
        low, high = (
            math.sqrt(sum((each["value"] - each.get(end, each["value"])) ** 2 for each in first))
            / len(first)
            for end in ("low", "high")
        )
        mean = sum(each["value"] for each in first) / len(first)
        if any(each.get("no_interval") for each in first):
            low = high = 0.0
        means.append({"value": mean, "low": mean - low, "high": mean + high})
    return common, means


def draw_figures(
    adapters: list[Scored], gains: list[figures.Gain], planner: Planner
) -> dict[str, dict[str, Any]]:
    """The figures that say something: {name: {"figure", "caption"}}."""
    names = [one.name for one in adapters]
    drawn = {"gain": figures.draw_gains(names, gains)}
    full = [place for place, one in enumerate(adapters) if not limited(one)]
    full = full or list(range(len(adapters)))
    common, scores = mean_scores([adapters[place] for place in full])
    means = dict(zip(full, scores, strict=False))
    plans = {place: planned(adapters[place], planner) for place in means}
    label = f"%, {common[0] if len(common) == 1 else f'mean of {len(common)} datasets'}"
    priced = any(plan.get("usd") is not None for plan in plans.values())
    memory = {n: plan["memory"]["peak"] / 2**30 for n, plan in plans.items() if plan}
    key, title = ("usd", "cost, USD") if priced else ("hours", "GPU hours")
    cost = {n: plan[key] for n, plan in plans.items() if plan and plan[key] is not None}
    gpu = next((plan["gpu"]["name"] for plan in plans.values() if plan), "")
    for name, values, axis in (
        ("memory", memory, figures.Axis("planned peak memory, GiB", "peak memory")),
        ("cost", cost, figures.Axis(f"planned {title}", title.partition(",")[0], gpu)),
    ):
        drawn[name] = figures.draw_scores(names, means, values, axis, label)
    folders = {one.folder: place for place, one in reversed(list(enumerate(adapters)))}
    curves = {}
    for folder, place in sorted(folders.items(), key=lambda item: item[1]):
        lines = json_lines(folder / "progress.jsonl")
        if any("loss" in line for line in lines):
            curves[place] = (f"{adapters[place].model}/{adapters[place].method}", lines)
    drawn["loss"] = figures.draw_losses(curves)
    return {name: figure for name, figure in drawn.items() if figure}


def svg(figure: Any, name: str) -> str:
    """A figure as SVG to stand in a page, with its colours."""
    import io

    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids that no other figure of the page has
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(figures.INK, "currentColor")


# ---- the page


def visible(value: Any) -> Any:
    """A text with what cannot be seen spelled out: controls, separators, changes of direction."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in value)


def page(content: dict[str, Any]) -> str:
    """The page as one HTML text. Its script is allowed by its digest, and no other one is."""
    from jinja2 import Environment
    from markupsafe import Markup

    text = TEMPLATE.read_text()
    script = text.partition("<script>")[2].partition("</script>")[0]
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True, finalize=visible).from_string(text)
    drawn = {
        name: each | {"svg": Markup(svg(each["figure"], name))}  # noqa: S704 (matplotlib escapes)
        for name, each in content["figures"].items()
    }
    return template.render(content | {"figures": drawn, "script_sha": sha, "each": WRONG})


def build(out: Path, planner: Planner) -> list[Path]:
    """Writes the page and its PNGs into a folder; WrongInput where nothing is scored."""
    scored = everything()
    if not scored:
        raise WrongInput(
            f"nothing is scored in {shown(runs_module.RUNS)}; `make eval RECIPE=…` does"
        )
    adapters = [one for one in scored if one.adapter]
    gains = [report.differences(base_of(one, scored), one.contents) for one in adapters]
    of = {id(one): gain for one, gain in zip(adapters, gains, strict=True)}
    drawn = draw_figures(adapters, gains, planner)
    matrices = [
        {"dataset": dataset, "name": one.name, "matrix": found}
        for one in scored
        for dataset, content in one.contents.items()
        if (found := confusion(content))
    ]
    files = []
    for name in ("gain", "memory", "cost", "loss"):
        file = out / f"{name}.png"
        if name not in drawn:
            file.unlink(missing_ok=True)
            continue
        with atomic(file) as target:
            drawn[name]["figure"].savefig(target, format="png", dpi=200, facecolor="white")
        files.append(file)
    # The models of a dataset and metric stand under each other.
    rows = [row for one in scored for row in table(one, of.get(id(one), {}))]
    keys = [(row["dataset"], row["metric"]) for row in rows]
    datasets = list(dict.fromkeys(dataset for dataset, _ in keys))
    keys = sorted(dict.fromkeys(keys), key=lambda key: datasets.index(key[0]))
    places = {key: place for place, key in enumerate(keys)}
    text = page(
        {
            "table": sorted(rows, key=lambda row: places[row["dataset"], row["metric"]]),
            "said": [(one.name, verdicts(one, of.get(id(one), {}))) for one in scored],
            "between": between(adapters),
            "figures": drawn,
            "matrices": sorted(matrices, key=lambda each: str(each["dataset"])),
            "wrong": [each for one in scored for each in wrong(one)],
            "small": stats.SMALL,
        }
    )
    with atomic(out / "index.html") as target:
        target.write(text.encode())
    return [out / "index.html", *files]


def write(planner: Planner) -> None:
    """Writes runs/report/ and says where."""
    out = runs_module.RUNS / "report"
    with evaluation.writing(out / "index.html", "; the scores are not touched"):
        files = build(out, planner)
    print(f"report     {', '.join(map(shown, files))}")
