"""What must hold before a training starts: hardware, data, options, disk space."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools import prompts, recipes, smollm2, sources
from tools.common import ROOT, JobFailed, WrongInput, digest, shown
from tools.data.formats import open_rows
from tools.train import hardware, profiles, without_gpu
from tools.train.memory import NO_TARGETS
from tools.train.tokens import read_lines

FORCED = "(FORCE=1 tries all the same)"
DISK = 2e9  # bytes that must be free: checkpoints, prepared data, log
FULL = 1e6  # bytes under which a disk is full
# Endings of data files that Axolotl reads; another path that does not exist is a name on the Hub.
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow"}
# Keys of Axolotl whose adapter or base this project would load otherwise than it was trained.
UNLOADABLE = (
    *("overrides_of_model_config", "overrides_of_model_kwargs", "unfrozen_parameters"),
    *("lora_target_parameters", "peft_trainable_token_indices", "peft_layer_replication"),
    "peft_ensure_weight_tying",
)
# Any of them names what an adapter adapts.
TARGETS = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")
NOT_LOADED = "the run would be scored without it"
# Names of embeddings and heads, which can be trained whole.
ENDS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
# Ways to train that leave no adapter.
OTHER_TRAININGS = ("rl", "reward_model", "process_reward_model", "relora", "pretraining_dataset")
NO_ADAPTER = "a run is an adapter that supervised fine-tuning made"
# Options of a dataset that give Axolotl other turns than its file has.
MAPPINGS = ("message_property_mappings", "message_field_role", "message_field_content", "roles")


def require_hardware(
    recipe: recipes.Recipe, here: hardware.Host, profile: str = "", advice: str = FORCED
) -> str:
    """What a catalogue recipe takes on this machine's CPUs, in words; "" on GPUs.

    Raises WrongInput, before any download, where it cannot run here: its plan does not fit, or it
    would take more than a week. `advice` ends the message.
    """
    if recipe.name not in recipes.list_names():
        return ""
    if here.gpus:
        config = recipe.config | profiles.read_profiles(profile)
        # The planner does not know how FSDP divides a base.
        fits = config.get("fsdp_config") or profiles.fits_gpus(config, here, len(here.gpus))
        if fits or fits is None:  # None: it cannot be planned
            return ""
        raise WrongInput(f"{explain_need(recipe)}; here: {here}. {advice}".rstrip())
    needed = without_gpu.estimate_on_cpu(recipe, here)
    takes = f"up to {needed} on {here}, at the speed of this moment"
    if needed.memory > here.memory or (needed.hours or 0) > without_gpu.LONGEST_HOURS:
        small = f"{smollm2.FOLDER.name}/{recipe.name.partition('/')[2]}"
        runs = small in recipes.list_names() and small != recipe.name
        example = f"What runs here: make train RECIPE={small} " if runs else ""
        raise WrongInput(
            f"{explain_need(recipe)}; it would take {takes}. {example}{advice}".rstrip()
        )
    return takes


def explain_need(recipe: recipes.Recipe) -> str:
    """The GPU that a recipe is planned for, in words."""
    planned = without_gpu.plan_recipe(recipe, recipe.config)
    return f"{recipe.name} needs a CUDA GPU with {planned['memory']['peak'] / 2**30:.0f} GiB"


def find_data_file(recipe: recipes.Recipe, name: str) -> Path | None:
    """A recipe's data file, None for a dataset of the Hub; raises WrongInput for a missing file."""
    if "://" in name:  # Axolotl downloads it
        return None
    path = (ROOT / name).resolve()
    if path.is_file():
        return path
    if path.is_dir():
        raise WrongInput(f"{shown(path)} is a folder; name a file of chat rows")
    if path.suffix not in DATA_FILES:
        return None
    beside = recipe.path and (recipe.path.parent / name).resolve()
    if beside and beside.is_file():
        raise WrongInput(
            f"{shown(path)} is not there: paths in a recipe start at {ROOT}; "
            f"for the file beside the recipe write {beside}"
        )
    task = f" TASKS={recipe.task}" if recipe.task else ""
    raise WrongInput(f"{shown(path)} is not there; `make data{task}` makes it")


def describe_data(recipe: recipes.Recipe) -> list[dict[str, Any]]:
    """Path, split, digest, rows and origin of each file that the recipe trains or validates on.

    Raises WrongInput where a file is missing or the validation file is not the one held out.
    """
    config, _ = sources.drop_missing_validation(recipe.config)
    validation = config.get("test_datasets") or []
    validation_paths = [(ROOT / entry["path"]).resolve() for entry in validation]
    sides = {"train": config["datasets"], "validation": validation}
    splits = [(entry["path"], split) for split, entries in sides.items() for entry in entries]
    files = []
    for name, split in splits:
        path = find_data_file(recipe, name)
        if not path:
            continue
        content = sources.manifest(path)
        files.append(
            {
                "path": name,
                "split": split,
                "sha256": content["sha256"],
                "rows": count_rows(path, content["rows"]),
                "from": content.get("from"),
                "source": content["source"],
                "label_check": (content.get("label_check") or {}).get("text"),
                **{key: content[key] for key in ("in_place_of",) if key in content},
            }
        )
        held_out = content.get("validation") or {}
        other = path.parent / str(held_out.get("file"))
        is_same = other.is_file() and digest(other) == held_out["sha256"]
        if other in validation_paths and not is_same:
            raise WrongInput(
                f"{shown(other)} is not what was held out of {shown(path)}; `make data` makes both"
            )
    return files


def count_rows(path: Path, lines: int) -> int:
    """The rows of a data file, which are its lines in JSONL and text."""
    if path.suffix not in (".jsonl", ".txt"):
        with suppress(WrongInput):  # Axolotl reads files that this project refuses
            return sum(1 for _ in open_rows(str(path)))
    return lines


def refuse_unusable(config: dict[str, Any], where: str) -> None:
    """Raises WrongInput, before anything loads, for a config whose run this project cannot use."""
    adapter, start = config.get("adapter"), config.get("peft_init_lora_weights", True)
    loftq = ((config.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits")
    base, configured = config.get("base_model"), config.get("base_model_config")
    saved = config.get("lora_modules_to_save") or []
    names = [saved] if isinstance(saved, str) else saved
    layers = [name for name in map(str, names) if name.rpartition(".")[2] not in ENDS]
    revision = config.get("revision_of_model") or "main"
    missing = [jinja for _, jinja in prompts.templates(config) if jinja and is_missing_file(jinja)]
    deepspeed = config.get("deepspeed")
    refusals = [
        (
            config.get("tokenizer_use_mistral_common"),
            "tokenizer_use_mistral_common is not supported: scoring loads tokenizers with "
            "transformers alone; `axolotl train` takes it",
        ),
        (
            adapter not in ("lora", "qlora"),
            f"adapter must be lora or qlora, not {adapter}: a run is an adapter and its base; "
            "`axolotl train` trains without one",
        ),
        (
            adapter == "lora" and config.get("load_in_4bit"),
            "with adapter: lora Axolotl leaves a load_in_4bit base unquantized; write adapter: "
            "qlora, or load_in_4bit: false",
        ),
        (
            loftq or (isinstance(start, str) and start not in ("gaussian", "orthogonal")),
            f"{'loftq_config' if loftq else f'peft_init_lora_weights: {start}'} changes the base's "
            "weights, which a run does not keep; leave it out, or use gaussian",
        ),
        (
            config.get("tokens") and not saved,
            "the embeddings of new tokens must be trained and saved; add lora_modules_to_save: "
            "[embed_tokens, lm_head]",
        ),
        (
            layers,
            f"lora_modules_to_save names {', '.join(layers)}; only embeddings and head can be "
            "saved whole",
        ),
        (
            configured and configured != base,
            f"base_model_config is {configured} and base_model {base}; scoring loads the base with "
            "its own config",
        ),
        (not any(map(config.get, TARGETS)), NO_TARGETS),
        (
            missing,
            f"chat_template_jinja: {(missing or [''])[0]} is no file here, and no Jinja template",
        ),
        (
            isinstance(deepspeed, str) and not os.path.isfile(ROOT / deepspeed),
            f"deepspeed: {deepspeed} is not there; without that key PROFILE=zero2 has one",
        ),
        (
            revision != "main",
            "revision_of_model is not supported: scoring loads the main revision; base_model may "
            f"be the folder that `.venv/bin/hf download {base} --revision … --local-dir …` makes",
        ),
    ]
    for keys, reason in ((OTHER_TRAININGS, NO_ADAPTER), (UNLOADABLE, NOT_LOADED)):
        refusals += [
            (config.get(key), f"{key} is not supported: {reason}; `axolotl train` takes it")
            for key in keys
        ]
    for is_wrong, text in refusals:
        if is_wrong:
            raise WrongInput(f"{where}: {text}")


def is_missing_file(jinja: str) -> bool:
    """Whether a `chat_template_jinja` can only be the path of a file, which is not there."""
    # Not Path's is_file, which raises for a name that is too long.
    return "{" not in jinja and not os.path.isfile(ROOT / jinja)


def name_metric(config: dict[str, Any]) -> str:
    """The metric other than the loss that finds a config's best checkpoint; "" without one."""
    metric = str(config.get("metric_for_best_model") or "loss").removeprefix("eval_")
    return "" if metric == "loss" else metric


def refuse_unscorable(config: dict[str, Any], where: str, processes: int) -> None:
    """Raises WrongInput where the metric of `metric_for_best_model` cannot be computed."""
    if not (metric := name_metric(config)):
        return
    from evals.validation import explain_unavailable, list_task_metrics

    place = f"{where}: metric_for_best_model: {config['metric_for_best_model']}"
    if not (metrics := list_task_metrics(recipes.find_task(config))):
        raise WrongInput(f"{place}: the rows are of no task with a metric; eval_loss is possible")
    if metric not in metrics:
        names = ", ".join(f"eval_{name}" for name in ("loss", *metrics))
        raise WrongInput(f"{place}: there are {names}")
    if reason := explain_unavailable(metric):
        raise WrongInput(f"{place}: {reason}, or take eval_loss")
    if processes > 1:
        raise WrongInput(f"{place} needs one process; train with NPROC=1, or by eval_loss")
    if not config.get("greater_is_better"):
        raise WrongInput(f"{place} needs greater_is_better: true")
    if not config.get("test_datasets"):
        raise WrongInput(f"{place} needs validation rows under test_datasets")


def refuse_unrenderable(recipe: recipes.Recipe) -> None:
    """Raises WrongInput where the chat template refuses or leaves out turns of the data.

    One row of each order of roles is rendered; of a user's turn and its answer, only where the
    template is the config's own.
    """
    from tools.models import load_tokenizer

    for entry in recipe.config["datasets"]:
        path = (ROOT / entry["path"]).resolve()
        if entry.get("type") != "chat_template" or path.suffix != ".jsonl" or not path.is_file():
            continue
        if any(map(entry.get, MAPPINGS)) or entry.get("field_messages") not in (None, "messages"):
            continue
        is_own = prompts.has_own_template(recipe.config)
        shapes = list(prompts.pick_shapes(filter(is_chat_row, read_lines(path)), is_own))
        tokenizer = load_tokenizer(recipe.config) if shapes else None
        for number, row in shapes:
            options = recipe.config.get("chat_template_kwargs")
            if reason := prompts.explain_unrenderable(tokenizer, row, options):
                advice = "choose another base, or write that turn into a user's turn"
                advice = f"{recipe.config['base_model']} cannot learn such rows; {advice}"
                advice = "mend chat_template_jinja" if is_own else advice
                raise WrongInput(f"{shown(path)}, row {number}: {reason}. {advice}")


def is_chat_row(row: Any) -> bool:
    """Whether a row has turns under the names that this project writes."""
    turns = row.get("messages") if isinstance(row, dict) else None
    return isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content") or "", str)
        for turn in turns
    )


def require_space(run: Path) -> None:
    """Raises JobFailed where the disk of this project, or of a run elsewhere, is nearly full."""
    while not run.exists():
        run = run.parent
    for place, needed in ((ROOT, DISK), (run, FULL)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise JobFailed(
                f"{free / 1e9:.1f} GB are free on the disk of {shown(place)} and a training needs "
                f"{DISK / 1e9:.0f}; make room there, or name another output_dir"
            )
