"""What pushing and pulling share: the Hub's client, names of repositories and bases, digests.

HF_ENDPOINT names another Hub, HF_HUB_OFFLINE=1 works from the cache, and the token is HF_TOKEN or
that of `hf auth login`. tools/hub_errors.py explains the client's errors.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tools import adapters, architectures, recipes, runs
from tools.common import ROOT, WrongInput, digest, git_blob, read_json, shown

FINLORA = "wangd12"  # publishes FinLoRA's adapters
CARD = "README.md"
MIB = 2**20
# The files of a repository, and the most bytes of each. An adapter's config limits its weights.
# Nothing else is sent or taken: no pickle, no code.
LIMITS = {
    adapters.CONFIG: MIB,
    adapters.WEIGHTS: None,
    CARD: 4 * MIB,
    runs.INFO: MIB,
    runs.CONFIG: MIB,
    "tokenizer.json": 64 * MIB,
    "tokenizer_config.json": 4 * MIB,
    "special_tokens_map.json": MIB,
    "chat_template.jinja": MIB,
}
SCORES = re.compile(r"evals/(base/)?[a-z0-9_]{1,64}\.json")
SCORES_LIMIT = 64 * MIB
Contents = dict[str, bytes | Path]


class RemoteFile(NamedTuple):
    """A file on the Hub. `sha` is SHA-256 where the Hub keeps it in LFS, else git's SHA-1."""

    size: int
    sha: str


class External(BaseModel):
    """A JSON file that somebody else may have written. Keys without a field are ignored."""

    model_config = ConfigDict(strict=True)


class Origin(External):
    """hub.json: which adapter on the Hub a pulled run holds, and its files' digests."""

    repo: str
    folder: str = ""
    precision: str | None = None  # asked for at the pull
    revision: str
    commit: str
    base: str
    base_revision: str | None
    pulled: str
    remote: dict[str, str]  # digests on the Hub
    local: dict[str, str]  # SHA-256 of what lies here


Model = TypeVar("Model", bound=External)


def validate(model: type[Model], content: Any, where: str) -> Model:
    """`content` as `model`; raises WrongInput that names `where`, the key and the fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise WrongInput(f"{where}: {key[:80]} is malformed: {first['msg']}") from None


def read_origin(run: runs.Run) -> Origin | None:
    """The hub.json of a run; None of a run that was trained here."""
    if not run.origin_file.is_file():
        return None
    return validate(Origin, read_json(run.origin_file), shown(run.origin_file))


def connect() -> Any:
    """The Hub's client. It reads the token itself and never shows it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HfApi(endpoint=endpoint.rstrip("/"), library_name="finlora-recipes")


def list_remote_files(api: Any, repo: str, revision: str) -> dict[str, RemoteFile]:
    """The files of a repository at a revision, by path."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }


def is_published_name(path: str) -> bool:
    """Whether a path in a repository is one that this project publishes."""
    return path in LIMITS or SCORES.fullmatch(path) is not None


def has_digest(content: bytes | Path, sha: str) -> bool:
    """Whether a file has the digest that the Hub names; see `RemoteFile`."""
    in_lfs = len(sha) == 64
    if isinstance(content, Path):
        return sha == (digest(content) if in_lfs else git_blob(content))
    if in_lfs:
        return sha == hashlib.sha256(content).hexdigest()
    return sha == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def list_differences(files: Contents, remote: dict[str, RemoteFile]) -> list[str]:
    """The names of a run's files that differ on the Hub, or exist on one side only."""
    return sorted(
        name
        for name in files.keys() | filter(is_published_name, remote)
        if name not in files or name not in remote or not has_digest(files[name], remote[name].sha)
    )


def name_repository(recipe: recipes.Recipe, namespace: str) -> str:
    """The repository of a recipe's adapter; without a namespace, the one that FinLoRA published."""
    name, finlora_name = Path(recipe.name).stem, None
    if recipe.name in recipes.list_names():
        finlora_name = recipes.find_finlora_name(recipe.name)
        name = finlora_name or recipe.name.replace("/", "-")
    if not namespace and not finlora_name:
        raise WrongInput(f"FinLoRA published no {recipe.name}; NAMESPACE=… says whose to take")
    return f"{namespace or FINLORA}/{name}"


def find_hub_name(base: str) -> str:
    """A base's name on the Hub; raises WrongInput for a folder of which none is recorded."""
    if name := recipes.find_base(base)[1].get("hub"):
        return str(name)
    if not (base.startswith(("/", ".", "~")) or (ROOT / base).is_dir()):
        return recipes.resolve_mirror(base)
    if model := architectures.read_architectures().get(base.lower()):
        return model.source
    raise WrongInput(
        f'base_model "{base}" is a folder of this machine; add its name on the Hub to '
        "recipes/matrix.yaml (`hub:`) or recipes/models/ (`also`)"
    )


def is_same_base(first: str, second: str) -> bool:
    """Whether two names on the Hub are one model, or one is a mirror of the other."""
    return recipes.resolve_mirror(first).lower() == recipes.resolve_mirror(second).lower()


def find_base_revision(base: str, config: dict[str, Any]) -> str:
    """The commit of the base: from the config, the Hub's cache or the matrix; else `main`."""
    from huggingface_hub import try_to_load_from_cache

    if config.get("revision_of_model"):
        return str(config["revision_of_model"])
    cached = try_to_load_from_cache(base, "config.json") if config["base_model"] == base else None
    if isinstance(cached, str):
        return Path(cached).parent.name
    return str(recipes.find_base(base)[1].get("revision", "main"))
