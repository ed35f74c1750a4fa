"""Results: the schema, what is evidence, scores over seeds, and the pages that show them."""

import itertools
import json
import re

import numpy as np
import pytest
from scipy.stats import sem, t

from bench import equivalence
from evals import figures, report, results, results_figure, results_page, stats
from evals.results import Result
from evals.run import SCORING, find_cluster_pattern, read_tasks
from tools import common, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput

BEYOND = json.loads((results.FOLDER / "beyond.json").read_text())

NAME = "smollm2-135m/sentiment_r4"
DEVICE = "2 cores (x86_64), 25 GB, no GPU"
SHA = "0" * 64


def describe_score(value, half=0.05):
    return {"value": value, "low": max(-1, value - half), "high": min(1, value + half)}


def describe_metric(base, adapter, seeds):
    return {
        "base": describe_score(base),
        "base_with_examples": describe_score(base + 0.02),
        "seeds": {seed: describe_score(adapter) for seed in seeds},
        "adapter": describe_score(adapter),
        "gain": describe_score(adapter - base),
    }


def describe_rows(file, place="FINLORA_DATA"):
    return {"file": file, "rows": 312, "sha256": SHA, "source": f"test/{file}", "place": place}


def find_task_version(dataset):
    return str(read_tasks()[dataset]["metadata"]["version"])


def describe_dataset(name, seeds, selected=None):
    metrics = {"accuracy": describe_metric(0.285, 0.715, seeds)}
    metrics["finlora_accuracy"] = describe_metric(0.28, 0.7, seeds)
    data = describe_rows(f"{name}_test.jsonl")
    rows = {"rows": 312, "selected": selected, "majority": 0.587}
    rows |= {"task_version": find_task_version(name)}
    rows |= {"clusters": 68 if find_cluster_pattern(name) else None}
    return {"data": data, "metrics": metrics} | rows


def describe_result(name=NAME, seeds=(42, 43), datasets=("fpb",), **changes):
    """A result of today's recipe, as a file holds it."""
    recipe = results.read_recipe(name)
    training = {"steps": 110, "seconds": 378.0, "peak_memory_bytes": 3_900_000_000}
    training |= {"tokens_per_second": 640.0, "train_loss": 0.3, "validation_loss": 0.2}
    return {
        "recipe": name,
        "version": recipe.version,
        "digest": recipe.digest,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "precision": "nf4",
        "rules": sources.digest_rules(recipe.task),
        "scoring": SCORING,
        "device": DEVICE,
        "finished": "2026-11-26",
        "commit": "c87dbff",
        "is_changed": False,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0+cpu", "axolotl": "0.19.0"},
        "shots": 3,
        "training_data": [describe_rows("sentiment_train.jsonl")],
        "validation_data": [],
        "trainings": {seed: training for seed in seeds},
        "datasets": {dataset: describe_dataset(dataset, seeds) for dataset in datasets},
    } | changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of results and pages of their own."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    readme.write_text(text)
    monkeypatch.setattr(results_page, "README", readme)
    begin, end = results_page.BEGIN, results_page.END
    readme.write_text(common.insert_block(readme, begin, "yesterday\n", end))
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(results_page, "FIGURE", ROOT / "docs" / ".test_results.svg")
    yield tmp_path / "results"
    results_page.FIGURE.unlink(missing_ok=True)


def write_result(**changes):
    result = Result.model_validate(describe_result(**changes))
    results.write_result(result)
    return result


# ---- the schema


def test_the_committed_results_are_of_the_schema_and_their_pages_are_current():
    assert all(result.recipe and result.datasets for result in results.load_results())
    results_page.write(check=True)


def test_a_result_is_read_as_it_was_written_and_has_a_few_kilobytes(folder):
    result = write_result(datasets=("fpb", "fiqa", "tfns", "nwgi"))
    file = folder / NAME / "2-cores-x86-64-25-gb-no-gpu.json"
    assert results.load_results() == [result] and result.path == file
    assert 3000 < file.stat().st_size < 9000
    text = file.read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(text) == json.loads(result.model_dump_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"version": None}, "version: "),
        ({"digest": "abc"}, "digest: "),
        ({"device": "`host`"}, "device: "),
        ({"trainings": {}}, "trainings: "),
        ({"datasets": {"fpb": {"rows": 312}}}, "datasets.fpb.data: "),
        ({"datasets": {"fpb": describe_dataset("fpb", [42])}}, "fpb, accuracy: not the seeds"),
        ({"recipe": "smollm2-135m/ner_r4"}, "it belongs in results/smollm2-135m/ner_r4/"),
        ({"device": "1 x NVIDIA A40"}, "it belongs in .*/1-x-nvidia-a40.json"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(folder, monkeypatch, change, message):
    monkeypatch.setattr(results, "ROOT", folder.parent)
    monkeypatch.setattr(results, "shown", lambda path: str(path.relative_to(folder.parent)))
    file = results.locate_result(NAME, DEVICE)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(describe_result() | change))
    with pytest.raises(WrongInput, match=message) as error:
        results.load_results()
    assert str(error.value).startswith("results/") and "\n" not in str(error.value)


def test_a_file_in_another_place_or_of_another_size_is_named(folder):
    write_result()
    stray = folder / "smollm2-135m" / "sentiment_r4.json"
    stray.write_text("{}")
    with pytest.raises(WrongInput, match=r"sentiment_r4.json: results lie in results/<model>"):
        results.load_results()
    stray.unlink()
    file = results.locate_result(NAME, DEVICE)
    file.write_text(file.read_text() + " " * results.LARGEST)
    with pytest.raises(WrongInput, match="over 64,000 bytes"):
        results.load_results()


def test_what_is_not_permitted_in_a_file_is_replaced():
    text = "Tesla <b>V100²</b> | `x½`\n" + "y" * 400
    cleaned = results.clean_text(text)
    assert cleaned.startswith("Tesla _b_V100__/b_ _ _x___y") and len(cleaned) == 300
    Result.model_validate(describe_result(device=cleaned))


# ---- what is evidence


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"digest": SHA, "version": "1.0.0"}, "the recipe has changed since version 1.0.0"),
        ({"rules": SHA}, "the rules of its data have changed"),
        ({"scoring": SCORING - 1}, "answers are scored otherwise now"),
        ({"recipe": "smollm2-135m/nothing_r4"}, "the recipe is not there any more"),
        (
            {"recipe": "smollm2-135m/sentiment_r4_all"},
            "the recipe is named smollm2-135m/sentiment_tuned now",
        ),
        (
            {"datasets": {"fpb": describe_dataset("fpb", (42, 43)) | {"task_version": "0.9"}}},
            f"fpb has task version {find_task_version('fpb')} now, and had 0.9",
        ),
    ],
)
def test_a_result_is_evidence_while_recipe_data_and_scoring_are_the_same(change, reason):
    result = Result.model_validate(describe_result() | change)
    assert results.explain_stale(result) == reason


def test_the_digest_of_the_rules_changes_with_what_decides_rows_and_not_with_prose(monkeypatch):
    before = {task: sources.digest_rules(task) for task in sources.tables()["tasks"]}
    assert len(set(before.values())) == len(before)

    def digest_with(task, change):
        content = json.loads(json.dumps(sources.published_tables()))
        change(content)
        monkeypatch.setattr(sources, "tables", lambda: content)
        return sources.digest_rules(task)

    assert digest_with("sentiment", lambda tables: None) == before["sentiment"]
    for key in ("reason", "incomparable"):
        assert before["sentiment"] == digest_with(
            "sentiment", lambda tables, key=key: tables["datasets"]["fpb"].update({key: "new"})
        )
    deciding = {
        "labels": lambda tables: tables["datasets"]["fpb"]["labels"].append("mixed"),
        "the split": lambda tables: tables["tasks"]["sentiment"]["without_train"].update(rows=800),
        "the file": lambda tables: tables["files"]["test/fpb_test.jsonl"].update(blob="1"),
        "validation": lambda tables: tables["validation"].update(share=0.1),
    }
    for name, change in deciding.items():
        assert digest_with("sentiment", change) != before["sentiment"], name
        assert digest_with("general_multi", change) != before["general_multi"], name
    assert digest_with("ner", deciding["labels"]) == before["ner"]


# ---- scores over seeds


def test_with_one_seed_the_interval_is_that_of_its_rows():
    values, base = [1.0] * 70 + [0.0] * 30, [1.0] * 40 + [0.0] * 60
    single = stats.estimate("accuracy", values)
    assert stats.estimate_mean("accuracy", [values]) == single
    gain = stats.compare("accuracy", base, values)
    assert stats.estimate_mean("accuracy", [values], base) == {
        key: gain[key] for key in ("value", "low", "high")
    }


def test_the_interval_over_seeds_is_that_of_the_closed_form():
    """Equal seeds: the variance of a mean over rows. Equal rows: that of a mean over seeds."""
    right = np.random.default_rng(1).random(400) < 0.7
    columns = [right.astype(float).tolist()] * 3
    mean = stats.estimate_mean("accuracy", columns)
    error = right.std() / 20
    assert mean["value"] == pytest.approx(right.mean())
    assert mean["high"] - mean["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    scores = np.linspace(0.2, 0.8, 30)
    mean = stats.estimate_mean("rouge_l", [[score] * 200 for score in scores])
    half = t.ppf(0.975, 29) * scores.std(ddof=1) / np.sqrt(30)
    assert (mean["low"], mean["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def test_with_means_of_rows_the_interval_over_seeds_is_that_of_the_crossed_design():
    """Hillis' closed form in bench/equivalence.py, for rows and seeds that both differ."""
    for number in range(4):
        chance = np.random.default_rng(number)
        rows, seeds = chance.normal(0.5, 0.1, (300, 1)), chance.normal(0, 0.05, (1, 3))
        values = rows + seeds + chance.normal(0, 0.05, (300, 3))
        closed = equivalence.compare_means(values, 0.02)
        mean = stats.estimate_mean("rouge_l", values.T.tolist())
        assert mean["low"] == pytest.approx(closed["low"], abs=0.002)
        assert mean["high"] == pytest.approx(closed["high"], abs=0.002)


@pytest.mark.parametrize(
    ("seeds", "spread", "least"), [(2, 0.09, 103), (3, 0.09, 108), (3, 0.0, 112)]
)
def test_the_interval_covers_the_truth_where_few_seeds_lie_far_apart(seeds, spread, least):
    """In so many of 120 simulated experiments; a bootstrap of the seeds falls short of them."""
    covered = 0
    for number in range(120):
        chance = np.random.default_rng([seeds, number])
        rates = 0.4 + chance.normal(0, 0.15, (235, 1)) + chance.normal(0, spread, (1, seeds))
        right = (chance.random((235, seeds)) < rates).astype(float)
        mean = stats.estimate_mean("accuracy", right.T.tolist())
        covered += mean["low"] <= 0.4 <= mean["high"]
    assert covered >= least


def test_the_gain_over_seeds_is_paired_with_the_base_by_row():
    chance = np.random.default_rng(2)
    hard = chance.random(300)  # rows that are hard are so for the base and for every seed
    base = (0.5 * hard).tolist()
    columns = [(0.5 * hard + 0.1 + shift).tolist() for shift in (-0.001, 0.0, 0.001)]
    gain = stats.estimate_mean("rouge_l", columns, base)
    alone = stats.estimate_mean("rouge_l", columns)
    assert gain["value"] == pytest.approx(0.1)
    assert gain["high"] - gain["low"] < (alone["high"] - alone["low"]) / 1.5


def test_any_metric_has_a_mean_over_seeds_and_an_interval():
    chance = np.random.default_rng(3)
    labels = ["negative", "neutral", "positive"]

    def answer(rate):
        return [
            [(label, label if chance.random() < rate else "neutral")]
            for label in labels
            for _ in range(40)
        ]

    columns, base = [answer(0.8), answer(0.7)], answer(0.2)
    for metric in ("f1_weighted", "finlora_f1_weighted", "f1_macro", "accuracy"):
        single = [stats.estimate(metric, column)["value"] for column in columns]
        mean = stats.estimate_mean(metric, columns)
        gain = stats.estimate_mean(metric, columns, base)
        assert mean["value"] == pytest.approx(sum(single) / 2)
        assert mean["low"] < mean["value"] < mean["high"]
        assert gain["value"] == pytest.approx(mean["value"] - stats.estimate(metric, base)["value"])
        assert 0 < gain["low"] < gain["value"] < gain["high"]


def test_an_interval_over_seeds_has_a_width_where_all_rows_are_right_and_none_with_few_rows():
    perfect = stats.estimate_mean("accuracy", [[1.0] * 50] * 3)
    assert (perfect["value"], perfect["high"]) == (1, 1) and perfect["low"] == pytest.approx(
        0.929, abs=0.001
    )
    gain = stats.estimate_mean("accuracy", [[1.0] * 50] * 3, [1.0] * 50)
    assert gain["value"] == 0 and gain["low"] == -gain["high"] < 0
    gain = stats.compare("rouge_l", [0.0] * 50, [1.0] * 50)
    assert (gain["value"], gain["high"]) == (1, 1) and gain["low"] > 0.9
    few = stats.estimate_mean("rouge_l", [[0.5] * 6, [0.4] * 6])
    assert few == {"value": pytest.approx(0.45), "no_interval": "fewer than 10 rows (6)"}


# ---- from score files


def describe_scores(side_values, **changes):
    """A score file of fpb with an accuracy by row; None for a row that could not be scored."""
    pairs = {0.0: [["up", "down"]], 1.0: [["up", "up"]]}
    rows = [
        {
            "row": number,
            "values": {"accuracy": value, "f1_macro": pairs[value]} if value in pairs else {},
        }
        for number, value in enumerate(side_values)
    ]
    values = [value for value in side_values if value is not None]
    evaluated = {"dataset": "fpb", "data_sha256": SHA, "task": "t", "task_version": 1.1}
    evaluated |= {"scoring": SCORING, "limit": None, "data_selected": "40 chosen rows"}
    return {
        "evaluated": evaluated | changes,
        "examples": len(rows),
        "metrics": {
            "accuracy": stats.estimate("accuracy", values),
            "f1_macro": {"value": 0.5},
        },
        "predictions": rows,
    }


@pytest.fixture
def fpb(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    file = tmp_path / "fpb_test.jsonl"
    file.write_text("{}\n" * 40)
    manifest = {"source": "/home/me/fpb.jsonl", "from": "your own", "rows": 40}
    sources.manifest_path(file).write_text(json.dumps(manifest))
    return file


def test_a_dataset_is_measured_from_the_score_files_of_base_and_seeds(fpb):
    base = describe_scores([1.0] * 10 + [0.0] * 30)
    adapters = {
        42: describe_scores([1.0] * 30 + [0.0] * 10),
        43: describe_scores([1.0] * 20 + [0.0] * 20),
    }
    entry = results.measure_dataset(base, adapters, describe_scores([1.0] * 20 + [0.0] * 20))
    (scores,) = entry.metrics.values()
    assert (entry.rows, entry.selected, list(entry.metrics)) == (40, "40 chosen rows", ["accuracy"])
    assert (entry.data.rows, entry.data.source, entry.data.place) == (40, "fpb.jsonl", "your own")
    assert [score.value for score in scores.seeds.values()] == [0.75, 0.5]
    assert (scores.base.value, scores.base_with_examples.value) == (0.25, 0.5)
    assert (scores.adapter.value, scores.gain.value, entry.majority) == (0.625, 0.375, 1.0)
    assert scores.gain.low < 0.375 < scores.gain.high


def test_rows_that_one_side_could_not_score_do_not_count_in_the_mean(fpb):
    base = describe_scores([None] + [0.0] * 39)
    adapter = describe_scores([1.0] * 20 + [None] * 4 + [0.0] * 16)
    entry = results.measure_dataset(base, {42: adapter}, None)
    (scores,) = entry.metrics.values()
    assert scores.gain.value == round(19 / 35, 5) and scores.base_with_examples is None
    assert (entry.rows, scores.base.value, scores.adapter.value) == (35, 0.0, round(19 / 35, 5))
    assert entry.clusters is None
    few = describe_scores([1.0] * 20 + [0.0] * 10 + [None] * 10)
    entry = results.measure_dataset(base, {42: adapter}, few)
    assert entry.main[1].base_with_examples.value == round(19 / 25, 5)


def test_rows_of_one_cluster_are_no_more_evidence_than_one_row(fpb):
    sides = [describe_scores([1.0] * right + [0.0] * (40 - right)) for right in (10, 28, 28)]
    base, first, second = sides
    apart = results.measure_dataset(base, {42: first, 43: second}, None).main[1]
    for side in sides:
        for row in side["predictions"]:
            row["cluster"] = row["row"] - row["row"] % 4
    together = results.measure_dataset(base, {42: first, 43: second}, None).main[1]
    for name in ("base", "adapter", "gain"):
        one, other = getattr(together, name), getattr(apart, name)
        assert one.value == other.value and one.high - one.low > 1.2 * (other.high - other.low)
    gain = report.differences({"fpb": base}, {"fpb": first})["fpb"]["accuracy"]
    assert gain["test"] == "paired bootstrap of clusters"
    entry = results.measure_dataset(base, {42: first, 43: second}, second)
    assert (entry.rows, entry.clusters) == (40, 10)
    for row in base["predictions"]:  # as in an older file
        del row["cluster"]
    for sides in ((base, first), (first, base)):
        gain = report.differences(*({"fpb": side} for side in sides))["fpb"]["accuracy"]
        assert gain["test"] == "paired bootstrap of clusters"
    for row in first["predictions"][:1]:
        del row["cluster"]
    gain = report.differences({"fpb": base}, {"fpb": first})["fpb"]["accuracy"]
    assert gain["test"] == "McNemar"


def test_a_result_whose_rows_are_counted_one_by_one_is_stale_where_they_have_clusters():
    content = describe_result(name="smollm2-135m/ner_r4", datasets=("ner",))
    assert results.explain_stale(Result.model_validate(content)) == ""
    del content["datasets"]["ner"]["clusters"]  # as in an older file
    reason = "rows of ner that ask about one text count as one now"
    assert results.explain_stale(Result.model_validate(content)) == reason


def test_scores_of_other_rows_are_not_compared(fpb):
    base = describe_scores([1.0] * 40)
    for other in (describe_scores([1.0] * 39), describe_scores([1.0] * 40, data_sha256="1")):
        with pytest.raises(JobFailed, match="the scores of fpb are not of the same rows"):
            results.measure_dataset(base, {42: other}, None)


# ---- pages


def test_the_pages_show_what_is_measured_and_old_ones_are_an_error(folder):
    write_result(datasets=("fpb", "fiqa"))
    with pytest.raises(JobFailed, match="README.md is out of date"):
        results_page.write(check=True)
    results_page.write()
    results_page.write(check=True)
    readme, page = results_page.README.read_text(), results_page.PAGE.read_text()
    sides = "28.5 (23.5 … 33.5) | 30.5 (25.5 … 35.5) | 71.5 (66.5 … 76.5) | +43.0 (+38.0 … +48.0)"
    assert f"| fpb, 312 | accuracy | 58.7 | {sides} |" in readme
    assert "yesterday" not in readme and "means over 2 seeds" in readme
    assert "| fpb, 312 | accuracy | 58.7 | 28.5 (23.5 … 33.5) | 30.5 (25.5 … 35.5) | 71.5 (" in page
    assert "base, 3 examples" in page and "| 71.5, 71.5 |" in page
    assert "accuracy, FinLoRA's" in page and "One training: 6.3 minutes, 3.9 GB, 640 tokens" in page
    anchor = re.search(r"`\]\(docs/results\.md#(\S+)\)", readme)[1]
    heading = re.search(r"^## (.*no GPU)$", page, re.M)[1]
    assert anchor == re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    results_page.README.write_text("no markers\n")
    with pytest.raises(JobFailed, match="has no lines"):
        results_page.write()


def test_an_old_figure_is_drawn_again_and_one_of_nothing_is_removed(folder, monkeypatch):
    result = write_result()
    results_page.write()
    first = results_page.FIGURE.read_bytes()
    results_page.FIGURE.write_bytes(first.replace(b"drawn from sha256 ", b"drawn from "))
    with pytest.raises(JobFailed, match="svg is out of date"):
        results_page.write(check=True)
    results_page.write()
    assert results_page.FIGURE.read_bytes() == first
    with monkeypatch.context() as patch:
        patch.setattr(results_figure, "__file__", __file__)  # as if other code drew it
        with pytest.raises(JobFailed, match="svg is out of date"):
            results_page.write(check=True)
    result.path.unlink()
    results_page.write()
    assert not results_page.FIGURE.exists()
    for path in (results_page.README, results_page.PAGE):
        text = path.read_text()
        assert "Nothing is measured yet" in text and "results.svg" not in text
    results_page.write(check=True)


def test_a_stale_result_is_named_without_its_figures_and_examples_are_not_shown(folder):
    write_result(scoring=SCORING - 1)
    examples = write_result(
        name="smollm2-135m/ner_r4", training_data=[describe_rows("a", "data/sample")]
    )
    assert examples.path.name == "2-cores-x86-64-25-gb-no-gpu_examples.json"
    results_page.write()
    readme, page = results_page.README.read_text(), results_page.PAGE.read_text()
    assert "71.5" not in readme + page and "ner_r4" not in page
    assert f"`{NAME}` on {DEVICE}, 2026-11-26: answers are scored otherwise now; `make" in page
    assert not results_page.FIGURE.exists()


def test_the_readme_stays_short_however_much_is_measured(folder):
    for task in ("sentiment", "ner", "xbrl_term", "formula"):
        for device in (DEVICE, "1 x NVIDIA A40"):
            name, datasets = f"smollm2-135m/{task}_r4", ("fpb", "fiqa", "ner", "tags")
            write_result(name=name, device=device, datasets=datasets)
    results_page.write()
    text = results_page.README.read_text()
    assert len(text.splitlines()) <= 120 and "[Results](docs/results.md) has 24 more." in text
    assert text.count("| [`smollm2-135m/") == 8  # a recipe is shown with all its datasets or not
    assert results_page.PAGE.read_text().count("## smollm2-135m/") == 8


def test_the_readme_shows_the_results_of_several_seeds_where_there_are_such(folder):
    once = write_result(seeds=(42,))
    results_page.write()
    assert f"`{once.recipe}`" in results_page.README.read_text()
    thrice = write_result(name="smollm2-135m/ner_r4", datasets=("ner",), seeds=(42, 43, 44))
    results_page.write()
    readme, page = results_page.README.read_text(), results_page.PAGE.read_text()
    assert f"[`{thrice.recipe}`]" in readme and f"[`{once.recipe}`]" not in readme
    assert "means over 3 seeds" in readme and "has 1 more." in readme
    assert all(f"## {result.recipe} on" in page for result in (once, thrice))


def test_the_evidence_for_a_recipe_is_the_fullest_and_else_of_the_device_with_the_most(folder):
    gpu, both = "1 x NVIDIA A40", ("fpb", "fiqa")
    # Each stands above those below it: enough seeds, datasets, examples, more seeds.
    order = [
        {"seeds": (42, 43, 44), "datasets": ("fpb",), "shots": 0},
        {"seeds": (42, 43), "datasets": both},
        {"seeds": (42,), "datasets": both},
        {"seeds": (42,), "datasets": both, "shots": 0},
        {"seeds": (42,), "datasets": ("fpb",)},
    ]
    for above, below in itertools.pairwise(order):
        write_result(device=gpu, **below)
        best = write_result(**above)
        assert results.choose_evidence(results.load_results()) == [best]
    narrow = {"seeds": (42, 43, 44, 45), "datasets": ("fpb",)}
    whole = {"seeds": (42, 43, 44), "datasets": both}
    write_result(device=gpu, **narrow)
    best = write_result(**whole)
    assert results.choose_evidence(results.load_results()) == [best]
    level = write_result(device=gpu, **whole)
    other = write_result(name="smollm2-135m/sentiment_r8", device=gpu, seeds=(42,))
    assert results.choose_evidence(results.load_results()) == [level, other]
    write_result(device=gpu, scoring=SCORING - 1, **whole)
    assert results.choose_evidence(results.load_results()) == [best, other]


def test_recipes_are_compared_by_dataset_with_one_result_of_each(folder):
    for name, device in (("r4", DEVICE), ("r4", "1 x NVIDIA A40"), ("r8", DEVICE)):
        seeds = (42, 43) if device == DEVICE else (42,)
        datasets = ("fpb", "tfns")
        write_result(
            name=f"smollm2-135m/sentiment_{name}", device=device, seeds=seeds, datasets=datasets
        )
    results_page.write()
    page = results_page.PAGE.read_text()
    comparison = page.partition("## By dataset\n")[2].partition("\n## ")[0]
    for dataset in ("fpb", "tfns"):
        rest = comparison.partition(f"### {dataset}, accuracy, 312 test rows; majority 58.7\n")[2]
        rows = [line.split(" | ")[:4] for line in rest.partition("###")[0].splitlines()[3:5]]
        assert [row[0].partition("]")[0][3:] for row in rows] == [
            "`smollm2-135m/sentiment_r4`",
            "`smollm2-135m/sentiment_r8`",
        ]
        assert all(row[1:] == [DEVICE, "312", "2"] for row in rows)
    assert "A40" in page and "A40" not in comparison
    assert comparison.count(" | minus r4, by seed |\n") == 2
    assert comparison.count("| +0.0 (-4.1 … +4.1) |\n") == 2  # t of 12.7 times 1 / 312


def test_adapters_are_compared_with_r4_by_seed_on_the_same_device():
    def measure(method, by_seed, device=DEVICE, name="smollm2-135m/xbrl_term"):
        content = describe_result(
            name=f"{name}_{method}", seeds=by_seed, datasets=("xbrl_term",), device=device
        )
        scores = content["datasets"]["xbrl_term"]["metrics"]["accuracy"]["seeds"]
        for seed, value in by_seed.items():
            scores[seed] = describe_score(value)
        result = Result.model_validate(content)
        return result, result.datasets["xbrl_term"]

    def compare(*scored):
        return [results.compare_with_r4(*pair, scored) for pair in scored]

    r4 = measure("r4", {42: 0.60, 43: 0.64, 44: 0.70})
    r8 = measure("r8", {42: 0.65, 43: 0.67, 44: 0.71})
    differences = [0.05, 0.03, 0.01]
    # SciPy's own interval of a mean: an independent way to the same numbers
    ends = t.interval(0.95, 2, loc=0.03, scale=sem(differences))
    none, found = compare(r4, r8)
    assert none is None
    assert (found.low, found.value, found.high) == pytest.approx((ends[0], 0.03, ends[1]), abs=1e-5)
    for other in (
        measure("r8", {42: 0.65, 43: 0.67}),
        measure("r8", {42: 0.65, 43: 0.67, 44: 0.71}, device="1 x NVIDIA A40"),
    ):
        assert compare(r4, other) == [None, None]
    one_seed = (measure("r4", {42: 0.60}), measure("r8", {42: 0.65}))
    assert compare(*one_seed) == [None, None]
    assert compare(r8) == [None]


def test_a_published_score_by_a_metric_that_was_not_measured_has_a_note():
    result = Result.model_validate(
        describe_result(name="smollm2-135m/xbrl_term_r4", datasets=("xbrl_term",))
    )
    assert results.find_published(result, "xbrl_term") == {}
    assert "published" not in results_page.build_score_table(result)
    assert results_page.list_notes(result) == [
        "xbrl_term is compared with no published score: FinLoRA publishes its BERTScore F1, which "
        "was not measured"
    ]


def test_both_scorings_share_a_line_where_they_agree():
    content = describe_result(name="smollm2-135m/sentiment_r4", datasets=("fiqa",))
    metrics = content["datasets"]["fiqa"]["metrics"]
    metrics["finlora_f1_weighted"] = describe_metric(0.2, 0.6, (42, 43))
    apart = results_page.build_score_table(Result.model_validate(content))
    metrics["finlora_accuracy"] = metrics["accuracy"]
    shared = results_page.build_score_table(Result.model_validate(content))
    titles = [
        [line.split(" | ")[1:3] for line in table.splitlines()[2:]] for table in (apart, shared)
    ]
    f1 = ["weighted F1, FinLoRA's", "–"]
    assert titles[0] == [["accuracy", "58.7"], ["accuracy, FinLoRA's", "–"], f1]
    assert titles[1] == [["accuracy, also FinLoRA's", "58.7"], f1]
    published = report.read_published()["4bits_r4"]["fiqa"]["finlora_accuracy"]
    assert shared.splitlines()[2].endswith(f"| {100 * published:.1f} |")
    metrics["finlora_accuracy"] = metrics["accuracy"] | {"gain": describe_score(0.1)}
    assert results_page.build_score_table(Result.model_validate(content)).count("fiqa, 312") == 3


def test_scores_on_other_rows_stand_apart_in_the_figure(folder):
    write_result()
    whole = describe_result(name="smollm2-135m/sentiment_r8")
    whole["datasets"]["fpb"] |= {"rows": 1213, "majority": None}
    results.write_result(Result.model_validate(whole))
    other = describe_result(name="smollm2-135m/sentiment_tuned")
    other["datasets"]["fpb"]["data"]["sha256"] = "1" * 64
    results.write_result(Result.model_validate(other))
    groups = results_figure.group_by_rows(results.load_results())
    assert list(groups) == [
        "fpb, accuracy, 312 test rows",
        "fpb, accuracy, 1,213 test rows",
        "fpb, accuracy, 312 test rows of file 11111111",
    ]
    results_page.write()
    figure = results_page.FIGURE.read_text()
    assert all(figure.count(f">{title}<") == 1 for title in groups)
    assert figure.count(">most frequent answer alone<") == 1
    assert ">score of smollm2-135m in %, with 95 % intervals<" in figure
    figures.draw_search([figures.Tried(rate, 1.0, "finished") for rate in (0.1, 0.2)], "loss")
    results_page.FIGURE.unlink()
    results_page.write()  # after a figure of another style
    assert results_page.FIGURE.read_text() == figure


def test_the_readme_shows_qlora_and_tuned_recipes_first_in_the_order_of_the_catalogue(folder):
    for method in ("r4", "r8", "r8_dora", "tuned"):
        datasets = ("fpb", "fiqa", "tfns", "ner")
        write_result(name=f"smollm2-135m/sentiment_{method}", datasets=datasets)
    results_page.write()
    shown = re.findall(r"\[`smollm2-135m/sentiment_(\w+)`\]", results_page.README.read_text())
    assert shown == ["r4"] * 4 + ["tuned"] * 4
    figure = results_page.FIGURE.read_text()
    assert all(figure.count(f">sentiment_{name}<") == 4 for name in ("r8", "r8_dora"))
    assert figure.count(">fpb, accuracy, 312 test rows<") == 1


def test_finloras_published_scores_stand_beside_ours_where_rows_and_labels_are_the_same():
    seeds = (42, 43)
    datasets = {name: describe_dataset(name, seeds) for name in ("fiqa", "tfns_as_published")}
    datasets["fpb"] = describe_dataset("fpb", seeds, "312 chosen rows")
    content = describe_result(name="llama-3.1-8b/sentiment_r4", datasets=(), shots=0)
    result = Result.model_validate(content | {"datasets": datasets})
    published = report.read_published()["4bits_r4"]
    assert results.find_published(result, "fiqa") == published["fiqa"]
    assert results.find_published(result, "fpb") == {}
    table = results_page.build_score_table(result).splitlines()
    assert table[0].endswith("| gain, points | published |")
    lines = {line.split(" |")[0]: line for line in table if "accuracy, FinLoRA's" in line}
    assert lines["| fiqa, 312"].endswith("| 78.3 |") and lines["| fpb, 312"].endswith("| – |")
    notes = [note for note in results_page.list_notes(result) if "published score" in note]
    assert len(notes) == 2 and "312 chosen rows of the published file" in " ".join(notes)
    assert "on which labels FinLoRA's published score stands" in " ".join(notes)
    other = Result.model_validate(describe_result(name="smollm2-135m/sentiment_tuned"))
    assert "published" not in results_page.build_score_table(other)
    assert recipes.split_name("smollm2-135m/sentiment_tuned")[2] == "tuned"


def read_measured(name):
    """What an experiment measured, which is of today's recipe where it names a digest."""
    content = json.loads((results.FOLDER / f"{name}.json").read_text())
    if "digest" in content:
        assert content["digest"] == recipes.find(content["recipe"]).digest
    return content


def test_the_table_of_what_a_constraint_gains_is_that_of_its_results():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for recipe, datasets in read_measured("constrained")["measured"].items():
        for dataset, sides in datasets.items():
            for side, entry in sides.items():
                scores = (
                    f"{100 * score['value']:{sign}.1f} ({100 * score['low']:{sign}.1f} … "
                    f"{100 * score['high']:{sign}.1f})"
                    for score, sign in zip(
                        (entry["free"], entry["constrained"], entry["gain"]),
                        ("", "", "+"),
                        strict=True,
                    )
                )
                model = "SmolLM2-135M" if side == "base" else f"`{recipe}`"
                cells = (f"{dataset}, {entry['rows']}", model, entry["without_label"], *scores)
                assert f"| {' | '.join(map(str, cells))} |\n" in page


def test_the_tables_of_merges_and_of_packed_rows_are_those_of_their_results():
    seeds = read_measured("merged")["seeds"]
    page = (ROOT / "docs" / "serving.md").read_text()
    titles = {
        "adapter": "adapter beside its 4-bit base",
        "merged_16": "merged to 16 bits",
        "merged_4": "merged to 4 bits",
        "aware_4": "trained with `merge_aware`, its 4-bit merge",
    }
    for side, title in titles.items():
        scores = [f"{100 * sides[side]['accuracy']:.1f}" for sides in seeds.values()]
        assert f"| {title} | {' | '.join(scores)} | " in page
    page, way_names = (ROOT / "docs" / "shared-prefix.md").read_text(), ("packed", "padded")
    for seed, ways in read_measured("shared_dropout")["seeds"].items():
        tokens = (f"{ways[way]['computed_tokens']:,}" for way in way_names)
        right = (round(312 * ways[way]["accuracy"]) for way in way_names)
        scores = (f"{100 * number / 312:.1f}" for number in right)
        row = next(line for line in page.splitlines() if line.startswith(f"| {seed} | "))
        assert row.startswith(f"| {seed} | {' | '.join(scores)} | ")
        losses = (f"{ways[way]['validation_loss']:.4f}" for way in way_names)
        assert row.endswith(f" | {' | '.join(losses)} | {' | '.join(tokens)} |")
    ways = read_measured("shared_dropout")["seeds"].values()
    means = [np.mean([way[side]["validation_loss"] for way in ways]) for side in way_names]
    assert f" | {means[0]:.4f} | {means[1]:.4f} | " in page


def test_the_sentences_of_the_readme_have_the_figures_of_the_results():
    shown, _, _ = results_page.README.read_text().partition(results_page.BEGIN)
    current = [result for result in results.load_results() if not results.explain_stale(result)]
    best = {result.recipe: result for result in results.choose_evidence(current)}
    r4, tuned, ner = (
        best[f"smollm2-135m/{name}"] for name in ("sentiment_r4", "sentiment_tuned", "ner_r4")
    )
    fpb, entities = r4.datasets["fpb"], ner.datasets["ner"]

    def show(value, sign=""):
        return f"{100 * value:{sign}.1f}"

    gain = results.compare_with_r4(tuned, tuned.datasets["fpb"], [(r4, fpb)])
    worked = read_measured("worked")["difference"]
    scores = (entities.main[1].adapter, entities.main[1].base_with_examples)
    for text in (
        f"{show(fpb.main[1].adapter.value)} % of {fpb.rows} sentences",
        f'always "neutral":\n  {show(fpb.majority)})',
        f"[{show(gain.value)} points more](docs/results.md#by-dataset)",
        "{} %, the base with three examples {}".format(*(show(score.value) for score in scores)),
        f'always "person" {show(entities.majority)}',
        f"[{show(worked['value'])} points\n  ({show(worked['low'], '+')} … "
        f"{show(worked['high'], '+')}) more]",
    ):
        assert text in shown, text
    lead = re.search(r"QLoRA leads by (\S+) \(([^)]+)\)", shown)
    methods = (ROOT / "docs" / "methods.md").read_text()
    assert "| sentiment | its best | " in methods
    assert f"| +{lead[1]} ({lead[2]}), different |" in methods


def test_the_page_of_experiments_shows_the_figures_of_the_search_by_hand():
    page = (ROOT / "docs" / "experiments.md").read_text()
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
