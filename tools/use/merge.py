"""Merges an adapter into its base, so that any program can load the result without PEFT.

    python -m tools merge smollm2-135m/sentiment_r4
    python -m tools merge smollm2-135m/sentiment_r4 --bits 4
    python -m tools merge --adapter runs/hub/someone/some-adapter [--precision nf4]

The base is first what the adapter saw in training: its linear layers quantized and dequantized,
everything else unchanged. PEFT then adds the adapter's product. (`axolotl merge-lora` also
quantizes the embedding of a QLoRA adapter's base, which training never does; on SmolLM2 that moves
a logit by up to 10. It also takes a base for an MPT model if its path contains "mpt".) The
tokenizer carries the chat template that renders prompts as the adapter was trained on them.

    <run>/merged         in the precision that this machine computes in: base + adapter
    <run>/merged-16bit   in bfloat16, with a Modelfile for Ollama
    <run>/merged-gguf    the same 16 bits as a GGUF file, with a Modelfile
    <run>/merged-4bit    in NF4. Layers of a 4-bit base without an adapter stay as they are; those
                         with one are rounded again

`merge.json` in each compares it with base + adapter: the largest difference of a logit, and how
often the next token is the same.
"""

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import adapters, models, prompts, subjects
from tools.common import (
    JobFailed,
    WrongInput,
    naming,
    quiet,
    read_json,
    replacing,
    shown,
    write_json,
)
from tools.use import gguf, modelfile

# Largest difference of a logit between the merged model and base + adapter. In float32 they add the
# same products in another order; bfloat16 rounds the sums to 3 digits, and an int8 base rounds
# activations to 8 bits, which the merged model does not.
TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0, "int8": 1.0}

FOLDERS = {None: "merged", 16: "merged-16bit", 4: "merged-4bit"}  # by the bits of a weight
GGUF_FOLDER = "merged-gguf"
REPORT = "merge.json"
CONTEXT = 4096  # tokens, where a config has no sequence_len

TEXTS = [
    "What is the sentiment of this news? The company raised its forecast.",
    "Which tag belongs to the amount of 4.2 million that was paid in dividends?",
    "Net sales fell by 3 % to EUR 12 million, said the company on Monday.",
    "Compute the net present value of 100 a year for three years at 5 %.",
]


@dataclass(frozen=True)
class Target:
    """Where a merged model goes, and how many bits its weights have (see FOLDERS)."""

    folder: Path
    bits: int | None

    def dtype(self, config: dict[str, Any]) -> str:
        """The type of 16 bits: the one that a config computes in, else bfloat16."""
        return str(config["dtype"]) if config.get("dtype") == "float16" else "bfloat16"


def compute_logits(
    model: Any, tokenizer: Any, options: dict[str, Any] | None, form: str = "chat"
) -> list[Any]:
    """The logits of a model after each token of each text: (tokens, vocabulary), float32."""
    import torch

    outputs = []
    for text in TEXTS:
        ids = prompts.tokens(tokenizer, [{"role": "user", "content": text}], options, form)
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=model.device)
            outputs.append(model(input_ids=inputs).logits[0].float().cpu())
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise JobFailed(f"{models.NOT_FINITE}; nothing is kept")
    return outputs


def measure_difference(first: list[Any], second: list[Any]) -> dict[str, float]:
    """The largest difference of a logit, and the share of tokens with the same next token."""
    pairs = list(zip(first, second, strict=True))
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return {"largest_logit_difference": largest, "same_next_token": sum(same) / len(same)}


def merge(
    config: dict[str, Any], adapter: Path, form: str = "chat", bits: int | None = None
) -> Path:
    """Merges a PEFT folder into the base of an Axolotl config; returns the folder of the model.

    form: the prompt format that the adapter was trained on. bits: 4 or 16 of each weight; None for
    the precision that this machine computes in. Does nothing where the folder is up to date. Raises
    JobFailed where the merged model is not base + adapter within TOLERANCE.
    """
    target = adapter / FOLDERS[bits]
    origin = describe_origin(config, adapter, form)
    if is_up_to_date(target, origin):
        return target
    models.bring_base(config["base_model"])
    origin = describe_origin(config, adapter, form)  # with the base's files
    quiet()
    with replacing(target) as work:
        report = merge_and_compare(config, adapter, form, Target(work, bits))
        if bits == 16:
            report |= add_modelfile(config, work, work, ".")
        write_json(work / REPORT, origin | report)
    return target


def write_gguf(config: dict[str, Any], source: Path, form: str = "chat") -> Path:
    """Writes a merged 16-bit model as a GGUF file beside it; returns the file's folder.

    Raises JobFailed where transformers reads another model from the file.
    """
    adapter = source.parent
    target = adapter / GGUF_FOLDER
    origin = describe_origin(config, adapter, form) | {"converter": gguf.read_converter_version()}
    if is_up_to_date(target, origin):
        return target
    quiet()
    with replacing(target) as work:
        file = work / gguf.FILE
        gguf.convert_to_gguf(source, Target(source, 16).dtype(config), file)
        report = compare_gguf(source, file, config)
        report |= add_modelfile(config, source, work, f"./{file.name}")
        write_json(work / REPORT, origin | report)
    return target


def describe_origin(config: dict[str, Any], adapter: Path, form: str) -> dict[str, Any]:
    files = adapters.identify(adapter)
    return {
        "adapter_sha256": files[adapters.WEIGHTS],
        "adapter_files": files,
        "base_model": config["base_model"],
        **models.identify_base(config["base_model"]),
        "precision": models.precision(config),
        "prompt_format": form,
    }


def is_up_to_date(target: Path, origin: dict[str, Any]) -> bool:
    if not (target / REPORT).is_file():
        return False
    report = read_json(target / REPORT)
    return bool(report == report | origin)


def add_modelfile(config: dict[str, Any], model: Path, folder: Path, source: str) -> dict[str, str]:
    """Writes a Modelfile into `folder` for a merged model, whose weights are `source` there.

    Returns {"no_modelfile": the reason} where Ollama has no template for its prompts, else {}.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        # The tokenizer's own template writes the prompt format already.
        pieces = modelfile.derive_pieces(tokenizer, config.get("chat_template_kwargs"))
    except WrongInput as error:
        return {"no_modelfile": str(error)}
    text = AutoConfig.from_pretrained(model).get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or CONTEXT
    context = min(int(config.get("sequence_len") or CONTEXT), longest)
    has_file = (model / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(model) if has_file else GenerationConfig()
    stops = modelfile.list_stops(tokenizer, generation)
    lines = modelfile.write_modelfile(source, pieces, stops, context)
    (folder / "Modelfile").write_text(lines, encoding="utf-8")
    return {}


def compare_gguf(merged: Path, file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How the model in a GGUF file differs from the merged model that it was made of."""
    options = config.get("chat_template_kwargs")
    model, tokenizer = models.load({"base_model": str(merged), "dtype": config.get("dtype")})
    shape = "chat" if tokenizer.chat_template else "bare"
    expected, dtype = compute_logits(model, tokenizer, options, shape), model.dtype
    del model
    gc.collect()
    loaded, own_tokenizer = gguf.load_gguf(file, dtype)
    name = str(dtype).removeprefix("torch.")
    report: dict[str, Any] = {"computed_in": name, "tolerance": TOLERANCE.get(name, 1.0)}
    report |= measure_difference(expected, compute_logits(loaded, tokenizer, options, shape))
    if not report["largest_logit_difference"] <= report["tolerance"]:
        raise JobFailed(
            "the GGUF file holds another model than the merged one: a logit differs by "
            f"{report['largest_logit_difference']:.3g}, more than {report['tolerance']:g}; "
            "nothing is kept"
        )
    texts = [
        prompts.render(tokenizer, [{"role": "user", "content": text}], options, shape)
        for text in TEXTS
    ]
    report["same_tokens"] = all(
        own_tokenizer.encode(text, add_special_tokens=False)
        == tokenizer.encode(text, add_special_tokens=False)
        for text in texts
    )
    return report


def merge_and_compare(
    config: dict[str, Any], adapter: Path, form: str, target: Target
) -> dict[str, Any]:
    """Writes the merged model to the target's folder; returns how it differs from base + adapter.

    A 4-bit model differs by its rounding. It must be the one that was rounded; a model of more
    bits must be base + adapter.
    """
    options, precision = config.get("chat_template_kwargs"), models.precision(config)
    model, tokenizer = models.assemble(config, adapter)
    dtype = str(model.dtype).removeprefix("torch.")
    if template := prompts.template(tokenizer, form):
        tokenizer.chat_template = template
    # A base without a chat template can be merged too; the texts are then bare.
    shape = "chat" if tokenizer.chat_template else "bare"
    adapted = compute_logits(model, tokenizer, options, shape)
    if target.bits == 4:
        with model.disable_adapter():
            plain = compute_logits(model, tokenizer, options, shape)
    base = model.unload()
    del model
    with naming(adapter / FOLDERS[target.bits]):
        merged = merge_weights(base, config, adapter, target)
        del base
        expected = (
            compute_logits(merged, tokenizer, options, shape) if target.bits == 4 else adapted
        )
        add_end_token(merged, tokenizer)
        save(merged, config, target.folder)
        tokenizer.save_pretrained(target.folder)
    del merged
    gc.collect()

    def load_and_compute(merged_config: dict[str, Any]) -> list[Any]:
        merged, _ = models.load({"base_model": str(target.folder)} | merged_config)
        return compute_logits(merged, tokenizer, options, shape)

    loaded = load_and_compute({"dtype": dtype})
    stored = target.dtype(config) if target.bits == 16 else dtype
    tolerance = TOLERANCE.get("int8" if precision == "int8" else stored, 1.0)
    distance = measure_difference(expected, loaded)["largest_logit_difference"]
    if not distance <= tolerance:  # nor where it is not a number
        raise JobFailed(
            f"the merged model is not {'what was saved' if target.bits == 4 else 'base + adapter'}:"
            f" a logit differs by {distance:.3g}, more than {tolerance:g}; nothing is kept"
        )
    report: dict[str, Any] = {"computed_in": dtype, "tolerance": tolerance}
    report |= measure_difference(adapted, loaded)
    if target.bits == 4:
        report["from_base"] = measure_difference(plain, loaded)
    if precision == "nf4" and not target.bits:
        again = load_and_compute(models.PRECISIONS["nf4"])
        report["quantized_again"] = measure_difference(adapted, again)
    return report


def add_end_token(model: Any, tokenizer: Any) -> None:
    """Lets generation stop at the adapter's end token, which may not be the base's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id not in (None, *ends):
        model.generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]


def merge_weights(base: Any, config: dict[str, Any], adapter: Path, target: Target) -> Any:
    """The merged model with the weights that the target has; changes the loaded `base`."""
    import torch

    precision = models.precision(config)
    # PEFT merges into a 4-bit layer by rounding the sum, as `merge_aware` trains it.
    is_4bit = precision in ("nf4", "fp4")
    stays = is_4bit and target.bits == 4
    rounds = stays or models.computes_rounded(config)
    if (is_4bit or precision == "int8") and not rounds:
        base = base.dequantize()
    checked = models.check_adapter(config, adapter)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if checked.touches_embeddings and head.weight is embedding.weight:
        # An adapter of one of them does not change the other.
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    try:
        merged = models.attach(base, adapter, checked).merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs detected" not in str(error):
            raise
        raise JobFailed(f"{models.NOT_FINITE}; nothing is kept") from error
    if rounds and not stays:
        merged = merged.dequantize()
    if target.bits == 16:
        return merged.to(getattr(torch, target.dtype(config)))
    return merged if stays or not target.bits else quantize(merged, config, target.folder)


def save(merged: Any, config: dict[str, Any], folder: Path) -> None:
    # transformers would restore the names of the quantized file, which fails.
    published = models.published_precision(str(config["base_model"]))
    merged.save_pretrained(folder, save_original_format=not published)


def quantize(merged: Any, config: dict[str, Any], folder: Path) -> Any:
    """A model's linear layers in NF4, but for the head, as in the base of a QLoRA recipe."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        save(merged, config, Path(place))
        models.load_tokenizer(config).save_pretrained(place)
        options = {"base_model": place, "dtype": config.get("dtype")} | models.PRECISIONS["nf4"]
        return models.load_base(options)[0]


def merge_and_report(subject: subjects.Subject, bits: int | None, to_gguf: bool) -> None:
    """Merges an adapter and prints how the result compares with base + adapter."""
    config, adapter, form = subject.config, subject.adapter, subject.prompt_format
    if not adapter:
        raise WrongInput(f"{subject.name} has no adapter to merge")
    print(f"merge      {subject.name} into {config['base_model']}", flush=True)
    target = merge(config, adapter, form, bits or (16 if to_gguf else None))
    target = write_gguf(config, target, form) if to_gguf else target
    report = read_json(target / REPORT)
    print(f"merge      {describe_merge(target, report, bits, to_gguf)}")
    if again := report.get("quantized_again"):
        print(
            f"merge      quantized to 4 bits again it would differ by up to "
            f"{again['largest_logit_difference']:.2g}, with the same next token on "
            f"{again['same_next_token']:.0%}: serve it as it is, or base and adapter apart"
        )
    base, largest = report.get("from_base"), "largest_logit_difference"
    if base and base[largest] < report[largest]:  # nearer to the base than to base + adapter
        print(
            f"merge      rounding takes most of this adapter away: the next token is the base's on "
            f"{base['same_next_token']:.0%}; use BITS=16, or train with merge_aware"
        )
    if reason := report.get("no_modelfile"):
        print(f"merge      no Modelfile: {reason}")
    elif (path := target / "Modelfile").is_file():
        print(f"merge      ollama create my-model -f {shown(path)}")


def find_subject(
    recipe: str | None, adapter: str | None, precision: str | None, prompt_format: str | None
) -> subjects.Subject:
    """What is merged, named as in `subjects.find`."""
    try:
        return subjects.find(recipe, adapter, precision, prompt_format)
    except subjects.NotRenderable:  # the weights can be merged, with the base's template
        return subjects.find(recipe, adapter, precision, "chat")


def describe_merge(target: Path, report: dict[str, Any], bits: int | None, to_gguf: bool) -> str:
    distance = f"{report['largest_logit_difference']:.2g}"
    files = [*target.glob("*.safetensors"), *target.glob("*.gguf")]
    size = sum(path.stat().st_size for path in files) / 1e6
    text = f"{shown(target)}, {size:,.0f} MB: "
    if bits == 4:
        return text + (
            f"rounded to 4 bits; logits differ from base + adapter by up to {distance}, with the "
            f"same next token on {report['same_next_token']:.0%}"
        )
    other = "the 16-bit model" if to_gguf else "base + adapter"
    text += f"logits differ from {other} by at most {distance} (tolerance {report['tolerance']:g})"
    if to_gguf and not report["same_tokens"]:
        text += "; transformers reads another tokenizer from it, so compare answers before use"
    return text
