"""Trains several recipes, one after the other, and ends with one table.

    python -m tools sweep "sentiment_r4 sentiment_r8 headline_*"

What is finished is left alone and what was interrupted goes on. The small ones come first, so that
a mistake shows early; one that fails does not stop the others, and makes the exit status 1.
"""

import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from typing import Any

from tools import recipes
from tools.common import ROOT, JobFailed, WrongInput
from tools.train import plan, profiles, status
from tools.train import process as process_module


def chosen(typed: str) -> list[recipes.Recipe]:
    """The recipes that are named, patterns of the catalogue among them, each once."""
    names: list[str] = []
    for word in typed.replace(",", " ").split():
        fits = [
            n for n in recipes.list_names() if fnmatchcase(n, word) or fnmatchcase(n, f"*/{word}")
        ]
        if any(c in word for c in "*?["):
            if not fits:
                raise WrongInput(f'RECIPES: no recipe fits "{word}"; `make recipes` lists them')
            names += fits
        else:
            names.append(word)
    if not names:
        raise WrongInput('RECIPES="…" is needed: names, or patterns such as "sentiment_*"')
    found = {recipe.run: recipe for recipe in map(recipes.find, names)}
    return list(found.values())


def size(recipe: recipes.Recipe) -> float:
    """Operations that a recipe takes, as far as its base is known; for the order."""
    try:
        made = plan.plan(recipe.config, data=ROOT / recipe.config["datasets"][0]["path"])
        return float(made["parameters"] * (made["tokens"] or 1))
    except WrongInput:
        return 0.0


def one(recipe: recipes.Recipe, options: list[str]) -> dict[str, Any]:
    """Trains one recipe in a process of its own; returns its row of the table."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tools", "train", recipe.name, *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches the sweep alone, which hands on every one that it gets
        preexec_fn=process_module.die_with_parent,
    )
    stopped = False
    while True:
        try:
            _, errors = process.communicate()
            break
        except KeyboardInterrupt:
            stopped = True
            process.terminate()
    if stopped or process.returncode == 130:
        raise KeyboardInterrupt
    row = status.status_or_reason(recipe.run)
    if process.returncode:
        row |= {"state": "failed", "note": errors.strip().removeprefix("error: ")}
        print(f"sweep      {recipe.name} failed: {row['note']}", flush=True)
    return row | {"run": recipe.name, "took": time.monotonic() - start}


def run(patterns: str, choice: profiles.Choice, force: bool) -> None:
    """Trains the recipes that `patterns` name; raises JobFailed where any fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo = sorted(chosen(patterns), key=size)
    options = {"--profile": choice.profile, "--nproc": choice.nproc, "--tracker": choice.tracker}
    arguments = [word for name, value in options.items() if value for word in (name, str(value))]
    arguments += ["--force"] if force else []
    rows = []
    for number, recipe in enumerate(todo, 1):
        print(f"sweep      {number}/{len(todo)} {recipe.name}", flush=True)
        rows.append(one(recipe, arguments))
    print()
    status.show(rows)
    if failed := [row["run"] for row in rows if row["state"] != "finished"]:
        raise JobFailed(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")
