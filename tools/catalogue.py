"""The catalogue of recipes as a whole: lists it, shows a recipe, renders it, checks it.

    python -m tools recipes --task sentiment --method r4
    python -m tools show sentiment_r4
    python -m tools render                          writes recipes/<model>/ from recipes/matrix.yaml
    python -m tools render qwen3-8b/ner_r8_dora     prints one recipe, with or without a file
    python -m tools check                           files are current, every key is Axolotl's

A rendered recipe carries its version and the digest of what it learns; recipes/digests.json holds
both for the recipes without a file. If the tables change what a recipe learns and not its version,
`render` and `check` fail.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from tools import recipes, rendering, runs
from tools.common import (
    JobFailed,
    WrongInput,
    format_yaml,
    nearest,
    parse_yaml,
    read_json,
    shown,
    update_page,
)
from tools.runs import Run
from tools.sources import list_training_files
from tools.train import plan, plan_table

# ---- rendering


def render_all() -> dict[Path, str]:
    """{path: text} of every file that `make render` writes."""
    names = recipes.list_catalogue()
    files = {
        recipes.FOLDER / f"{name}.yaml": rendering.render_recipe(name)
        for name in names
        if recipes.has_file(name)
    }
    for model in recipes.read_matrix()["models"]:
        files[recipes.FOLDER / model / "README.md"] = rendering.render_model_page(model)
    digests = {name: describe_identity(name) for name in names if not recipes.has_file(name)}
    files[recipes.FOLDER / "digests.json"] = json.dumps(digests, indent=0) + "\n"
    return files


def describe_identity(name: str) -> str:
    """Version and digest of a recipe of the catalogue, as its header has them."""
    config, version = recipes.build_config(name), recipes.find_version(name)
    return f"{version} {recipes.Recipe(name, None, config, version).digest[:12]}"


def list_strays(files: dict[Path, str]) -> list[Path]:
    """Files that an earlier `make render` wrote and that this one would not.

    Each names itself; a renamed copy belongs to the user.
    """
    places = {*recipes.FOLDER.glob("*/*.yaml"), *recipes.FOLDER.glob("*/README.md")}
    return sorted(
        path
        for path in places - files.keys()
        if (content := path.read_bytes()).find(rendering.MARK.encode()) >= 0
        and f"recipes/{path.parent.name}/{path.name}".encode() in content
    )


def render(name: str | None = None) -> None:
    """Writes what recipes/matrix.yaml gives, or prints the one recipe that is named."""
    if name:
        print(rendering.read_or_render(recipes.find(name)), end="")
        return
    require_versions()
    files = render_all()
    for path, text in files.items():
        update_page(path, text, "make render")
    for path in list_strays(files):
        path.unlink()
        print(f"removed    {shown(path)}")
    total, written = len(recipes.list_catalogue()), sum(path.suffix == ".yaml" for path in files)
    print(f"{total} recipes: {written} files written, {total - written} rendered on demand")


# ---- checks


def diff_learned(name: str, digests: dict[str, Any]) -> str:
    """How what a recipe learns differs from its file or recorded digest of the same version."""
    path, version = recipes.FOLDER / f"{name}.yaml", recipes.find_version(name)
    if not path.is_file():
        recorded, now = str(digests.get(name, "")), describe_identity(name)
        same = recorded == now or recorded.partition(" ")[0] != version
        return "" if same else f"    digest {recorded.split()[-1]}, now {now.split()[-1]}"
    recipe = recipes.load_file(path, name)
    if recipe.version != version:
        return ""
    configs = (recipe.config, recipes.build_config(name))
    before, after = (
        format_yaml(dict(sorted(recipes.select_learned(config).items()))).splitlines()
        for config in configs
    )
    changes = [
        line
        for line in difflib.unified_diff(before, after, lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    return "\n".join(f"    {line}" for line in changes)


def require_versions() -> None:
    """Raises JobFailed if a change to what a recipe learns has not raised its version."""
    record = recipes.FOLDER / "digests.json"  # of the recipes without a file
    digests = read_json(record) if record.is_file() else {}
    changes = {
        name: text for name in recipes.list_catalogue() if (text := diff_learned(name, digests))
    }
    if changes:
        for name, text in changes.items():
            print(f"{name} {recipes.find_version(name)}:\n{text}", file=sys.stderr)
        raise JobFailed(
            f"{len(changes)} recipe{'s learn' if len(changes) > 1 else ' learns'} something else "
            "under the same version: raise it in recipes/matrix.yaml, versions: "
            f'"{next(iter(changes))}"'
        )


def check() -> None:
    """Raises JobFailed for an outdated file, WrongInput for an invalid recipe."""
    require_versions()
    files = render_all()
    for path in list_strays(files):
        raise JobFailed(f"{shown(path)} is not in recipes/matrix.yaml; `make render` removes it")
    for path, text in files.items():
        update_page(path, text, "make render", check=True)
    configs = {
        name: parse_yaml(rendering.render_recipe(name), name) for name in recipes.list_catalogue()
    }
    for path in sorted(recipes.LOCAL.glob("*/*.yaml")):
        configs[shown(path)] = recipes.load_file(path, path.stem).config
    names = sorted(path.stem for path in recipes.PROFILES.glob("*.yaml"))
    profiles = {name: recipes.read_profile(name) for name in names}
    for where, config in configs.items():
        recipes.validate(config, where)
        for profile, options in profiles.items():
            recipes.validate(config | options, f"{where} with profile {profile}")
    print(f"{len(configs)} recipes: current, and valid for Axolotl with {', '.join(profiles)}")


# ---- list and show


def select_names(task: str | None, model: str | None, method: str | None) -> list[str]:
    """Names that pass the filters; raises WrongInput for an unknown filter value."""
    filters = {"TASK": task, "MODEL": model, "METHOD": method}
    for variable, value in filters.items():
        values = list(recipes.read_matrix()[f"{variable.lower()}s"])
        if value and value not in values:
            hint = nearest(value, values) or f"; there are {', '.join(values)}"
            raise WrongInput(f'unknown {variable} "{value}"{hint}')
    wanted = (model, task, method)
    return [
        name
        for name, parts in recipes.list_names().items()
        if all(part == (value or part) for part, value in zip(parts, wanted, strict=True))
    ]


def describe_recipe(name: str) -> dict[str, Any]:
    """A recipe of the catalogue as a row of JSON."""
    model, task, method = recipes.split_name(name)
    return {
        "recipe": name,
        "finlora": recipes.find_finlora_name(name),
        "model": model,
        "task": task,
        "method": method,
        "version": recipes.find_version(name),
        "has_file": recipes.has_file(name),
        "planned_gpu_bytes": rendering.plan_memory(name),
        "trained": Run(runs.RUNS / name).is_finished,
    }


def list_recipes(
    task: str | None, model: str | None, method: str | None, as_json: bool = False
) -> None:
    """Prints the recipes that pass the filters, as a table or as JSON.

    Without a method, only recipes that have a file are listed.
    """
    if not (names := select_names(task, model, method)):
        raise WrongInput(f"no recipe has {' and '.join(filter(None, (task, model, method)))}")
    shown_names = names if method else [name for name in names if recipes.has_file(name)]
    rows = [describe_recipe(name) for name in shown_names]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        if rows:
            print_table(rows)
        if rest := len(names) - len(rows):
            print(f"{rest} more have no file and train by their names; METHOD=r8_dora lists such")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints models x tasks by methods with planned memory; a star marks trained recipes."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        mark = "*" if row["trained"] else " "
        stem = recipes.shorten(f"{row['model']}/{row['task']}")
        cell = f"{rendering.round_to_gib(row['planned_gpu_bytes'])} {mark}"
        lines.setdefault(stem, {})[row["method"]] = cell
    width = max(map(len, lines))
    print(f"{'recipe':<{width}}", *(f" _{method} " for method in methods))
    for stem, cells in lines.items():
        columns = (f"{cells.get(method, ''):>{len(method) + 3}}" for method in methods)
        print(f"{stem:<{width}}", *columns)
    trained = sum(row["trained"] for row in rows)
    print(f"\n{len(rows)} recipes, {trained} trained (*): planned GiB of GPU memory, longest rows")
    print(f"A name is row + column, such as {recipes.shorten(rows[0]['recipe'])}")


def show(name: str) -> None:
    """Prints a recipe, what is planned for it, and what its run took."""
    recipe = recipes.find(name)
    print(rendering.read_or_render(recipe))
    planned = plan.plan(recipe.config, data=list_training_files(recipe.config))
    plan_table.print_plan_table(recipe.name, planned)
    if "peak_memory_bytes" in recipe.run.info:  # a pulled run need not say
        plan_table.print_comparison(planned, recipe.run.info)
