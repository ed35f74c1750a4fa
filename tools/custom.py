"""Tasks and recipes of the user's own, beside the catalogue's.

    python -m tools new my_task my.jsonl          a task with recipes for all models and methods
    python -m tools import configs.json           a FinLoRA config file becomes recipes

Both write into recipes/local/, which `make render` leaves alone. `new` also splits the rows into
data/local/ and writes an lm-eval task to evals/tasks/local/. Rows may be FinLoRA's (context and
target), prompt and completion, question and answer, instruction and output, or chat messages.
`new` writes nothing where anything is wrong; `import` leaves out the runs that are wrong, and says
why.
"""

import json
import random
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from tools import common, recipes, rendering, sources
from tools.common import (
    ROOT,
    JobFailed,
    WrongInput,
    atomic,
    digest,
    format_yaml,
    nearest,
    parse_json,
    read_yaml,
    shown,
)
from tools.data.rows import parse_row
from tools.data.rules import fingerprint
from tools.train.tokens import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS

# Keys of a row that hold prompt and answer; the first pair that a row has is taken.
PAIRS = [
    ("context", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
]
NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
LEAST_PROMPTS = 10
TEST_SHARE, MOST_TEST_PROMPTS, SEED = 0.2, 500, 42
# Answers are labels where they are few and short, and each stands in several rows.
MOST_LABELS, LONGEST_LABEL, ROWS_PER_LABEL = 20, 60, 5

DATA = ROOT / "data" / "local"
TASKS = ROOT / "evals" / "tasks" / "local"

Row = tuple[str, str]  # prompt and answer


def write_own(path: Path, source: Path, content: dict[str, Any]) -> None:
    """Writes a YAML file of the user's own that says which file it was made from."""
    header = f"# Yours, from {source.name}; `make render` leaves it alone.\n"
    write_text(path, header + format_yaml(content))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows as FinLoRA has them."""
    lines = ({"context": prompt, "target": answer} for prompt, answer in rows)
    write_text(path, "".join(f"{orjson.dumps(line).decode()}\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


# ---- make new


def find_pair(content: Any) -> dict[str, Any]:
    """A row as FinLoRA has it, {"context", "target"}; raises ValueError where it has no pair."""
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, not {type(content).__name__}")
    if isinstance(turns := content.get("messages"), list):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        if roles != ["user", "assistant"]:
            raise ValueError(f"messages must be one user and one assistant turn, not {roles}")
        return {"context": turns[0].get("content"), "target": turns[1].get("content")}
    for prompt_key, answer_key in PAIRS:
        if prompt_key in content and answer_key in content:
            prompt = content[prompt_key]
            if prompt_key == "instruction" and content.get("input"):
                prompt = f"{prompt}\n\n{content['input']}"
            return {"context": prompt, "target": content[answer_key]}
    pairs = "; ".join(" and ".join(pair) for pair in PAIRS)
    raise ValueError(f"no prompt and answer: {pairs}; or messages. It has {', '.join(content)}")


def read_rows(source: Path) -> list[Row]:
    """The rows of a JSONL file; raises WrongInput that names the file and line."""
    rows = []
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                row = orjson.dumps(find_pair(orjson.loads(line)))
                rows.append(parse_row(row)[:2])
            except ValueError as error:
                raise WrongInput(f"{shown(source)}, line {number}: {error}") from None
    return rows


def split_rows(rows: list[Row]) -> tuple[list[int], list[int]]:
    """Row numbers to train and to test on; a prompt that occurs twice stays on one side."""
    fingerprints = [fingerprint(prompt) for prompt, _ in rows]
    prompts = list(dict.fromkeys(fingerprints))
    count = max(1, min(MOST_TEST_PROMPTS, round(TEST_SHARE * len(prompts))))
    test_prompts = set(random.Random(SEED).sample(prompts, count))
    sides: tuple[list[int], list[int]] = ([], [])
    for number, mark in enumerate(fingerprints):
        sides[mark in test_prompts].append(number)
    return sides


def find_labels(answers: list[str]) -> list[str]:
    """The labels of a classification, most frequent first; empty where the answers are text."""
    counts = Counter(answers)
    few = len(counts) <= MOST_LABELS and len(answers) >= ROWS_PER_LABEL * len(counts)
    short = all(len(answer) <= LONGEST_LABEL and "\n" not in answer for answer in counts)
    return [label for label, _ in counts.most_common()] if few and short else []


def build_evaluation(task: str, labels: list[str], longest: int) -> dict[str, Any]:
    """The lm-eval task of a task of the user's own; `longest` is an answer's in characters."""
    budget = max(10, longest // 2)  # in tokens: never fewer than an answer needs
    content: dict[str, Any] = {
        "include": "../_labels.yaml" if labels else "../_text.yaml",
        "task": f"finlora_{task}",
        "dataset_kwargs": {"data_files": {"test": f"data/chat/{task}_test.jsonl"}},
        "generation_kwargs": {"max_gen_toks": budget, "do_sample": False, "until": []},
    }
    if labels:
        # The longest first, so that a label that begins another does not hide it.
        choices = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        pattern = f"(?i)(?<!\\w)({choices})(?!\\w)"
        regex = {"function": "regex", "regex_pattern": pattern, "fallback": "[none]"}
        content["filter_list"] = [{"name": "label", "filter": [regex, {"function": "take_first"}]}]
    return content


def build_task(task: str, rows: list[Row], labels: list[str]) -> dict[str, Any]:
    """The rows that a task adds to the tables of recipes/matrix.yaml and data/sources.yaml."""
    characters = max(len(prompt) + len(answer) for prompt, answer in rows)
    longest = int(characters / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS
    micro_batch, accumulation = (8, 2) if longest <= 512 else (1, 8)
    dataset = {"file": shown(DATA / f"{task}_test.jsonl")} | ({"labels": labels} if labels else {})
    return {
        "tasks": {
            task: {
                "title": task.replace("_", " "),
                "longest": min(longest, recipes.read_matrix()["common"]["sequence_len"]),
                "settings": {
                    "num_epochs": 4,
                    "micro_batch_size": micro_batch,
                    "gradient_accumulation_steps": accumulation,
                },
            }
        },
        "sources": {
            "datasets": {task: dataset},
            "tasks": {task: {"train": shown(DATA / f"{task}_train.jsonl"), "eval": [task]}},
        },
    }


def require_free_name(task: str) -> None:
    """Raises WrongInput for a task's name that is malformed or already in use."""
    own_file = recipes.LOCAL / f"{task}.yaml"
    if not NAME.fullmatch(task):
        raise WrongInput(
            f'TASK "{task}": small letters, digits and _ are needed, such as TASK=my_task'
        )
    if own_file.exists():
        raise WrongInput(f"{shown(own_file)} is there already; delete it to make the task anew")
    tables = sources.tables()
    taken = {*tables["datasets"], *tables["tasks"], *recipes.list_aliases()}
    if {task, *(f"{task}_{method}" for method in recipes.read_matrix()["methods"])} & taken:
        raise WrongInput(f'TASK "{task}" is a name of the catalogue; choose another')


def create_task(task: str, source: Path) -> None:
    """Makes a task of the user's rows: data, recipes for all models and methods, evaluation."""
    require_free_name(task)
    if not source.is_file():
        raise WrongInput(f"DATA={source} is not there; a JSONL file is needed")
    rows = read_rows(source)
    if len({fingerprint(prompt) for prompt, _ in rows}) < LEAST_PROMPTS:
        raise WrongInput(
            f"{shown(source)}: {len(rows)} rows; at least {LEAST_PROMPTS} prompts are needed"
        )
    answers = [answer for _, answer in rows]
    labels, sides = find_labels(answers), split_rows(rows)
    own_file, evaluation_file = recipes.LOCAL / f"{task}.yaml", TASKS / f"{task}.yaml"
    with ExitStack() as undo:  # the task appears whole or not at all
        for side, numbers in zip(("train", "test"), sides, strict=True):
            path = DATA / f"{task}_{side}.jsonl"
            undo.callback(path.unlink, missing_ok=True)
            write_rows(path, [rows[number] for number in numbers])
        undo.callback(evaluation_file.unlink, missing_ok=True)
        write_own(evaluation_file, source, build_evaluation(task, labels, max(map(len, answers))))
        undo.callback(own_file.unlink, missing_ok=True)
        write_own(own_file, source, build_task(task, rows, labels))
        recipes.clear_caches()
        names = [name for name, parts in recipes.list_names().items() if parts[1] == task]
        for path in (recipes.LOCAL / f"{name}.yaml" for name in names):
            undo.callback(path.unlink, missing_ok=True)
        for name in names:
            write_text(recipes.LOCAL / f"{name}.yaml", rendering.render_recipe(name))
        undo.pop_all()
    kind = f"{len(labels)} labels ({', '.join(labels[:4])}…)" if labels else "free text"
    print(f"new        {len(sides[0])} rows train and {len(sides[1])} test; answers: {kind}")
    print(f"new        {shown(own_file)}, {shown(evaluation_file)}, {len(names)} recipes")
    print(f"next       make data TASKS={task}; make train RECIPE=smollm2-135m/{task}_r4")


# ---- make import


# The keys of a run in FinLoRA's config file, with the types of their values.
RUN_KEYS: dict[str, tuple[type, ...]] = {
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
OPTIONAL_KEYS = {"lora_alpha", "peft_use_dora", "peft_use_rslora"}


RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
LFS_DIGEST = re.compile(rb"version https://git-lfs.*?oid sha256:(\w+)", re.S)


def list_faults(name: str, run: Any) -> list[str]:
    """What is wrong with one run of a config file, `key: reason` each."""
    if not isinstance(run, dict):
        return ["an object is needed"]
    faults = [
        f"{key}: unknown key{nearest(key, list(RUN_KEYS))}" for key in run if key not in RUN_KEYS
    ]
    faults += [f"{key}: missing" for key in RUN_KEYS if key not in {*run, *OPTIONAL_KEYS}]
    for key, kinds in RUN_KEYS.items():
        if key not in run:
            continue
        value: Any = run[key]
        if type(value) not in kinds:
            faults.append(f"{key}: {json.dumps(value)} is not {kinds[-1].__name__}")
        elif type(value) is not bool and (not value.strip() if type(value) is str else value <= 0):
            faults.append(f"{key}: {json.dumps(value)} is empty or not above 0")
    if type(run.get("quant_bits")) is int and run["quant_bits"] not in (4, 8, 16):
        faults.append(f"quant_bits: {run['quant_bits']} is none of 4, 8, 16")
    if not RUN_NAME.fullmatch(name):
        faults.append("its name: letters, digits, . _ and - are needed")
    return faults


read_published_tables = cache(sources.published_tables)  # without the user's own tasks


@cache
def identify(file: Path) -> str | None:
    """The task that a training file of FinLoRA's is for, by its content; None for other files."""
    with open(file, "rb") as content:
        pointer = LFS_DIGEST.match(content.read(300))
    digests = {pointer[1].decode()} if pointer else {digest(file), common.git_blob(file)}
    for task, row in read_published_tables()["tasks"].items():
        published = read_published_tables()["files"][row["train"]]
        if {published.get("sha256"), published.get("blob")} & digests:
            return str(task)
    if pointer:
        raise ValueError(f"{shown(file)} is a Git LFS pointer; `git lfs pull` brings the file")
    return None


def find_data(run: dict[str, Any], source: Path) -> tuple[str, Path | None]:
    """(task, file) that a run trains on; no file where it is FinLoRA's. Raises ValueError.

    A file that is there is recognized by its content. A missing one can only be FinLoRA's, and is
    recognized by its name.
    """
    file = (source.parent / run["dataset_path"]).resolve()
    tables = read_published_tables()
    if not file.is_file():
        for task, row in tables["tasks"].items():
            if Path(row["train"]).name == file.name:
                return task, None
        raise ValueError(
            f"dataset_path: {run['dataset_path']} is not there, and no file of FinLoRA's"
        )
    if task := identify(file):
        return task, None
    stem = re.sub(r"\W+", "_", file.stem.removesuffix("_train")).strip("_").lower() or "data"
    stem = stem if stem[0].isalpha() else f"data_{stem}"
    for task in (stem, f"{stem}_{digest(file)[:8]}"):
        own_file = recipes.LOCAL / f"{task}.yaml"
        free = not own_file.exists() or read_yaml(own_file) == build_source(task, file)
        if free and task not in {*tables["tasks"], *tables["datasets"]}:
            return task, file
    raise ValueError(
        f"dataset_path: {shown(own_file)} is another task's; delete it to import the run"
    )


def build_source(task: str, file: Path) -> dict[str, Any]:
    """The row that a training file of the user's own adds to the tables of data/sources.yaml."""
    return {"sources": {"tasks": {task: {"train": str(file), "eval": []}}}}


def build_config(name: str, run: dict[str, Any], task: str) -> dict[str, Any]:
    """The Axolotl config of a run that trains on a task's rows."""
    base = recipes.find_base(run["base_model"])[1] or {"hub": run["base_model"], "settings": {}}
    settings = {
        "lora_r": run["lora_r"],
        "lora_alpha": run.get("lora_alpha", recipes.read_matrix()["common"]["lora_alpha"]),
        "learning_rate": run["learning_rate"],
        "num_epochs": run["num_epochs"],
        "micro_batch_size": run["batch_size"],
        "gradient_accumulation_steps": run["gradient_accumulation_steps"],
        # FinLoRA's choice by bits.
        "optimizer": "paged_adamw_8bit" if run["quant_bits"] == 4 else "adamw_bnb_8bit",
    }
    settings |= {key: True for key in ("peft_use_dora", "peft_use_rslora") if run.get(key)}
    folder, bits = f"imported/{name}", run["quant_bits"]
    return recipes.compose_config(folder, base, task, bits, base["settings"], settings)


@dataclass(frozen=True)
class Twin:
    """The catalogue's recipe that is nearest to a run; {key: (run's, its)} of what differs."""

    name: str
    differences: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        changes = (f"{key} {own} (there {its})" for key, (own, its) in self.differences.items())
        return f"{self.name} in {', '.join(changes)}"


def find_twin(config: dict[str, Any]) -> Twin | None:
    """The recipe of the catalogue that learns the same as a config, or nearly the same."""
    learned = recipes.select_learned(config)
    twins = []
    for name, other in list_learned(config["base_model"], learned["datasets"][0]["path"]):
        keys = sorted(learned.keys() | other.keys())
        pairs = {key: (learned.get(key), other.get(key)) for key in keys}
        differences = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        twins.append(Twin(name, differences))
    return min(twins, key=lambda twin: len(twin.differences), default=None)


@cache
def list_learned(base: str, data: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, what is learned) of the catalogue's recipes with this base and training file."""
    models = recipes.read_matrix()["models"]
    return [
        (name, recipes.select_learned(recipes.build_config(name)))
        for name, (model, task, _) in recipes.list_names().items()
        if not recipes.is_local(name)
        and base == models[model].get("base_model", models[model]["hub"])
        and data == f"{task}_train.jsonl"
    ]


def import_run(name: str, run: Any, source: Path) -> bool:
    """Writes the recipe of one run; False where the catalogue has it. Raises ValueError."""
    if faults := list_faults(name, run):
        raise ValueError("; ".join(faults))
    task, file = find_data(run, source)
    config = build_config(name, run, task)
    twin = None if file else find_twin(config)
    if twin and not twin.differences:
        print(f"catalogue  {name} is {twin.name}")
        return False
    path = recipes.LOCAL / "imported" / f"{name}.yaml"
    if path.exists() and read_yaml(path) != config:
        raise ValueError(f"{shown(path)} says something else; delete it to import the run anew")
    own_file = recipes.LOCAL / f"{task}.yaml"
    if file and not own_file.exists():
        write_own(own_file, source, build_source(task, file))
    if not path.exists():
        header = [
            f"Imported from {source.name}: {name}",
            *([f"Differs from {twin}"] if twin else []),
            "",
            f"  make train RECIPE=imported/{name}",
            f"  axolotl train {shown(path)}",
            "",
            f"Version: 1.0.0 ({recipes.Recipe(name, path, config, '1.0.0').digest[:12]})",
            "Yours to change: `make render` leaves it alone.",
        ]
        # No name: the reasons that a pattern selects are those of the catalogue's settings.
        write_text(path, rendering.format_recipe(header, config, ""))
    apart = f"differs from {twin}" if twin else "nothing in the catalogue is like it"
    print(f"local      {name}: {shown(path)}; {apart}")
    return True


def import_runs(source: Path) -> None:
    """Makes recipes from a FinLoRA config file: one JSON object, run name → settings."""
    if not source.is_file():
        raise WrongInput(f"CONFIG={source} is not there; a FinLoRA config file is needed")
    runs = parse_json(source.read_bytes(), shown(source))
    if not runs:
        raise WrongInput(f"{shown(source)}: an object of run names and settings is needed")
    identify.cache_clear()  # a file may have changed since
    problems, written = dict[str, str](), 0
    for name, run in runs.items():
        try:
            written += import_run(name, run, source)
        except ValueError as error:
            problems[name] = str(error)
    recipes.clear_caches()
    for name, reason in problems.items():
        print(f"left out   {name}: {reason}")
    same = len(runs) - written - len(problems)
    rest = f", {len(problems)} left out" if problems else ""
    print(f"import     {len(runs)} runs: {same} in the catalogue, {written} local{rest}")
    if problems:
        name, reason = next(iter(problems.items()))
        raise JobFailed(
            f"{shown(source)}: {len(problems)} of {len(runs)} runs are not imported; "
            f"the first: {name}: {reason}"
        )
