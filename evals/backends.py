"""What answers: transformers, vLLM in its own Python, or an OpenAI-compatible endpoint.

    python -m tools eval sentiment_r4 --backend vllm

A backend takes what is scored and returns a function (side, label, rows) → context manager of an
lm-eval model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tools import adapters, models, vllm
from tools.common import WrongInput
from tools.prompts import changes_tokenizer
from tools.subjects import Subject

OpenModel = Callable[[str, str, int], AbstractContextManager[Any]]


def open_transformers(subject: Subject) -> OpenModel:
    from evals.model import Model

    models.bring_base(subject.config["base_model"])
    model, tokenizer = models.load(subject.config, subject.adapter)

    @contextmanager
    def open_side(side: str, label: str, rows: int) -> Iterator[Any]:
        is_base = side == "base" and subject.adapter
        with model.disable_adapter() if is_base else nullcontext():
            yield Model(model, tokenizer, label, rows)

    return open_side


def vllm_arguments(subject: Subject, engine: vllm.Engine) -> dict[str, Any]:
    """The arguments of vllm.LLM: the base as training saw it, with room for the adapter."""
    config = subject.config
    if models.precision(config) == "int8":
        # An int8 base rounds activations as well; a dequantized one would not.
        raise WrongInput("vLLM quantizes no base to int8; BACKEND=transformers scores it")
    if reason := vllm.explain_merging(subject, engine):
        raise WrongInput(f"{reason}; BACKEND=transformers scores this adapter")
    base, is_quantized_there = vllm.prepare_base(subject, engine)
    arguments = {
        "model": str(base),
        "dtype": engine.choose_dtype(config),
        "enforce_eager": engine.device == "cpu",
        "logprobs_mode": "raw_logits",
    }
    if engine.device == "cpu":
        # The smallest size that suits its kernels: prompts share an instruction of 50 tokens.
        arguments["block_size"] = 32
    if is_quantized_there:  # bitsandbytes in vLLM: NF4 with double quantization
        arguments["quantization"] = "bitsandbytes"
    if subject.adapter:
        if changes_tokenizer(config):
            arguments["tokenizer"] = str(subject.adapter)
        settings, _ = adapters.read_adapter(subject.adapter)
        rank = adapters.vllm_rank(settings.rank, engine.ranks)
        arguments |= {"enable_lora": True, "max_lora_rank": rank}
        arguments["max_loras"] = engine.count_slots(1)
    return arguments


def open_vllm(subject: Subject) -> OpenModel:
    from transformers import AutoConfig

    command = vllm.find_vllm()
    if command is None:
        raise WrongInput(f"BACKEND=vllm needs vLLM; `{vllm.INSTALL}` installs it")
    base = models.bring_base(subject.config["base_model"])
    engine = vllm.ask_vllm(command)
    arguments = vllm_arguments(subject, engine)
    from evals.vllm_model import VllmModel, Worker

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    tokenizer = models.load_tokenizer(subject.config, subject.adapter)
    worker = Worker(engine, arguments, config)

    def open_side(side: str, label: str, rows: int) -> AbstractContextManager[Any]:
        # The engine is shared; what `Prompts` and `Answers` attach belongs to one score.
        adapter = subject.adapter if side == "adapter" else None
        lm = VllmModel(worker, tokenizer, adapter)
        lm.expect(label, rows)
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
