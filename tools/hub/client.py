"""What pushing and pulling share: the Hub's client, repository and base names, digests.

HF_ENDPOINT names another Hub and HF_HUB_OFFLINE=1 works from the cache. The token is HF_TOKEN or
the one that `hf auth login` stored.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tools import adapters, architectures, recipes, runs
from tools.common import ROOT, WrongInput, read_json, shown

FINLORA = "wangd12"  # publishes FinLoRA's adapters
CARD = "README.md"
MIB = 2**20
# The files that are sent and taken, with their largest size in bytes; the adapter's config limits
# its weights. Everything else stays behind: pickles, code.
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
    "chat_template.json": MIB,
    **dict.fromkeys(("vocab.json", "merges.txt", "tokenizer.model"), 64 * MIB),
    "added_tokens.json": 4 * MIB,
}
SCORES = re.compile(r"evals/(base/)?[a-z0-9_]{1,64}\.json")
SCORES_LIMIT = 64 * MIB
Contents = dict[str, bytes]  # by path in the repository


class RemoteFile(NamedTuple):
    """A file on the Hub. `sha` is SHA-256 for a file in LFS, else git's blob SHA-1."""

    size: int
    sha: str


class External(BaseModel):
    """A JSON file from elsewhere. Keys without a field are ignored."""

    model_config = ConfigDict(strict=True)


class Origin(External):
    """hub.json: where a pulled run comes from, and the digests of its files."""

    repo: str
    folder: str = ""
    precision: str | None = None  # that the user named
    revision: str
    commit: str
    base: str
    base_revision: str | None
    pulled: str
    remote: dict[str, str]  # digests on the Hub
    local: dict[str, str]  # SHA-256 of the files here


Model = TypeVar("Model", bound=External)


def validate(model: type[Model], content: Any, where: str) -> Model:
    """Parses `content` as `model`; raises WrongInput with `where`, the key and the fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise WrongInput(f"{where}: {key[:80]} is malformed: {first['msg']}") from None


def read_origin(run: runs.Run) -> Origin | None:
    """Reads a run's hub.json; None for a run that was trained here."""
    path = run.origin_file
    return validate(Origin, read_json(path), shown(path)) if path.is_file() else None


def connect() -> Any:
    """Returns the Hub's client, which reads the token itself."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HfApi(endpoint=endpoint.rstrip("/"), library_name="finlora-recipes")


def list_remote_files(api: Any, repo: str, revision: str) -> dict[str, RemoteFile]:
    """Lists the files of a repository at a revision, by path."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }


def is_published_name(path: str) -> bool:
    """Whether this project publishes a file of that path."""
    return path in LIMITS or SCORES.fullmatch(path) is not None


def has_digest(content: bytes, sha: str) -> bool:
    """Whether a file's content has the digest that the Hub names; see `RemoteFile`."""
    from huggingface_hub.utils.sha import git_hash

    return sha == (hashlib.sha256(content).hexdigest() if len(sha) == 64 else git_hash(content))


def list_differences(files: Contents, remote: dict[str, RemoteFile]) -> list[str]:
    """Names the published files that differ between a run and the Hub, or that one side lacks."""
    names = files.keys() | filter(is_published_name, remote)
    common = files.keys() & remote.keys()
    return sorted(n for n in names if n not in common or not has_digest(files[n], remote[n].sha))


def name_repository(recipe: recipes.Recipe, namespace: str) -> str:
    """Names the repository of a recipe's adapter; without a namespace, FinLoRA's own."""
    name, finlora_name = Path(recipe.name).stem, None
    if recipe.name in recipes.list_names():
        finlora_name = recipes.find_finlora_name(recipe.name)
        name = finlora_name or recipe.name.replace("/", "-")
    if not namespace and not finlora_name:
        raise WrongInput(f"FinLoRA published no {recipe.name}; NAMESPACE=… says whose to take")
    return f"{namespace or FINLORA}/{name}"


def find_hub_name(base: str) -> str:
    """Finds a base's name on the Hub; raises WrongInput for a folder without a recorded name."""
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


def find_base_revision(base: str, config: dict[str, Any]) -> str:
    """Finds the base's commit in the config, the Hub's cache or the matrix; else `main`."""
    from huggingface_hub import try_to_load_from_cache

    if config.get("revision_of_model"):
        return str(config["revision_of_model"])
    cached = try_to_load_from_cache(base, "config.json") if config["base_model"] == base else None
    if isinstance(cached, str):
        return Path(cached).parent.name
    return str(recipes.find_base(base)[1].get("revision", "main"))
