"""The tables of data/sources.yaml, and the folders and files that data comes from and goes to.

    sources.tables()["datasets"]["fpb"]        a row of the tables: file, labels, licence, …
    sources.source_folder("sentiment")         where FinLoRA's files of a task are taken from
    sources.manifest(sources.train_path("sentiment"))["rows"]

FinLoRA's files lie in FINLORA_DATA/data, data/raw (from `make fetch`) or data/sample (examples);
converted files lie in data/chat, each with a manifest beside it.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from tools.common import ROOT, WrongInput, digest, read_json, read_yaml, shown

CHAT = ROOT / "data" / "chat"
RAW = ROOT / "data" / "raw"
SAMPLE = ROOT / "data" / "sample"
OWN = ROOT / "recipes" / "local"  # the user's own tasks, see tools/custom.py


def published_tables() -> dict[str, Any]:
    """The tables of data/sources.yaml; a multi-task set gets the datasets of its parts."""
    content = read_yaml(ROOT / "data" / "sources.yaml")
    tasks = content["tasks"]
    for spec in tasks.values():
        if parts := spec.get("parts"):
            spec["eval"] = [name for part in parts for name in tasks[part]["eval"]]
    return content


@cache
def tables() -> dict[str, Any]:
    """The published tables and the user's own rows of recipes/local/*.yaml."""
    content = published_tables()
    for path in sorted(OWN.glob("*.yaml")):
        for table, rows in read_yaml(path).get("sources", {}).items():
            for entry in rows.values():
                for key in {"file", "train", "val"} & entry.keys():
                    entry[key] = str(ROOT / entry[key])  # not below FinLoRA's data/
            content[table] |= rows
    return content


# Keys of the tables that explain and do not decide which rows there are.
PROSE = {"reason", "evidence", "wording", "incomparable", "seen", "concluded", "unknown", "cluster"}


def digest_rules(task: str) -> str:
    """SHA-256 of what decides the chat rows of a task: its rows of the tables, without prose, and
    the checksums of the published files.

    It is the same on every machine, whether the files are there or not.
    """
    content, spec = tables(), tables()["tasks"][task]
    tasks = {name: content["tasks"][name] for name in (*spec.get("parts", ()), task)}
    datasets = {name: content["datasets"][name] for name in spec["eval"]}
    names = [row["train"] for row in tasks.values()] + [row["file"] for row in datasets.values()]
    files = {name: content["files"].get(name, {}) for name in names}
    checksums = {name: row.get("blob") or row.get("sha256") for name, row in files.items()}
    shared = {key: content[key] for key in ("swap", "validation")}
    rules = remove_prose([tasks, datasets, shared])
    text = json.dumps([rules, checksums], sort_keys=True).replace(f"{ROOT}/", "")
    return hashlib.sha256(text.encode()).hexdigest()


def remove_prose(content: Any) -> Any:
    """A part of the tables without the keys of PROSE."""
    if isinstance(content, dict):
        return {key: remove_prose(value) for key, value in content.items() if key not in PROSE}
    return [remove_prose(value) for value in content] if isinstance(content, list) else content


def manifest_path(chat: Path) -> Path:
    return chat.with_name(chat.name + ".manifest.json")


def refused_path(chat: Path) -> Path:
    return chat.with_name(chat.name + ".refused.jsonl")


def manifest(chat: Path) -> dict[str, Any]:
    """The manifest of a converted file; of another file of rows, `source`, `sha256` and `rows`.

    Raises WrongInput if the file was changed since its conversion.
    """
    path = manifest_path(chat)
    if not chat.is_file():
        raise WrongInput(f"{shown(chat)} is not there; `make data` makes it")
    sha = digest(chat)
    if not path.is_file():
        with open(chat, "rb") as file:
            rows = sum(1 for line in file if not line.isspace())
        return {"source": shown(chat), "sha256": sha, "rows": rows}
    content = read_json(path)
    if content.setdefault("sha256", sha) != sha:
        raise WrongInput(f"{shown(chat)} was changed after its conversion; `make data` makes it")
    return content


def list_training_files(config: dict[str, Any]) -> list[Path]:
    """The files that an Axolotl config trains on; of a dataset of the Hub, a file that is not."""
    return [ROOT / entry["path"] for entry in config["datasets"]]


def train_path(task: str) -> Path:
    return CHAT / f"{task}_train.jsonl"


def val_path(task: str) -> Path:
    return CHAT / f"{task}_val.jsonl"


def drop_missing_validation(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(an Axolotl config, the reason) without the validation set of a task that has none.

    `make data` makes no validation rows from a small set. A validation file that was made and is
    gone stays in the config, and so does any other file. The reason is "" for an unchanged config.
    """
    train = (ROOT / config["datasets"][0]["path"]).resolve()
    entries = config.get("test_datasets") or []
    paths = [(ROOT / str(entry.get("path"))).resolve() for entry in entries]
    left = [
        entry
        for entry, path in zip(entries, paths, strict=True)
        if path.is_file() or not path.name.endswith("_val.jsonl")
    ]
    if len(left) == len(entries) or not train.is_file():
        return config, ""
    validation = manifest(train).get("validation") or {}
    if validation.get("rows"):
        return config, ""
    reason = validation.get("reason") or f"{shown(train)} was made without validation rows"
    if left:
        return config | {"test_datasets": left}, reason
    dropped = {"test_datasets", "eval_steps", "evals_per_epoch", "load_best_model_at_end"}
    dropped |= {"early_stopping_patience", "metric_for_best_model", "greater_is_better"}
    return {key: value for key, value in config.items() if key not in dropped}, reason


def test_path(dataset: str) -> Path:
    return CHAT / f"{dataset}_test.jsonl"


def word_text(task: str | None, text: str) -> str:
    """A text in the wording of a task's prompts; as it is where the catalogue has none."""
    wording = tables()["tasks"].get(task or "", {}).get("wording", "{prompt}")
    return str(wording.format(prompt=text))


def list_folders() -> dict[str, Path]:
    """The folders that may hold FinLoRA's files in `train/` and `test/`, the first one first."""
    own = {"data/raw": RAW, "data/sample": SAMPLE}
    checkout = os.environ.get("FINLORA_DATA")
    if not checkout:
        return own
    folder = Path(checkout).expanduser() / "data"
    if not folder.is_dir():
        raise WrongInput(f"FINLORA_DATA={checkout} has no folder data/ with FinLoRA's files")
    return {"FINLORA_DATA": folder.resolve(), **own}


def source_folder(task: str = "") -> Path:
    """The folder of a task's files: the first that has any, else data/sample.

    Without a task, the first folder that exists.
    """
    files = list_task_files(task) if task else ["."]
    for folder in list_folders().values():
        if any((folder / file).exists() for file in files):
            return folder
    return SAMPLE


def list_task_files(task: str) -> list[str]:
    """The training file and the test files that are converted with a task."""
    spec = tables()["tasks"][task]
    tests = () if "parts" in spec else spec["eval"]
    return [spec["train"], *(tables()["datasets"][name]["file"] for name in tests)]


def origin(source: Path) -> str:
    """The name of the folder that a file was taken from."""
    for name, folder in reversed(list_folders().items()):
        if source.resolve().is_relative_to(folder.resolve()):
            return name
    return "your own"
