"""Nothing is lost when a training dies, and what stops it is said in one line."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from tests.conftest import losses, run, write_recipe
from tests.training import assert_same, count_steps, kill, start, wait_for
from tools import common, runs
from tools.runs import Run
from tools.train import callbacks, checkpoints, reproduce, status
from tools.train import process as process_module

# 94 rows in batches of 8 are 12 steps an epoch; the batches are drawn by length.
LONG = {"max_steps": 30, "save_steps": 4, "eval_steps": 15}


def read_failure(result: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a job that failed."""
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stdout + result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def undisturbed(tiny, chat_rows, tmp_path_factory) -> Path:
    """The run that the others are compared with: 30 steps in two and a half epochs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run("train", write_recipe(folder, "r4", tiny, chat_rows, **LONG))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "r4"


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)],
    ids=lambda n: n.name,
)
def test_a_training_told_to_stop_saves_and_goes_on(undisturbed, tiny, chat_rows, tmp_path, number):
    recipe, folder = write_recipe(tmp_path, "r4", tiny, chat_rows, **LONG), tmp_path / "r4"
    process = start(recipe)
    wait_for(process, lambda: count_steps(folder) >= 13)  # in the second epoch
    process.send_signal(number)
    output, error = process.communicate()
    assert process.returncode == 130 and "interrupted" in error
    saved = checkpoints.last_checkpoint(Run(folder))
    assert saved >= 13 and f"continues from step {saved}" in output
    assert (
        not (folder / "run.json").exists() and not (folder / "adapter_model.safetensors").exists()
    )
    assert status.read_status(Run(folder)).note == f"continues from step {saved}"

    result = run("train", recipe)
    assert f"continues from step {saved}" in result.stdout
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_a_training_whose_command_is_killed_saves_and_ends(undisturbed, tiny, chat_rows, tmp_path):
    recipe, folder = write_recipe(tmp_path, "r4", tiny, chat_rows, **LONG), tmp_path / "r4"
    process = start(recipe)
    wait_for(process, lambda: count_steps(folder) >= 2)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    psutil.wait_procs([child])
    process.communicate()
    assert checkpoints.last_checkpoint(Run(folder)) >= 2
    assert not (folder / "run.json").exists() and not Run(folder).is_training


@pytest.mark.slow
def test_a_training_told_to_stop_leaves_its_evaluation(undisturbed, tiny, chat_rows, tmp_path):
    """In the middle (SIGTERM) and at the end (SIGINT); what was left is done when it goes on."""
    data = yaml.safe_load((undisturbed.parent / "r4.yaml").read_text())["datasets"][0]
    data |= {"path": str(tmp_path / "many.jsonl"), "split": "train"}
    (tmp_path / "many.jsonl").write_text(chat_rows.read_text() * 3)
    changes = LONG | {"test_datasets": [data], "eval_batch_size": 1}
    recipe, folder = write_recipe(tmp_path, "r4", tiny, chat_rows, **changes), tmp_path / "r4"

    def evaluated() -> list[int]:
        rows = common.json_lines(folder / "progress.jsonl")
        return [row["step"] for row in rows if "eval_loss" in row]

    for number, step, before in ((signal.SIGTERM, 15, [0]), (signal.SIGINT, 30, [0, 15])):
        process = start(recipe)
        wait_for(process, lambda step=step: count_steps(folder) == step)
        process.send_signal(number)
        output, error = process.communicate()
        assert process.returncode == 130 and f"continues from step {step}" in output, output + error
        assert checkpoints.last_checkpoint(Run(folder)) == step and evaluated() == before
        assert not (folder / "stats.json").exists()
    result = run("train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    assert evaluated() == [0, 15, 30]
    assert_same(folder, undisturbed)


def test_a_stop_reaches_the_training_beside_processes_that_cannot_be_asked(tmp_path):
    """torchrun's process has two that train, a zombie, and one of them has a worker."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, subprocess, sys, time\n"
        "name, more = sys.argv[1], sys.argv[2:]\n"
        "def stop(*_):\n"
        "    open(name, 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "zombie = subprocess.Popen(['true'])  # never waited for\n"
        "inside = os.environ | {'TORCHELASTIC_RUN_ID': 'a'}\n"
        "for other in more:\n"
        "    subprocess.Popen([sys.executable, __file__, *other.split()], env=inside)\n"
        "open(name + '.ready', 'w').close()\n"
        "while True: time.sleep(0.05)\n"
    )
    names = [str(tmp_path / name) for name in ("leader", "first", "second", "worker")]
    leader = subprocess.Popen(
        [sys.executable, script, names[0], f"{names[1]} {names[3]}", names[2]], process_group=0
    )
    try:
        wait_for(leader, lambda: all(Path(f"{name}.ready").exists() for name in names))
        family = psutil.Process(leader.pid).children(recursive=True)
        wait_for(leader, lambda: any(p.status() == psutil.STATUS_ZOMBIE for p in family))
        ranks = process_module.find_trainers(leader.pid)
        assert {p.cmdline()[2] for p in ranks} == {*names[1:3]}
        for member in ranks:
            member.send_signal(signal.SIGTERM)
        wait_for(leader, lambda: all(Path(name).exists() for name in names[1:3]))
        assert not Path(names[0]).exists() and not Path(names[3]).exists()
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
    assert (
        process_module.find_trainers(leader.pid) == []
    )  # it is gone: there is nobody to tell, and no error


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tiny, chat_rows, tmp_path):
    """21 times: after a random number of steps, and in the middle of writing a checkpoint."""
    content = {"max_steps": 80, "save_steps": 2, "eval_steps": 80}
    (tmp_path / "once").mkdir(), (tmp_path / "killed").mkdir()
    once = write_recipe(tmp_path / "once", "r4", tiny, chat_rows, **content)
    assert run("train", once).returncode == 0
    recipe = write_recipe(tmp_path / "killed", "r4", tiny, chat_rows, **content)
    folder, dice, torn = tmp_path / "killed" / "r4", random.Random(0), 0
    for life in range(21):
        process, begun = start(recipe), count_steps(folder)
        after = begun + dice.randint(1, 3)
        if life % 3:
            wait_for(process, lambda after=after: count_steps(folder) >= after)
        else:
            wait_for(process, lambda begun=begun: count_steps(folder) > begun + 1)
            wait_for(process, lambda: any((folder / ".writing").glob("checkpoint-*/*")))
        time.sleep(dice.random() / 20)
        kill(process)
        torn += any((folder / ".writing").glob("checkpoint-*"))
        assert not (folder / "run.json").exists()
    assert torn, "no kill met a checkpoint in the writing"
    result = run("train", recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(folder.glob("damaged-*"))  # what is there under its name is whole
    assert_same(folder, tmp_path / "once" / "r4")


@pytest.mark.slow
def test_a_checkpoint_is_verified_before_it_is_used(undisturbed, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(undisturbed, tmp_path / "run")
    newest, before = tmp_path / "run" / "checkpoint-30", tmp_path / "run" / "checkpoint-28"
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        newest.name,
        before.name,
    }  # as many as the recipe says
    digests = json.loads((newest / "checkpoint.json").read_text())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(digests)
    flipped = bytearray((newest / "optimizer.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(flipped)
    assert checkpoints.last_checkpoint(Run(tmp_path / "run")) == 28
    assert "checkpoint-30 is damaged and left out" in capsys.readouterr().out

    weights = load_file(before / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, before / "adapter_model.safetensors")
    checkpoints.seal(before)
    assert checkpoints.last_checkpoint(Run(tmp_path / "run")) == 0


@pytest.mark.slow
def test_data_that_changes_while_it_is_read_stops_the_training(tiny, chat_rows, tmp_path):
    data = tmp_path / "sentiment_train.jsonl"
    shutil.copy(chat_rows, data)
    recipe, folder = write_recipe(tmp_path, "r4", tiny, data), tmp_path / "r4"
    process = start(recipe)
    wait_for(process, (folder / "config.yaml").exists)
    data.write_text(data.read_text().splitlines()[0] + "\n" + data.read_text())
    _, error = process.communicate()
    assert process.returncode == 1
    assert "changed while the training was starting" in error and error.count("\n") == 1
    assert not (folder / "run.json").exists() and not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("rate", "reason"),
    [(1e30, "is not a number at step"), (50.0, "the loss diverges: ")],
)
@pytest.mark.slow
def test_a_loss_that_is_lost_stops_the_training(tiny, chat_rows, tmp_path, rate, reason):
    changes = LONG | {"learning_rate": rate, "warmup_steps": 2, "save_steps": 1}
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **changes)
    error = read_failure(run("train", recipe))
    assert reason in error
    folder = tmp_path / "r4"
    finished = ("run.json", "stats.json", "adapter_model.safetensors")
    assert not any((folder / name).exists() for name in finished)
    at = int(re.search(r"step (\d+)", error)[1])
    assert checkpoints.last_checkpoint(Run(folder)) < at  # nothing of the lost step is kept


def test_a_loss_diverges_where_it_doubles_or_its_gradient_explodes():
    def explain(losses, norms):
        return callbacks.explain_divergence(
            [{"loss": a, "grad_norm": b} for a, b in zip(losses, norms, strict=True)]
        )

    falling = [3 - 0.1 * step for step in range(20)]
    assert explain(falling, [1.0] * 20) is None
    assert explain([3.0] * 10 + [5.9] * 10, [1.0] * 20) is None
    assert explain([0.01] * 10 + [0.5] * 10, [1.0] * 20) is None  # a lucky start is no divergence
    assert explain([3.0] * 10 + [6.1] * 10, [1.0] * 20) == (
        "3.00 at first, 6.10 (gradient norm 1) over 10 steps"
    )
    assert explain([11.0] * 20, [1.0] * 10 + [1001.0] * 10)
    assert explain(falling, [1.0] * 10 + [1001.0] * 10) is None
    assert explain([3.0] * 10 + [9.0] * 9, [1.0] * 19) is None


@pytest.fixture
def watch(tmp_path) -> callbacks.Watch:
    return callbacks.Watch(SimpleNamespace(deepspeed=None), None, callbacks.Progress(tmp_path))


def log(watch: callbacks.Watch, step: int, fp16: bool, **logs: float) -> None:
    state = SimpleNamespace(global_step=step, epoch=step / 10)
    watch.on_log(SimpleNamespace(fp16=fp16), state, None, logs=logs)


def test_a_gradient_may_overflow_while_the_scale_of_fp16_falls(watch):
    import torch

    scaler = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    overflows = 0
    while not overflows or scaler.get_scale() >= 1:
        scaler.scale(weight * math.inf).sum().backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        overflows += 1
    assert weight.item() == 1 and overflows == 17 < callbacks.OVERFLOWS

    for step in range(1, callbacks.OVERFLOWS):
        log(watch, step, True, loss=2.0, grad_norm=math.nan if step % 2 else math.inf)
    log(watch, callbacks.OVERFLOWS, True, loss=2.0, grad_norm=1.0)
    for step in range(21, 40):
        log(watch, step, True, loss=2.0, grad_norm=math.inf)
    with pytest.raises(
        callbacks.Stopped, match=r"gradient .* step 40 \(epoch 4.00\), nor at the 19"
    ):
        log(watch, 40, True, loss=2.0, grad_norm=math.inf)


def test_a_stop_says_which_number_was_lost(watch):
    log(watch, 1, False, loss=2.0, grad_norm=1.0)
    for fp16 in (False, True):
        with pytest.raises(
            callbacks.Stopped, match=r"^the training loss is not .* step 2 \(epoch 0.2"
        ):
            log(watch, 2, fp16, loss=math.inf, grad_norm=math.nan)
        with pytest.raises(
            callbacks.Stopped, match=r"^the training loss is not a number at step 3"
        ):
            log(watch, 3, fp16, train_loss=math.nan)
        for name in ("eval_loss", "eval_other_loss"):
            with pytest.raises(
                callbacks.Stopped, match="^the evaluation loss is not .* step 4 .*rows"
            ):
                log(watch, 4, fp16, **{name: math.nan})
    # Without a scaler the step was taken.
    with pytest.raises(
        callbacks.Stopped, match="^the gradient of the training loss is not .* step 5"
    ):
        log(watch, 5, False, loss=2.0, grad_norm=math.inf)


def test_a_training_whose_adapter_gets_no_gradient_stops(watch):
    watch.progress.lines = [{"loss": 2.0, "grad_norm": 0.0}] * 2
    log(watch, 2, False, loss=2.0, grad_norm=0.0)
    watch.progress.lines.append({"loss": 2.0, "grad_norm": 0.0})
    with pytest.raises(callbacks.Stopped, match="no gradient reached the adapter in 3 steps"):
        log(watch, 3, False, loss=2.0, grad_norm=0.0)
    watch.cfg.deepspeed = "zero2.json"  # which reports 0 for a step that overflows
    log(watch, 3, False, loss=2.0, grad_norm=0.0)
    watch.cfg.deepspeed = None
    watch.progress.lines[0] = {"loss": 2.0, "grad_norm": 0.5}
    log(watch, 3, False, loss=2.0, grad_norm=0.0)


def test_the_progress_holds_numbers_only(tmp_path):
    state = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
    follower = callbacks.Progress(tmp_path)
    follower.on_log(None, state, None, logs={"loss": 2.0, "grad_norm": math.nan})
    follower.on_log(None, state, None, logs={"eval_loss": math.inf})
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first["loss"] == 2.0 and "grad_norm" not in first and "eval_loss" not in second


def test_the_peak_of_a_step_outlives_a_counter_that_is_set_back(tmp_path, monkeypatch):
    """Axolotl sets CUDA's peak back between the end of a step and its log line."""
    state = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
    follower, readings = callbacks.Progress(tmp_path), iter([900, 300, 700, 300])
    monkeypatch.setattr(callbacks, "measure_peak_memory", lambda: next(readings))
    for _ in range(2):
        follower.on_step_end(None, state, None)
        follower.on_log(None, state, None, logs={"loss": 2.0})
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["memory"] for line in lines] == [900, 900]


@pytest.mark.slow
def test_out_of_memory_says_what_the_planner_suggests(tiny, chat_rows, tmp_path):
    changes = {"micro_batch_size": 64, "dequantize_once": None}
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **changes)

    # Enough for the command itself, whose libraries take more with torch's CUDA build, and not for
    # the training. Where memory ends decides who notices: Python, torch or the tokenizers' Rust.
    code = (
        "from tools import recipes; recipes.validate(recipes.find('sentiment_r4').config, 'x');"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmData')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True
    )
    limit = (int(done.stdout.split()[-2]) << 10) + (400 << 20)

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    process = start(recipe, preexec_fn=little_memory)
    _, error = process.communicate()
    assert process.returncode == 1 and "out of memory" in error, error
    assert not (tmp_path / "r4" / "run.json").exists()

    config = yaml.safe_load(recipe.read_text()) | {"base_model": "meta-llama/Llama-3.1-8B-Instruct"}
    advice = process_module.advise_memory(config, 1)
    assert "micro_batch_size: 32, gradient_accumulation_steps: 2" in advice


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(tiny, chat_rows, tmp_path):
    disk = tmp_path / "r4"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, save_total_limit=12, save_steps=1)
        error = read_failure(run("train", recipe))
        assert "no space left on the disk" in error
        assert not (disk / "run.json").exists()
        step = checkpoints.last_checkpoint(Run(disk))
        assert f"continues from step {step}" in error
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        result = run("train", recipe)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"continues from step {step}" in result.stdout
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tiny, chat_rows):
    place = Path("/proc/finlora")  # not even root may write there
    recipe_folder = tiny.parent
    recipe = write_recipe(recipe_folder, "r4", tiny, chat_rows, output_dir=str(place / "r4"))
    error = read_failure(run("train", recipe))
    assert f"{place}" in error and "cannot be written" in error


@pytest.mark.slow
def test_a_run_is_reproduced_to_the_bit(undisturbed):
    result = run("reproduce", undisturbed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same to the bit" in result.stdout
    assert_same(undisturbed.with_name("r4.reproduced"), undisturbed)
    with pytest.raises(common.WrongInput, match="no finished run"):
        reproduce.build_recipe(Run(undisturbed.parent))


@pytest.mark.slow
def test_a_tracker_writes_only_where_it_is_asked_for(undisturbed, tiny, chat_rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not list(undisturbed.rglob("events.out.tfevents*"))
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows)
    assert run("train", recipe, "--tracker", "tensorboard").returncode == 0
    (file,) = (tmp_path / "r4").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx(losses(tmp_path / "r4"))

    # It is no other run by it.
    result = run("train", recipe)
    assert "is finished" in result.stdout
    result = run("train", recipe, "--tracker", "tensorbord")
    assert result.returncode == 2 and "'tensorboard', 'trackio', 'wandb'" in result.stderr


@pytest.mark.slow
def test_status_tells_what_trains_and_what_is_done(undisturbed, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", undisturbed.parent)
    statuses = {row.run: row for row in status.list_statuses()}
    finished = statuses["r4"]
    assert (finished.state, finished.step) == ("finished", 30)
    with Run(undisturbed).lock():
        assert status.list_statuses()[0].state == "training"


def test_status_keeps_no_training_from_starting(tmp_path):
    script = "import sys, pathlib; from tools.runs import Run\nwhile True:"
    script += " Run(pathlib.Path(sys.argv[1])).is_training"
    with Run(tmp_path / "run").lock():
        looking = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "run"], cwd=common.ROOT
        )
    try:
        for _ in range(3000):
            assert looking.poll() is None
            with Run(tmp_path / "run").lock():
                assert Run(tmp_path / "run").is_training
            assert not Run(tmp_path / "run").is_training
    finally:
        looking.kill()
        looking.wait()


def test_the_lock_lives_as_long_as_the_process_that_inherited_it(tmp_path):
    with Run(tmp_path / "run").lock() as lock:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert Run(tmp_path / "run").is_training
    with pytest.raises(common.JobFailed, match="under way"), Run(tmp_path / "run").lock():
        pass
    child.communicate()
    assert not Run(tmp_path / "run").is_training


@pytest.fixture
def shared():
    """A folder of root's that others may enter, and a context in which another user acts."""
    if os.geteuid():
        pytest.skip("only root may act as another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    @contextmanager
    def other_user():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    yield folder, other_user
    shutil.rmtree(folder)


@pytest.mark.parametrize("whose", ["parent", "lock", "run", "parent with a lock"])
def test_what_another_user_began_is_one_line_that_names_the_owner(shared, whose):
    folder, other_user = shared
    if "lock" in whose:
        Run(folder / "run").lock_file.touch()
    if whose == "parent with a lock":
        Run(folder / "run").lock_file.chmod(0o666)
    elif whose != "parent":
        folder.chmod(0o777)
    if whose == "run":
        (folder / "run").mkdir()
    refused = pytest.raises(
        common.JobFailed, match="cannot be written to: Permission denied: .* belongs to root"
    )
    with other_user(), refused as error, Run(folder / "run").lock():
        pass
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(shared, undisturbed):
    folder, other_user = shared
    shutil.copytree(undisturbed / "checkpoint-30", folder / "checkpoint-30")
    (folder / "checkpoint-30" / "optimizer.pt").chmod(0o600)
    folder.chmod(0o777)
    with other_user():
        with pytest.raises(PermissionError) as error:
            checkpoints.last_checkpoint(Run(folder))
        line = common.explain(error.value)
    assert "checkpoint-30" in line and "belongs to root" in line
    assert checkpoints.last_checkpoint(Run(folder)) == 30


def test_one_run_that_cannot_be_read_does_not_hide_the_others(shared, monkeypatch):
    folder, other_user = shared
    monkeypatch.setattr(runs, "RUNS", folder)
    for name in ("closed", "damaged", "locked", "mine", "private"):
        (folder / name).mkdir()
        (folder / name / "identity.json").write_text("{}")
        (folder / name / "progress.jsonl").write_text('{"step": 1, "steps": 2, "loss": 1.0}\n')
    (folder / "closed").chmod(0o700)
    (folder / "damaged" / "run.json").write_text("{")
    Run(folder / "locked").lock_file.touch(0o600)
    (folder / "private" / "progress.jsonl").chmod(0o600)
    with other_user():
        statuses = {Path(row.run).name: row for row in status.list_statuses()}
    assert statuses["mine"].state == "interrupted" and len(statuses) == 5
    notes = {name: row.note for name, row in statuses.items() if row.state == "unreadable"}
    assert notes.keys() == {"closed", "damaged", "locked", "private"}
    assert notes["damaged"].startswith("damaged: ")
    assert all("Permission denied" in note for n, note in notes.items() if n != "damaged")
    status.print_statuses(list(statuses.values()))


def test_the_last_step_is_the_newest_whole_line_with_a_loss(tmp_path):
    path = tmp_path / "progress.jsonl"
    assert status.read_last_step(path) == {}
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5001)]
    lines = [json.dumps(row) for row in rows]
    evaluation, torn = json.dumps({"step": 5000, "eval_loss": 1.0}), lines[0][:9]
    for end, step in (
        ("", 5000),
        (evaluation, 5000),
        (f"{evaluation}\n{torn}", 5000),  # the training is writing
        ("\0" * 40 + "\n" + "\0\0", 5000),  # a crash of the machine
    ):
        path.write_text("\n".join([*lines, end]) + ("\n" if end == evaluation else ""))
        assert status.read_last_step(path) == rows[step - 1]
    path.write_text(f"{evaluation}\n")
    assert status.read_last_step(path) == {}


def test_the_last_step_of_a_long_file_costs_little(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(50_001)))

    def count_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count_bytes()
    assert status.read_last_step(path)["step"] == 50_000
    assert count_bytes() - before < 2 * status.BLOCK
