"""Tries a recipe for two minutes before hours are spent on it.

    python -m tools.launch.smoke sentiment_r4 [--profile gpu]

Trains the recipe's own config for a few optimizer steps on the longest rows of its own data, saves
the adapter, loads base and adapter again as scoring does, and lets both answer two rows. Then it
prints the peak memory beside the plan, the speed, the hours of the whole run, and what would not
have worked. Nothing of it stays: it runs in runs/.smoke/, and a finished run is not touched.

Where the base is too large for this machine, its tiny twin stands in: the same kind of model and
recipe with a few small layers of random weights. That tests the config, not memory or speed.
"""

import json
import math
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import architectures, models, recipes, smollm2
from tools.common import ROOT, JobFailed, WrongInput, json_lines, quiet, shown
from tools.data import lengths
from tools.runs import Run
from tools.train import checks as checks_module
from tools.train import hardware, launch, machines, plan, profiles

FOLDER = ROOT / "runs" / ".smoke"
STEPS = 3  # the first one warms up; speed is the others'
ANSWER_TOKENS = 8
# Rows without whose tokens nothing can be counted: the longest by characters are tokenized.
CANDIDATES = 512
TWIN = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}


@dataclass(frozen=True)
class Batch:
    """The longest rows of a training file, enough for one optimizer step, longest first."""

    lines: list[bytes]
    longest: int  # tokens
    total_rows: int
    mean: float  # tokens of a row
    too_long: int  # rows over sequence_len, which Axolotl drops


def say(label: str, text: str) -> None:
    print(f"smoke      {label:<13} {text}", flush=True)


def pick_longest(path: Path, config: dict[str, Any], tokenizer: lengths.Lengths) -> Batch:
    """The longest rows of a chat file that are not over the recipe's sequence_len."""
    with open(path, "rb") as file:
        lines = [line for line in file if not line.isspace()]
    most = int(config.get("sequence_len") or 2048)
    count = config.get("micro_batch_size", 1) * config.get("gradient_accumulation_steps", 1)
    ordered = sorted(lines, key=len, reverse=True)
    sizes = count_tokens(tokenizer, ordered[: max(CANDIDATES, 4 * count)])
    fitting = sorted(
        ((size, line) for size, line in zip(sizes, ordered, strict=False) if size <= most),
        key=lambda pair: -pair[0],
    )[:count]
    if not fitting:
        raise WrongInput(
            f"{shown(path)}: its longest rows are over the sequence_len of {most} tokens; raise it"
        )
    while len(fitting) < count:  # a file smaller than a batch
        fitting += fitting[: count - len(fitting)]
    sample = lines[:: max(1, len(lines) // CANDIDATES)]
    return Batch(
        lines=[line for _, line in fitting],
        longest=fitting[0][0],
        total_rows=len(lines),
        mean=statistics.mean(count_tokens(tokenizer, sample)),
        too_long=sum(size > most for size in sizes),
    )


def load_counter(base: str) -> lengths.Lengths:
    """What counts a base's tokens; downloads the tokenizer where it is not here."""
    counter = lengths.load(base)
    if counter is None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        counter = lengths.load(base)
    if counter is None:
        raise WrongInput(f"{base} has no tokenizer that transformers reads")
    return counter


def count_tokens(tokenizer: lengths.Lengths, lines: list[bytes]) -> list[int]:
    """Tokens of each chat row, rendered with the chat template."""
    rows = [json.loads(line)["messages"] for line in lines]
    texts = [tokenizer.tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    encoded = tokenizer.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [len(tokens) for tokens in encoded]


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
    sizes = {
        "num_hidden_layers": TWIN["layers"],
        "hidden_size": TWIN["hidden"],
        "intermediate_size": TWIN["intermediate"],
        "num_attention_heads": TWIN["heads"],
        "num_key_value_heads": TWIN["kv_heads"],
        "head_dim": TWIN["hidden"] // TWIN["heads"],
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        config = getattr(config, "text_config", config)
        config.update({key: value for key, value in sizes.items() if hasattr(config, key)})
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-TWIN["layers"] :]
    except (OSError, ValueError):
        config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smoke_config(recipe: recipes.Recipe, batch: Batch, twin: Path | None) -> dict[str, Any]:
    """The recipe's config on the longest rows, for STEPS steps, in a folder of its own."""
    data, rows = FOLDER / "rows.jsonl", FOLDER / "two.jsonl"
    FOLDER.mkdir(parents=True, exist_ok=True)
    data.write_bytes(b"".join(batch.lines * STEPS))
    rows.write_bytes(b"".join(batch.lines[:2]))
    entry = recipe.config["datasets"][0]
    schedule = ("val_set_size", "evals_per_epoch", "saves_per_epoch", "num_epochs")
    content = {key: value for key, value in recipe.config.items() if key not in schedule}
    run = FOLDER / "run"
    content |= {
        "datasets": [entry | {"path": str(data)}],
        "test_datasets": [entry | {"path": str(rows), "split": "train"}],
        "num_epochs": 1,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "output_dir": str(run),
        "dataset_prepared_path": str(run / "prepared"),
    }
    if twin:
        special = json.loads((twin / "tokenizer_config.json").read_text())
        content |= {"base_model": str(twin)}
        content["special_tokens"] = {"pad_token": special["pad_token"]}
    return content


@contextmanager
def smoke_folder() -> Iterator[None]:
    """runs/.smoke, empty at first and removed afterwards; kept where the trial failed."""
    with Run(FOLDER).lock():  # two at once would remove each other's
        checks_module.require_space(FOLDER)
        shutil.rmtree(FOLDER, ignore_errors=True)
        yield
        shutil.rmtree(FOLDER, ignore_errors=True)


def answer_rows(config: dict[str, Any], batch: Batch) -> list[tuple[str, str, str]]:
    """(key, the base's answer, the adapter's) of two rows, from files as scoring loads them."""
    quiet()
    import torch

    from tools import prompts

    model, tokenizer = models.load(config, FOLDER / "run")
    rows = []
    for line in batch.lines[:2]:
        *turns, last = json.loads(line)["messages"]
        ids = prompts.tokens(tokenizer, turns, config.get("chat_template_kwargs"))
        inputs = torch.tensor([ids], device=model.device)
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        mask = torch.ones_like(inputs)
        with torch.inference_mode():
            adapted = model.generate(input_ids=inputs, attention_mask=mask, **options)[0]
            with model.disable_adapter():
                plain = model.generate(input_ids=inputs, attention_mask=mask, **options)[0]
        base, adapter = (
            tokenizer.decode(answer[len(ids) :], skip_special_tokens=True).strip()
            for answer in (plain, adapted)
        )
        rows.append((last["content"], base, adapter))
    return rows


def speed(run: Path) -> float:
    """Tokens a second, padding included, over all steps but the first."""
    lines = [line for line in json_lines(run / "progress.jsonl") if "loss" in line]
    first, last = lines[0], lines[-1]
    seconds = max(last["seconds"] - first["seconds"], 0.01)  # they are rounded to hundredths
    return float((last["total_tokens"] - first["total_tokens"]) / seconds)


def check_base(base: str) -> str:
    """Whether the base's weights can be had, in words."""
    if (ROOT / base).is_dir():
        return "a folder here"
    from huggingface_hub import auth_check, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(base, "config.json"), str):
        return "in the Hub's cache"
    try:
        auth_check(base)
    except GatedRepoError:
        return f"NOT READY: accept its licence on the Hub ({base}), then .venv/bin/hf auth login"
    except RepositoryNotFoundError:
        return f"NOT READY: the Hub has no {base}, or this login may not see it"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        return f"NOT READY: the Hub cannot be reached ({reason})"
    return "on the Hub; the first run downloads it"


def check_attention(config: dict[str, Any], here: hardware.Host) -> str:
    """Which attention the run gets, in words."""
    if reason := hardware.explain_no_flash(here):
        return f"SDPA; {reason}"
    return "flash-attn" if config.get("attn_implementation") else "SDPA, as the profile says"


def check_kernels(here: hardware.Host) -> str:
    """Whether bitsandbytes' own kernels load, in words."""
    quiet()
    import bitsandbytes.cextension as extension

    kind = type(extension.lib).__name__
    if "Error" in kind:
        return f"NOT READY: bitsandbytes' kernels do not load for this {here_name(here)}"
    return f"bitsandbytes' kernels load ({here_name(here)})"


def here_name(here: hardware.Host) -> str:
    return "GPU" if here.gpus else "CPU"


def count_parameters(base: str) -> int:
    """Parameters of a base; 0 where its architecture is not known."""
    try:
        return architectures.find(base).parameters
    except WrongInput:
        return 0


def check_disk(config: dict[str, Any]) -> str:
    """Free space against what base, checkpoints and adapter take, in words."""
    needed = checks_module.DISK
    if not (ROOT / config["base_model"]).is_dir():
        needed += 2 * count_parameters(config["base_model"])
    free = shutil.disk_usage(ROOT).free
    text = f"{free / 1e9:.0f} GB free, about {needed / 1e9:.0f} GB needed"
    return text if free > needed else f"NOT READY: {text}"


def whole_run(recipe: recipes.Recipe, batch: Batch, tokens_per_second: float) -> str:
    """Steps and hours of the whole recipe at the speed that was seen, in words."""
    steps, tokens = plan.steps_of(batch.total_rows, math.ceil(batch.mean), recipe.config)
    hours = tokens / tokens_per_second / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    return f"{steps:,} steps on {batch.total_rows:,} rows, about {time} without evaluation"


def try_recipe(recipe: recipes.Recipe, asked: str | None) -> list[str]:
    """Runs the trial and prints what it shows; returns what is not ready."""
    here = hardware.detect_host()
    profile, _, why = profiles.choose(here, profiles.Choice(asked, 1), 1)
    (entry, *_) = checks_module.describe_data(recipe)
    base = str(recipe.config["base_model"])
    large = not here.gpus and count_parameters(base) > hardware.LARGEST_ON_CPU
    with smoke_folder():
        twin = FOLDER / "twin" if large else None
        if twin:
            make_twin(base, twin)
        else:
            smollm2.ensure(base)
        say("recipe", f"{recipe.name}, profile {profile} ({why})")
        state = check_base(base)
        if twin:
            say("twin", f"{base} is too large for this machine; a tiny random model stands in")
        elif "NOT READY" in state:
            raise JobFailed(f"base: {state.removeprefix('NOT READY: ')}")
        batch = pick_longest(ROOT / entry["path"], recipe.config, load_counter(str(twin or base)))
        say(
            "rows",
            f"the {len(batch.lines)} longest of {batch.total_rows:,}: {batch.longest} tokens",
        )
        if batch.too_long:
            say("", f"{batch.too_long} rows are over sequence_len; Axolotl drops them")
        trial = replace(recipe, config=smoke_config(recipe, batch, twin))
        content = profiles.merge_config(trial, profiles.Choice(profile), here)
        run = launch.execute(trial, content, profile, True, machines.Machines())
        first, *_, last = [e for e in json_lines(FOLDER / "run/progress.jsonl") if "loss" in e]
        say("trains", f"{STEPS} steps, loss {first['loss']:.3f} to {last['loss']:.3f}")
        if run.get("last_eval_loss") is not None:
            say("evaluates", f"two rows, loss {run['last_eval_loss']:.3f}")
        config = recipes.load_file(FOLDER / "run" / "config.yaml", "smoke").config
        size = (FOLDER / "run" / "adapter_model.safetensors").stat().st_size
        answers = answer_rows(config, batch)
        say("saves, loads", f"adapter of {size / 1e6:.1f} MB, at {models.precision(config)}")
        for key, plain, adapted in answers:
            say("answers", f"base {plain[:24]!r}, adapter {adapted[:24]!r}, key {key[:24]!r}")
        report_sizes(recipe, batch, run, speed(FOLDER / "run"), bool(twin), bool(here.gpus))
    checks = {
        "base": state,
        "attention": check_attention(recipe.config | profiles.read_profiles(profile), here),
        "kernels": check_kernels(here),
        "disk": check_disk(recipe.config),
    }
    for label, text in checks.items():
        say(label, text)
    return [
        f"{label}: {text.removeprefix('NOT READY: ')}"
        for label, text in checks.items()
        if "NOT READY" in text
    ]


def report_sizes(
    recipe: recipes.Recipe,
    batch: Batch,
    run: dict[str, Any],
    tokens_per_second: float,
    is_twin: bool,
    on_gpu: bool,
) -> None:
    """Prints memory, speed and hours; a twin's would say nothing of the base."""
    try:
        planned = plan.plan(recipe.config, row=batch.longest, rows=batch.total_rows)
        peak = f"{planned['memory']['peak'] / plan.GIB:.1f} GiB planned for a GPU"
    except WrongInput as error:
        peak = f"no plan: {error}"
    if is_twin:
        say("plan", f"{peak} on these rows; `make plan` says more")
        return
    measured = run["peak_memory_bytes"] / plan.GIB
    note = "" if on_gpu else "; on a CPU Python and its libraries count too"
    say("peak memory", f"{measured:.1f} GiB ({peak}{note})")
    say("speed", f"{tokens_per_second:,.0f} tokens/s on the longest rows")
    say("whole run", whole_run(recipe, batch, tokens_per_second))


def run(name: str, profile: str | None) -> None:
    """Tries a recipe and prints what it took; raises JobFailed with what is missing here."""
    recipe = recipes.find(name)
    recipes.validate(recipe.config, recipe.where)
    if missing := try_recipe(recipe, profile):
        raise JobFailed("; ".join(missing))
    say("ready", f"make train RECIPE={recipe.name}")
