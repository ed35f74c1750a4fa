"""Lists the finished runs here and the adapters of a namespace on the Hub.

python -m tools adapters [--namespace me]
"""

import math
from collections.abc import Iterable
from typing import Any

from evals.report import append_conditions, title
from tools.common import format_table, spell_out
from tools.hub.card import read_scores
from tools.hub.client import connect, read_origin
from tools.hub_errors import explain_errors
from tools.runs import list_runs

Row = tuple[str, str, str, str]


def summarize(scores: Iterable[tuple[str, str, Any]]) -> str:
    """Formats the first (dataset, metric, value) of each dataset, as in `fpb accuracy 72.4`."""
    first: dict[str, str] = {}
    for dataset, metric, value in scores:
        if isinstance(value, int | float) and math.isfinite(value):
            first.setdefault(dataset, f"{dataset} {metric} {100 * value:.1f}")
    return ", ".join(first.values()) or "not scored"


def list_local() -> list[Row]:
    """Lists (run, version, scores, origin) of every finished run."""
    rows = []
    for run in filter(lambda run: run.is_finished, list_runs()):
        run_info, origin = run.info, read_origin(run)
        contents = filter(None, (read_scores(file, "adapters") for file in run.score_files))
        scores = [
            (evaluated["dataset"], append_conditions(title(metric), evaluated), value["value"])
            for content in contents
            if (evaluated := content["evaluated"]).get("adapter_sha256")
            == run_info.get("adapter_sha256")
            for metric, value in content["metrics"].items()
        ]
        place = f"{origin.repo} at {origin.commit[:12]}" if origin else "trained here"
        version = run_info.get("recipe_version") or "–"
        rows.append((run.name, str(version), summarize(scores), place))
    return rows


def list_remote(api: Any, namespace: str) -> list[Row]:
    """Lists (repository, versions, scores, visibility) of a namespace's PEFT adapters."""
    rows = []
    for info in api.list_models(author=namespace, filter="peft", cardData=True):
        tags = [ref.name for ref in api.list_repo_refs(info.id).tags]
        results = (info.card_data.get("eval_results") if info.card_data else None) or []
        scores = (
            (
                str(result.dataset_config or result.dataset_name),
                str(result.metric_name or result.metric_type),
                result.metric_value,
            )
            for result in results
        )
        visibility = "private" if info.private else "public"
        rows.append((info.id, ", ".join(tags) or "–", summarize(scores), visibility))
    return rows


def print_rows(heads: Row, rows: list[Row]) -> None:
    cells = [[spell_out(cell, keep="") for cell in row] for row in rows]
    print(format_table([heads, *cells], "<<<<"))


def show_adapters(namespace: str | None = None) -> None:
    """Prints the runs here and, with a namespace, its adapters on the Hub."""
    if rows := list_local():
        print_rows(("run", "version", "scores, %", "from"), rows)
    else:
        print("no finished run is here; `make train` or `make pull` makes one")
    if namespace:
        api = connect()
        with explain_errors(namespace):
            rows = list_remote(api, namespace)
        print(f"\n{namespace} on {api.endpoint}: {len(rows)} adapters")
        if rows:
            print_rows(("repository", "versions", "scores, %", ""), rows)
