"""Joins a multi-task training set from the converted training sets of its parts.

    join_parts("reporting_multi", Options())

With the key `equal` (a seed), each part gives as many rows as the smallest has, drawn at random.
The parts' validation rows join in the same way, and their prompts never train.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from tools import sources
from tools.common import write_json
from tools.data.chatfile import Conversion, Options, remove
from tools.data.rows import CHUNK, Batch, Removal, Rules
from tools.data.rules import fingerprint, load_train_rules
from tools.data.turns import join_turns, write_answer

Manifests = dict[Path, dict[str, Any]]  # of converted files


def join_parts(task: str, options: Options) -> dict[str, Any] | str:
    """Writes the joined files; returns the training set's manifest, or the reason for none."""
    spec, target = sources.tables()["tasks"][task], sources.train_path(task)
    parts = {part: sources.train_path(part) for part in spec["parts"]}
    if missing := [part for part, path in parts.items() if not path.is_file()]:
        return f"without a training set: {', '.join(missing)}"
    manifests = {path: sources.manifest(path) for path in parts.values()}
    folders = {part: manifests[path].get("from") for part, path in parts.items()}
    if len(set(folders.values())) > 1:
        return ", ".join(f"{part} is from {folder}" for part, folder in folders.items())
    checks = (manifest.get("label_check") for manifest in manifests.values())
    repairs = (manifest.get("repair") for manifest in manifests.values())
    rules = replace(
        load_train_rules(task, sources.CHAT),
        removals=(),  # already made in the parts
        reason="; ".join(filter(None, repairs)),
        label_check=next(filter(None, checks), None),
    )
    options, shared = replace(options, validation=None), {"from": folders[spec["parts"][0]]}
    validation, tested = join_validation(task, manifests, rules, options)
    if tested:
        reason = "prompts of another part's validation rows"
        removal = Removal(
            "validation", reason, lambda: lambda prompt, _: fingerprint(prompt) in tested
        )
        rules = replace(rules, removals=(removal,))
    manifest = {
        "source": ", ".join(path.name for path in manifests),
        "source_sha256": {part: manifests[path]["sha256"] for part, path in parts.items()},
        **shared,
        **join_rows(manifests, target, rules, spec.get("equal"), options),
        "validation": validation,
    }
    write_json(sources.manifest_path(target), manifest)
    return manifest


def join_validation(
    task: str, parts: Manifests, rules: Rules, options: Options
) -> tuple[dict[str, Any], set[bytes]]:
    """Joins the parts' validation rows; returns the manifest's facts and the prompts' marks."""
    target = sources.val_path(task)
    files = [
        path.with_name(manifest["validation"]["file"])
        for path, manifest in parts.items()
        if (manifest.get("validation") or {}).get("rows")
    ]
    if not files:
        remove(target)
        return {"rows": 0, "reason": "no part has validation rows"}, set()
    manifests = {path: sources.manifest(path) for path in files}
    manifest = {
        "held_out_of": sources.train_path(task).name,
        "source": ", ".join(path.name for path in files),
        "from": next(iter(parts.values())).get("from"),
        **join_rows(
            manifests, target, rules, sources.tables()["tasks"][task].get("equal"), options
        ),
    }
    write_json(sources.manifest_path(target), manifest)
    batches = chain.from_iterable(map(read_chat, files))
    marks = {fingerprint(prompt) for batch in batches for prompt in batch.prompts}
    return {"file": target.name} | {key: manifest[key] for key in ("rows", "sha256")}, marks


def join_rows(
    parts: Manifests, target: Path, rules: Rules, seed: int | None, options: Options
) -> dict[str, Any]:
    """Writes the rows of converted files in turn; with a seed, equally many of each."""
    selected = None
    if seed is not None:
        smallest = min(manifest["rows"] for manifest in parts.values())
        numbers, first = set[int](), 0
        for manifest in parts.values():
            drawn = random.Random(seed).sample(range(manifest["rows"]), smallest)
            numbers.update(first + number for number in drawn)
            first += manifest["rows"]
        selected = frozenset(numbers)
    batches = chain.from_iterable(map(read_chat, parts))
    return Conversion(target, target, rules, selected, options).write(batches)


def read_chat(path: Path) -> Iterator[Batch]:
    """Reads the rows of a converted file."""
    with open(path, "rb") as file:
        number = 1
        while lines := file.readlines(CHUNK):
            chats = [orjson.loads(line)["messages"] for line in lines]
            prompts = [join_turns(row[:-1]) for row in chats]
            answers = [write_answer(row[-1]) for row in chats]
            numbers = list(range(number, number + len(lines)))
            yield Batch(path, len(lines), numbers, lines, prompts, answers, lines)
            number += len(lines)
