"""Writes data/README.md, the data card, from data/sources.yaml and an audit of the files at hand.

    python -m tools.data.card     measures what is at hand and writes the card

data/measured.json keeps the measurements, so that the card can be rendered without the files.
`make check` fails if the card differs from what the two give.
"""

import re
from collections.abc import Iterator
from typing import Any

from tools import sources
from tools.common import ROOT, WrongInput, command, read_json, shown, update_page, write_json
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
it. A row is one JSON object on a line, `{{"context": prompt, "target": answer}}`. The *key*
of a row is its reference answer, `target`.

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
    if not check:
        facts |= select_facts(audit.audit(audit.list_tasks()))
        write_json(MEASURED, dict(sorted(facts.items())))
        print(f"card       {shown(CARD)}: {len(facts)} files measured")
    update_page(CARD, render_card(facts), "python -m tools.data.card", check)


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
    owners: dict[str, str] = {}  # of a file: the task or dataset that describes it
    sections: dict[str, str] = {}  # of a dataset: the task below which it stands
    for task, spec in table["tasks"].items():
        train = spec["train"]
        lines += ["", f"## {task}", "", describe_training(task, table, facts, owners), ""]
        lines += list_defects(train, spec, facts if owners[train] == task else {})
        lines += [*describe_swap(task, table, facts), ""]
        if "parts" in spec:
            lines.append(f"A mixture of {', '.join(spec['parts'])}, scored on their datasets.")
            continue
        new = [name for name in spec["eval"] if sections.setdefault(name, task) == task]
        if not new:
            names = ", ".join(f"`{name}`" for name in spec["eval"])
            lines.append(f"Scored on the datasets of {sections[spec['eval'][0]]}: {names}.")
        for name in new:
            lines += describe_dataset(name, table, facts, owners)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def describe_training(
    task: str, table: dict[str, Any], facts: Facts, owners: dict[str, str]
) -> str:
    """Describes what a task trains on: its file, and what trains where that is missing."""
    spec = table["tasks"][task]
    file, split = spec["train"], spec.get("without_train")
    if owners.setdefault(file, task) == task:
        text = f"Trained on {describe_file(file, facts)}"
    else:
        text = f"Trained on `{file}`, the file of {owners[file]}."
    if split:
        test_file = table["datasets"][split["split"]]["file"]
        count = f"up to {split['rows']:,}" if "together" in split else f"{split['rows']:,}"
        of = f"the {facts[test_file]['rows']:,} rows" if test_file in facts else "the rows"
        text += f" Without it, {count} of {of} of `{test_file}` train, and the others are tested."
    return text


def describe_dataset(
    name: str, table: dict[str, Any], facts: Facts, owners: dict[str, str]
) -> Iterator[str]:
    """Describes a dataset; the first one of a file tells what was measured on it."""
    row = table["datasets"][name]
    file, shape = row["file"], table["audit"].get(name, {}).get("shape", "")
    origins = [table["origins"][key]["name"] for key in table["files"][file]["origins"]]
    yield from (f"### {name}", "", f"{shape} Source: {', '.join(origins)}.", "")
    if owners.setdefault(file, name) != name:
        yield from (f"Tested on `{file}`, the file of {owners[file]}.", "")
        return
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
