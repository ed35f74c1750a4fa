"""Trains a finished run once more from what its folder holds, and compares the adapters.

    python -m tools reproduce runs/smollm2-135m/sentiment_r4

It takes `config.yaml` as it stands (the recipe may have changed since), checks that the data is
that of `run.json`, and trains into `<run>.reproduced`. On a CPU the adapter is the same to the bit;
on a GPU some kernels add in varying order.
"""

import importlib.metadata
from pathlib import Path

from tools import smollm2
from tools.common import ROOT, JobFailed, WrongInput, shown
from tools.recipes import Recipe
from tools.runs import Run
from tools.train import hardware, launch
from tools.train.checks import describe_data
from tools.train.machines import Machines

# Of a run.json. A pulled one may hold less.
NEEDED = {"recipe", "recipe_version", "data", "packages", "device", "profile", "last_loss"}


def build_recipe(run: Run) -> Recipe:
    """The recipe that trains a finished run again, into the folder beside it."""
    if not run.is_finished:
        raise WrongInput(f"{run} is no finished run: it has no run.json")
    if missing := NEEDED - run.info.keys():
        raise WrongInput(f"{run} cannot be trained again: its run.json has no {min(missing)}")
    info, config = run.info, run.config
    beside = run.folder.with_name(f"{run.folder.name}.reproduced")
    config["output_dir"] = shown(beside)
    config["dataset_prepared_path"] = shown(beside / "prepared")
    recipe = Recipe(info["recipe"], run.config_file, config, info["recipe_version"])
    for before, now in zip(info["data"], describe_data(recipe), strict=True):
        if before["sha256"] != now["sha256"]:
            raise WrongInput(f"{before['path']} is not what {run} was trained on")
    return recipe


def list_differences(run: Run) -> list[str]:
    """The packages and the device that are not those of the run, in words."""
    gpus = hardware.detect_host().gpus
    pairs = [("", run.info["device"], gpus[0][0] if gpus else "cpu")]
    for name, version in run.info["packages"].items():
        pairs.append((f"{name} ", version, importlib.metadata.version(name)))
    return [f"{name}{before}, now {now}" for name, before, now in pairs if before != now]


def reproduce(folder: Path) -> None:
    """Trains a finished run again; raises JobFailed where a CPU does not give the same adapter."""
    run = Run((ROOT / folder).resolve())
    recipe, before = build_recipe(run), run.info
    if differences := list_differences(run):
        print(f"reproduce  differs from then: {'; '.join(differences)}")
    smollm2.ensure(recipe.config["base_model"])
    machines = Machines(nproc=before.get("processes", 1))
    now = launch.execute(recipe, recipe.config, before["profile"], False, machines)
    same = now["adapter_sha256"] == before["adapter_sha256"]
    losses = ""
    if None not in (before["last_loss"], now["last_loss"]):  # logging_steps may be above the steps
        losses = f"loss {before['last_loss']:.6f} then, {now['last_loss']:.6f} now; "
    print(
        f"reproduce  {losses}the adapters are {'the same to the bit' if same else 'not the same'}"
    )
    if not same and now["device"] == "cpu" and not differences:
        raise JobFailed(f"{recipe.run} is not what {run} holds")
