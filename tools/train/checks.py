"""What must hold before a training starts: hardware, data, options, disk space."""

import shutil
from pathlib import Path
from typing import Any

import orjson

from tools import architectures, prompts, recipes, sources
from tools.common import ROOT, JobFailed, WrongInput, digest, shown
from tools.train import hardware, plan, profiles

DISK = 2e9  # bytes that must be free: checkpoints, prepared data, log
FULL = 1e6  # bytes under which a disk is full
# Endings of data files that Axolotl reads; another path that does not exist is a name on the Hub.
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow"}


def require_hardware(recipe: recipes.Recipe, here: hardware.Host, profile: str = "") -> None:
    """Raises WrongInput, before any download, where a catalogue recipe cannot run here."""
    if recipe.name not in recipes.list_names():
        return
    _, task, method = recipes.split_name(recipe.name)

    def small(model: str) -> bool:
        base = recipes.build_config(f"{model}/{task}_{method}")["base_model"]
        return architectures.find(base).parameters <= hardware.LARGEST_ON_CPU

    if here.gpus:
        content = recipe.config | profiles.read_profiles(profile)
        # The planner knows ZeRO, and not how FSDP divides a base.
        if (
            content.get("fsdp_config")
            or profiles.fits_gpus(content, here, len(here.gpus)) is not False
        ):
            return
    elif small(recipes.split_name(recipe.name)[0]):
        return
    memory = plan.plan(recipe.config, data=ROOT / recipe.config["datasets"][0]["path"])["memory"]
    runs = [f"{model}/{task}_{method}" for model in recipes.read_matrix()["models"] if small(model)]
    example = f"What runs here: make train RECIPE={runs[0]} (" if runs else "("
    raise WrongInput(
        f"{recipe.name} needs a CUDA GPU with {memory['peak'] / 2**30:.0f} GiB; "
        f"here: {here}. {example}FORCE=1 tries all the same)"
    )


def describe_data(recipe: recipes.Recipe) -> list[dict[str, Any]]:
    """Path, split, digest, rows and origin of each file that the recipe trains or validates on."""
    files = []
    config, _ = sources.drop_missing_validation(recipe.config)
    entries = [(entry, "train") for entry in config["datasets"]]
    entries += [(entry, "validation") for entry in config.get("test_datasets") or ()]
    for entry, split in entries:
        path = (ROOT / entry["path"]).resolve()
        if not path.exists() and path.suffix not in DATA_FILES:
            continue  # a dataset of the Hub: Axolotl finds it
        if path.is_dir():
            raise WrongInput(f"{shown(path)} is a folder; name a file of chat rows")
        if not path.is_file():
            beside = recipe.path and (recipe.path.parent / entry["path"]).resolve()
            if beside and beside.is_file():
                raise WrongInput(
                    f"{shown(path)} is not there: paths in a recipe start at {ROOT}; "
                    f"for the file beside the recipe write {beside}"
                )
            task = f" TASKS={recipe.task}" if recipe.task else ""
            raise WrongInput(f"{shown(path)} is not there; `make data{task}` makes it")
        content = sources.manifest(path)
        rows = content.get("rows")
        if rows is None:
            with open(path, "rb") as file:
                rows = sum(1 for line in file if not line.isspace())
        facts = {"path": entry["path"], "split": split, "sha256": content["sha256"], "rows": rows}
        check = (content.get("label_check") or {}).get("text")
        facts |= {"from": content.get("from"), "source": content["source"], "label_check": check}
        files.append(facts)
        held = content.get("validation") or {}
        for other in config.get("test_datasets") or ():
            beside = (ROOT / other["path"]).resolve()
            if (held.get("file"), path.parent) != (beside.name, beside.parent):
                continue
            if not beside.is_file() or digest(beside) != held["sha256"]:
                raise WrongInput(
                    f"{shown(beside)} is not what was held out of {shown(path)}; "
                    "`make data` makes both"
                )
    return files


def refuse_unusable(recipe: recipes.Recipe) -> None:
    """Raises WrongInput, before anything loads, for a config whose run nothing here could use."""
    config, where = recipe.config, recipe.where
    reasons = {
        key: "a run is an adapter that supervised fine-tuning made"
        for key in ("rl", "reward_model", "process_reward_model", "relora", "pretraining_dataset")
    }
    reasons["tokenizer_use_mistral_common"] = "scoring loads tokenizers with transformers alone"
    for key, reason in reasons.items():
        if config.get(key):
            raise WrongInput(f"{where}: {key} is not supported: {reason}; `axolotl train` takes it")
    if config.get("adapter") not in ("lora", "qlora"):
        raise WrongInput(
            f"{where}: adapter must be lora or qlora, not {config.get('adapter')}: a run is an "
            "adapter and its base; `axolotl train` trains without one"
        )
    if config["adapter"] == "lora" and config.get("load_in_4bit"):
        raise WrongInput(
            f"{where}: with adapter: lora Axolotl leaves a load_in_4bit base unquantized; "
            "write adapter: qlora, or load_in_4bit: false"
        )
    start = config.get("peft_init_lora_weights", True)
    loftq = ((config.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits")
    if loftq or (isinstance(start, str) and start not in ("gaussian", "orthogonal")):
        raise WrongInput(
            f"{where}: {'loftq_config' if loftq else f'peft_init_lora_weights: {start}'} changes "
            "the base's weights, which a run does not keep; leave it out, or use gaussian"
        )
    if config.get("tokens") and not config.get("lora_modules_to_save"):
        raise WrongInput(
            f"{where}: the embeddings of new tokens must be trained and saved; "
            "add lora_modules_to_save: [embed_tokens, lm_head]"
        )


def refuse_unrenderable(recipe: recipes.Recipe) -> None:
    """Raises WrongInput where the base's chat template refuses or leaves out turns of the data.

    Of rows with more than a user's turn and its answer, one of each order of roles is rendered.
    """
    from tools.models import load_tokenizer

    for entry in recipe.config["datasets"]:
        path = (ROOT / entry["path"]).resolve()
        if entry.get("type") != "chat_template" or path.suffix != ".jsonl" or not path.is_file():
            continue
        with open(path, "rb") as file:
            rows = (orjson.loads(line) for line in file if not line.isspace())
            shapes = list(prompts.pick_shapes(row for row in rows if is_chat_row(row)))
        tokenizer = load_tokenizer(recipe.config) if shapes else None
        for number, row in shapes:
            options = recipe.config.get("chat_template_kwargs")
            if reason := prompts.explain_unrenderable(tokenizer, row, options):
                raise WrongInput(
                    f"{shown(path)}, row {number}: {reason}. {recipe.config['base_model']} cannot "
                    "learn such rows; choose another base, or write that turn into a user's turn"
                )


def is_chat_row(row: Any) -> bool:
    """Whether a row has turns under the names that this project writes."""
    turns = row.get("messages") if isinstance(row, dict) else None
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns
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
