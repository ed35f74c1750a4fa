"""Confidence intervals for scores that come from pairs of (expected, answered) labels.

A percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13). Rows that are alike in all
that a score looks at are one cell, and resampling n rows with replacement is drawing the cells'
counts from a multinomial distribution: 10,000 resamples of any number of rows take milliseconds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 20231107

Counts = np.ndarray[Any, Any]  # (resamples, cells)


def cells(rows: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], Counts]:
    """The distinct rows and how often each occurs: k tuples and an int64 array (1, k)."""
    distinct = sorted(set(rows))
    index = {row: number for number, row in enumerate(distinct)}
    counts = np.bincount([index[row] for row in rows], minlength=len(distinct))
    return distinct, counts[None, :]


def resampled(counts: Counts) -> Counts:
    """Bootstrap counts, (RESAMPLES, k), from the counts (1, k) of the rows."""
    total = int(counts.sum())
    generator = np.random.default_rng(SEED)
    return generator.multinomial(total, counts[0] / total, size=RESAMPLES)


def accuracy(pairs: list[tuple[str, ...]], counts: Counts) -> np.ndarray[Any, Any]:
    """Share of rows whose answer is the expected one, for each resample: (resamples,)."""
    right = np.array([expected == answered for expected, answered in pairs])
    return counts[:, right].sum(1) / counts.sum(1)


def f1(pairs: list[tuple[str, ...]], counts: Counts, weighted: bool) -> np.ndarray[Any, Any]:
    """F1 averaged over the labels expected in the rows, by support or evenly: (resamples,).

    F1 of a label = 2·TP / (2·TP + FP + FN), and 0 where that is 0/0, as scikit-learn has it.
    """
    expected = np.array([pair[0] for pair in pairs])
    answered = np.array([pair[1] for pair in pairs])
    scores, support = [], []
    for label in sorted(set(expected)):
        hit = counts[:, (expected == label) & (answered == label)].sum(1)
        both = counts[:, expected == label].sum(1) + counts[:, answered == label].sum(1)
        scores.append(np.divide(2 * hit, both, out=np.zeros(len(counts)), where=both > 0))
        support.append(counts[:, expected == label].sum(1))
    weights = np.stack(support).astype(float) if weighted else np.ones((len(scores), len(counts)))
    return (np.stack(scores) * weights).sum(0) / weights.sum(0)


Score = Callable[[list[tuple[str, ...]], Counts], np.ndarray[Any, Any]]
SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "f1_weighted": lambda pairs, counts: f1(pairs, counts, weighted=True),
    "f1_macro": lambda pairs, counts: f1(pairs, counts, weighted=False),
}


def estimate(score: str, expected: list[str], answered: list[str]) -> dict[str, float]:
    """A score and its 95 % interval: {"value", "low", "high"}."""
    pairs, counts = cells(list(zip(expected, answered, strict=True)))
    return _with_interval(SCORES[score](pairs, counts), SCORES[score](pairs, resampled(counts)))


def difference(
    score: str, expected: list[str], first: list[str], second: list[str]
) -> dict[str, float]:
    """Score of `second` minus score of `first` on the same rows, with a paired 95 % interval."""
    triples, counts = cells(list(zip(expected, first, second, strict=True)))
    of_first = [(row[0], row[1]) for row in triples]
    of_second = [(row[0], row[2]) for row in triples]

    def gain(counts: Counts) -> np.ndarray[Any, Any]:
        return SCORES[score](list(of_second), counts) - SCORES[score](list(of_first), counts)

    return _with_interval(gain(counts), gain(resampled(counts)))


def _with_interval(point: Any, sampled: Any) -> dict[str, float]:
    low, high = np.percentile(sampled, [2.5, 97.5])
    return {"value": float(point[0]), "low": float(low), "high": float(high)}
