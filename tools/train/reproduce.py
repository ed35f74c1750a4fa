"""Trains a finished run once more from what its folder holds, and compares the adapters.

    python -m tools.train.reproduce runs/smollm2-135m/sentiment_r4

It takes `config.yaml` as it stands (the recipe may have changed since), checks that data and
packages are those of `run.json`, and trains beside the run, into `<run>.reproduced`. On a CPU the
adapter comes out the same to the bit; on a GPU some kernels add in an order of their own.
"""

import importlib.metadata
from pathlib import Path

from tools import recipes, smollm2
from tools.common import ROOT, JobFailed, WrongInput, shown
from tools.runs import Run
from tools.train import checks, hardware, launch, profiles
from tools.train import machines as machines_module


def again(run: Run) -> tuple[recipes.Recipe, machines_module.Machines]:
    """The recipe that trains a finished run again, beside it, and how many processes do."""
    if not run.is_finished:
        raise WrongInput(f"{run} is no finished run: it has no run.json")
    told, config = run.info, run.config
    beside = run.folder.with_name(f"{run.folder.name}.reproduced")
    config["output_dir"] = shown(beside)
    config["plugins"] = [
        profiles.PLUGIN if name in profiles.OWN_PLUGINS else name for name in config["plugins"]
    ]
    config["dataset_prepared_path"] = shown(beside / "prepared")
    recipe = recipes.Recipe(told["recipe"], run.config_file, config, told["recipe_version"])
    for was, now in zip(told["data"], checks.describe_data(recipe), strict=True):
        if was["sha256"] != now["sha256"]:
            raise WrongInput(f"{was['path']} is not what {run} was trained on")
    return recipe, machines_module.Machines(nproc=told.get("processes", 1))


def differing(run: Run) -> list[str]:
    """What of packages and device is not what it was, in words."""
    told = run.info
    here = hardware.detect_host().gpus
    device = here[0][0] if here else "cpu"
    now = {name: importlib.metadata.version(name) for name in told["packages"]}
    found = [f"{n} {v}, now {now[n]}" for n, v in told["packages"].items() if now[n] != v]
    return found + ([f"{told['device']}, now {device}"] if told["device"] != device else [])


def reproduce(folder: Path) -> None:
    """Trains a finished run again; raises JobFailed where a CPU does not give the same adapter."""
    run = Run((ROOT / folder).resolve())
    recipe, machines = again(run)
    told = run.info
    if other := differing(run):
        print(f"reproduce  differs from then: {'; '.join(other)}")
    smollm2.ensure(recipe.config["base_model"])
    made = launch.execute(recipe, recipe.config, told["profile"], False, machines)
    same = made["adapter_sha256"] == told["adapter_sha256"]
    print(
        f"reproduce  loss {told['last_loss']:.6f} then, {made['last_loss']:.6f} now; "
        f"the adapters are {'the same to the bit' if same else 'not the same'}"
    )
    if not same and made["device"] == "cpu" and not other:
        raise JobFailed(f"{recipe.run} is not what {run} holds")
