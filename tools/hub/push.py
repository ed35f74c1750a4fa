"""Publishes a finished run on the Hugging Face Hub, with its scores and a model card.

    python -m tools.hub.push smollm2-135m/sentiment_r4 --namespace me --dry-run 1

A push is one commit, tagged `v<recipe version>`: the tag shows all of it or is not there. It is
private unless --public 1. The same content again is nothing to do; other content under the same
version is refused; what was cut off is repeated with the same command.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools import adapters, architectures, common, models, recipes
from tools.common import ROOT, SECRET, JobFailed, WrongInput, shown
from tools.hub import card
from tools.hub.client import (
    CARD,
    CONFIG,
    LIMITS,
    MIB,
    RUN,
    SCORES,
    Contents,
    base_revision,
    different,
    hub,
    hub_name,
    repository,
    tree,
)
from tools.hub_errors import plainly
from tools.runs import Run

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LATER = 5  # times that a push looks again after somebody else's
# What must not be published, besides what tools/common.py masks in messages.
KEYS = re.compile(
    rb"(?<![A-Za-z0-9])xox[abprs]-[\w-]{10,}|(?<![A-Za-z0-9])AIza[\w-]{35}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|" + SECRET.pattern.encode()
)
ANSWERS = {
    "expected",
    "answered",
    "answer",
    "values",
}  # of a prediction: texts that may be published
# What must be the same of two scores for their difference to be the adapter's: all that a score
# depends on, but for the adapter itself and the machine's copies of the task's files.
PAIRED = (
    *("dataset", "task_version", "data_sha256", "limit", "base_model", "base_revision"),
    *("base_files", "quantization", "precision", "prompt_format", "chat_template_kwargs"),
    *("backend", "task", "scoring", "device_class"),
)
LONGEST = 200  # characters of such a text


def finished(recipe: recipes.Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """(run.json, merged config) of a run that may be published; raises WrongInput."""
    run = recipe.run
    if not run.is_finished and run.checkpoints():
        name = recipe.name
        raise WrongInput(f"{run} is unfinished; `make train RECIPE={name}` goes on")
    config = recipe.read_trained_config()
    told = run.info
    stale = (
        told.get("recipe_version") == recipe.version and told.get("recipe_digest") != recipe.digest
    )
    if stale and not run.origin:
        raise WrongInput(
            f"{recipe.name} {recipe.version} is not what {run} was trained with; "
            f"`make train RECIPE={recipe.name}` trains it"
        )
    adapters.inspect(run.folder)
    base = recipes.resolve_mirror(hub_name(str(config["base_model"])))
    if model := architectures.read_architectures().get(base.lower()):
        adapters.check(run.folder, model)
    return told, config


def scores(
    recipe: recipes.Recipe, told: dict[str, Any], config: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """{dataset: {"adapter": score file, "base": score file}} of the adapter as it is now.

    At the precision that it was trained on; where there are several of a dataset, the one with the
    prompt that it was trained on and with most rows.
    """
    from evals import report

    precision = models.precision(config)
    beside = Run(recipe.run.folder.with_name(f"base_{precision}")).scores_folder
    found: dict[str, tuple[tuple[bool, int], dict[str, Any]]] = {}
    for path in recipe.run.score_files:
        try:
            content = report.read(path)
        except WrongInput as error:
            print(f"push       {shown(path)} left out: {error}", file=sys.stderr)
            continue
        about = content["evaluated"]
        here = (about.get("adapter_sha256"), about.get("precision"))
        if here != (told["adapter_sha256"], precision):
            continue  # of an adapter that was there before, or of another precision
        dataset = about["dataset"]
        rank = (about.get("prompt_format", "chat") == "chat", content["examples"])
        if dataset in found and found[dataset][0] >= rank:
            continue
        pair = {"adapter": content}
        for other in (beside / path.name, path.parent / "base" / f"{dataset}.json"):
            if not other.is_file():
                continue
            try:
                base = report.read(other)
            except WrongInput as error:
                print(f"push       {shown(other)} left out: {error}", file=sys.stderr)
                continue
            if all(base["evaluated"].get(k) == about.get(k) for k in PAIRED):
                pair["base"] = base
                break
        found[dataset] = rank, pair
    return {dataset: pair for dataset, (_, pair) in sorted(found.items())}


def public(value: Any, answers: bool = False) -> Any:
    """A score file's predictions without the texts of its data: no prompt is ever published.

    Numbers stay; texts only where they are answers or what a metric made of them, and not longer
    than LONGEST.
    """
    if isinstance(value, dict):
        each = {key: public(v, answers or key in ANSWERS) for key, v in value.items()}
        return {key: kept for key, kept in each.items() if kept is not None}
    if isinstance(value, list):
        return [kept for v in value if (kept := public(v, answers)) is not None]
    if isinstance(value, str):
        return value[:LONGEST] if answers else None
    return value


def published(content: dict[str, Any]) -> bytes:
    made = content | {"predictions": public(content.get("predictions") or [])}
    return json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def portable(value: Any) -> Any:
    """`value` with each path of this machine cut to what is inside the project, or to its name."""
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    if isinstance(value, str) and value.startswith("/") and not re.search(r"\s", value):
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value


def tokenizer(recipe: recipes.Recipe, config: dict[str, Any], base: str) -> list[Path]:
    """The tokenizer files and chat template that are not the base's; all where that is not here."""
    from huggingface_hub import try_to_load_from_cache

    folder = ROOT / config["base_model"]
    if not folder.is_dir():
        cached = try_to_load_from_cache(base, "tokenizer_config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder

    def content(place: Path, name: str) -> dict[str, Any]:
        return json.loads((place / name).read_bytes()) if (place / name).is_file() else {}

    def told(place: Path) -> tuple[Any, ...]:
        model = content(place, "tokenizer.json") | {"truncation": None, "padding": None}
        settings = content(place, "tokenizer_config.json")
        names = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
        return model, [n["content"] if isinstance(n, dict) else n for n in names]

    def template(place: Path) -> str | None:
        path = place / "chat_template.jinja"
        if path.is_file():
            return path.read_text()
        return content(place, "tokenizer_config.json").get("chat_template")

    own = recipe.run.folder
    names = list(TOKENIZER) if told(own) != told(folder) else []
    names += ["chat_template.jinja"] if template(own) != template(folder) else []
    return [own / name for name in names if (own / name).is_file()]


def contents(
    recipe: recipes.Recipe, repo: str, force: bool = False, price: float | None = None
) -> tuple[str, Contents]:
    """(tag, files) that a push sends; raises WrongInput where the run may not be published."""
    told, config = finished(recipe)
    found = scores(recipe, told, config)
    if not found and not force:
        raise WrongInput(
            f"{recipe.name} has no scores; `make eval RECIPE={recipe.name}` makes them "
            "(FORCE=1 publishes without, and the card says so)"
        )
    settings = common.read_json(recipe.run.folder / adapters.CONFIG)
    base = hub_name(str(config["base_model"]))
    # What training and scoring recorded counts more than what the cache holds by now.
    known = [settings.get("revision"), told.get("base_revision")]
    known += [pair["adapter"]["evaluated"].get("base_revision") for pair in found.values()]
    revision = next(filter(None, known), None) or base_revision(base, config)
    settings |= {"base_model_name_or_path": base, "revision": revision}
    files: Contents = {
        adapters.WEIGHTS: recipe.run.adapter_file,
        adapters.CONFIG: json.dumps(settings, indent=2).encode() + b"\n",
    }
    files |= {path.name: path for path in tokenizer(recipe, config, base)}
    # To the byte what Axolotl was given, unless it names places of this machine.
    files[CONFIG] = recipe.run.config_file.read_bytes()
    if (clean := portable(config)) != config:
        clean["base_model"] = (
            base if str(config["base_model"]).startswith("/") else config["base_model"]
        )
        files[CONFIG] = yaml.safe_dump(clean, sort_keys=False).encode()
        told = portable(told) | {"base_model": clean["base_model"]}
    files[RUN] = json.dumps(told, indent=2, ensure_ascii=False).encode() + b"\n"
    for dataset, pair in found.items():
        files[f"evals/{dataset}.json"] = published(pair["adapter"])
        if "base" in pair:
            files[f"evals/base/{dataset}.json"] = published(pair["base"])
    made = card.make(
        recipe, told, portable(config), found, base=base, revision=revision, repo=repo, price=price
    )
    files[CARD] = str(made).encode()
    secrets(files)
    return f"v{told['recipe_version']}", dict(sorted(files.items()))


def secrets(files: Contents) -> None:
    """Raises WrongInput where a file holds a key, or what a variable named like one holds."""
    from huggingface_hub import get_token

    names = re.compile("TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY")
    texts = [v for n, v in os.environ.items() if names.search(n) and not os.path.exists(v)]
    values = [value.encode() for value in [*texts, get_token() or ""] if len(value) >= 8]
    for name, content in files.items():
        text = content.read_bytes() if isinstance(content, Path) else content
        found = KEYS.search(text)
        places = (
            [found.start()] if found else [text.find(value) for value in values if value in text]
        )
        if places:
            line = text.count(b"\n", 0, places[0]) + 1
            raise WrongInput(f"{name}, line {line}: this looks like a secret; nothing was sent")


def may_write(me: dict[str, Any], namespace: str, repo: str) -> None:
    """Raises WrongInput where the token's owner (`whoami`) may not publish in `namespace`."""
    groups = [org["name"] for org in me.get("orgs", ()) if org.get("roleInOrg") != "read"]
    if namespace.lower() not in {name.lower() for name in (me["name"], *groups)}:
        others = f", or {', '.join(groups)}" if groups else ""
        raise WrongInput(
            f"NAMESPACE {namespace} is not yours: the token is of {me['name']}{others}"
        )
    token = me.get("auth", {}).get("accessToken", {})
    need = "; one with write access is made at https://huggingface.co/settings/tokens"
    if token.get("role") == "read":
        raise WrongInput(f"the token can only read{need}")
    if token.get("role") == "fineGrained":
        scoped = token.get("fineGrained", {}).get("scoped", ())
        entities = [e["entity"] for e in scoped if "repo.write" in e.get("permissions", ())]
        if not {str(e.get("name")).lower() for e in entities} & {namespace.lower(), repo.lower()}:
            raise WrongInput(f"the token may not write to {namespace}{need}")


def existing(api: Any, repo: str) -> Any:
    """What the Hub tells of a repository; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def publish(
    api: Any, repo: str, tag: str, files: Contents, public: bool = False, force: bool = False
) -> str:
    """Sends `files` in one commit and tags it, unless they are there; returns the commit.

    Nothing is visible under the tag before all of it is there, and a new repository is private
    until then. What another push does meanwhile is looked at again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    for _ in range(LATER):
        info = existing(api, repo)
        if info is None:
            api.create_repo(repo, private=True, exist_ok=True)
            continue
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
        if tag in tags:
            if other := different(files, tree(api, repo, tags[tag])):
                raise WrongInput(
                    f"{repo} has {tag} with another {', '.join(other[:4])}; what changed gets "
                    "another version"
                )
            print(f"push       {repo} {tag} is there already, the same to the byte")
            return settle(api, repo, tags[tag], public and info.private)
        if not info.private and not public:
            raise WrongInput(f"{repo} is public already; PUBLIC=1 says that this should be, too")
        there = tree(api, repo, info.sha)
        commit = info.sha
        if different(files, there):
            if not force:
                ours(api, repo, info.sha, tag, there)
            gone = [n for n in there if n not in files and (n in LIMITS or SCORES.fullmatch(n))]
            operations = [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in gone),
            ]
            try:
                commit = api.create_commit(
                    repo,
                    operations,
                    commit_message=f"{repo.rsplit('/', 1)[-1]} {tag}",
                    parent_commit=info.sha,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):  # another commit came first
                    continue
                raise
            if other := different(files, tree(api, repo, commit)):
                raise JobFailed(f"{repo}: {other[0]} did not arrive as it was sent; push again")
        try:
            api.create_tag(repo, tag=tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:  # another push tagged first
                continue
            raise
        return settle(api, repo, commit, public and info.private)
    raise JobFailed(f"{repo}: others push to it all the while; try again later")


def settle(api: Any, repo: str, commit: str, make_public: bool) -> str:
    """The last step of a push: shows the repository to everybody, where that was asked for."""
    if make_public:
        api.update_repo_settings(repo, private=False)
        print(f"push       {repo} is public now")
    return commit


def ours(api: Any, repo: str, commit: str, tag: str, there: dict[str, Any]) -> None:
    """Raises WrongInput where a repository's untagged head must not be written over."""
    if not there.keys() - {".gitattributes"}:
        return
    if RUN not in there or there[RUN][0] > MIB:
        raise WrongInput(f"{repo} holds something else; FORCE=1 adds this run to it all the same")
    path = Path(api.hf_hub_download(repo, RUN, revision=commit))
    version = common.parse_json(path.read_bytes(), f"{repo}/{RUN}").get("recipe_version")
    if f"v{version}" == tag:
        raise WrongInput(
            f"{repo} holds another {tag} without its tag: a push was cut off or is under way; "
            "FORCE=1 replaces it"
        )


@dataclass(frozen=True)
class Options:
    """How a run is published. `force`: without scores, or over a push that has no tag."""

    public: bool = False
    dry_run: bool = False  # show files and card, send nothing
    force: bool = False
    price: float | None = None  # USD for one GPU and hour, for the card


def push(name: str, namespace: str | None, options: Options) -> None:
    """Publishes the finished run of a recipe in a namespace of the Hub."""
    recipe = recipes.find(name)
    namespace = (namespace or "").strip()
    if not namespace:
        raise WrongInput("NAMESPACE=… is needed: your user name or organisation on the Hub")
    repo = repository(recipe, namespace)
    tag, files = contents(recipe, repo, options.force, options.price)
    data = recipe.run.info.get("data") or []
    if options.public and (why := card.forbidden(data)):
        raise WrongInput(f"{recipe.name} must not be public: {why}. Without PUBLIC=1 it is private")
    sizes = {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in files.items()}
    visible = "public" if options.public else "private"
    print(f"push       {recipe.name} to {repo}, {tag}, {visible}")
    for file, size in sizes.items():
        print(f"push         {file:<36} {size:>12,} bytes")
    if options.dry_run:
        print("push       nothing is sent (DRY_RUN=1); the card:\n")
        print(bytes(files[CARD]).decode())  # type: ignore[arg-type]
        return
    api = hub()
    with plainly(repo):
        may_write(api.whoami(), namespace, repo)
        commit = publish(api, repo, tag, files, options.public, options.force)
    print(f"push       {api.endpoint}/{repo} at {tag}, commit {commit[:12]}")
