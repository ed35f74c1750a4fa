"""Measured recipes: the schema, the figures of the experiments, and the README's table."""

import json

import pytest

from evals import results, stats
from tests.conftest import run
from tools.common import JobFailed, WrongInput

BEYOND = json.loads((results.FOLDER / "beyond.json").read_text())
PARITY = json.loads((results.FOLDER / "parity.json").read_text())


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page and a figure of their own."""
    file = tmp_path / "README.md"
    file.write_text(f"before\n{results.BEGIN}yesterday\n{results.END}after\n")
    monkeypatch.setattr(results, "PAGE", file)
    monkeypatch.setattr(results, "FIGURE", results.ROOT / "docs" / "results.svg")
    return file


def load(name):
    return results.load_measurement(results.FOLDER / "smollm2-135m" / f"{name}.json")


@pytest.mark.parametrize(("side", "name"), [(0, "sentiment_r4"), (1, "sentiment_r4_all")])
def test_a_whole_recipe_has_the_figures_of_the_search(side, name):
    measurement = load(name)
    assert measurement.seconds == BEYOND["confirmed"]["seconds"][side]
    for dataset, result in measurement.datasets.items():
        measured = BEYOND["confirmed"]["sets"][dataset]
        assert result.rows == measured["rows"]
        assert result.base.value == pytest.approx(measured["base"], abs=6e-5)
        assert result.adapter.value == pytest.approx(measured["accuracy"][side], abs=6e-5)


@pytest.mark.parametrize(
    ("name", "part", "task", "variant"),
    [
        ("sentiment_r8", "precision_2e-3", "sentiment", "int8"),
        ("sentiment_r8_fp16", "precision_2e-3", "sentiment", "full"),
        ("sentiment_r8_dora", "method", "sentiment", "DoRA"),
        ("sentiment_r8_rslora", "method", "sentiment", "rsLoRA"),
        ("xbrl_term_r8", "precision", "xbrl_term", "int8"),
        ("xbrl_term_r8_fp16", "precision", "xbrl_term", "full"),
    ],
)
def test_a_recipe_of_60_steps_has_the_figures_of_the_parity_experiment(name, part, task, variant):
    (result,) = load(f"{name}_60_steps").datasets.values()
    entry = PARITY["parts"][part][task]
    measured = entry["variants"][variant]
    mean = sum(measured["scores"]) / len(measured["scores"])
    assert (result.metric, result.rows) == (entry["metric"], entry["rows"])
    assert len(result.seeds) == len(measured["scores"])
    assert result.base.value == pytest.approx(measured["base"], abs=6e-5)
    assert result.adapter.value == pytest.approx(mean, abs=6e-5)


def test_differences_are_those_of_the_scores_and_rates_have_wilsons_interval():
    for measurement in results.load_measurements():
        for result in measurement.datasets.values():
            gain = result.adapter.value - result.base.value
            assert result.difference.value == pytest.approx(gain, abs=1e-5)
            for score in (result.base, result.adapter):
                if score.low is not None:
                    right = round(score.value * result.rows)
                    values = [1.0] * right + [0.0] * (result.rows - right)
                    expected = stats.estimate(result.metric, values)
                    assert (score.low, score.high) == pytest.approx(
                        (expected["low"], expected["high"]), abs=1e-5
                    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"version": None}, "version"),
        ({"seconds": -1}, "seconds"),
        ({"datasets": {"fpb": {"metric": "accuracy"}}}, "datasets.fpb.rows"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(tmp_path, change, message):
    content = json.loads((results.FOLDER / "smollm2-135m" / "sentiment_r4.json").read_text())
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(content | change))
    with pytest.raises(WrongInput, match=f"wrong.json: {message}: ") as error:
        results.load_measurement(file)
    assert "\n" not in str(error.value)


def test_the_page_gets_the_table_and_an_old_one_is_an_error(page):
    with pytest.raises(JobFailed, match="does not match results/"):
        results.write(check=True)
    results.write()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    assert (
        "| `smollm2-135m/sentiment_r4` | fpb, 312 | accuracy | 28.5 (23.8 … 33.8) | 71.5 " in text
    )
    results.write(check=True)
    page.write_text("no markers\n")
    with pytest.raises(JobFailed, match="has no lines"):
        results.write()


def test_an_old_figure_is_an_error_and_is_drawn_again(page, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURE", results.ROOT / "docs" / ".test_results.svg")
    try:
        results.write()
        first = results.FIGURE.read_bytes()
        results.write(check=True)
        results.FIGURE.write_bytes(first.replace(b"sha256 of the table: ", b"sha256: "))
        with pytest.raises(JobFailed, match="svg does not match"):
            results.write(check=True)
        results.write()
        assert results.FIGURE.read_bytes() == first
    finally:
        results.FIGURE.unlink(missing_ok=True)


def test_the_committed_readme_and_figure_are_current():
    done = run("results", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_of_experiments_shows_the_figures_of_the_search_by_hand():
    page = (results.ROOT / "docs" / "experiments.md").read_text()
    slowest = BEYOND["candidates"][BEYOND["spec"]["baseline"]]["seconds"]
    for name, candidate in BEYOND["candidates"].items():
        share = f"{100 * candidate['seconds'] / slowest:.0f} %"
        loss, steps = candidate["validation_loss"], candidate["steps"]
        assert f"| {name} | {loss:.3f} | {steps} | {share} |\n" in page
    for name, entry in BEYOND["confirmed"]["sets"].items():
        first, second = (f"{100 * mean:.1f}" for mean in entry["accuracy"])
        gain = f"{100 * entry['difference']['value']:+.1f}"
        assert f"| {name}, {entry['rows']} | " in page
        assert f" | {first} | {second} | {gain} (" in page
