"""Makes a page of all scores: runs/report/index.html, one file that asks nothing of a network.

    python -m tools report [--gpu "A100 80GB"] [--price 1.19]

It reads the score files of every run and base, their plans and losses, and scores nothing. Its
figures lie beside it as PNGs. Prompts and answers are hostile input: all text is escaped, and
characters that steer a page or a terminal are spelled out.
"""

import base64
import hashlib
import io
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from evals import figures, report, stats
from evals import run as evaluation
from evals.report import Content, Gains
from evals.tasks.own import write_prompt
from tools import recipes, sources
from tools import runs as runs_module
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    json_lines,
    read_yaml,
    shown,
    spell_out,
    write_text,
)
from tools.runs import Run

TEMPLATE = ROOT / "evals" / "page.html"
WRONG = 25  # wrong answers shown of each model and dataset
TEXT = 3000  # characters shown of each prompt and answer
LABELS = 12  # classes up to which a confusion matrix can be read
# The plan of a config trained on so many rows of its files; training lies above this module.
Planner = Callable[[dict[str, Any], int | None, list[Path]], dict[str, Any]]


@dataclass(frozen=True)
class Scored:
    """A base or an adapter that was scored, at one precision, prompt format and limit."""

    folder: Path
    model: str
    method: str
    setting: str
    is_adapter: bool
    contents: dict[str, Content]  # dataset → its score file

    @property
    def name(self) -> str:
        return f"{self.model}/{self.method}, {self.setting}"

    @property
    def run_info(self) -> dict[str, Any]:
        return Run(self.folder).info

    @property
    def recipe(self) -> str:
        return str(self.run_info.get("recipe") or "")

    @property
    def shots(self) -> int:
        """Worked examples in each prompt."""
        return int(next(iter(self.contents.values()))["evaluated"].get("shots") or 0)

    @property
    def is_constrained(self) -> bool:
        """Whether answers could only be labels."""
        return any(content["evaluated"].get("constrained_to") for content in self.contents.values())

    @property
    def is_limited(self) -> bool:
        return any(content["evaluated"]["limit"] for content in self.contents.values())


# ---- what was scored


def _read_current(file: Path) -> Content:
    """A score file; raises WrongInput if damaged, or of an adapter that was trained again."""
    content = report.read(file)
    now = Run(file.parent.parent).info.get("adapter_sha256")
    if now and content["evaluated"].get("adapter_sha256") not in (None, now):
        raise WrongInput("of an adapter that was trained again; `make eval` scores it")
    return content


def find_scored() -> list[Scored]:
    """All that was scored, bases before their adapters; files that cannot count are named."""
    contents: dict[tuple[Path, str], dict[str, Content]] = {}
    for file in sorted(runs_module.RUNS.glob("**/evals/*.json")):
        parts = file.relative_to(runs_module.RUNS).parts
        if any(part.startswith(".") or ".previous" in part for part in parts):
            continue
        try:
            content = _read_current(file)
        except WrongInput as error:
            print(f"report     {shown(file)} left out: {error}", file=sys.stderr)
            continue
        dataset = str(content["evaluated"]["dataset"])
        suffix = file.stem.removeprefix(dataset)
        contents.setdefault((file.parent.parent, suffix), {})[dataset] = content
    scored = [describe(folder, by_dataset) for (folder, _), by_dataset in contents.items()]
    return sorted(scored, key=lambda s: (s.model, s.is_adapter, s.method, s.setting))


def describe(folder: Path, contents: dict[str, Content]) -> Scored:
    """What the score files of a folder, of one setting, are of; datasets in the project's order."""
    evaluated = next(iter(contents.values()))["evaluated"]
    form, limit = evaluated.get("prompt_format", "chat"), evaluated["limit"]
    setting = [evaluated["precision"], form if form != "chat" else ""]
    reasoning = evaluated.get("reasoning_tokens")
    setting += [f"{reasoning} tokens of reasoning" if reasoning else ""]
    setting += [f"{limit} rows" if limit else ""]
    is_adapter = bool(evaluated.get("adapter_sha256"))
    method = folder.name if is_adapter or not folder.name.startswith("base_") else "base"
    if folder.parent == runs_module.RUNS / "endpoint":
        method = "endpoint"
    method = report.append_conditions(method, evaluated)
    order = list(sources.tables()["datasets"])
    places = {name: order.index(name) if name in order else len(order) for name in contents}
    return Scored(
        folder,
        str(evaluated.get("base_model") or folder.parent.name).rsplit("/", 1)[-1],
        method,
        ", ".join(filter(None, setting)),
        is_adapter,
        {name: contents[name] for name in sorted(contents, key=lambda name: (places[name], name))},
    )


def _select_comparable(contents: dict[str, Content], other: Scored) -> dict[str, Content]:
    """Another's scores that differ from these in nothing but the adapter and worked examples."""

    def conditions(content: Content) -> dict[str, Any]:
        varied = ("adapter_sha256", "adapter_files", "shots", "examples_sha256")
        return content["evaluated"] | dict.fromkeys(varied)

    return {
        dataset: other.contents[dataset]
        for dataset, content in contents.items()
        if dataset in other.contents and conditions(content) == conditions(other.contents[dataset])
    }


def _compare_with_base(adapter: Scored, scored: list[Scored]) -> Gains:
    base: dict[str, Content] = {}
    for other in scored:
        if not other.is_adapter and not other.shots:
            base |= _select_comparable(adapter.contents, other)
    return report.differences(base, adapter.contents)


def _compare_others(scored: list[Scored]) -> list[str]:
    """Sentences on adapters, and bases with worked examples, against each other.

    Those of a pair have the same base at the same precision.
    """
    lines = []
    others = [entry for entry in scored if entry.is_adapter or entry.shots]
    for first, second in combinations(others, 2):
        theirs = _select_comparable(first.contents, second)
        gains = report.differences({name: first.contents[name] for name in theirs}, theirs)
        verdicts = report.format_sentences(gains, theirs)
        lines += [f"{second.name} against {first.name}: {verdict}" for verdict in verdicts]
    return lines


# ---- tables


def _format_number(value: dict[str, Any] | None, signed: bool = False) -> dict[str, Any] | None:
    """A value with an interval for the page: text in %, and the number to sort by."""
    if not value:
        return None
    point, interval = report.format_percent(value, signed)
    return {"point": point, "range": interval or report.NO_INTERVAL, "sort": value["value"]}


def _find_published(scored: Scored) -> dict[str, dict[str, float]]:
    """FinLoRA's scores of the same method on Llama 3.1 8B, by dataset; {} where it has none."""
    if scored.is_constrained:
        return {}
    method = "base" if scored.method == "base" else ""
    if scored.is_adapter:
        try:
            name = recipes.split_name(recipes.find(scored.recipe).name)[2]
            method = str(recipes.read_matrix()["methods"][name].get("finlora"))
        except WrongInput:
            method = (report.find_method(scored.folder.name) or ("", ""))[1]
    return report.read_published().get(method, {})


def _tabulate(scored: Scored, gains: Gains) -> list[dict[str, Any]]:
    """A row for each dataset and metric of what was scored."""
    rows, published = [], _find_published(scored)
    for dataset, content in scored.contents.items():
        selected = content["evaluated"].get("data_selected")
        notes = ["examples" if report.is_sample(content) else selected]
        notes.append(evaluation.explain_old(content))
        theirs = {} if report.explain_incomparable(dataset) else published.get(dataset, {})
        for place, (metric, value) in enumerate(content["metrics"].items()):
            gain = gains.get(dataset, {}).get(metric)
            rows.append(
                {
                    "dataset": dataset,
                    "note": "; ".join(filter(None, notes)),
                    "model": scored.model,
                    "method": scored.method,
                    "setting": scored.setting,
                    "metric": report.title(metric),
                    "main": place == 0,
                    "score": _format_number(value),
                    "gain": _format_number(gain, signed=True),
                    "better": gain and (gain["value"] > 0) != (metric in stats.LOWER_IS_BETTER),
                    "p": gain.get("corrected") if gain else None,
                    "published": theirs.get(metric),
                    "rows": len(report.values(content, metric)),
                }
            )
    return rows


def _order_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the models of a dataset and metric under each other."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    metrics = list(dict.fromkeys((row["dataset"], row["metric"]) for row in rows))
    metrics.sort(key=lambda key: datasets.index(key[0]))
    return sorted(rows, key=lambda row: metrics.index((row["dataset"], row["metric"])))


def explain(scored: Scored, gains: Gains) -> list[str]:
    """What the differences from the base and from FinLoRA's published scores mean, in sentences."""
    llama = recipes.read_matrix()["models"]["llama-3.1-8b"]["hub"]
    base = next(iter(scored.contents.values()))["evaluated"].get("base_model")
    if scored.is_adapter:
        method = report.find_tested_method(scored.recipe or scored.folder.name)
    else:
        method = "base" if base == llama and not scored.shots else ""
    lines = report.format_sentences(gains, scored.contents)
    lines += report.describe_majority(scored.contents)
    lines += report.explain_unpublished(scored.contents) if _find_published(scored) else []
    for dataset, content in scored.contents.items():
        if old := evaluation.explain_old(content):
            lines.append(f"{dataset}: {old}; it is compared with no new score.")
    return lines + report.list_remarks(scored.contents, method)


def count_confusion(content: Content) -> dict[str, Any] | None:
    """How often each label was answered for each expected one; None without one label a row.

    {"labels", "rows": [(expected, [(count, share of the row)…])]}; the last count of a row is of
    answers that are no label.
    """
    pairs = [row["values"].get("f1_weighted") or [] for row in content["predictions"]]
    labels = sorted({expected for row in pairs for expected, _ in row})
    if len(labels) > LABELS or not all(len(row) == 1 for row in pairs):
        return None
    counts = Counter((e, a if a in labels else None) for ((e, a),) in pairs)
    rows = []
    for label in labels:
        row = [counts[label, answered] for answered in [*labels, None]]
        rows.append((label, [(count, count / sum(row)) for count in row]))
    return {"labels": labels, "rows": rows}


@cache
def read_prompts(dataset: str, sha256: str) -> list[str] | str:
    """The prompts that a dataset was scored on, in their order, or why they cannot be shown."""
    if dataset not in evaluation.read_tasks():
        return "its task is not there any more"
    path = evaluation.find_rows(dataset)
    try:
        manifest = sources.manifest(path)
    except WrongInput as error:
        return str(error)
    if manifest["sha256"] != sha256:
        return f"{shown(path)} is not the data that was scored"
    return list(map(write_prompt, json_lines(path)))


def _clip(text: str) -> str:
    left_out = len(text) - TEXT
    if left_out <= 0:
        return text
    return f"{text[: TEXT // 2]}\n… {left_out:,} characters left out …\n{text[-TEXT // 2 :]}"


def _list_wrong(scored: Scored, dataset: str, content: Content) -> dict[str, Any] | None:
    """The rows whose first metric is not full, the worst first: WRONG of them."""
    metric = next(iter(content["metrics"]))
    shares = [(report.share(row["values"][metric]), row) for row in content["predictions"]]
    missed = sorted(
        ((share, row) for share, row in shares if share < 1),
        key=lambda pair: (pair[0], pair[1]["row"]),
    )
    prompts = read_prompts(dataset, content["evaluated"]["data_sha256"])
    rows = []
    for share, row in missed[:WRONG]:
        is_here = not isinstance(prompts, str) and row["row"] < len(prompts)
        prompt = prompts[row["row"]] if is_here else f"(not at hand: {prompts})"
        texts = {"prompt": prompt} | {k: row[k] for k in ("expected", "answered", "answer")}
        clipped = {key: _clip(text) for key, text in texts.items()}
        rows.append(clipped | {"number": row["row"], "share": share})
    part = {"dataset": dataset, "name": scored.name, "metric": report.title(metric)}
    return part | {"total": len(missed), "rows": rows} if rows else None


# ---- figures


def plan_training(scored: Scored, planner: Planner) -> dict[str, Any]:
    """The plan of the training that made an adapter; {} where it cannot be planned."""
    try:
        if scored.recipe:
            config = recipes.find(scored.recipe).config
        else:
            config = read_yaml(scored.folder / "config.yaml")
        data = scored.run_info.get("data") or ()
        rows = sum(entry["rows"] for entry in data if entry.get("split", "train") == "train")
        files = sources.list_training_files(config)
        here = [path if path.is_file() else sources.CHAT / path.name for path in files]
        return planner(config, rows or None, here)
    except (WrongInput, OSError, KeyError):
        return {}


def _average_scores(adapters: list[Scored]) -> tuple[list[str], list[dict[str, float]]]:
    """The datasets that all adapters were scored on, and the mean of each over their first metrics.

    The half-widths of intervals of different datasets add in quadrature; where one has none, the
    mean has none.
    """
    common = [
        dataset
        for dataset, content in (adapters[0].contents if adapters else {}).items()
        if all(
            dataset in a.contents and report.paired(a.contents[dataset], content) for a in adapters
        )
    ]
    means = []
    for adapter in adapters if common else []:
        values = [next(iter(adapter.contents[name]["metrics"].values())) for name in common]
        mean = sum(value["value"] for value in values) / len(values)
        low, high = (
            math.sqrt(sum((value["value"] - value.get(end, math.nan)) ** 2 for value in values))
            / len(values)
            for end in ("low", "high")
        )
        if math.isnan(low):
            low = high = 0.0
        means.append({"value": mean, "low": mean - low, "high": mean + high})
    return common, means


def _draw_figures(
    adapters: list[Scored], gains: list[Gains], planner: Planner
) -> dict[str, figures.Drawing]:
    """The figures that say something, by name."""
    names = [adapter.name for adapter in adapters]
    places = list(range(len(adapters)))
    free = [place for place in places if not adapters[place].is_constrained] or places
    full = [place for place in free if not adapters[place].is_limited] or free
    common, scores = _average_scores([adapters[place] for place in full])
    means = dict(zip(full, scores, strict=False))
    plans = {place: plan_training(adapters[place], planner) for place in means}
    plans = {place: plan for place, plan in plans.items() if plan}
    label = f"%, {common[0] if len(common) == 1 else f'mean of {len(common)} datasets'}"
    is_priced = any(plan.get("usd") is not None for plan in plans.values())
    key, title, unit = ("usd", "cost", "cost, USD") if is_priced else ("hours", *["GPU hours"] * 2)
    memory = {place: plan["memory"]["peak"] / 2**30 for place, plan in plans.items()}
    cost = {place: plan[key] for place, plan in plans.items() if plan[key] is not None}
    gpu = next((plan["gpu"]["name"] for plan in plans.values()), "")
    curves: dict[int, tuple[str, list[dict[str, Any]]]] = {}
    first_places = {adapter.folder: place for place, adapter in reversed([*enumerate(adapters)])}
    for folder, place in sorted(first_places.items(), key=lambda item: item[1]):
        lines = json_lines(folder / "progress.jsonl")
        if any("loss" in line for line in lines):
            curves[place] = (f"{adapters[place].model}/{adapters[place].method}", lines)
    memory_axis = figures.Axis("planned peak memory, GiB", "peak memory")
    cost_axis = figures.Axis(f"planned {unit}", title, gpu)
    drawings = {
        "gain": figures.draw_gains(names, gains),
        "memory": figures.draw_scores(names, means, memory, memory_axis, label),
        "cost": figures.draw_scores(names, means, cost, cost_axis, label),
        "loss": figures.draw_losses(curves),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing}


def _render_svg(figure: Any, name: str) -> str:
    """A figure as SVG that takes the page's colours."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids that no other figure of the page has
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(figures.INK, "currentColor")


# ---- the page


def _finalize(value: Any) -> Any:
    """What a template writes: text with controls, separators, changes of direction spelled out."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return spell_out(value) if is_text else value


def render_page(content: dict[str, Any]) -> str:
    """The page as one HTML text. Its own script is allowed by its digest, and no other."""
    from jinja2 import Environment
    from markupsafe import Markup

    text = TEMPLATE.read_text()
    script = text.partition("<script>")[2].partition("</script>")[0]
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True, finalize=_finalize).from_string(text)
    drawings = {
        name: drawing | {"svg": Markup(_render_svg(drawing["figure"], name))}  # noqa: S704 (escaped)
        for name, drawing in content["figures"].items()
    }
    return template.render(content | {"figures": drawings, "script_sha": sha, "wrong_limit": WRONG})


def build(out: Path, planner: Planner) -> list[Path]:
    """Writes the page and its PNGs into a folder; raises WrongInput where nothing is scored."""
    scored = find_scored()
    if not scored:
        raise WrongInput(
            f"nothing is scored in {shown(runs_module.RUNS)}; `make eval RECIPE=…` does"
        )
    gains = [_compare_with_base(entry, scored) if entry.is_adapter else {} for entry in scored]
    pairs = list(zip(scored, gains, strict=True))
    adapters = [entry for entry in scored if entry.is_adapter]
    drawings = _draw_figures(adapters, [gain for entry, gain in pairs if entry.is_adapter], planner)
    files = []
    for name in ("gain", "memory", "cost", "loss"):
        file = out / f"{name}.png"
        if name not in drawings:
            file.unlink(missing_ok=True)
            continue
        with atomic(file) as target:
            drawings[name]["figure"].savefig(target, format="png", dpi=200, facecolor="white")
        files.append(file)
    contents = [(entry, *item) for entry in scored for item in entry.contents.items()]
    matrices = [
        {"dataset": dataset, "name": entry.name, "matrix": matrix}
        for entry, dataset, content in contents
        if (matrix := count_confusion(content))
    ]
    text = render_page(
        {
            "table": _order_rows([row for entry, gain in pairs for row in _tabulate(entry, gain)]),
            "explanations": [(entry.name, explain(entry, gain)) for entry, gain in pairs],
            "between": _compare_others(scored),
            "figures": drawings,
            "matrices": sorted(matrices, key=lambda matrix: str(matrix["dataset"])),
            "wrong": [part for entry in contents if (part := _list_wrong(*entry))],
            "small": stats.SMALL,
        }
    )
    write_text(out / "index.html", text)
    return [out / "index.html", *files]


def write(planner: Planner) -> None:
    """Writes runs/report/ and prints where."""
    out = runs_module.RUNS / "report"
    with evaluation.naming_refusal(out / "index.html", "; the scores are not touched"):
        files = build(out, planner)
    print(f"report     {', '.join(map(shown, files))}")
