"""Trains variants of a recipe with several seeds, scores them, and says which of them differ.

    python -m bench.parity                       bench/parity.yaml: everything, or what is missing
    python -m bench.parity --workers 2 --only precision
    python -m bench.parity --check               fails where docs/experiments.md is out of date

Finished trainings and scores stay in runs/.parity/, so the command can be interrupted and repeated.
Results go to results/parity.json, and from there as tables into docs/experiments.md with a figure
beside it.

A difference is that of a metric's mean over rows and seeds, on the same rows, with the same seeds.
Rows and seeds are both samples (bench/equivalence.py): where two or three seeds lie far apart, the
interval is wide.

Two variants are equivalent within a margin if the 90 % interval lies inside it: two one-sided tests
at 5 % (Schuirmann 1987), with p corrected over the comparisons of a part (Holm). Finding no
difference would not show that.
"""

import argparse
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import numpy as np

from bench.equivalence import compare_means
from bench.jobs import find_scores, require_rows, run_all, run_verb, state_p
from bench.texts import format_points
from evals import report, run, stats
from tools import models, recipes, sources
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    command,
    format_yaml,
    read_json,
    read_yaml,
    shown,
    update_page,
    write_json,
    write_text,
)
from tools.runs import Run
from tools.train.hardware import detect_host

SPEC = ROOT / "bench" / "parity.yaml"
RESULTS = ROOT / "results" / "parity.json"
DOC = ROOT / "docs" / "experiments.md"
FIGURE = ROOT / "docs" / "parity.png"
RUNS = ROOT / "runs" / ".parity"  # hidden from `make report`, `eval` and `status`
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Training:
    """One training: a variant of a task's recipe with a seed. Parts that want the same share it."""

    task: str
    seed: int
    config: dict[str, Any]
    dataset: str  # that it is scored on
    metric: str
    limit: int | None  # of the dataset's rows

    @property
    def name(self) -> str:
        settings = {key: value for key, value in self.config.items() if key != "seed"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{self.task}_{digest[:8]}_seed{self.seed}"

    @property
    def run(self) -> Run:
        return Run(RUNS / "runs" / self.name)

    def find_scores(self, side: str = "adapter") -> Path:
        base = RUNS / "runs" / f"base_{models.precision(self.config)}"
        return find_scores(self.run.folder, base, side, self.dataset, self.limit)

    @property
    def is_scored(self) -> bool:
        """Whether its scores are of today's scoring, task and rows."""
        if not self.find_scores().is_file():
            return False
        content = self.read_scores()
        rows = sources.manifest(run.find_rows(self.dataset))["sha256"]
        return not run.explain_old(content) and content["evaluated"]["data_sha256"] == rows

    def read_scores(self, side: str = "adapter") -> dict[str, Any]:
        return read_json(self.find_scores(side))


def make_job(spec: dict[str, Any], task: str, changes: dict[str, Any], seed: int) -> Training:
    config = recipes.build_config(f"{spec['model']}/{task}_{spec['method']}")
    config = config | spec["settings"] | changes | {"seed": seed}
    precision = config.pop("precision")
    config = {k: v for k, v in config.items() if not k.startswith(("load_in_", "bnb_"))}
    config |= models.PRECISIONS[precision] if precision != "full" else {}
    config["adapter"] = "qlora" if precision == "nf4" else "lora"
    del config["output_dir"], config["dataset_prepared_path"]
    config = {key: value for key, value in config.items() if value is not None}
    return Training(task, seed, config, **{"limit": None} | spec["tasks"][task])


def list_jobs(spec: dict[str, Any], only: list[str]) -> dict[tuple[str, str, str, int], Training]:
    """(part, task, variant, seed) → job, the seeds of a part one after the other."""
    return {
        (part, task, name, seed): make_job(spec, task, content.get("settings", {}) | variant, seed)
        for part, content in spec["parts"].items()
        if not only or part in only
        for seed in content.get("seeds", spec["seeds"])
        for task in content["tasks"]
        for name, variant in content["variants"].items()
    }


# ---- training and scoring


def run_jobs(jobs: dict[Any, Training], workers: int) -> None:
    """Trains and scores the jobs that have no scores; raises JobFailed if some failed."""
    require_rows(job.task for job in jobs.values())
    unique = {job.name: job for job in jobs.values()}
    left = {name: job for name, job in unique.items() if not job.is_scored}
    print(f"parity     {len(unique)} trainings, {len(left)} to do, {workers} at a time", flush=True)
    locks: dict[Path, Lock] = defaultdict(Lock)

    def train_and_score(job: Training) -> str:
        paths = {"output_dir": job.run.folder, "dataset_prepared_path": job.run.folder / "prepared"}
        recipe = RUNS / f"{job.name}.yaml"
        config = job.config | {key: shown(path) for key, path in paths.items()}
        write_text(recipe, format_yaml(config))
        run_verb("train", recipe)
        limit = ["--limit", job.limit] if job.limit else []
        with locks[job.find_scores("base")]:  # the base is scored once
            run_verb("eval", recipe, "--tasks", job.dataset, *limit)
        score = job.read_scores()["metrics"][job.metric]["value"]
        return f"{report.title(job.metric)} {format_points(score)}"

    run_all("parity", left, train_and_score, workers)


# ---- statistics


def compare_variants(
    values: Array, others: Array, margin: float | None, clusters: stats.Clusters = None
) -> dict[str, Any]:
    """Mean of `values` minus that of `others`, (rows, seeds) each, and whether they are equivalent.

    {"value", "low", "high" (95 %), "p": that there is no difference, "seeds": of each}; with a
    margin also "low90", "high90" and "p_margin": that the difference reaches the margin.
    """
    comparison = compare_means(values - others, margin or 0.0, clusters)
    ends = ["low", "high"] if margin is None else ["low", "high", "low90", "high90"]
    names = ["value", *ends, "p", "seeds", *([] if margin is None else ["p_margin"])]
    limited = {end: min(max(comparison[end], -1.0), 1.0) for end in ends}  # of shares
    return {name: comparison[name] for name in names} | limited


def collect_results(spec: dict[str, Any], jobs: dict[Any, Training]) -> dict[str, Any]:
    """{"parts": {part: {task: …}}}: every training and every comparison, small enough to commit."""
    parts = {}
    for part in dict.fromkeys(key[0] for key in jobs):
        tasks = spec["parts"][part]["tasks"]
        parts[part] = {task: measure_part(spec, part, task, jobs) for task in tasks}
        comparisons = [
            variant["against"]
            for entry in parts[part].values()
            for variant in entry["variants"].values()
            if "against" in variant
        ]
        for name in ("p", "p_margin"):
            family = [comparison for comparison in comparisons if name in comparison]
            corrected = stats.holm([comparison[name] for comparison in family])
            for comparison, p in zip(family, corrected, strict=True):
                comparison[name] = round(p, 6)
    return {"parts": parts}


def measure_part(
    spec: dict[str, Any], part: str, task: str, jobs: dict[Any, Training]
) -> dict[str, Any]:
    """What the trainings of a part on a task took and scored, and how its variants compare."""
    plan, metric = spec["parts"][part], spec["tasks"][task]["metric"]
    variants: dict[str, Any] = {}
    columns: dict[str, Array] = {}
    for name in plan["variants"]:
        trainings = [jobs[part, task, name, seed] for seed in plan.get("seeds", spec["seeds"])]
        files = [job.read_scores() for job in trainings]
        columns[name] = np.array(
            [[row["values"][metric] for row in file["predictions"]] for file in files], float
        ).T
        infos = [job.run.info for job in trainings]
        base = trainings[0].read_scores("base")["metrics"][metric]["value"]
        variants[name] = {
            "scores": columns[name].mean(0).round(6).tolist(),
            "base": round(base, 6),
            "loss": [round(info["train_loss"], 4) for info in infos],
            "seconds": [round(info["seconds"]) for info in infos],
            "trainable_parameters": infos[0]["trainable_parameters"],
        }
    reference = columns[plan["against"]]
    for name, variant in variants.items():
        if name != plan["against"]:
            comparison = compare_variants(columns[name], reference, plan.get("margin"))
            variant["against"] = {
                key: [round(v, 4) for v in value] if isinstance(value, list) else round(value, 6)
                for key, value in comparison.items()
            }
    return {
        "metric": metric,
        "rows": len(reference),
        "data_sha256": files[0]["evaluated"]["data_sha256"],
        "variants": variants,
    }


# ---- page and figure


def format_sections(content: dict[str, Any]) -> str:
    """The results as Markdown: a heading for each part and task, its table and its comparisons."""
    sections = []
    for part, tasks in content["parts"].items():
        plan = content["spec"]["parts"][part]
        for task, entry in tasks.items():
            lines = [f"### {plan['title']}, {task}", "", *format_part(entry, plan["against"]), ""]
            for name, variant in entry["variants"].items():
                if "against" in variant:
                    sentence = describe_difference(variant["against"], plan)
                    lines.append(f"- {name} against {plan['against']}: {sentence}.")
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def format_part(entry: dict[str, Any], reference: str) -> list[str]:
    """The rows of one part and task: a line for each variant, compared with `reference`."""
    lines = [
        f"| variant | base | {report.title(entry['metric'])}, % (each seed) "
        f"| against {reference}, points | training loss | adapter's parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, variant in entry["variants"].items():
        seeds = ", ".join(map(format_points, variant["scores"]))
        mean = format_points(fmean(variant["scores"]))
        gain = "–"
        if difference := variant.get("against"):
            value, low, high = (
                format_points(difference[key], True) for key in ("value", "low", "high")
            )
            gain = f"{value} ({low} … {high})"
        lines.append(
            f"| {name} | {format_points(variant['base'])} | {mean} ({seeds}) | {gain} "
            f"| {fmean(variant['loss']):.3f} | {variant['trainable_parameters']:,} |"
        )
    return lines


def describe_difference(comparison: dict[str, Any], plan: dict[str, Any]) -> str:
    """A comparison in words; `plan` is its part of bench/parity.yaml."""
    text = f"{format_points(comparison['value'], True)} points"
    if has_margin := "p_margin" in comparison:
        low, high = (format_points(comparison[key], True) for key in ("low90", "high90"))
        p = comparison["p_margin"]
        word = "equivalent" if p < stats.LEVEL else "equivalence not shown"
        text += f", {word} within ±{format_points(plan['margin'])} points"
        text += f" (90 %: {low} … {high}; {state_p(p)})"
    if comparison["p"] < stats.LEVEL:
        return text + f"; a difference, {state_p(comparison['p'])}"
    return text + ("" if has_margin else f"; no difference shown, {state_p(comparison['p'])}")


def insert_results(text: str, content: dict[str, Any]) -> str:
    """The page with the results between its markers."""
    settings = content["spec"]["settings"]
    rows = {task: e["rows"] for tasks in content["parts"].values() for task, e in tasks.items()}
    scored = ", ".join(f"{count} rows of {task}" for task, count in rows.items())
    head = (
        f"SmolLM2-135M, {settings['max_steps']} steps of {settings['micro_batch_size']} rows, "
        f"{content['machine']}; scored on {scored}. `make parity` trains the variants of "
        "[bench/parity.yaml](../bench/parity.yaml) and writes "
        "[results/parity.json](../results/parity.json). Intervals are 95 % intervals over rows and "
        "seeds; p is corrected over the comparisons of a part.\n"
    )
    block = f"{head}\n![Scores by variant](parity.png)\n\n{format_sections(content)}"
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + block + END + rest.partition(END)[2]


def draw_scores(content: dict[str, Any], file: Path) -> None:
    """A panel for each part and task: every seed's score as a point, their mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(p, t, e) for p, tasks in content["parts"].items() for t, e in tasks.items()]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    first: dict[str, Any] = {}  # panels of one metric share a scale
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, (part, task, entry) in zip(grid.flat, panels, strict=False):
        axis.sharey(first.setdefault(entry["metric"], axis))
        for place, variant in enumerate(entry["variants"].values()):
            scores = [100 * score for score in variant["scores"]]
            axis.scatter([place] * len(scores), scores, s=18, color="#1f6f8b", alpha=0.7)
            mean = fmean(scores)
            axis.hlines(mean, place - 0.3, place + 0.3, color="#c0392b", linewidth=1.6)
        names = list(entry["variants"])
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_title(f"{part}: {task}", fontsize=9)
        axis.set_ylabel(f"{report.title(entry['metric'])}, %", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    with atomic(file) as out:
        figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA against LoRA, by training both")
    parser.add_argument("--only", default="", help="parts of bench/parity.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    options = parser.parse_args()
    text = DOC.read_text(encoding="utf-8")
    if options.check:
        if RESULTS.is_file():
            update_page(DOC, insert_results(text, read_json(RESULTS)), "make parity", check=True)
        return
    spec = read_yaml(SPEC)
    only = options.only.replace(",", " ").split()
    if unknown := [part for part in only if part not in spec["parts"]]:
        raise WrongInput(f"unknown part {unknown[0]}; there are {', '.join(spec['parts'])}")
    jobs = list_jobs(spec, only)
    run_jobs(jobs, max(1, options.workers))
    content = collect_results(spec, jobs) | {
        "spec": spec,
        "machine": detect_host().describe_machine(),
    }
    if not only:
        write_json(RESULTS, content)
        draw_scores(content, FIGURE)
        update_page(DOC, insert_results(text, content), "make parity")
    print(format_sections(content))


if __name__ == "__main__":
    main()
