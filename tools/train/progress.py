"""Reads a run's `progress.jsonl`, which a training may be writing, without reading all of it again.

`Tail` returns what was added since the last call, `read_last_step` the newest optimizer step.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 16  # bytes read at a time from the end: some hundred lines


def parse_rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """The rows of whole lines; a line that a crash of the machine left unreadable is skipped."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


class Tail:
    """The rows that a growing JSONL file gained, call by call.

    A last line without its end is left for the next call. A file that was replaced or cut is read
    from its start: a resumed training leaves out the steps after its checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[bytes] | None = None  # kept open, so that no other file gets its inode number
        self.offset = 0
        self.last_line = b""

    def read(self) -> list[dict[str, Any]]:
        try:
            current = os.stat(self.path)
            if self.file is None or not os.path.samestat(current, os.fstat(self.file.fileno())):
                self.close()
                self.file = open(self.path, "rb")  # noqa: SIM115
            self.file.seek(self.offset - len(self.last_line))
            if self.file.read(len(self.last_line)) != self.last_line:
                self.offset, self.last_line = 0, b""
                self.file.seek(0)
            added = self.file.read()
        except OSError:  # not written yet, or being replaced: the next call reads it
            return []
        lines = added[: added.rfind(b"\n") + 1].splitlines(keepends=True)
        self.offset += sum(map(len, lines))
        self.last_line = lines[-1] if lines else self.last_line
        return list(parse_rows(lines))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file, self.offset, self.last_line = None, 0, b""


def read_last_step(path: Path) -> dict[str, Any]:
    """The newest row that has a loss, read from the end of the file; {} where there is none."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return {}
    with file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start > 0:
            size = min(BLOCK, start)
            start -= size
            file.seek(start)
            rest = file.read(size) + rest
            # The first line may have begun in the block before, the last may not have ended.
            lines = rest[: rest.rfind(b"\n") + 1].splitlines()[1 if start else 0 :]
            for row in parse_rows(lines[::-1]):
                if "loss" in row:
                    return row
    return {}
