"""Reads the rows that are at hand and reports what is wrong with them; it changes nothing.

    python -m tools audit                       every task whose files are at hand
    python -m tools audit sentiment,formula     two of them; --json prints the report as JSON

It leaves runs/audit/audit.json and runs/audit/index.html. A finding has a severity (an `error`
changes scores, a `warning` may, a `note` is worth knowing), a confidence, a count and examples:

    error    test/tfns_test.jsonl   labels are swapped: neutral stands where … positive   certain

What rows are compared with (class counts of a dataset's source, how keys are computed) stands in
data/sources.yaml under `audit`. The rows of one task are in memory at a time.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import permutations
from typing import Any

from tools import recipes, sources
from tools.common import (
    ROOT,
    WrongInput,
    check_name,
    digest,
    git_blob,
    shown,
    spell_out,
    write_json,
    write_text,
)
from tools.data import duplicates, formulas, turns
from tools.data.bases import read_tokenizer
from tools.data.parts import EXAMPLES, Finding, Part, count_noun, find_parts
from tools.data.templates import NEAR_CHARS, check_templates

OUT = ROOT / "runs" / "audit"
PAGE = ROOT / "tools" / "data" / "audit.html"
TOKENIZER = ROOT / "models" / "smollm2-135m" / "tokenizer.json"

BINS = 24
TOKEN_CHARS = 20_000_000  # characters a file that are tokenized; of more, an even sample
IMPROBABLE = 1e-6
# Of wrong keys: confidence, severity, and the finding of one and of several.
KEY_FINDINGS = [
    ("high", "error", "is not what its own formula gives", "are not what their own formula gives"),
    ("medium", "warning", "follows from another convention", "follow from another convention"),
    ("low", "note", "is not exact", "are not exact"),
]
SEVERITIES = {"error": "red", "warning": "yellow", "note": "blue"}


def run(tasks: list[str], as_json: bool = False) -> None:
    """Audits `tasks`, or all that are at hand, and writes runs/audit/; raises WrongInput."""
    table = sources.tables()["tasks"]
    tasks = tasks or list_tasks()
    for task in tasks:
        check_name("task", task, table)
    report = audit(tasks)
    if not report["files"]:
        raise WrongInput(f"no file of {', '.join(tasks)} is at hand; `make fetch` gets FinLoRA's")
    write_json(OUT / "audit.json", report)
    write_text(OUT / "index.html", render_page(report))
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print_tables(report)
    print(f"\nreport     {shown(OUT / 'index.html')}, {shown(OUT / 'audit.json')}")


def list_tasks() -> list[str]:
    """The tasks that have files beside the examples; all of them where only the examples are."""
    tasks = list(sources.tables()["tasks"])
    return [task for task in tasks if sources.source_folder(task) != sources.SAMPLE] or tasks


def audit(tasks: list[str]) -> dict[str, Any]:
    """Audits the files of some tasks that are at hand; returns the report as plain values."""
    findings: list[Finding] = []
    files: dict[str, dict[str, Any]] = {}
    for task in tasks:
        parts = find_parts(task, sources.source_folder(task))
        if not parts:
            continue
        for part in parts:
            findings += check_rows(part)
            findings += check_spellings(part)
            findings += check_mojibake(part)
            findings += check_balance(part)
            findings += check_templates(part)
            findings += check_lengths(part, find_sequence_len(task))
            findings += check_keys(part)
            files.setdefault(part.name, part.report | {"repairs": list_repairs(task, part)})
        findings += duplicates.find_repeats(parts)
        findings += duplicates.Near(parts).findings()
    order = list(SEVERITIES)
    unique = {(finding.file, finding.text): finding for finding in findings}.values()
    return {
        "tasks": tasks,
        "tokenizer": shown(TOKENIZER.parent) if load_tokenizer() else None,
        "limits": {
            "rows compared for likeness, a task": duplicates.NEAR_ROWS,
            "characters compared of a prompt": NEAR_CHARS,
            "characters tokenized, a file": TOKEN_CHARS,
        },
        "files": list(files.values()),
        "findings": [
            asdict(finding)
            for finding in sorted(unique, key=lambda f: (order.index(f.severity), f.file))
        ],
    }


# ---- Rows and labels


def check_rows(part: Part) -> Iterator[Finding]:
    """Rows that cannot be read, and answers that are no label."""
    rows, unread, counts = len(part.lines), len(part.refused), Counter[str]()
    if unread:
        text = f"{count_noun(unread, 'row', 'rows')} cannot be read"
        examples = [
            {"file": part.name, "line": line, "text": spell_out(reason)}
            for line, reason, _ in part.refused[:EXAMPLES]
        ]
        yield part.finding(("error", "rows", "certain"), text, unread, examples, unread + rows)
    if part.labels:
        counts = Counter(spell_out(answer[:80]) for answer in part.answers)
    first_rows: dict[str, int] = {}  # of each answer that is no label
    for row, answer in enumerate(part.answers if part.labels else ()):
        if answer not in part.labels:
            first_rows.setdefault(answer, row)
    if first_rows:
        count = sum(answer not in part.labels for answer in part.answers)
        text = count_noun(count, "answer is", "answers are")
        text += f" none of {', '.join(sorted(part.labels))}"
        first = list(first_rows.values())[:EXAMPLES]
        yield part.finding(("error", "labels", "certain"), text, count, first)
    part.report = {
        "file": part.name,
        "from": sources.origin(part.path),
        "as_published": is_published(part),
        "split": part.split,
        "datasets": part.datasets,
        "rows": rows,
        "unreadable": unread,
        "labels": dict(counts.most_common(20)),
        "chars": count_bins(map(count_chars, part.prompts, part.answers)),
    }


def check_spellings(part: Part) -> Iterator[Finding]:
    """Answers that differ in case, spaces or .0 alone, where answers are few."""
    counts = Counter(part.answers)
    if len(counts) * 2 > len(part.answers):
        return
    if folded := turns.fold_spellings(counts):
        count = sum(counts[answer] for answer in folded)
        text = count_noun(count, "answer differs", "answers differ")
        pairs = [f"{answer[:40]} for {label[:40]}" for answer, label in folded.items()]
        text += f" from another in case, spaces or .0 alone: {spell_out(', '.join(pairs[:5]))}"
        rows = [row for row, answer in enumerate(part.answers) if answer in folded]
        yield part.finding(("warning", "spellings", "certain"), text, count, rows[:EXAMPLES])


# UTF-8 that was read as Windows-1252: é becomes Ã©, ’ becomes â€™.
MOJIBAKE = re.compile("Ã[\x80-\xbf©¨¤¶¼ª«§±³²º¹]|â€[\x80-\xbf™œ“”˜¦\x9d]|Â[\xa0-\xbf]|\ufffd")


def check_mojibake(part: Part) -> Iterator[Finding]:
    """Rows whose letters were decoded wrongly."""
    texts = zip(part.prompts, part.answers, strict=True)
    rows = [n for n, pair in enumerate(texts) if any(map(MOJIBAKE.search, pair))]
    if rows:
        text = count_noun(len(rows), "row holds", "rows hold")
        text += " letters that were decoded wrongly (such as Ã© for é)"
        yield part.finding(("warning", "mojibake", "high"), text, len(rows), rows[:EXAMPLES])


def count_chars(prompt: str, answer: str) -> int:
    return len(prompt) + len(answer)


def read_checksum(file: str) -> str:
    """What identifies a published file: the SHA-256 of its content, else git's SHA-1 of it."""
    row = sources.tables()["files"].get(file, {})
    return str(row.get("sha256") or row.get("blob", ""))


def is_published(part: Part) -> bool:
    """Whether a file is FinLoRA's to the byte, by the checksums of data/sources.yaml."""
    sha = read_checksum(part.name)
    return sha == (digest(part.path) if len(sha) == 64 else git_blob(part.path))


def count_bins(values: Iterable[int]) -> dict[str, Any]:
    """Median, largest value and the counts of `BINS` equal bins from 0 to the largest."""
    ordered, bins = sorted(values) or [0], [0] * BINS
    for value in ordered:
        bins[min(BINS - 1, value * BINS // max(1, ordered[-1]))] += 1
    return {"median": int(statistics.median(ordered)), "max": ordered[-1], "bins": bins}


# ---- Class balance


def check_balance(part: Part) -> Iterator[Finding]:
    """Class counts against those that the dataset's source publishes, and their permutations."""
    published = part.facts.get("published_classes", {})
    names, source = list(published), part.facts.get("classes_from", "the source")
    classes = Counter(part.answers) if names else Counter[str]()
    counts = [classes[label] for label in names]
    rows, total = sum(counts), sum(published.values())
    if not rows:
        return
    from scipy.stats import chisquare

    def compute_p(order: Iterable[str]) -> float:
        expected = [published[label] * rows / total for label in order]
        return float(chisquare(counts, expected).pvalue)

    p_labelled, best = compute_p(names), max(permutations(names), key=compute_p)
    part.report["source"] = {"classes": published, "p": p_labelled}
    exact = counts == [published[label] for label in best]
    if best == tuple(names) and p_labelled <= IMPROBABLE:
        text = f"the class shares are not those of {source} (chi-square, p {show_p(p_labelled)})"
        yield part.finding(("warning", "balance", "high"), text, rows)
    if best == tuple(names) or (p_labelled > IMPROBABLE and not exact):
        return
    moved = [(label, true) for label, true in zip(names, best, strict=True) if label != true]
    swaps = ", ".join(f"{label} stands where the source has {true}" for label, true in moved)
    in_file = ", ".join(f"{classes[label]:,} {label}" for label in names)
    in_source = ", ".join(f"{published[label]:,} {label}" for label in names)
    text = f"labels are swapped: {swaps}. The file has {in_file}; {source} has {in_source}. "
    if exact:
        # Were the counts any that add up to the rows, each as likely as the other: of the
        # C(rows + k - 1, k - 1) ways to split rows into k classes, k! - 1 fit a swap.
        k = len(names)
        chance = (math.factorial(k) - 1) / math.comb(rows + k - 1, k - 1)
        text += f"All {k} counts fit the swap exactly (by chance: {chance:.0e}), and as labelled "
        text += f"they do not (chi-square, p {show_p(p_labelled)})"
        confidence = "certain"
    else:
        p_swapped = compute_p(best)
        text += f"Swapped, the shares fit (chi-square, p = {p_swapped:.2g}), as labelled they do "
        text += f"not (p {show_p(p_labelled)})"
        confidence = "high" if p_swapped > 0.01 else "low"
    count = sum(classes[label] for label, _ in moved)
    yield part.finding(("error", "balance", confidence), text, count)


def show_p(p: float) -> str:
    return f"= {p:.0e}" if p > 1e-300 else "< 1e-300"


# ---- Lengths


def load_tokenizer() -> Any:
    """SmolLM2's tokenizer, or None where the model is not there (yet)."""
    return read_tokenizer(TOKENIZER) if TOKENIZER.is_file() else None


def find_sequence_len(task: str) -> int:
    """Tokens that the task's recipes train on at most."""
    matrix = recipes.read_matrix()
    settings = (matrix["tasks"].get(task) or {}).get("settings", {})
    return int(settings.get("sequence_len", matrix["common"]["sequence_len"]))


def check_lengths(part: Part, sequence_len: int) -> Iterator[Finding]:
    """Rows that are too long, without the chat template's own tokens; counts an even sample."""
    tokenizer = load_tokenizer()
    if not tokenizer or not part.lines:
        return
    step = -(-sum(map(count_chars, part.prompts, part.answers)) // TOKEN_CHARS) or 1
    columns = (part.prompts[::step], part.answers[::step])
    prompts, answers = ([len(t) for t in tokenizer.encode_batch_fast(texts)] for texts in columns)
    lengths = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    part.report["tokens"] = count_bins(lengths) | {"limit": sequence_len}
    long_rows: dict[bool, list[int]] = {False: [], True: []}  # by whether the answer alone is long
    for number, length in enumerate(lengths):
        if length > sequence_len:
            long_rows[answers[number] >= sequence_len].append(number * step)
    for severity, rows, nouns in (
        ("warning", long_rows[False], ("row is", "rows are")),
        ("error", long_rows[True], ("answer alone is", "answers alone are")),
    ):
        if rows:
            text = count_noun(len(rows), *nouns) + f" longer than {sequence_len} tokens of "
            text += f"SmolLM2's tokenizer, of {len(lengths):,} that were counted"
            grade, examples = (severity, "length", "high"), rows[:EXAMPLES]
            yield part.finding(grade, text, len(rows), examples, len(lengths))


# ---- Answer keys


def check_keys(part: Part) -> Iterator[Finding]:
    """The keys of a file that their own formula does not give, by how sure that is."""
    if part.facts.get("check") != "formulas":
        return
    results = map(formulas.check_key, part.prompts, part.answers)
    verdicts = [(row, verdict) for row, verdict in enumerate(results) if verdict]
    checked, agree = len(verdicts), sum(verdict.agrees for _, verdict in verdicts)
    share = checked / max(1, len(part.lines))
    part.report["formulas"] = {"checked": checked, "agree": agree, "share": round(share, 4)}
    for confidence, severity, singular, plural in KEY_FINDINGS:
        wrong = [(row, v) for row, v in verdicts if not v.agrees and v.confidence == confidence]
        if not wrong:
            continue
        kinds = Counter(f"{spell_out(v.formula)[:60]} ({v.why})" for _, v in wrong)
        text = count_noun(len(wrong), f"key {singular}", f"keys {plural}")
        text += f", of {checked} that could be computed ({share:.0%} of the rows): "
        text += ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        examples = [part.example(row, describe_key(v)) for row, v in wrong]
        grade = (severity, "formula", confidence)
        yield part.finding(grade, text, len(wrong), examples, checked)


def describe_key(verdict: formulas.Verdict) -> str:
    """What a wrong key should have been, for an example."""
    which = f" in the nearest of {verdict.readings} readings" if verdict.readings > 1 else ""
    text = f"gives {verdict.value:,.2f}{which}, the key is {verdict.key:,.2f}"
    return f"{text}: {verdict.why}"


# ---- The report


def list_repairs(task: str, part: Part) -> list[str]:
    """The repairs that `make data` makes in a file; a relabelling is for the published one."""
    table = sources.tables()
    if part.split == "train":
        return describe_repairs(table["tasks"][task])
    if not part.report["as_published"]:
        return []
    return [text for name in part.datasets for text in describe_repairs(table["datasets"][name])]


def describe_repairs(row: dict[str, Any]) -> list[str]:
    """What the repairs of a task or dataset are for, with their evidence."""
    repairs = row.get("repairs", [row["repair"]] if "repair" in row else [])
    texts = ("; ".join(str(r[key]) for key in ("reason", "evidence") if key in r) for r in repairs)
    return [" ".join(text.split()).removesuffix(".") for text in texts]


def print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape as escape_markup
    from rich.table import Table

    files = Table(title="Files", title_justify="left", box=None)
    for name in ("file", "from", "rows", "tokens (median, most)", "templates", "answers"):
        files.add_column(name, justify="right" if name in ("rows", "templates") else "left")
    for file in report["files"]:
        tokens = file.get("tokens")
        answers = ", ".join(f"{n:,} {label}" for label, n in list(file["labels"].items())[:7])
        files.add_row(
            file["file"],
            file["from"],
            f"{file['rows']:,}",
            f"{tokens['median']:,}, {tokens['max']:,}" if tokens else "not counted",
            str(file["templates"]["distinct"]),
            escape_markup(answers) or "free",
        )
    findings = Table("", "file", "finding", "confidence", title="Findings", box=None)
    findings.title_justify = "left"
    for finding in report["findings"]:
        severity, text = finding["severity"], escape_markup(finding["text"])
        coloured = f"[{SEVERITIES[severity]}]{severity}[/]"
        findings.add_row(coloured, finding["file"], text, finding["confidence"])
    console = Console(width=None if Console().is_terminal else 160)
    console.print(files)
    console.print()
    console.print(findings if report["findings"] else "No findings.")
    for file in report["files"]:
        for repair in file["repairs"]:
            text = f"\n`make data` repairs {file['file']}: {escape_markup(repair)}"
            console.print(text, highlight=False)


def render_page(report: dict[str, Any]) -> str:
    """The report as one HTML file that loads nothing; rows are hostile input, so all is escaped."""
    from jinja2 import Environment

    number = Counter(finding["severity"] for finding in report["findings"])
    counts = ", ".join(count_noun(number[name], name, f"{name}s") for name in SEVERITIES)
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(report | {"counts": counts})
