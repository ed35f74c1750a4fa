"""Trains a recipe with Axolotl and leaves a run that records exactly what was done.

    python -m tools train smollm2-135m/sentiment_r4 [--profile cpu] [--nproc 2] [--force]

The recipe and the profile are merged into `config.yaml` in the run folder, which `axolotl train`
gets unchanged. An interrupted run resumes from its last sound checkpoint; a finished one is left
alone; where the recipe or the data changed, the old run is moved to `<run>.previous` and training
starts afresh. `run.json` is written last: a folder that holds it is a finished run.

On several machines the same command runs on each, with --nnodes, --node-rank and --rdzv
(host:port of machine 0, whose folder keeps the run).
"""

import importlib.metadata
import json
import multiprocessing
import platform
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import yaml

from tools import recipes, smollm2, sources
from tools.common import ROOT, WrongInput, atomic, digest, read_json, share, write_json
from tools.prompts import explain_unscorable
from tools.runs import Run
from tools.train import hardware, profiles
from tools.train.checkpoints import last_checkpoint
from tools.train.checks import (
    describe_data,
    refuse_unrenderable,
    refuse_unusable,
    require_hardware,
    require_space,
)
from tools.train.machines import Cluster, Machines
from tools.train.process import run_axolotl

PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "axolotl", "accelerate", "datasets"]


def explain_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a run's identity is not what it was, in words."""
    old, new = before["config"], now["config"]
    keys = sorted(key for key in old | new if old.get(key) != new.get(key))
    if before["data"] != now["data"]:
        entries = [*new["datasets"], *(new.get("test_datasets") or ())]
        files = zip(entries, now["data"], before["data"] + [None] * len(entries), strict=False)
        other = [entry for entry, sha, was in files if sha != was] or new["datasets"]
        paths = ", ".join(str(entry["path"]) for entry in other)
        return f"the data changed ({paths})" + (f", and {', '.join(keys)}" if keys else "")
    values = [
        key if isinstance(new.get(key), list | dict) else f"{key} {old.get(key)} → {new.get(key)}"
        for key in keys
    ]
    return f"the recipe or the profile changed ({', '.join(values)})"


def prepare(recipe: recipes.Recipe, identity: dict[str, Any], force: bool) -> bool:
    """Makes the run folder ready; False where the run is finished and still what is asked for."""
    run = recipe.run
    done, before = run.is_finished, run.identity
    if before:  # earlier versions kept this project's own plugin in it
        before["config"] = profiles.identity_of(before["config"])
    # An adapter that something else wrote over is not the one of run.json.
    damaged = done and not run.is_intact
    same = before == identity and not damaged and not (force and done)
    if same and done:
        return False
    require_space(run.folder)
    if same:
        shutil.rmtree(run.folder / ".writing", ignore_errors=True)
        if step := last_checkpoint(run):
            print(f"train      goes on from step {step}")
        return True
    if run.folder.is_dir() and any(run.folder.iterdir()):
        if not run.is_recognized:
            raise WrongInput(f"{run}, the output_dir of {recipe.name}, holds other files")
        # Nothing that took hours is deleted: what is there moves aside, whoever made it.
        aside = run.move_aside()
        why = "FORCE=1"
        if before != identity:
            why = explain_change(before, identity) if before else "it was not begun by `make train`"
        elif damaged:
            why = "the adapter is not the one that run.json tells of"
        print(f"train      starts afresh: {why}; what was there is in {aside}")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.identity_file, identity)
    return True


def finish(recipe: recipes.Recipe, profile: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes `run.json`, the last file of a run, and returns it."""
    run = recipe.run
    stats = read_json(run.stats_file)
    content = {
        "recipe": recipe.name,
        "recipe_version": recipe.version,
        "recipe_digest": recipe.digest,
        "profile": profile,
        "base_model": recipe.config["base_model"],
        "data": data,
        "adapter_sha256": digest(run.adapter_file),
        **stats,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rows = sum(entry["rows"] for entry in data if entry["split"] == "train")
    dropped = rows - stats.get("rows_trained", rows)
    if dropped > 0 and not recipe.config.get("val_set_size"):
        print(
            f"train      {dropped} of {rows} rows were longer than "
            f"sequence_len ({recipe.config.get('sequence_len')}) and were not trained on"
        )
    share(run.folder)
    write_json(run.info_file, content)
    run.stats_file.unlink()
    return content


def execute(
    recipe: recipes.Recipe,
    content: dict[str, Any],
    profile: str,
    force: bool,
    machines: Machines,
) -> dict[str, Any]:
    """Trains a merged config into the recipe's run; returns `run.json`, {} on other machines."""
    # A stop by a scheduler (SIGTERM) is treated as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data = describe_data(recipe)
    # json: a run's identity is compared with the one that was written.
    identity = {
        "config": profiles.identity_of(content),
        "data": [entry["sha256"] for entry in data],
    }
    identity = json.loads(json.dumps(identity))
    run = place = recipe.run
    if machines.rank:  # beside the run, which machine 0 makes where they share a disk
        name = f".{run.folder.name}.node{machines.rank}"
        place = Run(run.folder.with_name(name))
    with place.lock() as lock:
        if machines.rank:
            place.folder.mkdir(parents=True, exist_ok=True)
        elif not prepare(recipe, identity, force):
            print(f"train      {run} is finished (FORCE=1 trains it again)")
            return run.info
        with atomic(place.config_file) as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        if machines.rank or not run.stats_file.is_file():
            run_axolotl(run, place, content, machines, lock)
        return {} if machines.rank else finish(recipe, profile, data)


def train(name: str, choice: profiles.Choice, cluster: Cluster, force: bool) -> None:
    """Trains a recipe; returns once its run is finished, or the part of this machine is.

    Raises WrongInput for what cannot be trained here, JobFailed where a training stops.
    """
    recipe = recipes.find(name)
    describe_data(recipe)
    cluster.check()
    here = hardware.detect_host()
    profile, nproc, why = profiles.choose(here, choice, cluster.nnodes)
    machines = Machines(nproc, cluster)
    if not force and not recipe.run.identity_file.is_file():
        require_hardware(recipe, here, profile)
    refuse_unusable(recipe)
    # Axolotl's schema loads torch, and this process stays beside the training: a child's gigabyte.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        child.submit(recipes.validate, recipe.config, recipe.where).result()
    if recipe.run.folder in (ROOT, ROOT / "runs", *ROOT.parents):
        raise WrongInput(f"{recipe.where}: output_dir must be a folder of its own")
    smollm2.ensure(recipe.config["base_model"])
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        child.submit(refuse_unrenderable, recipe).result()
    data = describe_data(recipe)
    rows, held = (
        sum(entry["rows"] for entry in data if entry["split"] == split)
        for split in ("train", "validation")
    )
    if reason := sources.drop_missing_validation(recipe.config)[1]:
        print(f"train      no rows validate: {reason}")
    names = [e["path"] for e in recipe.config["datasets"] if not (ROOT / e["path"]).exists()]
    what = " and ".join([f"{rows} rows"] * bool(rows) + [f"{name} of the Hub" for name in names])
    validated = f", validated on {held}" if held else ""
    share = f", {machines.processes} processes" if machines.processes > 1 else ""
    print(f"train      {recipe.name} on {what}{validated}, profile {profile} ({why}){share}")
    choice = replace(choice, profile=profile, nproc=machines.processes)
    content = profiles.merge_config(recipe, choice, here)
    for line in profiles.list_changes(recipe, content):
        print(f"train      {line}")
    if reason := explain_unscorable(recipe.config):
        print(
            f"train      note: {reason}; `make eval` needs PROMPT_FORMAT=bare, and chat and serve "
            "are not possible"
        )
    run = execute(recipe, content, profile, force, machines)
    if not run:
        print(f"train      done; the run is on {cluster.rdzv}")
        return
    minutes, loss = run["seconds"] / 60, run.get("last_loss")
    print(
        f"train      done: {run['steps']} steps in {minutes:.1f} min, "
        f"loss {'-' if loss is None else round(loss, 3)}, "
        f"peak memory {run['peak_memory_bytes'] / 1e9:.1f} GB; adapter in {recipe.run}"
    )
