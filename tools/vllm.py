"""vLLM: where it is installed, what it can do on this machine, and what it loads there.

    make setup-vllm                  makes .venv-vllm
    engine = vllm.ask_vllm(vllm.find_vllm())

vLLM pins other versions of the libraries than training does, so it has an environment of its own,
and what needs it runs there. It takes LoRA adapters beside their base. It has no DoRA, no ranks
that differ between modules, no trained embeddings and no rank over its largest. It quantizes a base
to NF4 alone, and only with CUDA. Elsewhere it gets the base as training saw it: quantized and
dequantized again.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tools import adapters, models
from tools.common import ROOT, JobFailed, naming, read_json, replacing, shown, write_json
from tools.subjects import Subject

INSTALL = "make setup-vllm"
CPU_CACHE = "2"  # GiB of keys and values; vLLM's default is nearly all memory

# Run by vLLM's own Python: what differs between versions and machines.
QUESTIONS = """
import importlib.metadata, importlib.util, json, typing
from vllm.config.lora import MaxLoRARanks
from vllm.platforms import current_platform as platform
bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
names = {distribution.name for distribution in importlib.metadata.distributions()}
print(json.dumps({
    "command_starts": "vllm" in names,
    "device": platform.device_type,
    "ranks": sorted(typing.get_args(MaxLoRARanks)),
    "dtypes": [str(dtype).removeprefix("torch.") for dtype in platform.supported_dtypes],
    "quantizes": platform.device_type == "cuda" and bitsandbytes,
}))
"""


@dataclass(frozen=True)
class Engine:
    """An installed vLLM, and what it can do on this machine."""

    python: list[str]  # the command of its interpreter
    start: list[str]  # the command of its server, up to the model
    device: str  # "cpu", "cuda", …
    ranks: list[int]  # the values of --max-lora-rank
    dtypes: list[str]  # it can compute in; the first one is its choice
    quantizes: bool  # to NF4, by bitsandbytes

    def choose_dtype(self, config: dict[str, Any]) -> str:
        """The type that a config asks for, else float32 on a CPU and half precision on a GPU."""
        dtype = config.get("dtype") or ("float32" if self.device == "cpu" else self.dtypes[0])
        return str(dtype) if dtype in self.dtypes else self.dtypes[0]

    def count_slots(self, adapters: int) -> int:
        """The value of --max-loras that serves so many adapters and their base together.

        On a CPU vLLM 0.32 reads the index of the base's requests, -1, as the last slot where a
        batch holds an adapter's requests too. So the last slot stays empty.
        """
        return adapters + 1 if self.device == "cpu" else adapters

    @property
    def environment(self) -> dict[str, str]:
        """Variables of vLLM's processes: no network, a cache that leaves memory to others, and its
        hundred lines of settings only with DEBUG=1.
        """
        variables = {"HF_HUB_OFFLINE": "1"}
        if not os.environ.get("DEBUG"):
            quietly = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
            variables |= {key: os.environ.get(key, value) for key, value in quietly.items()}
        if self.device == "cpu":
            cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or CPU_CACHE
            variables["VLLM_CPU_KVCACHE_SPACE"] = cache
        return variables


# ---- finding it


def find_vllm() -> str | None:
    """The command of vLLM: beside this Python, in .venv-vllm, or on PATH."""
    places = [str(Path(sys.executable).parent), str(ROOT / ".venv-vllm" / "bin")]
    return shutil.which("vllm", path=os.pathsep.join([*places, os.environ.get("PATH", os.defpath)]))


def ask_vllm(vllm: str) -> Engine:
    """What an installed vLLM can do here; raises JobFailed where it does not start."""
    output = ""
    try:
        interpreter = read_interpreter(vllm)
        process = subprocess.run(
            [*interpreter, "-c", QUESTIONS],
            capture_output=True,
            text=True,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        )
        output = process.stderr.strip()
        answers = json.loads(process.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        reason = output.splitlines()[-1] if output else str(error)
        raise JobFailed(
            f"{vllm} does not start here ({reason[:200]}); `{INSTALL}` mends it"
        ) from None
    # The command asks for the package `vllm`, so that of `vllm-cpu` does not start.
    module = [*interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    start = [vllm, "serve"] if answers.pop("command_starts") else module
    return Engine(interpreter, start, **answers)


def read_interpreter(script: str) -> list[str]:
    """The Python that runs a script, by its first lines; raises ValueError where there is none."""
    with open(script, encoding="utf-8", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    # Where the path is long or has spaces, pip and uv write the interpreter into a second line.
    words = shlex.split(second)[1:2] if first == "#!/bin/sh" else shlex.split(first[2:])
    if not first.startswith("#!") or not words:
        raise ValueError("it is no Python script")
    return words


def read_versions(vllm: str) -> dict[str, str]:
    """The versions on which the answers of an installed vLLM depend; does not start it."""
    libraries = Path(vllm).resolve().parent.parent.glob("lib/python3.*/site-packages")
    packages = importlib.metadata.distributions(path=list(map(str, libraries)))
    names = {"vllm": "vllm", "vllm-cpu": "vllm", "torch": "torch", "transformers": "transformers"}
    versions = {package.name: package.version.split("+")[0] for package in packages}
    return {names[name]: versions[name] for name in names.keys() & versions.keys()}


# ---- what it loads


def explain_merging(subject: Subject, engine: Engine) -> str:
    """Why vLLM cannot hold an adapter beside its base; "" where it can."""
    if subject.adapter is None:
        return ""
    checked = models.check_adapter(subject.config, subject.adapter)
    if checked.unusual:
        return f"vLLM has no {checked.unusual}"
    tokens, base_tokens = (
        len(models.load_tokenizer(subject.config, folder)) for folder in (subject.adapter, None)
    )
    if tokens > base_tokens:
        return "vLLM takes the base's tokenizer, and this adapter has tokens of its own"
    rank = checked.settings.rank
    if adapters.vllm_rank(rank, engine.ranks) is None:
        return f"vLLM takes no rank over {engine.ranks[-1]}, and this one has {rank}"
    return ""


def prepare_base(subject: Subject, engine: Engine) -> tuple[Path, bool]:
    """(folder of the base, whether vLLM is to quantize it) at the precision of a subject."""
    precision = models.precision(subject.config)
    is_quantized_there = precision == "nf4" and engine.quantizes
    if precision in ("nf4", "fp4", "int8") and not is_quantized_there:
        return dequantize_base(subject), False
    return models.bring_base(subject.config["base_model"]), is_quantized_there


def dequantize_base(subject: Subject) -> Path:
    """A folder with the base as an adapter met it in training; writes it where it is not there.

    Its linear layers were quantized and dequantized again, all else is the base's.
    """
    import torch

    name = str(subject.config["base_model"])
    quantization = ("load_in_4bit", "load_in_8bit", "bnb_config_kwargs")
    config = {key: subject.config[key] for key in quantization if key in subject.config}
    base = models.bring_base(name)
    target = subject.base_folder.parent / f"dequantized_{models.precision(subject.config)}"
    origin = {
        **{"base_model": name, "quantization": config},
        "files": {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(base.glob("*.safetensors"))
        },
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
    }
    record = target / "dequantized.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target), FileLock(target.with_name(f".{target.name}.lock")):
        if record.is_file() and read_json(record) == origin:
            return target
        print(f"vllm       writes the base as it was in training to {shown(target)}", flush=True)
        model, tokenizer = models.load_base({"base_model": name} | config)
        # transformers would restore the names of a quantized file, which fails.
        is_published = bool(models.published_precision(name))
        with replacing(target) as work:
            model.dequantize().save_pretrained(work, save_original_format=not is_published)
            tokenizer.save_pretrained(work)
            write_json(work / record.name, origin)
    return target
