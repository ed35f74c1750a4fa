"""Scores a recipe's base and its adapter with lm-eval, on the base that the adapter was trained on.

    python -m tools eval smollm2-135m/sentiment_r4 [--tasks fpb,fiqa] [--limit 200] [--force]
    python -m tools eval                                  every finished run, and its base
    python -m tools eval sentiment_r4 --base               the base alone; nothing has to be trained
    python -m tools eval sentiment_r4 --shots 3            the base, with 3 worked examples a prompt
    python -m tools eval --adapter path/to/adapter         any PEFT adapter
    … --precision int8 --prompt-format finlora --backend vllm
    … --constrain                                          answers can only be labels
    python -m tools eval --backend openai --base-url https://host/v1 --model-name gpt-4o

Scores are written to `<run>/evals/<dataset>.json`, those of the base to `base_<precision>/evals/`
beside the run. A score is computed once for a model, data, prompt and task; an interrupted one
continues from its last finished batch. Metrics, parse rule and answer budget come from the task
file: this module knows no dataset.
"""

import errno
import hashlib
import importlib.metadata
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from evals import report, stats
from evals.answers import Answers, Prompts
from evals.backends import BACKENDS, OpenModel
from evals.choices import allow_labels, widen_budget
from evals.examples import choose_examples, read_question
from tools import adapters, smollm2, sources, vllm
from tools import models as weights
from tools.common import ROOT, JobFailed, WrongInput, check_name, digest, quiet, shown, write_json
from tools.prompts import TOKENIZER, with_template
from tools.runs import Run
from tools.subjects import Subject

if TYPE_CHECKING:
    from evals.endpoint import Endpoint

TASKS = ROOT / "evals" / "tasks"
# What answers depend on beside the model; torch's builds for CPU and CUDA count as one.
LIBRARIES = ["torch", "transformers", "peft", "bitsandbytes", "lm_eval"]
# Raised with every change of the code that makes, reads or scores answers (a test pins its digest):
# older scores are then computed again, and compared with no new ones.
SCORING = 2
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
KEPT = "; what was answered is kept, and the same command continues from there"

# ---- tasks


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file merged with what it includes."""
    content = yaml.load(path.read_text().replace("!function", ""), yaml.CSafeLoader)
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    # As in lm-eval: the first of several includes counts most, the file itself above all.
    for name in reversed([included] if isinstance(included, str) else included):
        merged |= read_task_file((path.parent / name).resolve())
    return merged | content


@cache
def read_tasks() -> dict[str, dict[str, Any]]:
    """The content of each task file by its dataset, which is the file's name."""
    paths = (path for path in sorted(TASKS.rglob("*.yaml")) if not path.name.startswith("_"))
    contents = {path.stem: read_task_file(path) for path in paths}
    return {name: content for name, content in contents.items() if "dataset_kwargs" in content}


def find_rows(dataset: str) -> Path:
    """The chat rows that a dataset is scored on."""
    return sources.CHAT / Path(read_tasks()[dataset]["dataset_kwargs"]["data_files"]["test"]).name


def read_labels(dataset: str) -> list[str]:
    """The labels that a dataset's answers can be; empty where answers are no labels."""
    if not read_tasks()[dataset]["process_results"].endswith(".label"):
        return []
    labels = sources.tables()["datasets"].get(dataset, {}).get("labels")
    if not labels and find_rows(dataset).is_file():
        labels = sources.manifest(find_rows(dataset)).get("labels")
    return list(labels or ())


def find_task_labels(task: str | None) -> list[str]:
    """The labels that CONSTRAIN=1 allows an adapter of a task: those of its first dataset.

    Raises WrongInput where there are none, and where the task is several tasks.
    """
    row = sources.tables()["tasks"].get(task or "", {})
    names = [name for name in row.get("eval", ()) if name in read_tasks()]
    labels = read_labels(names[0]) if names and "parts" not in row else []
    if not labels:
        reason = f"{task} is no task with labels" if task else "the adapter names no task"
        raise WrongInput(f"CONSTRAIN=1 limits answers to labels, and {reason}")
    return labels


def require_labels(datasets: Sequence[str]) -> None:
    """Raises WrongInput where answers to a dataset are no labels."""
    labelled = [name for name in datasets if read_labels(name)]
    if others := [name for name in datasets if name not in labelled]:
        hint = f"; TASKS={','.join(labelled)} has some" if labelled else ""
        names = ", ".join(others)
        raise WrongInput(f"CONSTRAIN=1 limits answers to labels, and {names} has none{hint}")


def choose_datasets(task: str | None, names: list[str]) -> list[str]:
    """The datasets named, else those present that a recipe's task is scored on."""
    for name in names:
        check_name("dataset", name, read_tasks())
        sources.manifest(find_rows(name))
    if names:
        return names
    tables = sources.tables()
    of_task = tables["tasks"].get(task, {}).get("eval", []) if task else list(tables["datasets"])
    order = {sources.test_path(name): place for place, name in enumerate(of_task)}
    files = {name: find_rows(name) for name in read_tasks()}
    present = [name for name, file in files.items() if file in order and file.is_file()]
    if not present:
        raise WrongInput(f"no test data of {task or 'any task'} is there; `make data` makes it")
    return sorted(present, key=lambda name: (order[files[name]], name))


def find_cluster_pattern(dataset: str) -> str:
    """What finds, as its first group, the text that the rows of one cluster ask about; or "".

    Raises WrongInput for what is no such pattern.
    """
    pattern = str(sources.tables()["datasets"].get(dataset, {}).get("cluster", ""))
    try:
        reason = "" if not pattern or re.compile(pattern).groups else "it has no group in brackets"
    except re.error as error:
        reason = str(error)
    if reason:
        raise WrongInput(f"{dataset}: cluster: {pattern!r} finds no text in prompts: {reason}")
    return pattern


def find_clusters(dataset: str, prompts: Sequence[str]) -> stats.Clusters:
    """The cluster of each prompt, as the place of its first one; None where rows have none."""
    pattern = re.compile(find_cluster_pattern(dataset), re.DOTALL)
    if not pattern.pattern:
        return None
    found = (pattern.search(prompt) for prompt in prompts)
    texts = [match[1] if match else prompt for match, prompt in zip(found, prompts, strict=True)]
    first = {text: place for place, text in reversed([*enumerate(texts)])}
    return [first[text] for text in texts]


def pick_rows(dataset: str, limit: int | None) -> list[int]:
    """The numbers of the rows to score on, from 0."""
    with open(find_rows(dataset), "rb") as file:
        total = sum(1 for _ in file)
    # Files may be sorted by label, so a limit takes rows from everywhere, the same ones every time.
    return sorted(random.Random(0).sample(range(total), min(limit or total, total)))


# ---- what a score depends on

digest_once = cache(digest)  # of gigabytes, for every dataset


def identify(
    subject: "Subject | Endpoint",
    side: str,
    dataset: str,
    limit: int | None,
    backend: str = "transformers",
) -> dict[str, Any]:
    """What a score depends on; the score stands while this is the same."""
    task = read_tasks()[dataset]
    manifest = sources.manifest(find_rows(dataset))
    model = _identify_subject(subject, side) if isinstance(subject, Subject) else subject.identity()
    return {
        "dataset": dataset,
        "task_version": task["metadata"]["version"],
        **model,
        **_identify_backend(backend),
        "data_sha256": manifest["sha256"],
        "data_from": manifest.get("from"),
        "data_selected": manifest.get("selected"),
        "task": hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:12],
        "scoring": SCORING,
        "limit": limit,
        **({"cluster": pattern} if (pattern := find_cluster_pattern(dataset)) else {}),
        **_identify_examples(dataset, subject.shots),
        **({"constrained_to": read_labels(dataset)} if subject.constrained else {}),
    }


def _identify_backend(backend: str) -> dict[str, Any]:
    """The backend, and the versions of what runs in an environment of its own.

    Scores written before backends existed have no `backend` key.
    """
    if backend == "transformers":
        return {}
    command = vllm.find_vllm() if backend == "vllm" else None
    return {"backend": backend} | ({"engine": vllm.read_versions(command)} if command else {})


def _identify_examples(dataset: str, shots: int) -> dict[str, Any]:
    """The worked examples in each prompt; {} where there are none."""
    if not shots:
        return {}
    text = json.dumps(choose_examples(find_rows(dataset), shots), sort_keys=True)
    return {"shots": shots, "examples_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _identify_subject(subject: Subject, side: str) -> dict[str, Any]:
    config, base = subject.config, ROOT / subject.config["base_model"]
    folder = weights.base_folder(config["base_model"])
    quantization = ("load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "dtype")
    tokenizer = {k: v for k, v in with_template(config).items() if k in TOKENIZER}
    adapter = subject.adapter if side == "adapter" else None
    files = adapters.identify(adapter) if adapter else {}
    return {
        "base_model": config["base_model"],
        # The commit in the Hub's cache; a folder has none.
        "base_revision": folder.name if folder and not base.is_dir() else None,
        "base_files": {file.name: digest_once(file) for file in sorted(base.glob("*.safetensors"))},
        "quantization": {key: config[key] for key in quantization if key in config},
        "precision": weights.precision(config),
        "libraries": {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES},
        "adapter_sha256": files.get(adapters.WEIGHTS),
        **({"adapter_files": files} if files else {}),
        **({"prompting": subject.prompting} if subject.prompting else {}),
        "prompt_format": subject.prompt_format,
        "chat_template_kwargs": subject.options,
        "device_class": _find_device_class(),
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def _find_device_class() -> str:
    """Whose kernels compute: `cpu`, or `cuda` and the GPU's capability."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda {}.{}".format(*torch.cuda.get_device_capability())


def explain_old(content: dict[str, Any]) -> str:
    """Why a score is old; empty where today's task and code made it."""
    evaluated = content["evaluated"]
    task, version = read_tasks().get(evaluated["dataset"]), evaluated.get("task_version")
    if task is None:
        return "old: its task is not there any more"
    if version != (now := task["metadata"]["version"]):
        return f"old: task version {version}, now {now}"
    if evaluated.get("cluster", "") != find_cluster_pattern(evaluated["dataset"]):
        return "old: its rows were counted one by one"
    return "" if evaluated.get("scoring") == SCORING else "old: scored by an earlier version"


def collect_label_checks(subject: "Subject | Endpoint", side: str, dataset: str) -> dict[str, str]:
    """What was decided on swapped labels: of the test rows, and of those that the adapter saw."""
    check = sources.manifest(find_rows(dataset)).get("label_check") or {}
    checks = {"test": check.get("text")}
    if side == "adapter" and isinstance(subject, Subject) and subject.adapter:
        data = Run(subject.adapter).info.get("data")
        entries = data if isinstance(data, list) else []  # a pulled run.json may hold anything
        texts = (entry.get("label_check") for entry in entries if isinstance(entry, dict))
        checks["training"] = next(filter(None, texts), None)
    return {part: str(text) for part, text in checks.items() if text}


# ---- scoring


def load_task(dataset: str, rows: Path | None = None) -> Any:
    """The lm-eval task of a dataset, on its test rows or on other chat rows that it can score."""
    from lm_eval.tasks import TaskManager, get_task_dict

    name = read_tasks()[dataset]["task"]
    entry = {"task": name, "dataset_kwargs": {"data_files": {"test": str(rows)}}} if rows else name
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    task = get_task_dict([entry], manager)[name]
    task.set_config(key="num_fewshot", value=0)
    return task


def measure(
    lm: Any, dataset: str, limit: int | None, prompts: Prompts, answers: Answers | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A model's answers to a dataset's test rows; see `measure_task`. lm: any model of lm-eval."""
    if read_tasks()[dataset]["process_results"].endswith(".label"):
        lm.labels = list(sources.manifest(find_rows(dataset)).get("labels") or [])
    if answers:
        answers.attach(lm, lambda text: print(f"eval       {dataset}: {text}", flush=True))
    task = load_task(dataset)
    return measure_task(lm, task, pick_rows(dataset, limit), prompts, answers)


def measure_task(
    lm: Any, task: Any, numbers: list[int], prompts: Prompts, answers: Answers | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A model's answers to the rows with these numbers, in their order, and their scores.

    task: from `load_task`. Also returns the metrics that were left out, with the reason.
    """
    from lm_eval import evaluate

    from evals.tasks import utils

    name = task.config.task
    dataset, content = next(item for item in read_tasks().items() if item[1]["task"] == name)
    set_examples(task, prompts.examples)
    prompts.rows = {task.doc_to_text(doc): doc for doc in task.test_docs()}
    if choices := getattr(lm, "choices", ()):
        settings = widen_budget(task.config.generation_kwargs, choices)
        task.set_config(key="generation_kwargs", value=settings)
    prompts.attach(lm, task.config.generation_kwargs["max_gen_toks"])
    unscored = guard_scoring(task)
    samples = {name: numbers}
    rendering = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    result = evaluate(lm, {name: task}, **rendering, bootstrap_iters=0, samples=samples)

    # The first filter is ours; metrics of another (FinLoRA's) carry its name.
    first = content["filter_list"][0]["name"]
    metrics = [entry["metric"] for entry in content["metric_list"]]
    rows: dict[int, dict[str, Any]] = {}
    targets, asked = {}, dict[int, str]()
    for sample in sorted(result["samples"][name], key=lambda sample: sample["doc_id"]):
        number = sample["doc_id"]
        row = rows.setdefault(number, {"row": number, "values": {}})
        prefix = "" if sample["filter"] == first else f"{sample['filter']}_"
        row["values"] |= {prefix + metric: sample[metric] for metric in metrics if metric in sample}
        if not prefix:
            row |= _describe_answer(sample, row["values"], prompts, answers)
            targets[number] = utils.key(sample["doc"])
            asked[number] = task.doc_to_text(sample["doc"])
            if reason := unscored.get(freeze_doc(sample["doc"])):
                row["unscored"] = reason
    if all(targets[number] in row.get("probabilities", ()) for number, row in rows.items()):
        for number, row in rows.items():
            likeliest, share = max(row["probabilities"].items(), key=lambda item: item[1])
            row["values"]["ece"] = [(share, float(likeliest == targets[number]))]
    clusters = find_clusters(dataset, list(asked.values()))
    for row, cluster in zip(rows.values(), clusters or (), strict=False):
        row["cluster"] = cluster
    return list(rows.values()), _score_together(list(rows.values()), metrics)


def set_examples(task: Any, examples: list[dict[str, Any]]) -> None:
    """Gives an lm-eval task its worked examples, in the order in which they stand in a prompt."""
    from lm_eval.api.samplers import get_sampler

    from evals.tasks import utils

    task.set_config(key="num_fewshot", value=len(examples))
    task.sampler = get_sampler("first_n")(examples)
    # lm-eval parses a target that looks like a list, and a row of ours may have a system turn.
    task.fewshot_cfg.doc_to_text, task.fewshot_cfg.doc_to_target = read_question, utils.key


def _describe_answer(
    sample: dict[str, Any], values: dict[str, Any], prompts: Prompts, answers: Answers | None
) -> dict[str, Any]:
    """What a score file holds of a row beside its number and values."""
    from evals.tasks import utils

    prompt, answer = sample["arguments"][0][0], sample["resps"][0][0]
    target = utils.key(sample["doc"])  # lm-eval parses a target that looks like a list
    pairs = values.get("f1_weighted") or [(target, answer.strip())]
    expected, answered = (", ".join(side) for side in zip(*pairs, strict=True))
    row = {"expected": expected, "answered": answered, "answer": answer}
    row |= {"cut": prompts.cut[prompt]} if prompt in prompts.cut else {}
    dropped = prompts.dropped.get(prompt)
    row |= {"dropped_examples": dropped} if dropped else {}
    stored = answers.recall(prompt) if answers else {}
    row |= {"refused": stored["refused"]} if "refused" in stored else {}
    if target in stored.get("probabilities", ()):
        row["probabilities"] = stored["probabilities"]
    return row


def _score_together(rows: list[dict[str, Any]], metrics: Sequence[str]) -> dict[str, str]:
    """Computes the metrics of CORPUS; returns those that are left out, with the reason."""
    from evals.tasks import utils

    left_out = {}
    for metric, function in utils.CORPUS.items():
        if metric in metrics:
            try:
                having = [row for row in rows if metric in row["values"]]
                scores = function([row["values"].pop(metric) for row in having])
                for row, value in zip(having, scores, strict=True):
                    row["values"] = {metric: value} | row["values"]
            except utils.Unavailable as error:
                left_out[metric] = str(error)
    return left_out


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
    scores = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row["values"]):
        (values,), clusters = report.select_shared(metric, [{"predictions": rows}])
        scores[metric] = stats.estimate(metric, values, clusters)
    return scores


@dataclass(frozen=True)
class Request:
    """What to score: `datasets` (those present where empty), `limit` rows of each."""

    datasets: list[str] = field(default_factory=list)
    limit: int | None = None
    force: bool = False
    backend: str = "transformers"


class Job:
    """Scores a subject; its model is loaded when the first answer is needed."""

    def __init__(self, subject: "Subject | Endpoint", request: Request):
        self.subject, self.request = subject, request
        # Datasets that share prompts (other labels, other classes) share the answers.
        self.answers: dict[str, dict[str, Any]] = {}

    @cached_property
    def open_model(self) -> OpenModel:
        return BACKENDS[self.request.backend](self.subject)

    def score(self, side: str, name: str, identity: dict[str, Any], file: Path) -> None:
        """Writes a score file."""
        subject, limit = self.subject, self.request.limit
        choices = identity.get("constrained_to", [])
        asking = json.dumps([side, read_tasks()[name]["generation_kwargs"], choices])
        partial = file.with_name(f".{file.stem}.partial.jsonl")
        if self.request.force:
            partial.unlink(missing_ok=True)
        answers = Answers(partial, identity, self.answers.setdefault(asking, {}))
        examples = choose_examples(find_rows(name), subject.shots) if subject.shots else []
        prompts = Prompts(subject.prompt_format, subject.options, examples)
        label = report.append_conditions(side, identity)
        with self.open_model(side, f"{name}, {label}:", len(pick_rows(name, limit))) as lm:
            if choices:
                allow_labels(lm, choices)
            rows, left_out = measure(lm, name, limit, prompts, answers)
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
            "device": str(getattr(lm, "device", self.request.backend)),
            "examples": len(rows),
            "metrics": score(rows),
            "left_out": left_out,
            "cut_prompts": sum("cut" in row for row in rows),
            "rows_with_fewer_examples": sum("dropped_examples" in row for row in rows),
            "refused_rows": len(refused),
            "unscored_rows": len(unscored),
            "label_checks": collect_label_checks(subject, side, name),
            "predictions": rows,
        }
        if isinstance(subject, Subject):
            write_json(file, content)
        else:
            write_json(file, content | {"usage": subject.summarize_usage(answers.list_usage())})
        partial.unlink()


def score_subject(subject: "Subject | Endpoint", request: Request) -> report.Files:
    """Scores what has no score yet; returns the score files: dataset → side → file."""
    names = choose_datasets(subject.task, request.datasets)
    if subject.constrained:
        require_labels(names)
    job = Job(subject, request)
    if isinstance(subject, Subject):
        smollm2.ensure(subject.config["base_model"])
        if weights.base_folder(subject.config["base_model"]) is None:
            quiet()
            # A score depends on the base's commit, which is known once the base is downloaded.
            _ = job.open_model
        subject = subject.with_own_prompts()
    files = {
        name: {side: subject.file(side, name, request.limit) for side in subject.sides}
        for name in names
    }
    todo = []
    for side in subject.sides:
        for name in names:
            file = files[name][side]
            identity = identify(subject, side, name, request.limit, request.backend)
            if request.force or _read_identity(file, warn=True) != identity:
                todo.append((side, name, identity, file))
    if todo:
        print(f"eval       {subject.name} on {', '.join(names)}", flush=True)
        quiet()
    for *_, file in todo:  # before hours of work, not after
        with naming_refusal(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
    for side, name, identity, file in todo:
        # Two jobs may share a base: the second waits, and then finds the score.
        with naming_refusal(file), locked(file):
            if request.force or _read_identity(file) != identity:
                job.score(side, name, identity, file)
    return files


def _read_identity(file: Path, warn: bool = False) -> Any:
    """What a score file depends on; None where there is no file, or a damaged one."""
    if not file.is_file():
        return None
    try:
        return report.read(file)["evaluated"]
    except WrongInput as error:
        if warn:
            print(f"eval       {shown(file)} is scored again: {error}", file=sys.stderr)
        return None


@contextmanager
def naming_refusal(file: Path, kept: str = KEPT) -> Iterator[None]:
    """Raises JobFailed where a full disk, or a folder without write permission, stops writing."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # libraries wrap the system's error
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        name = str(getattr(cause, "filename", None) or "")
        is_inside = Path(name).is_relative_to(file.parent)
        if not isinstance(cause, OSError) or (cause.errno not in FULL_DISK and not is_inside):
            raise
        place = Path(name) if name and not is_inside else file
        reason = str(cause.strerror).lower()
        raise JobFailed(f"{shown(place)} cannot be written: {reason}{kept}") from error


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock of a score file; waits while another job has it."""
    lock = FileLock(file.with_name(f".{file.stem}.lock"), mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"eval       waits for another job that scores {shown(file)}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def score_all(request: Request, subjects: "Sequence[Subject | Endpoint]") -> None:
    """Scores subjects and prints the tables; one of several that cannot be scored is left out."""
    scored = {}
    for subject in subjects:
        try:
            files = score_subject(subject, request)
        except WrongInput as error:
            if len(subjects) == 1:
                raise
            print(f"eval       {subject.name} left out: {error}", file=sys.stderr)
            continue
        report.show(subject.name, files)
        scored[subject.name] = files
    report.show_comparisons(scored)
    if not scored:
        raise JobFailed("nothing was scored")
