"""The parity experiment: its statistics against closed forms, its jobs, and its page."""

import json
import re

import numpy as np
import pytest
import yaml

from bench import parity
from tools import models, recipes

SPEC = yaml.safe_load(parity.SPEC.read_text())


def test_no_difference_and_equivalence_are_two_things():
    chance = np.random.default_rng(3)
    few, many = chance.normal(0, 1, (20, 3)), chance.normal(0, 0.2, (2000, 3))
    for values, equivalent in ((few, False), (many, True)):
        comparison = parity.compare_variants(values, np.zeros_like(values), 0.05)
        sentence = parity.describe_difference(comparison, {"margin": 0.05})
        assert ("equivalent within ±5.0 points" in sentence) == equivalent
        assert ("equivalence not shown" in sentence) != equivalent
    worse = parity.compare_variants(many - 0.2, np.zeros_like(many), 0.05)
    sentence = parity.describe_difference(worse, {"margin": 0.05})
    assert "equivalence not shown" in sentence and "a difference, p" in sentence


def test_every_variant_is_a_recipe_that_axolotl_takes():
    wanted = parity.list_jobs(SPEC, [])
    assert len({job.name for job in wanted.values()}) < len(wanted)  # parts share trainings
    for (part, task, name, seed), job in wanted.items():
        paths = {"output_dir": "runs/x", "dataset_prepared_path": "runs/x/prepared"}
        if seed == SPEC["seeds"][0]:
            recipes.validate(job.config | paths, f"{part}, {name}")
        variant = SPEC["parts"][part]["variants"][name]
        assert models.precision(job.config) == variant["precision"]
        assert (job.config["seed"], job.task) == (seed, task)
        assert job.config["max_steps"] == SPEC["settings"]["max_steps"]
        assert job.config["learning_rate"] == (
            0.0005 if part in ("precision", "targets") else 0.002
        )
        for key in variant.keys() - {"precision"}:
            assert job.config[key] == variant[key]


def test_variants_of_a_part_differ_in_what_the_part_is_about_alone():
    about = {
        "precision": {"load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "adapter"},
        "rank": {"lora_r", "lora_alpha"},
        "alpha": {"lora_alpha"},
        "targets": {"lora_target_modules"},
        "method": {"peft_use_dora", "peft_use_rslora"},
    }
    for (part, task, _, seed), job in (wanted := parity.list_jobs(SPEC, [])).items():
        other = wanted[part, task, SPEC["parts"][part]["against"], seed]
        keys = job.config.keys() | other.config.keys()
        differing = {key for key in keys if job.config.get(key) != other.config.get(key)}
        assert differing <= about[part.removesuffix("_2e-3")]
        if part == "rank":
            assert job.config["lora_alpha"] == 2 * job.config["lora_r"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A small experiment whose scores are written by hand: 400 rows, two seeds."""
    monkeypatch.setattr(parity, "RUNS", tmp_path)
    spec = SPEC | {"seeds": [1, 2]}
    spec["parts"] = {"precision": SPEC["parts"]["precision"] | {"tasks": ["sentiment"]}}
    wanted = parity.list_jobs(spec, [])
    right = {"nf4": 30, "int8": 32, "full": 32}
    for (_, _, name, seed), job in wanted.items():
        rows = [{"values": {"accuracy": float(n < 10 * (right[name] + seed))}} for n in range(400)]
        content = {
            "predictions": rows,
            "metrics": {"accuracy": {"value": 0.25}},
            "evaluated": {"data_sha256": "0"},
        }
        for side in ("adapter", "base"):
            file = job.find_scores(side)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
        run = {"train_loss": 0.5, "seconds": 60.0, "trainable_parameters": 1000}
        job.run.info_file.write_text(json.dumps(run))
    return spec, parity.collect_results(spec, wanted) | {"spec": spec, "machine": "2 cores"}


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


def test_the_page_holds_the_table_and_the_figure_is_drawn(measured, tmp_path):
    _, content = measured
    page = parity.insert_results(f"before\n{parity.BEGIN}old\n{parity.END}after\n", content)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert re.search(r"\| nf4 \| 25\.0 \| 78\.8 \(77\.5, 80\.0\) \| -5\.0 \(", page)
    assert "int8 against full: +0.0 points, equivalent within ±5.0 points" in page
    assert parity.insert_results(page, content) == page
    parity.draw_scores(content, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
