"""Whether two variants differ, or are equivalent, over test rows and seeds: a closed form.

    compare_means(differences, margin=0.02)        differences: float (rows, seeds)

A row's difference is that of two trainings with the same seed on the same row. Rows and seeds are
both samples, so the mean's variance is that of a crossed design with random rows and random seeds,
with the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596). Few seeds that lie far
apart give few degrees of freedom, and a wide interval. In simulated experiments with three seeds
the 95 % interval covers the truth in 95 % of them where rows decide, and in 92 % where seeds do.

Equivalence within a margin is shown by two one-sided t tests (Schuirmann 1987): the 90 % interval
lies inside of it. A difference that was not found shows no equivalence.
"""

from typing import Any

import numpy as np

from evals import stats

Array = np.ndarray[Any, Any]
POWER = 0.8


def measure_variance(differences: Array) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) of differences (rows, seeds)."""
    rows, seeds = differences.shape
    least = 1 / rows**2  # of identical answers: one row might have differed
    if seeds == 1:
        return max(float(differences.var(ddof=1)) / rows, least), rows - 1
    row_means, seed_means = differences.mean(1), differences.mean(0)
    residuals = differences - row_means[:, None] - seed_means + differences.mean()
    of_rows = seeds * float(row_means.var(ddof=1))
    of_seeds = rows * float(seed_means.var(ddof=1))
    of_error = float((residuals**2).sum()) / ((rows - 1) * (seeds - 1))
    total = of_seeds + max(of_rows - of_error, 0.0)
    freedom = total**2 / (of_seeds**2 / (seeds - 1)) if of_seeds else rows - 1
    return max(total / (rows * seeds), least), min(freedom, rows - 1)


def compare_means(differences: Array, margin: float) -> dict[str, Any]:
    """The mean difference, its intervals and tests.

    {"value", "low", "high" (95 %), "low90", "high90", "p": that there is no difference,
    "p_margin": that the difference reaches the margin, "freedom", "seeds": the mean of each}
    """
    from scipy.stats import t

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
        "seeds": [float(mean) for mean in differences.mean(0)],
    }


def correct_family(comparisons: list[dict[str, Any]]) -> None:
    """Corrects both p of the comparisons of one family (Holm)."""
    for name in ("p", "p_margin"):
        corrected = stats.holm([comparison[name] for comparison in comparisons])
        for comparison, p in zip(comparisons, corrected, strict=True):
            comparison[name] = p


def plan_error(rows: int, seeds: int, row_sd: float, seed_sd: float) -> tuple[float, float]:
    """(standard error, degrees of freedom) to expect of a mean difference."""
    of_rows, of_seeds = row_sd**2 / rows, seed_sd**2 / seeds
    total = of_rows + of_seeds
    freedom = total**2 / (of_seeds**2 / (seeds - 1)) if of_seeds and seeds > 1 else rows - 1
    return total**0.5, min(freedom, rows - 1)


def find_detectable_difference(error: float, freedom: float) -> float:
    """The true difference that a test at 5 % finds in 80 % of all experiments."""
    from scipy.stats import t

    return float(t.ppf(1 - stats.LEVEL / 2, freedom) + t.ppf(POWER, freedom)) * error


def find_showable_margin(error: float, freedom: float) -> float:
    """The smallest margin within which 80 % of all experiments show equal variants equivalent."""
    from scipy.stats import t

    return float(t.ppf(1 - stats.LEVEL, freedom) + t.ppf((1 + POWER) / 2, freedom)) * error


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
