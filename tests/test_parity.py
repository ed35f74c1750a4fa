"""The parity experiment: its statistics against closed forms, its jobs, and its page."""

import json
import re

import numpy as np
import pytest
import yaml

from bench import equivalence, parity
from tools import common, models, recipes

SPEC = yaml.safe_load(parity.SPEC.read_text())


def test_no_difference_and_equivalence_are_two_things():
    chance = np.random.default_rng(3)
    few, many = chance.normal(0, 1, (20, 3)), chance.normal(0, 0.2, (2000, 3))
    for values, equivalent in ((few, False), (many, True)):
        comparison = equivalence.compare_variants(values, np.zeros_like(values), 0.05)
        sentence = parity.describe_difference(comparison, {"margin": 0.05})
        assert ("equivalent within ±5.0 points" in sentence) == equivalent
        assert ("equivalence not shown" in sentence) != equivalent
    worse = equivalence.compare_variants(many - 0.2, np.zeros_like(many), 0.05)
    sentence = parity.describe_difference(worse, {"margin": 0.05})
    assert "equivalence not shown" in sentence and "a difference, p" in sentence


def list_trainings():
    """Part, task, variant, seed and recipe of each training of the experiment."""
    for part, plan in SPEC["parts"].items():
        for task in plan["tasks"]:
            for name, trained in parity.list_recipes(SPEC, part, task).items():
                for seed, recipe in zip(plan.get("seeds", SPEC["seeds"]), trained, strict=True):
                    yield part, task, name, seed, recipe


def test_every_variant_is_a_recipe_that_axolotl_takes():
    wanted = list(list_trainings())
    assert len({str(recipe.run) for *_, recipe in wanted}) < len(wanted)  # parts share trainings
    for part, task, name, seed, recipe in wanted:
        config = recipe.config
        if seed == SPEC["seeds"][0]:
            recipes.validate(config, f"{part}, {name}")
        variant = SPEC["parts"][part]["variants"][name]
        assert models.precision(config) == variant["precision"]
        assert (config["seed"], recipe.task) == (seed, task)
        assert config["max_steps"] == SPEC["settings"]["max_steps"]
        assert config["learning_rate"] == (0.0005 if part in ("precision", "targets") else 0.002)
        for key in variant.keys() - {"precision"}:
            assert config[key] == variant[key]


def test_variants_of_a_part_differ_in_what_the_part_is_about_alone():
    about = {
        "precision": {"load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "adapter"},
        "rank": {"lora_r", "lora_alpha"},
        "alpha": {"lora_alpha"},
        "targets": {"lora_target_modules"},
        "method": {"peft_use_dora", "peft_use_rslora"},
    }
    configs = {tuple(key): recipe.config for *key, recipe in list_trainings()}
    for (part, task, _, seed), config in configs.items():
        other = configs[part, task, SPEC["parts"][part]["against"], seed]
        keys = config.keys() | other.keys()
        differing = {key for key in keys if config.get(key) != other.get(key)}
        differing -= {"output_dir", "dataset_prepared_path"}
        assert differing <= about[part.removesuffix("_2e-3")]
        if part == "rank":
            assert config["lora_alpha"] == 2 * config["lora_r"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A small experiment whose scores are written by hand: 400 rows, two seeds."""
    monkeypatch.setattr(parity, "RUNS", tmp_path)
    spec = SPEC | {"seeds": [1, 2]}
    spec["parts"] = {"precision": SPEC["parts"]["precision"] | {"tasks": ["sentiment"]}}
    right = {"nf4": 30, "int8": 32, "full": 32}

    def train_and_score(recipe, dataset, limit):
        assert (dataset, limit) == ("fpb", spec["tasks"]["sentiment"].get("limit"))
        count = 10 * (right[models.precision(recipe.config)] + recipe.config["seed"])
        rows = [{"values": {"accuracy": float(n < count)}} for n in range(400)]
        content = {
            "predictions": rows,
            "metrics": {"accuracy": {"value": 0.25}},
            "evaluated": {"data_sha256": "0"},
        }
        run = {"train_loss": 0.5, "seconds": 60.0, "trainable_parameters": 1000}
        common.write_json(recipe.run.info_file, run)
        return dict.fromkeys(("adapter", "base"), content)

    monkeypatch.setattr(parity, "train_and_score", train_and_score)
    content = parity.collect_results(spec, spec["parts"])
    return spec, content | {"spec": spec, "machine": "2 cores"}


def test_results_are_what_the_score_files_hold(measured):
    _, content = measured
    entry = content["parts"]["precision"]["sentiment"]
    assert entry["rows"] == 400
    assert entry["variants"]["nf4"]["scores"] == [31 / 40, 32 / 40]
    assert entry["variants"]["nf4"]["against"]["value"] == pytest.approx(-2 / 40)
    assert entry["variants"]["int8"]["against"]["value"] == 0
    raw = [entry["variants"][name]["against"]["p_margin"] for name in ("nf4", "int8")]
    assert raw[0] > 0.4 and raw[1] < 0.001
    assert "against" not in entry["variants"]["full"]
    json.dumps(content)


def test_the_page_holds_the_table_and_the_figure_is_drawn(measured, tmp_path, monkeypatch):
    _, content = measured
    monkeypatch.setattr(parity, "DOC", tmp_path / "experiments.md")
    parity.DOC.write_text(f"before\n{parity.BEGIN}old\n{parity.END}after\n")
    parity.write_page(content)
    page = parity.DOC.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert re.search(r"\| nf4 \| 25\.0 \| 78\.8 \(77\.5, 80\.0\) \| -5\.0 \(", page)
    assert "int8 against full: +0.0 points, equivalent within ±5.0 points" in page
    parity.write_page(content, check=True)
    parity.DOC.write_text(page.replace("78.8", "79.9"))
    with pytest.raises(common.JobFailed, match=r"experiments\.md is out of date"):
        parity.write_page(content, check=True)
    parity.draw_scores(content, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
