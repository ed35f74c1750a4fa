"""Seconds that an interval and a paired test take on 4,000 rows, with 10,000 resamples each.

python -m bench.stats
"""

import random
import time
from collections.abc import Callable
from typing import Any

from evals import stats

ROWS = 4000


def make_values(kind: str, seed: int) -> list[Any]:
    """ROWS values of random answers: right or wrong, a number, a label of 7, or 4 of 300 tags."""
    chance = random.Random(seed)

    def pair(key: int, of: int) -> tuple[str, str]:
        answered = key if chance.random() < 0.7 else chance.randrange(of)
        return str(key), str(answered)

    make: dict[str, Callable[[int], Any]] = {
        "binary": lambda row: float(chance.random() < 0.8),
        "numbers": lambda row: chance.random(),
        "labels": lambda row: [pair(row % 7, 7)],
        "tags": lambda row: [pair((4 * row + n) ** 2 % 300, 300) for n in range(4)],
    }
    return [make[kind](row) for row in range(ROWS)]


def main() -> None:
    stats.compare("accuracy", [0.0, 1.0], [1.0, 1.0])  # imports SciPy
    print(f"{ROWS:,} rows, {stats.RESAMPLES:,} resamples     interval   paired test")
    for metric, kind in (
        *(("accuracy", "binary"), ("token_f1", "numbers"), ("f1_weighted", "labels")),
        *(("f1_macro", "labels"), ("accuracy", "tags"), ("f1_weighted", "tags")),
    ):
        first, second = make_values(kind, 1), make_values(kind, 2)
        start = time.perf_counter()
        stats.estimate(metric, first)
        middle = time.perf_counter()
        stats.compare(metric, first, second)
        end = time.perf_counter()
        print(f"{metric:<12} {kind:<20} {middle - start:8.2f} s {end - middle:10.2f} s")


if __name__ == "__main__":
    main()
