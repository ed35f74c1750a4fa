"""Writes recipes as text: a recipe's file with its header and reasons, and the page of a model.

    rendering.render_recipe("qwen3-8b/ner_r8_dora")     with or without a file of its own

The reasons beside the values are rows of `keys` in recipes/matrix.yaml.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from tools import architectures, evidence, recipes
from tools.common import JobFailed, format_yaml, read_json, shown, write_text
from tools.train.memory import GIB, compute_memory, read_setup

# `make render` writes and removes files with this line.
MARK = "Rendered from recipes/matrix.yaml by `make render`."
WIDTH = 100


def plan_memory(name: str) -> int:
    """Planned peak of one GPU in bytes, for the longest row of the recipe's task."""
    config = recipes.build_config(name)
    hub = recipes.read_matrix()["models"][recipes.split_name(name)[0]]["hub"]
    setup = read_setup(config, recipes.find_longest_row(name, config), 1)
    return compute_memory(architectures.find(hub), setup).peak


def round_to_gib(size: int) -> int:
    """Bytes as whole GiB, upwards."""
    return math.ceil(size / GIB)


def render_recipe(name: str) -> str:
    """The text of a catalogue recipe's file, whether it has one or not."""
    model, task, method = recipes.split_name(name)
    matrix = recipes.read_matrix()
    base, config = matrix["models"][model], recipes.build_config(name)
    recipe = recipes.Recipe(name, None, config, recipes.find_version(name))
    header = [
        f"{base['title']} on {matrix['tasks'][task]['title']}",
        matrix["methods"][method]["title"],
        "",
        f"  make train RECIPE={recipes.shorten(name)}",
    ]
    if recipes.is_local(name):
        header += [f"  axolotl train {shown(recipes.LOCAL / f'{name}.yaml')}", ""]
        source = "Yours to change: `make render` leaves it alone."
    elif recipes.has_file(name):
        header += [f"  axolotl train recipes/{name}.yaml", ""]
        source = MARK
    else:
        header += [f"  make render RECIPE={name} > my.yaml && axolotl train my.yaml", ""]
        source = "Rendered on demand from recipes/matrix.yaml: a copy is yours to change."
    if alias := recipes.find_finlora_name(name):
        header.append(f"FinLoRA's name: {alias}{describe_published(alias, config)}")
    header += [
        f"Planned GPU memory: {round_to_gib(plan_memory(name))} GiB "
        f"(rows of up to {recipes.find_longest_row(name, config)} tokens; `make plan`)",
        f"Gated: {describe_gate(base)}",
        f"Version: {recipe.version} ({recipe.digest[:12]})",
        *textwrap.wrap(
            f"Evidence: {evidence.describe_evidence(name)}", WIDTH - 2, subsequent_indent="  "
        ),
        source,
    ]
    return format_recipe(header, config, name)


def describe_published(alias: str, config: dict[str, Any]) -> str:
    """A clause with the settings of FinLoRA's published adapter if the recipe's differ."""
    settings = recipes.find_published_settings(alias)
    if all(config[key] == value for key, value in settings.items()):
        return ""
    values = ", ".join(f"{key.removeprefix('lora_')} {value}" for key, value in settings.items())
    return f"; its published adapter: {values}"


def describe_gate(base: dict[str, Any]) -> str:
    """What a user must do before a base can be downloaded."""
    if not base["gated"]:
        return "no"
    page = f"https://huggingface.co/{base['hub']}"
    return f"accept the licence at {page}, then `hf auth login`"


def write_local_recipe(name: str, config: dict[str, Any], version: str, origin: list[str]) -> None:
    """Writes a recipe of the user's own; `origin`: lines that say where it comes from."""
    path = recipes.LOCAL / f"{name}.yaml"
    header = [
        *origin,
        "",
        f"  make train RECIPE={name}",
        f"  axolotl train {shown(path)}",
        "",
        f"Version: {version} ({recipes.Recipe(name, path, config, version).digest[:12]})",
        "Yours to change: `make render` leaves it alone.",
    ]
    known = {key for keys in recipes.read_matrix()["keys"].values() for key in keys}
    if config.keys() <= known:
        # No name: the reasons that a pattern selects are those of the catalogue's settings.
        text = format_recipe(header, config, "")
    else:  # a user's own keys have no reasons
        text = "".join(f"# {line}".rstrip() + "\n" for line in header) + format_yaml(config)
    write_text(path, text)


def format_recipe(header: list[str], config: dict[str, Any], name: str) -> str:
    """A recipe file: the header as comments, then the config's keys by group with their reasons.

    `name` selects the reasons; a name outside the catalogue gets those for any recipe.
    """
    groups = recipes.read_matrix()["keys"]
    order = [key for keys in groups.values() for key in keys if key in config]
    if missing := config.keys() - set(order):
        raise JobFailed(f"recipes/matrix.yaml, keys: no group has {', '.join(sorted(missing))}")
    entries = split_entries(format_yaml({key: config[key] for key in order}))
    lines = [f"# {line}".rstrip() for line in header]
    for title, keys in groups.items():
        present = [key for key in keys if key in config]
        lines += ["", f"# {title}"] if present else []
        for key in present:
            reason = keys[key]
            if isinstance(reason, dict):
                reason = recipes.find_by_pattern(reason, name)
            lines += add_reason(entries[key], reason)
    return "\n".join(lines) + "\n"


def split_entries(text: str) -> dict[str, list[str]]:
    """The lines of each top-level key of a YAML mapping."""
    entries: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line[:1] not in ("", " ", "-"):
            key = line.partition(":")[0]
        entries.setdefault(key, []).append(line)
    return entries


def add_reason(lines: list[str], reason: str | None) -> list[str]:
    """The lines of a key with the reason beside the first, or above it if that is too long."""
    if not reason:
        return lines
    beside = f"{lines[0]}  # {reason}"
    # Inside a value of several lines, such as a quoted text, the reason would become part of it.
    if len(beside) <= WIDTH and (len(lines) == 1 or lines[0].endswith(":")):
        return [beside, *lines[1:]]
    return [*textwrap.wrap(reason, WIDTH, initial_indent="# ", subsequent_indent="# "), *lines]


def write_own(path: Path, source: str, content: dict[str, Any]) -> None:
    """Writes a YAML file of the user's own that says which file it was made from."""
    header = f"# Yours, from {' '.join(source.split())}; `make render` leaves it alone.\n"
    write_text(path, header + format_yaml(content))


def read_or_render(recipe: recipes.Recipe) -> str:
    """The text of a recipe's file, whether it has one or not."""
    return recipe.path.read_text() if recipe.path else render_recipe(recipe.name)


def render_model_page(model: str) -> str:
    """recipes/<model>/README.md: every recipe of the model with memory, version and evidence."""
    base = recipes.read_matrix()["models"][model]
    parameters = architectures.find(base["hub"]).parameters
    names = list_model_recipes(model)
    lines = [
        f"<!-- recipes/{model}/README.md: {MARK} -->",
        f"# {base['title']}",
        "",
        f"[{base['hub']}](https://huggingface.co/{base['hub']}), {parameters / 1e9:.2f} billion "
        f"parameters. Gated: {describe_gate(base)}.",
        "",
        f"`make train RECIPE={recipes.shorten(names[0])}` trains a recipe; `make plan` computes",
        "memory and hours. A recipe without a link has no file: it trains by its name, and",
        "`make render RECIPE=… > my.yaml` writes it.",
        "",
        evidence.LEGEND,
        "",
        "| recipe | planned GPU memory | version | evidence |",
        "| --- | ---: | --- | --- |",
    ]
    for name in names:
        label = f"`{recipes.shorten(name)}`"
        cell = f"[{label}]({name.partition('/')[2]}.yaml)" if recipes.has_file(name) else label
        memory, version = round_to_gib(plan_memory(name)), recipes.find_version(name)
        lines.append(f"| {cell} | {memory} GiB | {version} | {evidence.describe_evidence(name)} |")
    return "\n".join([*lines, *describe_checks(model)]) + "\n"


def describe_checks(model: str) -> list[str]:
    """The section on what was verified of a base, from recipes/checks/<model>.json."""
    path = recipes.FOLDER / "checks" / f"{model}.json"
    measured = any(
        "measured: " in evidence.describe_evidence(name) for name in list_model_recipes(model)
    )
    unseen = "" if measured else " Its real weights were not at hand; nothing was run with them."
    lines = ["", "## Verified", ""]
    if not path.is_file() and measured:
        text = "Trained and scored with its real weights ([results](../../docs/results.md))."
        return [*lines, text, "The checks of `make add-model` were not run on it."]
    if not path.is_file():
        return [*lines, f"Nothing yet: `make add-model` checks a base.{unseen}"]
    record = read_json(path)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = {finding["part"] for finding in record["findings"]}
    if parts & recipes.read_matrix()["methods"].keys():
        tried = (
            "on the base's real tokenizer and on a tiny random model of its own class, which was "
            "trained, scored, merged and loaded again"
        )
    else:
        tried = "on the base's real tokenizer alone; no model of its class was tried"
    text = f"By `make add-model`, {tried}. With {versions}.{unseen}"
    lines += [*textwrap.wrap(text, WIDTH), "", "| of | what | verdict |", "| --- | --- | --- |"]
    for finding in record["findings"]:
        detail = f" ({finding['detail']})" if finding["detail"] else ""
        verdict = f"{finding['verdict']}{detail}".replace("|", "\\|")
        lines.append(f"| {finding['part']} | {finding['what']} | {verdict} |")
    return lines


def list_model_recipes(model: str) -> list[str]:
    """The names of a model's recipes in the catalogue."""
    return [name for name in recipes.list_catalogue() if recipes.split_name(name)[0] == model]
