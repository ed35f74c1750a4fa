"""Confidence intervals of scores, tests of differences, and what they mean in words.

A row's value for a metric is what evals/tasks/utils.py returns:

    a number          the metric is the mean
    a list of pairs   (expected, answered): the metric is the share of equal pairs, or F1
    [(share, right)]  the likeliest label's probability, and whether it is right: ECE

The metric's name decides which: `ece`, a name with `f1_weighted` or `f1_macro` in it, else a mean.
Every metric is a function of sums over rows, so one bootstrap serves all (Efron and Tibshirani
1993, chapters 13 and 16). The pairs of a row stay together in every resample.

A bootstrap knows only the rows that it has. So rates have Wilson's interval (1927), which has a
width even where all rows are right, and differences of rates have that of Bonett and Price (2012).
Everything else has none with fewer than LEAST rows, or LEAST rows of a class in macro F1.

Rows of one cluster (several questions on one sentence) are right or wrong together, so they count
as fewer rows than they are. `clusters` gives a number for each row; then whole clusters are drawn
(Cameron, Gelbach and Miller 2008). Few right answers or few changes leave such draws alike, so the
interval of a rate is never narrower, and p never smaller, than the formulas for rates allow.
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
FEW = 200  # groups up to which drawing their counts is faster than drawing rows

Array = np.ndarray[Any, Any]
Columns = Sequence[Sequence[Any]]  # the values of the same rows, for each seed
Clusters = Sequence[int] | None  # the cluster of each row; None where rows are independent


def _find_kind(metric: str) -> str:
    """How a metric is computed: `ece`, `f1_weighted`, `f1_macro` or `mean`."""
    if metric == "ece":
        return metric
    return next((kind for kind in ("f1_weighted", "f1_macro") if kind in metric), "mean")


def _group_rows(*columns: Sequence[Any]) -> tuple[list[tuple[Any, ...]], Array]:
    """The k distinct rows of columns of values, sorted, and how often each occurs: int64 (k,)."""

    def freeze(value: Any) -> Any:
        return tuple(map(tuple, value)) if isinstance(value, list) else float(value)

    counts = Counter(zip(*(map(freeze, column) for column in columns), strict=True))
    rows = sorted(counts)
    return rows, np.array([counts[row] for row in rows])


def _draw_resamples(counts: Array) -> Iterator[Array]:
    """RESAMPLES bootstrap draws of the rows, as counts of the k groups: int64 (CHUNK, k) each."""
    rows, groups = int(counts.sum()), len(counts)
    generator = np.random.default_rng(SEED)
    group = np.repeat(np.arange(groups, dtype=np.int32), counts)
    offset = np.arange(CHUNK, dtype=np.int32)[:, None] * groups
    for _ in range(RESAMPLES // CHUNK):
        if groups <= FEW:
            yield generator.multinomial(rows, counts / rows, size=CHUNK)
        else:
            drawn = group[generator.integers(0, rows, (CHUNK, rows), dtype=np.int32)] + offset
            yield np.bincount(drawn.ravel(), minlength=CHUNK * groups).reshape(CHUNK, groups)


def _list_summands(metric: str, values: Sequence[Any]) -> Any:
    """What each of k values adds to the sums that `_compute` takes: a sparse matrix (k, sums).

    mean  right, count
    F1    for every expected label: hits, then expected + answered, then expected
    ECE   Σ (confidence - right) of each bin, then count
    """
    from scipy.sparse import csr_matrix

    kind = _find_kind(metric)
    if kind == "ece":
        gaps = np.zeros((len(values), BINS + 1))
        for row, ((share, right),) in enumerate(values):
            gaps[row, min(int(share * BINS), BINS - 1)] = share - right
        gaps[:, BINS] = 1
        return csr_matrix(gaps)
    if kind == "mean":
        pairs = [
            (sum(e == a for e, a in v), len(v)) if isinstance(v, tuple) else (v, 1) for v in values
        ]
        return csr_matrix(np.array(pairs, dtype=float))
    labels = sorted({expected for pairs in values for expected, _ in pairs})
    index = {label: number for number, label in enumerate(labels)}
    width, cells = len(labels), []
    for row, pairs in enumerate(values):
        for expected, answered in pairs:
            label = index[expected]
            cells += [(row, width + label), (row, 2 * width + label)]
            cells += [(row, label)] if expected == answered else []
            cells += [(row, width + index[answered])] if answered in index else []
    places = tuple(zip(*cells, strict=True))
    return csr_matrix((np.ones(len(cells)), places), shape=(len(values), 3 * width))


def _add_up(counts: Array, summands: Any) -> Array:
    """The sums of R draws: (R, k) counts and (k, sums) summands give float64 (R, sums)."""
    if summands.shape[1] <= FEW:  # a dense product is faster
        return np.asarray(counts.astype(float) @ summands.toarray())
    return np.asarray((summands.T @ np.ascontiguousarray(counts.T)).T, dtype=float)


def _tabulate(metric: str, columns: Columns, clusters: Clusters) -> tuple[Array, list[Any], float]:
    """What resamples are drawn from.

    Returns how often each of k units occurs, int64 (k,); for each column what a unit adds to the
    sums (k, sums); and how many independent rows there are. A unit is a distinct row, or a cluster.
    Clusters of unequal size determine a score as (Σ size)² / Σ size² equal ones do (Kish 1965).
    """
    from scipy.sparse import csr_matrix

    rows, counts = _group_rows(*columns, *([clusters] if clusters else []))
    sides = range(len(columns))
    summands = [_list_summands(metric, [row[side] for row in rows]) for side in sides]
    if not clusters:
        return counts, summands, len(columns[0])
    place = {name: number for number, name in enumerate(dict.fromkeys(row[-1] for row in rows))}
    places = [place[row[-1]] for row in rows]
    members = csr_matrix((counts, (places, range(len(rows)))), shape=(len(place), len(rows)))
    sizes = np.bincount(places, counts)
    independent = float(sizes.sum() ** 2 / (sizes**2).sum())
    return np.ones(len(place), dtype=int), [members @ part for part in summands], independent


def _compute(metric: str, sums: Array) -> Array:
    """The metric of each of R rows of sums (R, sums): (R,).

    F1 of a label = 2·TP / (2·TP + FP + FN), and 0 where that is 0/0, as in scikit-learn; averaged
    by how often a label is expected, or evenly over the labels expected in all rows.
    ECE = Σ over bins of |Σ (confidence - right)| / rows (Guo et al. 2017, equation 3). Chance alone
    makes it more than 0; the intervals of `estimate` and `compare` allow for that bias.
    """
    kind = _find_kind(metric)
    if kind == "ece":
        return np.asarray(np.abs(sums[:, :BINS]).sum(1) / sums[:, BINS])
    if kind == "mean":
        return np.asarray(sums[:, 0] / sums[:, 1])
    hits, total, expected = np.split(sums, 3, axis=1)
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    if kind == "f1_macro":
        return np.asarray(f1.mean(1))
    return np.asarray((f1 * expected).sum(1) / expected.sum(1))


def estimate(metric: str, values: Sequence[Any], clusters: Clusters = None) -> dict[str, Any]:
    """A metric of rows' values and its 95 % interval: {"value", "low", "high"}.

    Where there can be no interval: {"value", "no_interval": the reason}.
    """
    counts, (summands,), rows = _tabulate(metric, [values], clusters)
    sums = _add_up(counts[None], summands)
    point = float(_compute(metric, sums)[0])
    if not clusters and _find_kind(metric) == "mean" and _are_binary(values):
        return {"value": point} | _wilson(point, rows)
    if reason := _explain_no_interval(metric, values, clusters):
        return {"value": point, "no_interval": reason}
    sampled = np.concatenate(
        [_compute(metric, _add_up(drawn, summands)) for drawn in _draw_resamples(counts)]
    )
    by_wilson = _wilson(point, _count_effective_rows(metric, values, rows))
    if np.ptp(sampled) == 0:
        return {"value": point} | by_wilson
    low, high = _find_interval(metric, point, sampled, rows)
    if _find_kind(metric) == "f1_macro":
        hits, _, expected = np.split(sums[0], 3)
        if ((hits == 0) | (hits == expected)).any():  # resamples of such a class do not differ
            low, high = min(low, by_wilson["low"]), max(high, by_wilson["high"])
    if metric == "ece" and point <= _find_chance_ece(values):
        low = 0.0
    if _find_kind(metric) == "mean" and _are_binary(values):  # in clusters
        by_rows = _wilson(point, len(values))
        low, high = min(low, by_rows["low"]), max(high, by_rows["high"])
    ends = {"value": point, "low": low, "high": high}
    return {name: min(max(end, 0.0), 1.0) for name, end in ends.items()}


def _find_chance_ece(values: Sequence[Any]) -> float:
    """The ECE that a perfectly calibrated model exceeds with a chance of LEVEL / 2.

    Answers are drawn from the probabilities themselves: the consistency resampling of Bröcker and
    Smith (2007).
    """
    rows, counts = _group_rows(values)
    confidence = np.repeat(np.array([share for (((share, _),),) in rows]), counts)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(4 * CHUNK):
        gaps = confidence - (generator.random(len(confidence)) < confidence)
        drawn.append(np.abs(np.bincount(bins, gaps, BINS)).sum() / len(confidence))
    return float(np.quantile(drawn, 1 - LEVEL / 2))


def _explain_no_interval(metric: str, values: Sequence[Any], clusters: Clusters = None) -> str:
    """Why rows are too few for a bootstrap's interval; empty where they are enough."""
    if (units := len(set(clusters or range(len(values))))) < LEAST:
        return f"fewer than {LEAST} {'clusters of ' if clusters else ''}rows ({units})"
    if _find_kind(metric) == "f1_macro":
        rows, label = min((rows, label) for label, rows in _count_classes(values).items())
        if rows < LEAST:
            return f"fewer than {LEAST} rows of a class ({label}: {rows})"
    return ""


def _count_classes(values: Sequence[Any]) -> Counter[str]:
    return Counter(expected for pairs in values for expected, _ in pairs)


def _count_effective_rows(metric: str, values: Sequence[Any], independent: float) -> float:
    """How many rows would determine an overall rate as well as these rows determine the metric.

    A mean over C classes of n rows has the variance of C² / Σ 1/n rows. Of the rows, so many are
    `independent`.
    """
    if _find_kind(metric) != "f1_macro":
        return independent
    sizes = _count_classes(values).values()
    share = min(1.0, len(sizes) ** 2 / sum(1 / size for size in sizes) / len(values))
    return independent * share


def _wilson(rate: float, rows: float) -> dict[str, float]:
    """Wilson's score interval (1927) of a rate; `rows` need not be whole, as SciPy's must."""
    weight = Z**2 / rows
    middle = (rate + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * (rate * (1 - rate) / rows + weight / (4 * rows)) ** 0.5
    return {"low": max(0.0, min(rate, middle - half)), "high": min(1.0, max(rate, middle + half))}


def _bonett_price(lost: int, won: int, rows: float) -> dict[str, float]:
    """Bonett and Price's interval (2012) of a difference of paired rates."""
    down, up = (lost + 1) / (rows + 2), (won + 1) / (rows + 2)
    half = Z * ((up + down - (up - down) ** 2) / (rows + 2)) ** 0.5
    gain = (won - lost) / rows
    low, high = min(gain, up - down - half), max(gain, up - down + half)
    return {"low": max(-1.0, low), "high": min(1.0, high)}


def compare(
    metric: str, first: Sequence[Any], second: Sequence[Any], clusters: Clusters = None
) -> dict[str, Any]:
    """Metric of `second` minus that of `first` on the same rows, with a paired interval and test.

    {"value", "low", "high", "p", "test"}. The two-sided p is McNemar's exact one where every row is
    right or wrong, and else that of the paired bootstrap: twice the share of resamples on the far
    side of no difference. Where there can be neither: {"value", "no_interval", "p": None, "test"}.
    """
    counts, (before, after), rows = _tabulate(metric, [first, second], clusters)

    def gain(drawn: Array) -> Array:
        return _compute(metric, _add_up(drawn, after)) - _compute(metric, _add_up(drawn, before))

    point = float(gain(counts[None])[0])
    changes: list[float] = []
    if _has_exact_test(metric, [*first, *second]):
        changes = [two - one for one, two in zip(first, second, strict=True)]
    by_rows = _bonett_price(*_count_signs(changes), len(first))
    if changes and not clusters:
        p = mcnemar(*_count_signs(changes))
        return {"value": point} | by_rows | {"p": p, "test": "McNemar"}
    if reason := _explain_no_interval(metric, first, clusters):
        return {"value": point, "no_interval": reason, "p": None, "test": "none"}
    test = {"test": f"paired bootstrap{' of clusters' if clusters else ''}"}
    sampled = np.concatenate([gain(drawn) for drawn in _draw_resamples(counts)])
    if np.ptp(sampled) == 0:
        half = _bonett_price(0, 0, _count_effective_rows(metric, first, rows))["high"]
        ends = {"low": point - half, "high": point + half}
        ends = ends if metric == "loss" else _limit_to_range(ends, -1.0)  # a loss has no bound
        return {"value": point} | ends | {"p": 1.0 if point == 0 else None} | test
    low, high = _find_interval(metric, point, sampled, rows)
    if metric == "ece":
        sampled = 2 * point - sampled
    rounding = 1e-12
    far = min((sampled <= rounding).sum(), (sampled >= -rounding).sum())
    p = min(1.0, 2 * _undo_widening((far + 1) / (len(sampled) + 1), rows))
    if changes and clusters:
        low, high = min(low, by_rows["low"]), max(high, by_rows["high"])
        totals = np.bincount(np.unique(clusters, return_inverse=True)[1], changes)
        p = max(p, mcnemar(*_count_signs(totals)))
    return {"value": point, "low": low, "high": high, "p": p} | test


def _count_signs(changes: Any) -> tuple[int, int]:
    """How many changes are negative, and how many positive."""
    signs = np.sign(np.asarray(changes))
    return int((signs < 0).sum()), int((signs > 0).sum())


def estimate_mean(
    metric: str, columns: Columns, base: Sequence[Any] | None = None, clusters: Clusters = None
) -> dict[str, Any]:
    """A metric's mean over seeds, and its 95 % interval over rows and seeds.

    `columns` holds the values of each seed's rows; with `base`, the values of the same rows, it is
    the mean's gain over the metric of the base. {"value", "low", "high"}, or {"value",
    "no_interval"}. With one seed the interval is that of `estimate` or `compare`.
    """
    if len(columns) == 1:
        (column,) = columns
        single = (
            compare(metric, base, column, clusters) if base else estimate(metric, column, clusters)
        )
        keys = ("value", "low", "high", "no_interval")
        return {key: single[key] for key in keys if key in single}
    scores = np.array([_score_rows(metric, column) for column in columns])
    scores -= _score_rows(metric, base) if base else 0
    point = float(scores.mean())
    if reason := _explain_no_interval(metric, columns[0], clusters):
        return {"value": point, "no_interval": reason}
    sampled, rows = _resample_rows(metric, columns, base, clusters)
    half = _find_half_width(scores, sampled, rows)
    if half > 0:
        ends = {"low": point - half, "high": point + half}
    else:
        effective = _count_effective_rows(metric, columns[0], rows)
        ends = _wilson(point, effective)
        if base:
            half = _bonett_price(0, 0, effective)["high"]
            ends = {"low": point - half, "high": point + half}
    return {"value": point} | _limit_to_range(ends, -1.0 if base else 0.0)


def _find_half_width(scores: Array, sampled: Array, rows: float) -> float:
    """Half of the 95 % interval of a mean over seeds, where rows and seeds are both samples.

    scores: of each seed, float (seeds,); sampled: the same of resamples of the rows, the same rows
    for all seeds, float (RESAMPLES, seeds). What rows do to all seeds alike is the covariance of
    two seeds; what they do to one alone is part of the spread of the scores. Two or three seeds may
    lie close together by chance, so it is never less than over rows alone. In simulated experiments
    it covers the truth in 92 to 99 % with three seeds, and in 88 to 98 % with two; in fewer where
    a rate has less than ten right or wrong answers, as it is symmetric (docs/limits.md).
    """
    from scipy.stats import t

    seeds = len(scores)
    covariance = np.cov(sampled.T) * rows / (rows - 1)
    shared = max((covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1)), 0.0)
    of_rows = max(covariance.mean(), 0.0)  # the variance of the mean, with these seeds
    of_both, freedom = combine_variances(shared, scores.var(ddof=1) / seeds, rows, seeds)
    variances, freedoms = np.array([of_both, of_rows]), np.array([freedom, rows - 1])
    return float(max(t.ppf(1 - LEVEL / 2, freedoms) * variances**0.5))


def compare_seeds(first: Sequence[float], second: Sequence[float], rows: int) -> dict[str, Any]:
    """Mean of `second` minus `first`, scores on the same rows by seed, with a 95 % t interval.

    It is over seeds alone: how these rows would be answered after other trainings, not how other
    rows would. As seeds may agree by chance, the standard error is at least 1 / `rows`: one more
    row answered differently. {"value", "low", "high"}, of two seeds or more.
    """
    from scipy.stats import t

    differences = np.subtract(second, first)
    value, seeds = float(differences.mean()), len(differences)
    error = max(float(differences.std(ddof=1)) / seeds**0.5, 1 / rows)
    half = float(t.ppf(1 - LEVEL / 2, seeds - 1)) * error
    return {"value": value, **_limit_to_range({"low": value - half, "high": value + half}, -1)}


def combine_variances(shared: Any, of_seeds: Any, rows: float, seeds: int) -> tuple[Any, Any]:
    """(variance of a mean over rows and seeds, its degrees of freedom): numbers or arrays.

    shared: what rows do to all seeds alike; of_seeds: the variance of the scores of the seeds,
    divided by their number. Few seeds that lie far apart give few degrees of freedom, and a wide
    interval (Hillis 2007, Statistics in Medicine 26:596).
    """
    variance = shared + of_seeds
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variance**2 / (of_seeds**2 / (seeds - 1))
    return variance, np.fmin(freedom, rows - 1)  # also where the seeds do not differ: 0 / 0


def _resample_rows(
    metric: str, columns: Columns, base: Sequence[Any] | None, clusters: Clusters
) -> tuple[Array, float]:
    """The metric of each seed, less the base's, on the same drawn rows: (RESAMPLES, seeds).

    Also returns how many independent rows there are.
    """
    seeds = len(columns)
    counts, summands, rows = _tabulate(metric, [*columns, *([base] if base else [])], clusters)
    parts = []
    for drawn in _draw_resamples(counts):
        scores = np.stack([_compute(metric, _add_up(drawn, part)) for part in summands], axis=1)
        parts.append(scores[:, :seeds] - scores[:, seeds:] if base else scores)
    return np.concatenate(parts), rows


def _limit_to_range(ends: dict[str, float], least: float) -> dict[str, float]:
    """The ends of an interval, none of them below `least` or above 1."""
    return {name: min(max(end, least), 1.0) for name, end in ends.items()}


def _score_rows(metric: str, values: Sequence[Any]) -> float:
    groups, counts = _group_rows(values)
    summands = _list_summands(metric, [value for (value,) in groups])
    return float(_compute(metric, _add_up(counts[None], summands))[0])


def _are_binary(values: Sequence[Any]) -> bool:
    return all(isinstance(value, float | int) and value in (0, 1) for value in values)


def _has_exact_test(metric: str, values: Sequence[Any]) -> bool:
    """Whether McNemar's and the binomial test apply: every row is right or wrong."""
    return metric.endswith(("accuracy", "exact_match")) and _are_binary(values)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p that rows on which two answers differ are lost and won by a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def against(
    metric: str, values: Sequence[Any], published: float, clusters: Clusters = None
) -> dict[str, Any]:
    """Rows' values against a published score (0 to 1) that comes without answers to pair with.

    {"value": ours minus theirs, "low", "high", "p", "test"}. The published score is taken as exact,
    although it comes from as many rows as ours. p is of the exact binomial test where every row is
    right or wrong, and None elsewhere: then the interval decides.
    """
    from scipy.stats import binomtest

    gain: dict[str, Any] = {
        key: end if key == "no_interval" else end - published
        for key, end in estimate(metric, values, clusters).items()
    }
    if clusters or not _has_exact_test(metric, values):
        return gain | {"p": None, "test": "interval"}
    p = float(binomtest(int(sum(values)), len(values), published).pvalue)
    return gain | {"p": p, "test": "binomial"}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of the p-values of one family, in their order."""
    order = np.argsort(ps, kind="stable")
    scaled = np.minimum(1, np.array(ps)[order] * np.arange(len(ps), 0, -1)) if len(ps) else order
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(scaled)
    return [float(p) for p in adjusted]


def verdict(gain: dict[str, Any], corrected: float | None, family: int, rows: int) -> str:
    """What a difference of `compare` or `against` means, in a sentence.

    corrected: its p after `holm` over a family of that many datasets; None where there is no test.
    """
    points = 100 * gain["value"]
    if reason := gain.get("no_interval"):
        return f"{points:+.1f} points, without an interval or a test: {reason}"
    low, high = 100 * gain["low"], 100 * gain["high"]
    if corrected is None:
        is_shown, evidence = low > 0 or high < 0, "by the interval"
    else:
        least = LEVEL / 500
        p = f"p < {least:g}" if corrected < least else f"p = {corrected:.2g}"
        over = f", Holm over {family} datasets" if family > 1 else ""
        is_shown, evidence = corrected < LEVEL, f"{p} ({gain['test']}{over})"
    if is_shown:
        word = "better" if points > 0 else "worse"
        text = f"{word} by {abs(points):.1f} points; unlikely by chance: {evidence}"
    else:
        text = f"no difference shown: {points:+.1f} points, {low:+.1f} to {high:+.1f}; {evidence}"
    small = f". Small: only {rows} rows, {100 / rows:.1f} points each" if rows < SMALL else ""
    return text + small


def _find_interval(metric: str, point: float, sampled: Array, rows: float) -> tuple[float, float]:
    """The percentile interval (low, high) of resampled values.

    Percentiles lack the factor rows / (rows - 1) of a variance and Student's tails, so less is cut
    off for few rows (Hesterberg 2015, section 4.2). Noise makes ECE larger: a resample lies above
    the sample as the sample lies above the truth. So its lower end is 2·ECE - the upper quantile
    (the basic bootstrap: Davison and Hinkley 1997, equation 5.6).
    """
    from scipy.stats import norm, t

    tail = norm.cdf(t.ppf(LEVEL / 2, rows - 1) * (rows / (rows - 1)) ** 0.5)
    low, high = (float(end) for end in np.quantile(sampled, [tail, 1 - tail]))
    if metric == "ece":
        low, high = min(low, 2 * point - high), max(high, 2 * point - low)
    return low, high


def _undo_widening(tail: float, rows: float) -> float:
    """The tail that `_find_interval` widens to a share `tail` of the resamples."""
    from scipy.stats import norm, t

    return float(t.cdf(norm.ppf(tail) / (rows / (rows - 1)) ** 0.5, rows - 1))
