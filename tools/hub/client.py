"""What publishing and pulling have in common: the Hub's client, its errors, names and digests.

    python -m tools.hub.client [--namespace me]      the runs here, and what a namespace on the Hub holds

`tools/hub/push.py` publishes a run, `tools/hub/pull.py` brings one here. HF_ENDPOINT names another Hub,
HF_HUB_OFFLINE=1 works from the cache, and the token is HF_TOKEN or that of `hf auth login`.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from tools import adapters, architectures, common, recipes
from tools.common import ROOT, WrongInput, digest

FINLORA = "wangd12"  # who published FinLoRA's adapters
CARD, RUN, CONFIG = "README.md", "run.json", "config.yaml"
MIB = 2**20
# What a run's repository holds, and how large each may be. `adapter_model.safetensors` may be as
# large as its config implies. Nothing else is sent or taken: no pickle, no code.
LIMITS = {
    adapters.CONFIG: MIB,
    adapters.WEIGHTS: None,
    CARD: 4 * MIB,
    RUN: MIB,
    CONFIG: MIB,
    "tokenizer.json": 64 * MIB,
    "tokenizer_config.json": 4 * MIB,
    "special_tokens_map.json": MIB,
    "chat_template.jinja": MIB,
}
SCORES = re.compile(r"evals/(base/)?[a-z0-9_]{1,64}\.json")
SCORES_LIMIT = 64 * MIB
Contents = dict[str, bytes | Path]


def hub() -> Any:
    """The client. It finds the token by itself and never shows it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HfApi(endpoint=endpoint.rstrip("/"), library_name="finlora-recipes")


def tree(api: Any, repo: str, revision: str) -> dict[str, tuple[int, str]]:
    """The files of a repository at a revision: {path: (bytes, SHA-256 or git blob SHA-1)}."""
    from huggingface_hub.hf_api import RepoFile

    listed = api.list_repo_tree(repo, revision=revision, recursive=True)
    return {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in listed
        if isinstance(entry, RepoFile)
    }


def matches(content: bytes | Path, told: str) -> bool:
    """Whether a file has the digest that the Hub tells: SHA-256 of a large file, else git's."""
    if isinstance(content, Path):
        return told == (digest(content) if len(told) == 64 else common.git_blob(content))
    if len(told) == 64:
        return told == hashlib.sha256(content).hexdigest()
    return told == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def different(files: Contents, there: dict[str, tuple[int, str]]) -> list[str]:
    """The names of a run's files that are not the same on the Hub, or not there, or only there."""
    names = files.keys() | {name for name in there if name in LIMITS or SCORES.fullmatch(name)}
    return sorted(
        name
        for name in names
        if name not in files or name not in there or not matches(files[name], there[name][1])
    )


def repository(recipe: recipes.Recipe, namespace: str) -> str:
    """The repository of a recipe's adapter; without a namespace, the one that FinLoRA published."""
    name, theirs = Path(recipe.name).stem, None
    if recipe.name in recipes.list_names():
        theirs = recipes.find_finlora_name(recipe.name)
        name = theirs or recipe.name.replace("/", "-")
    if not namespace and not theirs:
        raise WrongInput(f"FinLoRA published no {recipe.name}; NAMESPACE=… says whose to take")
    return f"{namespace or FINLORA}/{name}"


def hub_name(base: str) -> str:
    """A base's name on the Hub; raises WrongInput for a folder whose name there is not known."""
    if name := recipes.find_base(base)[1].get("hub"):
        return str(name)
    if not (base.startswith(("/", ".", "~")) or (ROOT / base).is_dir()):
        return recipes.resolve_mirror(base)
    if model := architectures.read_architectures().get(base.lower()):
        return model.source
    raise WrongInput(
        f'base_model "{base}" is a folder of this machine; what it is called on the Hub must stand '
        "in recipes/matrix.yaml (`hub:`) or recipes/models/ (`also`)"
    )


def same_base(one: str, other: str) -> bool:
    """Whether two names on the Hub are one model: the same, or a mirror of recipes/matrix.yaml."""
    return recipes.resolve_mirror(one).lower() == recipes.resolve_mirror(other).lower()


def base_revision(base: str, config: dict[str, Any]) -> str:
    """The commit of the base that was trained on, as far as it is known: in the recipe, in the
    Hub's cache, in recipes/matrix.yaml; else the branch `main`.
    """
    from huggingface_hub import try_to_load_from_cache

    if config.get("revision_of_model"):
        return str(config["revision_of_model"])
    cached = try_to_load_from_cache(base, "config.json") if config["base_model"] == base else None
    if isinstance(cached, str):
        return Path(cached).parent.name
    return str(recipes.find_base(base)[1].get("revision", "main"))
