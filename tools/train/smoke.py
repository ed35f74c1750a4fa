"""Tries a recipe for two minutes before hours are spent on it.

    python -m tools smoke sentiment_r4 [--profile gpu]

Trains the recipe's own config for a few optimizer steps on the longest rows of its own data, saves
the adapter, loads base and adapter again as scoring does, and lets both answer two rows. Then it
prints the peak memory beside the plan, the speed, the hours of the whole run, and what would not
have worked. Nothing of it stays: it runs in runs/.smoke/, and a finished run is not touched.

Where the base is too large for this machine, its tiny twin takes its place: the same kind of model
and recipe with a few small layers of random weights. That tests the config, not memory or speed.
"""

import json
import math
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tools import architectures, models, prompts, recipes, smollm2
from tools.common import ROOT, JobFailed, WrongInput, quiet, shown
from tools.data import lengths
from tools.runs import Run
from tools.train import checks, hardware, launch, machines, plan, profiles
from tools.train.memory import GIB

FOLDER = ROOT / "runs" / ".smoke"
TRIAL = Run(FOLDER / "run")
STEPS = 3  # the first one warms up; speed is measured on the others
ANSWER_TOKENS = 8
CANDIDATES = 512  # rows, the longest by characters, whose tokens are counted
# The sizes of a twin, as transformers' configs name them.
TWIN = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TWIN |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class LongestRows:
    """The longest rows of a training file, enough for one optimizer step, longest first."""

    lines: list[bytes]
    longest: int  # tokens
    total_rows: int
    mean: float  # tokens of a row
    too_long: int  # rows over sequence_len, which Axolotl drops


class Check(NamedTuple):
    text: str
    is_ready: bool = True


def say(label: str, text: str) -> None:
    print(f"smoke      {label:<13} {text}", flush=True)


# ---- Rows and model of the trial


def load_counter(base: str) -> lengths.Lengths:
    """The counter of a base's tokens; downloads the tokenizer where it is not here."""
    counter = lengths.load(base)
    if counter is None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        counter = lengths.load(base)
    if counter is None:
        raise WrongInput(f"{base} has no tokenizer that transformers reads")
    return counter


def count_row_tokens(counter: lengths.Lengths, lines: list[bytes]) -> list[int]:
    """Tokens of each chat row, rendered with the chat template."""
    return [sum(sizes) for sizes in counter.count(lines)]


def pick_longest(path: Path, config: dict[str, Any], counter: lengths.Lengths) -> LongestRows:
    """The longest rows of a chat file that are not over the recipe's sequence_len."""
    with open(path, "rb") as file:
        lines = [line for line in file if not line.isspace()]
    most = int(config.get("sequence_len") or 2048)
    count = config.get("micro_batch_size", 1) * config.get("gradient_accumulation_steps", 1)
    candidates = sorted(lines, key=len, reverse=True)[: max(CANDIDATES, 4 * count)]
    sizes = count_row_tokens(counter, candidates)
    pairs = sorted(zip(sizes, candidates, strict=True), key=lambda pair: -pair[0])
    fitting = [(size, line) for size, line in pairs if size <= most][:count]
    if not fitting:
        raise WrongInput(
            f"{shown(path)}: its longest rows are over the sequence_len of {most} tokens; raise it"
        )
    repeats = math.ceil(count / len(fitting))  # more than one for a file smaller than a batch
    sample = lines[:: max(1, len(lines) // CANDIDATES)]
    return LongestRows(
        lines=([line for _, line in fitting] * repeats)[:count],
        longest=fitting[0][0],
        total_rows=len(lines),
        mean=statistics.mean(count_row_tokens(counter, sample)),
        too_long=sum(size > most for size in sizes),
    )


def make_twin(base: str, folder: Path) -> None:
    """Writes a tiny random model of the base's kind, with the base's tokenizer where it is here.

    The architecture is the base's own config.json where the Hub's cache has it, else a Llama with
    the base's shape of attention; the tokenizer is SmolLM2's where the base's is not here.
    """
    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError):
        smollm2.ensure(str(smollm2.FOLDER))
        tokenizer = AutoTokenizer.from_pretrained(smollm2.FOLDER)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = TWIN | ids | {"vocab_size": len(tokenizer)}
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        config = getattr(config, "text_config", config)
        config.update({key: value for key, value in sizes.items() if hasattr(config, key)})
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-TWIN["num_hidden_layers"] :]
    except (OSError, ValueError):
        config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_trial(recipe: recipes.Recipe, rows: LongestRows, twin: Path | None) -> recipes.Recipe:
    """The recipe on the longest rows, for STEPS steps, in a folder of its own."""
    train_file, eval_file = FOLDER / "rows.jsonl", FOLDER / "two.jsonl"
    FOLDER.mkdir(parents=True, exist_ok=True)
    train_file.write_bytes(b"".join(rows.lines * STEPS))
    eval_file.write_bytes(b"".join(rows.lines[:2]))
    entry = recipe.config["datasets"][0]
    schedule = ("val_set_size", "evals_per_epoch", "saves_per_epoch")
    config = {key: value for key, value in recipe.config.items() if key not in schedule}
    config |= {
        "datasets": [entry | {"path": str(train_file)}],
        "test_datasets": [entry | {"path": str(eval_file), "split": "train"}],
        "num_epochs": 1,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "output_dir": str(TRIAL.folder),
        "dataset_prepared_path": str(TRIAL.folder / "prepared"),
    }
    if twin:
        pad_token = json.loads((twin / "tokenizer_config.json").read_text())["pad_token"]
        config |= {"base_model": str(twin), "special_tokens": {"pad_token": pad_token}}
    return replace(recipe, config=config)


@contextmanager
def clear_folder() -> Iterator[None]:
    """runs/.smoke, empty at first and removed afterwards; kept where the trial failed."""
    with Run(FOLDER).lock():  # two trials at once would remove each other's files
        checks.require_space(FOLDER)
        shutil.rmtree(FOLDER, ignore_errors=True)
        yield
        shutil.rmtree(FOLDER, ignore_errors=True)


def answer_rows(config: dict[str, Any], lines: list[bytes]) -> list[tuple[str, str, str]]:
    """(key, the base's answer, the adapter's) of each row, from files as scoring loads them."""
    quiet()
    import torch

    model, tokenizer = models.load(config, TRIAL.folder)
    answers = []
    for line in lines:
        (*turns, key), tools = prompts.read_conversation(json.loads(line))
        ids = prompts.tokens(tokenizer, turns, config.get("chat_template_kwargs"), tools=tools)

        def generate(ids: list[int] = ids) -> str:
            inputs = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            )
            return tokenizer.decode(output[0][len(ids) :], skip_special_tokens=True).strip()

        with torch.inference_mode():
            adapter = generate()
            with model.disable_adapter():
                base = generate()
        answers.append((key["content"], base, adapter))
    return answers


# ---- Checks of this machine


def check_base(base: str) -> Check:
    """Whether the base's weights can be had."""
    if (ROOT / base).is_dir():
        return Check("a folder here")
    from huggingface_hub import auth_check, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(base, "config.json"), str):
        return Check("in the Hub's cache")
    try:
        auth_check(base)
    except GatedRepoError:
        text = f"accept its licence on the Hub ({base}), then .venv/bin/hf auth login"
    except RepositoryNotFoundError:
        text = f"the Hub has no {base}, or this login may not see it"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        text = f"the Hub cannot be reached ({reason})"
    else:
        return Check("on the Hub; the first run downloads it")
    return Check(text, is_ready=False)


def check_attention(config: dict[str, Any], host: hardware.Host) -> Check:
    """Which attention the run gets."""
    if reason := hardware.explain_no_flash(host):
        return Check(f"SDPA; {reason}")
    has_flash = config.get("attn_implementation")
    return Check("flash-attn" if has_flash else "SDPA, as the profile says")


def check_kernels(host: hardware.Host) -> Check:
    """Whether bitsandbytes' own kernels load."""
    quiet()
    import bitsandbytes.cextension as extension

    device = "GPU" if host.gpus else "CPU"
    if "Error" in type(extension.lib).__name__:
        return Check(f"bitsandbytes' kernels do not load for this {device}", is_ready=False)
    return Check(f"bitsandbytes' kernels load ({device})")


def check_disk(config: dict[str, Any]) -> Check:
    """Free space against what base, checkpoints and adapter take."""
    needed = checks.DISK
    if not (ROOT / config["base_model"]).is_dir():
        needed += 2 * count_parameters(config["base_model"])
    free = shutil.disk_usage(ROOT).free
    return Check(f"{free / 1e9:.0f} GB free, about {needed / 1e9:.0f} GB needed", free > needed)


def count_parameters(base: str) -> int:
    """Parameters of a base; 0 where nothing describes its architecture."""
    try:
        return architectures.find(base).parameters
    except WrongInput:
        return 0


# ---- The trial


def report_training(run_info: dict[str, Any], lines: list[bytes]) -> None:
    """Prints losses, the size of the saved adapter, and answers with it."""
    first, *_, last = TRIAL.losses()
    say("trains", f"{STEPS} steps, loss {first['loss']:.3f} to {last['loss']:.3f}")
    if run_info.get("last_eval_loss") is not None:
        say("evaluates", f"two rows, loss {run_info['last_eval_loss']:.3f}")
    config = recipes.load_file(TRIAL.config_file, "smoke").config
    answers = answer_rows(config, lines)
    megabytes = TRIAL.adapter_file.stat().st_size / 1e6
    say("saves, loads", f"adapter of {megabytes:.1f} MB, at {models.precision(config)}")
    for key, base, adapter in answers:
        say("answers", f"base {base[:24]!r}, adapter {adapter[:24]!r}, key {key[:24]!r}")


def describe_planned_peak(recipe: recipes.Recipe, rows: LongestRows) -> str:
    try:
        planned = plan.plan(recipe.config, row=rows.longest, rows=rows.total_rows)
    except WrongInput as error:
        return f"no plan: {error}"
    return f"{planned['memory']['peak'] / GIB:.1f} GiB planned for a GPU"


def report_sizes(recipe: recipes.Recipe, rows: LongestRows, run_info: dict[str, Any]) -> None:
    """Prints memory, speed and the hours of the whole recipe."""
    note = "; on a CPU Python and its libraries count too" if run_info["device"] == "cpu" else ""
    peak = describe_planned_peak(recipe, rows)
    say("peak memory", f"{run_info['peak_memory_bytes'] / GIB:.1f} GiB ({peak}{note})")
    first, *_, last = TRIAL.losses()
    seconds = max(last["seconds"] - first["seconds"], 0.01)  # they are rounded to hundredths
    speed = (last["total_tokens"] - first["total_tokens"]) / seconds  # padding included
    say("speed", f"{speed:,.0f} tokens/s on the longest rows")
    steps, tokens = plan.count_steps(rows.total_rows, math.ceil(rows.mean), recipe.config)
    hours = tokens / speed / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    whole = f"{steps:,} steps on {rows.total_rows:,} rows"
    say("whole run", f"{whole}, about {time} without evaluation")


def try_recipe(recipe: recipes.Recipe, profile: str, host: hardware.Host) -> Check:
    """Runs the trial and prints its results; returns the check of the base.

    Raises JobFailed before anything is trained where the base cannot be had and has no twin.
    """
    base = str(recipe.config["base_model"])
    is_large = not host.gpus and count_parameters(base) > hardware.LARGEST_ON_CPU
    twin = FOLDER / "twin" if is_large else None
    data, *_ = checks.describe_data(recipe)
    with clear_folder():
        if twin:
            make_twin(base, twin)
            say("twin", f"{base} is too large for this machine; a tiny random model stands in")
        else:
            smollm2.ensure(base)
        base_check = check_base(base)
        if not (twin or base_check.is_ready):
            raise JobFailed(f"base: {base_check.text}")
        counter = load_counter(str(twin or base))
        counter.options = recipe.config.get("chat_template_kwargs")
        rows = pick_longest(ROOT / data["path"], recipe.config, counter)
        size = f"the {len(rows.lines)} longest of {rows.total_rows:,}"
        say("rows", f"{size}: {rows.longest} tokens")
        if rows.too_long:
            say("", f"{rows.too_long} rows are over sequence_len; Axolotl drops them")
        trial = build_trial(recipe, rows, twin)
        content = profiles.merge_config(trial, profiles.Choice(profile), host)
        run_info = launch.execute(trial, content, profile, True, machines.Machines())
        report_training(run_info, rows.lines[:2])
        if twin:  # its memory and speed say nothing of the base
            peak = describe_planned_peak(recipe, rows)
            say("plan", f"{peak} on these rows; `make plan` says more")
        else:
            report_sizes(recipe, rows, run_info)
    return base_check


def run(name: str, profile: str | None) -> None:
    """Tries a recipe and prints what it took; raises JobFailed with what is missing here."""
    recipe = recipes.find(name)
    recipes.validate(recipe.config, recipe.where)
    host = hardware.detect_host()
    profile, _, why = profiles.choose(host, profiles.Choice(profile, 1), 1)
    say("recipe", f"{recipe.name}, profile {profile} ({why})")
    results = {
        "base": try_recipe(recipe, profile, host),
        "attention": check_attention(recipe.config | profiles.read_profiles(profile), host),
        "kernels": check_kernels(host),
        "disk": check_disk(recipe.config),
    }
    for label, check in results.items():
        say(label, check.text if check.is_ready else f"NOT READY: {check.text}")
    missing = [f"{label}: {check.text}" for label, check in results.items() if not check.is_ready]
    if missing:
        raise JobFailed("; ".join(missing))
    say("ready", f"make train RECIPE={recipe.name}")
