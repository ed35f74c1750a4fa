"""Scores are scikit-learn's, and their intervals those of the closed form and a plain bootstrap."""

import itertools
import random

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import accuracy_score, f1_score

from evals import stats
from evals.tasks import utils

LABELS = ["negative", "neutral", "positive"]
EXPECTED, FIRST, SECOND = list("aabbc"), list("abbac"), list("aabba")


def answers(seed, rows, right=0.7, others=("", "I cannot say", *LABELS)):
    """Random expected labels and answers, some of which are no label."""
    chance = random.Random(seed)
    expected = chance.choices(LABELS, weights=[2, 5, 3], k=rows)
    return expected, [
        label if chance.random() < right else chance.choice(others) for label in expected
    ]


def by_scikit(score, expected, answered):
    if score == "accuracy":
        return accuracy_score(expected, answered)
    labels, average = sorted(set(expected)), score.removeprefix("f1_")
    return f1_score(expected, answered, labels=labels, average=average, zero_division=0)


@pytest.mark.parametrize("score", stats.SCORES)
@pytest.mark.parametrize("rows", [1, 2, 7, 60, 900])
@pytest.mark.parametrize("right", [0, 0.5, 1])
def test_a_score_is_scikit_learns(score, rows, right):
    expected, answered = answers(rows, rows, right)
    found = stats.estimate(score, expected, answered)
    assert found["value"] == pytest.approx(by_scikit(score, expected, answered), abs=1e-12)
    assert 0 <= found["low"] <= found["high"] <= 1


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.93])
def test_the_interval_of_accuracy_is_the_binomial_one(rate):
    rows, hits = 2000, round(2000 * rate)
    found = stats.estimate("accuracy", ["yes"] * rows, ["yes"] * hits + ["no"] * (rows - hits))
    half = 1.959964 * (rate * (1 - rate) / rows) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((rate - half, rate + half), abs=1.2e-3)
    exact = binom.ppf([0.025, 0.975], rows, rate) / rows
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact), abs=1.1e-3)


@pytest.mark.parametrize("score", ["f1_weighted", "f1_macro"])
def test_the_interval_of_f1_is_that_of_a_bootstrap_row_by_row(score):
    expected, answered = map(np.array, answers(5, 250))
    generator = np.random.default_rng(1)
    draws = (generator.integers(0, len(expected), len(expected)) for _ in range(400))
    sampled = [by_scikit(score, expected[rows], answered[rows]) for rows in draws]
    low, high = np.percentile(sampled, [2.5, 97.5])
    found = stats.estimate(score, list(expected), list(answered))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.015)


@pytest.mark.parametrize(
    ("score", "gain"), [("accuracy", 1 / 5), ("f1_weighted", 0.72 - 0.6), ("f1_macro", 0.6 - 2 / 3)]
)
def test_a_difference_of_five_rows_is_the_one_worked_out_by_hand(score, gain):
    found = stats.difference(score, EXPECTED, FIRST, SECOND)
    assert found["value"] == pytest.approx(gain)
    back = stats.difference(score, EXPECTED, SECOND, FIRST)
    assert back["value"] == pytest.approx(-gain)
    assert (back["low"], back["high"]) == pytest.approx((-found["high"], -found["low"]), abs=0.05)


def test_the_paired_interval_of_five_rows_is_that_of_all_3125_resamples():
    gains = [(e == s) - (e == f) for e, f, s in zip(EXPECTED, FIRST, SECOND, strict=True)]
    sampled = [sum(drawn) / 5 for drawn in itertools.product(gains, repeat=5)]
    found = stats.difference("accuracy", EXPECTED, FIRST, SECOND)
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(sampled, [2.5, 97.5]))


@pytest.mark.parametrize("score", stats.SCORES)
def test_the_same_answers_differ_by_nothing(score):
    expected, answered = answers(3, 80)
    zero = {"value": 0, "low": 0, "high": 0}
    assert stats.difference(score, expected, answered, answered) == zero


def test_a_gain_on_every_row_where_the_two_differ_is_never_taken_for_a_loss():
    """Two separate intervals overlap widely here; only a paired one leaves out every loss."""
    expected, first = answers(4, 100, right=0.5)
    second = [e if n % 5 == 0 else a for n, (e, a) in enumerate(zip(expected, first, strict=True))]
    before = stats.estimate("accuracy", expected, first)
    after = stats.estimate("accuracy", expected, second)
    assert after["low"] < before["high"]
    assert stats.difference("accuracy", expected, first, second)["low"] > 0


@pytest.mark.parametrize("score", stats.SCORES)
def test_an_interval_is_the_same_each_time_and_in_any_order_of_rows(score):
    expected, answered = answers(6, 200)
    once = stats.estimate(score, expected, answered)
    assert stats.estimate(score, expected, answered) == once
    assert stats.estimate(score, expected[::-1], answered[::-1]) == once


@pytest.mark.parametrize("score", stats.SCORES)
def test_four_times_the_rows_halve_the_interval(score):
    expected, answered = answers(7, 300)
    few = stats.estimate(score, expected, answered)
    many = stats.estimate(score, expected * 4, answered * 4)
    assert many["value"] == pytest.approx(few["value"])
    ratio = (many["high"] - many["low"]) / (few["high"] - few["low"])
    assert ratio == pytest.approx(0.5, abs=0.05)


def test_lists_of_unlike_length_are_no_pairs():
    with pytest.raises(ValueError):
        stats.estimate("accuracy", ["a", "b"], ["a"])
    with pytest.raises(ValueError):
        stats.difference("accuracy", ["a", "b"], ["a", "b"], ["a"])


# ---- evals/tasks/utils.py, which lm-eval calls


@pytest.mark.parametrize(
    ("key", "answer", "pair", "right"),
    [
        ("neutral", "neutral", ("neutral", "neutral"), 1.0),
        ("Yes", " yes\n", ("yes", "yes"), 1.0),
        ("strong negative", "Strong  Negative", ("strong negative", "strong negative"), 1.0),
        ("neutral", "", ("neutral", ""), 0.0),
        ("negative", "negatively", ("negative", "negatively"), 0.0),
    ],
)
def test_an_answer_is_right_but_for_case_and_spaces(key, answer, pair, right):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": key}]
    scored = utils.label({"messages": turns}, [answer])
    assert scored == {"accuracy": right, "f1_weighted": pair, "f1_macro": pair}


@pytest.mark.parametrize("seed", range(4))
def test_the_f1_of_the_task_files_is_the_f1_with_the_interval(seed):
    expected, answered = answers(seed, 50 + seed)
    pairs = list(zip(expected, answered, strict=True))
    for score, function in (("f1_weighted", utils.f1_weighted), ("f1_macro", utils.f1_macro)):
        assert function(pairs) == pytest.approx(stats.estimate(score, expected, answered)["value"])
