"""Tasks together and alone: equal rows of each, comparisons on the same rows and seeds."""

import json
import random

import pytest

from bench import equivalence, sections, together
from bench.cells import collect_columns, describe_score, list_clusters, unpack_values
from tests.test_methods import make_values, write_cell
from tools import sources
from tools.common import WrongInput, read_yaml

SPEC = read_yaml(together.SPEC)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(together, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    return tmp_path


def write_training_rows(task, count, of=None):
    """Chat rows that name their task and number."""
    path = sources.train_path(task)
    path.parent.mkdir(exist_ok=True)
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{of or task} {number}"},
                    {"role": "assistant", "content": f"{task}"},
                ]
            }
        )
        for number in range(count)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def read_prompts(part, variant):
    rows = map(json.loads, part.find_rows_file(variant).read_text().splitlines())
    return [row["messages"][0]["content"] for row in rows]


def test_a_task_has_the_same_rows_alone_and_together():
    part = together.Part(SPEC, "tasks")
    for task in ("sentiment", "ner"):
        write_training_rows(task, 600)
    for variant in part.plan["variants"]:
        together.write_rows(part, variant)
    both = read_prompts(part, "both")
    alone = [read_prompts(part, name) for name in ("sentiment alone", "NER alone")]
    assert [len(rows) for rows in alone] == [SPEC["rows"]] * 2
    assert sorted(both) == sorted(alone[0] + alone[1])
    assert len({row.split()[0] for row in both[:20]}) == 2  # mixed, not one task after the other


def test_rows_with_repaired_and_published_labels_have_the_same_prompts():
    part = together.Part(SPEC, "labels")
    for task in ("tfns", "tfns_as_published"):
        write_training_rows(task, 600, of="tweet")
    for variant in part.plan["variants"]:
        together.write_rows(part, variant)
    repaired, published = (read_prompts(part, variant) for variant in part.plan["variants"])
    assert repaired == published


def test_all_variants_see_each_row_once_at_the_same_schedule():
    for name in SPEC["parts"]:
        part = together.Part(SPEC, name)
        configs = [part.list_cells(variant)[0].recipe.config for variant in part.plan["variants"]]
        for config in configs:
            assert config["num_epochs"] == 1 and "max_steps" not in config
            assert "warmup_steps" not in config and "test_datasets" not in config
        for key in (
            *("learning_rate", "lora_r", "lora_alpha", "load_in_4bit", "optimizer"),
            *("micro_batch_size", "gradient_accumulation_steps", "warmup_ratio", "sequence_len"),
        ):
            assert len({config[key] for config in configs}) == 1, key


def test_too_few_rows_are_refused():
    for task in ("sentiment", "ner"):
        write_training_rows(task, 5)
    with pytest.raises(WrongInput, match=r"sentiment_train\.jsonl has 5 rows; 480 are needed"):
        together.write_rows(together.Part(SPEC, "tasks"), "both")


def test_a_comparison_uses_the_rows_of_one_test_and_names_a_missing_seed():
    part = together.Part(SPEC, "labels")
    draw = random.Random(0)
    for variant, right in (("repaired", 0.8), ("as published", 0.4)):
        for cell in part.list_cells(variant):
            values = [float(draw.random() < right) for _ in range(500)]
            tests = {"tfns_rest": values, "tfns_rest_as_published": make_values(500, 250)}
            write_cell(cell, tests)
    wrong, same = part.compare_all()
    assert wrong["value"] < -0.3 and wrong["p"] < 0.01
    assert same["value"] == 0
    section = "\n".join(sections.build_part(part))
    assert "on repaired: different" in section and "equivalent within" in section
    assert "The predicted drop of more than 2 points is shown" in section
    assert "The predicted rise of more than 2 points is ruled out" in section
    below = "Below the most frequent answer alone: repaired on published, as published on repaired"
    assert f"- {below}, as published on published." in section
    assert "one answer to all rows" not in section
    part.list_cells("repaired")[0].file.unlink()
    assert part.missing == [part.list_cells("repaired")[0].name]


def test_rows_about_one_sentence_count_as_one(monkeypatch):
    part = together.Part(SPEC, "tasks")
    draw, clusters = random.Random(1), [number // 10 for number in range(500)]
    for variant in ("both", "NER alone", "sentiment alone"):
        right = [draw.random() < (0.9 if variant == "both" else 0.7) for _ in range(50)]
        for seed, cell in enumerate(part.list_cells(variant)):
            right[seed] = not right[seed]
            values = [float(right[cluster]) for cluster in clusters]
            write_cell(cell, {name: values for name in ("fpb", "fiqa", "tfns", "ner")})
    cells = part.list_all_cells()
    with pytest.raises(WrongInput, match=r"seed43\.json names no clusters of ner; move it away"):
        part.compare_all()
    both, alone = (part.list_cells(name) for name in ("both", "NER alone"))
    columns = collect_columns(both, ["ner"]) - collect_columns(alone, ["ner"])
    before = equivalence.compare_means(columns, SPEC["margin"])
    for cell in cells:
        content = json.loads(cell.file.read_text())
        marked = describe_score(
            "accuracy",
            unpack_values(content["scores"]["ner"]["values"]),
            "sha",
            [{"cluster": c, "values": {}} for c in clusters],
        )
        content["scores"]["ner"] |= {"clusters": marked["clusters"], "low": marked["low"]}
        cell.file.write_text(json.dumps(content))
    assert list_clusters(cells[0], ["ner"]) == clusters
    assert list_clusters(cells[0], ["fpb"]) is None
    assert list_clusters(cells[0], ["fpb", "ner"]) == [*range(500), *(500 + c for c in clusters)]
    _, after = part.compare_all()
    assert before["value"] == pytest.approx(after["value"])
    assert after["high"] - after["low"] > 1.5 * (before["high"] - before["low"])


def test_results_of_other_rows_or_tests_than_planned_are_missing():
    part = together.Part(SPEC, "tasks")
    for cell in part.list_all_cells():
        write_cell(cell, {"fpb": make_values(10, 5)})
    assert not part.missing
    fewer = SPEC["tests"] | {"ner": SPEC["tests"]["ner"] | {"limit": 100}}
    for changes, left in (({"rows": 960}, 9), ({"tests": fewer}, 6)):
        assert len(together.Part(SPEC | changes, "tasks").missing) == left


@pytest.mark.parametrize(
    ("shift", "text"),
    [
        (0, "all seeds are right on the same rows, as many as the most frequent answer alone"),
        (1, "each seed scores what one answer to all rows scores."),
    ],
)
def test_scores_that_one_answer_gives_are_called_that(shift, text):
    part = together.Part(SPEC, "labels")
    for variant, right in (("repaired", 300), ("as published", 308)):
        for number, cell in enumerate(part.list_cells(variant)):
            values = make_values(500, right)
            published = values[number * shift :] + values[: number * shift]
            scores = {"tfns_rest": make_values(500, 250), "tfns_rest_as_published": published}
            write_cell(cell, scores)
    section = "\n".join(sections.build_part(part))
    assert f"- as published, scored on published: {text}" in section
    assert section.count("scored on published:") == 1


def test_variants_are_compared_on_the_same_test_rows_alone():
    part = together.Part(SPEC, "labels")
    tests = {"tfns_rest": make_values(500, 250), "tfns_rest_as_published": make_values(500, 9)}
    for number, variant in enumerate(part.plan["variants"]):
        for cell in part.list_cells(variant):
            write_cell(cell, tests, train_sha256=[number])
    sections.build_part(part)  # other training rows are what is compared
    for cell in part.list_cells("repaired"):
        content = json.loads(cell.file.read_text())
        content["scores"]["tfns_rest"]["data_sha256"] = "others"
        cell.file.write_text(json.dumps(content))
    with pytest.raises(WrongInput, match="has other rows of tfns_rest than"):
        sections.build_part(part)


def test_an_unknown_part_is_named():
    with pytest.raises(WrongInput, match="unknown part nothing; there are tasks, labels"):
        together.open_parts("nothing")
