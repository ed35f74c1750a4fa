"""Writes a chat file and its manifest.

    convert_rows(source, target, load_test_rules("fpb", source))

    {"context": "… Answer: ", "target": "neutral"}
 →  {"messages": [{"role": "user", "content": "… Answer:"},
                  {"role": "assistant", "content": "neutral"}]}

Prompts lose their outer white space; rows keep their order. TARGET.manifest.json beside TARGET
holds source, digests, row counts, labels, repairs and tokens. A row that breaks a rule is named by
file and line. It stops the conversion, and nothing is written; with `quarantine` it goes to
TARGET.refused.jsonl and the conversion continues.
"""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import orjson

from tools import sources
from tools.common import WrongInput, atomic, digest, naming, shown, write_json
from tools.data.rows import MAX_LINE, NO_RULES, Batch, Refusals, Rules, read_batches
from tools.data.rules import fingerprint
from tools.data.split import draw_validation
from tools.data.turns import join_turns

if TYPE_CHECKING:
    from tools.data.lengths import Lengths

UNCOUNTED = "not counted: no recipe was named (make data RECIPE=… counts with its tokenizer)"


@dataclass(frozen=True)
class Options:
    """What a conversion does with rows that break a rule, and with tokens."""

    quarantine: bool = False
    lengths: "Lengths | str" = UNCOUNTED  # counts tokens, or says why none are counted
    bounded: bool = True  # a row over the sequence length breaks a rule, as in training sets
    validation: Path | None = None  # takes the held-out prompts
    mark: Callable[[str], bytes] = fingerprint  # of what stays together when they are drawn
    repair: bool | None = None  # whether labels are swapped; None leaves it to tools/data/swap.py


DEFAULT = Options()


def convert_rows(
    source: Path,
    target: Path,
    rules: Rules = NO_RULES,
    rows: frozenset[int] | None = None,
    options: Options = DEFAULT,
) -> dict[str, Any]:
    """Writes the chat rows of `source` to `target`; writes and returns the manifest.

    `rows` selects rows by their number from 0. Raises WrongInput for a row that breaks a rule,
    unless the options put it aside.
    """
    if not source.is_file():
        raise WrongInput(f"{shown(source)} is not there")
    if target.resolve() == source.resolve():
        raise WrongInput(f"{shown(source)} would be overwritten; name another file for the output")
    with ThreadPoolExecutor(1) as thread:  # a second core computes the digest
        sha = thread.submit(digest, source)
        counts = Conversion(source, target, rules, rows, options).write(read_batches(source, rules))
    manifest = {
        "source": "/".join(source.parts[-2:]),
        "from": sources.origin(source),
        "source_sha256": sha.result(),
        **counts,
    }
    held_out = manifest["validation"]
    if held_out and held_out["rows"]:
        facts = {key: manifest[key] for key in ("source", "from", "repair", "label_check")}
        path = sources.manifest_path(target.with_name(held_out["file"]))
        write_json(path, {"held_out_of": target.name, **facts, **held_out})
    write_json(sources.manifest_path(target), manifest)
    return manifest


class ChatFile:
    """An open chat file, with the digest and the label counts of its rows."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.labels = file, hashlib.sha256(), Counter[str]()

    def add(self, chat: bytes, labels: Iterable[str]) -> None:
        self.file.write(chat)
        self.sha.update(chat)
        self.labels.update(labels)

    def describe(self) -> dict[str, Any]:
        return {"sha256": self.sha.hexdigest(), "labels": dict(sorted(self.labels.items()))}


@dataclass
class Conversion:
    """Writes rows into one chat file and counts what becomes of each."""

    source: Path  # as messages name it
    target: Path
    rules: Rules
    rows: frozenset[int] | None = None
    options: Options = DEFAULT
    counts: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    first_refused: tuple[int, str, bytes] | None = None
    repairs: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.removals = [(removal, removal.start()) for removal in self.rules.removals]
        lengths = self.options.lengths
        self.lengths = None if isinstance(lengths, str) else lengths.copy_empty()

    def write(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Writes the rows and returns what the manifest says of them."""
        target, validation = self.target, self.options.validation
        refused_path = sources.refused_path(target)
        copies, held_out = Counter[bytes](), None
        target.parent.mkdir(parents=True, exist_ok=True)
        with naming(target), ExitStack() as files:
            file = TemporaryFile(dir=target.parent) if validation else atomic(target)  # noqa: SIM115
            chat_file = ChatFile(files.enter_context(file))
            refused_file = None
            refusals = Refusals(shown(self.source))
            for batch in map(self.select, batches):
                self.repairs += batch.repairs
                if batch.refused and not self.options.quarantine:
                    for number, reason, _ in sorted(batch.refused):
                        refusals.add(f"line {number}", reason)
                elif batch.refused:
                    refused_file = refused_file or files.enter_context(atomic(refused_path))
                    self.put_aside(batch, refused_file)
                self.counts["rows"] += len(batch.chat)
                if validation:
                    copies.update(map(self.options.mark, batch.prompts))
                chat_file.add(b"".join(batch.chat), batch.answers if self.rules.labels else ())
            refusals.stop()
            if not self.counts["rows"]:
                first, why = self.first_refused, ""
                if first:
                    why = f" that can be used; the first, line {first[0]}: {first[1]}"
                raise WrongInput(f"{shown(self.source)} holds no rows{why}")
            if validation:
                chat_file, held_out = self.hold_out(chat_file.file, copies, files)
                self.counts["rows"] -= held_out["rows"]
        if not refused_file:
            refused_path.unlink(missing_ok=True)
        if validation and held_out and not held_out["rows"]:
            remove(validation)
        return self.describe(chat_file, held_out)

    def select(self, batch: Batch) -> Batch:
        """Selects the rows that are written; rows that are too long become refused."""
        self.counts["rows_in"] += batch.rows_in
        if self.rows is not None:
            start, count = self.counts["numbered"], len(batch.chat)
            self.counts["numbered"] += count
            batch = batch.select([number in self.rows for number in range(start, start + count)])
            self.counts["not_selected"] += count - len(batch.chat)
        for removal, test in self.removals:
            if not isinstance(test, str):
                mask = [not test(*row) for row in zip(batch.prompts, batch.answers, strict=True)]
                self.removed[removal.kind] += mask.count(False)
                batch = batch.select(mask)
        if self.rules.reword:
            batch = batch.reword(self.rules.reword)
        if self.lengths:
            batch = self.lengths.check(batch, self.rules.cut, self.options.bounded)
        return batch

    def put_aside(self, batch: Batch, file: IO[bytes]) -> None:
        """Writes the refused rows: as text, or in Base64 if they are not UTF-8."""
        batch.refused.sort()
        self.first_refused = self.first_refused or batch.refused[0]
        self.counts["refused"] += len(batch.refused)
        for number, reason, line in batch.refused:
            row: dict[str, Any] = {"file": batch.source.name, "line": number, "reason": reason}
            if len(line) > MAX_LINE:
                row["only_first_bytes"] = 1000
                line = line[:1000]
            try:
                row["text"] = line.decode()
            except UnicodeDecodeError:
                row["base64"] = b64encode(line).decode()
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def hold_out(
        self, rows: IO[bytes], copies: Counter[bytes], files: ExitStack
    ) -> tuple[ChatFile, dict[str, Any]]:
        """Divides chat rows into a training and a validation file.

        `copies` counts the rows of each prompt. Returns the training file, and what the manifest
        says of the validation file.
        """
        validation, marks = self.options.validation, draw_validation(copies)
        assert validation
        paths = [self.target, validation] if marks else [self.target]
        sides = [ChatFile(files.enter_context(atomic(path))) for path in paths]
        rows.seek(0)
        for line in rows:
            *before, last = orjson.loads(line)["messages"]
            side = sides[self.options.mark(join_turns(before)) in marks]
            side.add(line, [last["content"]] if self.rules.labels else ())
        held_out = {"rows": sum(copies[mark] for mark in marks), "prompts": len(marks)}
        if marks:
            return sides[0], {**held_out, "file": validation.name, **sides[1].describe()}
        least = sources.tables()["validation"]["least"]
        reason = f"{len(copies)} prompts are too few: {least} are needed"
        return sides[0], {**held_out, "reason": reason}

    def describe(self, chat_file: ChatFile, held_out: dict[str, Any] | None) -> dict[str, Any]:
        file = chat_file.describe()
        removed = []
        for removal, test in self.removals:
            result = (
                {"note": test} if isinstance(test, str) else {"rows": self.removed[removal.kind]}
            )
            removed.append({"repair": removal.kind, "reason": removal.reason, **result})
        return {
            "sha256": file["sha256"],
            **{name: self.counts[name] for name in ("rows_in", "rows", "refused", "not_selected")},
            "removed": removed,
            "labels": file["labels"],
            "repairs": dict(self.repairs),
            "selected": None if self.rows is None else f"{len(self.rows)} chosen rows",
            "repair": self.rules.reason or None,
            "label_check": self.rules.label_check,
            "validation": held_out,
            "tokens": self.lengths.summarize() if self.lengths else self.options.lengths,
        }


def remove(target: Path) -> None:
    """Removes a converted file, its manifest and its refused rows."""
    for path in (target, sources.manifest_path(target), sources.refused_path(target)):
        path.unlink(missing_ok=True)
