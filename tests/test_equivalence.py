"""Differences over rows and seeds, and equivalence within a margin."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench import equivalence


def draw_differences(truth, seed, rows=400, seeds=3, row_sd=0.4, seed_sd=0.02):
    """Differences with an effect of each row, of each seed, and of both together."""
    draw = np.random.default_rng(seed)
    of_rows, of_seeds = draw.normal(0, row_sd / 2, (rows, 1)), draw.normal(0, seed_sd, seeds)
    return truth + of_rows + of_seeds + draw.normal(0, row_sd / 2, (rows, seeds))


def test_one_seed_is_the_t_test_of_its_rows():
    values = draw_differences(0.03, 1, seeds=1)
    comparison = equivalence.compare_means(values, 0.05)
    tested = scipy_stats.ttest_1samp(values[:, 0], 0)
    assert comparison["p"] == pytest.approx(tested.pvalue)
    interval = tested.confidence_interval(0.95)
    assert (comparison["low"], comparison["high"]) == pytest.approx(interval)
    sides = [
        scipy_stats.ttest_1samp(values[:, 0], end, alternative=side).pvalue
        for end, side in ((-0.05, "greater"), (0.05, "less"))
    ]
    assert comparison["p_margin"] == pytest.approx(max(sides))


def test_where_all_rows_agree_it_is_the_t_test_of_the_seeds():
    """Rows without a spread of their own leave the means of the seeds."""
    seeds = np.array([0.01, 0.05, 0.03])
    comparison = equivalence.compare_means(np.tile(seeds, (500, 1)), 0.2)
    tested = scipy_stats.ttest_1samp(seeds, 0)
    assert comparison["freedom"] == pytest.approx(2)
    assert comparison["p"] == pytest.approx(tested.pvalue)
    assert comparison["seeds"] == pytest.approx(seeds.tolist())


@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
def test_intervals_cover_the_truth_and_the_margin_is_seldom_passed_by_chance(seed_sd):
    """95 % intervals cover in 92 to 95 % of experiments; a difference as large as the margin is
    called equivalent in about 5 %.
    """
    truth, experiments = 0.05, 600
    compared = [
        equivalence.compare_means(draw_differences(truth, seed, seed_sd=seed_sd), truth)
        for seed in range(experiments)
    ]
    covered = np.mean([c["low"] <= truth <= c["high"] for c in compared])
    wrong = np.mean([c["p_margin"] < 0.05 for c in compared])
    assert 0.91 <= covered <= 0.97
    assert wrong <= 0.07


def test_the_margin_is_passed_where_the_90_percent_interval_lies_inside():
    for seed in range(50):
        comparison = equivalence.compare_means(draw_differences(0.01, seed), 0.05)
        inside = comparison["low90"] > -0.05 and comparison["high90"] < 0.05
        assert (comparison["p_margin"] < 0.05) == inside
        outside = comparison["low"] > 0 or comparison["high"] < 0
        assert (comparison["p"] < 0.05) == outside


def test_identical_answers_are_equivalent_but_not_without_a_width():
    comparison = equivalence.compare_means(np.zeros((300, 3)), 0.02)
    assert comparison["low"] < 0 < comparison["high"] and comparison["is_least"]
    assert not equivalence.compare_means(draw_differences(0, 1), 0.02)["is_least"]
    assert equivalence.describe_verdict(comparison, 0.02) == "equivalent within ±2 points"


@pytest.mark.parametrize(
    ("p", "p_margin", "verdict"),
    [
        (0.01, 0.5, "different"),
        (0.5, 0.01, "equivalent within ±2 points"),
        (0.01, 0.01, "different, but equivalent within ±2 points"),
        (0.5, 0.5, "undecided"),
    ],
)
def test_a_difference_that_is_not_found_shows_no_equivalence(p, p_margin, verdict):
    assert equivalence.describe_verdict({"p": p, "p_margin": p_margin}, 0.02) == verdict


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (-0.012, 0.184, "lower", "ruled out"),
        (-0.025, 0.087, "lower", "neither shown nor ruled out"),
        (-0.515, -0.352, "lower", "shown"),
        (-0.515, -0.352, "higher", "ruled out"),
        (0.303, 0.472, "higher", "shown"),
        (0.01, 0.03, "higher", "neither shown nor ruled out"),
    ],
)
def test_a_hypothesis_is_judged_by_the_interval_on_its_own_side(low, high, expected, verdict):
    assert equivalence.judge_direction({"low": low, "high": high}, 0.02, expected) == verdict


@pytest.mark.parametrize("anew", [False, True])
def test_a_simulated_design_tells_what_experiments_find(anew):
    """Experiments whose rows are drawn one by one find as much as the simulation says."""
    rows, seeds, row_sd, seed_sd = 500, 3, 0.4, 0.02
    design = equivalence.Design(rows, seeds, row_sd, seed_sd)
    planned = equivalence.simulate_design(design, 0.05, anew)
    draw = np.random.default_rng(1)
    compared = []
    for _ in range(800):
        noise = draw.normal(0, row_sd, (rows, seeds if anew else 1)) + draw.normal(
            0, seed_sd, seeds
        )
        compared.append(equivalence.compare_means(noise, planned["showable"]))
    found = np.mean([planned["detectable"] + c["value"] > c["high"] - c["value"] for c in compared])
    shown = np.mean([c["p_margin"] < 0.05 for c in compared])
    within = np.mean([max(-c["low90"], c["high90"]) < 0.05 for c in compared])
    assert found == pytest.approx(0.8, abs=0.05)
    assert shown == pytest.approx(0.8, abs=0.05)
    assert within == pytest.approx(planned["equivalent"], abs=0.05)


def test_a_family_is_corrected():
    family = [{"p": 0.02, "p_margin": 0.3}, {"p": 0.03, "p_margin": 0.01}]
    equivalence.correct_family(family)
    assert [c["p"] for c in family] == pytest.approx([0.04, 0.04])
    assert [c["p_margin"] for c in family] == pytest.approx([0.3, 0.02])
