"""Trains a recipe with Axolotl and leaves a run that says exactly what was done.

    python -m tools.train smollm2-135m/sentiment_r4 [--profile cpu] [--force]

The recipe and the profile are merged into `config.yaml` in the run folder and given to
`axolotl train`, unchanged. The run goes on from its last sound checkpoint where one was
interrupted, is left alone where it is finished, and starts afresh (the old one is kept beside it,
as `<run>.previous`) where the recipe or the data changed. `run.json` is written last: a folder
that holds it is a finished run.
"""

import argparse
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tools import convert, export, recipes
from tools.cli import (
    ROOT,
    SECRET,
    JobFailed,
    WrongInput,
    atomic,
    command,
    digest,
    json_lines,
    shown,
    write_json,
)

PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "axolotl", "accelerate", "datasets"]
LARGEST_ON_CPU = 1e9  # parameters; a step of an 8B model takes minutes on a desktop CPU
DISK = 2e9  # bytes that must be free: checkpoints, prepared data, log


def hardware() -> dict[str, Any]:
    """What this machine has: `gpus` [(name, bytes)], `cores`, `memory` in bytes."""
    import psutil
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append((properties.name, properties.total_memory))
    return {"gpus": gpus, "cores": os.cpu_count(), "memory": psutil.virtual_memory().total}


def fits(recipe: recipes.Recipe, here: dict[str, Any]) -> None:
    """Raises WrongInput, before any download, where a catalogue recipe cannot run here."""
    if recipe.name not in recipes.names():
        return
    model, task, method = recipes.parts(recipe.name)
    row = recipes.matrix()["models"][model]
    need = row["memory_gib"][recipes.matrix()["methods"][method]["bits"]]
    if here["gpus"]:
        name, memory = here["gpus"][0]
        if memory / 2**30 >= need:
            return
        found = f"{name} with {memory / 2**30:.0f} GiB"
    elif row["parameters"] <= LARGEST_ON_CPU:
        return
    else:
        found = f"{here['cores']} CPU cores with {here['memory'] / 2**30:.0f} GiB and no GPU"
    small = [
        f"{name}/{task}_{method}"
        for name, other in recipes.matrix()["models"].items()
        if other["parameters"] <= LARGEST_ON_CPU
    ]
    raise WrongInput(
        f"{recipe.name} needs a CUDA GPU with {need:.0f} GiB; here: {found}. "
        f"What runs here: make train RECIPE={small[0]} (FORCE=1 tries all the same)"
    )


def merged(recipe: recipes.Recipe, profile: str) -> dict[str, Any]:
    """The config that Axolotl gets: the recipe, the profile over it, and the reporting plugin."""
    content = recipe.config | recipes.profile(profile)
    if profile == "gpu" and importlib.util.find_spec("flash_attn"):
        content["flash_attention"] = True
    content["plugins"] = [*content.get("plugins", []), "tools.plugin.RunPlugin"]
    # Axolotl knows prepared data by its config and not by its content: a run keeps its own.
    content["dataset_prepared_path"] = str(Path(content["output_dir"]) / "prepared")
    content["include_tkps"] = True
    content["auto_resume_from_checkpoints"] = True
    return content


def data_of(recipe: recipes.Recipe) -> list[dict[str, Any]]:
    """Path, SHA-256 and row count of each file that the recipe trains on."""
    found = []
    for entry in recipe.config["datasets"]:
        path = (ROOT / entry["path"]).resolve()
        if not path.exists() and path.suffix != ".jsonl":
            continue  # a dataset of the Hub: Axolotl finds it
        if path.is_dir():
            raise WrongInput(f"{shown(path)} is a folder; name a file of chat rows")
        if not path.is_file():
            task = f" TASKS={recipe.task}" if recipe.task else ""
            raise WrongInput(f"{shown(path)} is not there; `make data{task}` makes it")
        content = convert.manifest(path)
        rows = content.get("rows")
        if rows is None:
            with open(path, "rb") as file:
                rows = sum(1 for line in file if not line.isspace())
        where = {"path": entry["path"], "sha256": content["sha256"], "rows": rows}
        found.append(where | {"from": content.get("from"), "source": content["source"]})
    return found


@contextmanager
def only_one(run: Path) -> Iterator[int]:
    """Holds the run's lock and yields its file descriptor; raises JobFailed where another has it.

    The training process inherits the descriptor, so the lock lives exactly as long as either.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_name(f".{run.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobFailed(f"another training of {shown(run)} is under way") from None
        yield file.fileno()


def sound(checkpoint: Path) -> bool:
    """Whether a checkpoint was written whole: its state parses, its tensors and archives open."""
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
            named = bool(list(tensors.keys()))
        archives = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
        whole = all(zipfile.ZipFile(archive).testzip() is None for archive in archives)
        return whole and named and state["global_step"] == step_of(checkpoint)
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(run: Path) -> int:
    """The step of the newest sound checkpoint, 0 without one; damaged ones are renamed."""
    folders = [path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    for folder in sorted(folders, key=step_of, reverse=True):
        if sound(folder):
            return step_of(folder)
        print(f"train      {shown(folder)} is damaged and left out")
        os.replace(folder, folder.with_name(f"damaged-{folder.name}"))
    return 0


def prepare(recipe: recipes.Recipe, identity: dict[str, Any], force: bool) -> bool:
    """Makes the run folder ready; False where the run is finished and still what is asked for."""
    run = recipe.run
    written = run / "identity.json"
    done = (run / "run.json").is_file()
    same = written.is_file() and json.loads(written.read_text()) == identity
    # An adapter that something else wrote over is not what run.json tells of.
    same = same and not (done and not recipe.intact())
    if same and not (force and done):
        if done:
            return False
        if step := last_checkpoint(run):
            print(f"train      goes on from step {step}")
        return True
    if run.is_dir() and any(run.iterdir()):
        ours = ("identity.json", "adapter_config.json", "checkpoint-*")
        if not any(next(run.glob(name), None) for name in ours):
            raise WrongInput(f"{shown(run)}, the output_dir of {recipe.name}, holds other files")
        # Nothing that took hours is deleted: what is there moves aside, whoever made it.
        aside, number = run.with_name(f"{run.name}.previous"), 1
        while aside.exists():
            number += 1
            aside = run.with_name(f"{run.name}.previous-{number}")
        os.replace(run, aside)
        why = "FORCE=1" if same else "the recipe, the profile or the data changed"
        print(f"train      starts afresh: {why}; what was there is in {shown(aside)}")
    run.mkdir(parents=True, exist_ok=True)
    write_json(written, identity)
    return True


def environment() -> dict[str, str]:
    """Axolotl finds `accelerate` on PATH and the plugin on PYTHONPATH."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": folders, "PYTHONPATH": str(ROOT)}


def follow(process: subprocess.Popen[bytes], run: Path) -> None:
    """Shows the training's progress until its process ends."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    columns = (
        TextColumn("train     "),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    file, seen, said = run / "progress.jsonl", 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        job = bar.add_task("loading the model", total=None)
        while True:
            ended = process.poll() is not None
            losses = [entry for entry in json_lines(file) if "loss" in entry]
            if losses and losses[-1]["step"] != seen:
                last = losses[-1]
                seen = last["step"]
                speed = last["total_tokens"] / max(last["seconds"], 1e-9)
                text = f"loss {last['loss']:.3f}  {speed:.0f} tokens/s  "
                text += f"{last['memory'] / 1e9:.1f} GB"
                bar.update(job, total=last["steps"], completed=seen, description=text)
                if not console.is_terminal and (time.monotonic() - said > 20 or ended):
                    print(f"train      step {seen}/{last['steps']}  {text}", flush=True)
                    said = time.monotonic()
            if ended:
                return
            time.sleep(0.3)


def cause(log: Path, start: int, status: int) -> str:
    """The last exception in a log from byte `start` on, or the signal that ended it."""
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    if status == 0:  # Axolotl's own handler of Ctrl-C ends it with success
        return "it was interrupted, and the same command goes on from the last checkpoint"
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    names = ("Error:", "Exception:", "Killed", "No space left")
    telling = [line.strip() for line in lines if any(name in line for name in names)]
    return SECRET.sub("***", telling[-1][:300]) if telling else "it ended without a word"


def axolotl(run: Path, lock: int) -> None:
    """Runs `axolotl train` on the run's config; raises JobFailed where it does not finish."""
    # One process needs no launcher; without this, Axolotl starts a second Python for accelerate.
    arguments = ["train", shown(run / "config.yaml"), "--launcher", "python"]
    print(f"train      axolotl {' '.join(arguments)}", flush=True)
    log = run / "train.log"
    start = log.stat().st_size if log.is_file() else 0
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "axolotl"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(),
            pass_fds=[lock],
        )
        try:
            follow(process, run)
        except BaseException:
            # Ctrl-C reaches the child too; what else stops this process must stop the child.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if not (run / "stats.json").is_file():
        why = cause(log, start, process.returncode)
        raise JobFailed(f"training stopped: {why}; all of it is in {shown(log)}")


def finish(recipe: recipes.Recipe, profile: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes `run.json`, the last file of a run, and returns it."""
    run = recipe.run
    stats = json.loads((run / "stats.json").read_text())
    content = {
        "recipe": recipe.name,
        "recipe_version": recipe.version,
        "recipe_digest": recipe.digest,
        "profile": profile,
        "base_model": recipe.config["base_model"],
        "data": data,
        "adapter_sha256": digest(run / "adapter_model.safetensors"),
        **stats,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(run / "run.json", content)
    (run / "stats.json").unlink()
    return content


def train(recipe: recipes.Recipe, profile: str, force: bool = False) -> dict[str, Any]:
    """Trains a recipe unless its run is finished; returns the run's `run.json`."""
    content = merged(recipe, profile)
    data = data_of(recipe)
    # How attention is computed is not what is learned: installing flash-attn changes no run.
    kept = {key: value for key, value in content.items() if key != "flash_attention"}
    identity = {"config": kept, "data": [entry["sha256"] for entry in data]}
    with only_one(recipe.run) as lock:
        if not prepare(recipe, identity, force):
            print(f"train      {shown(recipe.run)} is finished (FORCE=1 trains it again)")
            return json.loads((recipe.run / "run.json").read_text())
        with atomic(recipe.run / "config.yaml") as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        if not (recipe.run / "stats.json").is_file():
            axolotl(recipe.run, lock)
        return finish(recipe, profile, data)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="train a recipe with Axolotl")
    parser.add_argument("recipe")
    parser.add_argument("--profile", default="")
    parser.add_argument("--force", default="", help="1: train a finished run again")
    arguments = parser.parse_args()
    # A stop by a scheduler (SIGTERM) is treated as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recipe = recipes.find(arguments.recipe)
    data_of(recipe)
    if arguments.profile:
        recipes.profile(arguments.profile)
    here = hardware()
    profile = arguments.profile or ("gpu" if here["gpus"] else "cpu")
    force = arguments.force not in ("", "0")
    if not force and not (recipe.run / "identity.json").is_file():
        fits(recipe, here)
    recipes.validate(recipe.config, shown(recipe.path))
    if recipe.config.get("adapter") not in ("lora", "qlora"):
        raise WrongInput(f"{shown(recipe.path)}: adapter must be lora or qlora")
    if recipe.run in (ROOT, ROOT / "runs", *ROOT.parents):
        raise WrongInput(f"{shown(recipe.path)}: output_dir must be a folder of its own")
    free = shutil.disk_usage(ROOT).free
    if free < DISK:
        raise JobFailed(f"{free / 1e9:.1f} GB are free on this disk and a training needs 2")
    export.ensure(recipe.config["base_model"])
    rows = sum(entry["rows"] for entry in data_of(recipe))
    print(f"train      {recipe.name} on {rows} rows, profile {profile}")
    run = train(recipe, profile, force)
    minutes, loss = run["seconds"] / 60, run.get("last_loss")
    print(
        f"train      done: {run['steps']} steps in {minutes:.1f} min, "
        f"loss {'-' if loss is None else round(loss, 3)}, "
        f"peak memory {run['peak_memory_bytes'] / 1e9:.1f} GB; adapter in {shown(recipe.run)}"
    )


if __name__ == "__main__":
    main()
