"""What is scored, served, merged or talked to: a base and an adapter, its precision and prompt.

    subjects.find("smollm2-135m/sentiment_r4")                   a finished run of a recipe
    subjects.find(adapter="runs/hub/someone/some-adapter")       any PEFT folder

An adapter meets the base at the precision that it was trained on, with the prompt that it was
trained on. Where neither is told, it is asked for and not guessed.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import adapters, common, models, recipes, runs, sources
from tools.common import WrongInput, read_yaml, shown
from tools.prompts import FORMATS, explain_unscorable
from tools.runs import UNKNOWN, Run, list_runs

# The name of an adapter that FinLoRA published, `<task>_<model>_<bits>_r<rank>…`; one begins with
# its training file. The precision stands nowhere else. They were trained on FinLoRA's prompt and on
# no chat template.
FINLORA = re.compile(
    r"(?P<task>[a-z0-9_]+?)(?:_train\.jsonl)?[_-](?:meta-)?(?:llama|mistral|qwen)[\w.-]*?[_-]"
    r"(?P<bits>4bits|8bits|fp16)[_-]r\d+(?:[_-][a-z0-9]+)*",
    re.IGNORECASE,
)
BITS = {"4bits": models.PRECISIONS["nf4"], "8bits": models.PRECISIONS["int8"], "fp16": {}}


class NotRenderable(WrongInput):
    """No chat template renders the prompts that an adapter was trained on."""


@dataclass(frozen=True)
class Subject:
    """A base, or a base and its adapter. `config` is Axolotl's, with the precision to score at."""

    name: str
    config: dict[str, Any]
    adapter: Path | None  # a PEFT folder
    folder: Path  # its scores lie here
    base_folder: Path
    task: str | None  # what it was trained for
    prompt_format: str
    suffix: str = ""  # of the adapter's score files, at another precision than its own

    @property
    def sides(self) -> list[str]:
        return ["base", "adapter"] if self.adapter else ["base"]

    def file(self, side: str, dataset: str, limit: int | None) -> Path:
        place = self.folder if side == "adapter" else self.base_folder
        parts = [dataset, self.suffix if side == "adapter" else ""]
        parts += [self.prompt_format if self.prompt_format != "chat" else ""]
        parts += [f"sample{limit}" if limit else ""]
        return place / "evals" / ("_".join(filter(None, parts)) + ".json")

    @property
    def options(self) -> dict[str, Any] | None:
        return self.config.get("chat_template_kwargs")


def of_recipe(
    recipe: recipes.Recipe, base_only: bool, precision: str | None, form: str | None
) -> Subject:
    config = recipe.config if base_only else recipe.read_trained_config()
    folder = recipe.run.folder
    form = form or (None if base_only else recipe.run.info.get("prompt_format"))
    adapter = None if base_only else folder
    place = folder.parent
    return _subject(recipe.name, config, adapter, folder, place, recipe.task, precision, form)


def of_folder(
    folder: Path, recipe: recipes.Recipe | None, precision: str | None, form: str | None
) -> Subject:
    """Any PEFT adapter. Its base and precision are those of the recipe that is named with it, of
    the config that `make train` left beside it, or of its name where FinLoRA published it.
    """
    _check_folder(folder)
    folder = folder.resolve()
    published, run_info = published_name(folder), Run(folder).info
    trained = Run(folder).config_file
    unknown = run_info.get("precision") == UNKNOWN
    if recipe:
        config = recipe.config
    elif trained.is_file():
        config = read_yaml(trained)
    else:
        path = folder / adapters.CONFIG
        settings = common.parse_json(path.read_bytes(), shown(path))
        base = str(settings.get("base_model_name_or_path") or "")
        if not base:
            raise WrongInput(f"{shown(path)} names no base; RECIPE=… with the same base does")
        row = recipes.find_base(base)[1]
        config = {"base_model": row.get("base_model") or row.get("hub") or base}
        config |= row.get("settings") or {}
        config |= BITS[published["bits"].lower()] if published else {}
        unknown = not published
    unknown = unknown and not recipe and not models.published_precision(str(config["base_model"]))
    if unknown and not precision:
        raise WrongInput(
            f"ADAPTER={folder} does not say at which precision it was trained; PRECISION= is "
            f"one of {', '.join(models.PRECISIONS)}"
        )
    data = Path((config.get("datasets") or [{}])[0].get("path", "")).name
    task = data.removesuffix("_train.jsonl") if data.endswith("_train.jsonl") else None
    if published and not recipe and published["task"].lower() in sources.tables()["tasks"]:
        task = published["task"].lower()
    form = form or run_info.get("prompt_format")
    form = form or ("finlora" if published and not trained.is_file() else None)
    base = str(config["base_model"])
    model = recipes.find_base(base)[0] or re.sub(r"\W+", "-", base).strip("-")
    inside = folder.is_relative_to(runs.RUNS)
    name = str(folder.relative_to(runs.RUNS)) if inside else (published or [folder.name])[0]
    place = runs.RUNS / model
    own = folder if inside else place / f"adapter_{name}"
    if unknown and precision in models.PRECISIONS:  # what is asked for is its own precision
        config = models.at(config, precision)
    return _subject(name, config, folder, own, place, task, precision, form)


def _check_folder(folder: Path) -> None:
    """Raises WrongInput unless a folder holds an adapter that PEFT could load onto some base."""
    if not (folder / adapters.CONFIG).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{adapters.CONFIG}"))
        hint = f"; {shown(inside[0])} is one" if inside else ""
        raise WrongInput(
            f"ADAPTER={folder} has no {adapters.CONFIG}; a PEFT folder is needed{hint}"
        )
    if not (folder / adapters.WEIGHTS).is_file():
        raise WrongInput(f"ADAPTER={folder} has no {adapters.WEIGHTS}; nothing else is read")
    adapters.inspect(folder)


def published_name(folder: Path) -> re.Match[str] | None:
    """FinLoRA's name of an adapter: its folder's, or of a repository in the Hub's cache."""
    names = (part.rpartition("--")[2] for part in reversed(folder.parts))
    return next((match for name in names if (match := FINLORA.fullmatch(name))), None)


def _subject(
    name: str,
    config: dict[str, Any],
    adapter: Path | None,
    folder: Path,
    place: Path,
    task: str | None,
    precision: str | None,
    form: str | None,
) -> Subject:
    if precision and precision not in models.PRECISIONS:
        known = ", ".join(models.PRECISIONS)
        raise WrongInput(f'unknown PRECISION "{precision}"; there are {known}')
    if form and form not in FORMATS:
        raise WrongInput(f'unknown PROMPT_FORMAT "{form}"; there are {", ".join(FORMATS)}')
    if not form and (why := explain_unscorable(config)):
        raise NotRenderable(
            f"{name}: {why}; PROMPT_FORMAT=bare scores it on prompts without a template"
        )
    own = models.precision(config)
    config = models.at(config, precision) if precision else config
    suffix = precision if precision and precision != own else ""
    base_folder = place / f"base_{models.precision(config)}"
    return Subject(name, config, adapter, folder, base_folder, task, form or "chat", suffix)


def of_run(run: Run, precision: str | None, form: str | None) -> Subject:
    """A finished run: of its recipe where that is known, else as an adapter."""
    try:
        recipe = recipes.find(str(run.info.get("recipe") or ""))
    except WrongInput:
        return of_folder(run.folder, None, precision, form)
    if recipe.run.folder != run.folder.resolve():
        return of_folder(run.folder, None, precision, form)
    return of_recipe(recipe, False, precision, form)


def find(
    recipe: str | None = None,
    adapter: str | None = None,
    precision: str | None = None,
    form: str | None = None,
    base_only: bool = False,
) -> Subject:
    """The base and adapter of a recipe, of an adapter's folder, or of both together."""
    if adapter:
        named = recipes.find(recipe) if recipe else None
        folder = Path(adapter).expanduser()
        pulled = runs.RUNS / "hub" / adapter  # where `make pull` puts owner/name
        if folder.is_file():
            raise WrongInput(f"ADAPTER={adapter} is a file; a PEFT folder is needed")
        if not folder.is_dir() and not pulled.is_dir():
            raise WrongInput(
                f"ADAPTER={adapter} is no folder here; `make pull ADAPTER=owner/name` brings one"
            )
        return of_folder(folder if folder.is_dir() else pulled, named, precision, form)
    return of_recipe(recipes.find(recipe), base_only, precision, form)


def all_finished(precision: str | None, form: str | None) -> list[Subject]:
    """Every finished run that can be scored; the others are named on stderr."""
    runs = [run for run in list_runs() if run.is_finished]
    if not runs:
        raise WrongInput("no run is finished; `make train RECIPE=…` makes one")
    found = []
    for run in runs:
        try:
            found.append(of_run(run, precision, form))
        except WrongInput as error:
            print(f"eval       {run} left out: {error}", file=sys.stderr)
    return found
