"""docs/performance.md: what bench.train, bench.eval and bench.memory measured on each machine.

    python -m bench.train --record           adds to results/performance_<machine>.json
    python -m bench.performance              writes the page from those files
    python -m bench.performance --check      fails where the page is older than they are

A file holds one machine's figures by benchmark and subject; a new measurement replaces the old one.
"""

import argparse
import importlib.metadata
import time
from typing import Any

from tools.common import (
    ROOT,
    WrongInput,
    command,
    format_markdown,
    read_json,
    shown,
    slugify,
    update_page,
    write_json,
)
from tools.train.hardware import detect_host

RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "performance.md"
FINLORA = "FinLoRA's"
PACKAGES = ("torch", "transformers", "axolotl", "peft", "bitsandbytes")

HEAD = """\
# Performance

Each table comes from one machine, and each comparison from one run of a benchmark, which measures
both sides on the same rows. `make results` writes this page from
[results/](../results/). Yours is one command away:

    .venv/bin/python -m bench.train --record
    .venv/bin/python -m bench.eval --record
    .venv/bin/python -m bench.memory --record

*FinLoRA's settings*: its Axolotl config, with the optimizer and the precision that the machine
allows. *Real* tokens are those of the rows, without padding; *computed* ones go through the model.
*Not packed*: without [shared-prefix batches](shared-prefix.md). *Prefill*: prompts go through the
model once, whole or in the packs that our scoring makes of them, and nothing is answered.
"""


def record(bench: str, subject: str, figures: dict[str, Any]) -> None:
    """Adds one benchmark's figures to the file of this machine."""
    machine = detect_host().describe_machine()
    path = RESULTS / f"performance_{slugify(machine)}.json"
    content: dict[str, Any] = read_json(path) if path.is_file() else {"machine": machine}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    entry = {"date": time.strftime("%Y-%m-%d"), "packages": versions, **figures}
    content.setdefault(bench, {})[subject] = entry
    write_json(path, content)
    print(f"bench      {shown(path)}; `python -m bench.performance` writes the page")


def build_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table; the first column is text, the others are numbers."""
    return format_markdown(headings, rows).split("\n")


def build_training(subjects: dict[str, Any]) -> list[str]:
    headings = ["recipe", "rows/s", "real tokens/s", "tokens computed a row", "peak GB", "loss"]
    rows = []
    for subject, entry in subjects.items():
        sides = entry["measured"]
        slowest = sides["FinLoRA's settings"]["rows_per_second"]
        for name, side in sides.items():
            tokens = side["computed_tokens_per_row"], side["real_tokens_per_row"]
            rows.append(
                [
                    f"{subject}: {name}",
                    f"{side['rows_per_second']:.1f}",
                    f"{side['real_tokens_per_second']:,.0f}",
                    "{:.0f} for {:.0f}".format(*tokens),
                    f"{side['peak_memory_bytes'] / 1e9:.2f}",
                    f"{side['loss']:.4f}",
                    f"{side['rows_per_second'] / slowest:.2f}",
                ]
            )
    return ["### Training (`bench.train`)", "", *build_table([*headings, "times FinLoRA's"], rows)]


def build_scoring(subjects: dict[str, Any]) -> list[str]:
    rows = []
    for subject, entry in subjects.items():
        speeds = entry["rows_per_second"]
        packed = speeds.get("packed prefill")
        rows.append(
            [
                f"{subject}, {entry['precision']}, {entry['rows']} rows",
                *(f"{speeds[name]:.1f}" for name in ("ours", FINLORA, "lm-eval", "prefill")),
                f"{packed:.1f}" if packed else "",
                f"{speeds['ours'] / speeds[FINLORA]:.2f}",
                f"{speeds['ours'] / packed:.2f}" if packed else "",
            ]
        )
    headings = [
        "rows per second",
        "ours",
        "FinLoRA's way",
        "lm-eval",
        "prefill",
        "prefill of our packs",
    ]
    headings += ["times FinLoRA's", "times the packs' prefill"]
    return ["### Scoring (`bench.eval`)", "", *build_table(headings, rows)]


def build_memory(subjects: dict[str, Any]) -> list[str]:
    rows = []
    for subject, entry in subjects.items():
        for precision, sizes in entry["sizes"].items():
            real, planned = sizes["measured"], sizes["planned"]
            megabytes = [real["base"], planned["base"], real["peak"], planned["peak"]]
            rows.append(
                [
                    f"{subject}, {precision}",
                    *(f"{size / 1e6:,.1f}" for size in megabytes),
                    f"{planned['peak'] / real['peak'] - 1:+.0%}",
                ]
            )
    headings = ["MB", "base", "planned", "peak of a step", "planned", "plan against measured"]
    return ["### Memory (`bench.memory`)", "", *build_table(headings, rows)]


SECTIONS = {"train": build_training, "eval": build_scoring, "memory": build_memory}


def build_page() -> str:
    lines = [HEAD]
    for path in sorted(RESULTS.glob("performance_*.json")):
        content = read_json(path)
        lines += [f"## {content['machine']}", ""]
        try:
            for bench, build in SECTIONS.items():
                if subjects := content.get(bench):
                    lines += build(subjects)
                    lines += list(dict.fromkeys(describe_source(s) for s in subjects.values()))
                    lines.append("")
        except (KeyError, TypeError) as error:
            raise WrongInput(f"{shown(path)}: not a file of bench.*: {error!r}") from None
    return "\n".join(lines).rstrip() + "\n"


def describe_source(entry: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in entry["packages"].items())
    note = f"; {entry['note']}" if entry.get("note") else ""
    return f"{entry['date']}; {versions}{note}."


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="the page of what the benchmarks measured")
    parser.add_argument("--check", action="store_true", help="fail where the page is old")
    update_page(PAGE, build_page(), "make results", parser.parse_args().check)


if __name__ == "__main__":
    main()
