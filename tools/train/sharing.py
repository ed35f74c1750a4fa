"""Whether a recipe can be trained on packed rows (tools/packs.py), and what that saves.

No torch here: `make profile` computes with it, too. tools/train/shared_prefix.py trains on packs.
"""

from typing import Any

from tools import architectures, models, prompts
from tools.common import ROOT, WrongInput, json_lines, read_json
from tools.packs import FIXED_ROPES, IGNORED, TESTED, Row, pack_rows

SAMPLED = 256  # rows that `describe_saving` packs
# Axolotl's options under which a row's loss depends on more than its own tokens, or whose trainer
# has batches of its own, or which was not tried with packs (FSDP, torch.compile).
OPTIONS = [
    *("sample_packing", "batch_flattening", "rl", "reward_model", "process_reward_model"),
    *("neftune_noise_alpha", "kd_trainer", "use_eaft", "chunked_cross_entropy", "trainer_cls"),
    *("pretraining_dataset", "streaming", "processor_type", "fsdp_config", "torch_compile"),
]
# Axolotl's older switches for kinds of attention that packs do not have.
OTHER_ATTENTION = [
    *("xformers_attention", "flex_attention", "sage_attention", "eager_attention", "s2_attention")
]
STEPS = "gradient_accumulation_steps"


def explain_no_sharing(config: dict[str, Any]) -> str | None:
    """Why a merged config is trained on ordinary batches; None where its rows are packed."""
    if (config.get("micro_batch_size") or 1) * (config.get(STEPS) or 1) == 1:
        return "a step has one row"
    for option in OPTIONS + OTHER_ATTENTION:
        if config.get(option) not in (None, False, "auto"):
            return f"{option} is set"
    if (config.get("context_parallel_size") or 1) > 1:
        return "context_parallel_size divides rows among processes"
    attention = config.get("attn_implementation") or "sdpa"
    if attention not in ("sdpa", "flash_attention_2"):
        return f"attn_implementation is {attention}, not sdpa or flash_attention_2"
    return explain_base(config["base_model"])


def explain_base(base: str) -> str | None:
    """Why a base cannot be trained on packs; None where it can."""
    try:
        kind = architectures.find(base).model_type
    except WrongInput:
        return f"the architecture of {base} is unknown, or a mixture of experts"
    if kind not in TESTED:
        return f"packs were not tested on the architecture {kind}"
    path = architectures.find_file(base, "config.json")
    text = architectures.find_text_part(read_json(path)) if path else {}
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    name = rope.get("rope_type") or rope.get("type") or "default"
    if name not in FIXED_ROPES and "full_attention" not in rope:  # Gemma has one for each kind
        return f"its rotary embedding ({name}) depends on the longest row of a batch"
    return None


def describe_saving(config: dict[str, Any]) -> str:
    """How many tokens packing saves on a config's first rows, in words.

    Steps are formed as in training: of rows of similar length where the recipe says so.
    """
    rows = read_sample(config)
    size = config.get("micro_batch_size") or 1
    if len(rows) < size:
        return "; to see what it saves, run `make data` and have the base's tokenizer here"
    if config.get("group_by_length"):
        rows.sort(key=lambda row: len(row.ids))
    steps = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    padded = sum(size * max(len(row.ids) for row in step) for step in steps)
    packed = sum(len(pack_rows(step).ids) for step in steps)
    mean = sum(len(row.ids) for step in steps for row in step) / (len(steps) * size)
    own = packed / (len(steps) * size)
    if padded < 1.05 * packed:
        return f", but a micro-batch of {size} saves next to nothing"
    return f", {padded / packed:.1f} times fewer tokens: {own:.0f} for a row of {mean:.0f}"


def read_sample(config: dict[str, Any]) -> list[Row]:
    """The first rows of a config's first data file; [] where they or the tokenizer are not here, or
    they are no chat rows in JSONL.
    """
    entry = config["datasets"][0]
    path, base = ROOT / entry["path"], config["base_model"]
    if path.suffix != ".jsonl" or not architectures.find_file(base, "tokenizer.json"):
        return []
    tokenizer = models.load_tokenizer(config)
    options, rows = config.get("chat_template_kwargs"), []
    for line in json_lines(path)[:SAMPLED]:
        field = entry.get("field_messages") or "messages"
        messages = line.get(field) or [] if isinstance(line, dict) else []
        if len(messages) < 2 or not all(message.get("content") for message in messages):
            return []
        prompt = prompts.tokens(tokenizer, messages[:-1], options)
        answer = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
        labels = [IGNORED] * (len(prompt) - 1) + answer + [tokenizer.eos_token_id]
        rows.append(Row(prompt + answer, labels, 1.0))
    return rows
