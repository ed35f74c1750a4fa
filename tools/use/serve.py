"""Serves adapters behind an OpenAI-compatible endpoint, at the precision that they were trained on.

    python -m tools serve smollm2-135m/sentiment_r4 --port 8000
    python -m tools serve --recipes "smollm2-135m/sentiment_r4 smollm2-135m/ner_r4"

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"model": "…", "messages": [{"role": "user", "content": "…"}], "temperature": 0}'

vLLM serves where it is installed (tools/vllm.py): one base, and each adapter as a LoRA module under
its name. An adapter that vLLM cannot hold beside a base is merged into it first, as training saw it
(`tools/use/merge.py`), and served alone under the same name. Without vLLM `transformers serve`
serves merged models.
"""

import errno
import http.client
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.choices import request_choice
from tools import adapters, models, prompts, recipes, sources, subjects, vllm
from tools.common import ROOT, JobFailed, WrongInput, digest, quiet, stop_group
from tools.runs import Run
from tools.train.sweep import select_recipes
from tools.use import merge
from tools.vllm import Engine

KEY = "VLLM_API_KEY"  # the variable from which vLLM reads the key that it asks for
STOPPING = 30.0  # seconds that a server has to stop before it is killed
# Options of vLLM that would make what is printed untrue, and what to use instead.
RESERVED = {
    "--host": "HOST=",
    "--port": "PORT=",
    "--api-key": f"{KEY}=",
    "--max-model-len": "MAX_MODEL_LEN=",
    "--gpu-memory-utilization": "GPU_MEMORY=",
    "--model": "RECIPE=",
    "--served-model-name": "RECIPE=",
    "--lora-modules": "RECIPES=",
    **dict.fromkeys(("--config", "--uds", "--root-path", "--ssl-keyfile", "--ssl-certfile"), ""),
}


@dataclass(frozen=True)
class Service:
    """Where and how adapters are served."""

    host: str = "localhost"
    port: int = 8000
    engine: str | None = None  # vllm or transformers; vLLM where it is installed, if omitted
    length: int | None = None  # tokens of the context
    gpu_memory: float | None = None  # share of the GPU's memory that vLLM takes
    arguments: list[str] = field(default_factory=list)  # of vLLM, as they stand

    @property
    def address(self) -> list[str]:
        return ["--host", self.host, "--port", str(self.port)]

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/v1"

    @property
    def is_open(self) -> bool:
        """Whether other machines can ask, and no key is needed."""
        with suppress(ValueError):
            return not ipaddress.ip_address(self.host).is_loopback and not os.environ.get(KEY)
        return self.host != "localhost" and not os.environ.get(KEY)

    def list_vllm_options(self, engine: Engine) -> list[str]:
        if self.gpu_memory and engine.device == "cpu":
            raise WrongInput(
                "GPU_MEMORY= is a share of a GPU's memory, and vLLM runs on the CPU here; the "
                "variable VLLM_CPU_KVCACHE_SPACE has the GiB of its cache"
            )
        options = ["--max-model-len", str(self.length)] if self.length else []
        options += ["--gpu-memory-utilization", str(self.gpu_memory)] if self.gpu_memory else []
        return options + self.arguments

    def check_transformers(self) -> None:
        """Raises WrongInput for options that only vLLM has."""
        values: dict[str, Any] = {"MAX_MODEL_LEN": self.length, "GPU_MEMORY": self.gpu_memory}
        values |= {"VLLM_ARGS": self.arguments, KEY: os.environ.get(KEY)}
        if names := [name for name, value in values.items() if value]:
            raise WrongInput(
                f"transformers serves, and only vLLM has {names[0]}; `{vllm.INSTALL}` installs it"
            )


def parse_arguments(text: str) -> list[str]:
    """The words of VLLM_ARGS; raises WrongInput for options that have a variable of their own."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise WrongInput(f"VLLM_ARGS: {str(error).lower()}") from None
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        # vLLM takes the beginning of a name for the name.
        match = next((name for name in RESERVED if option[3:] and name.startswith(option)), None)
        if option.startswith("--") and match:
            instead = RESERVED[match]
            reason = f"{instead}… sets it" if instead else "what is printed would be untrue"
            raise WrongInput(f"VLLM_ARGS has no place for {match}: {reason}")
    return words


Served = dict[str, subjects.Subject]  # by the name under which it is asked


def find_subjects(names: str, precision: str | None, form: str | None) -> list[subjects.Subject]:
    """The finished runs of recipes and patterns of recipes."""
    chosen = select_recipes(names)
    return [subjects.find(recipe.name, None, precision, form) for recipe in chosen]


def name_all(chosen: list[subjects.Subject]) -> Served:
    """The subjects by the names under which they are served."""
    served: Served = {}
    for subject in chosen:
        if not subject.adapter:
            raise WrongInput(f"{subject.name} has no adapter to serve")
        name = name_model(subject.name)
        if name in served:
            raise WrongInput(f'two adapters would be served as "{name}": rename one\'s folder')
        served[name] = subject
    return served


def name_model(text: str) -> str:
    """A name that the Hub's cache and a URL accept; of a recipe's file, its stem."""
    text = Path(text).stem if text.endswith((".yaml", ".yml")) else text
    name = re.sub(r"[^\w.-]+|\.\.+|--+", "-", text, flags=re.ASCII)
    return name[-80:].strip("-.") or "adapter"


def name_base(served: Served) -> str:
    """The name of the base beside one adapter, or beside several."""
    name, subject = next(iter(served.items()))
    if len(served) > 1:
        base = str(subject.config["base_model"])
        name = name_model(recipes.find_base(base)[0] or Path(base).name)
    return f"{name}-base"


def check_together(served: Served, engine: Engine) -> None:
    """Raises WrongInput unless one vLLM can serve all: one base, and one way to write prompts."""
    (name, first), *others = served.items()
    for other, subject in others:
        pair = (first, subject)
        kinds = {
            "bases": [find_base_key(member.config) for member in pair],
            "precisions": [models.precision(member.config) for member in pair],
            "tokenizers": [
                (path := find_tokenizer(member)) and digest(Run(path).tokenizer_file)
                for member in pair
            ],
            "chat templates": [build_template(member) for member in pair],
        }
        if differing := [kind for kind, (left, right) in kinds.items() if left != right]:
            raise WrongInput(
                f"{name} and {other} have different {differing[0]}, and a server has one: serve "
                "them apart, on two ports"
            )
    for other, subject in served.items() if others else ():
        if reason := explain_merged(subject, engine):
            raise WrongInput(f"{other} must be merged, so it is served alone: {reason}")


def find_base_key(config: dict[str, Any]) -> Any:
    """What tells two bases apart, the options of their quantization among it."""
    base = str(config["base_model"])
    folder = (ROOT / base).resolve() if (ROOT / base).is_dir() else recipes.resolve_mirror(base)
    return folder, config.get("bnb_config_kwargs")


def explain_merged(subject: subjects.Subject, engine: Engine) -> str:
    """Why an adapter is served merged; "" where vLLM can hold it beside its base and end its
    answers.
    """
    if reason := vllm.explain_merging(subject, engine):
        return reason
    if subject.adapter and not find_tokenizer(subject):
        folders = (subject.adapter, None)
        ends = {models.load_tokenizer(subject.config, f).eos_token_id for f in folders}
        if len(ends) > 1:
            return "vLLM ends answers at the base's end token, and this adapter has another"
    return ""


def find_tokenizer(subject: subjects.Subject) -> Path | None:
    """The folder with the tokenizer that training made, where it made one."""
    adapter = subject.adapter
    if (
        adapter
        and prompts.changes_tokenizer(subject.config)
        and Run(adapter).tokenizer_file.is_file()
    ):
        return adapter
    return None


def build_vllm_command(
    served: Served, address: list[str], engine: Engine, folder: Path
) -> list[str]:
    """The command that serves adapters on their base; writes the chat template to `folder`."""
    check_together(served, engine)
    name, subject = next(iter(served.items()))
    assert subject.adapter
    template = folder / "chat_template.jinja"
    template.write_text(build_template(subject), encoding="utf-8")
    options = ["--dtype", engine.choose_dtype(subject.config), "--chat-template", str(template)]
    options += ["--enforce-eager"] if engine.device == "cpu" else []
    if reason := explain_merged(subject, engine):
        print(f"serve      {reason}, so {name} is merged into its base", flush=True)
        merged = merge.merge(subject.config, subject.adapter, subject.prompt_format)
        return [*engine.start, str(merged), *address, "--served-model-name", name, *options]
    base, is_quantized_there = vllm.prepare_base(subject, engine)
    options += ["--quantization", "bitsandbytes"] if is_quantized_there else []
    if tokenizer := find_tokenizer(subject):
        options += ["--tokenizer", str(tokenizer)]
    folders = [member.adapter for member in served.values() if member.adapter]
    ranks = [
        adapters.vllm_rank(adapters.read_adapter(path)[0].rank, engine.ranks) for path in folders
    ]
    modules = [write_module(*pair) for pair in zip(served, folders, strict=True)]
    line = [*engine.start, str(base), *address, "--served-model-name", name_base(served)]
    line += ["--enable-lora", "--max-lora-rank", str(max(filter(None, ranks)))]
    line += ["--max-loras", str(engine.count_slots(len(served))), "--lora-modules", *modules]
    return line + options


def write_module(name: str, adapter: Path) -> str:
    """An adapter as --lora-modules takes it."""
    module = f"{name}={adapter}"
    if "," in module:  # which vLLM would parse as JSON
        module = json.dumps({"name": name, "path": str(adapter)})
    return module


def build_template(subject: subjects.Subject) -> str:
    """The chat template that renders prompts as the adapter was trained on them.

    vLLM takes a template without options, so they are written into it.
    """
    tokenizer = models.load_tokenizer(subject.config, subject.adapter)
    options, form = subject.options or {}, subject.prompt_format
    prompts.render(tokenizer, [{"role": "user", "content": ""}], options, form)  # or WrongInput
    text = "".join(f"{{%- set {key} = {json.dumps(v)} -%}}" for key, v in options.items())
    return text + str(prompts.template(tokenizer, form) or tokenizer.chat_template)


def build_transformers_command(
    served: Served, address: list[str], folder: Path
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that serve merged models with `transformers serve`.

    It lists and serves what is in the Hub's cache, and loads what is asked for, so the merged
    models get a cache of their own in `folder`, under their names.
    """
    import torch

    options = [subject.options for subject in served.values()]
    if any(other != options[0] for other in options):
        raise WrongInput(
            "the adapters have different chat_template_kwargs, and a server has one: serve them "
            "apart, on two ports"
        )
    for name, subject in served.items():
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
    line = [str(Path(sys.executable).parent / "transformers"), "serve"]
    line += [name] if len(served) == 1 else []  # loaded at once, and never unloaded
    line += [*address, "--device", "auto", "--dtype", dtype]
    line += ["--chat-template-kwargs", json.dumps(options[0])] if options[0] else []
    return line, {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}


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
        stop_group(server, STOPPING)


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

    config = AutoConfig.from_pretrained(
        models.bring_base(subject.config["base_model"]), trust_remote_code=False
    )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length and longest and length > longest:
        raise WrongInput(f"MAX_MODEL_LEN must be a number from 1 to {longest}, not {length}")


def find_engine(engine: str | None) -> Engine | None:
    """The vLLM of this machine, or None where transformers serves; prints why there is no vLLM.

    Raises WrongInput or JobFailed where vLLM is asked for and cannot be used.
    """
    if engine == "transformers":
        return None
    try:
        if command := vllm.find_vllm():
            return vllm.ask_vllm(command)
        reason = f"no vLLM is here (`{vllm.INSTALL}`)"
    except JobFailed as error:
        if engine:
            raise
        reason = str(error)
    if engine:
        raise WrongInput(f"ENGINE=vllm: {reason}")
    print(f"serve      {reason}; transformers serves", flush=True)
    return None


def write_curl(url: str, name: str, task: str | None, labels: Sequence[str] = ()) -> str:
    """A line for a shell that asks a model, for nothing but labels if there are any.

    The key stays in its variable.
    """
    prompt = sources.word_text(task, "Is it good?")
    body = {"model": name, "messages": [{"role": "user", "content": prompt}]}
    body |= request_choice(labels) if labels else {}
    line = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
    key = f' -H "Authorization: Bearer ${KEY}"' if os.environ.get(KEY) else ""
    data = shlex.join(["-d", json.dumps(body | {"max_tokens": 64, "temperature": 0})])
    return f"{shlex.join(line)}{key} {data}"


def serve(chosen: list[subjects.Subject], service: Service, labels: Sequence[str] = ()) -> None:
    """Serves adapters and their base until it is stopped.

    vLLM limits an answer where a request says so, as the curl line does with `labels`.
    """
    # Each signal does what Ctrl-C does; under nohup SIGHUP stays ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    check_port(service.host, service.port)
    quiet()
    served = name_all(chosen)
    for subject in chosen:
        check_length(subject, service.length)
    engine = find_engine(service.engine)
    if labels and not engine:
        raise WrongInput("CONSTRAIN=1 needs vLLM: `transformers serve` has no such request")
    with TemporaryDirectory(prefix="serve-") as temporary:
        base = ""
        if engine:
            options = service.list_vllm_options(engine)
            line = build_vllm_command(served, service.address, engine, Path(temporary)) + options
            environment = engine.environment
            if "--lora-modules" in line:
                base = f', {"its" if len(served) == 1 else "their"} base "{name_base(served)}"'
        else:
            service.check_transformers()
            line, environment = build_transformers_command(served, service.address, Path(temporary))
        quoted = ", ".join(f'"{name}"' for name in served)
        curl = write_curl(service.url, next(iter(served)), chosen[0].task, labels)
        names = f"{service.url}, model {quoted}{base}\n           {curl}"
        variables = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"serve      {variables} {shlex.join(line)}", flush=True)
        if service.is_open:
            print(
                f"serve      whoever reaches {service.host} can ask: {KEY}=… in the environment "
                "makes vLLM ask for a key",
                flush=True,
            )
        try:
            run_server(line, environment, service.host, service.port, names)
        except KeyboardInterrupt:
            print("serve      stopped")
