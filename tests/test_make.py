"""`make` lists its jobs, and what is typed for a variable is never run."""

import functools
import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import run_first
from tools.common import ROOT

HOSTILE = {
    "make's shell function": "$(shell touch X)",
    "backticks": "`touch X`",
    "a closed quotation": '"; touch X; "',
    "single quotes": "'; touch X; '",
    "a doubled dollar": "$$(touch X)",
    "a newline": "a\ntouch X",
    "a make variable": "$(SHELL)",
}
MAKEFILE = (ROOT / "Makefile").read_text()
# Some variables of each kind, and one that no job has.
VARIABLES = ["RECIPE", "FORCE", "PYTHON", "FINLORA_DATA", "WHEELHOUSE", "SOMETHING_ELSE"]
FROM_ENVIRONMENT = re.search(r"^FROM_ENVIRONMENT := (.*)$", MAKEFILE, re.M).group(1).split()
hostile = pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)


@functools.cache
def not_ready():
    """Why a job cannot run without an installation; None where it can."""
    if not shutil.which("make"):
        return "make is not installed"
    code = "from tools.setup import ready; print(ready())"
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, cwd=ROOT)
    return None if done.stdout.strip() == "True" else "`make setup` would install: not up to date"


@pytest.fixture
def ready():
    if reason := not_ready():
        pytest.skip(reason)


def make(*arguments, how="argument", **values):
    """Runs make with the values as arguments or in the environment; X must not appear."""
    assert not (ROOT / "X").exists()
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DEBUG")  # these tests may run under `make test`
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    if how == "environment":
        environment |= values
    else:
        arguments += tuple(f"{name}={value}" for name, value in values.items())
    done = subprocess.run(
        ["make", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    ran = (ROOT / "X").exists()
    (ROOT / "X").unlink(missing_ok=True)
    assert not ran, f"make {arguments} ran the value"
    return done


def errors(done):
    """What the job itself said on stderr, without make's own closing line."""
    assert done.returncode == 2, done
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]


def test_make_alone_lists_every_job_by_stage_on_one_screen():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M).group(1).split()
    lines = make().stdout.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert sorted([*listed, "help"]) == sorted(phony)
    assert all(len(text) > 5 for text in listed.values())
    stages = [line for line in lines if line and not line.startswith(" ")]
    assert stages == ["Start", "Data", "Train", "Score", "Use", "Share", "Maintain"]
    assert len(lines) <= 50 and max(map(len, lines)) <= 110


def test_every_job_is_a_verb_of_the_command_line_and_every_verb_has_its_options():
    import typer

    from tools.__main__ import app

    verbs = typer.main.get_command(app).commands
    for target, verb in re.findall(r"^([a-z-]+):.*\n\t@\$\(RUN\) (\S+)$", MAKEFILE, re.M):
        assert verb in verbs, target
        described = re.search(rf"^{target}:.*## (.*)$", MAKEFILE, re.M).group(1)
        options = {parameter.name for parameter in verbs[verb].params}
        environment = {name.lower() for name in FROM_ENVIRONMENT}
        named = {name.lower() for name in re.findall(r"\b([A-Z_]{2,})=", described)}
        assert named <= options | environment, target


@hostile
@pytest.mark.parametrize("name", VARIABLES)
def test_a_typed_value_reaches_a_program_as_it_is(name, value):
    probe = f'--eval=probe: ; @printf %s "$${{OPTION_{name}}}"'
    done = make(probe, "probe", **{name: value})
    assert (done.returncode, done.stdout) == (0, value), done.stderr


@hostile
@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_the_shell_is_no_option_and_is_not_run(name, value):
    probe = f'--eval=probe: ; @printf %s "$${{OPTION_{name}-}}$${{{name}}}"'
    done = make(probe, "probe", how="environment", **{name: value})
    assert (done.returncode, done.stdout) == (0, value), done.stderr


def test_the_variables_that_count_from_the_environment_are_documented():
    page = (ROOT / "docs/networks.md").read_text()
    assert all(f"`{name}`" in page for name in FROM_ENVIRONMENT)


def test_variables_of_somebodys_shell_change_nothing(ready):
    shell = {"FORCE": "1", "PUBLIC": "1", "MODEL": "nosuch", "TASK": "nosuch", "JSON": "1"}
    done = make("recipes", how="environment", **shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == make("recipes").stdout
    (line,) = errors(make("recipes", "MODEL=nosuch"))
    assert "nosuch" in line


JOBS = {  # variables and what the error starts with
    "new": (("TASK", "DATA"), ""),
    "import": (("CONFIG",), ""),
    "recipes": (("MODEL", "METHOD", "TASK"), "unknown"),
    "show": (("RECIPE", "PROMPT"), "unknown recipe "),
    "train": (("RECIPE", "PROMPT"), "unknown recipe "),
    "data": (("TASKS", "PROMPT"), "unknown task "),
}


@hostile
@pytest.mark.parametrize("job", run_first(1, JOBS))
def test_a_hostile_value_is_quoted_in_one_line_and_not_run(ready, job, value):
    names, start = JOBS[job]
    (line,) = errors(make(job, **dict.fromkeys(names, value)))
    assert line.startswith(f"error: {start}")
    if start.endswith(" "):
        assert value.split()[0] in line


def test_a_recipe_is_shown_as_it_stands(ready):
    done = make("show", "RECIPE=sentiment_r4")
    text = (ROOT / "recipes/llama-3.1-8b/sentiment_r4.yaml").read_text()
    assert done.stdout.startswith(text) and "peak on a GPU" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_a_variable_that_no_goal_takes_is_named_and_a_near_one_is_an_error(ready):
    done = make("recipes", "TASK=sentiment", "MODEL=smollm2-135m", "LIMIT=50")
    note = "note       make recipes takes no LIMIT, so it has no effect here (it is for eval)"
    assert done.returncode == 0 and done.stderr == f"{note}\n"  # stdout may be JSON
    done = make("recipes", "status", "TASK=sentiment", "MODEL=smollm2-135m")
    assert "note" not in done.stdout + done.stderr  # `status` takes neither, but `recipes` does
    assert not make("recipes", "TASK=sentiment", "LIMIT=").stderr
    assert make("status", "recipes", "LIMIT=50").stdout.count("takes no LIMIT") == 1
    (line,) = errors(make("recipes", "MODELS=smollm2-135m"))
    assert line == "error: make has no variable MODELS; did you mean MODEL?"
    # what another verb would take is not offered: `train` has no SEEDS
    (line,) = errors(make("train", "RECIPE=sentiment_r4", "SEED=7"))
    assert line == "error: make has no variable SEED"


def test_a_missing_recipe_says_how_to_list_them(ready):
    (line,) = errors(make("show"))
    assert line == "error: RECIPE=… is needed; `make recipes` lists what there is"
