"""Lists the finished runs here and the adapters of a namespace on the Hub.

python -m tools adapters [--namespace me]
"""

import json
import math
import sys
from typing import Any

from tools.hub import card
from tools.hub.client import hub
from tools.hub_errors import plainly
from tools.runs import list_runs


def shortly(found: list[tuple[str, str, float]]) -> str:
    """`fpb accuracy 72.4` for each dataset: the first metric that is known of it."""
    first: dict[str, str] = {}
    for dataset, metric, value in found:
        if isinstance(value, int | float) and math.isfinite(value):
            first.setdefault(dataset, f"{dataset} {metric} {100 * value:.1f}")
    return ", ".join(first.values()) or "not scored"


def local_runs() -> list[tuple[str, str, str, str]]:
    """(run, version, scores, where it is from) of every finished run."""
    from evals import report

    rows = []
    for run in list_runs():
        if not run.is_finished:
            continue
        told, found = run.info, []
        for file in run.score_files:
            content = json.loads(file.read_text())
            if content["evaluated"].get("adapter_sha256") == told.get("adapter_sha256"):
                name = content["evaluated"]["dataset"]
                for metric, value in card.metrics(content).items():
                    found.append((name, report.title(metric), value["value"]))
        source = run.origin
        where = f"{source['repo']} at {source['commit'][:12]}" if source else "trained here"
        version = told.get("recipe_version") or "–"
        rows.append((run.name, str(version), shortly(found), where))
    return rows


def remote_runs(api: Any, namespace: str) -> list[tuple[str, str, str, str]]:
    """(repository, versions, scores, visibility) of every PEFT adapter in a namespace."""
    rows = []
    for info in api.list_models(author=namespace, filter="peft", cardData=True):
        tags = [ref.name for ref in api.list_repo_refs(info.id).tags]
        results = (info.card_data.get("eval_results") if info.card_data else None) or []
        found = [
            (
                str(r.dataset_config or r.dataset_name),
                str(r.metric_name or r.metric_type),
                r.metric_value,
            )
            for r in results
        ]
        state = "private" if info.private else "public"
        rows.append((info.id, ", ".join(tags) or "–", shortly(found), state))
    return rows


def show(namespace: str | None = None) -> None:
    """Prints the runs here and, with a namespace, the adapters that it has on the Hub."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)

    def print_table(heads: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> None:
        table = Table(box=None, pad_edge=False)
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*(escape("".join(c for c in cell if c.isprintable())) for cell in row))
        console.print(table)

    rows = local_runs()
    if rows:
        print_table(("run", "version", "scores, %", "from"), rows)
    else:
        print("no finished run is here; `make train` or `make pull` makes one")
    if namespace:
        api = hub()
        with plainly(namespace):
            theirs = remote_runs(api, namespace)
        console.print(f"\n{namespace} on {api.endpoint}: {len(theirs)} adapters", highlight=False)
        if theirs:
            print_table(("repository", "versions", "scores, %", ""), theirs)
