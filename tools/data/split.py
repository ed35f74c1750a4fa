"""Divides rows by prompt into those that train and those that validate or test.

    draw_validation(Counter({mark: rows, …}))     prompts of a training set that validate
    split_test_set(source, rules, 900, seed=42)   rows that train in place of a missing file

All rows of a prompt go to one side.
"""

import hashlib
import math
import random
from collections import Counter
from pathlib import Path

from tools import sources
from tools.common import WrongInput, shown
from tools.data.rows import Rules, read_batches
from tools.data.rules import fingerprint


def draw_validation(copies: Counter[bytes]) -> set[bytes]:
    """Draws the prompts that validate, given the rows of each prompt, which stay together.

    Seed and prompt alone determine the order, so a shuffled file gives the same prompts. They fill
    the share of the rows to the row, as Axolotl's own split does. A prompt with more copies than
    there is room for is skipped, so in small files the prompts with many copies train. At least one
    prompt validates, but none if there are fewer than `least`.
    """
    spec = sources.tables()["validation"]
    if len(copies) < spec["least"]:
        return set()
    key = str(spec["seed"]).encode()
    order = sorted(copies, key=lambda mark: hashlib.blake2b(mark, key=key).digest())
    room, drawn = math.ceil(spec["share"] * copies.total()), set[bytes]()
    for mark in order:
        if copies[mark] <= room:
            drawn.add(mark)
            room -= copies[mark]
        if not room:
            break
    return drawn or {min(order, key=copies.__getitem__)}


def split_test_set(
    source: Path, rules: Rules, rows: int, seed: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the numbers of a test set's rows that train, and of those that test.

    No prompt is in both. Holds 16 bytes of each prompt.
    """
    batches = read_batches(source, rules)
    prompts = [fingerprint(prompt) for batch in batches for prompt in batch.prompts]
    if len(prompts) <= rows:
        raise WrongInput(
            f"{shown(source)} has {len(prompts)} rows; {rows} of them train in place of a missing "
            "training file, and some must be left to test on"
        )
    train = frozenset(random.Random(seed).sample(range(len(prompts)), rows))
    trained = {prompts[number] for number in train}
    return train, frozenset(n for n, prompt in enumerate(prompts) if prompt not in trained)
