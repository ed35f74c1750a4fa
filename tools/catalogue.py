"""The catalogue of recipes as a whole: lists it, shows one recipe, renders it, checks it.

    python -m tools.catalogue list --task sentiment --method r4
    python -m tools.catalogue show sentiment_r4
    python -m tools.catalogue render           writes every recipe from recipes/matrix.yaml
    python -m tools.catalogue check            files are current, every key is Axolotl's

A rendered recipe carries its version and the digest of what it learns. Where the tables give other
content for the same version, neither `render` nor `check` passes: the version must be raised.
"""

import difflib
import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from tools import architectures, recipes
from tools.common import JobFailed, WrongInput, atomic, nearest, shown
from tools.runs import RUNS, Run
from tools.train import plan

# The groups of keys in a rendered recipe, in the order in which they stand.
GROUPS = {
    "Base model": ["base_model", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs"],
    "Adapter": [
        *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        *("peft_use_dora", "peft_use_rslora"),
    ],
    "Data": ["datasets", "test_datasets", "sequence_len"],
    "Tokens and template": ["special_tokens", "chat_template_kwargs"],
    "Training": [
        *("num_epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("optimizer", "group_by_length", "seed"),
    ],
    "How it runs: a profile may change these": recipes.RUNNING,
    "Output": recipes.OUTPUT,
}


DUMPER = yaml.CSafeDumper


def memory(name: str) -> int:
    """Planned peak of one GPU in bytes, for the longest row of the recipe's task."""
    model, task, _ = recipes.parts(name)
    content = recipes.config(name)
    row = min(recipes.matrix()["tasks"][task].get("longest", 4096), content["sequence_len"])
    base = architectures.find(recipes.matrix()["models"][model]["hub"])
    return plan.memory(base, plan.setup_of(content, row, 1)).peak


def gib(size: int) -> str:
    """Bytes as whole GiB, upwards."""
    return f"{math.ceil(size / plan.GIB)} GiB"


def rendered(name: str) -> str:
    """The text of a catalogue recipe."""
    model, task, method = recipes.parts(name)
    table = recipes.matrix()
    what, about = table["models"][model], table["tasks"][task]
    path, content = recipes.path_of(name), recipes.config(name)
    version = recipes.version(name)
    recipe = recipes.Recipe(name, path, content, version)
    longest = min(about.get("longest", content["sequence_len"]), content["sequence_len"])
    header = [
        f"{what['title']} on {about['title']}",
        table["methods"][method]["title"],
        "",
        f"  make train RECIPE={name.removeprefix(f'{recipes.DEFAULT_MODEL}/')}",
        f"  axolotl train {shown(path)}",
        "",
    ]
    if theirs := recipes.finlora_name(name):
        header.append(f"FinLoRA's name: {theirs}{published(theirs, content)}")
    header.append(
        f"Planned GPU memory: {gib(memory(name))} (rows of up to {longest} tokens; `make plan`)"
    )
    if what["gated"]:
        page = f"https://huggingface.co/{what['hub']}"
        header.append(f"Gated: accept the licence at {page}, then `hf auth login`")
    header.append(f"Version: {version} ({recipe.digest[:12]})")
    header.append(
        "Yours to change: `make render` leaves it alone."
        if about.get("local")
        else "Rendered from recipes/matrix.yaml by `make render`."
    )
    return text(header, content, name)


def published(name: str, content: dict[str, Any]) -> str:
    """What FinLoRA trained its adapter of this name with, where the recipe says something else."""
    settings = recipes.published(name) or {}
    if all(content[key] == value for key, value in settings.items()):
        return ""
    values = ", ".join(f"{key.removeprefix('lora_')} {value}" for key, value in settings.items())
    return f"; its published adapter: {values}"


def text(header: list[str], content: dict[str, Any], name: str) -> str:
    """A recipe file: the header as comments, then the config's keys in GROUPS."""
    lines = [f"# {line}".rstrip() for line in header]
    content = dict(content)
    for title, keys in GROUPS.items():
        chosen = {key: content.pop(key) for key in keys if key in content}
        if chosen:
            body = yaml.dump(chosen, Dumper=DUMPER, sort_keys=False, width=100, allow_unicode=True)
            lines += ["", f"# {title}", body.rstrip()]
    if content:
        raise JobFailed(f"{name}: tools/catalogue.py has no group for {', '.join(content)}")
    return "\n".join(lines) + "\n"


def learned_otherwise(name: str) -> str | None:
    """What differs between a recipe's file and the tables, where its version is still the same."""
    path = recipes.path_of(name)
    if not path.is_file():
        return None
    old = recipes.load(path, name)
    if old.version != recipes.version(name):
        return None
    sides = (recipes.learned(old.config), recipes.learned(recipes.config(name)))
    before, after = (yaml.safe_dump(side, width=100).splitlines() for side in sides)
    changed = [
        line
        for line in difflib.unified_diff(before, after, lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    return "\n".join(f"    {line}" for line in changed) or None


def guard() -> None:
    """Raises JobFailed where what a recipe learns changed and its version did not."""
    found = {name: said for name in ours() if (said := learned_otherwise(name))}
    if found:
        for name, said in found.items():
            print(f"{name} {recipes.version(name)}:\n{said}", file=sys.stderr)
        first = next(iter(found))
        raise JobFailed(
            f"{len(found)} recipe{'s learn' if len(found) > 1 else ' learns'} something else under "
            f'the same version: raise it in recipes/matrix.yaml, versions: "{first}"'
        )


def ours() -> list[str]:
    """Names of what recipes/matrix.yaml gives, without the user's own tasks."""
    tasks = recipes.matrix()["tasks"]
    return [n for n in recipes.names() if not tasks[recipes.parts(n)[1]].get("local")]


def render(name: str | None = None) -> None:
    """Writes every recipe of recipes/matrix.yaml, or prints the one that is named."""
    if name:
        print(recipes.find(name).path.read_text(), end="")
        return
    guard()
    texts = {name: rendered(name) for name in ours()}
    for name, text in texts.items():
        path = recipes.path_of(name)
        if not path.is_file() or path.read_text() != text:
            with atomic(path) as file:
                file.write(text.encode())
    for path in strays():
        path.unlink()
    print(f"{len(texts)} recipes written")


def strays() -> list[Path]:
    """Rendered files that the tables no longer give."""
    known = {recipes.path_of(name) for name in recipes.names()}
    models = [recipes.FOLDER / model for model in recipes.matrix()["models"]]
    return [path for folder in models for path in folder.glob("*.yaml") if path not in known]


def check() -> None:
    guard()
    for name in ours():
        path = recipes.path_of(name)
        if not path.is_file() or path.read_text() != rendered(name):
            raise JobFailed(f"{shown(path)} is not what recipes/matrix.yaml gives; `make render`")
    for path in strays():
        raise JobFailed(f"{shown(path)} is not in recipes/matrix.yaml; `make render` removes it")
    profiles = {path.stem: recipes.profile(path.stem) for path in recipes.PROFILES.glob("*.yaml")}
    files = [recipes.path_of(name) for name in ours()] + sorted(recipes.LOCAL.glob("*/*.yaml"))
    for path in files:
        content = recipes.load(path, path.stem).config
        recipes.validate(content, shown(path))
        for profile, options in profiles.items():
            recipes.validate(content | options, f"{shown(path)} with profile {profile}")
    print(f"{len(files)} recipes: current, and valid for Axolotl with {', '.join(profiles)}")


def chosen(task: str | None, model: str | None, method: str | None) -> list[str]:
    """Names that pass the filters; without a filter all pass. WrongInput for an unknown one."""
    table = recipes.matrix()
    for variable, value in (("TASK", task), ("MODEL", model), ("METHOD", method)):
        known = list(table[f"{variable.lower()}s"])
        if value and value not in known:
            near = nearest(value, known) or f"; there are {', '.join(known)}"
            raise WrongInput(f'unknown {variable} "{value}"{near}')
    return [
        name
        for name in recipes.names()
        if all(
            asked in (None, part)
            for asked, part in zip((model, task, method), recipes.parts(name), strict=True)
        )
    ]


def row(name: str) -> dict[str, Any]:
    """What the list says of a recipe, as JSON has it."""
    model, task, method = recipes.parts(name)
    return {
        "recipe": name,
        "finlora": recipes.finlora_name(name),
        "model": model,
        "task": task,
        "method": method,
        "version": recipes.version(name),
        "planned_gpu_bytes": memory(name),
        "trained": Run(RUNS / name).is_finished,
    }


def list_recipes(
    task: str | None, model: str | None, method: str | None, as_json: bool = False
) -> None:
    """Prints the recipes that pass the filters, as a table or as JSON."""
    names = chosen(task, model, method)
    if as_json:
        print(json.dumps([row(name) for name in names], indent=2))
    else:
        listing(names)


def listing(names: list[str]) -> None:
    """A table of models × tasks by methods, with planned memory; what is trained is marked."""
    from rich.console import Console
    from rich.table import Table

    rows = [row(name) for name in names]
    methods = list(dict.fromkeys(entry["method"] for entry in rows))
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for method in methods:
        table.add_column(f"_{method}", justify="right", no_wrap=True)
    lines: dict[str, dict[str, str]] = {}
    for entry in rows:
        mark = " *" if entry["trained"] else ""
        stem = f"{entry['model']}/{entry['task']}"
        lines.setdefault(stem.removeprefix(f"{recipes.DEFAULT_MODEL}/"), {})[entry["method"]] = (
            f"{math.ceil(entry['planned_gpu_bytes'] / plan.GIB)}{mark}"
        )
    for stem, cells in lines.items():
        table.add_row(stem, *(cells.get(method, "") for method in methods))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    trained = sum(entry["trained"] for entry in rows)
    console.print(
        f"\n{len(rows)} recipes: planned GiB of GPU memory, at the task's longest row; a name is "
        f"row + column, such as {names[0].removeprefix(f'{recipes.DEFAULT_MODEL}/')}; "
        f"{trained} trained (*)"
    )


def show(name: str) -> None:
    """Prints a recipe, what is planned for it, and what its run took."""
    recipe = recipes.find(name)
    print(recipe.path.read_text())
    made = plan.plan(recipe.config, data=recipes.ROOT / recipe.config["datasets"][0]["path"])
    plan.show(recipe.name, made)
    if recipe.run.is_finished:
        plan.compare(made, recipe.run.info)
