"""Turns FinLoRA's rows into chat rows that Axolotl and lm-eval read.

    python -m tools.data.convert                          every task of data/sources.yaml
    python -m tools.data.convert sentiment                one task: its training set and its test sets
    python -m tools.data.convert --recipe NAME            a recipe's task, with its tokens counted
    python -m tools.data.convert --dataset fpb IN OUT     one file by the rules of one dataset

    {"context": "… Answer: ", "target": "neutral"}
 →  {"messages": [{"role": "user", "content": "… Answer:"},
                  {"role": "assistant", "content": "neutral"}]}

The prompt loses its outer white space and nothing else; rows stay in the order of the source.
Beside OUT stands OUT.manifest.json: source, digests, row counts, labels, repairs and tokens. A row
that breaks a rule is named by file and line. It stops the conversion, and nothing is then written;
with ON_ERROR=quarantine it is kept in OUT.refused.jsonl and the conversion goes on.

A task's training set is split by prompt: `<task>_train.jsonl` and `<task>_val.jsonl`. Where labels
may be swapped, tools/data/swap.py decides from the file; REPAIR=0 or REPAIR=1 decides by hand.
"""

import hashlib
import math
import os
import queue
import random
import re
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import orjson

from tools import sources
from tools.common import (
    JobFailed,
    WrongInput,
    atomic,
    git_blob,
    naming,
    nearest,
    shown,
    write_json,
)
from tools.data.rows import CHUNK, MAX_LINE, Batch, Removal, Rules, Test, batches
from tools.data.rows import row as row

if TYPE_CHECKING:
    from tools.data.lengths import Lengths

UNCOUNTED = "not counted: no recipe was named (make data RECIPE=… counts with its tokenizer)"


# ---- The rules of a dataset and of a task's training set


def rules(dataset: str, source: Path, how: "How | None" = None) -> Rules:
    """The rules of one dataset. Its repair applies to the published file; in another file of the
    dataset, and in a test file of the user's own, the rows decide.
    """
    spec = sources.tables()["datasets"][dataset]
    rule = Rules(frozenset(spec.get("labels", ())))
    repair = spec.get("repair")
    if repair and git_blob(source) == repair["blob"]:
        text = f"repaired: {repair['reason'].strip().removesuffix('.')}"
        check = {"outcome": "repaired", "text": text}
        return replace(rule, relabel=repair["relabel"], reason=repair["reason"], label_check=check)
    if repair or Path(spec["file"]).is_absolute():
        return check_labels(source, rule, how or DEFAULT, mixed=not repair)
    return rule


def check_labels(source: Path, rule: Rules, how: "How", mixed: bool) -> Rules:
    """A file's rules with the repair that its rows call for, see tools/data/swap.py."""
    relabel = sources.tables()["swap"]["relabel"]
    ours = source.resolve().is_relative_to(
        sources.SAMPLE.resolve()
    )  # the examples follow no source
    if ours or rule.labels and not relabel.keys() <= rule.labels:
        return rule
    from tools.data import swap

    return swap.check(source, rule, how.repair, how.quarantine, mixed)


def train_rules(task: str, folder: Path) -> Rules:
    """The rules of a task's training set: the labels of all its datasets, and its repairs."""
    spec = sources.tables()["tasks"][task]
    labels = [
        frozenset(sources.tables()["datasets"][name].get("labels", ())) for name in spec["eval"]
    ]
    removals = tuple(
        Removal(kind, repair["reason"], partial(REMOVALS[kind], repair[kind], folder))
        for repair in spec.get("repairs", ())
        for kind in repair.keys() & REMOVALS.keys()
    )
    return Rules(
        frozenset().union(*labels) if all(labels) else frozenset(),
        removals=removals,
        cut=spec.get("cut_long_prompts") == "middle",
    )


def without_rows_of(datasets: list[str], folder: Path) -> Test | str:
    """Tests whether a prompt stands in a test set, but for case and white space."""
    paths = [folder / sources.tables()["datasets"][name]["file"] for name in datasets]
    if missing := [path for path in paths if not path.is_file()]:
        return f"not looked for: {missing[0].name} is not at hand"
    prompts = chain.from_iterable(batch.prompts for path in paths for batch in batches(path))
    tested = {fingerprint(prompt) for prompt in prompts}
    return lambda prompt, answer: fingerprint(prompt) in tested


def unique(wanted: bool, folder: Path) -> Test:
    """Tests whether a prompt stood before; holds 16 bytes of each prompt."""
    seen: set[bytes] = set()

    def again(prompt: str, answer: str) -> bool:
        mark = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
        known = len(seen)
        seen.add(mark)
        return wanted and len(seen) == known

    return again


def without_prompts(pattern: str, folder: Path) -> Test:
    search = re.compile(pattern).search
    return lambda prompt, answer: search(prompt)


def without_answers(pattern: str, folder: Path) -> Test:
    search = re.compile(pattern).search
    return lambda prompt, answer: search(answer)


REMOVALS: dict[str, Callable[[Any, Path], Test | str]] = {
    "without_rows_of": without_rows_of,
    "unique": unique,
    "without_prompts": without_prompts,
    "without_answers": without_answers,
}


def fingerprint(prompt: str) -> bytes:
    """16 bytes that tell prompts apart, but for case and white space."""
    return hashlib.blake2b(" ".join(prompt.lower().split()).encode(), digest_size=16).digest()


# ---- Writing


@contextmanager
def hashing() -> Iterator[Callable[[Any, bytes], None]]:
    """Yields `update(sha, block)`, which hashes in a thread, where there is a second core for it.

    The queue is short, so memory stays constant; the sums are complete once the context ends.
    """
    if len(os.sched_getaffinity(0)) == 1:
        yield lambda sha, block: sha.update(block)
        return
    blocks: queue.Queue[tuple[Any, bytes] | None] = queue.Queue(8)

    def work() -> None:
        while entry := blocks.get():
            entry[0].update(entry[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield lambda sha, block: blocks.put((sha, block))
    finally:
        blocks.put(None)
        thread.join()


@dataclass(frozen=True)
class How:
    """What a conversion does with refused rows and with tokens.

    `lengths` counts tokens, or says why none are counted. Where it has a sequence length, a longer
    row breaks a rule if rows are to be `bounded`: training rows are, test rows are not.
    `validation` names the file that takes the prompts which are held out, where any are. `repair`
    decides by hand whether labels are swapped; None leaves it to tools/data/swap.py.
    """

    quarantine: bool = False
    lengths: "Lengths | str" = UNCOUNTED
    bounded: bool = True
    validation: Path | None = None
    repair: bool | None = None


DEFAULT = How()


def convert(
    source: Path,
    target: Path,
    rule: Rules,
    rows: frozenset[int] | None = None,
    how: How = DEFAULT,
) -> dict[str, Any]:
    """Writes the chat rows of `source` to `target` and a manifest beside it, which it returns.

    `rows` picks rows by their number from 0; without it all are written. A row that breaks a rule
    raises WrongInput, or is kept beside the target where `how` says so.
    """
    if not source.is_file():
        raise WrongInput(f"{shown(source)} is not there")
    if target.resolve() == source.resolve():
        raise WrongInput(f"{shown(source)} would be overwritten; name another file for the output")
    sha = hashlib.sha256()
    with hashing() as update:
        found = batches(source, rule, lambda block: update(sha, block))
        counts = write(found, source, target, rule, rows, how, update)
    known = {
        "source": "/".join(source.parts[-2:]),
        "from": sources.origin(source),
        "source_sha256": sha.hexdigest(),
    }
    return finish(target, known | counts)


def write(
    found: Iterable[Batch],
    source: Path,
    target: Path,
    rule: Rules,
    rows: frozenset[int] | None,
    how: How,
    update: Callable[[Any, bytes], None],
) -> dict[str, Any]:
    """Writes batches of rows to `target` and returns what the manifest tells of them."""
    sha, labels, counts, removed = hashlib.sha256(), Counter[str](), Counter[str](), Counter[str]()
    tests = [(removal, removal.start()) for removal in rule.removals]
    tally = None if isinstance(how.lengths, str) else how.lengths.fresh()
    first, copies = None, Counter[bytes]()
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target), ExitStack() as files:
        out: IO[bytes]
        if how.validation:
            out = files.enter_context(TemporaryFile(dir=target.parent))
        else:
            out = files.enter_context(atomic(target))
        aside = None
        for batch in found:
            counts["rows_in"] += batch.read
            if rows is not None:
                start, count = counts["numbered"], len(batch.chat)
                counts["numbered"] += count
                batch = batch.only([number in rows for number in range(start, start + count)])
                counts["not_selected"] += count - len(batch.chat)
            for removal, test in tests:
                if not isinstance(test, str):
                    kept = [not each for each in map(test, batch.prompts, batch.answers)]
                    removed[removal.kind] += kept.count(False)
                    batch = batch.only(kept)
            if tally:
                batch = tally.measured(batch, rule.cut, how.bounded)
            if batch.refused:
                if not how.quarantine:
                    batch.stop_at_first()
                aside = aside or files.enter_context(atomic(sources.refused_path(target)))
                batch.refused.sort()
                first = first or batch.refused[0]
                counts["refused"] += len(batch.refused)
                for refusal in batch.refused:
                    aside.write(refused_row(batch.source, *refusal))
            chat = b"".join(batch.chat)
            out.write(chat)
            counts["rows"] += len(batch.chat)
            if how.validation:
                copies.update(map(fingerprint, batch.prompts))
                continue
            update(sha, chat)
            if rule.labels:
                labels.update(batch.answers)
        if counts["rows"] == 0:
            why = f" that can be used; the first, line {first[0]}: {first[1]}" if first else ""
            raise WrongInput(f"{shown(source)} holds no rows{why}")
        gone = counts["refused"] + counts["not_selected"] + removed.total()
        if counts["rows_in"] != counts["rows"] + gone:
            raise JobFailed(
                f"{shown(source)}: {counts['rows_in']} rows were read, {counts['rows']} written "
                f"and {gone} left out; that does not add up, and nothing is written"
            )
        held: dict[str, Any] | None = None
        if how.validation:
            marks = draw_validation(copies)
            sides = [files.enter_context(atomic(target)), None]
            if marks:
                sides[1] = files.enter_context(atomic(how.validation))
            (sha, labels), (held_sha, held_labels) = divide(out, marks, sides, bool(rule.labels))
            held_rows = sum(copies[mark] for mark in marks)
            counts["rows"] -= held_rows
            held = {"rows": held_rows, "prompts": len(marks)}
            if marks:
                held |= {"file": how.validation.name, "sha256": held_sha.hexdigest()}
                held |= {"labels": dict(sorted(held_labels.items()))}
            else:
                least = sources.tables()["validation"]["least"]
                held["reason"] = f"{len(copies)} prompts are too few: {least} are needed"
    if not aside:
        sources.refused_path(target).unlink(missing_ok=True)
    if how.validation and held and not held["rows"]:
        remove(how.validation)
    return {
        "sha256": sha,
        **{name: counts[name] for name in ("rows_in", "rows", "refused", "not_selected")},
        "removed": [
            {"repair": removal.kind, "reason": removal.reason}
            | ({"note": test} if isinstance(test, str) else {"rows": removed[removal.kind]})
            for removal, test in tests
        ],
        "labels": dict(sorted(labels.items())),
        "selected": None if rows is None else f"{len(rows)} chosen rows",
        "repair": rule.reason or None,
        "label_check": rule.label_check,
        "validation": held,
        "tokens": tally.summary() if tally else how.lengths,
    }


def draw_validation(copies: Counter[bytes]) -> set[bytes]:
    """The prompts that validate, of the number of rows of each prompt; all rows of one go along.

    They are drawn in an order that only the seed and the prompt decide, so a shuffled file gives
    the same ones, and fill the share of the rows to the row, as Axolotl's own split does. A prompt
    with more copies than there is room for is passed over, so on few rows the prompts with many
    copies train. At least one prompt is held out, and none where there are fewer than `least`.
    """
    spec = sources.tables()["validation"]
    if len(copies) < spec["least"]:
        return set()
    key = str(spec["seed"]).encode()
    order = sorted(copies, key=lambda mark: hashlib.blake2b(mark, key=key).digest())
    room, held = math.ceil(spec["share"] * copies.total()), set[bytes]()
    for mark in order:
        if copies[mark] <= room:
            held.add(mark)
            room -= copies[mark]
        if not room:
            break
    return held or {min(order, key=copies.__getitem__)}


def divide(
    rows: IO[bytes], held: set[bytes], sides: Sequence[IO[bytes] | None], labelled: bool
) -> list[tuple[Any, Counter[str]]]:
    """Writes chat rows to the two sides, those of `held` prompts to the second.

    Returns the SHA-256 and the labels of each side.
    """
    facts = [(hashlib.sha256(), Counter[str]()) for _ in sides]
    rows.seek(0)
    for line in rows:
        prompt, answer = (turn["content"] for turn in orjson.loads(line)["messages"])
        side = bool(held) and fingerprint(prompt) in held
        file, (sha, labels) = sides[side], facts[side]
        assert file
        file.write(line)
        sha.update(line)
        if labelled:
            labels[answer] += 1
    return facts


def refused_row(source: Path, number: int, reason: str, line: bytes) -> bytes:
    """A line of the file of refused rows: the row as text, or in Base64 where it is not UTF-8."""
    content: dict[str, Any] = {"file": source.name, "line": number, "reason": reason}
    if len(line) > MAX_LINE:
        content["only_first_bytes"] = 1000
        line = line[:1000]
    try:
        content["text"] = line.decode()
    except UnicodeDecodeError:
        content["base64"] = b64encode(line).decode()
    return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def finish(target: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a converted file and returns it."""
    content["sha256"] = content["sha256"].hexdigest()
    held = content.get("validation")
    if held and held["rows"]:
        about = {key: content[key] for key in ("source", "from", "repair", "label_check")}
        write_json(
            sources.manifest_path(target.with_name(held["file"])),
            {"held_out_of": target.name, **about, **held},
        )
    write_json(sources.manifest_path(target), content)
    return content


def join(task: str, how: How) -> dict[str, Any] | str:
    """Builds a multi-task training set from its parts' chat rows; a text says why it cannot.

    With the key `equal`, each part gives as many rows as the smallest has, drawn with that seed.
    The parts' validation rows join in the same way, and a prompt of theirs never trains.
    """
    spec, target = sources.tables()["tasks"][task], sources.train_path(task)
    told = {
        part: sources.manifest(sources.train_path(part))
        for part in spec["parts"]
        if sources.train_path(part).is_file()
    }
    whence = {part: content.get("from") for part, content in told.items()}
    if missing := [part for part in spec["parts"] if part not in told]:
        return f"without a training set: {', '.join(missing)}"
    if len(set(whence.values())) > 1:
        return ", ".join(f"{part} is from {folder}" for part, folder in whence.items())
    checks = [content.get("label_check") for content in told.values()]
    rule = replace(
        train_rules(task, sources.CHAT),
        removals=(),  # the parts have had theirs
        reason="; ".join(filter(None, (content.get("repair") for content in told.values()))),
        label_check=next(filter(None, checks), None),
    )
    held = {
        sources.val_path(part): sources.manifest(sources.val_path(part))
        for part, content in told.items()
        if (content.get("validation") or {}).get("rows")
    }
    shared = {"from": whence[spec["parts"][0]]}
    validation: dict[str, Any] = {"rows": 0, "reason": "no part has validation rows"}
    if held:
        path = sources.val_path(task)
        known = {"held_out_of": target.name, "source": ", ".join(p.name for p in held)}
        counts = write_joined(held, path, rule, spec.get("equal"), replace(how, validation=None))
        content = finish(path, known | shared | counts)
        validation = {"file": path.name, "rows": content["rows"], "sha256": content["sha256"]}
        tested = {
            fingerprint(prompt) for p in held for b in chat_batches(p) for prompt in b.prompts
        }
        reason = "prompts of another part's validation rows"
        test: Test = lambda prompt, answer: fingerprint(prompt) in tested  # noqa: E731
        rule = replace(rule, removals=(Removal("validation", reason, lambda: test),))
    else:
        remove(sources.val_path(task))
    files = {sources.train_path(part): content for part, content in told.items()}
    counts = write_joined(files, target, rule, spec.get("equal"), replace(how, validation=None))
    about = {
        "source": ", ".join(path.name for path in files),
        "source_sha256": {part: content["sha256"] for part, content in told.items()},
    }
    content = about | shared | counts
    content["sha256"] = content["sha256"].hexdigest()
    content["validation"] = validation
    write_json(sources.manifest_path(target), content)
    return content


def write_joined(
    files: dict[Path, dict[str, Any]], target: Path, rule: Rules, equal: int | None, how: How
) -> dict[str, Any]:
    """Writes the rows of converted files one after the other, `equal` of each if it is a seed.

    `files`: their manifests. Returns what `write` does.
    """
    smallest = min(content["rows"] for content in files.values())
    chosen, first = set[int](), 0
    for content in files.values():
        draw = random.Random(equal)
        chosen.update(first + n for n in draw.sample(range(content["rows"]), smallest))
        first += content["rows"]
    rows = None if equal is None else frozenset(chosen)
    found = chain.from_iterable(map(chat_batches, files))
    with hashing() as update:
        return write(found, target, target, rule, rows, how, update)


def chat_batches(chat: Path) -> Iterator[Batch]:
    """The rows of a converted file."""
    with open(chat, "rb") as file:
        first = 1
        while lines := file.readlines(CHUNK):
            turns = [orjson.loads(line)["messages"] for line in lines]
            prompts, answers = ([row[n]["content"] for row in turns] for n in (0, 1))
            numbers = range(first, first + len(lines))
            yield Batch(chat, numbers, lines, prompts, answers, lines, [], len(lines))
            first += len(lines)


# ---- Tasks


def convert_task(task: str, folder: Path, how: How = DEFAULT) -> None:
    """Converts a task's training set and test sets; what has no source is removed and named.

    The test sets of a multi-task set are converted with the tasks that are its parts.
    """
    spec = sources.tables()["tasks"][task]
    train, split = folder / spec["train"], spec.get("without_train")
    left: dict[str, frozenset[int]] = {}
    trains = replace(how, validation=sources.val_path(task))
    if train.is_file():
        rule = check_labels(train, train_rules(task, folder), how, mixed=True)
        content = convert(train, sources.train_path(task), rule, how=trains)
        report(content, sources.train_path(task))
    elif (
        split
        and (source := folder / sources.tables()["datasets"][split["split"]]["file"]).is_file()
    ):
        picked, left[split["split"]] = halves(source, train.name, **split)
        rule = rules(split["split"], source, how)
        content = convert(source, sources.train_path(task), rule, picked, trains)
        report(content, sources.train_path(task))
    elif "parts" not in spec:
        absent(sources.train_path(task), train.name)
    elif isinstance(result := join(task, how), str):
        absent(sources.train_path(task), train.name, result)
    else:
        report(result, sources.train_path(task))
    if "parts" in spec:
        return
    tests = replace(how, bounded=False)
    for name in spec["eval"]:
        source = folder / sources.tables()["datasets"][name]["file"]
        if source.is_file():
            target = sources.test_path(name)
            rule = rules(name, source, how)
            report(convert(source, target, rule, left.get(name), tests), target)
        else:
            absent(sources.test_path(name), source.name)


def halves(
    source: Path, train: str, split: str, rows: int, seed: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the rows of a test set that train in place of a missing file, and that test.

    No prompt is in both. Holds 16 bytes of each prompt.
    """
    found = batches(source, rules(split, source))
    prompts = [fingerprint(prompt) for batch in found for prompt in batch.prompts]
    if len(prompts) <= rows:
        raise WrongInput(
            f"{shown(source)} has {len(prompts)} rows; {rows} of them train in place of {train}, "
            "and some must be left to test on"
        )
    picked = frozenset(random.Random(seed).sample(range(len(prompts)), rows))
    seen = {prompts[number] for number in picked}
    return picked, frozenset(n for n, prompt in enumerate(prompts) if prompt not in seen)


def absent(target: Path, file: str, why: str = "") -> None:
    """Removes what an earlier conversion from other data left, so that two are never mixed."""
    remove(target)
    if target.name.endswith("_train.jsonl"):
        remove(target.with_name(target.name.removesuffix("_train.jsonl") + "_val.jsonl"))
    also = f", nor can its parts be joined: {why}" if why else ""
    print(f"data       {target.name:<32} left out: {file} is not at hand{also}")


def remove(target: Path) -> None:
    """Removes a converted file and what stands beside it."""
    for path in (target, sources.manifest_path(target), sources.refused_path(target)):
        path.unlink(missing_ok=True)


def report(manifest: dict[str, Any], target: Path) -> None:
    labels = ", ".join(f"{count} {label}" for label, count in manifest["labels"].items())
    notes = ["repaired"] if manifest["repair"] else []
    notes += [f"{r['rows']} taken out: {r['repair']}" for r in manifest["removed"] if r.get("rows")]
    notes += [f"{r['repair']} {r['note']}" for r in manifest["removed"] if "note" in r]
    if manifest["refused"]:
        notes.append(f"{manifest['refused']} refused: {shown(sources.refused_path(target))}")
    told = "; ".join(filter(None, [labels[:70], *notes]))
    print(f"data       {target.name:<32} {manifest['rows']:>6} rows  {told}".rstrip())
    if held := manifest.get("validation"):
        if held["rows"]:
            print(f"           validation, other prompts: {held['rows']:,} rows in {held['file']}")
        else:
            print(f"           no validation rows: {held['reason']}")
    if check := manifest.get("label_check"):
        print(f"           {check['text']}")
    if isinstance(tokens := manifest["tokens"], dict):
        parts = []
        for name in ("prompt", "answer"):
            parts.append(name + " {min} … {median} … {p95} … {max}".format(**tokens[name]))
        if over := tokens["over"]:
            parts.append("{rows} rows over {sequence_len}".format(**(tokens | over)))
            parts += [f"{over['cut']} prompts cut"] if over["cut"] else []
        print(f"           tokens: {', '.join(parts)}")


def convert_tasks(
    tasks: list[str],
    recipe: str | None = None,
    quarantine: bool = False,
    repair: bool | None = None,
) -> None:
    """Converts tasks by name: those named, else the recipe's, else all. See `How` for the rest."""
    lengths, own_task = lengths_of(recipe)
    if recipe and isinstance(lengths, str):
        print(f"data       tokens are {lengths}")
    how = How(quarantine, lengths, repair=repair)
    known = sources.tables()["tasks"]
    tasks = tasks or ([own_task] if own_task else list(known))
    for name in tasks:
        if name not in known:
            raise WrongInput(f'unknown task "{name}"{nearest(name, list(known))}')
    said = None
    for name in dict.fromkeys(part for t in tasks for part in [*known[t].get("parts", ()), t]):
        folder = sources.source_folder(name)
        joined = "parts" in known[name] and not (folder / known[name]["train"]).is_file()
        own = Path(known[name]["train"])
        place = own.parent if own.is_absolute() else folder
        if place != said and not joined:
            examples = " (examples)" if place == sources.SAMPLE else ""
            print(f"data       from {shown(place)}{examples}")
            said = place
        convert_task(name, folder, how)


def convert_file(dataset: str, source: Path, target: Path, how: How = DEFAULT) -> None:
    """Converts one file by the rules of one dataset and prints what came of it."""
    known = list(sources.tables()["datasets"])
    if dataset not in known:
        raise WrongInput(f'unknown dataset "{dataset}"{nearest(dataset, known)}')
    if not source.is_file():
        raise WrongInput(f"{source} is not there")
    report(convert(source, target, rules(dataset, source, how), how=how), target)


def lengths_of(
    recipe: str | None, tokenizer: str | None = None, sequence_len: int | None = None
) -> "tuple[Lengths | str, str | None]":
    """What counts tokens, or why they are not counted, and the recipe's task.

    `tokenizer` (a folder) and `sequence_len` (tokens) go before those of the recipe.
    """
    if not recipe and not tokenizer:
        return UNCOUNTED, None
    from tools import recipes
    from tools.data import lengths
    from tools.prompts import changes_tokenizer

    found = recipes.find(recipe) if recipe else None
    config = found.config if found else {}
    base = tokenizer or config.get("tokenizer_config") or config["base_model"]
    counts: Lengths | str | None = lengths.load(base, sequence_len or config.get("sequence_len"))
    if found and isinstance(counts, lengths.Lengths) and changes_tokenizer(config):
        from tools.models import load_tokenizer

        counts.tokenizer = load_tokenizer(config)
    if tokenizer and not counts:
        raise WrongInput(f"{tokenizer} holds no tokenizer")
    counts = counts or f"not counted: the tokenizer of {base} is not at hand"
    return counts, found.task if found else None
