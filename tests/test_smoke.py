"""make smoke: the real config for a few steps on the longest rows, and what it says of them."""

import json
import re

from tests.conftest import run, write_recipe
from tools.train import smoke


def test_a_recipe_is_tried_on_its_longest_rows_and_nothing_stays(tiny, chat_rows, tmp_path):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows)
    done = run("smoke", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(re.findall(r"^smoke      (.{13}) (.*)$", done.stdout, re.M))
    told = {label.strip(): text for label, text in lines.items()}
    total = len(chat_rows.read_text().splitlines())
    assert f"8 longest of {total}" in told["rows"]
    losses = [float(number) for number in re.findall(r"\d+\.\d+", told["trains"])]
    assert len(losses) == 2 and 0 < losses[1] < 20
    assert float(re.search(r"[\d.]+", told["peak memory"])[0]) > 0.2
    # The recipe stops after 12 steps.
    assert told["whole run"].startswith(f"12 steps on {total} rows")
    assert "ready" in told
    assert not smoke.FOLDER.exists() and not (tmp_path / "r4").exists()


def test_the_rows_are_the_longest_that_fit(tiny, chat_rows):
    counter = smoke.load_counter(str(tiny))
    lines = chat_rows.read_bytes().splitlines(keepends=True)
    sizes = dict(zip(lines, smoke.count_tokens(counter, lines), strict=True))
    ordered = sorted(sizes.values(), reverse=True)
    config = {"sequence_len": ordered[3], "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    batch = smoke.pick_longest(chat_rows, config, counter)
    fitting = [size for size in ordered if size <= ordered[3]]
    assert [sizes[line] for line in batch.lines] == fitting[:4]
    assert batch.too_long == sum(size > ordered[3] for size in ordered)
    assert batch.mean == sum(ordered) / len(ordered)


def test_a_base_that_is_too_large_is_tried_by_its_tiny_twin(tiny, chat_rows, tmp_path):
    base = "meta-llama/Llama-3.1-8B-Instruct"
    recipe = write_recipe(tmp_path, "r8_dora", tiny, chat_rows, base_model=base)
    done = run("smoke", recipe, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "a tiny random model stands in" in done.stdout, done.stderr
    assert re.search(r"trains +3 steps", done.stdout), done.stdout + done.stderr
    assert "saves, loads" in done.stdout and "whole run" not in done.stdout
    # The weights of the real base cannot be had here, and that is not called ready.
    assert done.returncode == 1 and done.stderr.startswith("error: base: ")
    assert done.stderr.count("\n") == 1


def test_a_row_that_is_too_long_for_every_batch_is_one_line(tiny, tmp_path):
    rows = tmp_path / "long_train.jsonl"
    turns = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    done = run("smoke", write_recipe(tmp_path, "r4", tiny, rows, sequence_len=64))
    assert done.returncode == 2
    assert "over the sequence_len of 64 tokens" in done.stderr and done.stderr.count("\n") == 1
