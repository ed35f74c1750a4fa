"""Confidence intervals of scores, tests of differences, and what they mean in words.

A metric is a function of what its rows add up to, so one bootstrap serves all (Efron and Tibshirani
1993, chapters 13 and 16). A row's value is one of what evals/tasks/utils.py says:

    a number          its sum and how many there are: a mean
    a list of pairs   (expected, answered): how many agree, and for F1 the hits, the answers and the
                      rows of every label. The pairs of a row stay together in every resample.
    [(share, right)]  the likeliest label's probability, and whether it is right: ECE

Which it is, the metric's name says: `ece`, or `f1_weighted` and `f1_macro` in it, else a mean, and
of numbers that are 0 or 1 where it ends in `accuracy` or `exact_match`. Rows that are alike are one
cell, and a resample is how often each cell was drawn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 20231107
LEVEL = 0.05
# With fewer rows than this, the interval of a rate near one half is wider than ±10 points.
SMALL = 100
CHUNK = 500  # resamples at a time
LOWER_IS_BETTER = ("ece",)
BINS = 15  # of equal width, for ECE
FEW = 200  # cells up to which drawing their counts is faster than drawing rows

Array = np.ndarray[Any, Any]


def cells(*columns: Sequence[Any]) -> tuple[list[tuple[Any, ...]], Array]:
    """The distinct rows of columns of values, and how often each occurs: k tuples, int64 (k,)."""
    frozen = [[_freeze(value) for value in column] for column in columns]
    rows = list(zip(*frozen, strict=True))
    distinct = sorted(set(rows))
    index = {row: number for number, row in enumerate(distinct)}
    return distinct, np.bincount([index[row] for row in rows], minlength=len(distinct))


def _freeze(value: Any) -> Any:
    return tuple(map(tuple, value)) if isinstance(value, list) else float(value)


def resamples(counts: Array) -> Iterator[Array]:
    """RESAMPLES times, how often each of k cells is drawn: int64 arrays (CHUNK, k)."""
    rows, kinds = int(counts.sum()), len(counts)
    generator = np.random.default_rng(SEED)
    cell = np.repeat(np.arange(kinds, dtype=np.int32), counts)
    offset = np.arange(CHUNK, dtype=np.int32)[:, None] * kinds
    for _ in range(RESAMPLES // CHUNK):
        if kinds <= FEW:
            yield generator.multinomial(rows, counts / rows, size=CHUNK)
        else:
            drawn = cell[generator.integers(0, rows, (CHUNK, rows), dtype=np.int32)] + offset
            yield np.bincount(drawn.ravel(), minlength=CHUNK * kinds).reshape(CHUNK, kinds)


def parts(metric: str, values: Sequence[Any]) -> Any:
    """What each of k values adds to the sums that its metric is made from: sparse (k, sums).

    Two columns for a mean; for F1 hits, expected + answered, and expected, of every label that is
    expected somewhere; for ECE, how far confidence goes beyond what is right in each bin, and rows.
    """
    from scipy.sparse import csr_matrix

    if metric == "ece":
        dense = np.zeros((len(values), BINS + 1))
        for row, ((share, right),) in enumerate(values):
            dense[row, min(int(share * BINS), BINS - 1)] = share - right
        dense[:, BINS] = 1
        return csr_matrix(dense)
    if "f1_weighted" not in metric and "f1_macro" not in metric:
        right = [sum(e == a for e, a in v) if isinstance(v, tuple) else v for v in values]
        count = [len(v) if isinstance(v, tuple) else 1 for v in values]
        return csr_matrix(np.array([right, count], dtype=float).T)
    labels = sorted({expected for pairs in values for expected, _ in pairs})
    index = {label: number for number, label in enumerate(labels)}
    width, entries = len(labels), []
    for row, pairs in enumerate(values):
        for expected, answered in pairs:
            at = index[expected]
            entries += [(row, width + at), (row, 2 * width + at)]
            entries += [(row, at)] if expected == answered else []
            entries += [(row, width + index[answered])] if answered in index else []
    rows, columns = zip(*entries, strict=True)
    shape = (len(values), 3 * width)
    return csr_matrix((np.ones(len(entries)), (rows, columns)), shape=shape)  # adds up duplicates


def score(metric: str, sums: Array) -> Array:
    """The metric of each of R rows of sums (R, sums): (R,).

    F1 of a label = 2·TP / (2·TP + FP + FN), and 0 where that is 0/0, as scikit-learn has it;
    averaged by how often a label is expected, or evenly over the labels expected in all rows.
    ECE = Σ over bins of |Σ (confidence - right)| / rows (Guo et al. 2017, equation 3): how far
    probabilities are off. Resampling adds noise to every bin, so its interval leans upwards.
    """
    if metric == "ece":
        return np.asarray(np.abs(sums[:, :BINS]).sum(1) / sums[:, BINS])
    if "f1_weighted" not in metric and "f1_macro" not in metric:
        return np.asarray(sums[:, 0] / sums[:, 1])
    hits, both, expected = np.split(sums, 3, axis=1)
    each = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    if "f1_macro" in metric:
        return np.asarray(each.mean(1))
    return np.asarray((each * expected).sum(1) / expected.sum(1))


def _sums(counts: Array, part: Any) -> Array:
    if part.shape[1] <= FEW:  # a dense product is faster
        return np.asarray(counts.astype(float) @ part.toarray())
    return np.asarray((part.T @ np.ascontiguousarray(counts.T)).T, dtype=float)


def estimate(metric: str, values: Sequence[Any]) -> dict[str, float]:
    """A metric of rows' values and its 95 % interval: {"value", "low", "high"}."""
    rows, counts = cells(values)
    part = parts(metric, [row[0] for row in rows])
    sampled = [score(metric, _sums(drawn, part)) for drawn in resamples(counts)]
    return _interval(score(metric, _sums(counts[None], part)), np.concatenate(sampled))


def compare(metric: str, first: Sequence[Any], second: Sequence[Any]) -> dict[str, Any]:
    """Metric of `second` minus that of `first` on the same rows, with a paired interval and test.

    {"value", "low", "high", "p", "test"}. The two-sided p is McNemar's exact one where every row is
    right or wrong, and else that of the paired bootstrap: twice the share of resamples on the far
    side of no difference.
    """
    rows, counts = cells(first, second)
    one, two = (parts(metric, [row[side] for row in rows]) for side in (0, 1))

    def gain(drawn: Array) -> Array:
        return score(metric, _sums(drawn, two)) - score(metric, _sums(drawn, one))

    sampled = np.concatenate([gain(drawn) for drawn in resamples(counts)])
    found: dict[str, Any] = _interval(gain(counts[None]), sampled)
    if _binary(metric, [value for row in rows for value in row]):
        lost = sum(int(c) for row, c in zip(rows, counts, strict=True) if row[0] > row[1])
        won = sum(int(c) for row, c in zip(rows, counts, strict=True) if row[0] < row[1])
        return found | {"p": mcnemar(lost, won), "test": "McNemar"}
    tail = 1e-12  # rounding
    far = min((sampled <= tail).sum(), (sampled >= -tail).sum())
    return found | {"p": min(1.0, 2 * (far + 1) / (len(sampled) + 1)), "test": "paired bootstrap"}


def _binary(metric: str, values: Sequence[Any]) -> bool:
    right_or_wrong = metric.endswith(("accuracy", "exact_match"))
    return right_or_wrong and all(isinstance(v, float | int) and v in (0, 1) for v in values)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p that rows on which two answers differ are lost and won by a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def against(metric: str, values: Sequence[Any], published: float) -> dict[str, Any]:
    """Rows' values against a published score (0 to 1), of which there are no answers to pair with.

    {"value": ours minus theirs, "low", "high", "p", "test"}. The published one is taken as exact,
    although it comes from as many rows as ours. p is of the exact binomial test where every row is
    right or wrong, and None elsewhere; then the interval alone tells.
    """
    from scipy.stats import binomtest

    estimated = estimate(metric, values)
    found: dict[str, Any] = {key: value - published for key, value in estimated.items()}
    if not _binary(metric, values):
        return found | {"p": None, "test": "interval"}
    p = float(binomtest(int(sum(values)), len(values), published).pvalue)
    return found | {"p": p, "test": "binomial"}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of the p-values of one family, in their order."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def verdict(found: dict[str, Any], corrected: float | None, family: int, rows: int) -> str:
    """What a difference of `compare` or `against` means, in a sentence.

    corrected: its p after `holm` over a family of that many datasets; None where there is no test.
    """
    gain, low, high = (100 * found[name] for name in ("value", "low", "high"))
    if corrected is None:
        shown, evidence = low > 0 or high < 0, "by the interval"
    else:
        told = f"p < {LEVEL / 500:g}" if corrected < LEVEL / 500 else f"p = {corrected:.2g}"
        over = f", Holm over {family} datasets" if family > 1 else ""
        shown, evidence = corrected < LEVEL, f"{told} ({found['test']}{over})"
    if shown:
        word = "better" if gain > 0 else "worse"
        text = f"{word} by {abs(gain):.1f} points; unlikely by chance: {evidence}"
    else:
        text = f"no difference shown: {gain:+.1f} points, {low:+.1f} to {high:+.1f}; {evidence}"
    if rows < SMALL:
        text += f". Small: only {rows} rows, {100 / rows:.1f} points each"
    return text


def _interval(point: Array, sampled: Array) -> dict[str, float]:
    low, high = np.percentile(sampled, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2])
    return {"value": float(point[0]), "low": float(low), "high": float(high)}
