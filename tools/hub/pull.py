"""Brings a published adapter here, checked, as a run folder that scoring and chat use.

    python -m tools.hub.pull sentiment_r4                          FinLoRA's own adapter
    python -m tools.hub.pull sentiment_r4 --namespace me --revision v1.1.0
    python -m tools pull --adapter owner/name                  any LoRA adapter, to runs/hub/
    python -m tools pull --adapter owner/name/folder --precision nf4

It is taken at one commit, which `hub.json` records beside the digests of its files, and checked as
bytes (tools/adapters.py) before it is put in its place. What was cut off goes on where it stopped.
"""

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tools import adapters, architectures, common, models, recipes, runs, subjects
from tools.common import ROOT, JobFailed, WrongInput, atomic, digest, shown, write_json
from tools.hub.client import (
    CONFIG,
    LIMITS,
    MIB,
    RUN,
    SCORES,
    SCORES_LIMIT,
    hub,
    hub_name,
    matches,
    repository,
    same_base,
    tree,
)
from tools.hub_errors import plainly
from tools.runs import UNKNOWN, Run


@dataclass(frozen=True)
class Source:
    """Where an adapter lies on the Hub: a repository, or a folder of one."""

    repo: str
    folder: str = ""  # ends with a slash where there is one

    def __str__(self) -> str:
        return f"{self.repo}/{self.folder}".rstrip("/")

    @property
    def name(self) -> str:
        return str(self).rsplit("/", 1)[-1]


def listed(api: Any, repo: str, commit: str, config: str) -> dict[str, tuple[int, str]]:
    """The files of a repository at a commit; without a network, those that the cache holds.

    config: the path of the adapter's config inside the repository.
    """
    import httpx
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return tree(api, repo, commit)
    except (httpx.TransportError, OfflineModeIsEnabled):
        found = try_to_load_from_cache(repo, config, revision=commit)
        if not isinstance(found, str):
            raise
    print(f"pull       the Hub cannot be reached; {repo} comes from the cache")
    folder = Path(found).parents[config.count("/")]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    # The cache names a file's content by the digest that the Hub told.
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.resolve().name)
        for path in paths
    }


def wanted(repo: str, there: dict[str, tuple[int, str]]) -> list[str]:
    """The files to take; raises WrongInput where a repository is not fit to be taken."""
    for name in there:
        parts = PurePosixPath(name).parts
        odd = name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable()
        if odd:
            raise WrongInput(f"{repo} holds the path {name[:80]!r}, which leaves the folder")
    if adapters.WEIGHTS not in there:
        pickle = next((n for n in there if n.endswith((".bin", ".pt", ".pth", ".pkl"))), None)
        has = f"only {pickle!r}, a pickle, which can run code" if pickle else "none"
        raise WrongInput(f"{repo}: {adapters.WEIGHTS} is needed; it has {has}")
    names = [name for name in there if name in LIMITS or SCORES.fullmatch(name)]
    for name in names:
        limit = LIMITS.get(name, SCORES_LIMIT)
        if limit and there[name][0] > limit:
            raise WrongInput(f"{repo}: {name} has {there[name][0]:,} bytes; {limit:,} is the most")
    return names


def fetch(api: Any, source: Source, name: str, revision: str, told: str) -> Path:
    """Downloads a file into the Hub's cache, or finds it there; what does not match is removed."""
    path = Path(api.hf_hub_download(source.repo, source.folder + name, revision=revision))
    if not matches(path, told):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise JobFailed(f"{source}: {name} is damaged (its digest is another); run it again")
    return path


def safe_config(content: bytes, where: str) -> dict[str, Any]:
    """An Axolotl config that somebody else wrote; raises WrongInput where it could run code."""
    try:
        config = yaml.load(content, yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise WrongInput(f"{where}: not YAML") from None
    if not isinstance(config, dict) or not isinstance(config.get("datasets"), list):
        raise WrongInput(f"{where}: no Axolotl config")
    if config.get("trust_remote_code"):
        raise WrongInput(f"{where}: trust_remote_code would run code from the Hub")
    known = ("tools.train.plugin.", "tools.train.plugin.", "axolotl.integrations.")
    if odd := [p for p in config.get("plugins") or () if not str(p).startswith(known)]:
        raise WrongInput(f"{where}: the plugin {str(odd[0])[:60]!r} is not known here")
    tokens = config.get("special_tokens") or {}
    if not isinstance(tokens, dict) or any(not str(k).endswith("_token") for k in tokens):
        raise WrongInput(f"{where}: special_tokens may only name tokens")
    return config


def score_file(content: bytes, where: str) -> None:
    """Raises WrongInput unless a score file has the parts that listings and reports read."""
    told = common.parse_json(content, where)
    kinds = {"evaluated": dict, "metrics": dict, "predictions": list, "examples": int}
    for key, kind in kinds.items():
        if not isinstance(told.get(key), kind):
            raise WrongInput(f'{where}: "{key}" is missing or malformed')
    if not re.fullmatch("[a-z0-9_]{1,64}", str(told["evaluated"].get("dataset"))):
        raise WrongInput(f"{where}: no name of a dataset")


def describe(
    source: Source,
    folder: Path,
    target: Path,
    recipe: recipes.Recipe | None,
    base: str,
    count: int,
    precision: str | None,
) -> None:
    """Writes what a run folder needs and a repository did not bring: run.json and config.yaml.

    A config that came along is kept to the byte, unless base or output lie elsewhere here.
    """
    settings = common.parse_json((folder / adapters.CONFIG).read_bytes(), adapters.CONFIG)
    row = recipes.find_base(base)[1]
    local = recipe.config["base_model"] if recipe else row.get("base_model") or row.get("hub", base)
    sha, run = digest(folder / adapters.WEIGHTS), folder / RUN
    published = subjects.FINLORA.fullmatch(source.name)
    if run.is_file():
        told = common.parse_json(run.read_bytes(), f"{source}/{RUN}")
        if told.get("adapter_sha256") != sha:
            raise WrongInput(f"{source}: {RUN} tells of another adapter")
    else:
        told = {
            "recipe": recipe.name if recipe else str(source),
            "base_model": local,
            "data": [],
            "adapter_sha256": sha,
            "trainable_parameters": count,
        }
        # FinLoRA trained on [INST] … [/INST] and not on the chat template.
        told |= {"prompt_format": "finlora"} if published else {}
        if not (recipe or published or precision or (folder / CONFIG).is_file()):
            told |= {"precision": UNKNOWN}
        write_json(run, told)
    if (folder / CONFIG).is_file():
        config = safe_config((folder / CONFIG).read_bytes(), f"{source}/{CONFIG}")
    else:
        config = dict(recipe.config if recipe else generic(source.name, local))
        config = models.at(config, precision) if precision else config
        config |= {
            "lora_r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_dropout": settings.get("lora_dropout", 0.0),
            "lora_target_modules": settings["target_modules"],
            "peft_use_dora": bool(settings.get("use_dora")),
            "peft_use_rslora": bool(settings.get("use_rslora")),
        }
    here = {"base_model": local}
    if (ROOT / str(config.get("output_dir", ""))).resolve() != target:
        here |= {"output_dir": shown(target), "dataset_prepared_path": shown(target / "prepared")}
    if not (folder / CONFIG).is_file() or any(config.get(k) != v for k, v in here.items()):
        with atomic(folder / CONFIG) as file:
            file.write(yaml.safe_dump(config | here, sort_keys=False).encode())


def generic(name: str, base: str) -> dict[str, Any]:
    """An Axolotl config for an adapter of which nothing but itself is known.

    FinLoRA's names tell the recipe or, where the catalogue has none, the precision. Others tell
    none: run.json says so, and PRECISION= is asked for where the adapter is used.
    """
    try:
        return recipes.find(name).config
    except WrongInput:
        entry = {"path": "unknown", "type": "chat_template", "chat_template": "tokenizer_default"}
        config = {"base_model": base, "adapter": "lora", "datasets": [entry]}
        config |= recipes.find_base(base)[1].get("settings") or {}
        published = subjects.FINLORA.fullmatch(name)
        return config | (subjects.BITS[published["bits"].lower()] if published else {})


def check_precision(base: str, precision: str | None) -> None:
    """Raises WrongInput where a base was published quantized and `precision` is another one."""
    own = models.published_precision(base)
    if own and precision not in (None, own):
        raise WrongInput(f"PRECISION={precision}: the base {base} was published quantized to {own}")


def architecture(api: Any, base: str) -> architectures.Model:
    """The base's architecture, from recipes/models/ or from its own config.json on the Hub."""
    if model := architectures.read_architectures().get(recipes.resolve_mirror(base).lower()):
        return model
    with plainly(f"the base {base}"):
        if api.hf_hub_download(base, "config.json", dry_run=True).file_size > MIB:
            raise WrongInput(f"{base}: its config.json is larger than 1 MB")
        path = Path(api.hf_hub_download(base, "config.json"))
    return architectures.parse_config(
        base, common.parse_json(path.read_bytes(), f"{base}/config.json")
    )


def unchanged(target: Path) -> bool:
    """Whether every file of a pulled run is still what was pulled."""
    files = Run(target).origin.get("local", {})
    return bool(files) and all(
        (target / name).is_file() and digest(target / name) == sha for name, sha in files.items()
    )


def bring(
    api: Any,
    source: Source,
    revision: str,
    target: Path,
    recipe: recipes.Recipe | None,
    precision: str | None,
) -> str | None:
    """Downloads, checks and places an adapter; returns its commit, None where it is there."""
    repo = source.repo
    with plainly(f"{source} at {revision}" if revision != "main" else str(source)):
        config = source.folder + adapters.CONFIG
        first = api.hf_hub_download(repo, config, revision=revision, dry_run=True)
        commit = str(first.commit_hash)
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise JobFailed(f"{repo}: the Hub names no commit")
        told = Run(target).origin
        same = (told.get("repo"), told.get("folder", ""), told.get("commit"))
        same_precision = precision in (None, told.get("precision"))
        if same == (repo, source.folder, commit) and same_precision and unchanged(target):
            return None
        all_files = listed(api, repo, commit, config)
        there = {
            name.removeprefix(source.folder): facts
            for name, facts in all_files.items()
            if name.startswith(source.folder)
        }
        names = wanted(str(source), there)
        # By the revision's name, so that the cache knows it without a network, too.
        path = fetch(api, source, adapters.CONFIG, revision, there[adapters.CONFIG][1])
        if path.parents[config.count("/")].name != commit:
            raise JobFailed(f"{repo}: {revision} moved meanwhile; run it again")
        settings = common.parse_json(path.read_bytes(), f"{source}/{adapters.CONFIG}")
        plain = adapters.settings(settings, f"{source}/{adapters.CONFIG}")
        base = str(settings.get("base_model_name_or_path") or "")
        need = hub_name(recipe.config["base_model"]) if recipe else base
        if not same_base(base, need):
            raise WrongInput(
                f"{source} is an adapter for {base[:80] or 'an unknown base'}; "
                f"{recipe.name if recipe else 'it'} needs one for {need}"
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or (ROOT / base).is_dir():
            raise WrongInput(f"{source}: its base {base[:80]!r} is no name on the Hub")
        model = architecture(api, base)
        check_precision(base, precision)
        most = adapters.largest(model, plain, f"{source}/{adapters.CONFIG}")
        size = there[adapters.WEIGHTS][0]
        if size > most:
            raise WrongInput(
                f"{source}: {adapters.WEIGHTS} has {size:,} bytes; its config implies {most:,} at "
                "most"
            )
        for left in target.parent.glob(f".{target.name}.*.part"):
            shutil.rmtree(left)  # of a pull that was killed; this one holds the lock
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            for name in names:
                where = part / name
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(fetch(api, source, name, commit, there[name][1]), where)
            count = adapters.check(part, model)
            for name in filter(SCORES.fullmatch, names):
                score_file((part / name).read_bytes(), f"{source}/{name}")
            describe(source, part, target, recipe, need, count, precision)
            local = {n: digest(part / n) for n in (*names, RUN, CONFIG) if (part / n).is_file()}
            content = {
                "repo": repo,
                **({"folder": source.folder} if source.folder else {}),
                **({"precision": precision} if precision else {}),
                "revision": revision,
                "commit": commit,
                "base": base,
                "base_revision": settings.get("revision"),
                "pulled": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "remote": {name: there[name][1] for name in names},
                "local": local,
            }
            write_json(Run(part).origin_file, content)
            if target.is_dir() and any(target.iterdir()):
                print(f"pull       what was there is in {Run(target).move_aside()}")
            elif target.is_dir():
                target.rmdir()
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return commit


@dataclass(frozen=True)
class Request:
    """What to pull: a recipe's adapter of a namespace (FinLoRA's own without), or any adapter."""

    recipe: str | None = None
    namespace: str | None = None
    adapter: str | None = None  # owner/name[/folder]
    revision: str | None = None  # a tag, branch or commit
    precision: str | None = None  # that an adapter was trained at


def pull(request: Request, force: bool = False) -> Path:
    """Brings an adapter into its run folder, which it returns."""
    name, named, precision = request.recipe, request.adapter, request.precision
    namespace, revision = (request.namespace or "").strip(), (request.revision or "").strip()
    if bool(name) == bool(named):
        raise WrongInput("RECIPE=… or ADAPTER=owner/name is needed, one of them")
    recipe = recipes.find(name) if name else None
    if recipe and precision:
        raise WrongInput("PRECISION= goes with ADAPTER=…; a recipe has its own")
    if recipe:
        source, run = Source(repository(recipe, namespace)), recipe.run
    else:
        place = str(named).strip().removeprefix("https://huggingface.co/").strip("/")
        owner, _, rest = place.replace("/tree/main", "").partition("/")
        repo, _, folder = rest.partition("/")
        if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)+[A-Za-z0-9][\w.-]*", place) or ".." in place:
            raise WrongInput(
                f'ADAPTER "{named}" is no name on the Hub: owner/name, or owner/name/folder'
            )
        source = Source(f"{owner}/{repo}", f"{folder}/" if folder else "")
        run = Run(runs.RUNS / "hub" / str(source))
    repo = str(source)
    # Folders of the same repository that were pulled before may lie inside, with their locks.
    name = run.origin_file.name
    inside = [path for path in run.folder.glob("[!.]*") if not any(path.glob(f"**/{name}"))]
    if inside and not (run.origin or force):
        raise WrongInput(f"{run} was made here; FORCE=1 moves it aside and pulls {repo}")
    with run.lock():
        commit = bring(hub(), source, revision or "main", run.folder, recipe, precision)
    told = run.origin
    if commit is None:
        print(f"pull       {repo} at {told['commit'][:12]} is there already: {run}")
    else:
        print(f"pull       {repo} at {commit[:12]}: {run}")
    if run.info.get("precision") == UNKNOWN:
        print("pull       its precision is not known: say PRECISION=… where the adapter is used")
    return run.folder
