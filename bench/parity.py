"""Trains variants of a recipe with several seeds, scores them, and says which of them differ.

    python -m bench.parity                       bench/parity.yaml: everything, or what is missing
    python -m bench.parity --workers 2 --only precision
    python -m bench.parity --finished            trains nothing, publishes what parts are finished
    python -m bench.parity --check               fails where docs/experiments.md is out of date

What is trained and scored stays in runs/.parity/ and is not done again, so the command can be
interrupted and repeated. Results go to results/parity.json, and from there as tables into
docs/experiments.md with a figure beside it.

A difference is that of a metric's mean over rows and seeds, on the same rows, with the same seeds.
Both are resampled, independently of each other, so that its interval covers another choice of rows
and of seeds (Owen 2007, "The pigeonhole bootstrap"). In simulated experiments it covers the truth
in 95 % of them with three seeds whose differences lie 2 points apart (standard deviation), in 87 %
at 5 points, and in 83 % there with two seeds: where seeds lie far apart, it is too narrow.

Two variants are equivalent within a margin where the 90 % interval lies inside of it: two one-sided
tests at 5 % (Schuirmann 1987), their p corrected over the comparisons of a part (Holm). No
difference found would not say that.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import yaml

from evals import report, stats
from tools import models, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput, atomic, command, shown, write_json

SPEC = ROOT / "bench" / "parity.yaml"
RESULTS = ROOT / "results" / "parity.json"
DOC = ROOT / "docs" / "experiments.md"
FIGURE = ROOT / "docs" / "parity.png"
RUNS = ROOT / "runs" / ".parity"  # hidden from `make report`, `eval` and `status`
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"
RESAMPLES = 10_000
SEED = 20231107

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Job:
    """One training: a variant of a task's recipe with a seed. Parts that want the same share it."""

    task: str
    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        told = {key: value for key, value in self.config.items() if key != "seed"}
        short = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}_{short}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / "runs" / self.name

    @property
    def recipe(self) -> Path:
        return RUNS / f"{self.name}.yaml"


def job(spec: dict[str, Any], task: str, changes: dict[str, Any], seed: int) -> Job:
    config = recipes.build_config(f"{spec['model']}/{task}_{spec['method']}")
    config = config | spec["settings"] | changes | {"seed": seed}
    precision = config.pop("precision")
    config = {k: v for k, v in config.items() if not k.startswith(("load_in_", "bnb_"))}
    config |= models.PRECISIONS[precision] if precision != "full" else {}
    config["adapter"] = "qlora" if precision == "nf4" else "lora"
    del config["output_dir"], config["dataset_prepared_path"]
    return Job(task, seed, {key: value for key, value in config.items() if value is not None})


def jobs(spec: dict[str, Any], only: list[str]) -> dict[tuple[str, str, str, int], Job]:
    """(part, task, variant, seed) → job, the seeds of a part one after the other."""
    return {
        (part, task, name, seed): job(spec, task, content.get("settings", {}) | variant, seed)
        for part, content in spec["parts"].items()
        if not only or part in only
        for seed in content.get("seeds", spec["seeds"])
        for task in content["tasks"]
        for name, variant in content["variants"].items()
    }


# ---- training and scoring


def scores(spec: dict[str, Any], one: Job, side: str = "adapter") -> Path:
    told = spec["tasks"][one.task]
    limit = f"_sample{told['limit']}" if "limit" in told else ""
    place = one.folder if side == "adapter" else base_folder(one)
    return place / "evals" / f"{told['dataset']}{limit}.json"


def base_folder(one: Job) -> Path:
    return one.folder.parent / f"base_{models.precision(one.config)}"


def do(spec: dict[str, Any], one: Job, lock: Lock) -> None:
    """Trains and scores a job, or what of it is missing; raises JobFailed with the reason."""
    paths = {"output_dir": one.folder, "dataset_prepared_path": one.folder / "prepared"}
    config = one.config | {key: shown(path) for key, path in paths.items()}
    one.recipe.parent.mkdir(parents=True, exist_ok=True)
    with atomic(one.recipe) as file:
        file.write(yaml.safe_dump(config, sort_keys=False).encode())
    told = spec["tasks"][one.task]
    limit = ["--limit", str(told["limit"])] if "limit" in told else []
    called("train", one.recipe)
    arguments = ["eval", one.recipe, "--tasks", told["dataset"], *limit]
    if scores(spec, one, "base").is_file():
        called(*arguments)
    else:
        with lock:  # the base is scored once
            called(*arguments)


def called(*arguments: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise JobFailed(done.stderr.strip().removeprefix("error: ") or f"{arguments[0]} failed")


def run(spec: dict[str, Any], wanted: dict[Any, Job], workers: int) -> None:
    """Does all jobs, `workers` at a time; goes on after a failure, and raises JobFailed then."""
    missing = []
    for task in dict.fromkeys(one.task for one in wanted.values()):
        path = sources.train_path(task)
        if not path.is_file() or sources.manifest(path).get("from") == "data/sample":
            missing.append(task)
    if missing:
        tasks = ",".join(missing)
        raise WrongInput(f"FinLoRA's rows of {tasks} are needed: `make fetch data TASKS={tasks}`")
    unique = list({one.name: one for one in wanted.values()}.values())
    left = [one for one in unique if not scores(spec, one).is_file()]
    print(f"parity     {len(unique)} trainings, {len(left)} to do, {workers} at a time", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    locks: dict[Any, Lock] = defaultdict(Lock)
    failed, done = [], 0

    def work(one: Job) -> None:
        nonlocal done
        try:
            do(spec, one, locks[one.task, models.precision(one.config)])
        except JobFailed as error:
            failed.append(f"{one.name}: {error}")
            print(f"parity     {failed[-1]}", file=sys.stderr, flush=True)
            return
        done += 1
        print(f"parity     {done}/{len(left)} {one.name} {summary(spec, one)}", flush=True)

    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(work, left))
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise JobFailed(f"{len(failed)} of {len(left)} failed; the same command tries them again")


def summary(spec: dict[str, Any], one: Job) -> str:
    metric = spec["tasks"][one.task]["metric"]
    value = json.loads(scores(spec, one).read_text())["metrics"][metric]["value"]
    return f"{report.title(metric)} {100 * value:.1f}"


# ---- statistics


def resampled(differences: Array) -> Array:
    """Means of (rows, seeds) differences with rows and seeds drawn anew: (RESAMPLES,)."""
    generator = np.random.default_rng(SEED)
    rows, seeds = differences.shape
    by_row = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) / rows
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    return np.asarray(((by_row @ differences) * by_seed).sum(1))


def compared(values: Array, others: Array, margin: float | None) -> dict[str, Any]:
    """Mean of `values` minus that of `others`, (rows, seeds) each, and whether they are equivalent.

    {"value", "low", "high" (95 %), "p": that there is no difference, "seeds": of each}; with a
    margin also "low90", "high90" and "p_margin": that the difference reaches the margin.
    """
    differences = values - others
    sampled = resampled(differences)
    low, high, low90, high90 = np.percentile(sampled, [2.5, 97.5, 5, 95])
    far = min((sampled <= 1e-12).sum(), (sampled >= -1e-12).sum())
    found = {
        "value": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (far + 1) / (RESAMPLES + 1))),
        "seeds": [float(one) for one in differences.mean(0)],
    }
    if margin is not None:
        beyond = max((sampled <= -margin).sum(), (sampled >= margin).sum())
        found |= {"low90": float(low90), "high90": float(high90)}
        found["p_margin"] = float((beyond + 1) / (RESAMPLES + 1))
    return found


def results(spec: dict[str, Any], wanted: dict[tuple[str, str, str, int], Job]) -> dict[str, Any]:
    """What was measured, small enough to be kept: every training, every comparison."""
    content: dict[str, Any] = {"parts": {}}
    for part in dict.fromkeys(key[0] for key in wanted):
        told = spec["parts"][part]
        for task in told["tasks"]:
            entry = of_part(spec, part, task, wanted)
            content["parts"].setdefault(part, {})[task] = entry
        for name in ("p", "p_margin"):
            family = [
                against
                for entry in content["parts"][part].values()
                for variant in entry["variants"].values()
                if name in (against := variant.get("against", {}))
            ]
            corrected = stats.holm([one[name] for one in family])
            for one, p in zip(family, corrected, strict=True):
                one[name] = round(p, 6)
    return content


def of_part(spec: dict[str, Any], part: str, task: str, wanted: dict[Any, Job]) -> dict[str, Any]:
    told, metric = spec["parts"][part], spec["tasks"][task]["metric"]
    variants: dict[str, Any] = {}
    columns: dict[str, Array] = {}
    for name in told["variants"]:
        seeds = told.get("seeds", spec["seeds"])
        each = [wanted[part, task, name, seed] for seed in seeds]
        files = [json.loads(scores(spec, one).read_text()) for one in each]
        columns[name] = np.array(
            [[row["values"][metric] for row in file["predictions"]] for file in files], float
        ).T
        ran = [json.loads((one.folder / "run.json").read_text()) for one in each]
        base = json.loads(scores(spec, each[0], "base").read_text())
        variants[name] = {
            "scores": [round(float(one), 4) for one in columns[name].mean(0)],
            "base": round(base["metrics"][metric]["value"], 4),
            "loss": [round(one["train_loss"], 4) for one in ran],
            "seconds": [round(one["seconds"]) for one in ran],
            "trainable_parameters": ran[0]["trainable_parameters"],
        }
    for name, variant in variants.items():
        if name != told["against"]:
            found = compared(columns[name], columns[told["against"]], told.get("margin"))
            variant["against"] = {
                key: [round(one, 4) for one in value]
                if isinstance(value, list)
                else round(value, 6)
                for key, value in found.items()
            }
    rows = len(columns[told["against"]])
    data = files[0]["evaluated"]
    return {
        "metric": metric,
        "rows": rows,
        "data_sha256": data["data_sha256"],
        "variants": variants,
    }


# ---- what people see


def points(value: float, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f}"


def format_sections(content: dict[str, Any]) -> str:
    """The results as Markdown: a heading for each part and task, its table and its comparisons."""
    sections = []
    for part, tasks in content["parts"].items():
        plan = content["spec"]["parts"][part]
        for task, entry in tasks.items():
            lines = [f"### {plan['title']}, {task}", "", *format_table(entry, plan["against"]), ""]
            for name, variant in entry["variants"].items():
                if "against" in variant:
                    sentence = verdict(variant["against"], plan)
                    lines.append(f"- {name} against {plan['against']}: {sentence}.")
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def format_table(entry: dict[str, Any], reference: str) -> list[str]:
    """The rows of one part and task: a line for each variant, compared with `reference`."""
    lines = [
        f"| variant | base | {report.title(entry['metric'])}, % (each seed) "
        f"| against {reference}, points | training loss | adapter's parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, variant in entry["variants"].items():
        seeds = ", ".join(points(score) for score in variant["scores"])
        mean = points(sum(variant["scores"]) / len(variant["scores"]))
        gain = "–"
        if difference := variant.get("against"):
            low, high = points(difference["low"], True), points(difference["high"], True)
            gain = f"{points(difference['value'], True)} ({low} … {high})"
        loss = sum(variant["loss"]) / len(variant["loss"])
        lines.append(
            f"| {name} | {points(variant['base'])} | {mean} ({seeds}) | {gain} | {loss:.3f} "
            f"| {variant['trainable_parameters']:,} |"
        )
    return lines


def verdict(found: dict[str, Any], told: dict[str, Any]) -> str:
    text = f"{points(found['value'], True)} points"
    if "p_margin" in found:
        margin = f"±{points(told['margin'])} points"
        inside = f"{points(found['low90'], True)} … {points(found['high90'], True)}"
        equivalent = found["p_margin"] < stats.LEVEL
        word = "equivalent" if equivalent else "equivalence not shown"
        text += f", {word} within {margin} (90 %: {inside}; p = {found['p_margin']:.2g})"
    if found["p"] < stats.LEVEL:
        return text + f"; a difference, p = {found['p']:.2g}"
    return text + ("" if "p_margin" in found else f"; no difference shown, p = {found['p']:.2g}")


def block(content: dict[str, Any]) -> str:
    settings = content["spec"]["settings"]
    entries = [entry for tasks in content["parts"].values() for entry in tasks.items()]
    rows = ", ".join(f"{entry['rows']} rows of {task}" for task, entry in dict(entries).items())
    head = (
        f"SmolLM2-135M, {settings['max_steps']} steps of {settings['micro_batch_size']} rows, "
        f"{content['machine']}; scored on {rows}. `make parity` trains the variants of "
        "[bench/parity.yaml](../bench/parity.yaml) and writes "
        "[results/parity.json](../results/parity.json). Intervals are 95 % intervals over rows and "
        "seeds; p is corrected over the comparisons of a part.\n"
    )
    return f"{head}\n![Scores by variant](parity.png)\n\n{format_sections(content)}"


def written(text: str, content: dict[str, Any]) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + block(content) + END + after


def draw(content: dict[str, Any], file: Path) -> None:
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
    first: dict[str, Any] = {}  # panels of one metric have one scale
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, (part, task, entry) in zip(grid.flat, panels, strict=False):
        axis.sharey(first.setdefault(entry["metric"], axis))
        for place, variant in enumerate(entry["variants"].values()):
            scores_ = [100 * one for one in variant["scores"]]
            axis.scatter([place] * len(scores_), scores_, s=18, color="#1f6f8b", alpha=0.7)
            mean = sum(scores_) / len(scores_)
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


def machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 1e9
    return f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB, no GPU"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA against LoRA, by training both")
    parser.add_argument("--only", default="", help="parts of bench/parity.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--finished", action="store_true", help="train nothing; publish what is")
    parser.add_argument("--check", action="store_true", help="fail where the page is old")
    given = parser.parse_args()
    text = DOC.read_text(encoding="utf-8")
    if given.check:
        if RESULTS.is_file() and written(text, json.loads(RESULTS.read_text())) != text:
            raise JobFailed(f"{shown(DOC)} is not {shown(RESULTS)}; `make parity` writes it")
        return
    spec = yaml.safe_load(SPEC.read_text())
    only = given.only.replace(",", " ").split()
    if unknown := [part for part in only if part not in spec["parts"]]:
        raise WrongInput(f"unknown part {unknown[0]}; there are {', '.join(spec['parts'])}")
    wanted = jobs(spec, only)
    if given.finished:
        missing = {key[0] for key, one in wanted.items() if not scores(spec, one).is_file()}
        wanted = {key: one for key, one in wanted.items() if key[0] not in missing}
        if not wanted:
            raise WrongInput("no part is finished; `make parity` trains them")
    else:
        run(spec, wanted, max(1, given.workers))
    content = results(spec, wanted) | {"spec": spec, "machine": machine()}
    if not only:
        write_json(RESULTS, content)
        draw(content, FIGURE)
        with atomic(DOC) as file:
            file.write(written(text, content).encode())
    print(format_sections(content))


if __name__ == "__main__":
    main()
