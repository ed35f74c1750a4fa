"""A progress file is read while it is written: whole lines only, and each line once."""

import json
import os

from tools import common
from tools.train import progress


def write_row(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.0 / step}) + "\n"


def list_steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


def test_only_added_whole_lines_are_read(tmp_path):
    path = tmp_path / "progress.jsonl"
    tail = progress.Tail(path)
    assert tail.read() == []
    path.write_text(write_row(1) + write_row(2))
    assert list_steps(tail.read()) == [1, 2]
    assert tail.read() == []
    with open(path, "a") as file:
        file.write(write_row(3)[:9])
        file.flush()
        assert tail.read() == []
        file.write(write_row(3)[9:] + write_row(4))
    assert list_steps(tail.read()) == [3, 4]


def test_a_large_file_is_read_once(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text("".join(write_row(step) for step in range(1, 50_001)))
    tail = progress.Tail(path)
    assert len(tail.read()) == 50_000

    def count_bytes() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = count_bytes()
    with open(path, "a") as file:
        file.write(write_row(50_001))
    assert list_steps(tail.read()) == [50_001]
    assert count_bytes() - before < 10_000
    before = count_bytes()
    assert progress.read_last_step(path)["step"] == 50_001
    assert count_bytes() - before < 2 * progress.BLOCK


def test_a_replaced_file_is_read_from_its_start(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text(write_row(1) + write_row(2) + write_row(3))
    tail = progress.Tail(path)
    tail.read()
    for last in (2, 5):  # shorter and longer than before
        with common.atomic(path) as file:
            file.write("".join(write_row(step) for step in range(1, last + 1)).encode())
        assert list_steps(tail.read()) == list(range(1, last + 1))
    path.unlink()
    assert tail.read() == []
    path.write_text(write_row(1))
    assert list_steps(tail.read()) == [1]


def test_a_file_cut_in_place_is_read_from_its_start(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text(write_row(1) + write_row(2) + write_row(3))
    tail = progress.Tail(path)
    tail.read()
    os.truncate(path, len(write_row(1)))
    assert list_steps(tail.read()) == [1]
    # Cut and longer again before the next look.
    path.write_text("".join(write_row(step) for step in range(11, 19)))
    assert list_steps(tail.read()) == list(range(11, 19))


def test_lines_that_a_crash_left_unreadable_are_skipped(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_bytes(write_row(1).encode() + b"\0" * 40 + b"\n" + write_row(2).encode() + b"\0\0")
    assert list_steps(progress.Tail(path).read()) == [1, 2]
    assert progress.read_last_step(path)["step"] == 2


def test_the_last_step_has_a_loss_wherever_it_stands(tmp_path):
    path = tmp_path / "progress.jsonl"
    assert progress.read_last_step(path) == {}
    path.write_text("")
    assert progress.read_last_step(path) == {}
    evaluations = json.dumps({"step": 2, "eval_loss": 1.0}) + "\n"
    path.write_text(
        write_row(1) + write_row(2) + evaluations * (2 * progress.BLOCK // len(evaluations))
    )
    assert progress.read_last_step(path) == json.loads(write_row(2))
    path.write_text(evaluations)
    assert progress.read_last_step(path) == {}
    path.write_text(write_row(1) + write_row(2)[:-5])
    assert progress.read_last_step(path)["step"] == 1
