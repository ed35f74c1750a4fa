"""The catalogue: renders recipes from recipes/matrix.yaml, finds, lists and checks them.

What each command does:

python -m tools.recipes list             a table of what there is
python -m tools.recipes show NAME        one recipe
python -m tools.recipes render           writes every recipe from the matrix
python -m tools.recipes check            rendered files are current, and every key is Axolotl's
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.cli import ROOT, JobFailed, WrongInput, atomic, command, digest, nearest, shown

FOLDER = ROOT / "recipes"
DEFAULT_MODEL = "llama-3.1-8b"

# The groups of keys in a rendered recipe, in the order in which they stand.
GROUPS = {
    "Base model": ["base_model", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs"],
    "Adapter": [
        *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        *("peft_use_dora", "peft_use_rslora"),
    ],
    "Data": ["datasets", "dataset_prepared_path", "val_set_size", "sequence_len", "sample_packing"],
    "Tokens": ["special_tokens"],
    "Training": [
        *("num_epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "optimizer"),
        *("group_by_length", "gradient_checkpointing", "bf16", "seed"),
    ],
    "Output": [
        *("output_dir", "logging_steps", "eval_steps", "evals_per_epoch"),
        *("save_steps", "saves_per_epoch", "save_total_limit"),
    ],
}
# Keys that say where things lie, not what is learned: outside a recipe's digest.
PLACES = {"output_dir", "dataset_prepared_path"}
PLACES |= {"logging_steps", "eval_steps", "evals_per_epoch"}
PLACES |= {"save_steps", "saves_per_epoch", "save_total_limit"}


@dataclass(frozen=True)
class Recipe:
    """A recipe file and what it holds. `name` is `<model>/<task>_<method>`, or the file's path."""

    name: str
    path: Path
    config: dict[str, Any]
    version: str

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return (ROOT / self.config["output_dir"]).resolve()

    def intact(self) -> bool:
        """Whether the run's adapter is the one that its `run.json` tells of."""
        told = json.loads((self.run / "run.json").read_text()).get("adapter_sha256")
        adapter = self.run / "adapter_model.safetensors"
        return adapter.is_file() and digest(adapter) == told

    def trained(self) -> dict[str, Any]:
        """The merged config of its finished run; raises WrongInput without one."""
        if not (self.run / "run.json").is_file():
            raise WrongInput(f"{self.name} is not trained; `make train RECIPE={self.name}` does it")
        if not self.intact():
            raise WrongInput(
                f"{shown(self.run)}: its adapter is not the one that run.json tells of"
            )
        if any(
            entry.get("chat_template") != "tokenizer_default" for entry in self.config["datasets"]
        ):
            raise WrongInput(f"{self.name}: only chat_template tokenizer_default can be scored")
        return yaml.load((self.run / "config.yaml").read_bytes(), yaml.CSafeLoader)

    @property
    def task(self) -> str | None:
        """The task whose data it trains on; None where the data is not of data/sources.yaml."""
        name = Path(self.config["datasets"][0]["path"]).name
        return name.removesuffix("_train.jsonl") if name.endswith("_train.jsonl") else None

    @property
    def digest(self) -> str:
        """SHA-256 over what is learned: every key but those of the output and the data's folder."""
        learned = {key: value for key, value in self.config.items() if key not in PLACES}
        learned["datasets"] = [e | {"path": Path(e["path"]).name} for e in self.config["datasets"]]
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()


@cache
def matrix() -> dict[str, Any]:
    return yaml.load((FOLDER / "matrix.yaml").read_bytes(), yaml.CSafeLoader)


def names() -> list[str]:
    """`<model>/<task>_<method>` of the whole catalogue."""
    table = matrix()
    return [
        f"{model}/{task}_{method}"
        for model in table["models"]
        for task in table["tasks"]
        for method in table["methods"]
    ]


def parts(name: str) -> tuple[str, str, str]:
    """(model, task, method) of a catalogue name."""
    model, _, rest = name.partition("/")
    for task in matrix()["tasks"]:
        if rest.startswith(f"{task}_"):
            return model, task, rest.removeprefix(f"{task}_")
    raise WrongInput(f'"{name}" is not in the catalogue')


def finlora_name(name: str) -> str | None:
    """FinLoRA's name of a catalogue recipe, `<task>_<model>_<bits>_r<rank>…`, if it has one."""
    model, task, method = parts(name)
    of_model = matrix()["models"][model].get("finlora")
    of_method = matrix()["methods"][method].get("finlora")
    return f"{task}_{of_model}_{of_method}" if of_model and of_method else None


def find(name: str) -> Recipe:
    """The recipe of a catalogue name, a name without its model, a FinLoRA name or a YAML file.

    Raises WrongInput with the nearest names where there is none.
    """
    if not name:
        raise WrongInput("RECIPE=… is needed; `make recipes` lists what there is")
    if name.endswith((".yaml", ".yml")):
        inside = Path(name).resolve()
        inside = inside.relative_to(FOLDER) if inside.is_relative_to(FOLDER) else inside
        if str(inside.with_suffix("")) not in names():
            return load(Path(name), name)
        name = str(inside.with_suffix(""))
    known = {entry: entry for entry in names()}
    short = {n.removeprefix(f"{DEFAULT_MODEL}/"): n for n in known if n.startswith(DEFAULT_MODEL)}
    known |= short | {theirs: n for n in names() if (theirs := finlora_name(n))}
    if name not in known:
        hint = nearest(name, list(known)) or "; `make recipes` lists what there is"
        raise WrongInput(f'unknown recipe "{name}"{hint}')
    return load(FOLDER / f"{known[name]}.yaml", known[name])


def load(path: Path, name: str) -> Recipe:
    """Reads a recipe file; raises WrongInput where it is no mapping or lacks what all need."""
    if not path.is_file():
        raise WrongInput(f"{shown(path)} is not there; `make render` writes the catalogue's")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WrongInput(f"{shown(path)}: not UTF-8 at byte {error.start + 1}") from None
    try:
        config = yaml.load(text, yaml.CSafeLoader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise WrongInput(f"{shown(path)}{line}: not YAML") from None
    if not isinstance(config, dict):
        raise WrongInput(f"{shown(path)}: a mapping of Axolotl options is needed")
    for key in ("base_model", "datasets", "output_dir"):
        if not config.get(key):
            raise WrongInput(f'{shown(path)}: the key "{key}" is missing')
    entries = config["datasets"]
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "path" in e for e in entries
    ):
        raise WrongInput(f'{shown(path)}: "datasets" must be a list of mappings with a "path"')
    version = next(
        (li[11:].strip() for li in text.splitlines() if li.startswith("# Version:")), "0"
    )
    return Recipe(name, path, config, version)


def config(name: str) -> dict[str, Any]:
    """The complete Axolotl config that the matrix gives for a catalogue name."""
    model, task, method = parts(name)
    table = matrix()
    how = table["methods"][method]
    base: dict[str, Any] = {"base_model": table["models"][model]["base_model"]}
    if how["bits"] == 4:
        base |= {"load_in_4bit": True, "adapter": "qlora"}
        base["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    else:
        base |= {"load_in_8bit": True} if how["bits"] == 8 else {}
        base["adapter"] = "lora"
    base |= {
        "datasets": [
            {
                "path": f"data/chat/{task}_train.jsonl",
                "type": "chat_template",
                "chat_template": "tokenizer_default",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }
        ],
        "dataset_prepared_path": f"runs/{name}/prepared",
        "output_dir": f"runs/{name}",
        "bf16": "auto",
        "logging_steps": 1,
        "save_total_limit": 2,
    }
    for layer in (
        table["common"],
        table["models"][model].get("settings", {}),
        table["tasks"][task]["settings"],
        how["settings"],
        table["model_task"].get(f"{model}/{task}", {}),
    ):
        base |= layer
    base |= {} if "save_steps" in base else {"saves_per_epoch": 4}
    base |= {} if "eval_steps" in base else {"evals_per_epoch": 1}
    return base


def rendered(name: str) -> str:
    """The text of a catalogue recipe: a header that tells how to run it, then keys in groups."""
    model, task, method = parts(name)
    table, content = matrix(), config(name)
    model_row, method_row = table["models"][model], table["methods"][method]
    typed = name.removeprefix(f"{DEFAULT_MODEL}/")
    theirs = finlora_name(name)
    lines = [
        f"# {model_row['title']} on {table['tasks'][task]['title']}",
        f"# {method_row['title']}",
        "#",
        f"#   make train RECIPE={typed}",
        f"#   axolotl train recipes/{name}.yaml",
        "#",
        *([f"# FinLoRA's name: {theirs}"] if theirs else []),
        f"# Version: {table['versions'].get(name, table['version'])}",
        "# Rendered from recipes/matrix.yaml by `make render`.",
    ]
    for title, keys in GROUPS.items():
        chosen = {key: content.pop(key) for key in keys if key in content}
        if chosen:
            body = yaml.safe_dump(chosen, sort_keys=False, width=100, allow_unicode=True)
            lines += ["", f"# {title}", body.rstrip()]
    if content:
        raise JobFailed(f"{name}: tools/recipes.py has no group for {', '.join(content)}")
    return "\n".join(lines) + "\n"


def profile(name: str) -> dict[str, Any]:
    """The Axolotl options of recipes/profiles/<name>.yaml."""
    known = sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml"))
    if name not in known:
        raise WrongInput(f'unknown PROFILE "{name}"; there are {", ".join(known)}')
    return yaml.load((FOLDER / "profiles" / f"{name}.yaml").read_bytes(), yaml.CSafeLoader)


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
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic import ValidationError

    own = {"plugins", "dequantize_once", "answer_logits_only"}  # tools/plugin.py adds these
    plain = {key: value for key, value in content.items() if key not in own}
    # A plugin of Axolotl's brings keys of its own.
    unknown = [] if content.get("plugins") else unknown_keys(plain, AxolotlInputConfig)
    if unknown:
        raise WrongInput(f"{where}: Axolotl has no key {unknown[0]}")
    try:
        AxolotlInputConfig.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        raise WrongInput(f"{where}: {key}: {first['msg']}") from None


def listing() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "base", "method", "GPU memory", "version"):
        table.add_column(heading, overflow="fold")
    for name in names():
        model, _, method = parts(name)
        model_row, method_row = matrix()["models"][model], matrix()["methods"][method]
        memory = f"{model_row['memory_gib'][method_row['bits']]} GiB"
        version = matrix()["versions"].get(name, matrix()["version"])
        short = name.removeprefix(f"{DEFAULT_MODEL}/")
        table.add_row(short, model_row["title"], method_row["title"], memory, version)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def check() -> None:
    for name in names():
        path = FOLDER / f"{name}.yaml"
        if not path.is_file() or path.read_text() != rendered(name):
            raise JobFailed(f"{shown(path)} is not what recipes/matrix.yaml gives; `make render`")
    known = {FOLDER / f"{name}.yaml" for name in names()}
    for path in FOLDER.glob("*/*.yaml"):
        if path not in known and path.parent.name not in ("profiles", "local"):
            raise JobFailed(f"{shown(path)} is not in recipes/matrix.yaml; delete it")
    for name in names():
        content = find(name).config
        validate(content, f"recipes/{name}.yaml")
        for other in ("cpu", "gpu"):
            validate(content | profile(other), f"recipes/{name}.yaml with profile {other}")
    print(f"{len(names())} recipes: current, and valid for Axolotl")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="the catalogue of recipes")
    parser.add_argument("verb", choices=["list", "show", "render", "check"])
    parser.add_argument("name", nargs="?", default="")
    arguments = parser.parse_args()
    if arguments.verb == "list":
        listing()
    elif arguments.verb == "show":
        print(find(arguments.name).path.read_text(), end="")
    elif arguments.verb == "check":
        check()
    else:
        for name in names():
            with atomic(FOLDER / f"{name}.yaml") as file:
                file.write(rendered(name).encode())
        print(f"{len(names())} recipes written")


if __name__ == "__main__":
    main()
