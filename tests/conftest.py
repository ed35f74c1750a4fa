"""Fixtures: the real SmolLM2, a tiny random Llama with its tokenizer, and recipes that train it."""

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import common, models, recipes, sources, vllm
from tools import smollm2 as export
from tools.data.chatfile import Options, convert_rows
from tools.data.rows import Rules

common.quiet()
# A shell's background job ignores these, and so would all that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Several workers share the cores: one thread each, for what they start too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Files that take longest, which start first, so that no worker is left alone with one at the end.
LONGEST = [
    "test_hub",
    "test_adapter",
    "test_backends",
    "test_contract",
    "test_hostile",
    "test_train",
]
# What vLLM answers on a GPU of the Ampere generation.
GPU = vllm.Engine(
    ["python"],
    ["vllm", "serve"],
    device="cuda",
    ranks=[1, 8, 16, 32, 64, 128, 256, 320, 512],
    dtypes=["bfloat16", "float16", "float32"],
    quantizes=True,
)
# Some tests work in another folder.
if os.environ.get("FINLORA_DATA"):
    os.environ["FINLORA_DATA"] = os.path.abspath(os.environ["FINLORA_DATA"])


def run_first(count: int, values: Iterable[Any]) -> list[Any]:
    """Parameters of a test: `make test` runs the first ones, `make test-all` the others, too."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]), marks=slow * (number >= count)
        )
        for number, value in enumerate(values)
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the project exports it."""
    export.ensure(str(export.FOLDER))
    return export.FOLDER


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and hidden size 64 with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's first 96 sentiment rows as chat data: 94 train, 2 validate."""
    target = tmp_path_factory.mktemp("chat") / "sentiment_train.jsonl"
    source = sources.SAMPLE / "train" / "finlora_sentiment_train.jsonl"
    options = Options(validation=target.with_name("sentiment_val.jsonl"))
    convert_rows(source, target, Rules(), frozenset(range(96)), options)
    return target


QKV = ["q_proj", "k_proj", "v_proj"]


def make_adapter(base: Any, folder: Path, tokens=(), **settings: Any) -> Path:
    """A PEFT adapter whose B matrices are not zero, of a base's folder or of a loaded model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = {"r": 4, "lora_alpha": 16, "target_modules": QKV, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    if tokens:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(list(tokens))
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(**lora | settings))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save.default" in name:
            weight.data += 0.2 * torch.randn(weight.shape)
    adapted.save_pretrained(folder)
    return folder


def make_trained_folder(base: Path, folder: Path, **settings: Any) -> Path:
    """A folder as `make train` leaves it, with an adapter that does something."""
    from transformers import AutoTokenizer

    config = {"base_model": str(base), "adapter": "lora", "lora_r": 4, "lora_alpha": 16}
    config |= {"datasets": [{"path": "x.jsonl", "type": "chat_template"}]} | settings
    dora = bool(settings.get("peft_use_dora"))
    make_adapter(models.load(config)[0], folder, task_type=None, use_dora=dora)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text("{}")
    return folder


METHODS = {
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "full": {},
    "nf4, DoRA": {"load_in_4bit": True, "peft_use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained folder of each method; each test file has its own, since merges go into them."""
    return {
        name: make_trained_folder(tiny, tmp_path_factory.mktemp("run") / "adapter", **settings)
        for name, settings in METHODS.items()
    }


@contextmanager
def serve_files(folder: Path, user: str = "") -> Iterator[str]:
    """The address of a web server on loopback; `user` is the `name:password` that it demands."""
    authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if user else None

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            if authorization and self.headers.get("Authorization") != authorization:
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{f'{user}@' if user else ''}127.0.0.1:{server.server_port}"
    server.shutdown()


def write_recipe(folder: Path, method: str, base: Path, data: Path, **changes: object) -> Path:
    """A recipe file: SmolLM2's sentiment recipe of a method, on another base and other data."""
    content = recipes.build_config(f"smollm2-135m/sentiment_{method}")
    content |= {"base_model": str(base), "output_dir": str(folder / method)}
    content |= {"dataset_prepared_path": str(folder / method / "prepared")}
    content["datasets"][0]["path"] = str(data)
    if data.name.endswith("_train.jsonl"):
        val = data.with_name(data.name.replace("_train.jsonl", "_val.jsonl"))
        content["test_datasets"][0]["path"] = str(val)
    else:
        del content["test_datasets"]
        content["val_set_size"] = 0.02
    content |= {"max_steps": 12, "save_steps": 4, "eval_steps": 12, "warmup_steps": 1} | changes
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m tools …` in the project as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "tools", *map(str, arguments)],
        cwd=common.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def call(monkeypatch, *arguments: object) -> None:
    """The same in this process, so that what a test replaced stays replaced."""
    from tools.__main__ import main

    monkeypatch.setattr(sys, "argv", ["tools", *map(str, arguments)])
    main()


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
