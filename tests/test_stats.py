"""Scores are scikit-learn's; intervals and tests those of closed forms and a plain bootstrap."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control
from sklearn.metrics import accuracy_score, f1_score

from bench import equivalence
from evals import stats
from evals.tasks import utils
from tests.conftest import run_first

LABELS = ["negative", "neutral", "positive"]
METRICS = ["accuracy", "f1_weighted", "f1_macro"]


def answer(seed, rows, right=0.7, others=("", "I cannot say", *LABELS)):
    """Random expected labels and answers, some of which are no label."""
    chance = random.Random(seed)
    expected = chance.choices(LABELS, weights=[2, 5, 3], k=rows)
    return expected, [e if chance.random() < right else chance.choice(others) for e in expected]


def make_values(metric, expected, answered):
    """What rows give for a metric, as the task files' functions return it."""
    pairs = list(zip(expected, answered, strict=True))
    return [float(e == a) if metric == "accuracy" else [(e, a)] for e, a in pairs]


def score_by_scikit(metric, expected, answered):
    if metric == "accuracy":
        return accuracy_score(expected, answered)
    labels, average = sorted(set(expected)), metric.removeprefix("f1_")
    return f1_score(expected, answered, labels=labels, average=average, zero_division=0)


def make_tags(seed, rows, tags=5):
    """Rows of four tags: lists of pairs."""
    chance = random.Random(seed)
    names = [f"tag{number}" for number in range(tags)]

    def pair():
        expected = chance.choice(names)
        return expected, expected if chance.random() < 0.6 else chance.choice([*names, "[none]"])

    return [[pair() for _ in range(4)] for _ in range(rows)]


def ends(estimated):
    return estimated["low"], estimated["high"]


def width(estimated):
    return estimated["high"] - estimated["low"]


# ---- scores and intervals


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 2, 7, 60, 900])
@pytest.mark.parametrize("right", [0, 0.5, 1])
def test_a_score_is_scikit_learns(metric, rows, right):
    expected, answered = answer(rows, rows, right)
    estimated = stats.estimate(metric, make_values(metric, expected, answered))
    assert estimated["value"] == pytest.approx(
        score_by_scikit(metric, expected, answered), abs=1e-12
    )
    fewest = min(map(expected.count, set(expected)))
    if metric != "accuracy" and (rows < 10 or (metric == "f1_macro" and fewest < 10)):
        assert estimated.keys() == {"value", "no_interval"}
        assert str(rows if rows < 10 else fewest) in estimated["no_interval"]
    else:
        assert 0 <= estimated["low"] <= estimated["value"] <= estimated["high"] <= 1
        assert estimated["low"] < estimated["high"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_tags_of_a_row_count_alone_and_are_drawn_together(metric):
    rows = make_tags(2, 250)
    generator = np.random.default_rng(1)
    sampled = []
    for _ in range(200):
        drawn = [pair for n in generator.integers(0, 250, 250) for pair in rows[n]]
        sampled.append(score_by_scikit(metric, *zip(*drawn, strict=True)))
    estimated = stats.estimate(metric, rows)
    score = score_by_scikit(metric, *zip(*itertools.chain(*rows), strict=True))
    assert estimated["value"] == pytest.approx(score)
    assert ends(estimated) == pytest.approx(tuple(np.percentile(sampled, [2.5, 97.5])), abs=0.015)


def test_rows_whose_tags_are_right_together_have_a_wider_interval_than_single_tags():
    together = [[("a", "a" if n % 2 else "b")] * 4 for n in range(100)]
    apart = [[pair] for row in together for pair in row]
    wide, narrow = stats.estimate("accuracy", together), stats.estimate("accuracy", apart)
    assert wide["value"] == narrow["value"] == 0.5
    assert width(wide) / width(narrow) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.93])
def test_the_interval_of_accuracy_is_the_binomial_one(rate):
    rows, hits = 2000, round(2000 * rate)
    estimated = stats.estimate("accuracy", [1.0] * hits + [0.0] * (rows - hits))
    half = 1.959964 * (rate * (1 - rate) / rows) ** 0.5
    assert ends(estimated) == pytest.approx((rate - half, rate + half), abs=1.2e-3)
    exact = binom.ppf([0.025, 0.975], rows, rate) / rows
    assert ends(estimated) == pytest.approx(tuple(exact), abs=1.1e-3)


def test_the_interval_of_a_mean_is_that_of_the_central_limit():
    sample = list(np.random.default_rng(3).beta(2, 5, 1500))
    estimated = stats.estimate("rouge_l", sample)
    half, mean = 1.959964 * np.std(sample) / math.sqrt(1500), np.mean(sample)
    assert estimated["value"] == pytest.approx(mean)
    assert ends(estimated) == pytest.approx((mean - half, mean + half), abs=4e-4)


@pytest.mark.parametrize("metric", ["f1_weighted", "f1_macro"])
def test_the_interval_of_f1_is_that_of_a_bootstrap_row_by_row(metric):
    expected, answered = map(np.array, answer(5, 250))
    generator = np.random.default_rng(1)
    draws = (generator.integers(0, len(expected), len(expected)) for _ in range(400))
    sampled = [score_by_scikit(metric, expected[rows], answered[rows]) for rows in draws]
    estimated = stats.estimate(metric, make_values(metric, list(expected), list(answered)))
    assert ends(estimated) == pytest.approx(tuple(np.percentile(sampled, [2.5, 97.5])), abs=0.015)


@pytest.mark.parametrize("metric", METRICS)
def test_an_interval_is_the_same_each_time_and_in_any_order_and_narrows_with_more_rows(metric):
    rows = make_values(metric, *answer(7, 300))
    estimated = stats.estimate(metric, rows)
    assert stats.estimate(metric, rows) == stats.estimate(metric, rows[::-1]) == estimated
    more = stats.estimate(metric, rows * 4)
    assert more["value"] == pytest.approx(estimated["value"])
    assert width(more) / width(estimated) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("metric", METRICS)
def test_where_all_rows_are_right_the_interval_is_no_point(metric):
    expected = ["a", "b"] * 30
    estimated = stats.estimate(metric, make_values(metric, expected, expected))
    assert estimated["value"] == estimated["high"] == 1
    assert estimated["low"] == pytest.approx(60 / (60 + 1.96**2), abs=1e-3)  # Wilson's


def test_macro_f1_with_a_class_of_three_rows_has_no_interval_and_says_why():
    expected = ["a"] * 3 + ["b"] * 60 + ["c"] * 90
    rows = make_values("f1_macro", expected, expected)
    assert stats.estimate("f1_macro", rows) == {
        "value": 1,
        "no_interval": "fewer than 10 rows of a class (a: 3)",
    }
    weighted = stats.estimate("f1_weighted", rows)
    assert 0.9 < weighted["low"] < weighted["high"] == 1
    change = stats.compare("f1_macro", rows, rows)
    assert change["p"] is None and "a: 3" in stats.verdict(change, None, 0, 153)
    published = stats.against("f1_macro", rows, 0.9)
    assert published["value"] == pytest.approx(0.1) and "low" not in published


# ---- differences


@pytest.mark.parametrize(
    ("metric", "gain"),
    [("accuracy", 1 / 5), ("f1_weighted", 0.72 - 0.6), ("f1_macro", 0.6 - 2 / 3)],
)
def test_a_difference_of_five_rows_is_the_one_worked_out_by_hand(metric, gain):
    first, second = (make_values(metric, "aabbc", answers) for answers in ("abbac", "aabba"))
    change = stats.compare(metric, first, second)
    assert change["value"] == pytest.approx(gain)
    if metric != "accuracy":
        assert "low" not in change and change["p"] is None and "(5)" in change["no_interval"]
        return
    back = stats.compare(metric, second, first)
    assert back["value"] == pytest.approx(-gain)
    assert ends(back) == pytest.approx((-change["high"], -change["low"]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_answers_differ_by_nothing(metric):
    rows = make_values(metric, *answer(3, 80))
    change = stats.compare(metric, rows, rows)
    assert (change["value"], change["p"]) == (0, 1)
    # That no row differs here does not show that none ever does.
    assert -0.1 < change["low"] < 0 < change["high"] < 0.1


def test_a_gain_on_every_row_where_the_two_differ_is_never_taken_for_a_loss():
    """Two separate intervals overlap widely here; only a paired one leaves out every loss."""
    expected, first = answer(4, 100, right=0.5)
    second = [e if n % 5 == 0 else a for n, (e, a) in enumerate(zip(expected, first, strict=True))]
    one, two = (make_values("accuracy", expected, answers) for answers in (first, second))
    assert stats.estimate("accuracy", two)["low"] < stats.estimate("accuracy", one)["high"]
    assert stats.compare("accuracy", one, two)["low"] > 0


def test_columns_of_different_length_are_no_pairs():
    with pytest.raises(ValueError):
        stats.compare("accuracy", [1.0, 0.0], [1.0])


# ---- how often the intervals hold the truth: simulations with a known one


def count_covered(metric, truth, draw, trials=150):
    """The share of intervals, of `trials` draws of rows, that hold the truth."""
    intervals = (ends(stats.estimate(metric, draw())) for _ in range(trials))
    return sum(low <= truth <= high for low, high in intervals) / trials


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)


@pytest.mark.parametrize(
    ("rate", "rows"), [(1.0, 20), (0.99, 30), (0.02, 50), (0.5, 8), (0.8, 100)]
)
def test_the_interval_of_a_rate_covers_it_also_near_one_and_nought(rate, rows):
    generator = np.random.default_rng(1)

    def draw():
        return list((generator.random(rows) < rate).astype(float))

    assert count_covered("accuracy", rate, draw, trials=600) >= 0.92


# ---- rows of one cluster


def draw_clustered(generator, clusters=60, spread=2.0):
    """Values and clusters of rows whose chance of being right is their cluster's: mean 0.7."""
    sizes = generator.integers(1, 30, clusters)
    chances = np.repeat(generator.beta(0.7 * spread, 0.3 * spread, clusters), sizes)
    values = (generator.random(len(chances)) < chances).astype(float)
    return list(values), np.repeat(np.arange(clusters), sizes).tolist()


@pytest.mark.parametrize("metric", ["accuracy", "f1_weighted"])
def test_the_interval_over_clusters_covers_the_truth_and_that_over_rows_does_not(
    metric, few_resamples
):
    generator = np.random.default_rng(5)
    held = {True: 0, False: 0}
    for _ in range(150):
        values, clusters = draw_clustered(generator)
        if metric == "f1_weighted":  # of one label, recall 0.7: F1 is 2 r / (1 + r)
            values = [[("a", "a" if value else "b")] for value in values]
        truth = 0.7 if metric == "accuracy" else 1.4 / 1.7
        for used in (True, False):
            low, high = ends(stats.estimate(metric, values, clusters if used else None))
            held[used] += low <= truth <= high
    assert held[True] >= 0.89 * 150 and held[False] <= 0.6 * 150


def test_the_interval_of_a_gain_over_clusters_and_seeds_covers_it(few_resamples):
    generator, held = np.random.default_rng(6), 0
    for _ in range(100):
        base, clusters = draw_clustered(generator)
        gains = np.repeat(generator.normal(0.1, 0.2, 60), np.bincount(clusters))
        columns = [list(base + gains + generator.normal(0, 0.05, len(base))) for _ in range(3)]
        low, high = ends(stats.estimate_mean("score", columns, base, clusters))
        held += low <= 0.1 <= high
    assert held >= 89


def test_the_variance_over_clusters_is_the_sandwich():
    values, clusters = draw_clustered(np.random.default_rng(7))
    merged = equivalence.merge_clusters(np.array(values)[:, None], clusters)[:, 0]
    rows, groups, mean = len(values), len(merged), np.mean(values)
    sums = [
        sum(v - mean for v, c in zip(values, clusters, strict=True) if c == g)
        for g in range(groups)
    ]
    sandwich = groups / (groups - 1) * sum(total**2 for total in sums) / rows**2
    assert merged.mean() == pytest.approx(mean)
    assert merged.var(ddof=1) / groups == pytest.approx(sandwich)
    drawn = width(stats.estimate("accuracy", values, clusters))
    assert drawn == pytest.approx(2 * 1.96 * sandwich**0.5, rel=0.12)  # widened for few clusters


def test_copies_of_a_row_add_nothing():
    chance = random.Random(8)
    values = [chance.random() for _ in range(80)]
    once = stats.estimate("rouge_l", values)
    fourfold, clusters = values * 4, [*range(80)] * 4
    assert ends(stats.estimate("rouge_l", fourfold, clusters)) == pytest.approx(
        ends(once), abs=0.01
    )
    assert width(stats.estimate("rouge_l", fourfold)) < 0.6 * width(once)
    other = [min(1.0, value + 0.05 * chance.random()) for value in values]
    single, many = (
        stats.compare(
            "rouge_l", values * count, other * count, [*range(80)] * count if count > 1 else None
        )
        for count in (1, 4)
    )
    assert ends(many) == pytest.approx(ends(single), abs=0.003)


def test_rates_of_clusters_are_not_tested_by_rows():
    first, clusters = draw_clustered(np.random.default_rng(9))
    second = [1.0 if cluster % 2 else value for value, cluster in zip(first, clusters, strict=True)]
    gain = stats.compare("accuracy", first, second, clusters)
    assert gain["test"] == "paired bootstrap of clusters" and 0 < gain["p"] < 0.05
    totals = [
        sum(b - a for a, b, c in zip(first, second, clusters, strict=True) if c == g)
        for g in range(60)
    ]
    assert gain["p"] >= stats.mcnemar(0, sum(total > 0 for total in totals))
    assert width(gain) > width(stats.compare("accuracy", first, second))
    published = stats.against("accuracy", first, 0.5, clusters)
    assert (published["p"], published["test"]) == (None, "interval")
    same = stats.compare("accuracy", first, first, clusters)
    assert (same["value"], same["p"]) == (0, 1) and width(same) > 0.05
    nine = [cluster % 9 for cluster in clusters]
    reason = "fewer than 10 clusters of rows (9)"
    assert stats.estimate("accuracy", first, nine)["no_interval"] == reason
    assert stats.compare("accuracy", first, second, nine)["no_interval"] == reason
    assert stats.estimate_mean("accuracy", [first, second], first, nine)["no_interval"] == reason


def test_clusters_make_no_rate_surer_than_independent_rows_do():
    """Four rows in as many of 50 clusters are won: draws of clusters alone call that shown."""
    clusters = [row // 4 for row in range(200)]
    base = [0.0] * 200
    better = [1.0 if row in (0, 40, 80, 120) else 0.0 for row in range(200)]
    for values in (base, better):
        low, high = ends(stats.estimate("accuracy", values, clusters))
        rows = ends(stats.estimate("accuracy", values))
        assert low <= rows[0] and high >= rows[1]
    gain, by_rows = (stats.compare("accuracy", base, better, c) for c in (clusters, None))
    assert gain["p"] >= by_rows["p"] > 0.1
    assert gain["low"] <= by_rows["low"] < 0 and gain["high"] >= by_rows["high"]


@pytest.mark.parametrize("sizes", [(10, 40, 60), (15, 15, 15)])
@pytest.mark.parametrize("right", [0.7, 0.95])
def test_the_interval_of_macro_f1_covers_it_with_ten_rows_a_class(sizes, right, few_resamples):
    generator = np.random.default_rng(2)
    expected = [label for label, size in enumerate(sizes) for _ in range(size)]
    others = {label: [other for other in range(3) if other != label] for label in range(3)}
    table = np.full((3, 3), (1 - right) / 2) + np.eye(3) * (right - (1 - right) / 2)
    table *= np.array(sizes)[:, None]
    truth = float((2 * np.diag(table) / (table.sum(0) + table.sum(1))).mean())

    def draw():
        answered = [
            e if generator.random() < right else generator.choice(others[e]) for e in expected
        ]
        return [[(str(e), str(a))] for e, a in zip(expected, answered, strict=True)]

    assert count_covered("f1_macro", truth, draw) >= 0.91


@pytest.mark.parametrize(("skill", "rows"), [(0.3, 12), (0.9, 12), (0.5, 200)])
def test_the_interval_of_a_mean_of_few_rows_covers_it(skill, rows, few_resamples):
    generator = np.random.default_rng(3)

    def draw():
        return list(generator.beta(4 * skill, 4 * (1 - skill), rows))

    assert count_covered("rouge_l", skill, draw, trials=200) >= 0.89


@pytest.mark.parametrize(
    ("off", "rows"), run_first(1, [(0.0, 60), (0.0, 300), (0.05, 60), (0.2, 300)])
)
def test_the_interval_of_ece_covers_it_also_where_it_is_nought(off, rows, few_resamples):
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
        low, high = ends(stats.compare("accuracy", list(first), list(second)))
        covered += low <= won - lost <= high
    assert covered / 300 >= 0.93


# ---- tests


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (3, 12), (8, 8), (40, 61)])
def test_accuracy_is_tested_by_mcnemar_whose_p_is_the_sum_of_the_coins_tails(lost, won):
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    first = [1.0] * (50 + lost) + [0.0] * (won + 33)
    second = [1.0] * 50 + [0.0] * lost + [1.0] * won + [0.0] * 33
    change = stats.compare("accuracy", first, second)
    assert (change["test"], change["p"]) == ("McNemar", pytest.approx(min(1, 2 * tail)))


def test_the_p_of_the_paired_bootstrap_is_that_of_the_normal_tail():
    generator = np.random.default_rng(2)
    first = generator.normal(0.5, 0.1, 400)
    second = first + generator.normal(0.013, 0.08, 400)
    z = (second - first).mean() / ((second - first).std() / 20)
    expected = math.erfc(abs(z) / math.sqrt(2))
    change = stats.compare("token_f1", list(first), list(second))
    assert change["test"] == "paired bootstrap"
    assert 0.001 < expected < 0.2
    assert change["p"] == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("seed", range(6))
def test_a_bootstrap_p_below_5_percent_is_an_interval_without_zero(seed):
    expected, first = answer(seed, 150, right=0.6)
    second = answer(seed + 100, 150, right=0.7)[1]
    columns = (make_values("f1_weighted", expected, answers) for answers in (first, second))
    change = stats.compare("f1_weighted", *columns)
    assert (change["low"] > 0 or change["high"] < 0) == (change["p"] < 0.05)


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
    sizes = (itertools.combinations(range(5), size) for size in range(1, 6))
    subsets = list(itertools.chain(*sizes))
    for index, p in enumerate(stats.holm(ps)):
        mine = (subset for subset in subsets if index in subset)
        assert p == pytest.approx(max(min(1, len(s) * min(ps[n] for n in s)) for s in mine))
    assert stats.holm(ps) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert stats.holm([]) == [] and stats.holm([0.2]) == [0.2]
    # The false discovery rate asks for less: Holm's p is never below Benjamini-Hochberg's.
    assert all(np.array(stats.holm(ps)) >= false_discovery_control(ps) - 1e-12)


def test_a_published_score_is_tested_by_the_exact_binomial_and_f1_by_the_interval():
    change = stats.against("finlora_accuracy", [1.0] * 90 + [0.0] * 10, 0.8)
    tail = 1 - binom.cdf(89, 100, 0.8)
    assert change["value"] == pytest.approx(0.1)
    assert tail < change["p"] < 2.5 * tail
    assert change["low"] == pytest.approx(0.0256, abs=1e-3)  # Wilson
    rows = make_values("f1_weighted", *answer(9, 300))
    change = stats.against("finlora_f1_weighted", rows, 0.99)
    assert change["p"] is None and change["high"] < 0
    assert stats.verdict(change, None, 0, 300).startswith("worse by ")


# ---- in words


@pytest.mark.parametrize(
    ("gain", "corrected", "words"),
    [
        ((0.439, 0.382, 0.495), 1e-30, "better by 43.9 points; unlikely by chance: p < 0.0001"),
        ((-0.05, -0.08, -0.02), 0.004, "worse by 5.0 points; unlikely by chance: p = 0.004"),
        ((0.012, -0.03, 0.05), 0.56, "no difference shown: +1.2 points, -3.0 to +5.0"),
        ((0.1, 0.01, 0.19), 0.06, "no difference shown: +10.0 points"),
    ],
)
def test_a_difference_is_put_into_words(gain, corrected, words):
    change = dict(zip(("value", "low", "high"), gain, strict=True)) | {"test": "McNemar"}
    text = stats.verdict(change, corrected, 5, 312)
    assert text.startswith(words)
    assert text.endswith("(McNemar, Holm over 5 datasets)")
    small = stats.verdict(change, corrected, 1, 43)
    assert small.endswith("(McNemar). Small: only 43 rows, 2.3 points each")


def test_the_f1_of_the_task_files_is_the_f1_with_the_interval():
    for seed in range(4):
        rows = make_values("f1_weighted", *answer(seed, 50 + seed))
        for metric, function in (("f1_weighted", utils.f1_weighted), ("f1_macro", utils.f1_macro)):
            assert function(rows) == pytest.approx(stats.estimate(metric, rows)["value"])
    rows = make_tags(1, 50)
    assert utils.share(rows) == pytest.approx(stats.estimate("accuracy", rows)["value"])


# ---- calibration


def compute_ece(rows):
    """ECE by its definition, bin by bin: weight · |accuracy - mean confidence|."""
    bins = {}
    for share, right in rows:
        bins.setdefault(min(int(share * 15), 14), []).append((share, right))
    means = [(len(inside), *np.mean(inside, axis=0)) for inside in bins.values()]
    return sum(n / len(rows) * abs(accuracy - confidence) for n, confidence, accuracy in means)


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_ece_is_its_definition(rows):
    chance = random.Random(rows)
    shares = [chance.choice([1.0, chance.uniform(1 / 3, 1)]) for _ in range(rows)]
    column = [(share, float(chance.random() < share**2)) for share in shares]
    estimated = stats.estimate("ece", [[pair] for pair in column])
    assert estimated["value"] == pytest.approx(compute_ece(column), abs=1e-12)
    if rows > 1:
        assert estimated["low"] <= estimated["value"] <= estimated["high"]


def test_a_model_that_knows_its_chances_has_no_calibration_error():
    sure, wrong = [[(1.0, 1.0)]], [[(1.0, 0.0)]]
    three_of_four = [[(0.75, 1.0)]] * 3 + [[(0.75, 0.0)]]
    values = [
        stats.estimate("ece", rows)["value"] for rows in (sure * 10, three_of_four, wrong * 5)
    ]
    assert values == [0, 0, 1]
    change = stats.compare("ece", wrong * 50, sure * 50)
    assert (change["value"], change["test"]) == (-1, "paired bootstrap")
