"""Tries a recipe for two minutes before hours are spent on it.

    python -m tools smoke sentiment_r4 [--profile gpu]

Trains the recipe's own config for a few optimizer steps on the longest rows of its own data, saves
the adapter, loads base and adapter again as scoring does, and lets both answer two rows. Then it
prints the peak memory beside the plan, the speed, the hours of the whole run, and what is missing
on this machine. It runs in runs/.smoke/, which it removes, and leaves a finished run alone.

Where the base is too large for this machine, its tiny twin takes its place: the same kind of model
with a few small layers of random weights. That tests the config, not memory or speed.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import architectures, models, prompts, recipes, smollm2
from tools.common import ROOT, JobFailed, WrongInput, quiet, shown, write_text
from tools.hub_errors import explain_errors
from tools.recipes import Recipe
from tools.runs import Run
from tools.sources import list_training_files
from tools.train import checks, hardware, launch, plan, profiles, twins
from tools.train.checks import is_chat_row
from tools.train.machines import Machines
from tools.train.memory import GIB
from tools.train.tokens import TEMPLATE_TOKENS, list_texts, read_rows
from tools.train.trial import REPLACED

FOLDER = ROOT / "runs" / ".smoke"
TRIAL = Run(FOLDER / "run")
STEPS = 3  # the first one warms up; speed is measured on the others
ANSWER_TOKENS = 8
LARGEST_TRIED = 1e9  # parameters of a base that a trial of minutes loads without a GPU
# Keys of where rows come from.
PLACE = {"ds_type", "split", "name", "shards", "shards_idx", "preprocess_shards"}
CANDIDATES = 512  # rows, the longest by characters, whose tokens are counted


@dataclass(frozen=True)
class LongestRows:
    """The longest rows of a training set, enough for one optimizer step, longest first."""

    entry: dict[str, Any]  # the config's dataset that they are of
    rows: list[Any]
    longest: int  # tokens
    total: int  # rows of the file
    too_long: int  # rows over sequence_len, which Axolotl drops


def say(label: str, text: str) -> None:
    print(f"smoke      {label:<13} {text}", flush=True)


# ---- Rows and model of the trial


def pick_longest(entry: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> LongestRows:
    """The longest rows of a dataset of a config that are not over its sequence_len.

    A set smaller than a batch has its rows repeated.
    """
    path = ROOT / entry["path"]
    rows = read_rows(path)
    if not rows:
        raise WrongInput(f"{shown(path)}: the file is empty; rows are needed")
    most = int(config.get("sequence_len") or 2048)
    count = config.get("micro_batch_size", 1) * config.get("gradient_accumulation_steps", 1)
    by_length = sorted(rows, key=lambda row: -sum(map(len, list_texts(row))))
    candidates = by_length[: max(CANDIDATES, 4 * count)]
    options = config.get("chat_template_kwargs")
    sizes = [count_tokens(tokenizer, row, options) for row in candidates]
    pairs = sorted(zip(sizes, candidates, strict=True), key=lambda pair: -pair[0])
    fitting = [(size, row) for size, row in pairs if size <= most][:count]
    if not fitting:
        raise WrongInput(
            f"{shown(path)}: its longest rows are over the sequence_len of {most} tokens; raise it"
        )
    repeated = [row for _, row in fitting] * math.ceil(count / len(fitting))
    too_long = sum(size > most for size in sizes)
    return LongestRows(entry, repeated[:count], fitting[0][0], len(rows), too_long)


def count_tokens(tokenizer: Any, row: Any, options: dict[str, Any] | None) -> int:
    """Tokens of a row as it is trained; of one that is no chat row about as many."""
    if is_chat_row(row):
        text, template = prompts.render_row(tokenizer, row, options), 0
    else:
        text, template = "\n".join(list_texts(row)), TEMPLATE_TOKENS
    return len(tokenizer.encode(text, add_special_tokens=False)) + template


def make_twin(base: str, folder: Path) -> dict[str, Any]:
    """Writes a tiny random model of the base's kind; returns the options that train it.

    Where config.json and tokenizer of the base are not in the Hub's cache, the twin is a Llama with
    the tokenizer of SmolLM2.
    """
    quiet()
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        smollm2.ensure(str(smollm2.FOLDER))
        tokenizer, config = (
            AutoTokenizer.from_pretrained(smollm2.FOLDER, trust_remote_code=False),
            LlamaConfig(),
        )
    twins.write_twin(config, tokenizer, folder)
    special_tokens = {"pad_token": tokenizer.pad_token or tokenizer.eos_token}
    return {"base_model": str(folder), "special_tokens": special_tokens}


def build_trial(recipe: Recipe, config: dict[str, Any], rows: LongestRows) -> Recipe:
    """A merged config on the longest rows, for STEPS steps, in a folder of its own."""
    train_file, eval_file = FOLDER / "rows.jsonl", FOLDER / "two.jsonl"
    for file, chosen in ((train_file, rows.rows * STEPS), (eval_file, rows.rows[:2])):
        write_text(file, "".join(f"{json.dumps(row, default=str)}\n" for row in chosen))
    entry = {key: value for key, value in rows.entry.items() if key not in PLACE}
    replaced = REPLACED - {"eval_sample_packing"}
    options = {key: value for key, value in config.items() if key not in replaced}
    changes = {
        "datasets": [entry | {"path": str(train_file)}],
        "test_datasets": [entry | {"path": str(eval_file), "split": "train"}],
        "num_epochs": 1,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "logging_steps": 1,
        "load_best_model_at_end": False,  # its metric may need the validation rows of a task
        "output_dir": str(TRIAL.folder),
        "dataset_prepared_path": str(TRIAL.folder / "prepared"),
    }
    return replace(recipe, config=options | changes)


def answer_rows(config: dict[str, Any], rows: list[Any]) -> list[tuple[str, str, str]]:
    """(the base's answer, the adapter's, the key) of chat rows, from files as scoring loads them.

    None of rows in another format, whose prompts Axolotl writes.
    """
    quiet()
    import torch

    model, tokenizer = models.load(config, TRIAL.folder)

    def answer(ids: list[int]) -> str:
        inputs = torch.tensor([ids], device=model.device)
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return tokenizer.decode(output[0][len(ids) :], skip_special_tokens=True).strip()

    answers = []
    for row in filter(is_chat_row, rows):
        (*turns, key), tools = prompts.read_conversation(row)
        ids = prompts.tokens(tokenizer, turns, config.get("chat_template_kwargs"), tools=tools)
        with torch.inference_mode():
            with model.disable_adapter():
                base = answer(ids)
            answers.append((base, answer(ids), key["content"]))
    return answers


# ---- Checks of this machine: each returns what it found, or raises what is missing


def check_base(base: str) -> str:
    """Whether the base's weights can be had."""
    if models.base_folder(base):
        return "on this machine"
    from huggingface_hub import auth_check

    with explain_errors(f"the base {base}"):
        auth_check(base)
    return "on the Hub; the first run downloads it"


def check_kernels(host: hardware.Host) -> str:
    """Whether bitsandbytes' own kernels load."""
    quiet()
    import bitsandbytes.cextension as extension

    device = "GPU" if host.gpus else "CPU"
    if "Error" in type(extension.lib).__name__:
        raise JobFailed(f"bitsandbytes' kernels do not load for this {device}")
    return f"bitsandbytes' kernels load ({device})"


def check_disk(base: str, parameters: int) -> str:
    """Free space against what base, checkpoints and adapter take."""
    needed = checks.DISK + (0 if (ROOT / base).is_dir() else 2 * parameters)
    free = shutil.disk_usage(ROOT).free
    text = f"{free / 1e9:.0f} GB free, about {needed / 1e9:.0f} GB needed"
    if free < needed:
        raise JobFailed(text)
    return text


def count_parameters(base: str) -> int:
    """Parameters of a base; 0 where nothing describes its architecture."""
    try:
        return architectures.find(base).parameters
    except WrongInput:
        return 0


# ---- The trial


def report_sizes(config: dict[str, Any], info: dict[str, Any], is_twin: bool) -> None:
    """Prints memory, speed and the hours of the whole recipe; of a twin only what is planned."""
    try:
        planned = plan.plan(config, data=list_training_files(config))
    except WrongInput as error:
        say("plan", f"none: {error}")
        return
    peak = f"{planned['memory']['peak'] / GIB:.1f} GiB planned for a GPU"
    if is_twin:
        say("plan", f"{peak}; `make plan` says more")
        return
    note = "; on a CPU Python and its libraries count too" if info["device"] == "cpu" else ""
    say("peak memory", f"{info['peak_memory_bytes'] / GIB:.1f} GiB ({peak}{note})")
    first, *_, last = TRIAL.losses()
    seconds = max(last["seconds"] - first["seconds"], 0.01)  # they are rounded to hundredths
    speed = (last["real_tokens"] - first["real_tokens"]) / seconds
    say("speed", f"{speed:,.0f} tokens/s on the longest rows")
    if planned["tokens"] is None:
        say("whole run", "not planned: some rows are on the Hub")
        return
    hours = planned["tokens"] / speed / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    whole = f"{planned['steps']:,} steps on {planned['rows']:,} rows"
    say("whole run", f"{whole}, about {time} without evaluation")


def try_recipe(recipe: Recipe, config: dict[str, Any], profile: str, is_twin: bool) -> None:
    """Trains a recipe's merged config, or its twin, for a few steps and prints the results."""
    checks.describe_data(recipe)
    entries = [entry for entry in config["datasets"] if (ROOT / entry["path"]).is_file()]
    if not entries:
        raise WrongInput(f"{recipe.where}: a trial needs a file of rows; these are on the Hub")
    if is_twin:
        config = config | make_twin(config["base_model"], FOLDER / "twin")
        say("twin", "the base is too large for this machine; a tiny random model stands in")
    tokenizer = models.load_tokenizer(config)
    picked = [pick_longest(entry, config, tokenizer) for entry in entries]
    rows = max(picked, key=lambda rows: rows.longest)
    say("rows", f"the {len(rows.rows)} longest of {rows.total:,}: {rows.longest} tokens")
    if rows.too_long:
        say("", f"{rows.too_long} rows are over sequence_len; Axolotl drops them")
    trial = build_trial(recipe, config, rows)
    info = launch.execute(trial, trial.config, profile, True, Machines())
    first, *_, last = TRIAL.losses()
    say("trains", f"{STEPS} steps, loss {first['loss']:.3f} to {last['loss']:.3f}")
    say("evaluates", f"two rows, loss {info['last_eval_loss']:.3f}")
    answers = answer_rows(trial.config, rows.rows[:2])
    megabytes = TRIAL.adapter_file.stat().st_size / 1e6
    say("saves, loads", f"adapter of {megabytes:.1f} MB, at {models.precision(trial.config)}")
    for base, adapter, key in answers:
        say("answers", f"base {base[:24]!r}, adapter {adapter[:24]!r}, key {key[:24]!r}")
    report_sizes(recipe.config, info, is_twin)


def run(name: str, profile: str | None) -> None:
    """Tries a recipe and prints what it took; raises JobFailed with what is missing here."""
    recipe = recipes.find(name)
    recipes.validate(recipe.config, recipe.where)
    host, base = hardware.detect_host(), str(recipe.config["base_model"])
    profile, _, reason = profiles.choose(host, profiles.Choice(profile, 1), 1)
    say("recipe", f"{recipe.name}, profile {profile} ({reason})")
    parameters = count_parameters(base)
    is_twin = not host.gpus and parameters > LARGEST_TRIED
    smollm2.ensure(base)
    if not is_twin:
        check_base(base)
    config = profiles.merge_config(recipe, profiles.Choice(profile), host)
    with Run(FOLDER).lock():  # two trials at once would remove each other's files
        checks.require_space(FOLDER)
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        try_recipe(recipe, config, profile, is_twin)
        shutil.rmtree(FOLDER)  # a trial that failed keeps its log
    say("attention", profiles.explain_settings(config, host, 1)["attention"])
    missing = []
    for label, check, arguments in (
        ("base", check_base, (base,)),
        ("kernels", check_kernels, (host,)),
        ("disk", check_disk, (base, parameters)),
    ):
        try:
            say(label, check(*arguments))
        except (WrongInput, JobFailed) as error:
            say(label, f"NOT READY: {error}")
            missing.append(f"{label}: {error}")
    if missing:
        raise JobFailed("; ".join(missing))
    say("ready", f"make train RECIPE={recipe.name}")
