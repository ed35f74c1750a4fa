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
import platform
import shutil
import signal
import time
from dataclasses import dataclass, replace
from typing import Any

import yaml

from tools import models, recipes, smollm2, sources
from tools.common import (
    ROOT,
    WrongInput,
    digest,
    read_json,
    run_in_child,
    share,
    shown,
    write_json,
    write_text,
)
from tools.prompts import explain_unscorable
from tools.runs import Run
from tools.train import hardware, profiles
from tools.train.checkpoints import last_checkpoint
from tools.train.checks import (
    describe_data,
    refuse_unrenderable,
    refuse_unscorable,
    refuse_unusable,
    require_hardware,
    require_space,
)
from tools.train.machines import Machines
from tools.train.process import run_axolotl

PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "axolotl", "accelerate", "datasets"]

# Options with which Axolotl trains on a part of a dataset's rows.
PART_KEYS = ("split", "shards", "shards_idx")


def list_packages() -> dict[str, str]:
    """The installed versions of the packages that decide a training."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def explain_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How a run's identity changed, in words."""
    old, new = before["config"], now["config"]
    keys = sorted(key for key in old | new if old.get(key) != new.get(key))
    if before["data"] != now["data"]:
        entries = [*new["datasets"], *(new.get("test_datasets") or ())]
        digests = zip(entries, now["data"], before["data"] + [None] * len(entries), strict=False)
        changed = [entry for entry, sha, old_sha in digests if sha != old_sha] or new["datasets"]
        paths = ", ".join(str(entry["path"]) for entry in changed)
        return f"the data changed ({paths})" + (f", and {', '.join(keys)}" if keys else "")
    values = [
        key if isinstance(new.get(key), list | dict) else f"{key} {old.get(key)} → {new.get(key)}"
        for key in keys
    ]
    return f"the recipe or the profile changed ({', '.join(values)})"


def prepare(recipe: recipes.Recipe, identity: dict[str, Any], force: bool) -> bool:
    """Makes the run folder ready to train; False where the run is finished and unchanged."""
    run = recipe.run
    before, restart = run.identity, ""
    if not before:
        restart = "it was not begun by `make train`"
    elif before != identity:
        restart = explain_change(before, identity)
    elif run.is_finished and not run.is_intact:
        restart = "the adapter is not the one that run.json describes"
    elif run.is_finished and force:
        restart = "FORCE=1"
    elif run.is_finished:
        return False
    require_space(run.folder)
    if not restart:
        shutil.rmtree(run.folder / ".writing", ignore_errors=True)
        if step := last_checkpoint(run):
            print(f"train      continues from step {step}")
        return True
    if run.folder.is_dir() and any(run.folder.iterdir()):
        if not run.is_recognized:
            raise WrongInput(f"{run}, the output_dir of {recipe.name}, holds other files")
        # Nothing that took hours is deleted, whoever made it.
        aside = run.move_aside()
        print(f"train      starts afresh: {restart}; what was there is in {aside}")
    write_json(run.identity_file, identity)
    return True


def finish(recipe: recipes.Recipe, profile: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes `run.json`, the last file of a run, and returns it."""
    run = recipe.run
    content = {
        "recipe": recipe.name,
        "recipe_version": recipe.version,
        "recipe_digest": recipe.digest,
        "profile": profile,
        "base_model": recipe.config["base_model"],
        "data": data,
        "adapter_sha256": digest(run.adapter_file),
        **read_json(run.stats_file),
        "packages": list_packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rows = sum(entry["rows"] for entry in data if entry["split"] == "train")
    dropped = rows - content.get("rows_trained", rows)
    takes_part = any(entry.get(key) for entry in recipe.config["datasets"] for key in PART_KEYS)
    if dropped > 0 and not takes_part and not recipe.config.get("val_set_size"):
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
    config: dict[str, Any],
    profile: str,
    force: bool,
    machines: Machines,
) -> dict[str, Any]:
    """Trains a merged config into the recipe's run; returns `run.json`, {} on other machines."""
    # A scheduler's SIGTERM is treated as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data = describe_data(recipe)
    digests = [entry["sha256"] for entry in data]
    # Through JSON, as it is compared with what was written.
    identity = json.loads(json.dumps({"config": profiles.identity_of(config), "data": digests}))
    run = place = recipe.run
    if machines.rank:  # beside the run, which machine 0 makes where they share a disk
        place = Run(run.folder.with_name(f".{run.folder.name}.node{machines.rank}"))
    with place.lock() as lock:
        if machines.rank == 0 and not prepare(recipe, identity, force):
            print(f"train      {run} is finished (FORCE=1 trains it again)")
            return run.info
        write_text(place.config_file, yaml.safe_dump(config, sort_keys=False))
        if machines.rank or not run.stats_file.is_file():
            run_axolotl(run, place, config, machines, lock)
        return {} if machines.rank else finish(recipe, profile, data)


def describe_rows(recipe: recipes.Recipe, data: list[dict[str, Any]]) -> str:
    """What a recipe trains and validates on, in words."""
    rows = {"train": 0, "validation": 0}
    for entry in data:
        rows[entry["split"]] += entry["rows"]
    parts = [f"{rows['train']} rows"] if rows["train"] else []
    names = [entry["path"] for entry in recipe.config["datasets"]]
    parts += [
        name if "://" in name else f"{name} of the Hub"
        for name in names
        if not (ROOT / name).exists()
    ]
    validated = f", validated on {rows['validation']}" if rows["validation"] else ""
    return " and ".join(parts) + validated


def explain_examples(data: list[dict[str, Any]]) -> str:
    """What is said of rows that were written for this project; empty of others."""
    if not any(entry["from"] == shown(sources.SAMPLE) for entry in data):
        return ""
    return (
        "note: these rows are this project's simple examples (data/sample), which show that a "
        "training works; `make fetch data` brings FinLoRA's"
    )


def check_recipe(recipe: recipes.Recipe, is_new: bool) -> None:
    """Raises WrongInput or JobFailed where Axolotl could not train a recipe; brings its base."""
    recipes.validate(recipe.config, recipe.where)
    if recipe.run.folder in (ROOT, ROOT / "runs", *ROOT.parents):
        raise WrongInput(f"{recipe.where}: output_dir must be a folder of its own")
    base = recipe.config["base_model"]
    if is_new:
        # Axolotl's own message about a base that cannot be had is a page of traceback.
        models.bring_base(base)
    else:
        smollm2.ensure(base)
    refuse_unrenderable(recipe)


@dataclass(frozen=True)
class Settings:
    """How a recipe is trained here."""

    profile: str
    reason: str  # why that profile
    machines: Machines
    config: dict[str, Any]  # merged with the profile


def choose_settings(
    recipe: recipes.Recipe, choice: profiles.Choice, machines: Machines, is_new: bool
) -> Settings:
    """How a recipe is trained here; brings the base of one that `is_new`, and trains nothing.

    Raises WrongInput or JobFailed for what cannot be trained here. A command that puts finished
    runs aside asks first.
    """
    here = hardware.detect_host()
    profile, nproc, reason = profiles.choose(here, choice, machines.nnodes)
    machines = replace(machines, nproc=nproc)
    if is_new and (needed := require_hardware(recipe, here, profile)):
        print(f"train      {needed}")
    refuse_unusable(recipe.config, recipe.where)
    choice = replace(choice, profile=profile, nproc=machines.processes)
    config = profiles.merge_config(recipe, choice, here)
    refuse_unscorable(config, recipe.where, machines.processes)
    # Axolotl loads torch, and this process stays beside the training.
    run_in_child(check_recipe, recipe, is_new)
    return Settings(profile, reason, machines, config)


def train(recipe: recipes.Recipe, choice: profiles.Choice, machines: Machines, force: bool) -> None:
    """Trains a recipe; returns once its run is finished, or the part of this machine is.

    `machines` without processes, which are chosen here. Raises WrongInput for what cannot be
    trained here, JobFailed where a training stops.
    """
    data = describe_data(recipe)
    is_new = not force and not recipe.run.identity_file.is_file()
    settings = choose_settings(recipe, choice, machines, is_new)
    machines, config = settings.machines, settings.config
    validated, missing = sources.drop_missing_validation(recipe.config)
    if missing:
        effect = "other rows validate" if validated.get("test_datasets") else "no rows validate"
        print(f"train      {effect}: {missing}")
    count = f", {machines.processes} processes" if machines.processes > 1 else ""
    rows = describe_rows(recipe, data)
    print(
        f"train      {recipe.name} on {rows}, profile {settings.profile} ({settings.reason}){count}"
    )
    if note := explain_examples(data):
        print(f"train      {note}")
    for line in profiles.list_changes(recipe, config):
        print(f"train      {line}")
    if note := explain_unscorable(recipe.config):
        print(
            f"train      note: {note}; `make eval` needs PROMPT_FORMAT=bare, and chat and serve "
            "are not possible"
        )
    info = execute(recipe, config, settings.profile, force, machines)
    if not info:
        print(f"train      done; the run is on {machines.rdzv}")
        return
    loss = info.get("last_loss")
    print(
        f"train      done: {info['steps']} steps in {info['seconds'] / 60:.1f} min, "
        f"loss {'-' if loss is None else round(loss, 3)}, "
        f"peak memory {info['peak_memory_bytes'] / 1e9:.1f} GB; adapter in {recipe.run}"
    )
