"""Where a recipe runs: the profiles that suit this machine, and the merged config.

    python -m tools profile [RECIPE] [--profile multi_gpu,zero2] [--nproc 4]

A profile is a YAML file of Axolotl options in recipes/profiles/; of several, separated by commas,
later ones override earlier ones. What is learned stays the recipe's: more processes share the same
batches, and a process count that does not divide the batch is rejected.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tools import architectures, recipes, sources
from tools.common import ROOT, WrongInput, quiet
from tools.prompts import with_template
from tools.train import plan, sharing
from tools.train.hardware import Host, detect_host, explain_import, explain_no_flash

# Axolotl's options that push to the Hub during training.
PUBLISHING = ("hub_model_id", "hub_strategy", "push_to_hub", "push_dataset_to_hub")
PLUGIN = "tools.train.plugin.RunPlugin"
# Chosen by what a machine has, and the same numbers either way: not part of what a run is.
CHOSEN = {
    *("attn_implementation", "gradient_checkpointing", "dataset_num_proc"),
    *("dataloader_num_workers", "dataloader_prefetch_factor"),
}
# Bytes of chat rows up to which the training process prepares them itself: others start with
# seconds of imports, and it takes no longer than those (about 10,000 rows of sentiment).
FEW_BYTES = 4_000_000
# Axolotl's options for the trackers; what each writes stays in the run folder or on this machine.
TRACKERS: dict[str, dict[str, Any]] = {
    "tensorboard": {"use_tensorboard": True},
    "wandb": {"use_wandb": True, "wandb_project": "finlora-recipes"},
    "trackio": {"use_trackio": True, "trackio_project_name": "finlora-recipes"},
}
# The AdamW of several programs: the same algorithm, with states in other places or at 8 bits.
ADAMW = {
    *("adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_8bit"),
    *("adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
}
# Ways to ask Axolotl for a kind of attention; the last is today's.
ATTENTION = [*("flash_attention", "sdp_attention", *sharing.OTHER_ATTENTION, "attn_implementation")]
# Axolotl's products of base and adapter, which pass by the layers' own forward.
LORA_KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
# Keys by which a run differs from its recipe on purpose: what is kept where, and counted.
BOOKKEEPING = {"dataset_prepared_path", "include_tkps", "auto_resume_from_checkpoints"}


@cache
def find_decoder_layers(base: str) -> str:
    """The classes of a base's decoder layers, as transformers' own class of the model names them.

    The base's config.json says which class that is, else recipes/models/. Raises WrongInput where
    neither does.
    """
    quiet()
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    model = architectures.read_architectures().get(recipes.resolve_mirror(base).lower())
    path = architectures.find_file(base, "config.json")
    try:
        if model and not path:
            config = CONFIG_MAPPING[model.model_type]()
        else:
            config = AutoConfig.from_pretrained(
                str(path.parent) if path else base, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise WrongInput(
            f"FSDP must know the class of the decoder layers of {base}, whose config.json cannot "
            f"be read ({reason}); download the base first"
        ) from None
    for part in (config, config.get_text_config()):
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            names = getattr(mapping.get(type(part), None), "_no_split_modules", None)
            if names:
                return ",".join(sorted(names))
    raise WrongInput(
        f"transformers does not name the decoder layers of {base} ({config.model_type}); "
        "FSDP cannot divide it"
    )


@dataclass(frozen=True)
class Choice:
    """What a user decides about where a recipe runs; None leaves it to this module."""

    profile: str | None = None  # of recipes/profiles/, or several: a,b
    nproc: int | None = None  # processes on this machine, one per GPU
    gradient_checkpointing: bool | None = None
    tracker: str | None = None  # one of TRACKERS


def choose(here: Host, choice: Choice, nnodes: int) -> tuple[str, int, str]:
    """(profile, processes on this machine, why) from what is asked for and what is there.

    Raises WrongInput for a profile that does not exist.
    """
    gpus, profile, nproc = len(here.gpus), choice.profile or "", choice.nproc
    read_profiles(profile)
    count, names = nproc or 1, profile.replace(",", " ").split()
    if not nproc and "cpu" not in names and (nnodes > 1 or {"multi_gpu", "multi_node"} & {*names}):
        count = max(gpus, 1)
    if gpus and count > gpus and "cpu" not in names:
        raise WrongInput(f"NPROC={count}: this machine has {gpus} GPUs")
    if profile:
        return profile, count, "PROFILE"
    if not gpus:
        return "cpu", count, "no CUDA GPU was found"
    if nnodes > 1:
        return "multi_node", count, f"{nnodes} machines"
    if count > 1:
        return "multi_gpu", count, f"NPROC={count}"
    spare = f"; NPROC={gpus} takes all {gpus}" if gpus > 1 else ""
    return "gpu", 1, f"a CUDA GPU was found{spare}"


def read_profiles(profile: str) -> dict[str, Any]:
    """The options of one profile or of several, `multi_gpu,zero2`, the later over the earlier."""
    content: dict[str, Any] = {}
    for name in profile.replace(",", " ").split():
        content |= recipes.read_profile(name)
    return content


def apply_profiles(own: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A config with a profile's options over it, but for those that change what it learns.

    Packing, the family of the optimizer and 16-bit floats are the user's where the config names
    them, as are its attention and its own choices for the profile's plugins.
    """
    options = dict(options)
    for key in (
        "sample_packing",
        "batch_flattening",
        "shared_prefix",
        *(k for k in options if k[:6] == "liger_"),
    ):
        if key in own:
            options.pop(key, None)
    if own.get("sample_packing"):
        # The rows that packing joins are not joined again, and are padded as the user has it.
        options.pop("batch_flattening", None)
        if "pad_to_sequence_len" in own:
            options.pop("pad_to_sequence_len", None)
    optimizer = str(own.get("optimizer") or "")
    if "optimizer" in options and optimizer and optimizer not in ADAMW:
        # Its states may be paged or not, as the profile's are.
        plain = optimizer.removeprefix("paged_").replace("ademamix_32bit", "ademamix")
        options["optimizer"] = optimizer if "paged" in options["optimizer"] else plain
    if own.get("fp16") and options.get("bf16"):
        options.pop("bf16")
    if any(key in own for key in ATTENTION):
        options.pop("attn_implementation", None)
    plugins = own.get("plugins") or []
    if own.get("cut_cross_entropy") or any("CutCrossEntropy" in name for name in plugins):
        options.pop("liger_fused_linear_cross_entropy", None)  # there can be one fused loss only
    merged = own | options | {"plugins": [*plugins, *(options.get("plugins") or [])]}
    if merged.get("dataloader_num_workers") == 0:
        merged.pop("dataloader_prefetch_factor", None)  # PyTorch refuses it without a worker
    return merged


def list_changes(recipe: recipes.Recipe, content: dict[str, Any]) -> list[str]:
    """What a merged config changes of a user's own YAML, a line each; none for the catalogue's."""
    if recipe.name in recipes.list_names():
        return []
    own, lines = recipe.config, []
    reasons = {
        "optimizer": "the same algorithm; its states lie elsewhere or have other bits",
        "bf16": "what this machine computes in",
        "fp16": "what this machine computes in",
        "attn_implementation": "flash-attn cannot be used here, `make profile` says why",
        "flash_attention": "flash-attn cannot be used here, `make profile` says why",
        "gradient_checkpointing": "the same numbers; GRADIENT_CHECKPOINTING=1 or 0 sets it",
        "micro_batch_size": "the processes share the batch",
        "gradient_accumulation_steps": "the processes share the batch",
        "bnb_config_kwargs": "ZeRO-3 gathers all weights in one type",
    } | dict.fromkeys(PUBLISHING, "`make push` publishes a run")
    for key in own:
        if key in BOOKKEEPING or own[key] == content.get(key):
            continue
        if key == "plugins":
            more = [name for name in content[key] if name not in own[key]]
            lines.append(f"plugins: {', '.join(more)} added")
            continue
        reason = reasons.get(key, "the profile; the same is learned")
        now = content.get(key, "left out")
        lines.append(f"{key}: {own[key]} → {now} ({reason})")
    return lines


def fits_gpus(config: dict[str, Any], here: Host, processes: int) -> bool | None:
    """Whether the plan of a config fits this machine's GPUs; None where it cannot be planned."""
    try:
        size = f"{here.gpus[0][1] / 2**30:.1f}GB"
        data = sources.list_training_files(config)
        return bool(plan.plan(config, plan.Hardware(size, processes), data=data)["fits"])
    except WrongInput:
        return None


def merge_config(
    recipe: recipes.Recipe, choice: Choice, here: Host | None = None
) -> dict[str, Any]:
    """The config that Axolotl gets: the recipe, the profiles over it, and tools/train/plugin.py.

    `choice.nproc` counts the processes of all machines.
    """
    run = Path(recipe.config["output_dir"])
    profile, processes = choice.profile or "", choice.nproc or 1
    config, _ = sources.drop_missing_validation(recipe.config)
    content = with_template(apply_profiles(config, read_profiles(profile)))
    content = {key: value for key, value in content.items() if key not in PUBLISHING}
    if processes > 1:
        content |= plan.divide_batch(content, processes)
    if content.get("load_in_8bit") and (content.get("fsdp_config") or "zero3" in profile):
        raise WrongInput(
            f"{recipe.name}: bitsandbytes' 8-bit weights cannot be divided by {profile}"
        )
    if content.get("load_in_4bit") and "zero3" in profile and content.get("bf16") is False:
        # ZeRO-3 gathers packed weights with the others, in one dtype; the bits stay as they are.
        content["bnb_config_kwargs"] = {
            **(content.get("bnb_config_kwargs") or {}),
            "bnb_4bit_quant_storage": "float32",
        }
    fsdp = content.get("fsdp_config")
    if fsdp and fsdp.get("auto_wrap_policy") == "TRANSFORMER_BASED_WRAP":
        layers_of_base = fsdp.get("transformer_layer_cls_to_wrap") or find_decoder_layers(
            content["base_model"]
        )
        content["fsdp_config"] = {**fsdp, "transformer_layer_cls_to_wrap": layers_of_base}
    wants_flash = content.get("attn_implementation") == "flash_attention_2"
    if (wants_flash or content.get("flash_attention")) and explain_no_flash(here or detect_host()):
        content.pop("flash_attention", None)
        content["attn_implementation"] = "sdpa"  # and `batch_flattening: auto` is off
    if content.get("merge_aware"):
        refuse_unmergeable(recipe.name, content)
        content |= dict.fromkeys(LORA_KERNELS, False)
    if content.pop("shared_prefix", None) and not sharing.explain_no_sharing(content):
        content["shared_prefix"] = True
        if content.get("batch_flattening") == "auto":  # a profile's way to pack rows, not a user's
            content["batch_flattening"] = False
    if content.get("deepspeed") and (reason := explain_import("deepspeed")):
        raise WrongInput(f"PROFILE={profile}: {reason}")
    if choice.gradient_checkpointing is not None:
        content["gradient_checkpointing"] = choice.gradient_checkpointing
    elif content.get("gradient_checkpointing") and here and here.gpus:
        # Recomputing costs a third of the time: only where the plan does not fit without.
        without = content | {"gradient_checkpointing": False}
        content["gradient_checkpointing"] = not fits_gpus(without, here, processes)
    if tracker := choice.tracker:
        if reason := explain_import(tracker):
            raise WrongInput(f"TRACKER={tracker}: {reason}; .venv/bin/pip install {tracker}")
        content |= TRACKERS[tracker]
    content["plugins"] = list(dict.fromkeys([*(content.get("plugins") or []), PLUGIN]))
    # Axolotl knows prepared data by its config and not by its content: a run keeps its own.
    content["dataset_prepared_path"] = str(run / "prepared")
    if not content.get("dataset_num_proc") and measure_data(content) <= FEW_BYTES:
        content["dataset_num_proc"] = 0
    content["include_tkps"] = True
    content["auto_resume_from_checkpoints"] = True
    return content


def refuse_unmergeable(name: str, content: dict[str, Any]) -> None:
    """Raises WrongInput where a config is not one that `merge_aware` trains."""
    problems = {
        "load_in_4bit: true is needed": not content.get("load_in_4bit"),
        "peft_use_dora has a product of its own": content.get("peft_use_dora"),
        "lora_dropout must be 0, since a merged weight drops nothing": content.get("lora_dropout"),
        "FSDP and ZeRO-3 divide the weights that are merged": content.get("fsdp_config")
        or "zero3" in str(content.get("deepspeed")),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise WrongInput(f"{name}: merge_aware: {problem}")


def measure_data(content: dict[str, Any]) -> int:
    """Bytes of a config's data files; those that are not here, or not yet, count nothing."""
    entries = [*(content.get("datasets") or []), *(content.get("test_datasets") or [])]
    paths = (ROOT / str(entry.get("path", "")) for entry in entries)
    return sum(path.stat().st_size for path in paths if path.is_file())


def identity_of(content: dict[str, Any]) -> dict[str, Any]:
    """What of a merged config makes another run of it where it changes."""
    aside = CHOSEN | {key for options in TRACKERS.values() for key in options}
    identity = {key: value for key, value in content.items() if key not in aside}
    plugins = [name for name in content.get("plugins") or [] if name != PLUGIN]
    return identity | ({"plugins": plugins} if "plugins" in content else {})


def explain_settings(content: dict[str, Any], here: Host, processes: int) -> dict[str, str]:
    """What is used, and why, in words; for `make profile`."""
    flash = content.get("attn_implementation") == "flash_attention_2"
    checkpointing = "on" if content.get("gradient_checkpointing") else "off"
    if here.gpus:
        unusable = explain_no_flash(here)
        attention = "flash-attn, it imports" if flash else f"SDPA, {unusable or 'as configured'}"
        verdict = fits_gpus(content | {"gradient_checkpointing": False}, here, processes)
        known = {True: "it fits without", False: "it does not fit without", None: "no plan"}
        checkpointing += f", {known[verdict]}"
    else:
        attention = f"SDPA, {explain_no_flash(here)}"
    precision = {True: "bf16", "auto": "bf16 where the GPU has it, else fp16", False: "float32"}
    division = content.get("deepspeed") or ("FSDP" if content.get("fsdp_config") else None)
    micro = content.get("micro_batch_size") or 1
    steps = content.get("gradient_accumulation_steps") or 1
    batch = f"{processes} x {micro} rows x {steps} steps = {processes * micro * steps}"
    if content.get("micro_batch_parts", 1) > 1:
        batch += f"; {content['micro_batch_parts']} processes share a micro-batch of the recipe"
    if content.get("shared_prefix"):
        packing = "on" + sharing.describe_saving(content)
    else:
        packing = f"off, {sharing.explain_no_sharing(content) or 'as configured'}"
    return {
        "compute": precision.get(content.get("bf16"), str(content.get("bf16"))),
        "attention": attention,
        "shared prefix": packing,
        "optimizer": str(content.get("optimizer")),
        "checkpointing": checkpointing,
        "processes": f"{processes}" + (f", {division or 'DDP'}" if processes > 1 else ""),
        "effective batch": batch,
    }


def explain(name: str | None, choice: Choice) -> None:
    """Prints what was detected here, what a recipe would be trained with, and why."""
    here = detect_host()
    profile, processes, why = choose(here, choice, 1)
    rows = {"detected": str(here), "profile": f"{profile} ({why})"}
    recipe = recipes.find(name or "smollm2-135m/sentiment_r4")
    content = merge_config(recipe, replace(choice, profile=profile, nproc=processes), here=here)
    rows |= {"recipe": recipe.name} | explain_settings(content, here, processes)
    for label, text in rows.items():
        print(f"{label:<16} {text}")
    for line in list_changes(recipe, content):
        print(f"{'changed':<16} {line}")
