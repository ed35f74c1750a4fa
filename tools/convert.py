"""Turns FinLoRA's rows into chat rows that Axolotl and lm-eval read.

    python -m tools.convert                          every task of data/sources.yaml
    python -m tools.convert sentiment                one task: its training set and its test sets
    python -m tools.convert --dataset fpb IN OUT     one file by the rules of one dataset

    {"context": "… Answer: ", "target": "neutral"}
 →  {"messages": [{"role": "user", "content": "… Answer:"},
                  {"role": "assistant", "content": "neutral"}]}

The prompt loses its outer white space and nothing else; rows stay in the order of the source.
Beside OUT stands OUT.manifest.json: source, digests, row count, labels and repair. A row that
breaks a rule stops the conversion and is named by file and line; nothing is then written.
"""

import argparse
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import yaml

from tools.cli import ROOT, WrongInput, atomic, command, digest, nearest, shown, write_json

CHAT = ROOT / "data" / "chat"
SAMPLE = ROOT / "data" / "sample"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MAX_LINE = 16 * 2**20  # bytes; FinLoRA's longest rows are about 20 kB


@cache
def sources() -> dict[str, Any]:
    return yaml.load((ROOT / "data" / "sources.yaml").read_bytes(), yaml.CSafeLoader)


@dataclass(frozen=True)
class Rules:
    """What a dataset asks of its rows: the answers there are, and the repair of known defects."""

    labels: frozenset[str] = frozenset()
    relabel: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def rules(dataset: str, source: Path) -> Rules:
    """The rules of one dataset; its repair applies to the published file alone."""
    row = sources()["datasets"][dataset]
    labels = frozenset(row.get("labels", ()))
    repair = row.get("repair")
    if repair and git_blob(source) == repair["blob"]:
        return Rules(labels, repair["relabel"], repair["reason"])
    return Rules(labels)


def git_blob(path: Path) -> str:
    """SHA-1 of a file as git names it: of `blob <size>\\0` and the content."""
    sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def read(source: Path, rule: Rules) -> Iterator[tuple[str, str]]:
    """Yields (prompt, answer) of each row; raises WrongInput that names file and line."""
    with open(source, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield row(line, rule)
            except ValueError as error:
                raise WrongInput(f"{shown(source)}, line {number}: {error}") from None


def row(line: bytes, rule: Rules) -> tuple[str, str]:
    """(prompt, answer) of one line; raises ValueError that says what is wrong with it."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE // 2**20} MB; one row stands on one line")
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise ValueError(f"not UTF-8: byte {wrong.start + 1} of the line") from None
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, not {type(content).__name__}")
    values = []
    for key in ("context", "target"):
        if key not in content:
            found = ", ".join(map(str, content)) or "none"
            raise ValueError(f'the key "{key}" is missing; the row has {found}')
        value = content[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            # FinLoRA's own loader turns numbers into strings; orjson would round long ones.
            value = str(json.loads(line)[key])
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be text, not {type(value).__name__}')
        if found_control := CONTROL.search(value):
            raise ValueError(f'"{key}" holds the control character {found_control.group()!r}')
        value = value.strip()
        if not value:
            raise ValueError(f'"{key}" is empty')
        values.append(value)
    prompt, answer = values
    answer = rule.relabel.get(answer, answer)
    if rule.labels and answer not in rule.labels:
        raise ValueError(f'the answer "{answer[:60]}" is none of {", ".join(sorted(rule.labels))}')
    return prompt, answer


def convert(
    source: Path, target: Path, rule: Rules, rows: frozenset[int] | None = None
) -> dict[str, Any]:
    """Writes the chat rows of `source` to `target` and a manifest beside it, which it returns.

    `rows` picks rows by their number from 0; without it all are written.
    """
    if not source.is_file():
        raise WrongInput(f"{shown(source)} is not there")
    if target.resolve() == source.resolve():
        raise WrongInput(f"{shown(source)} would be overwritten; name another file for the output")
    sha, counted, labels = hashlib.sha256(), 0, Counter[str]()
    with atomic(target) as file:
        for number, (prompt, answer) in enumerate(read(source, rule)):
            if rows is not None and number not in rows:
                continue
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            line = orjson.dumps({"messages": turns}, option=orjson.OPT_APPEND_NEWLINE)
            sha.update(line)
            file.write(line)
            counted += 1
            if rule.labels:
                labels[answer] += 1
        if counted == 0:
            raise WrongInput(f"{shown(source)} holds no rows")
    manifest = {
        "source": "/".join(source.parts[-2:]),
        "from": "data/sample" if source.resolve().is_relative_to(SAMPLE) else "FinLoRA or your own",
        "source_sha256": digest(source),
        "sha256": sha.hexdigest(),
        "rows": counted,
        "labels": dict(sorted(labels.items())),
        "selected": None if rows is None else f"{len(rows)} chosen rows",
        "repair": rule.reason or None,
    }
    write_json(manifest_path(target), manifest)
    return manifest


def manifest_path(chat: Path) -> Path:
    return chat.with_name(chat.name + ".manifest.json")


def manifest(chat: Path) -> dict[str, Any]:
    """The manifest of a converted file, after checking that the file is what it says."""
    path = manifest_path(chat)
    if not chat.is_file():
        raise WrongInput(f"{shown(chat)} is not there; `make data` makes it")
    content = orjson.loads(path.read_bytes()) if path.is_file() else {"source": shown(chat)}
    sha = digest(chat)
    if content.setdefault("sha256", sha) != sha:
        raise WrongInput(f"{shown(chat)} was changed after its conversion; `make data` makes it")
    return content


def train_path(task: str) -> Path:
    return CHAT / f"{task}_train.jsonl"


def test_path(dataset: str) -> Path:
    return CHAT / f"{dataset}_test.jsonl"


def source_folder() -> Path:
    """The folder that holds `train/` and `test/`: of FINLORA_DATA, else the project's samples."""
    named = os.environ.get("FINLORA_DATA")
    if not named:
        return SAMPLE
    folder = Path(named).expanduser() / "data"
    if not folder.is_dir():
        raise WrongInput(f"FINLORA_DATA={named} has no folder data/ with FinLoRA's files")
    return folder.resolve()


def convert_task(task: str, folder: Path) -> None:
    """Converts a task's training set and test sets; what has no source is removed and named."""
    spec = sources()["tasks"][task]
    train, split = folder / spec["train"], spec.get("without_train")
    chosen: dict[str, frozenset[int]] = {}
    labels = [set(sources()["datasets"][name].get("labels", ())) for name in spec["eval"]]
    if train.is_file():
        rule = Rules(frozenset(set.union(*labels)) if all(labels) else frozenset())
        report(convert(train, train_path(task), rule), train_path(task))
    elif split and (source := folder / sources()["datasets"][split["split"]]["file"]).is_file():
        rule = rules(split["split"], source)
        prompts = [prompt for prompt, _ in read(source, rule)]
        if len(prompts) <= split["rows"]:
            raise WrongInput(
                f"{shown(source)} has {len(prompts)} rows; {split['rows']} of them train in place "
                f"of {train.name}, and some must be left to test on"
            )
        picked = frozenset(random.Random(split["seed"]).sample(range(len(prompts)), split["rows"]))
        seen = {prompts[number] for number in picked}
        chosen[split["split"]] = frozenset(n for n, text in enumerate(prompts) if text not in seen)
        report(convert(source, train_path(task), rule, picked), train_path(task))
    else:
        absent(train_path(task), train)
    for name in spec["eval"]:
        source = folder / sources()["datasets"][name]["file"]
        if source.is_file():
            target = test_path(name)
            report(convert(source, target, rules(name, source), chosen.get(name)), target)
        else:
            absent(test_path(name), source)


def absent(target: Path, source: Path) -> None:
    """Removes what an earlier conversion from other data left, so that two are never mixed."""
    target.unlink(missing_ok=True)
    manifest_path(target).unlink(missing_ok=True)
    print(f"data       {target.name:<32} left out: {source.name} is not at hand")


def report(manifest: dict[str, Any], target: Path) -> None:
    labels = ", ".join(f"{count} {label}" for label, count in manifest["labels"].items())
    repaired = "; repaired" if manifest["repair"] else ""
    print(f"data       {target.name:<32} {manifest['rows']:>6} rows  {labels[:70]}{repaired}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="FinLoRA rows to chat rows")
    parser.add_argument("tasks", nargs="?", default="", help="tasks, comma-separated; all if empty")
    parser.add_argument("--dataset", nargs=3, metavar=("DATASET", "IN", "OUT"))
    arguments = parser.parse_args()
    if arguments.dataset:
        name, source, target = arguments.dataset
        if name not in sources()["datasets"]:
            known = list(sources()["datasets"])
            raise WrongInput(f'unknown dataset "{name}"{nearest(name, known)}')
        if not Path(source).is_file():
            raise WrongInput(f"{source} is not there")
        report(convert(Path(source), Path(target), rules(name, Path(source))), Path(target))
        return
    folder = source_folder()
    tasks = arguments.tasks.replace(",", " ").split() or list(sources()["tasks"])
    for task in tasks:
        if task not in sources()["tasks"]:
            raise WrongInput(f'unknown task "{task}"{nearest(task, list(sources()["tasks"]))}')
    print(f"data       from {shown(folder)}" + (" (examples)" if folder == SAMPLE else ""))
    for task in tasks:
        convert_task(task, folder)


if __name__ == "__main__":
    main()
