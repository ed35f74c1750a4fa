"""Trains variants of a recipe with several seeds, scores them, and says which of them differ.

    python -m bench.parity                       bench/parity.yaml: everything, or what is missing
    python -m bench.parity --only precision
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
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.equivalence import P_VALUES, compare_variants, correct_family
from bench.jobs import (
    choose_names,
    list_row_values,
    require_rows,
    state_p,
    train_and_score,
    vary,
)
from bench.performance import build_table
from bench.texts import format_difference, format_points, format_seeds
from evals import report, stats
from tools import models, recipes
from tools.common import (
    ROOT,
    atomic,
    command,
    insert_block,
    quiet,
    read_json,
    read_yaml,
    shown,
    update_page,
    write_json,
)
from tools.recipes import Recipe
from tools.train.hardware import detect_host

SPEC = ROOT / "bench" / "parity.yaml"
RESULTS = ROOT / "results" / "parity.json"
DOC = ROOT / "docs" / "experiments.md"
FIGURE = ROOT / "docs" / "parity.png"
RUNS = ROOT / "runs" / ".parity"  # hidden from `make report`, `eval` and `status`
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"

Array = np.ndarray[Any, Any]


def make_recipe(spec: dict[str, Any], task: str, changes: dict[str, Any], seed: int) -> Recipe:
    """A variant of a task's recipe, trained in a folder that its settings name: parts share it."""
    changes = spec["settings"] | changes
    precision = changes.pop("precision")
    changes |= dict.fromkeys(("load_in_8bit", "load_in_4bit", "bnb_config_kwargs"))
    changes |= models.PRECISIONS.get(precision, {})
    changes["adapter"] = "qlora" if precision == "nf4" else "lora"
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()
    recipe = recipes.find(f"{spec['model']}/{task}_{spec['method']}")
    folder = shown(RUNS / f"{task}_{digest[:8]}_seed{seed}")
    return vary(recipe, folder, changes | {"seed": seed})


def list_recipes(spec: dict[str, Any], part: str, task: str) -> dict[str, list[Recipe]]:
    """The trainings of a part on a task, one for each seed, by variant."""
    plan = spec["parts"][part]
    seeds, settings = plan.get("seeds", spec["seeds"]), plan.get("settings", {})
    return {
        name: [make_recipe(spec, task, settings | variant, seed) for seed in seeds]
        for name, variant in plan["variants"].items()
    }


# ---- statistics


def collect_results(spec: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """{"parts": {part: {task: …}}}: every training and every comparison, small enough to commit."""
    parts = {}
    for part in names:
        tasks = spec["parts"][part]["tasks"]
        parts[part] = {task: measure_part(spec, part, task) for task in tasks}
        comparisons = [
            variant["against"]
            for entry in parts[part].values()
            for variant in entry["variants"].values()
            if "against" in variant
        ]
        correct_family(comparisons)
        for comparison in comparisons:
            comparison |= {key: round(comparison[key], 6) for key in P_VALUES if key in comparison}
    return {"parts": parts}


def measure_part(spec: dict[str, Any], part: str, task: str) -> dict[str, Any]:
    """Trains and scores what is missing of a part on a task, and compares its variants."""
    plan, scored = spec["parts"][part], spec["tasks"][task]
    metric = scored["metric"]
    variants: dict[str, Any] = {}
    columns: dict[str, Array] = {}
    for name, seeded in list_recipes(spec, part, task).items():
        print(f"parity     {part}, {task}: {name}", flush=True)
        files = [
            train_and_score(recipe, scored["dataset"], scored.get("limit")) for recipe in seeded
        ]
        values = [list_row_values(sides["adapter"], metric) for sides in files]
        columns[name] = np.array(values, float).T
        infos = [recipe.run.info for recipe in seeded]
        variants[name] = {
            "scores": columns[name].mean(0).round(6).tolist(),
            "base": round(files[0]["base"]["metrics"][metric]["value"], 6),
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
        "data_sha256": files[0]["adapter"]["evaluated"]["data_sha256"],
        "variants": variants,
    }


# ---- page and figure


def format_sections(content: dict[str, Any]) -> str:
    """The results as Markdown: a heading for each part and task, its table and its comparisons."""
    sections = []
    for part, tasks in content["parts"].items():
        plan = content["spec"]["parts"][part]
        for task, entry in tasks.items():
            lines = [f"### {plan['title']}, {task}", "", *format_part(entry, plan["against"])]
            for name, variant in entry["variants"].items():
                if "against" in variant:
                    sentence = describe_difference(variant["against"], plan)
                    lines.append(f"- {name} against {plan['against']}: {sentence}.")
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def format_part(entry: dict[str, Any], reference: str) -> list[str]:
    """The table of one part and task: a line for each variant, compared with `reference`."""
    heads = ["variant", "base", f"{report.title(entry['metric'])}, % (each seed)"]
    heads += [f"against {reference}, points", "training loss", "adapter's parameters"]
    rows = [
        [
            name,
            format_points(variant["base"]),
            format_seeds(fmean(variant["scores"]), variant["scores"]),
            format_difference(variant["against"]) if "against" in variant else "–",
            f"{fmean(variant['loss']):.3f}",
            f"{variant['trainable_parameters']:,}",
        ]
        for name, variant in entry["variants"].items()
    ]
    return build_table(heads, rows)


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


def build_block(content: dict[str, Any]) -> str:
    """What stands between the markers of the page."""
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
    return f"{head}\n![Scores by variant](parity.png)\n\n{format_sections(content)}"


def write_page(content: dict[str, Any], check: bool = False) -> None:
    page = insert_block(DOC, BEGIN, build_block(content), END)
    update_page(DOC, page, "make parity", check)


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
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    options = parser.parse_args()
    if options.check:
        return write_page(read_json(RESULTS), check=True)
    spec = read_yaml(SPEC)
    names = choose_names(options.only, spec["parts"], "part")
    require_rows(task for name in names for task in spec["parts"][name]["tasks"])
    quiet()
    content = collect_results(spec, names) | {
        "spec": spec,
        "machine": detect_host().describe_machine(),
    }
    if not options.only:
        write_json(RESULTS, content)
        draw_scores(content, FIGURE)
        write_page(content)
    print(format_sections(content))


if __name__ == "__main__":
    main()
