"""Recipes as files and as rows of recipes/matrix.yaml: finds them, loads them, checks their keys.

`tools/catalogue.py` lists, renders and checks the whole catalogue; this module is what it, training
and scoring have in common.
"""

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from tools.common import ROOT, WrongInput, nearest, parse_yaml, quiet, read_yaml, shown
from tools.runs import Run

FOLDER = ROOT / "recipes"
DEFAULT_MODEL = "llama-3.1-8b"

PROFILES = FOLDER / "profiles"
LOCAL = FOLDER / "local"  # tasks and recipes of the user's own, from `make new` and `make import`

# Keys that say where and how a recipe runs, not what is learned: outside its digest. A profile may
# change these, and a rendered recipe has them in groups of their own.
RUNNING = ["bf16", "gradient_checkpointing", "sample_packing"]
OUTPUT = [
    *("output_dir", "dataset_prepared_path", "logging_steps", "eval_steps", "evals_per_epoch"),
    *("save_steps", "saves_per_epoch", "save_total_limit"),
]


# Keys that this project computes with, and that must be numbers before Axolotl's schema sees them.
NUMBERS = {
    *("learning_rate", "lora_alpha", "lora_r", "num_epochs", "max_steps", "sequence_len"),
    *("micro_batch_size", "gradient_accumulation_steps", "val_set_size", "weight_decay"),
}


@dataclass(frozen=True)
class Recipe:
    """A recipe file and what it holds. `name` is `<model>/<task>_<method>`, or the file's path."""

    name: str
    path: Path
    config: dict[str, Any]
    version: str

    @property
    def run(self) -> Run:
        return Run((ROOT / self.config["output_dir"]).resolve())

    def trained(self) -> dict[str, Any]:
        """The merged config of its finished run; raises WrongInput without one."""
        if not self.run.is_finished:
            raise WrongInput(f"{self.name} is not trained; `make train RECIPE={self.name}` does it")
        if not self.run.is_intact:
            raise WrongInput(f"{self.run}: its adapter is not the one that run.json tells of")
        return self.run.config

    @property
    def task(self) -> str | None:
        """The task whose data it trains on; None where the data is not of data/sources.yaml."""
        name = Path(self.config["datasets"][0]["path"]).name
        return name.removesuffix("_train.jsonl") if name.endswith("_train.jsonl") else None

    @property
    def digest(self) -> str:
        """SHA-256 over what is learned."""
        return hashlib.sha256(json.dumps(learned(self.config), sort_keys=True).encode()).hexdigest()


def learned(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config is learned: all but where it runs, its output, and the data's folder."""
    kept = {key: value for key, value in config.items() if key not in {*RUNNING, *OUTPUT}}
    for key in ("datasets", "test_datasets"):
        if entries := config.get(key):
            kept[key] = [e | {"path": Path(e["path"]).name} for e in entries]
    return kept


@cache
def matrix() -> dict[str, Any]:
    """The tables of recipes/matrix.yaml, and the user's own tasks of recipes/local/*.yaml."""
    table = read_yaml(FOLDER / "matrix.yaml")
    for path in sorted(LOCAL.glob("*.yaml")):
        own = read_yaml(path).get("tasks", {})
        table["tasks"] |= {name: row | {"local": True} for name, row in own.items()}
    return table


def canonical(base: str) -> str:
    """The name on the Hub of what a base is a copy of: itself, unless it is a mirror."""
    mirrors = {name.lower(): hub for hub, names in matrix()["mirrors"].items() for name in names}
    return mirrors.get(base.lower(), base)


def base_model(base: str) -> tuple[str | None, dict[str, Any]]:
    """(name, row) in the catalogue of a base, by its name on the Hub, a mirror's or its folder."""
    name = canonical(base)
    for model, row in matrix()["models"].items():
        folder = row.get("base_model")
        if name.lower() == row["hub"].lower():
            return model, row
        if folder and (ROOT / base).resolve() == (ROOT / folder).resolve():
            return model, row
    return None, {}


@cache
def names() -> list[str]:
    """`<model>/<task>_<method>` of the whole catalogue."""
    table = matrix()
    return [
        f"{model}/{task}_{method}"
        for model in table["models"]
        for task in table["tasks"]
        for method, row in table["methods"].items()
        if fnmatchcase(f"{model}/{task}", row.get("only", "*"))
    ]


@cache
def parts(name: str) -> tuple[str, str, str]:
    """(model, task, method) of a catalogue name."""
    model, _, rest = name.partition("/")
    for task in matrix()["tasks"]:
        method = rest.removeprefix(f"{task}_")
        if method != rest and method in matrix()["methods"]:
            return model, task, method
    raise WrongInput(f'"{name}" is not in the catalogue')


def path_of(name: str) -> Path:
    """Where the file of a catalogue name lies."""
    local = matrix()["tasks"][parts(name)[1]].get("local")
    return (LOCAL if local else FOLDER) / f"{name}.yaml"


def version(name: str) -> str:
    """The version of a catalogue name: of the last pattern under `versions` that fits."""
    return next(v for p, v in reversed(matrix()["versions"].items()) if fnmatchcase(name, p))


def finlora_name(name: str) -> str | None:
    """FinLoRA's name of a catalogue recipe, `<task>_<model>_<bits>_r<rank>…`, if it has one."""
    model, task, method = parts(name)
    if matrix()["tasks"][task].get("local"):
        return None
    of_model = matrix()["models"][model].get("finlora")
    of_method = matrix()["methods"][method].get("finlora")
    return f"{task}_{of_model}_{of_method}" if of_model and of_method else None


def published(name: str) -> dict[str, Any] | None:
    """What the adapter that FinLoRA published under `name` was trained with: alpha and dropout."""
    for row in matrix()["published"]:
        if name.lower() in map(str.lower, row["adapters"]):
            return {key: value for key, value in row.items() if key != "adapters"}
    return None


@cache
def places() -> dict[str, Path]:
    """The file of every name that a recipe has."""
    known = {entry: path_of(entry) for entry in names()}
    own = {f"{path.parent.name}/{path.stem}": path for path in LOCAL.glob("*/*.yaml")}
    known |= own | {path.stem: path for entry, path in own.items() if entry not in names()}
    prefix = f"{DEFAULT_MODEL}/"
    known |= {n.removeprefix(prefix): known[n] for n in names() if n.startswith(prefix)}
    known |= {theirs: known[n] for n in names() if (theirs := finlora_name(n))}
    return known


def forget() -> None:
    """Reads the tables anew where they are asked for next."""
    for cached in (matrix, names, parts, places):
        cached.cache_clear()


def find(name: str | None) -> Recipe:
    """The recipe of a catalogue name, a name without its model, a FinLoRA name or a YAML file.

    Raises WrongInput with the nearest names where there is none.
    """
    if not name:
        raise WrongInput("RECIPE=… is needed; `make recipes` lists what there is")
    if name.endswith((".yaml", ".yml")):
        path = Path(name).resolve()
        for folder in (LOCAL, FOLDER):
            inside = (
                str(path.relative_to(folder).with_suffix("")) if path.is_relative_to(folder) else ""
            )
            if inside in names():
                return load(path, inside)
        return load(Path(name), name)
    known = places()
    entry = name if name in known else name.lower()  # some of FinLoRA's names have an 8B
    if entry not in known:
        hint = nearest(name, list(known)) or "; `make recipes` lists what there is"
        raise WrongInput(f'unknown recipe "{name}"{hint}')
    path = known[entry]
    return load(path, f"{path.parent.name}/{path.stem}")


def load(path: Path, name: str) -> Recipe:
    """Reads a recipe file; raises WrongInput where it is no mapping or lacks what all need."""
    if not path.is_file():
        raise WrongInput(f"{shown(path)} is not there; `make render` writes the catalogue's")
    content = path.read_bytes()
    config = parse_yaml(content, shown(path))
    if not isinstance(config, dict):
        raise WrongInput(f"{shown(path)}: a mapping of Axolotl options is needed")
    for key in ("base_model", "datasets"):
        if not config.get(key):
            raise WrongInput(f'{shown(path)}: the key "{key}" is missing')
    config["output_dir"] = config.get("output_dir") or "model-out"  # Axolotl's own default
    for key in NUMBERS & config.keys():
        config[key] = read_number(config[key])
    entries = config["datasets"]
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "path" in e for e in entries
    ):
        raise WrongInput(f'{shown(path)}: "datasets" must be a list of mappings with a "path"')
    header = (
        line.split() for line in content.decode().splitlines() if line.startswith("# Version:")
    )
    return Recipe(name, path, config, next((words[2] for words in header if words[2:]), "0"))


def read_number(value: Any) -> Any:
    """The number of a text such as "1e-4", which YAML 1.1 reads as a text and Axolotl's schema as a
    number; everything else as it is.
    """
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "e" not in value.lower() else number


def config(name: str) -> dict[str, Any]:
    """The complete Axolotl config that the matrix gives for a catalogue name."""
    model, task, method = parts(name)
    table = matrix()
    what, how = table["models"][model], table["methods"][method]
    others = (row for pattern, row in table["overrides"].items() if fnmatchcase(name, pattern))
    layers = (what["settings"], table["tasks"][task]["settings"], how["settings"], *others)
    return compose(name, what, task, how["bits"], *layers)


def compose(
    run: str, base: dict[str, Any], task: str, bits: int, *layers: dict[str, Any]
) -> dict[str, Any]:
    """A complete Axolotl config: of a `base` (a row of the matrix's models) loaded at 4, 8 or 16
    `bits`, trained on a task's chat rows into runs/<run>, with the common settings and `layers`.
    """
    content: dict[str, Any] = {"base_model": base.get("base_model", base["hub"])}
    if bits == 4:
        content |= {"load_in_4bit": True, "adapter": "qlora"}
        content["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    else:
        content |= {"load_in_8bit": True} if bits == 8 else {}
        content["adapter"] = "lora"
    # Not `val_set_size`: it draws rows, and a row's copies would both train and validate.
    for key, part in {"datasets": "train", "test_datasets": "val"}.items():
        content[key] = [
            {
                "path": f"data/chat/{task}_{part}.jsonl",
                "type": "chat_template",
                "chat_template": "tokenizer_default",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }
        ]
    content |= {
        "dataset_prepared_path": f"runs/{run}/prepared",
        "output_dir": f"runs/{run}",
        "bf16": "auto",
        "logging_steps": 1,
        "save_total_limit": 2,
    }
    for layer in (matrix()["common"], *layers):
        content |= layer
    if "target_modules" in base:
        among = "|".join(content["lora_target_modules"])
        content["lora_target_modules"] = base["target_modules"].replace("NAMES", among)
    content |= {} if "save_steps" in content else {"saves_per_epoch": 4}
    content |= {} if "eval_steps" in content else {"evals_per_epoch": 1}
    return content


def profile(name: str) -> dict[str, Any]:
    """The Axolotl options of recipes/profiles/<name>.yaml."""
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise WrongInput(f'unknown PROFILE "{name}"; there are {", ".join(known)}')
    return read_yaml(PROFILES / f"{name}.yaml")


def unknown_keys(config: dict[str, Any], model: Any, where: str = "") -> list[str]:
    """Keys of `config` that a pydantic model does not know, nested ones as `datasets[0].key`.

    Axolotl drops such keys without a word, so a misspelt one would change nothing.
    """
    import typing

    from pydantic import BaseModel

    def models(annotation: Any) -> list[Any]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [m for part in typing.get_args(annotation) for m in models(part)]

    found = []
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        fields |= {name: info} | ({info.alias: info} if info.alias else {})
    for key, value in config.items():
        if key not in fields:
            found.append(f"{where}{key}{nearest(key, list(fields))}")
            continue
        inner = models(fields[key].annotation)
        entries = value if isinstance(value, list) else [value]
        for index, entry in enumerate(entries):
            if isinstance(entry, dict) and inner:
                at = f"{where}{key}[{index}]." if isinstance(value, list) else f"{where}{key}."
                # Where several models are allowed, the one that knows most keys is meant.
                tried = [unknown_keys(entry, each, at) for each in inner]
                found += sorted(tried, key=lambda names: len(names))[0]
    return found


def validate(content: dict[str, Any], where: str) -> None:
    """Checks a config against Axolotl's own schema, and that Axolotl knows each of its keys."""
    quiet()
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic import ValidationError

    own = {"plugins", "dequantize_once", "answer_logits_only"}  # tools/train/plugin.py adds these
    # A copy, down to the last list: the schema's validators write into what they are given.
    plain = deepcopy({key: value for key, value in content.items() if key not in own})
    # A plugin of Axolotl's brings keys of its own.
    unknown = [] if content.get("plugins") else unknown_keys(plain, AxolotlInputConfig)
    if unknown:
        raise WrongInput(f"{where}: Axolotl has no key {unknown[0]}")
    # Axolotl takes a base for a model of another kind where its path has that kind's name in it.
    base = str(content.get("base_model"))
    for word, key in (("mpt", "gradient_checkpointing"), ("falcon", "fsdp"), ("pixtral", None)):
        folder = ROOT / base
        if word in base.lower() and folder.is_dir() and (key is None or content.get(key)):
            config = json.loads((folder / "config.json").read_bytes())
            if word not in str(config.get("model_type")):
                raise WrongInput(
                    f"{where}: Axolotl takes the base {base} for another kind of model, since it "
                    f'has "{word}" in its path; rename the folder, or name it by a link'
                )
    try:
        AxolotlInputConfig.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        raise WrongInput(f"{where}: {key}: {first['msg']}") from None
