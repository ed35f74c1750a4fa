"""Serves an adapter behind an OpenAI-compatible endpoint, at the precision that it was trained on.

    python -m tools.use.serve smollm2-135m/sentiment_r4 --port 8000

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"model": "…", "messages": [{"role": "user", "content": "…"}], "temperature": 0}'

With vLLM and a GPU the base stays quantized and the adapter is a LoRA module beside it. vLLM has no
DoRA, no ranks over 512 or different ones, no trained embeddings, and no 8-bit base that it
quantizes itself: there, and without a GPU, the adapter is merged into the base as training saw it
(`tools/use/merge.py`); on a CPU `transformers serve` serves that.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tools import models, prompts, subjects
from tools.common import atomic, shown
from tools.hub import card
from tools.use import merge


def on_vllm(who: subjects.Subject, name: str, address: list[str]) -> list[str]:
    """The command that serves a base and its adapter with vLLM."""
    folder = who.adapter or who.folder
    checked = models.check_adapter(who.config, folder)
    template = vllm_template(who, folder)
    options = ["--chat-template", str(template)] if template else []
    rank = card.vllm_rank(checked.plain.rank)
    if rank is None or checked.unusual or models.precision(who.config) in ("int8", "fp4"):
        merged = merge.merge(who.config, folder, who.prompt_format)
        return ["vllm", "serve", str(merged), *address, *options]
    dtype = ["--dtype", who.config["dtype"]] if who.config.get("dtype") else []
    quantized = models.precision(who.config) == "nf4"
    return [
        *("vllm", "serve", who.config["base_model"], *address),
        *(("--quantization", "bitsandbytes") if quantized else dtype),
        *("--enable-lora", "--max-lora-rank", str(rank)),
        *("--lora-modules", f"{name}={folder}", *options),
    ]


def vllm_template(who: subjects.Subject, folder: Path) -> Path | None:
    """The file of the chat template that renders as the adapter was trained; None for the base's.

    vLLM takes a template and no options for it, so they are written into it.
    """
    own_template = prompts.changes_tokenizer(who.config)
    if not who.options and who.prompt_format == "chat" and not own_template:
        return None
    from transformers import AutoTokenizer

    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(folder) if own else who.config["base_model"])
    text = prompts.template(tokenizer, who.prompt_format) or tokenizer.chat_template
    options: dict[str, Any] = who.options or {}
    fixed = "".join(f"{{%- set {key} = {json.dumps(v)} -%}}" for key, v in options.items())
    path = folder / "chat_template_fixed.jinja"
    with atomic(path) as file:
        file.write((fixed + text).encode())
    return path


def on_transformers(who: subjects.Subject, address: list[str]) -> list[str]:
    """The command that serves the merged model with `transformers serve`."""
    merged = merge.merge(who.config, who.adapter or who.folder, who.prompt_format)
    options = ["--chat-template-kwargs", json.dumps(who.options)] if who.options else []
    scripts = Path(sys.executable).parent
    return [
        *(str(scripts / "transformers"), "serve", shown(merged), *address),
        *("--device", "auto", "--dtype", "float32", *options),
    ]


def serve(
    who: subjects.Subject, host: str = "localhost", port: int = 8000, longest: int | None = None
) -> None:
    """Becomes the server, so that Ctrl-C reaches it. `longest`: tokens of the context."""
    address = ["--host", host, "--port", str(port)]
    if shutil.which("nvidia-smi") and importlib.util.find_spec("vllm"):
        name = who.name.replace("/", "-")
        line = on_vllm(who, name, address)
    else:
        if shutil.which("nvidia-smi"):
            print("serve      vLLM is not installed (`pip install vllm`); transformers serves")
        line = on_transformers(who, address)
        name = line[2]
    print(f'serve      http://{host}:{port}/v1, model "{name}": {" ".join(line)}', flush=True)
    os.execvpe(line[0], line, os.environ | {"HF_HUB_OFFLINE": "1"})
