"""The experiment on methods: rates by validation rows, test rows once, results that resume."""

import json
import shutil

import pytest

from bench import (
    cells,
    equivalence,
    methods,
    methods_figure,
    methods_page,
    sections,
    together,
    worked,
)
from bench.cells import Cell
from evals import results, run
from tests.conftest import write_recipe
from tools import common, recipes, sources
from tools.common import JobFailed, WrongInput, read_yaml
from tools.train import tune

SPEC = read_yaml(methods.SPEC)
TASK = "sentiment"


@pytest.mark.parametrize("folder", [methods.RESULTS, together.RESULTS, tune.RESULTS])
def test_results_of_experiments_are_not_read_as_those_of_recipes(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for path in ("lora.json", "sentiment/lora.json"):
        file = tmp_path / folder.relative_to(common.ROOT / "results") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert results.load_results() == []


def make_values(count, right):
    return [1.0] * right + [0.0] * (count - right)


def write_cell(cell: Cell, scores: dict[str, list[float]], **changes):
    """The results of a training, as `train_and_validate` and `train_and_test` write them."""
    content = {
        "recipe": cell.recipe.name,
        "digest": cell.recipe.digest,
        "planned": cell.planned,
        "seed": cell.recipe.seed,
        "train_sha256": ["a"],
        "scoring": run.SCORING,
        "machine": "a machine",
        "packages": {"peft": "0.20.0"},
        "scores": {
            name: cells.describe_score("accuracy", values, f"rows of {name}")
            | {"base": 0.25, "majority": 0.616}
            for name, values in scores.items()
        },
    }
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    cell.file.write_text(json.dumps(content | changes))


def write_rates(experiment, best: dict[str, float], skip: str = "") -> None:
    for method in SPEC["methods"]:
        for rate, cell in experiment.list_rate_cells(method).items():
            if cell.name != skip:
                right = 200 if rate == best[method] else 150
                write_cell(cell, {"validation": make_values(300, right)})


def write_tests(experiment, skip: str = "") -> None:
    for number, cell in enumerate(experiment.list_test_cells().values()):
        if cell.name != skip:
            write_cell(
                cell, {name: make_values(400, 250 + number) for name in ("fpb", "fiqa", "tfns")}
            )


BEST = {"lora": 0.001, "dora": 0.003, "rslora": 0.0003, "qlora": 0.01}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(methods, "RUNS", tmp_path / "runs")

    def open_experiment():
        return methods.Experiment(SPEC, TASK)

    return open_experiment


# ---- choosing a rate


def test_the_best_validation_score_chooses_a_rate_and_a_tie_the_lower_one(experiment):
    write_rates(experiment(), BEST)
    assert {method: experiment().choose_rate(method) for method in BEST} == BEST
    for cell in experiment().list_rate_cells("lora").values():
        write_cell(cell, {"validation": make_values(300, 150)})
    assert experiment().choose_rate("lora") == min(SPEC["rates"])


def test_no_rate_is_chosen_and_no_test_row_is_read_before_all_rates_are_in(experiment):
    write_rates(experiment(), BEST, skip="qlora_1e-2_seed42")
    assert experiment().missing_rates == ["qlora_1e-2_seed42"]
    with pytest.raises(JobFailed, match="before all rates are chosen"):
        experiment().list_test_cells()


def test_seeds_that_choose_a_rate_score_no_test_row(experiment):
    write_rates(experiment(), BEST)
    assert SPEC["rate_seed"] not in SPEC["seeds"]
    tested = experiment().list_test_cells()
    # LoRA's best rate is the common one, so its three seeds count twice.
    assert len(tested) == 7 * len(SPEC["seeds"])
    assert not [name for name in tested if name.endswith(f"seed{SPEC['rate_seed']}")]


def test_all_methods_train_the_same_rows_for_the_same_steps(experiment):
    configs = [
        cell.recipe.config for m in BEST for cell in experiment().list_rate_cells(m).values()
    ]
    shared = ("max_steps", "micro_batch_size", "gradient_accumulation_steps", "datasets", "seed")
    for key in (*shared, "lora_target_modules", "lora_dropout", "lr_scheduler", "warmup_steps"):
        assert len({json.dumps(config[key]) for config in configs}) == 1, key
    rows = configs[0]["max_steps"] * configs[0]["micro_batch_size"]
    assert rows <= 900 - SPEC["tasks"][TASK]["validation"]  # no row is seen twice
    assert not any("test_datasets" in config for config in configs)


# ---- results that resume


def test_results_of_another_recipe_or_scoring_are_missing(experiment):
    cell = experiment().list_rate_cells("lora")[0.001]
    assert not cell.is_done
    write_cell(cell, {"validation": make_values(300, 150)})
    assert cell.is_done
    for key, value in (("digest", "another"), ("scoring", run.SCORING - 1)):
        write_cell(cell, {"validation": make_values(300, 150)}, **{key: value})
        assert not cell.is_done


@pytest.mark.parametrize(
    ("changes", "rates_stand"),
    [
        ({"validation": 150}, False),
        ({"metric": "rouge_l"}, False),
        ({"limit": 100}, True),
        ({"datasets": ["fpb", "fiqa", "tfns", "tfns_rest"]}, True),
    ],
)
def test_results_of_another_plan_are_missing(changes, rates_stand, experiment):
    write_rates(experiment(), BEST)
    write_tests(experiment())
    assert not experiment().missing_tests
    changed = methods.Experiment(
        SPEC | {"tasks": {TASK: SPEC["tasks"][TASK] | changes}}, experiment().task
    )
    assert (not changed.missing_rates) == rates_stand
    seeds = changed.list_seed_cells("lora", BEST["lora"])
    assert cells.list_missing(seeds) == [cell.name for cell in seeds]


def test_results_of_an_earlier_version_of_a_dataset_s_task_are_missing(experiment):
    cell = experiment().list_seed_cells("lora", 0.001)[0]
    planned = json.loads(json.dumps(cell.planned))
    planned["scores"]["fiqa"]["task_version"] -= 0.1
    write_cell(cell, {"fiqa": make_values(10, 5)}, planned=planned)
    assert not cell.is_done


def test_what_is_done_is_not_trained_again(experiment, monkeypatch):
    write_rates(experiment(), BEST, skip="dora_3e-4_seed42")
    trained = []

    def validate(cell, dataset, rows, metric):
        trained.append(cell.name)
        write_cell(cell, {"validation": make_values(300, 1)})

    def test(cell, test_sets):
        trained.append(cell.name)
        write_cell(cell, {name: make_values(100, 50) for name in test_sets[0].datasets})

    monkeypatch.setattr(methods, "divide_rows", lambda experiment: None)
    monkeypatch.setattr(methods, "train_and_validate", validate)
    monkeypatch.setattr(methods, "train_and_test", test)
    methods.run_experiment(experiment())
    assert trained[0] == "dora_3e-4_seed42" and len(trained) == 1 + 21
    methods.run_experiment(experiment())
    assert len(trained) == 22


def test_results_hold_the_values_of_rows_and_no_text():
    binary = cells.describe_score("accuracy", [1.0, 0.0, 1.0], "sha")
    assert binary["values"] == "101"
    shares = cells.describe_score("rouge_l", [0.123456, 1.0] * 5, "sha")
    for score, values in ((binary, [1, 0, 1]), (shares, [0.1235, 1.0] * 5)):
        assert cells.unpack_values(score["values"]) == values
        assert not {"expected", "answered", "answer", "predictions"} & score.keys()


def test_rows_that_differ_between_machines_are_refused(experiment):
    write_rates(experiment(), BEST)
    cell = experiment().list_rate_cells("lora")[0.001]
    write_cell(cell, {"validation": make_values(300, 150)}, train_sha256=["b"])
    with pytest.raises(WrongInput, match="has other rows of training than"):
        cells.refuse_other_rows(experiment().list_finished_cells())


# ---- what the page says


@pytest.mark.parametrize("missing", ["qlora_1e-2_seed42", "dora_3e-3_seed44"])
def test_a_partial_experiment_concludes_nothing(missing, experiment, tmp_path, monkeypatch):
    """Without one training at a rate, or one that is scored on test rows."""
    monkeypatch.setattr(together, "RESULTS", tmp_path)
    write_rates(experiment(), BEST, skip=missing)
    if not experiment().missing_rates:
        write_tests(experiment(), skip=missing)
    assert experiment().missing == [missing]
    page = methods_page.build_page([experiment()])
    concluded = page[page.index("## Conclusions") : page.index("## Hypothesis")]
    assert f"- sentiment: {methods_page.MISSING}" in concluded
    assert "the hypothesis" not in concluded
    assert "### Test rows" not in page and "### Rates" not in page


def test_a_whole_experiment_is_compared_on_the_same_rows_and_seeds(experiment):
    write_rates(experiment(), BEST)
    write_tests(experiment())
    compared = experiment().compare_all("best")
    direct = experiment().compare("dora", "best")
    assert compared["dora"]["value"] == pytest.approx(direct["value"])
    assert compared["dora"]["p"] >= direct["p"]
    lora, dora = (
        cells.collect_columns(
            experiment().list_seed_cells(name, BEST[name]), ["fpb", "fiqa", "tfns"]
        )
        for name in ("lora", "dora")
    )
    assert lora.shape == (1200, 3)
    assert direct == equivalence.compare_means(dora - lora, SPEC["margin"])
    text, _, heads, _, common, best, _ = methods_page.build_verdicts([experiment()])
    assert text.startswith("Test rows, in points against LoRA, 8 bits, r 8, with 95 %")
    titles = ["DoRA, 8 bits, r 8", "rsLoRA, 8 bits, r 8", "QLoRA, 4 bits, r 4"]
    assert heads == f"| task | learning rate | {' | '.join(titles)} |"
    assert common.startswith("| sentiment | 0.001 for all |") and best.count("(") == 3
    assert best.split(" | ")[2].startswith(f"{100 * direct['value']:+.1f} (")
    concluded = "\n".join(methods_page.conclude_ranking(experiment()))
    assert "QLoRA, 4 bits, r 4, 0.01, is an end of the grid" in concluded


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        ([500, 500, 500], "is shown"),
        ([460, 520, 580], "is neither shown nor refuted"),
        ([800, 800, 800], "is refuted"),
    ],
)
def test_the_hypothesis_is_judged_by_intervals_and_margin(experiment, right, verdict):
    write_rates(experiment(), dict.fromkeys(BEST, SPEC["common_rate"]))
    for cell in experiment().list_test_cells().values():
        values = make_values(1000, 500)
        if cell.name.startswith("qlora"):
            values = make_values(1000, right[SPEC["seeds"].index(cell.recipe.seed)])
        write_cell(cell, dict.fromkeys(experiment().plan["datasets"], values))
    sentence = methods_page.judge_hypothesis(experiment())
    assert f"the hypothesis {verdict}" in sentence
    weakest = experiment().compare_all("best")["qlora"]
    ends = f"{100 * weakest['low']:+.1f} … {100 * weakest['high']:+.1f}"
    text = f"is that of QLoRA, 4 bits, r 4: 95 % interval {ends} points, p = "
    assert (text in sentence) == ("could decide it" in sentence) == (verdict != "is shown")
    assert sentence.endswith("QLoRA, 4 bits, r 4.") == (verdict == "is refuted")


def test_the_spread_of_methods_at_finloras_rate_stands_beside_that_at_their_best(experiment):
    write_rates(experiment(), BEST)
    changed = experiment().list_rate_cells("dora")[methods_page.FINLORAS_RATE]
    write_cell(changed, {"validation": make_values(300, 180)})
    write_tests(experiment())
    sentence = methods_page.conclude_ranking(experiment())[1]
    assert "within 10.0 points (50.0 … 60.0) at FinLoRA's rate of 0.0001" in sentence
    assert "within 0.0 points (66.7 … 66.7) at each one's best" in sentence
    assert "4 of 4 lie below the most frequent answer alone (61.6)" in sentence


def test_a_rate_at_which_all_methods_give_one_answer_is_named(experiment):
    write_rates(experiment(), BEST)
    for method in BEST:
        cell = experiment().list_rate_cells(method)[0.01]
        write_cell(cell, {"validation": make_values(1000, 616)})
    text = "\n".join(methods_page.build_rates(experiment()))
    assert "At 0.01 all methods are right on the same rows" in text
    write_cell(cell, {"validation": make_values(1000, 616)[::-1]})
    assert "on the same rows" not in "\n".join(methods_page.build_rates(experiment()))


def test_a_table_names_the_dataset_that_decides_it_and_each_dataset_s_difference(experiment):
    write_rates(experiment(), BEST)
    for cell in experiment().list_test_cells().values():
        better = 20 * cell.name.startswith("dora")
        scores = {"fpb": make_values(100, 50), "fiqa": make_values(100, 50)}
        write_cell(cell, scores | {"tfns": make_values(800, 500 + better)})
    text = "\n".join(methods_page.build_tests(experiment(), "best"))
    assert "80 % of the rows are from tfns" in text
    assert "is right on 61.6 % of all rows: 61.6 % of fpb" in text
    row = next(line for line in text.split("by dataset")[1].splitlines() if "DoRA" in line)
    assert [cell.split()[0] for cell in row.split("|")[2:5]] == ["+0.0", "+0.0", "+2.5"]
    assert "standard error at its least" in text


def test_machines_and_versions_are_told_by_stage(experiment):
    write_rates(experiment(), BEST)
    cell = experiment().list_rate_cells("lora")[0.01]
    write_cell(cell, {"validation": make_values(300, 150)}, packages={"peft": "0.21.2"})
    lines = methods_page.describe_machines(experiment().group_finished_cells())
    assert sorted(lines) == [
        "- a machine (peft 0.20.0): rates (19).",
        "- a machine (peft 0.21.2): rates (1).",
    ]


def test_the_check_fails_where_page_or_figure_is_missing_or_old(experiment, tmp_path, monkeypatch):
    for name in ("PAGE", "FIGURE"):
        monkeypatch.setattr(methods, name, tmp_path / getattr(methods, name).name)
    monkeypatch.setattr(together, "RESULTS", tmp_path)
    write_rates(experiment(), BEST)
    write_tests(experiment())
    methods.write_page()
    methods.write_page(check=True)
    for path in (methods.PAGE, methods.FIGURE):
        content = path.read_text()
        path.unlink()
        with pytest.raises(JobFailed, match=path.name):
            methods.write_page(check=True)
        path.write_text(content)
    methods.write_page(check=True)
    write_cell(experiment().list_rate_cells("lora")[0.01], {"validation": make_values(300, 9)})
    methods.PAGE.write_text(methods_page.build_page(methods.open_experiments()))
    with pytest.raises(JobFailed, match=methods.FIGURE.name):
        methods.write_page(check=True)


def describe_answers(bare: list[float], calculated: list[float], written: list[float]):
    sides = {"rows": 645, "steps": 110}
    return {
        "bare": sides | {"accuracy": {"base": 0.015, "seeds": bare}},
        "worked": sides
        | {"accuracy": {"base": 0.005, "seeds": calculated}}
        | {"numeric_accuracy": {"base": 0.01, "seeds": written}},
    }


@pytest.mark.parametrize(
    ("p", "stated", "is_shown"),
    [(1e-19, "p < 0.0001", True), (0.0004, "p = 0.0004", True), (0.3, "p = 0.3", False)],
)
def test_calculations_are_told_by_seed_and_with_whether_a_difference_is_shown(
    p, stated, is_shown, tmp_path, monkeypatch
):
    monkeypatch.setattr(worked, "RESULTS", tmp_path / "worked.json")
    assert "Not measured yet" in "\n".join(sections.build_worked())
    content = {"machine": "two CPU cores", "seeds": [42, 43], "test_rows": 200}
    content["test_clusters"] = 50
    content |= {"answers": describe_answers([0.03, 0.05], [0.3, 0.4], [0.1, 0.1])}
    content |= {"difference": {"value": 0.31, "low": 0.2, "high": 0.4, "p": p}}
    common.write_json(worked.RESULTS, content)
    text = "\n".join(sections.build_worked())
    assert "| a number | the number | 1.5 | 4.0 (3.0, 5.0) |" in text
    assert "| the value written | 1.0 | 10.0 (10.0, 10.0) |" in text
    assert f"+31.0 points (+20.0 … +40.0), {stated}" in text
    assert ("no difference is shown" in text) != is_shown
    assert "do not record the versions" in text
    for answers in worked.TASKS:
        content["answers"][answers]["origin"] = worked.describe_origin(answers)
    common.write_json(worked.RESULTS, content)
    assert "do not record" not in "\n".join(sections.build_worked())
    content["answers"]["bare"]["origin"]["task_version"] = 0.9
    common.write_json(worked.RESULTS, content)
    text = "\n".join(sections.build_worked())
    assert "changed since" in text and "+31.0" not in text


def test_the_figure_has_a_line_for_each_method_and_is_the_same_again(experiment, tmp_path):
    write_rates(experiment(), BEST)
    files = [tmp_path / f"{number}.svg" for number in range(2)]
    for file in files:
        methods_figure.draw_rates([experiment()], file)
    drawing = files[0].read_bytes()
    assert drawing == files[1].read_bytes()
    for method in SPEC["methods"].values():
        assert method["title"].encode() in drawing


# ---- the real thing, small


@pytest.mark.slow
def test_a_tiny_experiment_trains_scores_and_resumes(
    tiny, chat_rows, experiment, tmp_path, monkeypatch
):
    """Rates first, on rows held back from training; test rows after them; then nothing is left."""
    spec = SPEC | {"rates": [0.001, 0.01], "seeds": [43]}
    spec |= {"methods": {name: SPEC["methods"][name] for name in ("lora", "qlora")}}
    spec["settings"] = {**SPEC["settings"], "max_steps": 2, "warmup_steps": 1, "save_steps": 2}
    plan = {**SPEC["tasks"][TASK], "validation": 20, "limit": 6, "datasets": ["fpb"]}
    spec["tasks"] = {TASK: plan}
    chat = tmp_path / "data" / "chat"
    chat.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # lm-eval finds the test rows from here
    for name in (chat_rows.name, chat_rows.name.replace("_train", "_val")):
        shutil.copy(chat_rows.with_name(name), chat)
    monkeypatch.setattr(sources, "CHAT", chat)

    def find_recipe(self, method):
        settings = SPEC["methods"][method]["recipe"]
        return recipes.find(str(write_recipe(tmp_path, settings, tiny, chat / chat_rows.name)))

    monkeypatch.setattr(methods.Experiment, "find_recipe", find_recipe)
    first = methods.Experiment(spec, TASK)
    with pytest.raises(WrongInput, match="fpb_test"):  # the test rows are not there: rates go well
        methods.run_experiment(first)
    assert not methods.Experiment(spec, TASK).missing_rates
    trained, validated = (
        {row for row in (first.folder / name).read_bytes().splitlines()}
        for name in ("sentiment_train.jsonl", "sentiment_val.jsonl")
    )
    assert len(validated) == 20 and not trained & validated
    shutil.copy(chat_rows, chat / "fpb_test.jsonl")
    methods.run_experiment(methods.Experiment(spec, TASK))
    second = methods.Experiment(spec, TASK)
    assert not second.missing_tests
    assert all(
        len(cell.content["scores"]["fpb"]["values"]) == 6
        for cell in second.list_finished_cells()
        if "fpb" in cell.content["scores"]
    )
    shutil.rmtree(methods.RUNS)  # as on another machine
    methods.run_experiment(methods.Experiment(spec, TASK))
    assert not methods.RUNS.exists()
