"""Measures a recipe: trains it with several seeds, scores it and its base, and writes the result.

    python -m tools verify smollm2-135m/sentiment_r4 [--seeds 3] [--shots 3] [--force]

The result, results/<model>/<recipe>/<device>.json (`evals.results.Result`), is the evidence that
pages show. The seeds are the recipe's own and the next ones; a run that `make train` finished with
the same recipe and data counts as its seed. An interrupted job goes on at the seed, step and batch
at which it was, and a finished one is left alone while recipe and data are the same. What is
measured again has at least the seeds and datasets of the evidence that it replaces, on the same
rows. All seeds are trained with the same versions of packages.
"""

import gc
import re
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals import report, results, results_page, run
from evals.examples import choose_examples
from evals.results import ChatRows, DatasetResult, Result, TrainingResult
from tools import models, recipes, sources, subjects
from tools.common import ROOT, WrongInput, format_table, shown
from tools.data import convert
from tools.recipes import Recipe
from tools.train import hardware, launch, profiles
from tools.train.checks import describe_data, refuse_unusable, require_space
from tools.train.machines import Machines
from tools.train.profiles import Choice

SHOTS = 3  # worked examples, where neither the request nor an earlier result says how many
# What decides the result of a training and a scoring; pages and recipes' headers change with it.
DECISIVE = ("tools", "evals", "recipes/matrix.yaml", "recipes/profiles", "data/sources.yaml")


@dataclass(frozen=True)
class Verification:
    """How much is measured, and where it is trained."""

    seeds: int = 3
    # Worked examples in the prompts of the base, which is scored with and without. None: those of
    # the result that there is, or SHOTS.
    shots: int | None = None
    choice: Choice = Choice()
    force: bool = False
    permits_examples: bool = False  # data/sample, which is no evidence
    datasets: tuple[str, ...] = ()  # that are scored; all of the task where there are none


def announce(text: str) -> None:
    print(f"verify     {text}", flush=True)


def verify(name: str, request: Verification) -> None:
    """Measures a recipe and writes its result.

    Raises WrongInput, before anything is trained, for a recipe that has no name or task, and for
    data that is no evidence.
    """
    recipe, commit = find_named_recipe(name), describe_commit()
    prepare_data(str(recipe.task))
    datasets = run.choose_datasets(recipe.task, list(request.datasets))
    data = list_data(recipe, datasets)
    is_of_examples = refuse_examples(recipe, data, request.permits_examples)
    here = hardware.detect_host()
    _, processes, _ = profiles.choose(here, request.choice, 1)
    device = here.describe_machine(processes)
    if not request.force and is_trained(recipe, processes):
        # Whose time and memory the result states: under `taskset` this call may have other cores.
        device = recipe.run.info.get("machine", device)
    device = results.clean_text(device)
    path = results.locate_result(recipe.name, device, is_of_examples)
    previous = path.with_name(f"{path.name}.previous")
    if request.shots:
        refuse_impossible_examples(datasets, request.shots)
    if request.shots is None:
        request = replace(request, shots=choose_shots(path, previous))
    if path.is_file() and not request.force:
        before = results.load_result(path)
        reason = explain_unfinished(before, data, datasets, request)
        if not reason:
            announce(f"{shown(path)} is of this recipe and data (FORCE=1 measures again)")
            return
        if not results.explain_stale(before):
            datasets, request = include_measured(before, datasets, request)
            refuse_other_rows(before, list_data(recipe, datasets), datasets)
        announce(f"{shown(path)} is written again: {reason}")
    recipes_of_seeds = {
        seed: recipe.with_seed(seed) for seed in range(recipe.seed, recipe.seed + request.seeds)
    }
    outdated = list_outdated(list(recipes_of_seeds.values()), processes, request.force)
    if outdated or request.force:
        # While nothing is moved yet.
        require_space(recipe.run.folder)
        launch.choose_settings(recipe, request.choice, Machines(), is_new=not request.force)
    else:
        refuse_unusable(recipe.config, recipe.where)
    set_aside(outdated)
    if path.is_file() and request.force:
        path.replace(previous)
        announce(f"measures again; the old result stays in {shown(previous)} until then")
    for number, (seed, seeded) in enumerate(recipes_of_seeds.items(), 1):
        announce(f"{recipe.name}, seed {seed}, {number} of {request.seeds}")
        if is_trained(seeded, processes):
            announce(f"trained before: {seeded.run}")
        else:
            launch.train(seeded, request.choice, Machines(), request.force)
    scores = {seed: score_seed(seeded, datasets) for seed, seeded in recipes_of_seeds.items()}
    shots = request.shots or 0
    with_examples = score_base_with_examples(recipe, datasets, shots)
    measured = {
        dataset: join_scores(
            {seed: files[dataset] for seed, files in scores.items()}, with_examples.get(dataset)
        )
        for dataset in datasets
    }
    infos = {seed: seeded.run.info for seed, seeded in recipes_of_seeds.items()}
    result = build_result(recipe, infos, device, commit, shots, measured)
    results.write_result(result)
    previous.unlink(missing_ok=True)
    print_summary(result)


def refuse_impossible_examples(datasets: list[str], shots: int) -> None:
    """Raises WrongInput where the base cannot be scored with so many examples on any dataset."""
    errors = []
    for dataset in datasets:
        try:
            choose_examples(run.find_rows(dataset), shots)
        except WrongInput as error:
            errors.append(str(error))
    if len(errors) == len(datasets):
        raise WrongInput(f"SHOTS={shots}: {errors[0]}; SHOTS=0 measures without examples")


def choose_shots(*files: Path) -> int:
    """The worked examples of the first of these results that has any; SHOTS without one."""
    for file in files:
        with suppress(OSError, ValueError):  # missing, or damaged
            if shots := Result.model_validate_json(file.read_bytes()).shots:
                return shots
    return SHOTS


def find_named_recipe(name: str) -> Recipe:
    """The recipe that a result can be filed under."""
    recipe = recipes.find(name)
    if recipe.name not in recipes.list_aliases():
        raise WrongInput(
            f"{recipe.where}: a result is filed under the name of a recipe, and this file has "
            "none; put it into recipes/local/<model>/"
        )
    if not re.fullmatch(results.NAME, recipe.name):
        raise WrongInput(
            f"{recipe.where}: the name of a recipe with a result has letters, digits and ._+- alone"
        )
    if recipe.task not in sources.tables()["tasks"]:
        raise WrongInput(
            f"{recipe.where}: it trains on rows of no task, so it cannot be scored; `make new` "
            "makes a task of your rows"
        )
    return recipe


# ---- data


def prepare_data(task: str) -> None:
    """Converts the rows of a task where they are missing, or only the examples were converted."""
    spec = sources.tables()["tasks"][task]
    train, tests = sources.train_path(task), [sources.test_path(name) for name in spec["eval"]]
    present = [path for path in (train, *tests) if path.is_file()]
    is_complete = train in present and len(present) > 1
    has_examples = any(sources.manifest(path).get("from") == results.EXAMPLES for path in present)
    folders = {sources.source_folder(name) for name in (*spec.get("parts", ()), task)}
    if not is_complete or (has_examples and folders != {sources.SAMPLE}):
        convert.convert_tasks([task])


def list_data(recipe: Recipe, datasets: list[str]) -> list[ChatRows]:
    """The rows that a recipe is trained, validated and scored on."""
    files = [ROOT / entry["path"] for entry in describe_data(recipe)]
    tests = dict.fromkeys(map(run.find_rows, datasets))
    return [results.describe_chat_rows(path) for path in (*files, *tests)]


def refuse_examples(recipe: Recipe, data: list[ChatRows], is_permitted: bool) -> bool:
    """Whether rows are those of data/sample; raises WrongInput unless that is permitted."""
    examples = [rows.file for rows in data if rows.place == results.EXAMPLES]
    if examples and not is_permitted:
        raise WrongInput(
            f"{examples[0]} holds this project's examples, which are no evidence: FinLoRA's rows "
            f"are needed (FINLORA_DATA=path/to/FinLoRA, or `make fetch TASKS={recipe.task}`); "
            "EXAMPLES=1 measures the examples, and no page shows that"
        )
    return bool(examples)


def explain_unfinished(
    result: Result, data: list[ChatRows], datasets: list[str], request: Verification
) -> str:
    """Why a result is not the one that is wanted; empty where it is, or where it holds more."""
    if stale := results.explain_stale(result):
        return stale
    if changed := list_other_files(result, data, datasets):
        return f"the data has changed ({', '.join(changed)})"
    if missing := [name for name in datasets if name not in result.datasets]:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} to be scored, too"
    if len(result.trainings) < request.seeds:
        return f"it has {len(result.trainings)} of {request.seeds} seeds"
    if request.shots not in (None, 0, result.shots):
        return f"the base is to be scored with {request.shots} examples"
    return ""


def list_other_files(result: Result, data: list[ChatRows], datasets: list[str]) -> list[str]:
    """The files whose rows are not those of a result; of datasets, those that it has."""
    tested = {name: entry.data for name, entry in result.datasets.items() if name in datasets}
    measured = [*result.training_data, *result.validation_data, *tested.values()]
    new = {run.find_rows(name).name for name in datasets if name not in tested}
    before, now = (
        {rows.file: rows.sha256 for rows in group if rows.file not in new}
        for group in (measured, data)
    )
    return sorted(file for file in before | now if before.get(file) != now.get(file))


def refuse_other_rows(result: Result, data: list[ChatRows], datasets: list[str]) -> None:
    """Raises WrongInput where evidence would be replaced by a measurement on other rows."""
    if changed := list_other_files(result, data, datasets):
        raise WrongInput(
            f"{shown(result.path)} was measured on other rows ({', '.join(changed)}); bring them "
            "back, or replace it by what the rows here give (FORCE=1)"
        )


def include_measured(
    result: Result, datasets: list[str], request: Verification
) -> tuple[list[str], Verification]:
    """Datasets and request with all that a result holds, so that nothing of it is lost.

    Raises WrongInput where rows of one of its datasets are not here.
    """
    every = list(dict.fromkeys([*result.datasets, *datasets]))
    if missing := [name for name in every if not run.find_rows(name).is_file()]:
        raise WrongInput(
            f"{shown(result.path)} holds scores of {', '.join(missing)}, whose rows are not here: "
            "`make data` converts them, and FORCE=1 writes a result without them"
        )
    seeds = max(request.seeds, len(result.trainings))
    return every, replace(request, seeds=seeds, shots=request.shots or result.shots)


# ---- training and scoring


def list_outdated(seeds: list[Recipe], processes: int, force: bool) -> list[Recipe]:
    """The recipes whose finished runs are trained again: all with `force`, else some of a mixture.

    A result states one set of versions. Where seeds are missing, or differ in their versions, those
    that were not trained with the versions installed here count as missing.
    """
    if force:
        return [recipe for recipe in seeds if recipe.run.is_finished]
    trained = [recipe for recipe in seeds if is_trained(recipe, processes)]
    versions = [recipe.run.info["packages"] for recipe in trained]
    if len(trained) == len(seeds) and all(other == versions[0] for other in versions):
        return []
    return [recipe for recipe in trained if recipe.run.info["packages"] != launch.list_packages()]


def set_aside(outdated: list[Recipe]) -> None:
    """Renames the runs of these recipes, all before the first is trained.

    So the same command without FORCE=1 goes on where it is interrupted. Raises JobFailed, and
    renames none, where one of them is being trained.
    """
    with ExitStack() as locks:
        for recipe in outdated:
            locks.enter_context(recipe.run.lock())
        for recipe in outdated:
            aside = recipe.run.move_aside()
            announce(f"trains {recipe.run} again; what was there is in {aside}")


def is_trained(recipe: Recipe, processes: int) -> bool:
    """Whether a finished run has trained this recipe on this data and kind of device."""
    run, gpus = recipe.run, hardware.detect_host().gpus
    info = run.info
    if run.origin_file.is_file():  # pulled: trained elsewhere
        return False
    if not info or not run.is_intact or info.get("recipe_digest") != recipe.digest:
        return False
    before, now = (
        [(Path(entry["path"]).name, entry["sha256"]) for entry in entries]
        for entries in (info["data"], describe_data(recipe))
    )
    device = (gpus[0][0] if gpus else "cpu", processes)
    return before == now and device == (info["device"], info["processes"])


def score_seed(recipe: Recipe, datasets: list[str]) -> report.Files:
    """Scores a run and its base, or what has no score yet; returns the score files."""
    files = run.score_subject(subjects.of_recipe(recipe), run.Request(datasets))
    gc.collect()  # the model, whose parts refer to each other, before the next one is loaded
    return files


def score_base_with_examples(recipe: Recipe, datasets: list[str], shots: int) -> dict[str, Path]:
    """Scores the base with worked examples in its prompts; returns the score files by dataset.

    A dataset whose training rows give too few examples is left out.
    """
    if not shots:
        return {}
    subject = subjects.of_recipe(recipe).with_examples(shots)
    possible = []
    for dataset in datasets:
        try:
            run.identify(subject, "base", dataset, None)
            possible.append(dataset)
        except WrongInput as error:
            announce(f"{dataset}: the base is not scored with examples: {error}")
    files = run.score_subject(subject, run.Request(possible)) if possible else {}
    return {dataset: sides["base"] for dataset, sides in files.items()}


def join_scores(files: dict[int, dict[str, Path]], with_examples: Path | None) -> DatasetResult:
    """What the score files of a dataset say together, by seed and side."""
    base = report.read(next(iter(files.values()))["base"])
    adapters = {seed: report.read(sides["adapter"]) for seed, sides in files.items()}
    return results.measure_dataset(
        base, adapters, report.read(with_examples) if with_examples else None
    )


# ---- result


def build_result(
    recipe: Recipe,
    infos: dict[int, dict[str, Any]],
    device: str,
    commit: tuple[str | None, bool],
    shots: int,
    datasets: dict[str, DatasetResult],
) -> Result:
    """The result of a recipe from the run.json of each seed and the scores by dataset.

    commit: what `describe_commit` said when the measurement began, as hours may have passed.
    """
    info, base = infos[recipe.seed], str(recipe.config["base_model"])
    rows: dict[str, list[ChatRows]] = {"train": [], "validation": []}
    for entry in describe_data(recipe):
        rows[entry["split"]].append(results.describe_chat_rows((ROOT / entry["path"]).resolve()))
    return Result(
        recipe=recipe.name,
        version=recipe.version,
        digest=recipe.digest,
        model=results.clean_text(recipes.find_base(base)[1].get("hub") or Path(base).name),
        precision=models.precision(recipe.config),
        rules=sources.digest_rules(str(recipe.task)),
        scoring=run.SCORING,
        device=device,
        finished=time.strftime("%Y-%m-%d", time.gmtime()),
        commit=commit[0],
        is_changed=commit[1],
        python=info["python"],
        packages=info["packages"],
        shots=shots,
        training_data=rows["train"],
        validation_data=rows["validation"],
        trainings={seed: describe_training(info) for seed, info in infos.items()},
        datasets=datasets,
    )


def describe_training(info: dict[str, Any]) -> TrainingResult:
    return TrainingResult(
        steps=info["steps"],
        seconds=info["seconds"],
        peak_memory_bytes=info["peak_memory_bytes"],
        tokens_per_second=info["tokens_per_second"],
        train_loss=round_loss(info["train_loss"]),
        validation_loss=round_loss(info["last_eval_loss"]),
    )


def round_loss(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)


def describe_commit() -> tuple[str | None, bool]:
    """This project's commit, and whether what trains and scores differs from it.

    (None, False) outside a repository.
    """
    commit = call_git("rev-parse", "HEAD")
    return commit, bool(commit and call_git("status", "--porcelain", "--", *DECISIVE))


def call_git(*arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def print_summary(result: Result) -> None:
    """Prints the scores, and what to do with the result."""
    rows = [("test rows", "metric", "base, %", "adapter, %", "gain, points")]
    for dataset, entry in result.datasets.items():
        metric, scores = entry.main
        cells = (results_page.format_score(scores.base), results_page.format_score(scores.adapter))
        gain = results_page.format_score(scores.gain, signed=True)
        rows.append((f"{dataset}, {entry.rows}", report.title(metric), *cells, gain))
    print(format_table(rows, "<<>>>"))
    announce(f"{shown(result.path)}")
