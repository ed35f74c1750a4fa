"""Scores are scikit-learn's; intervals and tests those of closed forms and a plain bootstrap."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control
from sklearn.metrics import accuracy_score, f1_score

from evals import stats
from evals.tasks import utils

LABELS = ["negative", "neutral", "positive"]
METRICS = ["accuracy", "f1_weighted", "f1_macro"]
EXPECTED, FIRST, SECOND = list("aabbc"), list("abbac"), list("aabba")


def answers(seed, rows, right=0.7, others=("", "I cannot say", *LABELS)):
    """Random expected labels and answers, some of which are no label."""
    chance = random.Random(seed)
    expected = chance.choices(LABELS, weights=[2, 5, 3], k=rows)
    return expected, [
        label if chance.random() < right else chance.choice(others) for label in expected
    ]


def values(metric, expected, answered):
    """What rows give for a metric, as the task files' functions have it."""
    pairs = list(zip(expected, answered, strict=True))
    return [float(e == a) if metric == "accuracy" else [(e, a)] for e, a in pairs]


def by_scikit(metric, expected, answered):
    if metric == "accuracy":
        return accuracy_score(expected, answered)
    labels, average = sorted(set(expected)), metric.removeprefix("f1_")
    return f1_score(expected, answered, labels=labels, average=average, zero_division=0)


def tagged(seed, rows, tags=5, each=4):
    """Rows of several tags: lists of pairs."""
    chance = random.Random(seed)
    names = [f"tag{number}" for number in range(tags)]

    def pair():
        expected = chance.choice(names)
        return expected, expected if chance.random() < 0.6 else chance.choice([*names, "[none]"])

    return [[pair() for _ in range(each)] for _ in range(rows)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 2, 7, 60, 900])
@pytest.mark.parametrize("right", [0, 0.5, 1])
def test_a_score_is_scikit_learns(metric, rows, right):
    expected, answered = answers(rows, rows, right)
    found = stats.estimate(metric, values(metric, expected, answered))
    assert found["value"] == pytest.approx(by_scikit(metric, expected, answered), abs=1e-12)
    fewest = min(map(expected.count, set(expected)))
    if metric != "accuracy" and (rows < 10 or (metric == "f1_macro" and fewest < 10)):
        assert found.keys() == {"value", "no_interval"}
        assert str(rows if rows < 10 else fewest) in found["no_interval"]
    else:
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert found["low"] < found["high"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_of_rows_with_several_tags_is_that_of_all_tags(metric):
    rows = tagged(1, 300, tags=40)
    expected, answered = zip(*(pair for row in rows for pair in row), strict=True)
    assert stats.estimate(metric, rows)["value"] == pytest.approx(
        by_scikit(metric, expected, answered)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_tags_of_a_row_are_drawn_together(metric):
    rows = tagged(2, 250)
    generator = np.random.default_rng(1)
    sampled = []
    for _ in range(200):
        drawn = [pair for n in generator.integers(0, 250, 250) for pair in rows[n]]
        sampled.append(by_scikit(metric, *zip(*drawn, strict=True)))
    low, high = np.percentile(sampled, [2.5, 97.5])
    found = stats.estimate(metric, rows)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.015)


def test_rows_whose_tags_are_right_together_have_a_wider_interval_than_single_tags():
    together = [[("a", "a" if n % 2 else "b")] * 4 for n in range(100)]
    apart = [[pair] for row in together for pair in row]
    wide, narrow = stats.estimate("accuracy", together), stats.estimate("accuracy", apart)
    assert wide["value"] == narrow["value"] == 0.5
    ratio = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
    assert ratio == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.93])
def test_the_interval_of_accuracy_is_the_binomial_one(rate):
    rows, hits = 2000, round(2000 * rate)
    found = stats.estimate("accuracy", [1.0] * hits + [0.0] * (rows - hits))
    half = 1.959964 * (rate * (1 - rate) / rows) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((rate - half, rate + half), abs=1.2e-3)
    exact = binom.ppf([0.025, 0.975], rows, rate) / rows
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact), abs=1.1e-3)


def test_the_interval_of_a_mean_is_that_of_the_central_limit():
    sample = list(np.random.default_rng(3).beta(2, 5, 1500))
    found = stats.estimate("rouge_l", sample)
    half = 1.959964 * np.std(sample) / math.sqrt(1500)
    mean = np.mean(sample)
    assert found["value"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half), abs=4e-4)


@pytest.mark.parametrize("metric", ["f1_weighted", "f1_macro"])
def test_the_interval_of_f1_is_that_of_a_bootstrap_row_by_row(metric):
    expected, answered = map(np.array, answers(5, 250))
    generator = np.random.default_rng(1)
    draws = (generator.integers(0, len(expected), len(expected)) for _ in range(400))
    sampled = [by_scikit(metric, expected[rows], answered[rows]) for rows in draws]
    low, high = np.percentile(sampled, [2.5, 97.5])
    found = stats.estimate(metric, values(metric, list(expected), list(answered)))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.015)


@pytest.mark.parametrize("metric", METRICS)
def test_few_and_many_kinds_of_rows_are_drawn_alike(metric, monkeypatch):
    rows = values(metric, *answers(8, 400))
    counted = stats.estimate(metric, rows)
    monkeypatch.setattr(stats, "FEW", 0)
    drawn = stats.estimate(metric, rows)
    assert drawn["value"] == counted["value"]
    ends = (counted["low"], counted["high"])
    assert (drawn["low"], drawn["high"]) == pytest.approx(ends, abs=0.004)


# ---- differences


@pytest.mark.parametrize(
    ("metric", "gain"),
    [("accuracy", 1 / 5), ("f1_weighted", 0.72 - 0.6), ("f1_macro", 0.6 - 2 / 3)],
)
def test_a_difference_of_five_rows_is_the_one_worked_out_by_hand(metric, gain):
    first, second = values(metric, EXPECTED, FIRST), values(metric, EXPECTED, SECOND)
    found = stats.compare(metric, first, second)
    assert found["value"] == pytest.approx(gain)
    if metric != "accuracy":
        assert "low" not in found and found["p"] is None and "(5)" in found["no_interval"]
        return
    back = stats.compare(metric, second, first)
    assert back["value"] == pytest.approx(-gain)
    assert (back["low"], back["high"]) == pytest.approx((-found["high"], -found["low"]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_answers_differ_by_nothing(metric):
    rows = values(metric, *answers(3, 80))
    found = stats.compare(metric, rows, rows)
    assert (found["value"], found["p"]) == (0, 1)
    # That no row differs here does not show that none ever does.
    assert -0.1 < found["low"] < 0 < found["high"] < 0.1


def test_a_gain_on_every_row_where_the_two_differ_is_never_taken_for_a_loss():
    """Two separate intervals overlap widely here; only a paired one leaves out every loss."""
    expected, first = answers(4, 100, right=0.5)
    second = [e if n % 5 == 0 else a for n, (e, a) in enumerate(zip(expected, first, strict=True))]
    one, two = values("accuracy", expected, first), values("accuracy", expected, second)
    assert stats.estimate("accuracy", two)["low"] < stats.estimate("accuracy", one)["high"]
    assert stats.compare("accuracy", one, two)["low"] > 0


@pytest.mark.parametrize("metric", METRICS)
def test_an_interval_is_the_same_each_time_and_in_any_order_of_rows(metric):
    rows = values(metric, *answers(6, 200))
    once = stats.estimate(metric, rows)
    assert stats.estimate(metric, rows) == once
    assert stats.estimate(metric, rows[::-1]) == once


@pytest.mark.parametrize("metric", METRICS)
def test_four_times_the_rows_halve_the_interval(metric):
    rows = values(metric, *answers(7, 300))
    few, many = stats.estimate(metric, rows), stats.estimate(metric, rows * 4)
    assert many["value"] == pytest.approx(few["value"])
    ratio = (many["high"] - many["low"]) / (few["high"] - few["low"])
    assert ratio == pytest.approx(0.5, abs=0.05)


def test_values_of_unlike_many_rows_are_no_pairs():
    with pytest.raises(ValueError):
        stats.compare("accuracy", [1.0, 0.0], [1.0])


# ---- how often the intervals hold the truth: simulations with a known one


def count_covered(metric, truth, draw, trials=150):
    """The share of intervals, of `trials` draws of rows, that hold the truth."""
    covered = 0
    for _ in range(trials):
        estimated = stats.estimate(metric, draw())
        covered += estimated["low"] <= truth <= estimated["high"]
    return covered / trials


@pytest.mark.parametrize(
    ("rate", "rows"), [(1.0, 20), (0.99, 30), (0.02, 50), (0.5, 8), (0.8, 100)]
)
def test_the_interval_of_a_rate_covers_it_also_near_one_and_nought(rate, rows):
    generator = np.random.default_rng(1)

    def draw():
        return list((generator.random(rows) < rate).astype(float))

    assert count_covered("accuracy", rate, draw, trials=600) >= 0.92


@pytest.mark.parametrize("sizes", [(10, 40, 60), (15, 15, 15)])
@pytest.mark.parametrize("right", [0.7, 0.95])
def test_the_interval_of_macro_f1_covers_it_with_ten_rows_a_class(sizes, right, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    generator = np.random.default_rng(2)
    expected = [label for label, size in enumerate(sizes) for _ in range(size)]
    others = {label: [other for other in range(3) if other != label] for label in range(3)}
    table = np.full((3, 3), (1 - right) / 2) + np.eye(3) * (right - (1 - right) / 2)
    table *= np.array(sizes)[:, None]
    truth = float((2 * np.diag(table) / (table.sum(0) + table.sum(1))).mean())

    def draw():
        answered = [
            label if generator.random() < right else generator.choice(others[label])
            for label in expected
        ]
        return [[(str(e), str(a))] for e, a in zip(expected, answered, strict=True)]

    assert count_covered("f1_macro", truth, draw) >= 0.91


def test_macro_f1_with_a_class_of_three_rows_has_no_interval_and_says_why():
    expected = ["a"] * 3 + ["b"] * 60 + ["c"] * 90
    estimated = stats.estimate("f1_macro", values("f1_macro", expected, expected))
    assert estimated == {"value": 1, "no_interval": "fewer than 10 rows of a class (a: 3)"}
    weighted = stats.estimate("f1_weighted", values("f1_weighted", expected, expected))
    assert 0.9 < weighted["low"] < weighted["high"] == 1
    change = stats.compare("f1_macro", *[values("f1_macro", expected, expected)] * 2)
    assert change["p"] is None and "a: 3" in stats.verdict(change, None, 0, 153)
    published = stats.against("f1_macro", values("f1_macro", expected, expected), 0.9)
    assert published["value"] == pytest.approx(0.1) and "low" not in published


@pytest.mark.parametrize(("skill", "rows"), [(0.3, 12), (0.9, 12), (0.5, 200)])
def test_the_interval_of_a_mean_of_few_rows_covers_it(skill, rows, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    generator = np.random.default_rng(3)
    shape = (4 * skill, 4 * (1 - skill))
    draw = lambda: list(generator.beta(*shape, rows))  # noqa: E731
    assert count_covered("rouge_l", skill, draw, trials=200) >= 0.89


@pytest.mark.parametrize(("off", "rows"), [(0.0, 60), (0.0, 300), (0.05, 60), (0.2, 300)])
def test_the_interval_of_ece_covers_it_also_where_it_is_nought(off, rows, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    generator = np.random.default_rng(4)

    def draw():
        shares = generator.uniform(0.45, 0.95, rows)
        right = generator.random(rows) < shares - off
        return [[(float(s), float(r))] for s, r in zip(shares, right, strict=True)]

    assert count_covered("ece", off, draw, trials=60) >= 0.88


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.01, 0.01), (0.05, 0.2), (0.0, 0.03)])
def test_the_interval_of_a_difference_of_rates_covers_it(lost, won):
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        kind = generator.choice(3, 60, p=[lost, won, 1 - lost - won])
        first, second = (kind == 0).astype(float), (kind == 1).astype(float)
        change = stats.compare("accuracy", list(first), list(second))
        covered += change["low"] <= won - lost <= change["high"]
    assert covered / 300 >= 0.93


@pytest.mark.parametrize("metric", METRICS)
def test_where_all_rows_are_right_the_interval_is_no_point(metric):
    expected = ["a", "b"] * 30
    estimated = stats.estimate(metric, values(metric, expected, expected))
    assert estimated["value"] == estimated["high"] == 1
    assert estimated["low"] == pytest.approx(60 / (60 + 1.96**2), abs=1e-3)  # Wilson's


# ---- tests


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (3, 12), (8, 8), (40, 61)])
def test_mcnemars_p_is_the_sum_of_the_coins_tails(lost, won):
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    assert stats.mcnemar(lost, won) == pytest.approx(min(1, 2 * tail))


def test_accuracy_is_tested_by_mcnemar_on_the_rows_that_differ():
    first = [1.0] * 50 + [0.0] * 14 + [1.0] * 3 + [0.0] * 33
    second = [1.0] * 50 + [1.0] * 14 + [0.0] * 3 + [0.0] * 33
    found = stats.compare("accuracy", first, second)
    assert found["test"] == "McNemar"
    assert found["p"] == pytest.approx(stats.mcnemar(3, 14))


def test_the_p_of_the_paired_bootstrap_is_that_of_the_normal_tail():
    generator = np.random.default_rng(2)
    first = generator.normal(0.5, 0.1, 400)
    second = first + generator.normal(0.013, 0.08, 400)
    gains = second - first
    z = gains.mean() / (gains.std() / 20)
    expected = math.erfc(abs(z) / math.sqrt(2))
    found = stats.compare("token_f1", list(first), list(second))
    assert found["test"] == "paired bootstrap"
    assert 0.001 < expected < 0.2
    assert found["p"] == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("seed", range(6))
def test_a_bootstrap_p_below_5_percent_is_an_interval_without_zero(seed):
    expected, first = answers(seed, 150, right=0.6)
    second = answers(seed + 100, 150, right=0.7)[1]
    one, two = (values("f1_weighted", expected, side) for side in (first, second))
    found = stats.compare("f1_weighted", one, two)
    outside = found["low"] > 0 or found["high"] < 0
    assert outside == (found["p"] < 0.05)


def test_alike_models_are_told_apart_no_more_often_than_the_level_says():
    """Type I error: the share of p < 0.05 where there is no difference, over 400 comparisons."""
    chance = random.Random(1)
    rejected = 0
    for _ in range(400):
        lost = sum(chance.random() < 0.5 for _ in range(40))
        rejected += stats.mcnemar(lost, 40 - lost) < 0.05
    assert rejected / 400 <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_holms_correction_is_that_of_every_closed_subset():
    """Closed testing: a hypothesis falls if Bonferroni rejects every subset that it is in."""
    ps = [0.01, 0.04, 0.03, 0.005, 0.6]
    for index, p in enumerate(stats.holm(ps)):
        subsets = (
            subset
            for size in range(1, 6)
            for subset in itertools.combinations(range(5), size)
            if index in subset
        )
        closed = max(min(1, len(s) * min(ps[n] for n in s)) for s in subsets)
        assert p == pytest.approx(closed)
    assert stats.holm(ps) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert stats.holm([]) == [] and stats.holm([0.2]) == [0.2]
    # The false discovery rate asks for less: Holm's p is never below Benjamini-Hochberg's.
    assert all(np.array(stats.holm(ps)) >= false_discovery_control(ps) - 1e-12)


def test_a_published_score_is_tested_by_the_exact_binomial():
    found = stats.against("finlora_accuracy", [1.0] * 90 + [0.0] * 10, 0.8)
    tail = 1 - binom.cdf(89, 100, 0.8)
    assert found["value"] == pytest.approx(0.1)
    assert tail < found["p"] < 2.5 * tail
    assert found["low"] == pytest.approx(0.0256, abs=1e-3)  # Wilson


def test_a_published_f1_is_compared_by_the_interval_alone():
    rows = values("f1_weighted", *answers(9, 300))
    found = stats.against("finlora_f1_weighted", rows, 0.99)
    assert found["p"] is None and found["high"] < 0
    assert stats.verdict(found, None, 0, 300).startswith("worse by ")


# ---- in words


@pytest.mark.parametrize(
    ("gain", "corrected", "rows", "words"),
    [
        (
            (0.439, 0.382, 0.495),
            1e-30,
            312,
            "better by 43.9 points; unlikely by chance: p < 0.0001",
        ),
        ((-0.05, -0.08, -0.02), 0.004, 312, "worse by 5.0 points; unlikely by chance: p = 0.004"),
        ((0.012, -0.03, 0.05), 0.56, 312, "no difference shown: +1.2 points, -3.0 to +5.0"),
        ((0.1, 0.01, 0.19), 0.06, 312, "no difference shown: +10.0 points"),
    ],
)
def test_a_difference_is_put_into_words(gain, corrected, rows, words):
    found = dict(zip(("value", "low", "high"), gain, strict=True)) | {"test": "McNemar"}
    text = stats.verdict(found, corrected, 5, rows)
    assert text.startswith(words)
    assert text.endswith("(McNemar, Holm over 5 datasets)")


def test_a_small_set_says_that_it_is_small():
    found = {"value": 0.1, "low": -0.1, "high": 0.3, "test": "McNemar"}
    assert stats.verdict(found, 0.5, 1, 43).endswith("Small: only 43 rows, 2.3 points each")
    assert "Small" not in stats.verdict(found, 0.5, 1, 100)


def test_the_f1_of_the_task_files_is_the_f1_with_the_interval():
    for seed in range(4):
        rows = values("f1_weighted", *answers(seed, 50 + seed))
        for metric, function in (("f1_weighted", utils.f1_weighted), ("f1_macro", utils.f1_macro)):
            assert function(rows) == pytest.approx(stats.estimate(metric, rows)["value"])
    assert utils.share(tagged(1, 50)) == pytest.approx(
        stats.estimate("accuracy", tagged(1, 50))["value"]
    )


# ---- calibration


def by_definition(rows):
    """ECE by its definition, bin by bin: weight · |accuracy - mean confidence|."""
    total = 0.0
    for number in range(15):
        inside = [
            (share, right)
            for share, right in rows
            if number / 15 <= share < (number + 1) / 15 or (number == 14 and share == 1)
        ]
        if inside:
            confidence, accuracy = (
                sum(column) / len(inside) for column in zip(*inside, strict=True)
            )
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_ece_is_its_definition(rows):
    chance = random.Random(rows)
    shares = [chance.choice([1.0, chance.uniform(1 / 3, 1)]) for _ in range(rows)]
    column = [(share, float(chance.random() < share**2)) for share in shares]
    found = stats.estimate("ece", [[one] for one in column])
    assert found["value"] == pytest.approx(by_definition(column), abs=1e-12)
    if rows > 1:
        assert found["low"] <= found["value"] <= found["high"]


def test_a_model_that_knows_its_chances_has_no_calibration_error():
    sure = [[(1.0, 1.0)]] * 10
    three_of_four = [[(0.75, 1.0)]] * 3 + [[(0.75, 0.0)]]
    assert stats.estimate("ece", sure)["value"] == 0
    assert stats.estimate("ece", three_of_four)["value"] == 0
    assert stats.estimate("ece", [[(1.0, 0.0)]] * 5)["value"] == 1
    better = stats.compare("ece", [[(1.0, 0.0)]] * 50, sure * 5)
    assert (better["value"], better["test"]) == (-1, "paired bootstrap")
