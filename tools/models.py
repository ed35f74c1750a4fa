"""Loads a base at the precision that a recipe trains it on, with or without its adapter.

Scoring, chat and merge use it, so that an adapter always meets the base that it was trained on. An
adapter is checked against the base's modules before any weight is loaded; afterwards every tensor
of it must have been set, and the base's own weights must be unchanged.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools import adapters, architectures, prompts, smollm2, versions
from tools.architectures import base_folder
from tools.common import ROOT, JobFailed, WrongInput, read_json, shown
from tools.hub_errors import explain_errors
from tools.runs import Run


def dequantize_once(model: Any, training: bool = False) -> int:
    """Keeps a dense copy of every quantized weight of a model on the CPU; returns their bytes.

    bitsandbytes dequantizes a weight in every forward and backward pass. On a CPU that costs more
    than the product itself for small batches, and a small model has room for the dense copy.
    A 4-bit copy comes from `dequantize_4bit`; an 8-bit one is CB * SCB / 127, as in `MatMul8bitFp`,
    which bitsandbytes uses on a CPU in training only. In scoring it rounds activations to 8 bits
    and multiplies integers; the copy is then of CB as float32, in which a CPU without AVX-512
    multiplies them. The quantized weight stays in place; results and saved files are the same.
    Returns 0 and changes nothing where the copies would take more than half of the free memory, or
    the model is on a GPU.
    """
    import bitsandbytes as bnb
    import psutil
    import torch

    kinds: tuple[Any, ...] = (bnb.nn.Linear4bit,)
    if training or torch.backends.cpu.get_cpu_capability() != "AVX512":
        kinds += (bnb.nn.Linear8bitLt,)
    layers = [m for m in model.modules() if isinstance(m, kinds) and m.weight.device.type == "cpu"]
    size = sum(4 * layer.in_features * layer.out_features for layer in layers)
    if size > psutil.virtual_memory().available / 2:
        return 0

    def replace_forward(layer: Any, dense: Any) -> None:
        quantized_forward = layer.forward
        only_training = isinstance(layer, bnb.nn.Linear8bitLt)

        def forward(x: Any) -> Any:
            if only_training and not layer.training:
                return quantized_forward(x)
            bias = None if layer.bias is None else layer.bias.to(dense.dtype)
            return torch.nn.functional.linear(x.to(dense.dtype), dense, bias).to(x.dtype)

        layer.forward = forward

    for layer in layers:
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            replace_forward(layer, dense.to(layer.compute_dtype or dense.dtype))
            continue
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        if training:
            scales = layer.state.SCB.float().unsqueeze(1) / 127
            replace_forward(layer, layer.state.CB.float() * scales)
        else:
            layer.forward = build_int8_forward(layer)
    return size


def build_int8_forward(layer: Any) -> Callable[[Any], Any]:
    """The forward of an 8-bit layer in scoring, with a float32 copy of its integers.

    Its results are those of `MatMul8bitLt` on a CPU without AVX-512, bit for bit. It leaves out
    conversions: of the weight in each pass, and of products, which are whole numbers, to integers.
    """
    import bitsandbytes as bnb
    import torch

    plain_forward, state, bias = layer.forward, layer.state, layer.bias
    integers = state.CB.float().t()

    def forward(x: Any) -> Any:
        if layer.training:
            return plain_forward(x)
        flat = x.reshape(-1, x.shape[-1])
        # Columns with a value beyond the threshold are multiplied as they are (Dettmers et al.
        # 2022, sec. 3.2).
        values = flat.half().float()
        rounded, scales, outliers = bnb.functional.int8_vectorwise_quant(
            values, threshold=state.threshold
        )
        product = rounded.float() @ integers
        product *= scales.unsqueeze(1) * state.SCB.unsqueeze(0)
        product *= 6.200124e-05  # 1 / 127², as bitsandbytes writes it
        product = (product if bias is None else product + bias.to(x.dtype)).to(x.dtype)
        if outliers is not None and outliers.numel():
            columns = state.CB[:, outliers].contiguous()
            weights = torch.ops.bitsandbytes.int8_vectorwise_dequant(columns, state.SCB)
            product = product.addmm(flat[:, outliers].contiguous(), weights.to(x.dtype).t())
        return product.reshape(*x.shape[:-1], -1)

    return forward


def round_in_forward(model: Any) -> None:
    """Lets the adapted layers of a 4-bit model compute with the weight of a merge, Q(W + γBA).

    Training and scoring then meet the model that `make merge BITS=4` saves, bit for bit: the sum
    and its rounding are PEFT's and bitsandbytes' own. Rounding has no gradient, so A and B get that
    of W + γBA (straight-through estimator): the product with A and B is added and taken away again
    without a gradient. Without the adapter a layer computes with W.
    """
    from peft.tuners.lora.bnb import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.forward = build_rounded_forward(layer)


def build_rounded_forward(layer: Any) -> Callable[..., Any]:
    """The forward of an adapted 4-bit layer with its rounded weight (see `round_in_forward`)."""
    import bitsandbytes as bnb
    import torch
    from peft.utils.integrations import dequantize_bnb_weight

    plain_forward, (name,) = layer.forward, layer.active_adapters
    down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    cache: dict[Any, Any] = {}  # of one dense weight on a CPU, by the versions of A and B

    def round_sum() -> Any:
        weight = layer.get_base_layer().weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            total = dequantize_bnb_weight(weight, weight.quant_state) + layer.get_delta_weight(name)
            options = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            packed, state = bnb.functional.quantize_4bit(
                total, **{option: getattr(weight, option) for option in options}
            )
            return bnb.functional.dequantize_4bit(packed, state)

    def find_weight() -> Any:
        if layer.training or down.weight.device.type != "cpu":
            cache.clear()  # optimizers of compiled code change a weight without a new version
            return round_sum()
        version = (down.weight._version, up.weight._version)
        if version not in cache:
            cache.clear()
            cache[version] = round_sum()
        return cache[version]

    def forward(x: Any, *arguments: Any, **options: Any) -> Any:
        if layer.disable_adapters or layer.merged:
            return plain_forward(x, *arguments, **options)
        weight, bias = find_weight(), layer.get_base_layer().bias
        bias = None if bias is None else bias.to(weight.dtype)
        output = torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        if not torch.is_grad_enabled():
            return output
        product = (up(down(x.detach().to(down.weight.dtype))) * scaling).to(x.dtype)
        return output + (product - product.detach())

    return forward


def keep_8bit_scales() -> None:
    """Lets DoRA run on an 8-bit base on a CPU, where PEFT and bitsandbytes 0.50 disagree.

    In every DoRA forward PEFT replaces a layer's weight by `weight.to("cpu")`. bitsandbytes has
    moved the weight's scales (SCB) into the layer's state, so the new weight has none, and the
    next forward would put that none into the state. This keeps the state's scales.
    """
    from bitsandbytes.nn import Linear8bitLt

    original = Linear8bitLt.init_8bit_state
    if original.__name__ == "keeping_scales":
        return

    def keeping_scales(layer: Any) -> None:
        if layer.weight.SCB is None:
            layer.weight.SCB = layer.state.SCB
        original(layer)

    Linear8bitLt.init_8bit_state = keeping_scales


# The keys of a config for each precision of the base; `dtype` is not an Axolotl key.
PRECISIONS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    },
    "int8": {"load_in_8bit": True},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "fp32": {"dtype": "float32"},
}


def at(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config with its base at the precision `name`; unchanged where it has that one already."""
    current = precision(config)
    if name == current:
        return config
    if published_precision(base := str(config.get("base_model") or "")):
        raise WrongInput(
            f"PRECISION={name}: the base {base} was published quantized to {current}, "
            "and has no other precision"
        )
    other = {key for row in PRECISIONS.values() for key in row}
    return {key: value for key, value in config.items() if key not in other} | PRECISIONS[name]


def precision(config: dict[str, Any]) -> str:
    """`nf4`, `fp4`, `int8`, `bf16`, `fp16`, `fp32`, or `full`: of the base's linear layers.

    `full` is the precision in which the device computes, bfloat16 on a GPU and float32 on a CPU.
    """
    if quantized := published_precision(str(config.get("base_model") or "")):
        return quantized
    for name, row in PRECISIONS.items():
        if config.get("dtype") and config["dtype"] == row.get("dtype"):
            return name
    if config.get("load_in_4bit"):
        return str((config.get("bnb_config_kwargs") or {}).get("bnb_4bit_quant_type", "nf4"))
    return "int8" if config.get("load_in_8bit") else "full"


NOT_FINITE = (
    "the model computes values that are not finite (NaN or infinity): its weights are too large, "
    "at least for float16 (PRECISION=bf16 and fp32 hold larger ones)"
)


def load_tokenizer(config: dict[str, Any], adapter: Path | None = None) -> Any:
    """The tokenizer that a config trains with: the run's own where `adapter` is a run."""
    from transformers import AutoTokenizer

    if adapter and Run(adapter).has_tokenizer:
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    base = config["base_model"]
    if prompts.changes_tokenizer(config):
        from axolotl.loaders import load_tokenizer as load_as_trained
        from axolotl.utils.dict import DictDefault

        with TemporaryDirectory() as folder:  # where overridden tokens are written
            content = prompts.with_template(config) | {"output_dir": folder}
            for key in ("base_model_config", "tokenizer_config"):
                content[key] = config.get(key) or base
            return load_as_trained(DictDefault(content))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    for name, token in (config.get("special_tokens") or {}).items():
        setattr(tokenizer, name, token)
    if adapter and (own_template := read_template(adapter)):
        tokenizer.chat_template = own_template
    return load_own_tokenizer(adapter, tokenizer) if adapter else tokenizer


def load_own_tokenizer(adapter: Path, tokenizer: Any) -> Any:
    """The tokenizer beside an adapter if it extends that of the base, `tokenizer`; else the latter.

    Many bases have more embedding rows than tokens, so an adapter can add tokens without adding
    weights. Its end token may be another, too.
    """
    from transformers import AutoTokenizer

    names = {"tokenizer.json", "tokenizer.model", "vocab.json", "added_tokens.json"}
    if not any((adapter / name).is_file() for name in names):
        return tokenizer
    extended: Any = None
    with suppress(ValueError, KeyError, TypeError, AttributeError, OSError):  # of a damaged file
        extended = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False)
    if extended is None or not tokenizer.get_vocab().items() <= extended.get_vocab().items():
        print(f"note       {shown(adapter)}: its tokenizer does not extend the base's: not used")
        return tokenizer
    extended.chat_template = tokenizer.chat_template
    extended.pad_token = extended.pad_token or tokenizer.pad_token
    return extended


def read_template(adapter: Path) -> str | None:
    """The chat template in an adapter's folder, which takes precedence over its base's.

    Of several named templates it is "default". Raises WrongInput for a file that is not UTF-8, and
    for what is no template.
    """
    if (path := adapter / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise WrongInput(f"{shown(path)}: not UTF-8 at byte {error.start + 1}") from None
    template: Any = None
    for path in (adapter / "chat_template.json", adapter / "tokenizer_config.json"):
        if path.is_file() and (template := read_json(path).get("chat_template")):
            break
    named: dict[Any, Any] = {"default": template}
    if isinstance(template, list):
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
    elif isinstance(template, dict):
        named = template
    if template and not isinstance(named.get("default"), str):
        raise WrongInput(
            f"{shown(path)}: chat_template is neither a text nor holds one named default; write "
            "the template to chat_template.jinja beside it"
        )
    return named.get("default")


# Prompts that show whether two tokenizers and their templates write the same tokens.
PROBES = [
    [{"role": "user", "content": "Net sales rose by 3.5 % to EUR 1,250m.\n\n  Résumé: 你好 🙂"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
]


def find_own_prompting(config: dict[str, Any], adapter: Path, form: str = "chat") -> str:
    """Eight hexadecimal digits for an adapter's template and tokens, where they write other prompts
    of a format than its base's do; "" where they do not, for runs of this project, and without the
    base's files.
    """
    if Run(adapter).has_tokenizer or base_folder(config["base_model"]) is None:
        return ""
    with redirect_stdout(StringIO()):  # loading the adapter prints its notes
        own, base = (load_tokenizer(config, folder) for folder in (adapter, None))

    def write_probes(tokenizer: Any) -> list[Any]:
        written: list[Any] = [tokenizer.eos_token]
        for probe in PROBES:
            with suppress(WrongInput):  # a template may take no system turn
                options = config.get("chat_template_kwargs")
                written.append(prompts.tokens(tokenizer, probe, options, form))
        return written

    added = own.get_vocab().keys() - base.get_vocab().keys() - {own.pad_token}
    if write_probes(own) == write_probes(base) and not added:
        return ""
    template = own.chat_template if form == "chat" else None
    content = [template, own.bos_token, own.eos_token, sorted(own.get_vocab().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def identify_base(base: str) -> dict[str, Any]:
    """What tells a base's weights from others: its commit, or sizes and times; {} if not here."""
    folder = base_folder(base)
    if folder is None:
        return {}
    files = sorted(folder.glob("*.safetensors"))
    stats = {file.name: file.stat() for file in files}
    return {
        "base_revision": None if (ROOT / base).is_dir() else folder.name,
        "base_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


# What a base is loaded from: no pickle, no second copy of the weights.
BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
COPIES = ["consolidated*", "original/*", "onnx/*"]


def bring_base(base: str) -> Path:
    """The folder with a base's files; writes SmolLM2 or downloads a base of the Hub if needed.

    Raises WrongInput or JobFailed where the base cannot be had.
    """
    smollm2.ensure(base)
    if (ROOT / base).is_dir():
        return ROOT / base
    check_base(base)
    from huggingface_hub import constants, snapshot_download

    offline = "; HF_HUB_OFFLINE forbids its download" if constants.HF_HUB_OFFLINE else ""
    with explain_errors(f"the base {base}"):
        try:
            snapshot = snapshot_download(base, allow_patterns=BASE_FILES, ignore_patterns=COPIES)
        except FileNotFoundError as error:  # the Hub's LocalEntryNotFoundError
            if not offline:
                raise
            raise JobFailed(f"the base {base} is not in the Hub's cache{offline}") from error
    folder = Path(snapshot)
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    shards = set((weight_map or {"": "model.safetensors"}).values())
    if missing := sorted(name for name in shards if not (folder / name).is_file()):
        where = "in the Hub's cache" if offline else "on the Hub; no other weights are loaded"
        raise JobFailed(f"the base {base} has no {missing[0]} {where}{offline}")
    return folder


@cache
def published_precision(base: str) -> str | None:
    """The precision of a base that was published quantized; None of any other.

    Its config.json decides; without one here, its name. Raises WrongInput for a method that
    bitsandbytes does not compute.
    """
    path = architectures.find_file(base, "config.json")
    if path:
        options = read_json(path).get("quantization_config")
        if not isinstance(options, dict):
            return None
        if options.get("load_in_4bit") or options.get("_load_in_4bit"):
            return str(options.get("bnb_4bit_quant_type", "fp4"))
        if options.get("load_in_8bit") or options.get("_load_in_8bit"):
            return "int8"
        method = str(options.get("quant_method") or "another method")
        if method == "mxfp4":  # OpenAI's format of experts, which `load_base` makes dense
            return None
    else:
        name = re.search(r"-(bnb-4bit|bnb-8bit|gptq|awq|gguf|fp8|hqq|aqlm)\b", base, re.I)
        method = name[1].lower() if name else ""
        if not method or method.startswith("bnb"):
            return {"": None, "bnb-4bit": "nf4", "bnb-8bit": "int8"}[method]
    raise WrongInput(
        f"the base {base} was published quantized with {method}, which is not supported here; "
        "RECIPE=… names a recipe on the base that was not quantized"
    )


def check_base(base: str) -> None:
    """Raises WrongInput where a file of a base is missing, cut off, or something else."""
    folder = base_folder(base)
    if folder is None:
        if base.startswith(("/", "./", "../", "~")):
            raise WrongInput(f"the base {base} is no folder")
        return
    if not (folder / "config.json").is_file():
        raise WrongInput(f"the base {shown(folder)} has no config.json")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    for path in sorted(folder.glob("*.safetensors")):
        adapters.read_header(path, largest_header=2**27)


def find_loader(config: Any) -> Any:
    """The loader of transformers for a base's config: the one that Axolotl takes for training.

    A base with a vision tower is loaded with it, since its layers have other names then.
    """
    versions.skip_gpu_kernels()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    has_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


def base_modules(base: str) -> adapters.Modules:
    """The modules of a base that can have an adapter, without loading any weight."""
    import torch
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = find_loader(config).from_config(config)
    head = model.get_output_embeddings()
    modules: adapters.Modules = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = "head" if module is head else "linear"
            modules[name] = adapters.Module(kind, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            modules[name] = adapters.Module("linear", module.nx, module.nf)
        elif module is model.get_input_embeddings():
            size = (module.num_embeddings, module.embedding_dim)
            modules[name] = adapters.Module("embedding", *size)
    return modules


def check_adapter(config: dict[str, Any], adapter: Path) -> adapters.Checked:
    """The adapter in a PEFT folder; raises WrongInput unless it fits the config's base."""
    base = str(config["base_model"])
    checked = adapters.check_modules(adapter, base_modules(base), base)
    return replace(checked, rounded=computes_rounded(config))


def computes_rounded(config: dict[str, Any]) -> bool:
    """Whether base and adapter compute with their rounded sum (see `round_in_forward`)."""
    return bool(config.get("merge_aware")) and precision(config) in ("nf4", "fp4")


def load(config: dict[str, Any], adapter: Path | None = None) -> tuple[Any, Any]:
    """Loads (model, tokenizer) of a recipe's merged config, ready to generate (see `assemble`)."""
    model, tokenizer = assemble(config, adapter)
    dequantize_once(model)
    return model, tokenizer


def assemble(config: dict[str, Any], adapter: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a recipe's merged config.

    The base is quantized as Axolotl quantizes it for training; compute runs in bfloat16 on a GPU
    and in float32 on a CPU, or in the config's `dtype` (see `at`). `adapter` is a PEFT folder;
    without it the base alone is returned.
    """
    check_base(str(config["base_model"]))
    checked = check_adapter(config, adapter) if adapter else None
    model, tokenizer = load_base(config, adapter)
    if adapter and checked:
        room = checked.rows or model.get_input_embeddings().weight.shape[0]
        # Some bases themselves have a token without a row, and never use it.
        if len(tokenizer) > room and len(tokenizer) > len(load_tokenizer(config)):
            raise WrongInput(
                f"{shown(adapter)}: its tokenizer has {len(tokenizer):,} tokens and its weights "
                f"{room:,}"
            )
        add_rows(model, room)
        model = attach(model, adapter, checked)
        print_revision(str(config["base_model"]), checked.settings.revision)
        if checked.rounded:
            round_in_forward(model)
    model.eval()
    return model, tokenizer


def print_revision(base: str, revision: str | None) -> None:
    """Prints a note if an adapter names another revision of its base than the one loaded."""
    from huggingface_hub import try_to_load_from_cache

    path = None if (ROOT / base).exists() else try_to_load_from_cache(base, "config.json")
    commit = Path(path).parent.name if isinstance(path, str) else ""
    if commit and revision not in (None, "main", commit):
        print(
            f"note       the adapter names revision {revision} of {base}; {commit[:12]} is loaded"
        )


def load_base(config: dict[str, Any], adapter: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a config's base alone; the tokenizer is that of `adapter`, if it is a
    run. Without an adapter the base has a row for each token that the config adds.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig, Mxfp4Config

    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, config.get("dtype") or ("bfloat16" if on_gpu else "float32"))
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": 0 if on_gpu else "cpu"}}
    if precision(config) == "int8":
        keep_8bit_scales()
    if published_precision(str(config["base_model"])):
        pass  # its own config.json describes its quantization
    elif config.get("load_in_4bit"):
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
        options |= PRECISIONS["nf4"]["bnb_config_kwargs"] | (config.get("bnb_config_kwargs") or {})
        kwargs["quantization_config"] = BitsAndBytesConfig(**options)
    elif config.get("load_in_8bit"):
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.get("model_quantization_config") == "Mxfp4Config":
        options = config.get("model_quantization_config_kwargs") or {}
        kwargs["quantization_config"] = Mxfp4Config(**options)
    tokenizer = load_tokenizer(config, adapter)
    tokenizer.padding_side = "left"
    base = config["base_model"]
    base_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    model = find_loader(base_config).from_pretrained(base, trust_remote_code=False, **kwargs)
    if adapter is None:
        step = 32 if config.get("resize_token_embeddings_to_32x") else 1
        add_rows(model, -(-len(tokenizer) // step) * step)
    return model, tokenizer


def add_rows(model: Any, rows: int) -> None:
    """Gives the embeddings of a base at least `rows` rows, for added tokens.

    The new rows are copies of the first one: without an adapter a new token is never likelier than
    the first token, so the base answers as it did.
    """
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    if before >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[0]


def attach(model: Any, adapter: Path, checked: adapters.Checked) -> Any:
    """`model` with an adapter; raises WrongInput unless all of it was set and nothing else."""
    import torch
    from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
    from safetensors.torch import load_file

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and len(checked.whole) == 1 and not checked.settings.saved:
        raise WrongInput(
            f"{shown(adapter / adapters.WEIGHTS)} holds the weights of {checked.whole[0]} alone, "
            "and its base has one weight for embedding and head; save both (PEFT's "
            "save_embedding_layers=True), or name one in modules_to_save"
        )
    if checked.touches_embeddings:
        # lm-eval ties weights again, which would undo the training of one of them.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    before = {name: (weight, sum_bytes(weight)) for name, weight in model.named_parameters()}
    adapted = PeftModelForCausalLM(model, LoraConfig(**checked.peft_config))
    path = adapter / adapters.WEIGHTS
    tensors = load_file(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in checked.copies}
    lora_b = [tensor for name, tensor in tensors.items() if re.search("lora_(embedding_)?B", name)]
    is_zero = not any(map(torch.any, lora_b))
    if is_zero and not checked.whole and not checked.settings.dora:
        print(f"note       {shown(path)}: lora_B is all zeros, so the adapter changes nothing")
    result = set_peft_model_state_dict(adapted, tensors)
    # PEFT also calls the base's own weights missing.
    trained = re.compile(r"\.(lora_\w+|modules_to_save)\.default\b")
    for keys, problem in (
        (filter(trained.search, result.missing_keys), "lacks {} tensors"),
        (result.unexpected_keys, "holds {} tensors that PEFT does not use"),
    ):
        if names := sorted(keys):
            raise WrongInput(
                f"{shown(path)} {problem.format(len(names))}, {names[0][:120]!r} first"
            )
    for name, (weight, total) in before.items():
        if sum_bytes(weight) != total:
            raise WrongInput(
                f"{shown(path)}: loading it changes the base's own weights ({name}), so that the "
                "base could not be scored beside it; it was made on another base"
            )
    return adapted


def sum_bytes(weight: Any) -> int:
    """A checksum of a tensor, which a change of its numbers almost surely changes."""
    import torch

    flat = weight.detach().contiguous().flatten().view(torch.uint8)
    wide = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    return int(wide.sum(dtype=torch.int64))
