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

A bootstrap knows what was seen and nothing else. So rates have Wilson's interval (1927), also where
all rows are right, and differences of rates Bonett and Price's (2012). From fewer than LEAST rows,
or in macro F1 rows of a class, no resample tells how far a score is off: it has no interval then,
but "no_interval", the reason.
"""

from collections import Counter
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
LEAST = 10  # rows that a bootstrap needs; with a class of 3, macro F1's covers 87.5 % and not 95 %
Z = 1.959963984540054
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
    probabilities are off. It is biased: chance alone makes it more than 0. The intervals of
    `estimate` and `compare` allow for that.
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


def estimate(metric: str, values: Sequence[Any]) -> dict[str, Any]:
    """A metric of rows' values and its 95 % interval: {"value", "low", "high"}.

    Where there can be no interval: {"value", "no_interval": the reason}.
    """
    rows, counts = cells(values)
    part = parts(metric, [row[0] for row in rows])
    sums = _sums(counts[None], part)
    point = float(score(metric, sums)[0])
    if _is_rate(metric, [row[0] for row in rows]):
        return {"value": point} | _wilson(point, len(values))
    if reason := explain_no_interval(metric, values):
        return {"value": point, "no_interval": reason}
    sampled = np.concatenate([score(metric, _sums(drawn, part)) for drawn in resamples(counts)])
    if np.ptp(sampled) == 0:
        return {"value": point} | _wilson(point, _effective(metric, values))
    estimated = _interval(metric, point, sampled, len(values))
    if "f1_macro" in metric and _lacks_spread(sums[0]):
        least = _wilson(point, _effective(metric, values))
        estimated["low"] = min(estimated["low"], least["low"])
        estimated["high"] = max(estimated["high"], least["high"])
    if metric == "ece" and point <= _chance_ece([row[0][0][0] for row in rows], counts):
        estimated["low"] = 0.0
    return {name: min(max(end, 0.0), 1.0) for name, end in estimated.items()}


def _lacks_spread(sums: Array) -> bool:
    """Whether the rows of a class are all right or all wrong, so that resamples do not differ."""
    hits, _, expected = np.split(sums, 3)
    return bool(((hits == 0) | (hits == expected)).any())


def _chance_ece(shares: Sequence[float], counts: Array) -> float:
    """The ECE that a perfectly calibrated model exceeds with a chance of LEVEL / 2.

    Answers are drawn from the probabilities themselves: the consistency resampling of Bröcker and
    Smith (2007).
    """
    confidence = np.repeat(np.array(shares), counts)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(4 * CHUNK):
        gaps = confidence - (generator.random(len(confidence)) < confidence)
        drawn.append(np.abs(np.bincount(bins, gaps, BINS)).sum() / len(confidence))
    return float(np.quantile(drawn, 1 - LEVEL / 2))


def explain_no_interval(metric: str, values: Sequence[Any]) -> str:
    """Why rows are too few for a bootstrap's interval; empty where they are enough."""
    if len(values) < LEAST:
        return f"fewer than {LEAST} rows ({len(values)})"
    if "f1_macro" in metric:
        label, rows = min(_class_sizes(values).items(), key=lambda item: (item[1], item[0]))
        if rows < LEAST:
            return f"fewer than {LEAST} rows of a class ({label}: {rows})"
    return ""


def _class_sizes(values: Sequence[Any]) -> Counter[str]:
    return Counter(expected for pairs in values for expected, _ in pairs)


def _effective(metric: str, values: Sequence[Any]) -> float:
    """Rows that tell as much of an overall rate as these do of a metric.

    A mean over classes has the variance of C² / Σ 1/n rows: small classes tell least.
    """
    if "f1_macro" not in metric:
        return len(values)
    sizes = _class_sizes(values).values()
    return min(len(values), len(sizes) ** 2 / sum(1 / size for size in sizes))


def _wilson(rate: float, rows: float) -> dict[str, float]:
    """Wilson's score interval (1927) of a rate."""
    weight = Z**2 / rows
    middle = (rate + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * (rate * (1 - rate) / rows + weight / (4 * rows)) ** 0.5
    return {"low": max(0.0, min(rate, middle - half)), "high": min(1.0, max(rate, middle + half))}


def _paired_rates(lost: int, won: int, rows: float) -> dict[str, float]:
    """Bonett and Price's interval (2012) of a difference of paired rates: Laplace's, adjusted."""
    down, up = (lost + 1) / (rows + 2), (won + 1) / (rows + 2)
    half = Z * ((up + down - (up - down) ** 2) / (rows + 2)) ** 0.5
    gain = (won - lost) / rows
    return {
        "low": max(-1.0, min(gain, up - down - half)),
        "high": min(1.0, max(gain, up - down + half)),
    }


def compare(metric: str, first: Sequence[Any], second: Sequence[Any]) -> dict[str, Any]:
    """Metric of `second` minus that of `first` on the same rows, with a paired interval and test.

    {"value", "low", "high", "p", "test"}. The two-sided p is McNemar's exact one where every row is
    right or wrong, and else that of the paired bootstrap: twice the share of resamples on the far
    side of no difference. Where there can be neither: {"value", "no_interval", "p": None, "test"}.
    """
    rows, counts = cells(first, second)
    one, two = (parts(metric, [row[side] for row in rows]) for side in (0, 1))

    def gain(drawn: Array) -> Array:
        return score(metric, _sums(drawn, two)) - score(metric, _sums(drawn, one))

    point = float(gain(counts[None])[0])
    if _binary(metric, [value for row in rows for value in row]):
        lost = sum(int(c) for row, c in zip(rows, counts, strict=True) if row[0] > row[1])
        won = sum(int(c) for row, c in zip(rows, counts, strict=True) if row[0] < row[1])
        interval = _paired_rates(lost, won, len(first))
        return {"value": point} | interval | {"p": mcnemar(lost, won), "test": "McNemar"}
    if reason := explain_no_interval(metric, first):
        return {"value": point, "no_interval": reason, "p": None, "test": "none"}
    sampled = np.concatenate([gain(drawn) for drawn in resamples(counts)])
    if np.ptp(sampled) == 0:
        half = _paired_rates(0, 0, _effective(metric, first))["high"]
        same: dict[str, Any] = {"value": point, "low": point - half, "high": point + half}
        return same | {"p": 1.0 if point == 0 else None, "test": "paired bootstrap"}
    found: dict[str, Any] = _interval(metric, point, sampled, len(first))
    if metric == "ece":
        sampled = 2 * point - sampled
    tail = 1e-12  # rounding
    far = min((sampled <= tail).sum(), (sampled >= -tail).sum())
    p = 2 * _widened((far + 1) / (len(sampled) + 1), len(first), back=True)
    return found | {"p": min(1.0, p), "test": "paired bootstrap"}


def _binary(metric: str, values: Sequence[Any]) -> bool:
    right_or_wrong = metric.endswith(("accuracy", "exact_match"))
    return right_or_wrong and all(isinstance(v, float | int) and v in (0, 1) for v in values)


def _is_rate(metric: str, values: Sequence[Any]) -> bool:
    """Whether a metric is the share of rows that are right, and every row is right or wrong."""
    mean = "f1_weighted" not in metric and "f1_macro" not in metric and metric != "ece"
    return mean and all(isinstance(value, float | int) and value in (0, 1) for value in values)


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
    found: dict[str, Any] = {
        key: value if key == "no_interval" else value - published
        for key, value in estimated.items()
    }
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
    gain = 100 * found["value"]
    if reason := found.get("no_interval"):
        return f"{gain:+.1f} points, without an interval or a test: {reason}"
    low, high = (100 * found[name] for name in ("low", "high"))
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


def _interval(metric: str, point: float, sampled: Array, rows: int) -> dict[str, float]:
    """The percentile interval, and of ECE, which noise makes larger, one that reaches further down.

    ECE is a sum of absolute values: a resample lies above the sample as the sample lies above the
    truth. So its lower end is 2·ECE - the upper quantile (the basic bootstrap: Davison and Hinkley
    1997, equation 5.6).
    """
    tail = _widened(LEVEL / 2, rows)
    low, high = (float(end) for end in np.quantile(sampled, [tail, 1 - tail]))
    if metric == "ece":
        low, high = min(low, 2 * point - high), max(high, 2 * point - low)
    return {"value": point, "low": low, "high": high}


def _widened(tail: float, rows: int, back: bool = False) -> float:
    """The share of resamples to cut off for a tail, so that few rows' intervals are wide enough.

    Percentiles lack the factor rows / (rows - 1) of a variance and Student's tails (Hesterberg
    2015, section 4.2). back: the tail that belongs to a share.
    """
    from scipy.stats import norm, t

    factor = (rows / (rows - 1)) ** 0.5
    if back:
        return float(t.cdf(norm.ppf(tail) / factor, rows - 1))
    return float(norm.cdf(t.ppf(tail, rows - 1) * factor))
