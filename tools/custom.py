"""Tasks and recipes of your own, beside the catalogue's.

    python -m tools.custom new my_task my.jsonl     a task with recipes for all models and methods
    python -m tools.custom import configs.json      a FinLoRA config file becomes recipes

Both write into recipes/local/, which `make render` leaves alone. `new` also splits the rows into
data/local/ and writes an lm-eval task to evals/tasks/local/. Rows may be FinLoRA's (context and
target), prompt and completion, question and answer, instruction and output, or chat messages.
`new` writes nothing where anything is wrong; `import` leaves out the runs that are, and says why.
"""

import json
import random
import re
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import yaml

from tools import catalogue, common, recipes, sources
from tools.common import (
    ROOT,
    JobFailed,
    WrongInput,
    atomic,
    digest,
    nearest,
    read_yaml,
    shown,
)
from tools.data.rows import parse_row
from tools.data.rules import fingerprint
from tools.train import plan

# Keys of a row that hold prompt and answer; the first pair that a row has is taken.
PAIRS = [
    ("context", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
]
NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
LEAST, SHARE, MOST, SEED = 10, 0.2, 500, 42  # rows in all; of them for the test: a share, at most
# Answers that few rows share are text, not labels.
LABELS, LABEL_LENGTH, ROWS_A_LABEL = 20, 60, 5

DATA = ROOT / "data" / "local"
TASKS = ROOT / "evals" / "tasks" / "local"


def plain(content: Any) -> dict[str, Any]:
    """A row as FinLoRA has it, {"context", "target"}; raises ValueError where it has no pair."""
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, not {type(content).__name__}")
    if isinstance(turns := content.get("messages"), list):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        if roles != ["user", "assistant"]:
            raise ValueError(f"messages must be one user and one assistant turn, not {roles}")
        return {"context": turns[0].get("content"), "target": turns[1].get("content")}
    for prompt, answer in PAIRS:
        if prompt in content and answer in content:
            more = content.get("input") if prompt == "instruction" else None
            asked = f"{content[prompt]}\n\n{more}" if more else content[prompt]
            return {"context": asked, "target": content[answer]}
    known = "; ".join(" and ".join(pair) for pair in PAIRS)
    raise ValueError(f"no prompt and answer: {known}; or messages. It has {', '.join(content)}")


def rows_of(source: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each row of a JSONL file; WrongInput names the file and line."""
    found = []
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                row = orjson.dumps(plain(orjson.loads(line)))
                found.append(parse_row(row))
            except ValueError as error:
                raise WrongInput(f"{shown(source)}, line {number}: {error}") from None
    return found


def split(rows: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Row numbers to train and to test on; a prompt that occurs twice stays on one side."""
    marks = [fingerprint(prompt) for prompt, _ in rows]
    prompts = list(dict.fromkeys(marks))
    count = max(1, min(MOST, round(SHARE * len(prompts))))
    held = set(random.Random(SEED).sample(prompts, count))
    sides: tuple[list[int], list[int]] = ([], [])
    for number, mark in enumerate(marks):
        sides[mark in held].append(number)
    return sides


def labels_of(answers: list[str]) -> list[str]:
    """The labels of a classification, most frequent first; empty where the answers are text."""
    counts = Counter(answers)
    few = len(counts) <= LABELS and len(answers) >= ROWS_A_LABEL * len(counts)
    short = all(len(answer) <= LABEL_LENGTH and "\n" not in answer for answer in counts)
    return [label for label, _ in counts.most_common()] if few and short else []


def evaluation(task: str, labels: list[str], longest: int) -> dict[str, Any]:
    """The lm-eval task of a task of the user's own; `longest` answer in characters."""
    budget = max(10, longest // 2)  # of tokens: never fewer than an answer needs
    content: dict[str, Any] = {
        "include": "../_labels.yaml" if labels else "../_text.yaml",
        "task": f"finlora_{task}",
        "dataset_kwargs": {"data_files": {"test": f"data/chat/{task}_test.jsonl"}},
        "generation_kwargs": {"max_gen_toks": budget, "do_sample": False, "until": []},
    }
    if labels:
        # The longest first, so that a label that begins another does not hide it.
        among = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        pattern = f"(?i)(?<!\\w)({among})(?!\\w)"
        regex = {"function": "regex", "regex_pattern": pattern, "fallback": "[none]"}
        content["filter_list"] = [{"name": "label", "filter": [regex, {"function": "take_first"}]}]
    return content


def new(task: str, source: Path) -> None:
    """Makes a task of the user's rows: data, recipes for all models and methods, evaluation."""
    table, made = recipes.matrix(), recipes.LOCAL / f"{task}.yaml"
    if not NAME.fullmatch(task):
        raise WrongInput(
            f'TASK "{task}": small letters, digits and _ are needed, such as TASK=my_task'
        )
    if made.exists():
        raise WrongInput(f"{shown(made)} is there already; delete it to make the task anew")
    taken = {*sources.tables()["datasets"], *sources.tables()["tasks"], *recipes.places()}
    if {task, *(f"{task}_{method}" for method in table["methods"])} & taken:
        raise WrongInput(f'TASK "{task}" is a name of the catalogue; choose another')
    if not source.is_file():
        raise WrongInput(f"DATA={source} is not there; a JSONL file is needed")
    rows = rows_of(source)
    if len({fingerprint(prompt) for prompt, _ in rows}) < LEAST:
        raise WrongInput(f"{shown(source)}: {len(rows)} rows; at least {LEAST} prompts are needed")
    labels = labels_of([answer for _, answer in rows])
    sides = split(rows)
    characters = max(len(prompt) + len(answer) for prompt, answer in rows)
    longest = int(characters / plan.CHARACTERS_PER_TOKEN) + plan.TEMPLATE_TOKENS
    batch = (8, 2) if longest <= 512 else (1, 8)
    own = {
        "tasks": {
            task: {
                "title": task.replace("_", " "),
                "longest": min(longest, table["common"]["sequence_len"]),
                "settings": {
                    "num_epochs": 4,
                    "micro_batch_size": batch[0],
                    "gradient_accumulation_steps": batch[1],
                },
            }
        },
        "sources": {
            "datasets": {
                task: {"file": shown(DATA / f"{task}_test.jsonl")}
                | ({"labels": labels} if labels else {})
            },
            "tasks": {task: {"train": shown(DATA / f"{task}_train.jsonl"), "eval": [task]}},
        },
    }
    longest_answer = max(len(answer) for _, answer in rows)
    head = f"# Yours, from {source.name}; `make render` leaves it alone.\n"
    with ExitStack() as undo:  # the task is made whole or not at all

        def keep(path: Path, content: str) -> None:
            undo.callback(path.unlink, missing_ok=True)
            store(path, content)

        for name, numbers in zip(("train", "test"), sides, strict=True):
            lines = (dict(zip(("context", "target"), rows[n], strict=True)) for n in numbers)
            text = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
            keep(DATA / f"{task}_{name}.jsonl", text.decode())
        keep(TASKS / f"{task}.yaml", head + dumped(evaluation(task, labels, longest_answer)))
        keep(made, head + dumped(own))
        recipes.forget()
        names = [name for name in recipes.names() if recipes.parts(name)[1] == task]
        for name in names:
            keep(recipes.path_of(name), catalogue.rendered(name))
        undo.pop_all()
    kind = f"{len(labels)} labels ({', '.join(labels[:4])}…)" if labels else "free text"
    print(f"new        {len(sides[0])} rows train and {len(sides[1])} test; answers: {kind}")
    print(f"new        {shown(made)}, {shown(TASKS / f'{task}.yaml')}, {len(names)} recipes")
    print(f"next       make data TASKS={task}; make train RECIPE=smollm2-135m/{task}_r4")


def store(path: Path, content: str) -> None:
    with atomic(path) as file:
        file.write(content.encode())


def dumped(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)


# What a run of FinLoRA's config file may say, with the types of the values.
KEYS: dict[str, tuple[type, ...]] = {
    "base_model": (str,),
    "dataset_path": (str,),
    "lora_r": (int,),
    "quant_bits": (int,),
    "learning_rate": (int, float),
    "num_epochs": (int,),
    "batch_size": (int,),
    "gradient_accumulation_steps": (int,),
    "lora_alpha": (int,),
    "peft_use_dora": (bool,),
    "peft_use_rslora": (bool,),
}
OPTIONAL = {"lora_alpha", "peft_use_dora", "peft_use_rslora"}


def wrong(run: Any) -> list[str]:
    """What is wrong with one run of the file: `key: reason` each."""
    if not isinstance(run, dict):
        return ["an object is needed"]
    found = [f"{key}: unknown key{nearest(key, list(KEYS))}" for key in run if key not in KEYS]
    found += [f"{key}: missing" for key in KEYS if key not in run and key not in OPTIONAL]
    for key, kinds in KEYS.items():
        if key not in run:
            continue
        value: Any = run[key]
        if type(value) not in kinds:
            found.append(f"{key}: {json.dumps(value)} is not {kinds[-1].__name__}")
        elif not isinstance(value, bool) and (
            not value.strip() if isinstance(value, str) else value <= 0
        ):
            found.append(f"{key}: {json.dumps(value)} is empty or not above 0")
    if type(run.get("quant_bits")) is int and run["quant_bits"] not in (4, 8, 16):
        found.append(f"quant_bits: {run['quant_bits']} is none of 4, 8, 16")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once; json would keep the last of two runs of one name."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise WrongInput(f'"{twice[0]}" occurs twice in one object')
    return dict(pairs)


published = cache(sources.published_tables)  # FinLoRA's tasks and files, without the user's own
LFS = re.compile(rb"version https://git-lfs.*?oid sha256:(\w+)", re.S)


@cache
def identify(file: Path) -> str | None:
    """The task that a training file of FinLoRA's is for, by its content; None for other files."""
    with open(file, "rb") as content:
        pointer = LFS.match(content.read(300))
    sums = {pointer[1].decode()} if pointer else {digest(file), common.git_blob(file)}
    for task, row in published()["tasks"].items():
        facts = published()["files"][row["train"]]
        if {facts.get("sha256"), facts.get("blob")} & sums:
            return str(task)
    if pointer:
        raise ValueError(f"{shown(file)} is a Git LFS pointer; `git lfs pull` brings the file")
    return None


def find_data(run: dict[str, Any], source: Path) -> tuple[str, Path | None]:
    """(task, file) that a run trains on; no file where it is FinLoRA's. Raises ValueError.

    A file that is there is known by its content. One that is not can only be FinLoRA's, by name.
    """
    file = (source.parent / run["dataset_path"]).resolve()
    if not file.is_file():
        for task, row in published()["tasks"].items():
            if Path(row["train"]).name == file.name:
                return task, None
        raise ValueError(
            f"dataset_path: {run['dataset_path']} is not there, and no file of FinLoRA's"
        )
    if task := identify(file):
        return task, None
    stem = re.sub(r"\W+", "_", file.stem.removesuffix("_train")).strip("_").lower() or "data"
    stem = stem if stem[0].isalpha() else f"data_{stem}"
    taken = published()["tasks"].keys() | published()["datasets"].keys()
    row = {"train": str(file), "eval": []}
    for task in (stem, f"{stem}_{digest(file)[:8]}"):
        mine = recipes.LOCAL / f"{task}.yaml"
        free = not mine.exists() or read_yaml(mine) == {"sources": {"tasks": {task: row}}}
        if task not in taken and free:
            return task, file
    raise ValueError(f"dataset_path: {shown(mine)} is another task's; delete it to import the run")


def content_of(name: str, run: dict[str, Any], task: str) -> dict[str, Any]:
    """The Axolotl config of a run that trains on a task's rows."""
    base = recipes.base_model(run["base_model"])[1] or {"hub": run["base_model"], "settings": {}}
    layer = {
        "lora_r": run["lora_r"],
        "lora_alpha": run.get("lora_alpha", recipes.matrix()["common"]["lora_alpha"]),
        "learning_rate": run["learning_rate"],
        "num_epochs": run["num_epochs"],
        "micro_batch_size": run["batch_size"],
        "gradient_accumulation_steps": run["gradient_accumulation_steps"],
        # FinLoRA's own choice by bits.
        "optimizer": "paged_adamw_8bit" if run["quant_bits"] == 4 else "adamw_bnb_8bit",
    }
    layer |= {key: True for key in ("peft_use_dora", "peft_use_rslora") if run.get(key)}
    return recipes.compose(
        f"imported/{name}", base, task, run["quant_bits"], base["settings"], layer
    )


def same_as(content: dict[str, Any]) -> tuple[str | None, str | None, dict[str, Any]]:
    """(the catalogue's recipe that learns the same, else the nearest one, and what differs)."""
    learned = recipes.learned(content)
    nearest_name, least = None, dict[str, Any]()
    for name, other in of_catalogue(content["base_model"], learned["datasets"][0]["path"]):
        keys = sorted(learned.keys() | other.keys())
        differ = {k: (learned.get(k), other.get(k)) for k in keys if learned.get(k) != other.get(k)}
        if not differ:
            return name, None, {}
        if nearest_name is None or len(differ) < len(least):
            nearest_name, least = name, differ
    return None, nearest_name, least


@cache
def of_catalogue(base: str, data: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, what is learned) of the catalogue's recipes with this base and training file."""
    found = []
    for name in catalogue.ours():
        model, task, _ = recipes.parts(name)
        row = recipes.matrix()["models"][model]
        if base == row.get("base_model", row["hub"]) and data == f"{task}_train.jsonl":
            found.append((name, recipes.learned(recipes.config(name))))
    return found


def import_(source: Path) -> None:
    """Makes recipes from a FinLoRA config file: one JSON object, run name → settings."""
    if not source.is_file():
        raise WrongInput(f"CONFIG={source} is not there; a FinLoRA config file is needed")
    try:
        runs = json.loads(source.read_bytes(), object_pairs_hook=once)
    except WrongInput as error:
        raise WrongInput(f"{shown(source)}: {error}") from None
    except UnicodeDecodeError as error:
        raise WrongInput(f"{shown(source)}: not UTF-8 at byte {error.start + 1}") from None
    except ValueError as error:
        raise WrongInput(f"{shown(source)}: not JSON: {error}") from None
    if not isinstance(runs, dict) or not runs:
        raise WrongInput(f"{shown(source)}: an object of run names and settings is needed")
    identify.cache_clear()  # a file may have changed since
    problems, same = dict[str, str](), 0
    for name, run in runs.items():
        faults = wrong(run)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name):
            faults.append("its name: letters, digits, . _ and - are needed")
        try:
            task, file = find_data(run, source) if not faults else ("", None)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            problems[name] = "; ".join(faults)
            continue
        content = content_of(name, run, task)
        equal, near, differ = same_as(content) if file is None else (None, None, {})
        if equal:
            print(f"catalogue  {name} is {equal}")
            same += 1
            continue
        path = recipes.LOCAL / "imported" / f"{name}.yaml"
        changes = ", ".join(f"{k} {a} (there {b})" for k, (a, b) in differ.items())
        header = [
            f"Imported from {source.name}: {name}",
            *([f"Differs from {near} in {changes}"] if near else []),
            "",
            f"  make train RECIPE=imported/{name}",
            f"  axolotl train {shown(path)}",
            "",
            f"Version: 1.0.0 ({recipes.Recipe(name, path, content, '1.0.0').digest[:12]})",
            "Yours to change: `make render` leaves it alone.",
        ]
        if path.exists() and read_yaml(path) != content:
            problems[name] = f"{shown(path)} says something else; delete it to import the run anew"
            continue
        mine = recipes.LOCAL / f"{task}.yaml"
        if file and not mine.exists():
            head = f"# Yours, from {source.name}; `make render` leaves it alone.\n"
            row = {"train": str(file), "eval": []}
            store(mine, head + dumped({"sources": {"tasks": {task: row}}}))
        if not path.exists():
            store(path, catalogue.text(header, content, name))
        apart = (
            f"differs from {near} in {changes}" if near else "nothing in the catalogue is like it"
        )
        print(f"local      {name}: {shown(path)}; {apart}")
    recipes.forget()
    for name, reason in problems.items():
        print(f"left out   {name}: {reason}")
    made = len(runs) - same - len(problems)
    left = f", {len(problems)} left out" if problems else ""
    print(f"import     {len(runs)} runs: {same} in the catalogue, {made} local{left}")
    if problems:
        name, reason = next(iter(problems.items()))
        raise JobFailed(
            f"{shown(source)}: {len(problems)} of {len(runs)} runs are not imported; "
            f"the first: {name}: {reason}"
        )
