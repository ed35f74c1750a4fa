"""Loads a base at the precision that a recipe trains it on, with or without its adapter.

Used by scoring and chat, so that an adapter always meets the base that it was trained on.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools import prompt


def dequantize_once(model: Any, training: bool = False) -> int:
    """Keeps a dense copy of every quantized weight of a model on the CPU; returns their bytes.

    bitsandbytes dequantizes a weight in every forward and backward pass. On a CPU that costs more
    than the product itself for small batches, and a small model has room for the dense copy.
    A 4-bit copy comes from bitsandbytes' own `dequantize_4bit`; an 8-bit one is CB * SCB / 127, as
    in its `MatMul8bitFp`, which it uses on a CPU in training only: in scoring it rounds activations
    to 8 bits, so 8-bit weights are copied for `training` alone. The quantized weight stays in
    place, and the numbers and what is saved are the same. Where the copies would take more than
    half of the free memory, or the model is on a GPU, nothing changes and 0 is returned.
    """
    import bitsandbytes as bnb
    import psutil
    import torch

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt) if training else bnb.nn.Linear4bit
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    layers = [m for m in layers if m.weight.device.type == "cpu"]
    size = sum(4 * m.in_features * m.out_features for m in layers)
    if size > psutil.virtual_memory().available / 2:
        return 0
    for layer in layers:
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense = dense.to(layer.compute_dtype or dense.dtype)
        else:
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            dense = layer.state.CB.float() * (layer.state.SCB.float().unsqueeze(1) / 127)

        def forward(
            x: Any, dense: Any = dense, layer: Any = layer, original: Any = layer.forward
        ) -> Any:
            if not layer.training and isinstance(layer, bnb.nn.Linear8bitLt):
                return original(x)
            bias = None if layer.bias is None else layer.bias.to(dense.dtype)
            return torch.nn.functional.linear(x.to(dense.dtype), dense, bias).to(x.dtype)

        layer.forward = forward
    return size


def keep_8bit_scales() -> None:
    """Lets DoRA run on an 8-bit base on a CPU, where PEFT 0.20 and bitsandbytes 0.50 disagree.

    In every DoRA forward PEFT replaces a layer's weight by `weight.to("cpu")`. bitsandbytes had
    moved the weight's scales (SCB) into the layer's state, so the new weight has none, and the
    next forward would put that none into the state. Here the state's scales are kept.
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


# What a config says of a base at each precision that one can ask for; `dtype` is not Axolotl's.
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
    """A config with its base at another precision; as it is where it has that one."""
    if name == precision(config):
        return config
    other = {key for row in PRECISIONS.values() for key in row}
    return {key: value for key, value in config.items() if key not in other} | PRECISIONS[name]


def precision(config: dict[str, Any]) -> str:
    """`nf4`, `fp4`, `int8`, `bf16`, `fp16`, `fp32`, or `full`: of the base's linear layers.

    `full` is the precision in which the device computes, bfloat16 on a GPU and float32 on a CPU.
    """
    for name, row in PRECISIONS.items():
        if config.get("dtype") and config["dtype"] == row.get("dtype"):
            return name
    if config.get("load_in_4bit"):
        return str((config.get("bnb_config_kwargs") or {}).get("bnb_4bit_quant_type", "nf4"))
    return "int8" if config.get("load_in_8bit") else "full"


def vocabulary(tokenizer: Any, config: dict[str, Any]) -> int:
    """Rows of the embedding that Axolotl trains a tokenizer with."""
    step = 32 if config.get("resize_token_embeddings_to_32x") else 1
    return -(-len(tokenizer) // step) * step


def load_tokenizer(config: dict[str, Any], adapter: Path | None = None) -> Any:
    """The tokenizer that a config trains with: the run's own where `adapter` is a run."""
    from transformers import AutoTokenizer

    if adapter and (adapter / "tokenizer.json").is_file() and (adapter / "config.yaml").is_file():
        return AutoTokenizer.from_pretrained(adapter)
    if prompt.changes_tokenizer(config):
        from axolotl.loaders import load_tokenizer as load_as_trained
        from axolotl.utils.dict import DictDefault

        base = config["base_model"]
        with TemporaryDirectory() as folder:  # where overridden tokens are written
            content = prompt.with_template(config) | {"output_dir": folder}
            for key in ("base_model_config", "tokenizer_config"):
                content[key] = config.get(key) or base
            return load_as_trained(DictDefault(content))
    tokenizer = AutoTokenizer.from_pretrained(config["base_model"])
    for name, token in (config.get("special_tokens") or {}).items():
        setattr(tokenizer, name, token)
    return tokenizer


def load(config: dict[str, Any], adapter: Path | None = None) -> tuple[Any, Any]:
    """Loads (model, tokenizer) of a recipe's merged config, ready to generate.

    The base is quantized as Axolotl quantizes it for training; compute runs in bfloat16 on a GPU
    and in float32 on a CPU, or in `dtype` where the config has one (see `at`). `adapter` is a PEFT
    folder; without it the base alone is returned.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, config.get("dtype") or ("bfloat16" if on_gpu else "float32"))
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": 0 if on_gpu else "cpu"}}
    if config.get("load_in_4bit"):
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        four |= {"bnb_4bit_compute_dtype": dtype} | (config.get("bnb_config_kwargs") or {})
        kwargs["quantization_config"] = BitsAndBytesConfig(**{"load_in_4bit": True} | four)
    elif config.get("load_in_8bit"):
        keep_8bit_scales()
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    tokenizer = load_tokenizer(config, adapter)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(config["base_model"], **kwargs)
    rows = vocabulary(tokenizer, config)
    if model.get_input_embeddings().num_embeddings < rows:
        # As Axolotl does. The adapter's file holds all rows; a base alone has random new ones.
        torch.manual_seed(config.get("seed") or 42)
        model.resize_token_embeddings(rows, mean_resizing=False)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
        # lm-eval ties a model's weights anew; an adapter may bring a head of its own.
        model.tie_weights = lambda *_, **__: None
    model.eval()
    dequantize_once(model)
    return model, tokenizer
