"""Writes data/README.md, the data card, from data/sources.yaml and an audit of the files at hand.

    python -m tools.data.card     measures what is at hand and writes the card

data/measured.json keeps the measurements, so that the card can be rendered without the files.
`make check` fails if the card differs from what the two give.
"""

import re
from collections.abc import Iterator
from typing import Any

from tools import sources
from tools.common import ROOT, JobFailed, WrongInput, atomic, command, read_json, shown, write_json
from tools.data import audit
from tools.data.rules import check_labels, join_labels, load_train_rules

CARD = ROOT / "data" / "README.md"
MEASURED = ROOT / "data" / "measured.json"
COMMERCIAL_USE = {True: "yes", False: "**no**", None: "not stated"}
Facts = dict[str, dict[str, Any]]  # measurements by file

INTRODUCTION = """\
# Data card

<!-- Written by `python -m tools.data.card` from data/sources.yaml and data/measured.json. -->

The datasets are those of [{name}]({repository}) at commit
`{commit}`, published under {licence};
{note}.
This project holds none of their rows; `data/sample/` has examples that were written for
it. A row is one JSON object on a line, `{{"context": prompt, "target": answer}}`.

Counts, lengths (tokens of SmolLM2, prompt and answer) and defects were measured by
`make audit` on the published files, byte for byte; a file that was not at hand when this
card was written says so. An *error* changes scores, a *warning* may, a *note* is worth
knowing.

## Licences

| source | by | licence | commercial use | remark |
| --- | --- | --- | --- | --- |"""


def write(check: bool = False) -> None:
    """Measures the files at hand and writes the card; with `check`, JobFailed if it is stale."""
    facts = read_facts()
    if check:
        if not CARD.is_file() or render_card(facts) != CARD.read_text():
            raise JobFailed(
                f"{shown(CARD)} is not what data/sources.yaml and {shown(MEASURED)} give; "
                "`python -m tools.data.card` writes it"
            )
        return
    facts |= select_facts(audit.audit(audit.list_tasks()))
    write_json(MEASURED, dict(sorted(facts.items())))
    with atomic(CARD) as file:
        file.write(render_card(facts).encode())
    print(f"card       {shown(CARD)}: {len(facts)} files measured")


def read_facts() -> Facts:
    """Reads the measurements of the files that data/sources.yaml still names."""
    facts = read_json(MEASURED) if MEASURED.is_file() else {}
    return {
        file: measured
        for file, measured in facts.items()
        if measured["checksum"] == audit.read_checksum(file)
    }


def select_facts(report: dict[str, Any]) -> Facts:
    """Selects what the card keeps of an audit: facts on published files, nothing of their rows."""
    return {
        file["file"]: {
            "checksum": audit.read_checksum(file["file"]),
            "rows": file["rows"],
            "labels": {
                label: count
                for label, count in file["labels"].items()
                if label in join_labels(file["datasets"])
            },
            "fit": float(f"{file.get('source', {}).get('p', 0):.2g}"),
            "tokens": [file["tokens"]["median"], file["tokens"]["max"]] if "tokens" in file else [],
            "formulas": file.get("formulas"),
            **check_training_labels(file["file"]),
            "defects": [
                f"{finding['severity']}: {finding['text']} (confidence: {finding['confidence']})"
                for finding in report["findings"]
                if finding["file"] == file["file"]
            ],
        }
        for file in report["files"]
        if file["as_published"]
    }


def check_training_labels(file: str) -> dict[str, str]:
    """Checks a training file for swapped labels; {} if its rows say nothing."""
    for task, spec in sources.published_tables()["tasks"].items():
        if spec["train"] == file:
            folder = sources.source_folder(task)
            try:
                rules = check_labels(folder / file, load_train_rules(task, folder))
            except WrongInput as error:
                return {"label_check": f"not decided: {error}"}
            if rules.label_check:
                return {"label_check": rules.label_check["text"]}
    return {}


def render_card(facts: Facts) -> str:
    """Renders the data card from data/sources.yaml and the measurements."""
    table = sources.published_tables()
    lines = [INTRODUCTION.format(**table["collection"] | table)]
    for origin in table["origins"].values():
        cells = [
            f"[{origin['name']}]({origin['url']})",
            origin["attribution"],
            origin["licence"] or "none stated",
            COMMERCIAL_USE[origin["commercial"]],
            origin.get("note", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for task, spec in table["tasks"].items():
        lines += ["", f"## {task}", "", f"Trained on {describe_file(spec['train'], facts)}", ""]
        lines += list_defects(spec["train"], spec, facts)
        lines += [*describe_swap(task, table, facts), ""]
        if "parts" in spec:
            lines.append(f"A mixture of {', '.join(spec['parts'])}, scored on their datasets.")
        else:
            lines += describe_datasets(spec["eval"], table, facts)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def describe_datasets(names: list[str], table: dict[str, Any], facts: Facts) -> Iterator[str]:
    first_names: dict[str, str] = {}  # of the datasets of a file
    for name in names:
        row = table["datasets"][name]
        file, shape = row["file"], table["audit"].get(name, {}).get("shape", "")
        origins = [table["origins"][key]["name"] for key in table["files"][file]["origins"]]
        yield from (f"### {name}", "", f"{shape} Source: {', '.join(origins)}.", "")
        if first_names.setdefault(file, name) != name:
            yield from (f"Tested on `{file}`, the file of {first_names[file]}.", "")
            continue
        yield from (f"Tested on {describe_file(file, facts)}", "")
        yield from (*list_defects(file, row, facts), "")


def describe_file(file: str, facts: Facts) -> str:
    """Describes a file in a sentence: rows, answers and lengths, or why they are unknown."""
    if sources.tables()["files"][file].get("published") is False:
        return f"`{file}`: not published, bring your own."
    if file not in facts:
        return f"`{file}`: not at hand."
    measured = facts[file]
    answers = ", ".join(f"{count:,} {label}" for label, count in measured["labels"].items())
    text = f"`{file}`: {measured['rows']:,} rows"
    if answers:
        text += f" ({answers})"
    if measured["fit"] > 0.01:
        text += f", as in the source (chi-square, p = {measured['fit']:.2g})"
    if measured["tokens"]:
        text += ", {:,} tokens in the median, {:,} at most".format(*measured["tokens"])
    if keys := measured["formulas"]:
        text += f"; {keys['checked']} keys ({keys['share']:.0%}) could be computed"
        text += f", {keys['agree']} agree"
    return text + "."


def list_defects(file: str, row: dict[str, Any], facts: Facts) -> list[str]:
    """Lists the defects of a file and the repairs of its task or dataset, as Markdown items."""
    items = [f"- {text}" for text in facts.get(file, {}).get("defects", [])]
    items += [f"- **repaired**: {text}" for text in audit.describe_repairs(row)]
    if why := row.get("incomparable"):
        items.append(f"- **compared with no published score**: {why}")
    return items


def describe_swap(task: str, table: dict[str, Any], facts: Facts) -> list[str]:
    """Describes swapped labels in a task's training file, as Markdown items."""
    spec, swap = table["tasks"][task], table["swap"]
    if text := facts.get(spec["train"], {}).get("label_check"):
        return [f"- **labels**: {text}"]
    if swap["dataset"] not in spec["eval"] or "parts" in spec:
        return []
    kinds = {"seen": "seen of it", "concluded": "concluded", "unknown": "not known"}
    return [f"- **{title}**: {swap[key]}" for key, title in kinds.items()]


if __name__ == "__main__":
    command(write)()
