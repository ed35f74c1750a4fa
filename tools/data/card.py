"""Writes data/README.md, the data card, from data/sources.yaml and an audit of the files at hand.

    python -m tools.data.card            measures what is at hand and writes the card
    python -m tools.data.card --check    fails where the card is not what data/sources.yaml gives

What an audit measured stays in a comment of the card, so that it can be written again where the
files are not at hand.
"""

import json
import re
from typing import Any

from tools import sources as sources_module
from tools.common import ROOT, JobFailed, WrongInput, atomic, shown
from tools.data import audit, convert

CARD = ROOT / "data" / "README.md"


def verified(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the card keeps of an audit: of the published files alone, and nothing of their rows."""
    return {
        each["file"]: {
            "checksum": audit.checksum(each["file"]),
            "rows": each["rows"],
            "labels": {
                k: n for k, n in each["labels"].items() if k in audit.labels(each["datasets"])
            },
            "fit": float(f"{each.get('source', {}).get('p', 0):.2g}"),
            "tokens": [each["tokens"]["median"], each["tokens"]["max"]] if "tokens" in each else [],
            "formulas": each.get("formulas"),
            **check_training_labels(each["file"]),
            "defects": [
                f"{finding['severity']}: {finding['text']} (confidence: {finding['confidence']})"
                for finding in report["findings"]
                if finding["file"] == each["file"]
            ],
        }
        for each in report["files"]
        if each["as_published"]
    }


def check_training_labels(file: str) -> dict[str, str]:
    """What the rows of a training file say on swapped labels; {} where nothing is to be said."""
    for task, spec in sources_module.published_tables()["tasks"].items():
        if spec["train"] == file:
            folder = sources_module.source_folder(task)
            rule = convert.train_rules(task, folder)
            try:
                rule = convert.check_labels(folder / file, rule, convert.DEFAULT, mixed=True)
            except WrongInput as error:
                return {"label_check": f"not decided: {error}"}
            if rule.label_check:
                return {"label_check": rule.label_check["text"]}
    return {}


def describe_swap(task: str, facts: dict[str, dict[str, Any]]) -> list[str]:
    """What is known of swapped labels in a task's training file, as list items."""
    table = sources_module.published_tables()
    spec, swap = table["tasks"][task], table["swap"]
    if text := facts.get(spec["train"], {}).get("label_check"):
        return [f"- **labels**: {text}"]
    if swap["dataset"] not in spec["eval"] or "parts" in spec:
        return []
    kinds = {"seen": "seen of it", "concluded": "concluded", "unknown": "not known"}
    return [f"- **{title}**: {swap[key]}" for key, title in kinds.items()]


def card(facts: dict[str, dict[str, Any]]) -> str:
    """The data card of data/sources.yaml and of what audits found in the published files."""
    table = sources_module.published_tables()
    whole = table["collection"]
    out = [
        "# Data card",
        "",
        "<!-- Written by `python -m tools.data.card` from data/sources.yaml and an audit. -->",
        "",
        f"The datasets are those of [{whole['name']}]({table['repository']}) at commit",
        f"`{table['commit']}`, published under {whole['licence']};",
        f"{whole['note']}.",
        "This project holds none of their rows; `data/sample/` has examples that were written for",
        'it. A row is one JSON object on a line, `{"context": prompt, "target": answer}`.',
        "",
        "Counts, lengths (tokens of SmolLM2, prompt and answer) and defects were measured by",
        "`make audit` on the published files, byte for byte; a file that was not at hand when this",
        "card was written says so. An *error* changes scores, a *warning* may, a *note* is worth",
        "knowing.",
        "",
        "## Licences",
        "",
        "| source | by | licence | commercial use | remark |",
        "| --- | --- | --- | --- | --- |",
    ]
    may = {True: "yes", False: "**no**", None: "not stated"}
    for each in table["origins"].values():
        cells = [
            f"[{each['name']}]({each['url']})",
            each["attribution"],
            each["licence"] or "none stated",
            may[each["commercial"]],
            each.get("note", ""),
        ]
        out.append(f"| {' | '.join(cells)} |")
    for task, spec in table["tasks"].items():
        out += ["", f"## {task}", ""]
        out += [f"Trained on {measured(spec['train'], facts)}", ""]
        out += [*listed(spec["train"], spec, facts), *describe_swap(task, facts), ""]
        if "parts" in spec:
            out.append(f"A mixture of {', '.join(spec['parts'])}, scored on their datasets.")
            continue
        described: dict[str, str] = {}  # the first dataset of each file
        for name in spec["eval"]:
            row = table["datasets"][name]
            sources = [
                table["origins"][key]["name"] for key in table["files"][row["file"]]["origins"]
            ]
            shape = table["audit"].get(name, {}).get("shape", "")
            out += [f"### {name}", "", f"{shape} Source: {', '.join(sources)}.", ""]
            if described.setdefault(row["file"], name) != name:
                out += [f"Tested on `{row['file']}`, the file of {described[row['file']]}.", ""]
                continue
            out += [f"Tested on {measured(row['file'], facts)}", ""]
            out += [*listed(row["file"], row, facts), ""]
    lines = [f'"{file}": {json.dumps(kept)}' for file, kept in sorted(facts.items())]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(out)).rstrip()
    # What a later card starts from where the files are not at hand; a comment holds no "--".
    kept = ",\n".join(lines).replace("--", "-\\u002d")
    return f"{text}\n\n<!-- measured:\n{{{kept}}}\n-->\n"


def measured(file: str, facts: dict[str, dict[str, Any]]) -> str:
    """A file in a sentence: its rows, answers and lengths, or why they are not known."""
    if sources_module.tables()["files"][file].get("published") is False:
        return f"`{file}`: not published, bring your own."
    if file not in facts:
        return f"`{file}`: not at hand."
    kept = facts[file]
    answers = ", ".join(f"{count:,} {label}" for label, count in kept["labels"].items())
    text = f"`{file}`: {kept['rows']:,} rows"
    if answers:
        text += f" ({answers})"
    if kept["fit"] > 0.01:
        text += f", as in the source (chi-square, p = {kept['fit']:.2g})"
    if kept["tokens"]:
        text += ", {:,} tokens in the median, {:,} at most".format(*kept["tokens"])
    if kept["formulas"]:
        keys = kept["formulas"]
        text += f"; {keys['checked']} keys ({keys['share']:.0%}) could be computed"
        text += f", {keys['agree']} agree"
    return text + "."


def listed(file: str, row: dict[str, Any], facts: dict[str, dict[str, Any]]) -> list[str]:
    """The defects of a file and the repairs of its task or dataset, as list items."""
    found = [f"- {text}" for text in facts.get(file, {}).get("defects", [])]
    found += [f"- **repaired**: {text}" for text in audit.repairs(row)]
    if why := row.get("incomparable"):
        found.append(f"- **compared with no published score**: {why}")
    return found


def kept_facts() -> dict[str, dict[str, Any]]:
    """What the last card knows of the files that data/sources.yaml still names."""
    text = CARD.read_text() if CARD.is_file() else ""
    found = re.search(r"<!-- measured:\n(\{.*\})\n-->", text, re.S)
    facts = json.loads(found[1]) if found else {}
    return {file: kept for file, kept in facts.items() if kept["checksum"] == audit.checksum(file)}


def write(check: bool) -> None:
    facts = kept_facts()
    if check:
        if not CARD.is_file() or card(facts) != CARD.read_text():
            raise JobFailed(
                f"{shown(CARD)} is not what data/sources.yaml gives; "
                "`python -m tools.data.card` writes it"
            )
        return
    facts |= verified(audit.audit(audit.at_hand()))
    with atomic(CARD) as file:
        file.write(card(facts).encode())
    print(f"card       {shown(CARD)}: {len(facts)} files measured")
