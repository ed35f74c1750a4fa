"""Whether two variants differ, or are equivalent, over test rows and seeds: a closed form.

    compare_means(differences, margin=0.02)        differences: float (rows, seeds)
    compare_means(differences, 0.02, clusters)     clusters: a number for each row

A row's difference is that of two trainings with the same seed on the same row. Rows and seeds are
both samples, so the mean's variance is that of a crossed design with random rows and random seeds,
with the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596). Few seeds that lie far
apart give few degrees of freedom, and a wide interval. In simulated experiments with three seeds
the 95 % interval covers the truth in 95 % of them where rows decide, and in 92 % where seeds do.

Equivalence within a margin is shown by two one-sided t tests (Schuirmann 1987): the 90 % interval
lies inside of it. A difference that was not found shows no equivalence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals import stats

Array = np.ndarray[Any, Any]
POWER = 0.8
SIMULATED, SIMULATION_SEED = 10_000, 0
P_VALUES = ("p", "p_margin")  # of no difference, of the margin


def find_least_error(rows: int) -> float:
    """The least standard error of a mean: one more row might have been answered differently.

    Without it, trainings that answer alike would have an interval without a width.
    """
    return 1 / rows


def measure_variance(differences: Array) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) of differences (rows, seeds)."""
    rows, seeds = differences.shape
    if seeds == 1:
        variance = float(differences.var(ddof=1)) / rows
        return max(variance, find_least_error(rows) ** 2), rows - 1
    row_means, seed_means = differences.mean(1), differences.mean(0)
    residuals = differences - row_means[:, None] - seed_means + differences.mean()
    of_rows = seeds * row_means.var(ddof=1)
    of_seeds = rows * seed_means.var(ddof=1)
    of_error = (residuals**2).sum() / ((rows - 1) * (seeds - 1))
    variance, freedom = combine_squares((of_rows, of_seeds, of_error), rows, seeds)
    return float(variance), float(freedom)


def combine_squares(squares: tuple[Any, Any, Any], rows: int, seeds: int) -> tuple[Any, Any]:
    """(variance of the mean, degrees of freedom) from mean squares of rows, seeds and error.

    squares: numbers, or an array of each with an entry for every experiment.
    """
    of_rows, of_seeds, of_error = squares
    shared, all_values = np.maximum(of_rows - of_error, 0.0), rows * seeds
    variance, freedom = stats.combine_variances(
        shared / all_values, of_seeds / all_values, rows, seeds
    )
    return np.maximum(variance, find_least_error(rows) ** 2), freedom


def merge_clusters(values: Array, clusters: Sequence[int]) -> Array:
    """Values of rows (rows, seeds) as values of clusters (clusters, seeds), of the same mean.

    A cluster's value is the mean plus its share of what its rows deviate from it, so that the
    variance of the mean over clusters is the cluster-robust one, without the degrees of freedom.
    """
    numbers = np.unique(clusters, return_inverse=True)[1]
    means, merged = values.mean(0), np.zeros((numbers.max() + 1, values.shape[1]))
    np.add.at(merged, numbers, values - means)
    return means + merged * len(merged) / len(values)


def compare_means(
    differences: Array, margin: float, clusters: stats.Clusters = None
) -> dict[str, Any]:
    """The mean difference, its intervals and tests, over rows or over clusters of rows.

    {"value", "low", "high" (95 %), "low90", "high90", "p": that there is no difference,
    "p_margin": that the difference reaches the margin, "freedom", "seeds": the mean of each,
    "is_least": whether the standard error is the least that is allowed}
    """
    from scipy.stats import t

    if clusters:
        differences = merge_clusters(differences, clusters)
    value = float(differences.mean())
    variance, freedom = measure_variance(differences)
    error = variance**0.5
    half, half90 = (float(t.ppf(share, freedom)) * error for share in (0.975, 0.95))
    below = float(t.sf((value + margin) / error, freedom))
    above = float(t.cdf((value - margin) / error, freedom))
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "low90": value - half90,
        "high90": value + half90,
        "p": float(2 * t.sf(abs(value) / error, freedom)),
        "p_margin": max(below, above),
        "freedom": freedom,
        "is_least": error <= find_least_error(len(differences)),
        "seeds": [float(mean) for mean in differences.mean(0)],
    }


def compare_variants(
    values: Array, others: Array, margin: float | None, clusters: stats.Clusters = None
) -> dict[str, Any]:
    """Mean of `values` minus that of `others`, (rows, seeds) each, and whether they are equivalent.

    {"value", "low", "high" (95 %), "p": that there is no difference, "seeds": of each}; with a
    margin also "low90", "high90" and "p_margin": that the difference reaches the margin.
    """
    comparison = compare_means(values - others, margin or 0.0, clusters)
    ends = ["low", "high"] if margin is None else ["low", "high", "low90", "high90"]
    names = ["value", *ends, "p", "seeds", *([] if margin is None else ["p_margin"])]
    limited = {end: min(max(comparison[end], -1.0), 1.0) for end in ends}  # of shares
    return {name: comparison[name] for name in names} | limited


def correct_family(comparisons: list[dict[str, Any]]) -> None:
    """Corrects each p of the comparisons of one family (Holm)."""
    for name in P_VALUES:
        family = [comparison for comparison in comparisons if name in comparison]
        corrected = stats.holm([comparison[name] for comparison in family])
        for comparison, p in zip(family, corrected, strict=True):
            comparison[name] = p


@dataclass(frozen=True)
class Design:
    """What an experiment was planned for: standard deviations are those of paired differences."""

    rows: int
    seeds: int
    row_sd: float
    seed_sd: float


def simulate_design(design: Design, margin: float, by_seed: bool) -> dict[str, float]:
    """What SIMULATED experiments would find, p not corrected.

    {"detectable": the true difference that 80 % of them find, "showable": the least margin within
    which 80 % show equal variants equivalent, "equivalent": the share that does within `margin`}

    A row's difference is the same for all seeds, or another for each with `by_seed`; the truth lies
    between. Mean squares are drawn from their distributions, not rows: the result is the same.
    """
    from scipy.stats import t

    rows, seeds = design.rows, design.seeds
    of_error = design.row_sd**2 if by_seed else 0.0
    of_rows = design.row_sd**2 * (1 if by_seed else seeds)
    of_seeds = of_error + rows * design.seed_sd**2
    draw = np.random.default_rng(SIMULATION_SEED)

    def draw_squares(expected: float, freedom: int) -> Array:
        return expected * draw.chisquare(freedom, SIMULATED) / freedom

    squares = (
        draw_squares(of_rows, rows - 1),
        draw_squares(of_seeds, seeds - 1),
        draw_squares(of_error, (rows - 1) * (seeds - 1)),
    )
    variance, freedom = combine_squares(squares, rows, seeds)
    spread = (of_rows + of_seeds - of_error) / (rows * seeds)
    means = draw.normal(0, spread**0.5, SIMULATED)
    half, half90 = (t.ppf(share, freedom) * variance**0.5 for share in (0.975, 0.95))
    reached = abs(means) + half90  # by the 90 % interval
    return {
        "detectable": float(np.quantile(half - means, POWER)),
        "showable": float(np.quantile(reached, POWER)),
        "equivalent": float((reached < margin).mean()),
    }


def describe_verdict(comparison: dict[str, Any], margin: float) -> str:
    """A comparison in words: different, equivalent, both, or neither."""
    is_different = comparison["p"] < stats.LEVEL
    is_equivalent = comparison["p_margin"] < stats.LEVEL
    within = f"within ±{100 * margin:g} points"
    if is_different and is_equivalent:
        return f"different, but equivalent {within}"
    if is_equivalent:
        return f"equivalent {within}"
    return "different" if is_different else "undecided"


def judge_direction(comparison: dict[str, Any], margin: float, expected: str) -> str:
    """What the 95 % interval says of a difference "`expected` (lower or higher) by the margin"."""
    sign = -1 if expected == "lower" else 1
    low, high = sorted((sign * comparison["low"], sign * comparison["high"]))
    if low > margin:
        return "shown"
    return "ruled out" if high < margin else "neither shown nor ruled out"
