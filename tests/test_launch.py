"""Sweeps here, on Slurm and on rented machines; each file is read by its engine's own parser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import run, write_recipe
from tests.training import wait_for
from tools import common, recipes
from tools.train import scale, sweep

LAUNCH = common.ROOT / "launch"


def sky_python() -> str | None:
    """The interpreter of an installed `sky`, which needs an environment of its own."""
    script = shutil.which("sky")
    return Path(script).read_text().splitlines()[0][2:] if script else None


@pytest.mark.parametrize("name", ["sky", "sky_job"])
def test_skypilot_reads_its_task(name, tmp_path):
    if not sky_python():
        pytest.skip("`sky` is not on PATH (pip install skypilot, in an environment of its own)")
    script = tmp_path / "read.py"
    script.write_text(
        "import json, sys, sky\n"
        "task = sky.Task.from_yaml(sys.argv[1])\n"
        "machines = [[str(r.cloud), r.accelerators, r.use_spot, r.autostop_config.down\n"
        "          if r.autostop_config else None] for r in task.resources]\n"
        "print('#', json.dumps([machines, task.run, list(task.storage_mounts)]))\n"
    )
    done = subprocess.run(
        [sky_python(), script, LAUNCH / f"{name}.yaml"],
        cwd=common.ROOT,
        env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("# "))
    machines, command, mounts = json.loads(line[2:])
    assert command.startswith("make train RECIPE=")
    if name == "sky":
        assert machines == [["RunPod", {"RTXA5000": 4}, False, True]]
    else:
        assert all(spot for _, _, spot, _ in machines) and mounts == ["~/sky_workdir/runs"]


def test_every_launcher_names_recipes_and_variables_that_there_are():
    from tools.__main__ import build_commands

    options = {option.name for option in build_commands().commands["train"].params}
    for name in ("sky", "sky_job"):
        task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
        assert recipes.find(task["envs"]["RECIPE"]).config
        for word in task["run"].split():
            variable = word.partition("=")[0]
            assert word in ("make", "train") or variable.lower() in options
    for script in ("sky.sh", "slurm.sh"):
        assert os.access(LAUNCH / script, os.X_OK)
        assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0


KEPT = [
    "was not taken down",
    "rsync -az --exclude prepared finlora-sentiment-r4:sky_workdir/runs .",
    "sky down -y finlora-sentiment-r4",
]


@pytest.fixture
def cloud(tmp_path):
    """launch/sky.sh with stand-ins for `sky` and `rsync`, and the file of their calls.

    The function that starts it takes faults: "launch=100 -az=12" lets a call end with that status.
    """
    calls, commands = tmp_path / "calls", tmp_path / "bin"
    commands.mkdir()
    for name in ("sky", "rsync"):
        stand_in = commands / name
        stand_in.write_text(
            f'#!/bin/bash\necho {name} "$@" >> {calls}\n'
            "[[ $1 == launch && $WAIT ]] && sleep 60\n"
            "for fault in $FAILS; do [[ $1 == ${fault%=*} ]] && exit ${fault#*=}; done\nexit 0\n"
        )
        stand_in.chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"

    def launch(fails: str = "", wait: str = "") -> subprocess.Popen:
        environment = os.environ | {"PATH": path, "FAILS": fails, "WAIT": wait}
        return subprocess.Popen(
            [LAUNCH / "sky.sh", "sentiment_r4"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return launch, calls


def list_calls(calls: Path) -> list[str]:
    """The first two words of each call."""
    return [" ".join(line.split()[:2]) for line in calls.read_text().splitlines()]


# The faults of a rent: its exit status, the calls that follow, and what it prints as an error.
RENTS = {
    "trained": ("", 0, ["sky launch", "rsync -az", "sky down"], []),
    "training failed": ("launch=100", 100, ["sky launch", "rsync -az", "sky down"], []),
    # Files that go while they are copied are no failure.
    "files vanished": ("-az=24", 0, ["sky launch", "rsync -az", "sky down"], []),
    "not copied": ("-az=12", 1, ["sky launch", "rsync -az", "sky autostop"], KEPT),
    "neither": ("launch=100 -az=12", 100, ["sky launch", "rsync -az", "sky autostop"], KEPT),
    "not ended": (
        "down=1",
        1,
        ["sky launch", "rsync -az", "sky down"],
        ["still up and costs money: sky down -y finlora-sentiment-r4"],
    ),
}


@pytest.mark.parametrize(("faults", "status", "expected", "texts"), RENTS.values(), ids=RENTS)
def test_a_machine_goes_once_its_run_is_brought_back(cloud, faults, status, expected, texts):
    launch, calls = cloud
    process = launch(faults)
    _, errors = process.communicate()
    assert process.returncode == status and list_calls(calls) == expected
    assert all(text in errors for text in texts) and bool(errors) == bool(texts)
    assert "finlora-sentiment-r4:sky_workdir/runs" in calls.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_is_brought_back_where_its_launch_is_interrupted(cloud, number):
    launch, calls = cloud
    process = launch(wait="1")
    # The file is there a moment before the line in it: a signal between the two leaves no line.
    wait_for(process, lambda: calls.exists() and calls.read_text().endswith("\n"))
    os.killpg(process.pid, number)
    process.communicate()
    assert process.returncode
    assert list_calls(calls) == ["sky launch", "rsync -az", "sky down"]


def test_nothing_is_rented_that_could_not_be_brought_back(cloud):
    launch, calls = cloud
    (calls.parent / "bin" / "rsync").unlink()
    if shutil.which("rsync"):
        pytest.skip("rsync is installed here")
    process = launch()
    _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (2, 1) and "rsync is not inst" in errors
    assert not calls.exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of one node on loopback; the environment that its commands need."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("Slurm is not installed (apt-get install slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    place, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for folder in ("state", "spool"):
        (place / folder).mkdir()
    settings = {
        "ClusterName": "loopback",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": "root",
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "StateSaveLocation": place / "state",
        "SlurmdSpoolDir": place / "spool",
        "SlurmctldPidFile": place / "slurmctld.pid",
        "SlurmdPidFile": place / "slurmd.pid",
        "SlurmctldLogFile": place / "slurmctld.log",
        "SlurmdLogFile": place / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "MpiDefault": "none",
        "KillWait": 600,
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
        "PartitionName": "all Nodes=ALL Default=YES State=UP",
    }
    conf = place / "slurm.conf"
    conf.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    daemons = [
        subprocess.Popen(
            [*daemon, "-D", "-f", conf], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        for daemon in (["slurmctld", "-i"], ["slurmd"])
    ]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    try:
        for _ in range(120):
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
            )
            if done.stdout.strip() == "idle":
                break
            time.sleep(0.5)
        else:
            pytest.skip(f"Slurm does not come up here: {done.stderr.strip()}")
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def submit(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sbatch", *map(str, arguments)],
        cwd=common.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_slurm_takes_the_array(slurm):
    recipes_of_array = ("sentiment_r4", "sentiment_r8")
    done = submit(slurm, "--test-only", "--array=0-1", LAUNCH / "slurm.sh", *recipes_of_array)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_slurm_trains_the_recipe_of_an_array_task(slurm, tiny, chat_rows, tmp_path):
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, max_steps=2)
    log = tmp_path / "slurm.log"
    options = ("--wait", "--array=1", f"--output={log}")
    done = submit(slurm, *options, LAUNCH / "slurm.sh", "other", recipe)
    assert done.returncode == 0, done.stderr + log.read_text()
    assert json.loads((tmp_path / "r4" / "run.json").read_text())["steps"] == 2
    assert "train      done: 2 steps" in log.read_text()


def test_an_array_that_is_too_long_is_one_line(slurm, tmp_path):
    log = tmp_path / "slurm.log"
    options = ("--wait", "--array=1", f"--output={log}")
    done = submit(slurm, *options, LAUNCH / "slurm.sh", "sentiment_r4")
    assert done.returncode == 2 and "--array goes to 1, and 1 recipes are named" in log.read_text()


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failure_and_ends_with_a_table(tiny, chat_rows, tmp_path):
    folders = [tmp_path / name for name in ("first", "broken", "second")]
    for folder in folders:
        folder.mkdir()
    first, second = (
        write_recipe(folder, "r4", tiny, chat_rows, max_steps=2) for folder in folders[::2]
    )
    broken = write_recipe(folders[1], "r4", tiny, tmp_path / "no_train.jsonl")
    done = run("sweep", f"{first} {broken},{second}")
    assert done.returncode == 1
    assert f"1 of 3 failed: {broken}" in done.stderr
    table = done.stdout.partition(" minutes")[2]
    assert (table.count("finished"), table.count("2/2"), table.count("failed")) == (2, 2, 1)
    assert all((folder / "r4" / "run.json").is_file() for folder in folders[::2])

    again = run("sweep", f"{first} {second}")
    assert again.returncode == 0 and again.stdout.count("is finished") == 2


def test_a_sweep_takes_patterns_and_starts_with_the_small_ones():
    names = [
        recipe.name for recipe in sweep.select_recipes("smollm2-135m/sentiment_* sentiment_r4")
    ]
    assert len(names) == len(set(names)) > 3 and "llama-3.1-8b/sentiment_r4" in names
    large, small = (recipes.find(n) for n in ("sentiment_r4", "smollm2-135m/sentiment_r4"))
    assert sweep.estimate_operations(small) <= sweep.estimate_operations(large)
    with pytest.raises(common.WrongInput, match='no recipe fits "nosuch_\\*"'):
        sweep.select_recipes("nosuch_*")
    with pytest.raises(common.WrongInput, match="RECIPES="):
        sweep.select_recipes(" ")


def test_the_numbers_of_the_scale_document_are_what_the_planner_gives():
    scale.write(check=True)


def test_several_gpus_take_the_longest_first():
    assert scale.compute_makespan([1, 2, 3, 4], 1) == 10
    assert scale.compute_makespan([1, 2, 3, 4], 2) == 5
    assert scale.compute_makespan([1, 2, 3, 4], 64) == 4
