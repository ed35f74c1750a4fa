"""Recipes: builds Axolotl configs from recipes/matrix.yaml; finds, loads and validates recipes.

    recipes.find("qwen3-8b/ner_r8_dora")                its file, or the tables where it has none
    recipes.build_config("qwen3-8b/ner_r8_dora")        what the tables say
    recipes.validate(recipe.config, recipe.where)       WrongInput where Axolotl would reject it

A name in the catalogue is a recipe with or without a file; config, digest and version are the same.
`tools/catalogue.py` lists, renders and checks the catalogue as a whole.
"""

import hashlib
import json
import pkgutil
import re
import typing
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from tools.common import ROOT, WrongInput, nearest, parse_yaml, quiet, read_json, read_yaml, shown
from tools.config_keys import check_keys
from tools.runs import Run

FOLDER = ROOT / "recipes"
PROFILES = FOLDER / "profiles"
LOCAL = FOLDER / "local"  # the user's own tasks and recipes, from `make new` and `make import`
DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_SEED = 42  # of transformers, where a recipe names none

# Keys that say where and how a recipe runs, not what it learns: the digest excludes them, and a
# profile may change them.
RUNTIME_KEYS = ["bf16", "gradient_checkpointing", "sample_packing"]
OUTPUT_KEYS = [
    *("output_dir", "dataset_prepared_path", "logging_steps", "eval_steps", "evals_per_epoch"),
    *("save_steps", "saves_per_epoch", "save_total_limit"),
]
# Keys that this project computes with, so they must be numbers before Axolotl's schema sees them.
NUMBER_KEYS = {
    *("learning_rate", "lora_alpha", "lora_r", "num_epochs", "max_steps", "sequence_len"),
    *("micro_batch_size", "gradient_accumulation_steps", "val_set_size", "weight_decay", "seed"),
}
# From tools/train/plugin.py.
PLUGIN_KEYS = {
    *("plugins", "dequantize_once", "answer_logits_only", "shared_prefix", "record_validation"),
    "merge_aware",
}
# Words in the path of a base that make Axolotl take it for another kind of model, and the option
# that this affects (None: all of them).
MISLEADING_PATHS = {"mpt": "gradient_checkpointing", "falcon": "fsdp", "pixtral": None}


@dataclass(frozen=True)
class Recipe:
    """A recipe: `name` is `<model>/<task>_<method>`, or the path of a YAML file.

    `path` is None for a recipe of the catalogue that has no file.
    """

    name: str
    path: Path | None
    config: dict[str, Any]
    version: str

    @property
    def where(self) -> str:
        """What messages call the recipe: its file, or its name where it has none."""
        return shown(self.path) if self.path else self.name

    @property
    def run(self) -> Run:
        return Run((ROOT / self.config["output_dir"]).resolve())

    @property
    def task(self) -> str | None:
        """The task whose data the recipe trains on; None for data outside data/sources.yaml."""
        return find_task(self.config)

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe learns."""
        learned = json.dumps(select_learned(self.config), sort_keys=True)
        return hashlib.sha256(learned.encode()).hexdigest()

    @property
    def seed(self) -> int:
        seed = self.config.get("seed")
        return DEFAULT_SEED if seed is None else int(seed)

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe with another seed, whose run lies beside the recipe's own."""
        if seed == self.seed:
            return self
        run = shown(self.run.with_seed(seed).folder)
        changes = {"seed": seed, "output_dir": run, "dataset_prepared_path": f"{run}/prepared"}
        return replace(self, config=self.config | changes)

    def read_trained_config(self) -> dict[str, Any]:
        """The merged config of the finished run; raises WrongInput without one."""
        if not self.run.is_finished:
            raise WrongInput(f"{self.name} is not trained; `make train RECIPE={self.name}` does it")
        if not self.run.is_intact:
            raise WrongInput(f"{self.run}: its adapter is not the one that run.json describes")
        info = self.run.info
        trainer = str(info.get("recipe") or self.name)
        if info.get("recipe_digest", self.digest) != self.digest:
            if trainer != self.name and self.path != (ROOT / trainer).resolve():
                raise WrongInput(
                    f"{self.run}, the output_dir of {self.name}, was trained by {trainer} with "
                    "other settings; give each recipe an output_dir of its own"
                )
            print(f"note       {self.name} was changed after {self.run} was trained")
        return self.run.config


def find_task(config: dict[str, Any]) -> str | None:
    """The task of a config's first dataset, <task>_train.jsonl; None for other files."""
    file = Path((config.get("datasets") or [{}])[0].get("path", "")).name
    return file.removesuffix("_train.jsonl") if file.endswith("_train.jsonl") else None


def select_learned(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides what is learned; data files without their folders."""
    outside = {*RUNTIME_KEYS, *OUTPUT_KEYS}
    learned = {key: value for key, value in config.items() if key not in outside}
    for key in ("datasets", "test_datasets"):
        if entries := config.get(key):
            learned[key] = [entry | {"path": Path(entry["path"]).name} for entry in entries]
    return learned


# ---- the tables


@cache
def read_matrix() -> dict[str, Any]:
    """The tables of recipes/matrix.yaml, with the user's own tasks of recipes/local/*.yaml."""
    matrix = read_yaml(FOLDER / "matrix.yaml")
    for path in sorted(LOCAL.glob("*.yaml")):
        tasks = read_yaml(path).get("tasks", {})
        matrix["tasks"] |= {name: row | {"local": True} for name, row in tasks.items()}
    return matrix


@cache
def list_names() -> dict[str, tuple[str, str, str]]:
    """{`<model>/<task>_<method>`: (model, task, method)} of the catalogue and the user's tasks."""
    matrix = read_matrix()
    return {
        f"{model}/{task}_{method}": (model, task, method)
        for model, model_row in matrix["models"].items()
        for task, task_row in matrix["tasks"].items()
        for method, method_row in matrix["methods"].items()
        if method in model_row.get("methods", matrix["methods"])
        and all(
            fnmatchcase(f"{model}/{task}", row.get("only", "*")) for row in (task_row, method_row)
        )
    }


def list_catalogue() -> list[str]:
    """The names that recipes/matrix.yaml gives, without those of the user's own tasks."""
    return [name for name in list_names() if not is_local(name)]


def split_name(name: str) -> tuple[str, str, str]:
    """(model, task, method) of a name in the catalogue; raises WrongInput for another name."""
    if name not in list_names():
        raise WrongInput(f'"{name}" is not in the catalogue')
    return list_names()[name]


def is_local(name: str) -> bool:
    """Whether a name belongs to one of the user's own tasks."""
    return bool(read_matrix()["tasks"][split_name(name)[1]].get("local"))


def has_file(name: str) -> bool:
    """Whether a recipe is also a file: by `files` in recipes/matrix.yaml, or as the user's own."""
    return is_local(name) or any(fnmatchcase(name, p) for p in read_matrix()["files"])


def shorten(name: str) -> str:
    """A name without the default model, as users type it."""
    return name.removeprefix(f"{DEFAULT_MODEL}/")


def find_by_pattern(table: dict[str, Any], name: str) -> Any:
    """The value of the last pattern in a table that matches a name; None without a match."""
    return next((v for p, v in reversed(table.items()) if fnmatchcase(name, p)), None)


def find_version(name: str) -> str:
    return str(find_by_pattern(read_matrix()["versions"], name))


def find_finlora_name(name: str) -> str | None:
    """FinLoRA's name of a catalogue recipe, `<task>_<model>_<bits>_r<rank>…`, if it has one."""
    model, task, method = split_name(name)
    parts = [read_matrix()["models"][model], read_matrix()["methods"][method]]
    names = [part.get("finlora") for part in parts]
    return None if is_local(name) or None in names else f"{task}_{names[0]}_{names[1]}"


def find_published_settings(name: str) -> dict[str, Any]:
    """Alpha and dropout of the adapter that FinLoRA published under a name; {} without one."""
    for row in read_matrix()["published"]:
        if name.lower() in map(str.lower, row["adapters"]):
            return {key: value for key, value in row.items() if key != "adapters"}
    return {}


def resolve_mirror(base: str) -> str:
    """The original's name on the Hub where `base` is a mirror; other names unchanged."""
    mirrors = read_matrix()["mirrors"].items()
    names = {mirror.lower(): hub for hub, copies in mirrors for mirror in copies}
    return names.get(base.lower(), base)


def find_base(base: str) -> tuple[str | None, dict[str, Any]]:
    """(model, row of the tables) of a base, by its name on the Hub, a mirror's, or its folder."""
    name = resolve_mirror(base).lower()
    for model, row in read_matrix()["models"].items():
        folder = row.get("base_model")
        if name == row["hub"].lower():
            return model, row
        if folder and (ROOT / base).resolve() == (ROOT / folder).resolve():
            return model, row
    return None, {}


@cache
def list_aliases() -> dict[str, str]:
    """{alias: full name} of every recipe: `<model>/<task>_<method>` or `<folder>/<name>`.

    A recipe of recipes/local/ outside the catalogue may be called by its file's name alone.
    """
    names = list_names()
    local = [f"{path.parent.name}/{path.stem}" for path in LOCAL.glob("*/*.yaml")]
    aliases = {name: name for name in (*names, *local)}
    for before, name in read_matrix()["renamed"].items():
        aliases |= {before: name, shorten(before): name, before.rpartition("/")[2]: name}
    aliases |= {name.rpartition("/")[2]: name for name in local if name not in names}
    aliases |= {shorten(name): name for name in names}
    aliases |= {alias: name for name in names if (alias := find_finlora_name(name))}
    return aliases


def clear_caches() -> None:
    """Forgets the tables and the list of recipes/local/."""
    for cached in (read_matrix, list_names, list_aliases):
        cached.cache_clear()


# ---- finding and loading


def find(name: str | None) -> Recipe:
    """The recipe of a catalogue name, a name without its model, a FinLoRA name or a YAML file.

    Raises WrongInput with the nearest names where there is none.
    """
    if not name:
        raise WrongInput("RECIPE=… is needed; `make recipes` lists what there is")
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if entry := name_file(path.resolve()):
            return load_file(path.resolve(), entry) if path.is_file() else open_recipe(entry)
        return load_file(path, name)
    aliases = list_aliases()
    entry = aliases.get(name) or aliases.get(name.lower())  # some of FinLoRA's names have an 8B
    if entry is None:
        hint = nearest(name, list(aliases)) or "; `make recipes` lists what there is"
        raise WrongInput(f'unknown recipe "{name}"{hint}')
    return open_recipe(entry)


def name_file(path: Path) -> str | None:
    """The catalogue's name of a file in recipes/ or recipes/local/; None of any other file."""
    for folder in (LOCAL, FOLDER):
        if path.is_relative_to(folder):
            name = str(path.relative_to(folder).with_suffix(""))
            if name in list_names():
                return name
    return None


def open_recipe(name: str) -> Recipe:
    """A recipe by its full name: from the user's file, the catalogue's file, or the tables."""
    for folder in (LOCAL, FOLDER):
        if (path := folder / f"{name}.yaml").is_file():
            return load_file(path, name)
    return Recipe(name, None, build_config(name), find_version(name))


def list_entries(datasets: Any, where: str) -> Any:
    """Datasets of a config with an entry for each file that `data_files` names.

    A `path` of json, csv and the like is a loader of the library `datasets`. Axolotl takes it for a
    name on the Hub. Raises WrongInput that starts with `where` for what names no files.
    """
    if not isinstance(datasets, list):
        return datasets  # the schema says what is wrong
    entries = []
    for entry in datasets:
        files = entry.get("data_files") if isinstance(entry, dict) else None
        if not files or entry.get("path") not in ("json", "csv", "parquet", "text", "arrow"):
            entries.append(entry)
            continue
        patterns = [files] if isinstance(files, str) else files
        if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
            raise WrongInput(f"{where}: data_files must be the path of a file, or a list of paths")
        names = [name for pattern in patterns for name in find_files(pattern)]
        part = {key: entry[key] for key in ("split", "shards") if entry.get(key)}
        if part not in ({}, {"split": "train"}):
            raise WrongInput(f"{where}: of data_files all rows are trained; leave out {[*part][0]}")
        kept = {key: value for key, value in entry.items() if key not in ("data_files", "split")}
        entries += [kept | {"path": name, "ds_type": entry["path"]} for name in names]
    return entries


def find_files(pattern: str) -> list[str]:
    """The files that fit a pattern; the pattern itself, which is then missing, where none does."""
    names = sorted(glob(pattern, root_dir=ROOT, recursive=True))
    return [name for name in names if (ROOT / name).is_file()] or [pattern]


def load_file(path: Path, name: str) -> Recipe:
    """Reads a recipe file; raises WrongInput where it is no mapping or lacks a required key."""
    if not path.is_file():
        raise WrongInput(f"{shown(path)} is not there; `make recipes` lists what there is")
    content = path.read_bytes()
    config = parse_yaml(content, shown(path))
    if not isinstance(config, dict):
        raise WrongInput(f"{shown(path)}: a mapping of Axolotl options is needed")
    for key in ("base_model", "datasets"):
        if key == "datasets" and config.get("pretraining_dataset"):
            raise WrongInput(
                f"{shown(path)}: pretraining_dataset is not supported; rows are needed"
            )
        if not config.get(key):
            raise WrongInput(f'{shown(path)}: the key "{key}" is missing')
    config |= {key: parse_number(config[key]) for key in NUMBER_KEYS & config.keys()}
    config |= {
        key: value.lower() == "true"  # as Axolotl's schema reads them
        for key, value in config.items()
        if isinstance(value, str) and value.lower() in ("true", "false")
    }
    check_keys(config, shown(path))
    refuse_dates(config, shown(path))
    for key in ("datasets", "test_datasets"):
        if config.get(key):
            config[key] = list_entries(config[key], shown(path))
    config["output_dir"] = config.get("output_dir") or "model-out"  # Axolotl's default
    return Recipe(name, path, config, read_version(content.decode()))


def refuse_dates(config: dict[str, Any], where: str) -> None:
    """Raises WrongInput for a date, which YAML makes of a text without quotes."""

    def find_date(value: Any) -> date | None:
        if isinstance(value, dict | list):
            inside = value.values() if isinstance(value, dict) else value
            return next(filter(None, map(find_date, inside)), None)
        return value if isinstance(value, date) else None

    if found := find_date(config):
        raise WrongInput(f"{where}: {found} is a date for YAML; put it in quotes")


def parse_number(value: Any) -> Any:
    """A value of one of NUMBER_KEYS: YAML 1.1 reads 1e-4 as a text, Axolotl's schema a number."""
    with suppress(ValueError, TypeError):
        return json.loads(value)
    return value


def read_version(text: str) -> str:
    """The version in the header of a recipe file; "0" without one."""
    header = re.search(r"^# Version: +(\S+)", text, re.M)
    return header[1] if header else "0"


def read_profile(name: str) -> dict[str, Any]:
    """The Axolotl options of recipes/profiles/<name>.yaml."""
    names = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in names:
        raise WrongInput(f'unknown PROFILE "{name}"; there are {", ".join(names)}')
    return read_yaml(PROFILES / f"{name}.yaml")


# ---- tables to config


def build_config(name: str) -> dict[str, Any]:
    """The complete Axolotl config that the tables give for a name in the catalogue."""
    model, task, method = split_name(name)
    matrix = read_matrix()
    rows = matrix["models"][model], matrix["tasks"][task], matrix["methods"][method]
    layers = [row["settings"] for row in rows]
    layers += [row for pattern, row in matrix["overrides"].items() if fnmatchcase(name, pattern)]
    if is_local(name):  # its steps follow from its rows, whatever the catalogue's exceptions say
        layers.append(matrix["tasks"][task]["settings"])
    return compose_config(name, rows[0], task, rows[2]["bits"], *layers)


def compose_config(
    run: str, base: dict[str, Any], task: str, bits: int, *layers: dict[str, Any]
) -> dict[str, Any]:
    """An Axolotl config that trains a task's chat rows into runs/<run>.

    `base` is a row of the tables' models, loaded at 4, 8 or 16 `bits`; each of `layers` overrides
    the common settings and the layers before it; null takes a key away.
    """
    matrix = read_matrix()
    config: dict[str, Any] = {"base_model": base.get("base_model", base["hub"])}
    # Not `val_set_size`: it draws rows, and copies of a row would both train and validate.
    for key, side in {"datasets": "train", "test_datasets": "val"}.items():
        rows = matrix["rows"] | matrix["tasks"].get(task, {}).get("rows", {})
        config[key] = [{"path": f"data/chat/{task}_{side}.jsonl", **deepcopy(rows)}]
    config |= {"output_dir": f"runs/{run}", "dataset_prepared_path": f"runs/{run}/prepared"}
    for layer in (matrix["bits"][bits], matrix["common"], *layers):
        config |= deepcopy(layer)  # the tables are cached, and callers change configs
    config = {key: value for key, value in config.items() if value is not None}
    if isinstance(modules := config.get("lora_target_modules"), list):
        config["lora_target_modules"] = fit_modules(base, modules)
    config |= {} if "save_steps" in config else {"saves_per_epoch": 4}
    config |= {} if "eval_steps" in config else {"evals_per_epoch": 1}
    return config


def find_longest_row(name: str, config: dict[str, Any]) -> int:
    """Tokens of the longest row that a recipe of the catalogue trains on."""
    task = read_matrix()["tasks"][split_name(name)[1]]
    return int(min(task.get("longest", config["sequence_len"]), config["sequence_len"]))


def fit_modules(base: dict[str, Any], modules: list[str]) -> list[str] | str:
    """`lora_target_modules` for modules of a base, a row of the tables' models.

    Modules that play the same role in layers of another kind join them. Modules that must be named
    in full become a regular expression.
    """
    roles = base.get("same_role", {})
    modules = [name for module in modules for name in (module, *roles.get(module, ()))]
    if pattern := base.get("target_modules"):
        return str(pattern.replace("NAMES", "|".join(modules)))
    return modules


# ---- validation


def list_unknown_keys(config: dict[str, Any], model: Any, prefix: str = "") -> list[str]:
    """Keys of `config` that a pydantic model lacks, nested ones as `datasets[0].key`.

    Axolotl drops such keys silently, so a misspelt one would have no effect.
    """
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        fields |= {name: info, info.alias or name: info}
    unknown = []
    for key, value in config.items():
        if prefix == "fsdp_config." and key.startswith("fsdp_"):
            key = key if key in fields else key.removeprefix("fsdp_")  # the old form
        if key not in fields and value is not None:
            unknown.append(f"{prefix}{key}{nearest(key, list(fields))}")
        if value is None or key not in fields:
            continue
        models = list_models(fields[key].annotation)
        for index, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, dict) and models:
                place = f"{prefix}{key}[{index}]." if isinstance(value, list) else f"{prefix}{key}."
                # Of several permitted models, the one with the fewest unknown keys is meant.
                choices = [list_unknown_keys(entry, m, place) for m in models]
                fewest = min(choices, key=len)
                unknown += fewest
    return unknown


def list_models(annotation: Any) -> list[Any]:
    """The pydantic models inside a type annotation."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in list_models(part)]


def validate(config: dict[str, Any], where: str) -> None:
    """Raises WrongInput that starts with `where` unless a config is valid for Axolotl's schema, and
    Axolotl knows each of its keys.
    """
    quiet()
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic import ValidationError

    # A deep copy: the schema's validators write into the values.
    plain = deepcopy({key: value for key, value in config.items() if key not in PLUGIN_KEYS})
    plugins = config.get("plugins") or ()
    added = {key for name in plugins for key in list_plugin_keys(name, where)}
    axolotls = {key: value for key, value in plain.items() if key not in added}
    if unknown := list_unknown_keys(axolotls, AxolotlInputConfig):
        raise WrongInput(f"{where}: Axolotl has no key {unknown[0]}")
    refuse_misleading_path(config, where)
    try:
        AxolotlInputConfig.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        raise WrongInput(f"{where}: {key}: {first['msg']}") from None
    except DeprecationWarning as error:  # raised for keys that Axolotl dropped
        raise WrongInput(f"{where}: {error}") from None


def list_plugin_keys(name: str, where: str) -> list[str]:
    """The keys that an Axolotl plugin adds; raises WrongInput where it cannot be loaded.

    Not by Axolotl's `load_plugin`, which calls whatever a name means, such as os.abort.
    """
    from axolotl.integrations.base import BasePlugin

    problems = []
    for path in (str(name), f"axolotl.integrations.{name}"):
        try:
            kind = pkgutil.resolve_name(path)
            if not issubclass(kind, BasePlugin):
                raise TypeError("it is not an Axolotl plugin")
            arguments = kind().get_input_args()
            return list(pkgutil.resolve_name(arguments).model_fields) if arguments else []
        except Exception as error:  # a plugin's module may raise anything
            problems.append(error)
    raise WrongInput(f"{where}: the plugin {name} cannot be loaded: {problems[0]}")


def refuse_misleading_path(config: dict[str, Any], where: str) -> None:
    """Raises WrongInput for a base whose path would mislead Axolotl about the kind of model."""
    base = str(config.get("base_model"))
    for word, key in MISLEADING_PATHS.items():
        if word not in base.lower() or not (ROOT / base).is_dir() or (key and not config.get(key)):
            continue
        if word not in str(read_json(ROOT / base / "config.json").get("model_type")):
            raise WrongInput(
                f"{where}: Axolotl takes the base {base} for another kind of model, since it "
                f'has "{word}" in its path; rename the folder, or name it by a link'
            )
