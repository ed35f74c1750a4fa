"""What answers: transformers here, vLLM on a GPU, or a model behind an OpenAI-compatible endpoint.

    python -m tools eval sentiment_r4 --backend vllm

A backend takes what is scored and returns a function (side, label, rows) → context manager of an
lm-eval model.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tools import adapters, models
from tools.common import ROOT, WrongInput
from tools.prompts import changes_tokenizer
from tools.subjects import Subject

BATCH = 256  # rows that vLLM answers before they are saved
LONGEST = 16384  # tokens that vLLM makes room for

OpenModel = Callable[[str, str, int], AbstractContextManager[Any]]


def open_transformers(subject: Subject) -> OpenModel:
    from evals.model import Model

    model, tokenizer = models.load(subject.config, subject.adapter)

    @contextmanager
    def open_side(side: str, label: str, rows: int) -> Iterator[Any]:
        is_base = side == "base" and subject.adapter
        with model.disable_adapter() if is_base else nullcontext():
            yield Model(model, tokenizer, label, rows)

    return open_side


def vllm_arguments(subject: Subject) -> dict[str, Any]:
    """The arguments of lm-eval's vLLM class: the quantized base, and the adapter as LoRA module."""
    from transformers import AutoConfig

    config, precision = subject.config, models.precision(subject.config)
    if precision in ("int8", "fp4"):
        raise WrongInput(f"vLLM quantizes no base to {precision}; BACKEND=transformers scores it")
    base = config["base_model"]
    base = str(ROOT / base) if (ROOT / base).is_dir() else base
    length = AutoConfig.from_pretrained(base).get_text_config(decoder=True).max_position_embeddings
    arguments = {
        "pretrained": base,
        "dtype": config.get("dtype") or "bfloat16",
        "max_model_len": min(length, LONGEST),
        "batch_size": BATCH,
    }
    if precision == "nf4":  # bitsandbytes in vLLM: NF4 with double quantization
        arguments["quantization"] = "bitsandbytes"
    if subject.adapter:
        settings, _ = adapters.read_adapter(subject.adapter)
        if changes_tokenizer(config):
            arguments["tokenizer"] = str(subject.adapter)
        rank = adapters.vllm_rank(settings.rank)
        if rank is None:
            raise WrongInput(
                f"vLLM takes no rank over {adapters.RANKS[-1]}, and the adapter has "
                f"{settings.rank}; BACKEND=transformers scores it"
            )
        unusual = "DoRA" if settings.dora else models.check_adapter(config, subject.adapter).unusual
        if unusual:
            raise WrongInput(f"vLLM has no {unusual}; BACKEND=transformers scores this adapter")
        arguments |= {"lora_local_path": str(subject.adapter), "max_lora_rank": rank}
    return arguments


def open_vllm(subject: Subject) -> OpenModel:
    import torch

    arguments = vllm_arguments(subject)
    if not (importlib.util.find_spec("vllm") and torch.cuda.is_available()):
        raise WrongInput("BACKEND=vllm needs a GPU and vLLM (`pip install vllm`)")
    from lm_eval.models.vllm_causallms import VLLM

    engine = VLLM(**arguments)

    def open_side(side: str, label: str, rows: int) -> AbstractContextManager[Any]:
        # The engine is shared; what `Prompts` and `Answers` attach belongs to one score.
        lm = copy.copy(engine)
        if side == "base":
            lm.lora_request = None
        return nullcontext(lm)

    return open_side


def open_endpoint(endpoint: Any) -> OpenModel:
    from evals.endpoint import RemoteModel, Spending

    spending = Spending(endpoint.limits)

    @contextmanager
    def open_side(side: str, label: str, rows: int) -> Iterator[Any]:
        try:
            yield RemoteModel(endpoint, label, rows, spending)
        finally:
            if spending.total.replies:
                print(f"cost       {endpoint.name}: {spending.total.describe(endpoint.limits)}")

    return open_side


BACKENDS: dict[str, Callable[[Any], OpenModel]] = {
    "transformers": open_transformers,
    "vllm": open_vllm,
    "openai": open_endpoint,
}
