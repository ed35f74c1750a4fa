"""What is scored, served, merged or chatted with: a base and an adapter, its precision and prompt.

    subjects.find("smollm2-135m/sentiment_r4")                   a finished run of a recipe
    subjects.find(adapter="runs/hub/someone/some-adapter")       any PEFT folder

An adapter meets the base at the precision that it was trained on, with the prompts that it was
trained on. Where nothing tells the precision, the user must.
"""

import hashlib
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import adapters, models, recipes, runs, sources
from tools.common import WrongInput, shown
from tools.prompts import FORMATS, explain_unscorable
from tools.runs import UNKNOWN, Run, list_runs

# The name of an adapter that FinLoRA published, `<task>_<model>_<bits>_r<rank>…`; one starts with
# its training file. Nothing else tells the precision. They were trained on FinLoRA's prompt without
# a chat template.
FINLORA = re.compile(
    r"(?P<task>[a-z0-9_]+?)(?:_train\.jsonl)?[_-](?:meta-)?(?:llama|mistral|qwen)[\w.-]*?[_-]"
    r"(?P<bits>4bits|8bits|fp16)[_-]r\d+(?:[_-][a-z0-9]+)*",
    re.IGNORECASE,
)
BITS = {"4bits": models.PRECISIONS["nf4"], "8bits": models.PRECISIONS["int8"], "fp16": {}}
CONSTRAINED = "constrained"  # in the names of score files


class NotRenderable(WrongInput):
    """No chat template renders the prompts that an adapter was trained on."""


@dataclass(frozen=True)
class Subject:
    """A base, or a base and its adapter. `config` is Axolotl's, with the precision to score at."""

    name: str
    config: dict[str, Any]
    adapter: Path | None  # a PEFT folder
    folder: Path  # its scores are in `evals` here, those of the base in that of `base_folder`
    base_folder: Path
    task: str | None  # that it was trained for
    prompt_format: str
    prompting: str = ""  # stands for an adapter's own template and tokens; see `with_own_prompts`
    suffix: str = ""  # of the adapter's score files, at a precision other than its own
    shots: int = 0  # worked examples in each prompt, for a base alone
    constrained: bool = False  # answers can only be labels

    @property
    def sides(self) -> list[str]:
        return ["base", "adapter"] if self.adapter else ["base"]

    def file(self, side: str, dataset: str, limit: int | None) -> Path:
        """The score file of a side on a dataset, or on `limit` rows of it."""
        folder, suffix = (self.folder, self.suffix) if side == "adapter" else (self.base_folder, "")
        prompt_format = "" if self.prompt_format == "chat" else self.prompt_format
        constraint = CONSTRAINED if self.constrained else ""
        sample = f"sample{limit}" if limit else ""
        parts = [dataset, suffix, prompt_format, constraint, sample]
        return Run(folder).scores_folder / ("_".join(filter(None, parts)) + ".json")

    def with_own_prompts(self) -> "Subject":
        """The subject with another folder for the base's scores where an adapter from elsewhere
        brings a template or tokens of its own: the base then answers other prompts.

        Needs the base's files.
        """
        mark = ""
        if self.adapter:
            mark = models.find_own_prompting(self.config, self.adapter, self.prompt_format)
        folder = self.base_folder
        if mark:
            folder = folder.with_name(f"{folder.name}_{mark}")
        return replace(self, prompting=mark, base_folder=folder)

    def with_examples(self, shots: int) -> "Subject":
        """The base with so many worked examples in each prompt, without the adapter."""
        folder = self.base_folder
        folder = folder.with_name(f"{folder.name}_{shots}_shots")
        return replace(self, adapter=None, shots=shots, base_folder=folder)

    @property
    def options(self) -> dict[str, Any] | None:
        return self.config.get("chat_template_kwargs")


def of_recipe(
    recipe: recipes.Recipe,
    base_only: bool = False,
    precision: str | None = None,
    form: str | None = None,
) -> Subject:
    config = recipe.config if base_only else recipe.read_trained_config()
    run = recipe.run
    subject = Subject(
        name=recipe.name,
        config=config,
        adapter=None if base_only else run.folder,
        folder=run.folder,
        base_folder=run.folder.parent,
        task=recipe.task,
        prompt_format="" if base_only else run.info.get("prompt_format", ""),
    )
    return choose_precision_and_format(subject, precision, form)


def of_folder(
    folder: Path,
    recipe: recipes.Recipe | None = None,
    precision: str | None = None,
    form: str | None = None,
) -> Subject:
    """Any PEFT adapter. Its base and precision come from the recipe that is named with it, from the
    config that `make train` left beside it, or from its name where FinLoRA published it.
    """
    settings = check_folder(folder)
    folder = folder.resolve()
    run, published = Run(folder), find_published_name(folder)
    is_trained_here = run.config_file.is_file() and run.info_file.is_file()
    is_unknown = run.info.get("precision") == UNKNOWN
    if recipe:
        config = recipe.config
        note_other_base(settings.base, recipe)
    elif is_trained_here:
        config = run.config
    else:
        path = folder / adapters.CONFIG
        if not settings.base:
            raise WrongInput(f"{shown(path)} names no base; RECIPE=… with the same base does")
        base = settings.base.rstrip("/") or "/"
        row = recipes.find_base(base)[1]
        config = {"base_model": row.get("base_model") or row.get("hub") or base}
        config |= row.get("settings") or {}
        config |= BITS[published["bits"].lower()] if published else {}
        is_unknown = not published
    base = str(config["base_model"])
    if is_unknown and not recipe and not models.published_precision(base):
        if not precision:
            raise WrongInput(
                f"ADAPTER={folder} does not say at which precision it was trained; PRECISION= is "
                f"one of {', '.join(models.PRECISIONS)}"
            )
        if precision in models.PRECISIONS:  # the one that it was trained on
            config = models.at(config, precision)
    task = recipes.find_task(config)
    if published and not recipe and published["task"].lower() in sources.tables()["tasks"]:
        task = published["task"].lower()
    prompt_format = run.info.get("prompt_format", "")
    if published and not is_trained_here:
        prompt_format = prompt_format or "finlora"
        if not recipe:
            print(
                f"note       {shown(folder)} is named like an adapter of FinLoRA's: "
                f"{published['bits']}, [INST] prompts; PRECISION= and PROMPT_FORMAT= override that",
                file=sys.stderr,
            )
    model = recipes.find_base(base)[0] or re.sub(r"\W+", "-", base).strip("-")
    inside = folder.is_relative_to(runs.RUNS)
    name = run.name if inside else (published or [folder.name])[0]
    place = runs.RUNS / model
    # Folders of one name, such as checkpoint-100, are different adapters.
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    scores = folder if inside else place / f"adapter_{name}_{mark}"
    subject = Subject(name, config, folder, scores, place, task, prompt_format)
    return choose_precision_and_format(subject, precision, form)


def note_other_base(trained_on: str | None, recipe: recipes.Recipe) -> None:
    """Prints where a recipe puts an adapter on another base than it was trained on."""
    base = str(recipe.config["base_model"])
    own, named = recipes.find_base(trained_on or base)[0], recipes.find_base(base)[0]
    if trained_on and trained_on != base and (own != named or own is None):
        print(
            f"note       the adapter was trained on {trained_on}; RECIPE={recipe.name} puts it on "
            f"{base}",
            file=sys.stderr,
        )


def check_folder(folder: Path) -> adapters.Settings:
    """The settings of an adapter; raises WrongInput unless PEFT could load it onto some base."""
    if not (folder / adapters.CONFIG).is_file():
        places = (folder.glob(f"{depth}/{adapters.CONFIG}") for depth in ("*", "*/*"))
        inside = sorted(path.parent for paths in places for path in paths)
        hint = f"; {shown(inside[0])} is one" if inside else ""
        raise WrongInput(
            f"ADAPTER={folder} has no {adapters.CONFIG}; a PEFT folder is needed{hint}"
        )
    if not (folder / adapters.WEIGHTS).is_file():
        advice = "where it is adapter_model.bin, PEFT's save_pretrained writes it again"
        if (folder / "adapters.safetensors").is_file():
            advice = "this is an MLX adapter and no PEFT folder"
        raise WrongInput(
            f"ADAPTER={folder} has no {adapters.WEIGHTS}, and no other format is read; {advice}"
        )
    return adapters.inspect(folder)


def find_published_name(folder: Path) -> re.Match[str] | None:
    """FinLoRA's name of an adapter: of its folder, or of a repository in the Hub's cache."""
    cached = (part for part in reversed(folder.parts) if part.startswith("models--"))
    names = [folder.name, next(cached, "").rpartition("--")[2]]
    return next(filter(None, map(FINLORA.fullmatch, names)), None)


def choose_precision_and_format(
    subject: Subject, precision: str | None, form: str | None
) -> Subject:
    """A subject at the precision and prompt format that a user asks for, else at its own.

    On entry `base_folder` is the parent of the base's folder.
    """
    config = subject.config
    if precision and precision not in models.PRECISIONS:
        names = ", ".join(models.PRECISIONS)
        raise WrongInput(f'unknown PRECISION "{precision}"; there are {names}')
    form = form or subject.prompt_format
    if form and form not in FORMATS:
        raise WrongInput(f'unknown PROMPT_FORMAT "{form}"; there are {", ".join(FORMATS)}')
    if not form and (reason := explain_unscorable(config)):
        raise NotRenderable(
            f"{subject.name}: {reason}; PROMPT_FORMAT=bare scores it on prompts without a template"
        )
    return replace(
        subject,
        config=models.at(config, precision) if precision else config,
        base_folder=subject.base_folder / f"base_{precision or models.precision(config)}",
        prompt_format=form or "chat",
        suffix=precision if precision and precision != models.precision(config) else "",
    )


def of_run(run: Run, precision: str | None, form: str | None) -> Subject:
    """A finished run: of its recipe where that is known, else as an adapter."""
    recipe = None
    with suppress(WrongInput):
        recipe = recipes.find(str(run.info.get("recipe") or ""))
    if recipe and recipe.run.folder == run.folder.resolve():
        return of_recipe(recipe, False, precision, form)
    return of_folder(run.folder, None, precision, form)


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
    """Every finished run that can be scored; names the others on stderr."""
    finished = [run for run in list_runs() if run.is_finished]
    if not finished:
        raise WrongInput("no run is finished; `make train RECIPE=…` makes one")
    subjects = []
    for run in finished:
        try:
            subjects.append(of_run(run, precision, form))
        except WrongInput as error:
            print(f"eval       {run} left out: {error}", file=sys.stderr)
    return subjects
