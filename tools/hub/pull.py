"""Downloads a published adapter, checks it, and makes it a run that scoring and chat can use.

    python -m tools pull sentiment_r4                       FinLoRA's own adapter
    python -m tools pull sentiment_r4 --namespace me --revision v1.1.0
    python -m tools pull --adapter owner/name               any LoRA adapter, to runs/hub/
    python -m tools pull --adapter owner/name/folder --precision nf4

A pull takes one commit; `hub.json` records it with the files' digests. The files are checked as
bytes (tools/adapters.py) before they become a run. After an interruption the same command resumes.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml
from pydantic import Field

from evals import report
from tools import adapters, architectures, common, models, recipes, runs, subjects
from tools.common import JobFailed, WrongInput, digest, parse_json, parse_yaml, shown, write_text
from tools.hub import client
from tools.hub.client import External, Origin, RemoteFile, find_hub_name
from tools.hub_errors import explain_errors
from tools.runs import UNKNOWN, Run

PICKLES = (".bin", ".pt", ".pth", ".pkl")
PLUGINS = ("tools.train.plugin.", "axolotl.integrations.")


@dataclass(frozen=True)
class Source:
    """An adapter on the Hub, and the run that it becomes."""

    repo: str
    folder: str  # of the repository; ends with a slash, or is empty
    revision: str
    recipe: recipes.Recipe | None
    precision: str | None

    def __str__(self) -> str:
        return f"{self.repo}/{self.folder}".rstrip("/")

    @property
    def run(self) -> Run:
        return self.recipe.run if self.recipe else Run(runs.RUNS / "hub" / str(self))

    @property
    def name(self) -> str:
        return str(self).rsplit("/", 1)[-1]


class DataFile(External):
    path: str
    rows: int
    sha256: str


class RunInfo(External):
    """What this project reads of a published run.json."""

    adapter_sha256: str
    recipe: str | None = None
    recipe_version: str | None = None
    recipe_digest: str | None = None
    base_model: str | None = None
    prompt_format: str | None = None
    precision: str | None = None
    data: list[DataFile] | None = None
    steps: int | None = None
    epochs: float | None = None
    last_loss: float | None = None
    seconds: float | None = None
    processes: int = 1
    device: str | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    trainable_parameters: int | None = None
    packages: dict[str, str] | None = None


class Dataset(External):
    path: str


class AxolotlConfig(External):
    """What this project reads of a published config.yaml, without what it replaces."""

    datasets: list[Dataset] = Field(min_length=1)
    test_datasets: list[Dataset] | None = None
    adapter: Literal["lora", "qlora"] = "lora"
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_config_kwargs: dict[str, str | bool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    special_tokens: dict[str, str] | None = None
    plugins: list[str] | None = None


def find_source(
    recipe: str | None,
    namespace: str | None,
    adapter: str | None,
    revision: str | None,
    precision: str | None,
) -> Source:
    """Finds a recipe's adapter in a namespace (default: FinLoRA's own), or any by its address.

    adapter: owner/name[/folder]. revision: a tag, branch or commit. precision: of its training.
    """
    revision = (revision or "").strip() or "main"
    if bool(recipe) == bool(adapter):
        raise WrongInput("RECIPE=… or ADAPTER=owner/name is needed, one of them")
    if recipe:
        if precision:
            raise WrongInput("PRECISION= goes with ADAPTER=…; a recipe has its own")
        entry = recipes.find(recipe)
        repo = client.name_repository(entry, (namespace or "").strip())
        return Source(repo, "", revision, entry, None)
    address = str(adapter).strip().removeprefix("https://huggingface.co/").strip("/")
    address = re.sub("/tree/main(?=/|$)", "", address)
    if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)+[A-Za-z0-9][\w.-]*", address) or ".." in address:
        raise WrongInput(
            f'ADAPTER "{adapter}" is no name on the Hub: owner/name, or owner/name/folder'
        )
    owner, name, *folders = address.split("/")
    folder = "".join(f"{part}/" for part in folders)
    return Source(f"{owner}/{name}", folder, revision, None, precision)


# ---- Files


def find_commit(api: Any, source: Source) -> str:
    """Returns the commit that a source's revision names now, on the Hub or in the cache."""
    file = source.folder + adapters.CONFIG
    info = api.hf_hub_download(source.repo, file, revision=source.revision, dry_run=True)
    if not re.fullmatch("[0-9a-f]{40}", str(info.commit_hash)):
        raise JobFailed(f"{source.repo}: the Hub names no commit")
    return str(info.commit_hash)


def is_pulled(source: Source, commit: str) -> bool:
    """Whether the run holds a source at a commit, with every file as it was pulled."""
    origin = client.read_origin(source.run)
    if origin is None or source.precision not in (None, origin.precision):
        return False
    if (origin.repo, origin.folder, origin.commit) != (source.repo, source.folder, commit):
        return False
    files = {source.run.folder / name: sha for name, sha in origin.local.items()}
    return all(file.is_file() and digest(file) == sha for file, sha in files.items())


def list_files(api: Any, source: Source, commit: str) -> dict[str, RemoteFile]:
    """Lists the files in a source's folder at a commit; without a network, those in the cache."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = client.list_remote_files(api, source.repo, commit)
    except (httpx.TransportError, OfflineModeIsEnabled):
        folder = Path(api.snapshot_download(source.repo, revision=commit, local_files_only=True))
        print(f"pull       the Hub cannot be reached; {source.repo} comes from the cache")
        paths = [path for path in folder.rglob("*") if path.is_file()]
        # The cache names the target of a link by the digest that the Hub reported.
        files = {
            str(path.relative_to(folder)): RemoteFile(path.stat().st_size, path.resolve().name)
            for path in paths
        }
    start = source.folder
    return {
        name.removeprefix(start): file for name, file in files.items() if name.startswith(start)
    }


def choose_files(source: Source, files: dict[str, RemoteFile]) -> list[str]:
    """Names the files to take; raises WrongInput for a repository that is unsafe or incomplete."""
    for name in files:
        is_inside = not name.startswith("/") and ".." not in PurePosixPath(name).parts
        if not is_inside or "\\" in name or not name.isprintable():
            raise WrongInput(f"{source} holds the path {name[:80]!r}, which leaves the folder")
    if adapters.CONFIG not in files:
        raise WrongInput(f"{source} holds no PEFT adapter: {adapters.CONFIG} is missing")
    if adapters.WEIGHTS not in files:
        pickle = next((name for name in files if name.endswith(PICKLES)), None)
        reason = f"only {pickle!r}, a pickle, which can run code" if pickle else "none"
        raise WrongInput(f"{source}: {adapters.WEIGHTS} is needed; it has {reason}")
    names = list(filter(client.is_published_name, files))
    for name in names:
        limit = client.LIMITS.get(name, client.SCORES_LIMIT)
        if limit and files[name].size > limit:
            raise WrongInput(
                f"{source}: {name} has {files[name].size:,} bytes; {limit:,} is the most"
            )
    return names


def download(api: Any, source: Source, name: str, revision: str, sha: str) -> Path:
    """Downloads a file into the cache; raises JobFailed and removes it if its digest differs.

    File by file, because `snapshot_download` falls back to the cache if the Hub fails.
    """
    path = Path(api.hf_hub_download(source.repo, source.folder + name, revision=revision))
    if not client.has_digest(path.read_bytes(), sha):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise JobFailed(f"{source}: {name} is damaged (its digest is another); run it again")
    return path


# ---- Checks


def find_base(source: Source, settings: dict[str, Any]) -> str:
    """Returns an adapter's base; raises WrongInput unless it is on the Hub and fits the recipe."""
    base = str(settings.get("base_model_name_or_path") or "")
    needed = find_hub_name(source.recipe.config["base_model"]) if source.recipe else base
    if recipes.resolve_mirror(base).lower() != recipes.resolve_mirror(needed).lower():
        recipe = source.recipe.name if source.recipe else "it"
        raise WrongInput(
            f"{source} is an adapter for {base[:80] or 'an unknown base'}; {recipe} needs one for "
            f"{needed}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or (common.ROOT / base).is_dir():
        raise WrongInput(f"{source}: its base {base[:80]!r} is no name on the Hub")
    return base


def find_architecture(api: Any, base: str) -> architectures.Model:
    """Finds a base's architecture in recipes/models/, else in its config.json on the Hub."""
    if model := architectures.read_architectures().get(recipes.resolve_mirror(base).lower()):
        return model
    with explain_errors(f"the base {base}"):
        if api.hf_hub_download(base, "config.json", dry_run=True).file_size > client.MIB:
            raise WrongInput(f"{base}: its config.json is larger than 1 MB")
        path = Path(api.hf_hub_download(base, "config.json"))
    return architectures.parse_config(base, parse_json(path.read_bytes(), f"{base}/config.json"))


def parse_config(content: bytes, where: str) -> dict[str, Any]:
    """Parses a published Axolotl config; raises WrongInput if it could run code."""
    config = parse_yaml(content, where)
    settings = client.validate(AxolotlConfig, config, where)
    if holds_key(config, "trust_remote_code"):
        raise WrongInput(f"{where}: trust_remote_code would run code from the Hub")
    for plugin in settings.plugins or ():
        if not plugin.startswith(PLUGINS):
            raise WrongInput(f"{where}: the plugin {plugin[:60]!r} is not one of this project")
    if any(not name.endswith("_token") for name in settings.special_tokens or ()):
        raise WrongInput(f"{where}: special_tokens may only name tokens")
    return dict(config)


def holds_key(value: Any, key: str) -> bool:
    """Whether a mapping has a key with a true value, at any depth."""
    if isinstance(value, dict):
        return bool(value.get(key)) or any(holds_key(part, key) for part in value.values())
    return isinstance(value, list) and any(holds_key(part, key) for part in value)


def check_scores(file: Path, where: str) -> None:
    """Raises WrongInput unless a score file is one that reports can read."""
    content = parse_json(file.read_bytes(), where)
    try:
        report.read(file)
    except WrongInput as error:
        raise WrongInput(f"{where} is malformed: {error}") from None
    if not re.fullmatch("[a-z0-9_]{1,64}", content["evaluated"]["dataset"]):
        raise WrongInput(f"{where}: no name of a dataset")


# ---- The run


def drop_foreign(source: Source, part: Run, name: str) -> bool:
    """Removes a run.json or config.yaml that another program wrote; whether it was one."""
    keys = {runs.INFO: ("adapter_sha256", str), runs.CONFIG: ("datasets", list)}
    if name not in keys:
        return False
    key, kind = keys[name]
    path, where = part.folder / name, f"{source}/{name}"
    parse = parse_json if name == runs.INFO else parse_yaml
    content = parse(path.read_bytes(), where)
    if isinstance(content, dict) and isinstance(content.get(key), kind):
        return False
    print(f"pull       {where} is another program's (it has no {key}) and is left out")
    path.unlink()
    return True


def complete_info(source: Source, part: Run, base_model: str, parameters: int) -> None:
    """Checks the published run.json, or writes one."""
    sha = digest(part.adapter_file)
    if part.is_finished:
        where = f"{source}/{runs.INFO}"
        run_info = client.validate(RunInfo, parse_json(part.info_file.read_bytes(), where), where)
        if run_info.adapter_sha256 != sha:
            raise WrongInput(f"{where} describes another adapter")
        return
    content = {
        "recipe": source.recipe.name if source.recipe else str(source),
        "base_model": base_model,
        "data": [],
        "adapter_sha256": sha,
        "trainable_parameters": parameters,
    }
    # FinLoRA trained on [INST] … [/INST] and not on the chat template.
    if subjects.FINLORA.fullmatch(source.name):
        content["prompt_format"] = "finlora"
    elif not (source.recipe or source.precision or part.config_file.is_file()):
        content["precision"] = UNKNOWN
    common.write_json(part.info_file, content)


def complete_config(source: Source, part: Run, base_model: str, settings: dict[str, Any]) -> None:
    """Checks the published config.yaml, or writes one.

    A published one keeps its bytes, unless its base or output folder has another place here.
    """
    config: dict[str, Any] | None = None
    if part.config_file.is_file():
        where = f"{source}/{runs.CONFIG}"
        config = published = parse_config(part.config_file.read_bytes(), where)
    else:
        published = source.recipe.config if source.recipe else guess_config(source.name, base_model)
        if source.precision:
            published = models.at(published, source.precision)
        published = published | {
            "lora_r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_dropout": settings.get("lora_dropout", 0.0),
            "lora_target_modules": settings["target_modules"],
            "peft_use_dora": bool(settings.get("use_dora")),
            "peft_use_rslora": bool(settings.get("use_rslora")),
        }
    folder = source.run.folder
    local = published | {"base_model": base_model}
    if (common.ROOT / str(published.get("output_dir", ""))).resolve() != folder:
        local |= {"output_dir": shown(folder), "dataset_prepared_path": shown(folder / "prepared")}
    if local != config:
        write_text(part.config_file, yaml.safe_dump(local, sort_keys=False))


def guess_config(name: str, base_model: str) -> dict[str, Any]:
    """Makes an Axolotl config for an adapter that was published without one.

    A name of FinLoRA's gives the recipe, or at least the precision. For other names the precision
    is unknown: run.json says so, and using the adapter needs PRECISION=.
    """
    try:
        return recipes.find(name).config
    except WrongInput:
        entry = {"path": "unknown", "type": "chat_template", "chat_template": "tokenizer_default"}
        config = {"base_model": base_model, "adapter": "lora", "datasets": [entry]}
        config |= recipes.find_base(base_model)[1].get("settings") or {}
        published = subjects.FINLORA.fullmatch(name)
        return config | (subjects.BITS[published["bits"].lower()] if published else {})


@contextmanager
def write_beside(run: Run) -> Iterator[Run]:
    """Yields a folder that replaces the run at the end; an earlier run is moved aside."""
    for leftover in run.folder.parent.glob(f".{run.folder.name}.*.part"):
        shutil.rmtree(leftover)  # a killed pull left it; this pull holds the lock
    part = Run(run.folder.with_name(f".{run.folder.name}.{os.getpid()}.part"))
    try:
        yield part
        if run.folder.is_dir() and any(run.folder.iterdir()):
            print(f"pull       what was there is in {run.move_aside()}")
        elif run.folder.is_dir():
            run.folder.rmdir()
        os.replace(part.folder, run.folder)
    finally:
        shutil.rmtree(part.folder, ignore_errors=True)


def bring(api: Any, source: Source) -> bool:
    """Downloads, checks and places an adapter; False if it is there already."""
    commit = find_commit(api, source)
    if is_pulled(source, commit):
        return False
    files = list_files(api, source, commit)
    names = choose_files(source, files)
    where = f"{source}/{adapters.CONFIG}"
    # By the revision's name, so that the cache can resolve it without a network.
    path = download(api, source, adapters.CONFIG, source.revision, files[adapters.CONFIG].sha)
    if path.parents[source.folder.count("/")].name != commit:
        raise JobFailed(f"{source.repo}: {source.revision} moved meanwhile; run it again")
    settings = parse_json(path.read_bytes(), where)
    plain = adapters.parse_settings(settings, where)
    base = find_base(source, settings)
    try:
        model = find_architecture(api, base)
        limit = adapters.compute_largest_file(model, plain, where)
    except architectures.UnknownLayers as error:
        raise WrongInput(
            f"{error}; `make pull` knows bases whose layers have Llama's names. Download another's "
            "adapter and name its folder: ADAPTER=path"
        ) from None
    published = models.published_precision(base)
    if published and source.precision not in (None, published):
        raise WrongInput(
            f"PRECISION={source.precision}: the base {base} was published quantized to {published}"
        )
    if (size := files[adapters.WEIGHTS].size) > limit:
        raise WrongInput(
            f"{source}: {adapters.WEIGHTS} has {size:,} bytes; its config implies {limit:,} at most"
        )
    with write_beside(source.run) as part:
        for name in names:
            target = part.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(download(api, source, name, commit, files[name].sha), target)
        names = [name for name in names if not drop_foreign(source, part, name)]
        parameters = adapters.check(part.folder, model)
        for name in filter(client.SCORES.fullmatch, names):
            check_scores(part.folder / name, f"{source}/{name}")
        row = recipes.find_base(base)[1]
        base_model = row.get("base_model") or row.get("hub", base)
        if source.recipe:
            base_model = source.recipe.config["base_model"]
        complete_info(source, part, base_model, parameters)
        complete_config(source, part, base_model, settings)
        local = dict.fromkeys([*names, runs.INFO, runs.CONFIG])
        origin = Origin(
            repo=source.repo,
            folder=source.folder,
            precision=source.precision,
            revision=source.revision,
            commit=commit,
            base=base,
            base_revision=str(settings.get("revision") or "") or None,
            pulled=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            remote={name: files[name].sha for name in names},
            local={name: digest(part.folder / name) for name in local},
        )
        common.write_json(part.origin_file, origin.model_dump(exclude_defaults=True))
    return True


def pull_adapter(source: Source, force: bool = False) -> None:
    """Pulls an adapter into its run folder."""
    run = source.run
    # The folder may hold pulled folders of the same repository, with their locks.
    pulled = f"**/{run.origin_file.name}"
    is_own = any(path for path in run.folder.glob("[!.]*") if not any(path.glob(pulled)))
    if is_own and not (run.origin_file.is_file() or force):
        raise WrongInput(f"{run} was made here; FORCE=1 moves it aside and pulls {source}")
    subject = str(source) if source.revision == "main" else f"{source} at {source.revision}"
    with run.lock(), explain_errors(subject):
        is_new = bring(client.connect(), source)
    origin = client.read_origin(run)
    commit = origin.commit[:12] if origin else ""
    print(f"pull       {source} at {commit}{'' if is_new else ' is there already'}: {run}")
    if run.info.get("precision") == UNKNOWN:
        print("pull       its precision is unknown: using the adapter needs PRECISION=…")
