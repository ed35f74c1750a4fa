"""Writes a merged model as a GGUF file, for llama.cpp, Ollama and LM Studio.

    python -m tools merge smollm2-135m/sentiment_r4 --format gguf

llama.cpp's own converter writes it. No package installs that converter, but the source archive of
llama-cpp-python holds it with the Python files that it needs. They are taken out of the pinned
archive once and run from models/; nothing is compiled.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from tools import versions
from tools.common import ROOT, JobFailed, naming, shown

REQUIREMENT = ROOT / "requirements" / "gguf.txt"
FILE = "model.gguf"
SCRIPT, LIBRARY = "convert_hf_to_gguf.py", "gguf-py"
PARTS = {SCRIPT, "conversion", LIBRARY, "LICENSE"}  # of vendor/llama.cpp in the archive
TYPES = {"bfloat16": "bf16", "float16": "f16"}
SECONDS = 900  # for a download of 80 MB


def read_converter_version() -> str:
    match = re.search(r"^[\w-]+==(\S+)", REQUIREMENT.read_text(), re.M)
    assert match
    return match[1]


def bring_converter() -> Path:
    """The folder with llama.cpp's converter; downloads it from the package index if needed."""
    folder = ROOT / "models" / f".llama.cpp-{read_converter_version()}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    print(
        f"merge      downloads llama.cpp's converter to {shown(folder)} (80 MB, once)", flush=True
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bringing-") as place:
        download_archive(Path(place))
        (archive,) = Path(place).glob("*.tar.gz")
        unpack_converter(archive, Path(place) / "converter")
        try:
            os.rename(Path(place) / "converter", folder)
        except OSError:
            if not folder.is_dir():  # another job was first
                raise
    return folder


def download_archive(folder: Path) -> None:
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    line += ["--no-binary", "llama-cpp-python", "--requirement", str(REQUIREMENT)]
    try:
        done = subprocess.run(
            [*line, "--dest", str(folder)], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise JobFailed(
            f"llama.cpp's converter was not downloaded in {SECONDS} seconds; the same command "
            "tries again"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gives no reason"])[-1]
        raise JobFailed(
            f"FORMAT=gguf needs {REQUIREMENT.name}'s package from the package index, once: "
            f"{reason[:200]}"
        )


def unpack_converter(archive: Path, folder: Path) -> None:
    """Takes the converter's Python files out of the source archive of llama-cpp-python."""
    with tarfile.open(archive) as files:
        for member in files:
            folders = PurePosixPath(member.name).parts[1:]
            if folders[:2] == ("vendor", "llama.cpp") and PARTS.intersection(folders[2:3]):
                member.name = "/".join(folders[2:])
                files.extract(member, folder, filter="data")
    if not (folder / SCRIPT).is_file() or not (folder / LIBRARY).is_dir():
        raise JobFailed(f"{archive.name} holds no {SCRIPT}")


def convert_to_gguf(model: Path, dtype: str, file: Path) -> None:
    """Writes a Hugging Face folder as a GGUF file with the same 16-bit weights.

    dtype: "bfloat16" or "float16". Raises JobFailed where the converter cannot be downloaded or
    fails.
    """
    converter = bring_converter()
    with tempfile.TemporaryDirectory() as place, naming(file):
        for path in model.resolve().iterdir():
            (Path(place) / path.name).symlink_to(path)
        simplify_tokenizer(Path(place) / "tokenizer.json")
        line = [sys.executable, str(converter / SCRIPT), place, "--model-name", "merged"]
        done = subprocess.run(
            [*line, "--outtype", TYPES[dtype], "--outfile", str(file)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(converter / LIBRARY), "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode or not file.is_file():
        lines = done.stderr.strip().splitlines() or ["it gives no reason"]
        raise JobFailed(f"llama.cpp's converter failed: {lines[-1][:300]}")


def simplify_tokenizer(path: Path) -> None:
    """Replaces the link to a tokenizer.json where the converter would mistake its kind.

    The converter takes a BPE tokenizer with `byte_fallback` for SentencePiece and leaves its merges
    out. transformers sets it in the tokenizer that it makes of a GGUF file, where it has no effect:
    text is cut into bytes first.
    """
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    cutter = content.get("pre_tokenizer") or {}
    if content["model"].get("type") != "BPE" or cutter.get("type") != "ByteLevel":
        return
    content["model"]["byte_fallback"] = False
    path.unlink()
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_gguf(file: Path, dtype: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file; raises JobFailed where transformers cannot read it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = versions.gguf_options() | {"gguf_file": file.name, "dtype": dtype}
    options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobFailed(
            f"transformers cannot read the GGUF file, so it was not checked and is not kept: "
            f"{reason[:200]}"
        ) from None
