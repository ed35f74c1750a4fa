"""Divides rows by prompt: which of them validate, and which of a test set train.

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
    """The prompts that validate, from the number of rows of each prompt, which stay together.

    They are drawn in an order that only the seed and the prompt decide, so a shuffled file gives
    the same ones, and fill the share of the rows to the row, as Axolotl's own split does. A prompt
    with more copies than there is room for is passed over, so on few rows the prompts with many
    copies train. At least one prompt validates, and none where there are fewer than `least`.
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
    """Numbers of the rows of a test set that train, and of those that test.

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
