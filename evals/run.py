"""Scores a recipe's base and its adapter with lm-eval, on the base that the adapter was trained on.

    python -m tools eval smollm2-135m/sentiment_r4 [--tasks fpb,fiqa] [--limit 200] [--force]
    python -m tools eval                                  every finished run, and its base
    python -m tools eval sentiment_r4 --base               the base alone; nothing has to be trained
    python -m tools eval --adapter path/to/adapter         any PEFT adapter
    … --precision int8 --prompt-format finlora --backend vllm
    python -m tools eval --backend openai --base-url https://host/v1 --model-name gpt-4o

Scores lie in `<run>/evals/<dataset>.json`, those of the base in `base_<precision>/evals/` beside
the run: metric values with 95 % intervals, every answer with what each metric made of it, and what
was evaluated. A score whose model, data, prompt and task are still the same is not computed again,
and one that was cut off goes on from its last finished batch. Metrics, the parse rule and the
answer budget are those of the task file; nothing here knows a dataset.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from evals import backends, report, stats
from evals.answers import Answers, Prompts
from evals.backends import BACKENDS, Endpoint
from tools import models as weights
from tools import smollm2, sources
from tools.common import (
    ROOT,
    JobFailed,
    WrongInput,
    digest,
    nearest,
    quiet,
    shown,
    write_json,
)
from tools.prompts import TOKENIZER, with_template
from tools.subjects import Subject

TASKS = ROOT / "evals" / "tasks"
# What answers depend on beside the model; torch's builds for CPU and CUDA count as one.
LIBRARIES = ["torch", "transformers", "peft", "bitsandbytes", "lm_eval"]
# Goes up with every change of the code that makes, reads or scores answers (a test holds the two
# together), so that scores of before are made anew and compared with none of now.
SCORING = 2

# ---- tasks


def read(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A task file merged with what it includes, and all files that it is made of."""
    content = yaml.load(path.read_text().replace("!function", ""), yaml.CSafeLoader)
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    files = [path]
    # As lm-eval has it: the first of several includes counts most, the file itself above all.
    for name in reversed([included] if isinstance(included, str) else included):
        other, others = read((path.parent / name).resolve())
        merged |= other
        files += others
    return merged | content, files


@cache
def tasks() -> dict[str, Path]:
    """Task files by the task's name, which is the file's: those with rows of data/chat/."""
    paths = (path for path in sorted(TASKS.rglob("*.yaml")) if not path.name.startswith("_"))
    return {path.stem: path for path in paths if "dataset_kwargs" in read(path)[0]}


def test_path(task: str) -> Path:
    """The chat rows that a task is scored on."""
    return sources.CHAT / Path(read(tasks()[task])[0]["dataset_kwargs"]["data_files"]["test"]).name


def datasets(task: str | None, asked: list[str]) -> list[str]:
    """The tasks to score on: those asked for, else those at hand that a recipe was trained for."""
    for name in asked:
        if name not in tasks():
            raise WrongInput(f'unknown dataset "{name}" in TASKS{nearest(name, list(tasks()))}')
        sources.manifest(test_path(name))
    if asked:
        return asked
    known = sources.tables()
    of_task = known["tasks"].get(task, {}).get("eval", []) if task else list(known["datasets"])
    order = {sources.test_path(name): place for place, name in enumerate(of_task)}
    there = [name for name in tasks() if test_path(name) in order and test_path(name).is_file()]
    if not there:
        raise WrongInput(f"no test data of {task or 'any task'} is there; `make data` makes it")
    return sorted(there, key=lambda name: (order[test_path(name)], name))


def picked(task: str, limit: int | None) -> list[int]:
    """The numbers of the rows to score on, from 0."""
    with open(test_path(task), "rb") as file:
        total = sum(1 for _ in file)
    # Files may be sorted by label, so a limit takes rows from all over: the same ones every time.
    return sorted(random.Random(0).sample(range(total), min(limit or total, total)))


# ---- what is scored


def revision(base: str) -> str | None:
    """The commit of a base in the Hub's cache; None for a folder, and before it is downloaded."""
    folder = weights.base_folder(base)
    return folder.name if folder and not (ROOT / base).is_dir() else None


@cache
def _digest(file: Path) -> str:
    return digest(file)  # of gigabytes, and asked for with every dataset


def evaluated(
    subject: Subject | Endpoint,
    side: str,
    dataset: str,
    limit: int | None,
    backend: str = "transformers",
) -> dict[str, Any]:
    """What a score depends on; where it is the same, the score stands."""
    content, _ = read(tasks()[dataset])
    task = json.dumps(content, sort_keys=True).encode()
    manifest = sources.manifest(test_path(dataset))
    told = subject.identity() if isinstance(subject, Endpoint) else _identity_of(subject, side)
    return {
        "dataset": dataset,
        "task_version": content["metadata"]["version"],
        **told,
        # A score of before there were others has none.
        **({"backend": backend} if backend != "transformers" else {}),
        "data_sha256": manifest["sha256"],
        "data_from": manifest.get("from"),
        "data_selected": manifest.get("selected"),
        "task": hashlib.sha256(task).hexdigest()[:12],
        "scoring": SCORING,
        "limit": limit,
    }


def device_class() -> str:
    """What kernels a device computes with: `cpu`, or `cuda` and the GPU's capability."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda {}.{}".format(*torch.cuda.get_device_capability())


def explain_old(content: dict[str, Any]) -> str:
    """Why a score is an old one; empty where it was made by the task and the code of now."""
    depends = content["evaluated"]
    dataset, version = depends["dataset"], depends.get("task_version")
    if dataset not in tasks():
        return "old: its task is not there any more"
    now = read(tasks()[dataset])[0]["metadata"]["version"]
    if version != now:
        return f"old: task version {version}, now {now}"
    if depends.get("scoring") != SCORING:
        return "old: scored by an earlier version"
    return ""


def _identity_of(subject: Subject, side: str) -> dict[str, Any]:
    config, base = subject.config, ROOT / subject.config["base_model"]
    keys = ("load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "dtype")
    tokenizer = {k: v for k, v in with_template(config).items() if k in TOKENIZER}
    adapter = subject.adapter if side == "adapter" else None
    return {
        "base_model": config["base_model"],
        "base_revision": revision(config["base_model"]),
        "base_files": {file.name: _digest(file) for file in sorted(base.glob("*.safetensors"))},
        "quantization": {key: config[key] for key in keys if key in config},
        "precision": weights.precision(config),
        "libraries": {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES},
        "adapter_sha256": digest(adapter / "adapter_model.safetensors") if adapter else None,
        "prompt_format": subject.prompt_format,
        "chat_template_kwargs": subject.options,
        "device_class": device_class(),
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def collect_label_checks(subject: Subject | Endpoint, side: str, dataset: str) -> dict[str, str]:
    """What was decided on swapped labels: of the test rows, and of those that the adapter saw."""
    check = sources.manifest(test_path(dataset)).get("label_check") or {}
    found = {"test": check.get("text")}
    if side == "adapter" and isinstance(subject, Subject) and subject.adapter:
        told = subject.adapter / "run.json"
        data = json.loads(told.read_text()).get("data") if told.is_file() else None
        entries = data if isinstance(data, list) else []  # a pulled run.json may hold anything
        checks = (entry.get("label_check") for entry in entries if isinstance(entry, dict))
        found["training"] = next(filter(None, checks), None)
    return {part: str(text) for part, text in found.items() if text}


# ---- scoring


def measure(
    lm: Any, dataset: str, limit: int | None, prompts: Prompts, answers: Answers | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A model's answers to a dataset's rows, in the rows' order, and what metrics made of them.

    lm: any model of lm-eval. Also returns the metrics that were left out, with the reason.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    from evals.tasks import utils

    content, _ = read(tasks()[dataset])
    name = content["task"]
    prompts.attach(lm, content["generation_kwargs"]["max_gen_toks"])
    if content["process_results"].endswith(".label"):
        lm.labels = list(sources.manifest(test_path(dataset)).get("labels") or [])
    if answers:
        answers.attach(lm, lambda text: print(f"eval       {dataset}: {text}", flush=True))
    task = get_task_dict([name], TaskManager(include_path=str(TASKS), include_defaults=False))
    task[name].set_config(key="num_fewshot", value=0)
    prompts.rows = {task[name].doc_to_text(doc): doc for doc in task[name].test_docs()}
    unscored = guard_scoring(task[name])
    result = evaluate(
        lm,
        task,
        apply_chat_template=True,
        bootstrap_iters=0,
        samples={name: picked(dataset, limit)},
    )
    # The first filter is ours; what others (FinLoRA's) make of an answer carries their name.
    filters = [one["name"] for one in content["filter_list"]]
    metrics = [one["metric"] for one in content["metric_list"]]
    rows: dict[int, dict[str, Any]] = {}
    for sample in sorted(result["samples"][name], key=lambda sample: sample["doc_id"]):
        first = sample["filter"] == filters[0]
        prefix = "" if first else f"{sample['filter']}_"
        values = {prefix + metric: sample[metric] for metric in metrics if metric in sample}
        row = rows.setdefault(sample["doc_id"], {"row": sample["doc_id"], "values": {}})
        row["values"] |= values
        if not first:
            continue
        text, answer = sample["arguments"][0][0], sample["resps"][0][0]
        expected = utils.key(sample["doc"])
        pairs = values.get("f1_weighted") or [(expected, answer.strip())]
        row["expected"], row["answered"] = (", ".join(side) for side in zip(*pairs, strict=True))
        row |= {"answer": answer} | ({"cut": prompts.cut[text]} if text in prompts.cut else {})
        kept = answers.recall(text) if answers else {}
        row |= {"refused": kept["refused"]} if "refused" in kept else {}
        if reason := unscored.get(freeze_doc(sample["doc"])):
            row["unscored"] = reason
        if (shares := kept.get("probabilities")) and expected in shares:
            likeliest = max(shares, key=lambda label: shares[label])
            right = float(likeliest == expected)
            row |= {"probabilities": shares, "calibration": [(shares[likeliest], right)]}
    ordered, left_out = [rows[number] for number in sorted(rows)], {}
    calibrations = [row.pop("calibration", None) for row in ordered]
    if all(calibrations):
        for row, one in zip(ordered, calibrations, strict=True):
            row["values"]["ece"] = one
    for metric, function in utils.CORPUS.items():
        if metric in metrics:
            try:
                scored = [row for row in ordered if metric in row["values"]]
                scores = function([row["values"].pop(metric) for row in scored])
                for row, value in zip(scored, scores, strict=True):
                    row["values"] = {metric: value} | row["values"]
            except utils.Unavailable as error:
                left_out[metric] = str(error)
    return ordered, left_out


def guard_scoring(task: Any) -> dict[str, str]:
    """Lets a task of lm-eval go on where a row cannot be scored.

    Returns what becomes the reasons of such rows, by `freeze_doc`: their answers took hours, and
    one rule that fails on one of them must not lose all.
    """
    reasons: dict[str, str] = {}
    score_row = task.process_results

    def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        try:
            return dict(score_row(doc, results))
        except Exception as error:
            reasons[freeze_doc(doc)] = f"{type(error).__name__}: {error}"[:200]
            return {}

    task.process_results = process_results
    return reasons


def freeze_doc(doc: dict[str, Any]) -> str:
    return json.dumps(doc, sort_keys=True, default=str)


def score(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every metric with its interval, of the rows that have a value of it."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for metric, value in row["values"].items():
            columns.setdefault(metric, []).append(value)
    return {metric: stats.estimate(metric, column) for metric, column in columns.items()}


@dataclass(frozen=True)
class Request:
    """What to score: `datasets` of evals/tasks/ (those at hand without), `limit` rows of each."""

    datasets: list[str] = field(default_factory=list)
    limit: int | None = None
    force: bool = False
    backend: str = "transformers"


def run(subject: Subject | Endpoint, request: Request) -> dict[str, dict[str, Path]]:
    """Scores what has no score yet; returns the score files: dataset → side → file."""
    limit, force, backend = request.limit, request.force, request.backend
    names = datasets(subject.task, request.datasets)
    job = Job(subject, limit, force, backend)
    if isinstance(subject, Subject):
        smollm2.ensure(subject.config["base_model"])
    files = {
        name: {side: subject.file(side, name, limit) for side in subject.sides} for name in names
    }
    if isinstance(subject, Subject) and weights.base_folder(subject.config["base_model"]) is None:
        quiet()
        # The commit of a base is known once it is downloaded, and a score depends on it.
        job.load()
    todo = []
    for side in subject.sides:
        for name in names:
            identity = evaluated(subject, side, name, limit, backend)
            if force or _kept(files[name][side], warn=True) != identity:
                todo.append((side, name, identity))
    if todo:
        print(f"eval       {subject.name} on {', '.join(names)}", flush=True)
        quiet()
    for side, name, _ in todo:  # before hours of work, not after
        folder = files[name][side].parent
        with writing(files[name][side]):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    for side, name, identity in todo:
        file = files[name][side]
        # Two jobs may share a base: the second one waits, and then finds the score.
        with writing(file), locked(file):
            if force or _kept(file) != identity:
                job.score(side, name, identity, file)
    return files


class Job:
    """Scores a subject; its model is loaded when the first answer is needed."""

    def __init__(self, subject: Subject | Endpoint, limit: int | None, force: bool, backend: str):
        self.subject, self.limit, self.force, self.backend = subject, limit, force, backend
        # Datasets that share prompts (other labels, other classes) share the answers.
        self.known: dict[str, dict[str, Any]] = {}

    @cache  # noqa: B019 (a job lives as long as the command)
    def load(self) -> backends.Models:
        return BACKENDS[self.backend](self.subject)

    def score(self, side: str, name: str, identity: dict[str, Any], file: Path) -> None:
        subject = self.subject
        budget = json.dumps(read(tasks()[name])[0]["generation_kwargs"])
        kept = file.with_name(f".{file.stem}.partial.jsonl")
        if self.force:
            kept.unlink(missing_ok=True)
        answers = Answers(kept, identity, self.known.setdefault(side + budget, {}))
        prompts = Prompts(subject.prompt_format, subject.options)
        with self.load()(side, f"{name}, {side}:", len(picked(name, self.limit))) as lm:
            rows, left_out = measure(lm, name, self.limit, prompts, answers)
        refused = [row["refused"] for row in rows if "refused" in row]
        if len(refused) == len(rows):
            raise JobFailed(f"{subject.name} refuses every row of {name}: {refused[0]}")
        unscored = [row["unscored"] for row in rows if "unscored" in row]
        if len(unscored) == len(rows):
            raise JobFailed(f"no answer to {name} can be scored ({unscored[0]}){KEPT}")
        if unscored:
            print(f"eval       {name}: {len(unscored)} rows cannot be scored: {unscored[0]}")
        content = {
            "evaluated": identity,
            "device": str(getattr(lm, "device", self.backend)),
            "examples": len(rows),
            "metrics": score(rows),
            "left_out": left_out,
            "cut_prompts": sum("cut" in row for row in rows),
            "refused_rows": len(refused),
            "unscored_rows": len(unscored),
            "label_checks": collect_label_checks(subject, side, name),
            "predictions": rows,
        }
        write_json(file, content)
        kept.unlink()


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


KEPT = "; what was answered is kept, and the same command goes on from there"


@contextmanager
def writing(file: Path, kept: str = KEPT) -> Iterator[None]:
    """Makes one line of what a full disk, or a folder that may not be written, raises."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # libraries wrap what the disk says
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        name = str(getattr(cause, "filename", None) or "")
        inside = Path(name).is_relative_to(file.parent)
        if not isinstance(cause, OSError) or (cause.errno not in FULL and not inside):
            raise
        place = Path(name) if name and not inside else file
        raise JobFailed(
            f"{shown(place)} cannot be written: {str(cause.strerror).lower()}{kept}"
        ) from error


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock of a score file, and waits while another job has it."""
    path = file.with_name(f".{file.stem}.lock")
    while True:
        lock = open(path, "w")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"eval       waits for another job that scores {shown(file)}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The job before removed the file that this one waited for; it may be there again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _kept(file: Path, warn: bool = False) -> Any:
    """What a score file was made of; None where there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        return report.read(file)["evaluated"]
    except WrongInput as error:
        if warn:
            print(f"eval       {shown(file)} is scored again: {error}", file=sys.stderr)
        return None


def score_all(request: Request, chosen: list[Subject] | list[Endpoint]) -> None:
    """Scores what is chosen and prints the tables; of several, one that fails is left out."""
    scored = {}
    for subject in chosen:
        try:
            files = run(subject, request)
        except WrongInput as error:
            if len(chosen) == 1:
                raise
            print(f"eval       {subject.name} left out: {error}", file=sys.stderr)
            continue
        report.show(subject.name, files)
        scored[subject.name] = files
    report.between(scored)
    if not scored:
        raise JobFailed("nothing was scored")
