"""Publishes a finished run on the Hugging Face Hub, with its scores and a model card.

    python -m tools push smollm2-135m/sentiment_r4 --namespace me --dry-run

A push is one commit with the tag `v<recipe version>`, and private unless --public is given. Pushing
the same content again does nothing. Other content under the same version is rejected. After an
interruption the same command completes the push.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools import adapters, architectures, models, recipes, runs
from tools.common import ROOT, SECRET, JobFailed, WrongInput, parse_json, read_json
from tools.hub import client
from tools.hub.card import (
    Publication,
    Scores,
    explain_forbidden,
    make_card,
    name_scores,
    read_scores,
)
from tools.hub_errors import explain_errors
from tools.runs import Run

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATE = "chat_template.jinja"
ATTEMPTS = 5  # while other pushes come first
# Secrets, besides those that tools/common.py masks in messages.
KEYS = re.compile(
    rb"(?<![A-Za-z0-9])xox[abprs]-[\w-]{10,}|(?<![A-Za-z0-9])AIza[\w-]{35}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|" + SECRET.pattern.encode()
)
SECRET_NAMES = re.compile("TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY")  # of environment variables
ANSWERS = {"expected", "answered", "answer", "values"}  # keys of score files with publishable text
LONGEST_ANSWER = 200  # characters
# A difference of two scores is the adapter's if they share everything that a score depends on,
# except the adapter and the machine's copies of the task's files.
PAIRED = (
    *("dataset", "task_version", "data_sha256", "limit", "base_model", "base_revision"),
    *("base_files", "quantization", "precision", "prompt_format", "chat_template_kwargs"),
    *("backend", "task", "scoring", "device_class", "constrained_to", "prompting"),
)


@dataclass(frozen=True)
class Options:
    """How a run is published. `force`: without scores, or over a push that has no tag."""

    public: bool = False
    dry_run: bool = False  # show files and card, send nothing
    force: bool = False
    price: float | None = None  # USD for an hour of one GPU, for the card


@dataclass(frozen=True)
class Release:
    """The files of a run under a tag of a repository."""

    repo: str
    tag: str
    files: client.Contents


# ---- What is sent


def check_run(recipe: recipes.Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a run's (run.json, merged config); raises WrongInput if it must not be published."""
    run = recipe.run
    if not run.is_finished and run.checkpoints():
        raise WrongInput(f"{run} is unfinished; `make train RECIPE={recipe.name}` continues it")
    config, run_info = recipe.read_trained_config(), run.info
    same_version = run_info.get("recipe_version") == recipe.version
    is_stale = same_version and run_info.get("recipe_digest") != recipe.digest
    if is_stale and not run.origin_file.is_file():
        raise WrongInput(
            f"{recipe.name} {recipe.version} is not what {run} was trained with; "
            f"`make train RECIPE={recipe.name}` trains it"
        )
    adapters.inspect(run.folder)
    base = recipes.resolve_mirror(client.find_hub_name(str(config["base_model"])))
    if model := architectures.read_architectures().get(base.lower()):
        adapters.check(run.folder, model)
    return run_info, config


def collect_scores(run: Run, sha: str, precision: str) -> Scores:
    """Reads the scores of the adapter with this SHA-256 at its own precision, by `name_scores`.

    Among several of a name, one with the training's prompt format and the most rows wins.
    """
    candidates = []
    for path in run.score_files:
        if scores := read_scores(path, "push"):
            evaluated = scores["evaluated"]
            is_chat = evaluated.get("prompt_format", "chat") == "chat"
            if (evaluated.get("adapter_sha256"), evaluated["precision"]) == (sha, precision):
                candidates.append(((is_chat, scores["examples"]), path, scores))
    pairs: Scores = {}
    for _, path, scores in sorted(candidates, key=lambda entry: entry[0], reverse=True):
        evaluated = scores["evaluated"]
        if (name := name_scores(evaluated)) in pairs:
            continue
        pairs[name] = {"adapter": scores}
        base_name = "_".join(filter(None, ("base", precision, evaluated.get("prompting"))))
        beside = Run(run.folder.with_name(base_name)).scores_folder / path.name
        for file in (beside, run.scores_folder / "base" / f"{name}.json"):
            base = read_scores(file, "push") if file.is_file() else None
            if base and all(base["evaluated"].get(key) == evaluated.get(key) for key in PAIRED):
                pairs[name]["base"] = base
                break
    return dict(sorted(pairs.items()))


def strip_texts(value: Any, is_answer: bool = False) -> Any:
    """Drops the texts from a score file's predictions, so that no prompt is published.

    Numbers stay, and so do answers (see ANSWERS) up to LONGEST_ANSWER characters.
    """
    if isinstance(value, dict):
        parts = {k: strip_texts(v, is_answer or k in ANSWERS) for k, v in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, list):
        return [part for v in value if (part := strip_texts(v, is_answer)) is not None]
    if isinstance(value, str):
        return value[:LONGEST_ANSWER] if is_answer else None
    return value


def strip_paths(value: Any) -> Any:
    """Makes this machine's paths relative to the project; outside of it only the name stays."""
    if isinstance(value, dict):
        return {key: strip_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_paths(part) for part in value]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value


def encode_json(content: Any, indent: int = 2) -> bytes:
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def read_tokenizer(folder: Path) -> tuple[Any, ...]:
    """Reads what makes a tokenizer: its model and its special tokens."""

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    settings = read("tokenizer_config.json")
    tokens = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
    return (
        read("tokenizer.json") | {"truncation": None, "padding": None},
        [token["content"] if isinstance(token, dict) else token for token in tokens],
    )


def list_tokenizer_files(run: Run, base_model: str) -> list[Path]:
    """Lists a run's tokenizer and chat template files where they differ from the base's."""
    base = models.base_folder(base_model) or ROOT / base_model
    names = () if read_tokenizer(run.folder) == read_tokenizer(base) else TOKENIZER
    if models.read_template(run.folder) != models.read_template(base):
        names = (*names, TEMPLATE)
    return [run.folder / name for name in names if (run.folder / name).is_file()]


def prepare(recipe: recipes.Recipe, repo: str, options: Options) -> Release:
    """Makes the files of a push; raises WrongInput if the run must not be published."""
    run = recipe.run
    run_info, config = check_run(recipe)
    scores = collect_scores(run, run_info["adapter_sha256"], models.precision(config))
    if not scores and not options.force:
        raise WrongInput(
            f"{recipe.name} has no scores; `make eval RECIPE={recipe.name}` makes them "
            "(FORCE=1 publishes without, and the card says so)"
        )
    base_model = str(config["base_model"])
    base = client.find_hub_name(base_model)
    settings = read_json(run.folder / adapters.CONFIG)
    # The revision that training and scoring recorded; the cache may hold another by now.
    revisions = [settings.get("revision"), run_info.get("base_revision")]
    revisions += [pair["adapter"]["evaluated"].get("base_revision") for pair in scores.values()]
    revision = next(filter(None, revisions), None) or client.find_base_revision(base, config)
    settings |= {"base_model_name_or_path": base, "revision": revision}
    paths = [run.adapter_file, run.config_file, *list_tokenizer_files(run, base_model)]
    files = {path.name: path.read_bytes() for path in paths}
    public_config, run_info = strip_paths(config), strip_paths(run_info)
    if public_config != config:
        written = public_config | {"base_model": base if base_model[0] == "/" else base_model}
        files[runs.CONFIG] = yaml.safe_dump(written, sort_keys=False).encode()
        run_info |= {"base_model": written["base_model"]}
    files |= {adapters.CONFIG: encode_json(settings), runs.INFO: encode_json(run_info)}
    for name, pair in scores.items():
        for side, content in pair.items():
            path = f"evals/{name}.json" if side == "adapter" else f"evals/base/{name}.json"
            predictions = strip_texts(content["predictions"])
            evaluated = strip_paths(content["evaluated"])
            public = content | {"evaluated": evaluated, "predictions": predictions}
            files[path] = encode_json(public, indent=1)
    publication = Publication(
        recipe, run_info, public_config, scores, base, revision, repo, options.price
    )
    files[client.CARD] = str(make_card(publication)).encode()
    refuse_secrets(files)
    return Release(repo, publication.tag, dict(sorted(files.items())))


def refuse_secrets(files: client.Contents) -> None:
    """Raises WrongInput if a file holds a key, or the value of a variable named like one."""
    from huggingface_hub import get_token

    values = [v for n, v in os.environ.items() if SECRET_NAMES.search(n) and not os.path.exists(v)]
    secrets = [value.encode() for value in [*values, get_token() or ""] if len(value) >= 8]
    pattern = re.compile(b"|".join([KEYS.pattern, *map(re.escape, secrets)]))
    for name, content in files.items():
        if match := pattern.search(content):
            line = content.count(b"\n", 0, match.start()) + 1
            raise WrongInput(f"{name}, line {line}: this looks like a secret; nothing was sent")


# ---- Sending


def check_rights(user: dict[str, Any], repo: str) -> None:
    """Raises WrongInput if the token's owner (`whoami`) may not publish in a repository."""
    namespace = repo.split("/")[0]
    groups = [org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read"]
    if namespace.lower() not in {name.lower() for name in (user["name"], *groups)}:
        others = f", or {', '.join(groups)}" if groups else ""
        raise WrongInput(
            f"NAMESPACE {namespace} is not yours: the token is of {user['name']}{others}"
        )
    token = user.get("auth", {}).get("accessToken", {})
    remedy = "; https://huggingface.co/settings/tokens makes one with write access"
    if token.get("role") == "read":
        raise WrongInput(f"the token can only read{remedy}")
    if token.get("role") == "fineGrained":
        scoped = token.get("fineGrained", {}).get("scoped", ())
        entities = [e["entity"] for e in scoped if "repo.write" in e.get("permissions", ())]
        if not {str(e.get("name")).lower() for e in entities} & {namespace.lower(), repo.lower()}:
            raise WrongInput(f"the token may not write to {namespace}{remedy}")


def publish(api: Any, release: Release, options: Options) -> str:
    """Sends a release in one commit and tags it, unless it is there; returns the commit.

    The tag comes last, and a new repository stays private until then. If another push comes first,
    the repository is read again.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    repo, tag = release.repo, release.tag
    for _ in range(ATTEMPTS):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=True, exist_ok=True)
            continue
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
        if commit := tags.get(tag):
            remote = client.list_remote_files(api, repo, commit)
            if names := client.list_differences(release.files, remote):
                raise WrongInput(
                    f"{repo} has {tag} with another {', '.join(names[:4])}; changed content needs "
                    "another version"
                )
            print(f"push       {repo} {tag} is there already, the same to the byte")
        elif not info.private and not options.public:
            raise WrongInput(f"{repo} is public already; PUBLIC=1 says that this should be, too")
        else:
            try:
                commit = send(api, release, info.sha, options.force)
                api.create_tag(repo, tag=tag, revision=commit)
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):  # another push came first
                    continue
                raise
        if options.public and info.private:
            api.update_repo_settings(repo, private=False)
            print(f"push       {repo} is public now")
        return str(commit)
    raise JobFailed(f"{repo}: other pushes keep changing it; try again later")


def send(api: Any, release: Release, head: str, force: bool) -> str:
    """Commits a release on top of `head`, unless that holds it; returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, files = release.repo, release.files
    remote = client.list_remote_files(api, repo, head)
    if not client.list_differences(files, remote):
        return head
    if not force:
        refuse_other_content(api, release, head, remote)
    extra = filter(client.is_published_name, remote.keys() - files.keys())
    operations = [
        *(CommitOperationAdd(name, content) for name, content in files.items()),
        *(CommitOperationDelete(name) for name in sorted(extra)),
    ]
    message = f"{repo.rsplit('/', 1)[-1]} {release.tag}"
    commit = api.create_commit(repo, operations, commit_message=message, parent_commit=head).oid
    if names := client.list_differences(files, client.list_remote_files(api, repo, commit)):
        raise JobFailed(f"{repo}: {names[0]} did not arrive as it was sent; push again")
    return str(commit)


def refuse_other_content(
    api: Any, release: Release, head: str, remote: dict[str, client.RemoteFile]
) -> None:
    """Raises WrongInput if a repository's untagged head must not be overwritten."""
    repo = release.repo
    if not remote.keys() - {".gitattributes"}:
        return
    if runs.INFO not in remote or remote[runs.INFO].size > client.MIB:
        raise WrongInput(f"{repo} holds something else; FORCE=1 adds this run to it all the same")
    content = Path(api.hf_hub_download(repo, runs.INFO, revision=head)).read_bytes()
    version = parse_json(content, f"{repo}/{runs.INFO}").get("recipe_version")
    if f"v{version}" == release.tag:
        raise WrongInput(
            f"{repo} holds another {release.tag} without its tag: a push was interrupted or is "
            "still running; FORCE=1 replaces it"
        )


def push_run(name: str, namespace: str | None, options: Options) -> None:
    """Publishes the finished run of a recipe in a namespace of the Hub."""
    recipe = recipes.find(name)
    namespace = (namespace or "").strip()
    if not namespace:
        raise WrongInput("NAMESPACE=… is needed: your user name or organisation on the Hub")
    release = prepare(recipe, client.name_repository(recipe, namespace), options)
    reason = explain_forbidden(recipe.run.info.get("data") or [])
    if options.public and reason:
        raise WrongInput(
            f"{recipe.name} must not be public: {reason}. Without PUBLIC=1 it is private"
        )
    visibility = "public" if options.public else "private"
    print(f"push       {recipe.name} to {release.repo}, {release.tag}, {visibility}")
    for file, content in release.files.items():
        print(f"push         {file:<36} {len(content):>12,} bytes")
    if options.dry_run:
        print("push       nothing is sent (DRY_RUN=1); the card:\n")
        print(release.files[client.CARD].decode())
        return
    api = client.connect()
    with explain_errors(release.repo):
        check_rights(api.whoami(), release.repo)
        commit = publish(api, release, options)
    print(f"push       {api.endpoint}/{release.repo} at {release.tag}, commit {commit[:12]}")
