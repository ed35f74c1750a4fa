"""What differs between the supported versions of Axolotl and the libraries that it pins.

Python 3.11 has Axolotl 0.19 with transformers 5.16, Python 3.12 and 3.13 have Axolotl 0.21 with
transformers 5.20. Here is what differs between them, and for which versions. Workarounds for all of
them stand where they are needed. docs/install.md has the table of tested versions.
"""

import sys
from typing import Any


def gguf_options() -> dict[str, Any]:
    """Arguments that let `from_pretrained(gguf_file=…)` return dense weights.

    transformers 5.20 otherwise keeps the GGUF blocks, for which it asks the Hub for a kernel;
    before it there was no such option, and weights were always dense.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def without_quantizer(model: Any) -> Any:
    """A model of dense weights that `save_pretrained` writes.

    transformers 5.20 still calls a dequantized GGUF model quantized, and refuses to save it.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def skip_peer_check() -> None:
    """Lets several processes train on a machine without a GPU where torch is its CUDA build.

    Axolotl asks whether GPUs reach each other. torch's CPU build answers with the AssertionError
    that Axolotl expects there, its CUDA build with a RuntimeError. For Axolotl 0.19 and 0.21.
    """
    from axolotl.utils import environment

    environment.check_cuda_p2p_support = lambda: True


def skip_processor() -> None:
    """Trains a base with a vision tower on text without what prepares its images.

    Axolotl loads that for every such base, and Qwen3.5's needs torchvision, which nothing else here
    does. For Axolotl 0.19 and 0.21.
    """
    from axolotl import train

    train.load_processor = lambda cfg, tokenizer: None


def skip_gpu_kernels() -> None:
    """Computes linear attention with torch on a machine without a GPU.

    transformers takes the kernels of flash-linear-attention wherever the package imports, and their
    Triton finds no driver there. Called before a model's module is imported. For transformers 5.16
    and 5.20.
    """
    import torch

    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]  # which makes its import fail
