"""Rows that begin alike as one sequence, in which what they share stands once. No torch here.

    pack = pack_rows([Row(ids, labels, weight), …])      pack.ids, pack.positions, pack.paths

tools/segments.py lets a model attend to a pack; training (tools/train/shared_prefix.py) and scoring
(evals/model.py) compute with packs.
"""

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

SHORTEST = 16  # tokens; sharing fewer costs more in attention than it saves
IGNORED = -100  # the label of a token that is not trained, as transformers has it
# The architectures whose packed rows are tested against padded ones (tests/test_shared_prefix.py).
TESTED = {"llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text"}
# Rotary embeddings whose frequencies do not depend on how long the rows of a batch are.
FIXED_ROPES = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True)
class Row:
    """The tokens that a row's loss depends on."""

    ids: list[int]
    labels: list[int]  # for each token the one that it is trained to predict, or IGNORED
    weight: float  # of each of its labels in the loss

    @property
    def prompt(self) -> int:
        """How many tokens come before the first one that predicts a label; only they are shared."""
        return next(at for at, label in enumerate(self.labels) if label != IGNORED)


@dataclass
class Pack:
    """Rows as one sequence, which is divided into segments: shared beginnings and rows' rests."""

    cached: int = 0  # tokens that all rows begin with and that a cache holds: not in `ids`
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of the segments
    # For each segment the places that it attends to: those before it in its rows, then its own.
    paths: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # for each row the segment that it ends with

    def add(self, row: Row, start: int, end: int, path: list[int]) -> list[int]:
        """Adds tokens `start` to `end` of a row behind a path; returns the path with them."""
        place = self.cached + len(self.ids)
        path = [*path, *range(place, place + end - start)]
        self.ids += row.ids[start:end]
        self.positions += range(start, end)
        self.labels += row.labels[start:end]
        self.weights += [row.weight] * (end - start)
        self.lengths.append(end - start)
        self.paths.append(path)
        return path


def pack_rows(rows: list[Row], cached: int = 0) -> Pack:
    """Packs rows; beginnings of at least SHORTEST tokens that several rows share stand once.

    All rows begin with the `cached` tokens, which come first in each path.
    """
    pack = Pack(cached, ends=[0] * len(rows))

    def add_rows(rows: list[tuple[int, Row]], start: int, path: list[int]) -> None:
        groups: dict[Any, list[tuple[int, Row]]] = {}
        for number, row in rows:
            shareable = start + SHORTEST <= row.prompt
            key = tuple(row.ids[start : start + SHORTEST]) if shareable else number
            groups.setdefault(key, []).append((number, row))
        for group in groups.values():
            number, row = group[0]
            if len(group) == 1:
                pack.ends[number] = len(pack.lengths)
                pack.add(row, start, len(row.ids), path)
                continue
            prompts = (row.ids[start : row.prompt] for _, row in group)
            columns = zip(*prompts, strict=False)
            end = start + sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))
            add_rows(group, end, pack.add(row, start, end, path))

    add_rows(list(enumerate(rows)), cached, list(range(cached)))
    return pack
