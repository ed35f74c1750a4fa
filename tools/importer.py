"""Recipes from a FinLoRA config file: one JSON object of run names and their settings.

    python -m tools import configs.json           runs that the catalogue lacks become recipes

It writes into recipes/local/, which `make render` leaves alone. Runs that are wrong are left out,
with the reason.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools import common, recipes, rendering, sources
from tools.common import (
    JobFailed,
    WrongInput,
    digest,
    nearest,
    parse_json,
    read_yaml,
    shown,
)
from tools.rendering import write_own

# The keys of a run in FinLoRA's config file, with the types of their values.
RUN_KEYS: dict[str, tuple[type, ...]] = {
    "base_model": (str,),
    "dataset_path": (str,),
    "lora_r": (int,),
    "quant_bits": (int,),
    "learning_rate": (int, float),
    "num_epochs": (int,),
    "batch_size": (int,),
    "gradient_accumulation_steps": (int,),
    "lora_alpha": (int,),
    "peft_use_dora": (bool,),
    "peft_use_rslora": (bool,),
}
OPTIONAL_KEYS = {"lora_alpha", "peft_use_dora", "peft_use_rslora"}


RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
LFS_DIGEST = re.compile(rb"version https://git-lfs.*?oid sha256:(\w+)", re.S)


def list_faults(name: str, run: Any) -> list[str]:
    """What is wrong with one run of a config file, `key: reason` each."""
    if not isinstance(run, dict):
        return ["an object is needed"]
    faults = [
        f"{key}: unknown key{nearest(key, list(RUN_KEYS))}" for key in run if key not in RUN_KEYS
    ]
    faults += [f"{key}: missing" for key in RUN_KEYS if key not in {*run, *OPTIONAL_KEYS}]
    for key, kinds in RUN_KEYS.items():
        if key not in run:
            continue
        value: Any = run[key]
        if type(value) not in kinds:
            faults.append(f"{key}: {json.dumps(value)} is not {kinds[-1].__name__}")
        elif type(value) is str and not value.strip():
            faults.append(f"{key}: it is empty")
        elif type(value) in (int, float) and not 0 < value < math.inf:
            faults.append(f"{key}: {value} is not a number above 0")
    if type(run.get("quant_bits")) is int and run["quant_bits"] not in (4, 8, 16):
        faults.append(f"quant_bits: {run['quant_bits']} is none of 4, 8, 16")
    if not RUN_NAME.fullmatch(name):
        faults.append("its name: letters, digits, . _ and - are needed")
    return faults


read_published_tables = cache(sources.published_tables)  # without the user's own tasks


@cache
def recognize_file(file: Path) -> str | None:
    """The task that a training file of FinLoRA's is for, by its content; None for other files."""
    with open(file, "rb") as content:
        pointer = LFS_DIGEST.match(content.read(300))
    digests = {pointer[1].decode()} if pointer else {digest(file), common.git_blob(file)}
    for task, row in read_published_tables()["tasks"].items():
        published = read_published_tables()["files"][row["train"]]
        if {published.get("sha256"), published.get("blob")} & digests:
            return str(task)
    if pointer:
        raise ValueError(f"{shown(file)} is a Git LFS pointer; `git lfs pull` brings the file")
    return None


def find_data(run: dict[str, Any], source: Path) -> tuple[str, Path | None]:
    """(task, file) that a run trains on; no file where it is FinLoRA's. Raises ValueError.

    A file that is there is recognized by its content. A missing one can only be FinLoRA's, and is
    recognized by its name.
    """
    file = (source.parent / run["dataset_path"]).resolve()
    tables = read_published_tables()
    if not file.is_file():
        for task, row in tables["tasks"].items():
            if Path(row["train"]).name == file.name:
                return task, None
        raise ValueError(
            f"dataset_path: {run['dataset_path']} is not there, and no file of FinLoRA's"
        )
    if task := recognize_file(file):
        return task, None
    stem = re.sub(r"\W+", "_", file.stem.removesuffix("_train")).strip("_").lower() or "data"
    stem = stem if stem[0].isalpha() else f"data_{stem}"
    for task in (stem, f"{stem}_{digest(file)[:8]}"):
        own_file = recipes.LOCAL / f"{task}.yaml"
        free = not own_file.exists() or read_yaml(own_file) == build_source(task, file)
        if free and task not in {*tables["tasks"], *tables["datasets"]}:
            return task, file
    raise ValueError(
        f"dataset_path: {shown(own_file)} is another task's; delete it to import the run"
    )


def build_source(task: str, file: Path) -> dict[str, Any]:
    """The row that a training file of the user's own adds to the tables of data/sources.yaml."""
    return {"sources": {"tasks": {task: {"train": str(file), "eval": []}}}}


def build_run_config(name: str, run: dict[str, Any], task: str) -> dict[str, Any]:
    """The Axolotl config of a run that trains on a task's rows."""
    base = recipes.find_base(run["base_model"])[1] or {"hub": run["base_model"], "settings": {}}
    settings = {
        "lora_r": run["lora_r"],
        "lora_alpha": run.get("lora_alpha", recipes.read_matrix()["common"]["lora_alpha"]),
        "learning_rate": run["learning_rate"],
        "num_epochs": run["num_epochs"],
        "micro_batch_size": run["batch_size"],
        "gradient_accumulation_steps": run["gradient_accumulation_steps"],
        # FinLoRA's choice by bits.
        "optimizer": "paged_adamw_8bit" if run["quant_bits"] == 4 else "adamw_bnb_8bit",
    }
    settings |= {key: True for key in ("peft_use_dora", "peft_use_rslora") if run.get(key)}
    folder, bits = f"imported/{name}", run["quant_bits"]
    return recipes.compose_config(folder, base, task, bits, base["settings"], settings)


@dataclass(frozen=True)
class Twin:
    """The catalogue's recipe that is nearest to a run; {key: (run's, its)} of what differs."""

    name: str
    differences: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        changes = (f"{key} {own} (there {its})" for key, (own, its) in self.differences.items())
        return f"{self.name} in {', '.join(changes)}"


def find_twin(config: dict[str, Any]) -> Twin | None:
    """The recipe of the catalogue that learns the same as a config, or nearly the same."""
    learned = recipes.select_learned(config)
    twins = []
    for name, other in list_learned(config["base_model"], learned["datasets"][0]["path"]):
        keys = sorted(learned.keys() | other.keys())
        pairs = {key: (learned.get(key), other.get(key)) for key in keys}
        differences = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        twins.append(Twin(name, differences))
    return min(twins, key=lambda twin: len(twin.differences), default=None)


@cache
def list_learned(base: str, data: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, what is learned) of the catalogue's recipes with this base and training file."""
    models = recipes.read_matrix()["models"]
    return [
        (name, recipes.select_learned(recipes.build_config(name)))
        for name, (model, task, _) in recipes.list_names().items()
        if not recipes.is_local(name)
        and base == models[model].get("base_model", models[model]["hub"])
        and data == f"{task}_train.jsonl"
    ]


def import_run(name: str, run: Any, source: Path) -> bool:
    """Writes the recipe of one run; False where the catalogue has it. Raises ValueError."""
    if faults := list_faults(name, run):
        raise ValueError("; ".join(faults))
    task, file = find_data(run, source)
    config = build_run_config(name, run, task)
    twin = None if file else find_twin(config)
    if twin and not twin.differences:
        print(f"catalogue  {name} is {twin.name}")
        return False
    path = recipes.LOCAL / "imported" / f"{name}.yaml"
    if path.exists() and read_yaml(path) != config:
        raise ValueError(f"{shown(path)} says something else; delete it to import the run anew")
    own_file = recipes.LOCAL / f"{task}.yaml"
    if file and not own_file.exists():
        write_own(own_file, source.name, build_source(task, file))
    if not path.exists():
        origin = [f"Imported from {source.name}: {name}"]
        origin += [f"Differs from {twin}"] if twin else []
        rendering.write_local_recipe(f"imported/{name}", config, "1.0.0", origin)
    apart = f"differs from {twin}" if twin else "nothing in the catalogue is like it"
    print(f"local      {name}: {shown(path)}; {apart}")
    return True


def import_runs(source: Path) -> None:
    """Makes recipes from a FinLoRA config file: one JSON object, run name → settings."""
    if not source.is_file():
        raise WrongInput(f"CONFIG={source} is not there; a FinLoRA config file is needed")
    runs = parse_json(source.read_bytes(), shown(source))
    if not runs:
        raise WrongInput(f"{shown(source)}: an object of run names and settings is needed")
    recognize_file.cache_clear()  # a file may have changed since
    problems, written = dict[str, str](), 0
    for name, run in runs.items():
        try:
            written += import_run(name, run, source)
        except ValueError as error:
            problems[name] = str(error)
    recipes.clear_caches()
    for name, reason in problems.items():
        print(f"left out   {name}: {reason}")
    same = len(runs) - written - len(problems)
    rest = f", {len(problems)} left out" if problems else ""
    print(f"import     {len(runs)} runs: {same} in the catalogue, {written} local{rest}")
    if problems:
        name, reason = next(iter(problems.items()))
        raise JobFailed(
            f"{shown(source)}: {len(problems)} of {len(runs)} runs are not imported; "
            f"the first: {name}: {reason}"
        )
