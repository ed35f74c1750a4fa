"""Trains a recipe with Axolotl and leaves a run that says exactly what was done.

    python -m tools.train smollm2-135m/sentiment_r4 [--profile cpu] [--nproc 2] [--force 1]

The recipe and the profile are merged into `config.yaml` in the run folder and given to
`axolotl train`, unchanged. The run goes on from its last sound checkpoint where one was
interrupted, is left alone where it is finished, and starts afresh (the old one is kept beside it,
as `<run>.previous`) where the recipe or the data changed. `run.json` is written last: a folder
that holds it is a finished run.

On several machines the same command runs on each, with --nnodes, --node-rank and --rendezvous
(host:port of the first machine, whose folder the run is kept in).
"""

import argparse
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tools import convert, export, plan, profiles, progress, recipes, status
from tools.cli import (
    ROOT,
    SECRET,
    JobFailed,
    WrongInput,
    atomic,
    command,
    digest,
    shown,
    write_json,
)
from tools.prompt import explain_unscorable

PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "axolotl", "accelerate", "datasets"]
DISK = 2e9  # bytes that must be free: checkpoints, prepared data, log
FULL = 1e6  # bytes under which a disk is full
GRACE = 110  # seconds to finish a step and save it; launch/slurm.sh asks for a signal 120 before

# What a log says when a training fails, and what that means. The first that is found counts.
CAUSES = {
    r"tools\.plugin\.Stopped: (.+)": "{0}",
    # The last is Rust's (tokenizers), which aborts.
    r"OutOfMemoryError|CUDA out of memory|allocate memory|MemoryError|bad_alloc"
    r"|memory allocation of \d+ bytes failed": "{memory}",
    r"No space left on device|os error 28": "no space left on the disk; {free} are free",
    r"Disk quota exceeded|os error 122": "the disk quota of this user is used up",
    r"(?:PermissionError|Read-only file system).*": "{0}",
}
# Endings of data files that Axolotl reads; another path that does not exist is a name on the Hub.
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow"}
# Lines by which torchrun tells that some process failed, and not why.
ECHOES = ("ChildFailedError", "torch.distributed.elastic", "error_file", "CalledProcessError")


@dataclass(frozen=True)
class Machines:
    """How many processes train, and on which of how many machines this is."""

    nproc: int = 1
    nnodes: int = 1
    rank: int = 0
    rendezvous: str = ""

    @property
    def processes(self) -> int:
        return self.nproc * self.nnodes

    def launcher(self) -> list[str]:
        """Axolotl's arguments: one process needs no launcher, more are started by torchrun."""
        if self.processes == 1:
            return ["--launcher", "python"]
        where = ["--standalone"]
        if self.nnodes > 1:
            # Ranks by machine, as they are numbered: rank 0, which writes the run, is on machine 0.
            host, _, port = self.rendezvous.rpartition(":")
            where = [f"--nnodes={self.nnodes}", f"--node_rank={self.rank}"]
            where += [f"--master_addr={host}", f"--master_port={port}"]
        return ["--launcher", "torchrun", "--", f"--nproc_per_node={self.nproc}", *where]

    def environment(self, config: dict[str, Any]) -> dict[str, str]:
        """Axolotl finds `accelerate` on PATH and the plugin on PYTHONPATH."""
        folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        found = os.environ | {"PATH": folders, "PYTHONPATH": modules}
        if self.processes > 1 and not profiles.hardware()["gpus"]:
            # Without it each process trains apart and nothing says so; with it accelerate leaves
            # DeepSpeed out, and nothing says so either (tools/plugin.py sees both).
            cpu = "DS_ACCELERATOR" if config.get("deepspeed") else "ACCELERATE_USE_CPU"
            found[cpu] = "cpu" if config.get("deepspeed") else "true"
            found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.nproc))
        # Slurm's SIGTERM reaches torchrun, too, which would kill its processes 30 seconds later.
        found.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
        if config.get("use_wandb"):
            found["WANDB_MODE"] = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            found["WANDB_DIR"] = str(ROOT / config["output_dir"])
        if config.get("use_trackio"):
            found.pop("TRACKIO_DISABLED", None)
            found["TRACKIO_DIR"] = str(ROOT / config["output_dir"] / "trackio")
        return found


def fits(recipe: recipes.Recipe, here: dict[str, Any], profile: str = "") -> None:
    """Raises WrongInput, before any download, where a catalogue recipe cannot run here."""
    if recipe.name not in recipes.names():
        return
    _, task, method = recipes.parts(recipe.name)

    def small(model: str) -> bool:
        base = recipes.config(f"{model}/{task}_{method}")["base_model"]
        return plan.find_model(base).parameters <= profiles.LARGEST_ON_CPU

    if here["gpus"]:
        content = recipe.config | profiles.layers(profile)
        # The planner knows ZeRO, and not how FSDP divides a base.
        if (
            content.get("fsdp_config")
            or profiles.fits(content, here, len(here["gpus"])) is not False
        ):
            return
    elif small(recipes.parts(recipe.name)[0]):
        return
    need = plan.plan(recipe.config, data=ROOT / recipe.config["datasets"][0]["path"])["memory"]
    runs = [f"{model}/{task}_{method}" for model in recipes.matrix()["models"] if small(model)]
    what = f"What runs here: make train RECIPE={runs[0]} (" if runs else "("
    raise WrongInput(
        f"{recipe.name} needs a CUDA GPU with {need['peak'] / 2**30:.0f} GiB; "
        f"here: {profiles.found(here)}. {what}FORCE=1 tries all the same)"
    )


def data_of(recipe: recipes.Recipe) -> list[dict[str, Any]]:
    """What is to be known of each file that the recipe trains on or is validated with."""
    found = []
    config, _ = convert.drop_missing_validation(recipe.config)
    entries = [(entry, "train") for entry in config["datasets"]]
    entries += [(entry, "validation") for entry in config.get("test_datasets") or ()]
    for entry, split in entries:
        path = (ROOT / entry["path"]).resolve()
        if not path.exists() and path.suffix not in DATA_FILES:
            continue  # a dataset of the Hub: Axolotl finds it
        if path.is_dir():
            raise WrongInput(f"{shown(path)} is a folder; name a file of chat rows")
        if not path.is_file():
            beside = (recipe.path.parent / entry["path"]).resolve()
            if beside.is_file():
                raise WrongInput(
                    f"{shown(path)} is not there: paths in a recipe start at {ROOT}; "
                    f"for the file beside the recipe write {beside}"
                )
            task = f" TASKS={recipe.task}" if recipe.task else ""
            raise WrongInput(f"{shown(path)} is not there; `make data{task}` makes it")
        content = convert.manifest(path)
        rows = content.get("rows")
        if rows is None:
            with open(path, "rb") as file:
                rows = sum(1 for line in file if not line.isspace())
        where = {"path": entry["path"], "split": split, "sha256": content["sha256"], "rows": rows}
        check = (content.get("label_check") or {}).get("text")
        where |= {"from": content.get("from"), "source": content["source"], "label_check": check}
        found.append(where)
        held = content.get("validation") or {}
        for other in config.get("test_datasets") or ():
            beside = (ROOT / other["path"]).resolve()
            if (held.get("file"), path.parent) != (beside.name, beside.parent):
                continue
            if not beside.is_file() or digest(beside) != held["sha256"]:
                raise WrongInput(
                    f"{shown(beside)} is not what was held out of {shown(path)}; "
                    "`make data` makes both"
                )
    return found


def refuse_unusable(recipe: recipes.Recipe) -> None:
    """Raises WrongInput, before anything is loaded, for a config whose run could not be used."""
    config, where = recipe.config, shown(recipe.path)
    reasons = {
        key: "a run is an adapter that supervised fine-tuning made"
        for key in ("rl", "reward_model", "process_reward_model", "relora", "pretraining_dataset")
    }
    reasons["tokenizer_use_mistral_common"] = "scoring loads tokenizers with transformers alone"
    for key, reason in reasons.items():
        if config.get(key):
            raise WrongInput(f"{where}: {key} is not supported: {reason}; `axolotl train` takes it")
    if config.get("adapter") not in ("lora", "qlora"):
        raise WrongInput(
            f"{where}: adapter must be lora or qlora, not {config.get('adapter')}: a run is an "
            "adapter and its base; `axolotl train` trains without one"
        )
    if config["adapter"] == "lora" and config.get("load_in_4bit"):
        raise WrongInput(
            f"{where}: with adapter: lora Axolotl leaves a load_in_4bit base unquantized; "
            "write adapter: qlora, or load_in_4bit: false"
        )
    start = config.get("peft_init_lora_weights", True)
    loftq = ((config.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits")
    if loftq or (isinstance(start, str) and start not in ("gaussian", "orthogonal")):
        raise WrongInput(
            f"{where}: {'loftq_config' if loftq else f'peft_init_lora_weights: {start}'} changes "
            "the base's weights, which a run does not keep; leave it out, or use gaussian"
        )
    if config.get("tokens") and not config.get("lora_modules_to_save"):
        raise WrongInput(
            f"{where}: the embeddings of new tokens must be trained and saved; "
            "add lora_modules_to_save: [embed_tokens, lm_head]"
        )


@contextmanager
def only_one(run: Path) -> Iterator[int]:
    """Holds the run's lock and yields its file descriptor; raises JobFailed where another has it.

    The training process inherits the descriptor, so the lock lives exactly as long as either.
    """
    lock = status.lock_file(run)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115
    except OSError as error:
        raise unwritable(run, Path(error.filename), str(error.strerror)) from None
    with file:
        if not status.take_lock(file.fileno()):
            raise JobFailed(f"another training of {shown(run)} is under way")
        place = run if run.exists() else run.parent
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise unwritable(run, place, "Permission denied")
        yield file.fileno()


def unwritable(run: Path, path: Path, reason: str) -> JobFailed:
    return JobFailed(
        f"{shown(run)}, the output_dir, cannot be written to: {reason}{owner_of(path)}"
    )


def owner_of(path: Path) -> str:
    """Says whose a file or folder is, where it is another user's: two share one checkout."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        if path.stat().st_uid == os.geteuid():
            return ""
        return f" ({shown(path)} belongs to the user {path.owner()})"
    except (OSError, KeyError):  # a user without a name
        return ""


def require_space(run: Path) -> None:
    """Raises JobFailed where this project's disk is nearly full, or that of a run elsewhere is."""
    while not run.exists():
        run = run.parent
    for place, needed in ((ROOT, DISK), (run, FULL)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise JobFailed(
                f"{free / 1e9:.1f} GB are free on the disk of {shown(place)} and a training needs "
                f"{DISK / 1e9:.0f}; make room there, or name another output_dir"
            )


def sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is what was written: by its digests, and no weight is NaN.

    Where it has none (plain `axolotl train` wrote it), its tensors and archives must open.
    """
    from safetensors import SafetensorError, safe_open

    try:
        seal = checkpoint / "checkpoint.json"
        if seal.is_file():
            told = json.loads(seal.read_text())
            if any(digest(checkpoint / name) != value for name, value in told.items()):
                return False
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
            names = list(tensors.keys())
            finite = all(tensors.get_tensor(name).isfinite().all() for name in names)
        archives = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
        whole = seal.is_file() or all(zipfile.ZipFile(a).testzip() is None for a in archives)
        return whole and finite and bool(names) and state["global_step"] == step_of(checkpoint)
    except PermissionError as error:  # another user's, and perhaps sound
        path = Path(error.filename or checkpoint)
        raise JobFailed(f"{shown(path)} cannot be read: {error.strerror}{owner_of(path)}") from None
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
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return 0


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
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
    written = run / "identity.json"
    done = (run / "run.json").is_file()
    before = json.loads(written.read_text()) if written.is_file() else None
    # An adapter that something else wrote over is not what run.json tells of.
    damaged = done and not recipe.intact()
    same = before == identity and not damaged and not (force and done)
    if same and done:
        return False
    require_space(run)
    if same:
        shutil.rmtree(run / ".writing", ignore_errors=True)
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
        why = "FORCE=1"
        if before != identity:
            why = changed(before, identity) if before else "it was not begun by `make train`"
        elif damaged:
            why = "the adapter is not the one that run.json tells of"
        print(f"train      starts afresh: {why}; what was there is in {shown(aside)}")
    run.mkdir(parents=True, exist_ok=True)
    write_json(written, identity)
    return True


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
    tail, seen, said = progress.Tail(run / "progress.jsonl"), 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        job = bar.add_task("loading the model", total=None)
        while True:
            ended = process.poll() is not None
            losses = [row for row in tail.read() if "loss" in row]
            if losses and losses[-1]["step"] != seen:
                last = losses[-1]
                seen = last["step"]
                speed = last["total_tokens"] / max(last["seconds"], 1e-9)
                text = (
                    f"loss {last['loss']:.3f}  {speed:.0f} tokens/s  {last['memory'] / 1e9:.1f} GB"
                )
                bar.update(job, total=last["steps"], completed=seen, description=text)
                if not console.is_terminal and (time.monotonic() - said > 20 or ended):
                    print(f"train      step {seen}/{last['steps']}  {text}", flush=True)
                    said = time.monotonic()
            if ended:
                tail.close()
                return
            time.sleep(0.3)


def memory_advice(config: dict[str, Any], processes: int) -> str:
    """What the planner would change first, where memory ran out."""
    try:
        made = plan.plan(config, gpus=processes)
        least = f"{made['memory']['peak'] / 2**30 * 0.8 / plan.USABLE:.1f}GB"
        first = plan.plan(config, least, processes)["changes"]
    except WrongInput:
        first = []
    return "out of memory; the plan's next step: " + (
        first[0][0] if first else "a smaller sequence_len or a smaller model (`make plan`)"
    )


def cause(log: Path, start: int, code: int, config: dict[str, Any], processes: int) -> str:
    """Why a training ended, from its log from byte `start` on, or from the signal that ended it."""
    text = log.read_bytes()[start:].decode(errors="replace")
    facts = {"free": f"{shutil.disk_usage(log.parent).free / 1e9:.1f} GB"}
    for pattern, meaning in CAUSES.items():
        if match := re.search(pattern, text):
            if "{memory}" in meaning:
                facts["memory"] = memory_advice(config, processes)
            said = match.groups() or (match[0],)
            return SECRET.sub("***", meaning.format(*said, **facts).strip()[:400])
    if shutil.disk_usage(log.parent).free < FULL:  # a full disk takes no log of it
        return CAUSES[r"No space left on device|os error 28"].format(**facts)
    if code == -signal.SIGKILL:
        return f"it was killed, most often for memory: {memory_advice(config, processes)}"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    if code == 0:  # it was told to stop, and saved
        return "it was interrupted"
    names = ("Error:", "Exception:", "Killed")
    telling = [line.strip() for line in text.splitlines() if any(name in line for name in names)]
    telling = [line for line in telling if not any(echo in line for echo in ECHOES)]
    return SECRET.sub("***", telling[-1][:300]) if telling else "it ended without a word"


def with_parent() -> None:
    """Run in the child: where this process dies, the training is told to save and stop."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_torchrun(process: psutil.Process) -> bool:
    """Whether torchrun started a process; False where it ended or may not be looked at."""
    try:
        return "TORCHELASTIC_RUN_ID" in process.environ()
    except psutil.Error:
        return False


def trainers(leader: int) -> list[psutil.Process]:
    """The processes that train: those that torchrun started, else the leader itself.

    What these started in turn (workers that load data) must live until the step is finished.
    A process that ends meanwhile is left out, whatever it is.
    """
    try:
        first = psutil.Process(leader)
        family = [first, *first.children(recursive=True)]
    except psutil.Error:
        return []
    inside = {process.pid: process for process in family if in_torchrun(process)}
    ranks = []
    for process in inside.values():
        with suppress(psutil.Error):
            if process.ppid() not in inside:
                ranks.append(process)
    return ranks or [first]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Tells every training process to save a checkpoint and end; a second Ctrl-C ends them."""
    with suppress(OSError):  # nobody may be reading any more
        text = "the step is finished and saved (again to stop at once)"
        print(f"train      stopping: {text}", flush=True)
    # torchrun would wait and kill: what it started is told directly.
    for trainer in trainers(process.pid):
        with suppress(psutil.Error):
            trainer.send_signal(signal.SIGTERM)
    try:
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def axolotl(run: Path, place: Path, config: dict[str, Any], machines: Machines, lock: int) -> None:
    """Runs `axolotl train` on the config in `place`; raises JobFailed where it does not finish."""
    arguments = ["train", shown(place / "config.yaml"), *machines.launcher()]
    print(f"train      axolotl {' '.join(arguments)}", flush=True)
    log = place / "train.log"
    start = log.stat().st_size if log.is_file() else 0
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "axolotl"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=machines.environment(config),
            pass_fds=[lock],
            process_group=0,  # Ctrl-C reaches this process alone, which then tells the others
            preexec_fn=with_parent,
        )
        try:
            follow(process, run)
        except BaseException:
            stop(process)
            if not (run / "stats.json").is_file():
                step = last_checkpoint(run)
                after = f"from step {step}" if step else "from the start"
                print(f"train      stopped; the same command goes on {after}", flush=True)
            raise
    if machines.rank == 0 and not (run / "stats.json").is_file():
        why = cause(log, start, process.returncode, config, machines.processes)
        step = last_checkpoint(run)
        on = f"; the same command goes on from step {step}" if step else ""
        raise JobFailed(f"training stopped: {why}{on}; all of it is in {shown(log)}")
    if process.returncode:
        why = cause(log, start, process.returncode, config, machines.processes)
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
    data = data_of(recipe)
    # json: a run's identity is compared with the one that was written.
    identity = {"config": profiles.kept(content), "data": [entry["sha256"] for entry in data]}
    identity = json.loads(json.dumps(identity))
    run = place = recipe.run
    if machines.rank:  # beside the run, which machine 0 makes where they share a disk
        place = run.with_name(f".{run.name}.node{machines.rank}")
    with only_one(place) as lock:
        if machines.rank:
            place.mkdir(parents=True, exist_ok=True)
        elif not prepare(recipe, identity, force):
            print(f"train      {shown(run)} is finished (FORCE=1 trains it again)")
            return json.loads((run / "run.json").read_text())
        with atomic(place / "config.yaml") as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        if machines.rank or not (run / "stats.json").is_file():
            axolotl(run, place, content, machines, lock)
        return {} if machines.rank else finish(recipe, profile, data)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="train a recipe with Axolotl")
    parser.add_argument("recipe")
    parser.add_argument("--profile", default="", help="one of recipes/profiles/, or several: a,b")
    parser.add_argument("--force", default="", help="1: train a finished run again")
    parser.add_argument("--nproc", default="", help="processes on this machine, one a GPU")
    parser.add_argument("--tracker", default="", help=", ".join(profiles.TRACKERS))
    parser.add_argument("--gradient-checkpointing", default="", help="1 or 0; chosen without it")
    parser.add_argument("--nnodes", default="", help="machines")
    parser.add_argument("--node-rank", default="", help="which of them this is, from 0 on")
    parser.add_argument("--rendezvous", default="", help="host:port of machine 0")
    given = parser.parse_args()
    recipe = recipes.find(given.recipe)
    data_of(recipe)
    profiles.layers(given.profile)
    nnodes = int(plan.number("NNODES", given.nnodes, least=1) or 1)
    rank = int(plan.number("NODE_RANK", given.node_rank, least=0) or 0)
    address = re.fullmatch(r".+:\d+", given.rendezvous)
    if nnodes > 1 and (not address or rank >= nnodes):
        raise WrongInput("NNODES needs RDZV=host:port of machine 0, and NODE_RANK below NNODES")
    here = profiles.hardware()
    profile, nproc, why = profiles.choose(here, given.profile, given.nproc, nnodes)
    machines = Machines(nproc, nnodes, rank, given.rendezvous)
    force = given.force not in ("", "0")
    if not force and not (recipe.run / "identity.json").is_file():
        fits(recipe, here, profile)
    refuse_unusable(recipe)
    # Axolotl's schema loads torch, and this process stays beside the training: a child's gigabyte.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        child.submit(recipes.validate, recipe.config, shown(recipe.path)).result()
    if recipe.run in (ROOT, ROOT / "runs", *ROOT.parents):
        raise WrongInput(f"{shown(recipe.path)}: output_dir must be a folder of its own")
    export.ensure(recipe.config["base_model"])
    data = data_of(recipe)
    rows, held = (
        sum(entry["rows"] for entry in data if entry["split"] == split)
        for split in ("train", "validation")
    )
    if reason := convert.drop_missing_validation(recipe.config)[1]:
        print(f"train      no rows validate: {reason}")
    names = [e["path"] for e in recipe.config["datasets"] if not (ROOT / e["path"]).exists()]
    what = " and ".join([f"{rows} rows"] * bool(rows) + [f"{name} of the Hub" for name in names])
    validated = f", validated on {held}" if held else ""
    share = f", {machines.processes} processes" if machines.processes > 1 else ""
    print(f"train      {recipe.name} on {what}{validated}, profile {profile} ({why}){share}")
    content = profiles.merged(
        recipe, profile, machines.processes, given.tracker, here, given.gradient_checkpointing
    )
    for line in profiles.changed(recipe, content):
        print(f"train      {line}")
    if reason := explain_unscorable(recipe.config):
        print(
            f"train      note: {reason}; `make eval` needs PROMPT_FORMAT=bare, and chat and serve "
            "are not possible"
        )
    run = execute(recipe, content, profile, force, machines)
    if not run:
        print(f"train      done; the run is on {given.rendezvous}")
        return
    minutes, loss = run["seconds"] / 60, run.get("last_loss")
    print(
        f"train      done: {run['steps']} steps in {minutes:.1f} min, "
        f"loss {'-' if loss is None else round(loss, 3)}, "
        f"peak memory {run['peak_memory_bytes'] / 1e9:.1f} GB; adapter in {shown(recipe.run)}"
    )


if __name__ == "__main__":
    main()
