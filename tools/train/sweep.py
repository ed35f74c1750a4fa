"""Trains several recipes, one after the other, and ends with one table.

    python -m tools sweep "sentiment_r4 sentiment_r8 headline_*"

A finished run is left alone and an interrupted one resumes. Small recipes come first, so that a
mistake shows early. A recipe that fails does not stop the others, and makes the exit status 1.
"""

import signal
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase

from tools import recipes
from tools.common import ROOT, JobFailed, WrongInput
from tools.sources import list_training_files
from tools.train.plan import plan
from tools.train.process import die_with_parent
from tools.train.profiles import Choice
from tools.train.status import Status, print_statuses, read_status


def select_recipes(words: str) -> list[recipes.Recipe]:
    """The recipes of names and patterns of the catalogue, each once."""
    names: list[str] = []
    for word in words.replace(",", " ").split():
        patterns = word, f"*/{word}"
        is_pattern = any(character in word for character in "*?[")
        matches = [
            name for name in recipes.list_names() if any(fnmatchcase(name, p) for p in patterns)
        ]
        if is_pattern and not matches:
            raise WrongInput(f'RECIPES: no recipe fits "{word}"; `make recipes` lists them')
        names += matches if is_pattern else [word]
    if not names:
        raise WrongInput('RECIPES="…" is needed: names, or patterns such as "sentiment_*"')
    return list({recipe.run: recipe for recipe in map(recipes.find, names)}.values())


def estimate_operations(recipe: recipes.Recipe) -> float:
    """Parameters times tokens, for the order; 0 where the base cannot be planned."""
    try:
        planned = plan(recipe.config, data=list_training_files(recipe.config))
        return float(planned["parameters"] * (planned["tokens"] or 1))
    except WrongInput:
        return 0.0


def train_recipe(recipe: recipes.Recipe, options: list[str]) -> Status:
    """Trains a recipe in a child process; raises KeyboardInterrupt where it is stopped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools", "train", recipe.name, *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches the sweep alone, which passes each one on
        preexec_fn=die_with_parent,
    )
    is_stopped, errors = False, None
    while errors is None:
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            is_stopped = True
            process.terminate()
    if is_stopped or process.returncode == 130:
        raise KeyboardInterrupt
    status = replace(read_status(recipe.run), run=recipe.name)
    if process.returncode:
        status = replace(status, state="failed", note=errors.strip().removeprefix("error: "))
        print(f"sweep      {recipe.name} failed: {status.note}", flush=True)
    return status


def run(words: str, choice: Choice, force: bool) -> None:
    """Trains the recipes that `words` name; raises JobFailed where any fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    queue = sorted(select_recipes(words), key=estimate_operations)
    options = {"--profile": choice.profile, "--nproc": choice.nproc, "--tracker": choice.tracker}
    arguments = [word for name, value in options.items() if value for word in (name, str(value))]
    arguments += ["--force"] if force else []
    statuses = []
    for number, recipe in enumerate(queue, 1):
        print(f"sweep      {number}/{len(queue)} {recipe.name}", flush=True)
        statuses.append(train_recipe(recipe, arguments))
    print()
    print_statuses(statuses)
    if failures := [status.run for status in statuses if status.state != "finished"]:
        raise JobFailed(f"{len(failures)} of {len(statuses)} failed: {', '.join(failures)}")
