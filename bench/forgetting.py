"""What an adapter costs elsewhere: its loss on general prose and on the keys of other tasks.

    python -m bench.forgetting                       every finished run of SmolLM2, all its seeds
    python -m bench.forgetting --runs sentiment_r4   some of them

Base and adapter read the same passages and the same keys, at the adapter's precision. A passage's
loss is the mean over its tokens, a key's the mean over the tokens of the answer behind its prompt;
the means over passages or keys are compared, with a paired interval over them. The keys are those
of test rows, also of the trained task; nothing is chosen by them.

The prose is what lm-eval's task descriptions say of their datasets, from the installed package: the
same text on every machine with the pinned version, which its SHA-256 checks. It is technical
English, not literature. SmolLM2 may have read parts of it; no adapter has.

Results go to results/forgetting.json, one entry for each run, so the command can be repeated.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.jobs import choose_names
from evals import run as evaluation
from evals import stats
from evals.results import EXAMPLES
from tools import models, prompts, recipes, runs, sources, subjects
from tools.common import (
    ROOT,
    JobFailed,
    WrongInput,
    command,
    json_lines,
    quiet,
    read_json,
    shown,
    write_json,
)
from tools.runs import Run
from tools.train.hardware import detect_host

MODEL = "smollm2-135m"
RESULTS = ROOT / "results" / "forgetting.json"
PROSE = "prose"
PACKAGE = "lm_eval"
SHA256 = "7cd93e66ac87d976e2b06ab47d7105e05898200ae29f51bd98056d3f2e6abd99"
SHORTEST = 60  # words of a passage
LETTERS = 0.93  # of a passage are letters and spaces, so that tables and code are left out
LONGEST = 2048  # tokens of a row; longer ones, of FinanceBench, take a minute each on two cores
ROWS = 100  # of each dataset
Pair = tuple[list[int], list[int]]  # tokens that are read, tokens whose loss counts


# ---- what is read


def select_passages(texts: Sequence[str]) -> list[str]:
    """The paragraphs of prose in Markdown texts, each once."""
    passages: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            passage = " ".join(paragraph.split())
            letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in passage)
            is_long = len(passage.split()) >= SHORTEST
            if is_long and passage[0].isalpha() and letters / len(passage) >= LETTERS:
                passages[passage] = None
    return list(passages)


def read_prose() -> list[str]:
    """The passages in the installed package; raises WrongInput where they are not as pinned."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise WrongInput(f"{PACKAGE} is not installed; `make setup` installs it")
    paths = sorted((Path(folders[0]) / "tasks").rglob("*.md"))
    passages = select_passages([path.read_text(encoding="utf-8") for path in paths])
    sha = hashlib.sha256("\n".join(passages).encode()).hexdigest()
    if sha != SHA256:
        version = importlib.metadata.version(PACKAGE)
        raise WrongInput(
            f"the prose of {PACKAGE} {version} is not that of the pinned version "
            f"(SHA-256 {sha[:12]}, not {SHA256[:12]}); `make setup` installs the pinned one"
        )
    return passages


def list_datasets() -> list[str]:
    """The datasets whose real test rows are here; of several from one file the first."""
    named: dict[str, str] = {}
    for name, entry in sources.tables()["datasets"].items():
        path = sources.test_path(name)
        is_scored = path.is_file() and name in evaluation.read_tasks()
        if is_scored and sources.manifest(path).get("from") != "data/sample":
            named.setdefault(entry["file"], name)
    return list(named.values())


def list_own_datasets(task: str | None) -> list[str]:
    """The datasets with rows of a task, by the files that it is scored on."""
    tables = sources.tables()
    names = tables["tasks"].get(task or "", {}).get("eval", [])
    files = {tables["datasets"][name]["file"] for name in names}
    return [name for name in list_datasets() if tables["datasets"][name]["file"] in files]


def split_row(tokenizer: Any, row: dict[str, Any], options: dict[str, Any] | None) -> Pair:
    """(prompt, answer with the tokens that end it) of a chat row."""
    messages, tools = prompts.read_conversation(row)
    prompt = prompts.tokens(tokenizer, messages[:-1], options, tools=tools)
    text = prompts.render(tokenizer, messages[:-1], options, tools=tools)
    answer = prompts.render_row(tokenizer, row, options).removeprefix(text).rstrip("\n")
    return prompt, tokenizer.encode(answer, add_special_tokens=False)


def list_pairs(
    subject: subjects.Subject, tokenizer: Any
) -> dict[str, tuple[list[Pair], stats.Clusters]]:
    """What is read, by dataset, with its clusters: the prose first."""
    start = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    encode = tokenizer.encode
    named: dict[str, tuple[list[Pair], stats.Clusters]] = {}
    prose = [(start, encode(text, add_special_tokens=False)[:LONGEST]) for text in read_prose()]
    named[PROSE] = prose, None
    for dataset in list_datasets():
        rows = json_lines(evaluation.find_rows(dataset))
        pairs, asked = list[Pair](), list[str]()
        for number in evaluation.pick_rows(dataset, ROWS):
            prompt, answer = split_row(tokenizer, rows[number], subject.options)
            if len(prompt) + len(answer) <= LONGEST:
                pairs.append((prompt, answer))
                asked.append("\n".join(turn["content"] for turn in rows[number]["messages"][:-1]))
        named[dataset] = pairs, evaluation.find_clusters(dataset, asked)
    return {name: entry for name, entry in named.items() if entry[0]}


# ---- losses


def measure_loss(model: Any, pair: Pair) -> float:
    """The mean loss per token of the second part behind the first, in nats."""
    import torch

    prompt, answer = pair
    tokens = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(tokens, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :]))


def measure_sides(model: Any, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """The losses of base and adapter on the same texts."""
    losses = {}
    for side in ("base", "adapter"):
        with model.disable_adapter() if side == "base" else nullcontext():
            losses[side] = [measure_loss(model, pair) for pair in pairs]
    return losses


def compare_sides(
    losses: dict[str, list[float]], clusters: stats.Clusters = None
) -> dict[str, Any]:
    """Both means, and adapter minus base with its interval."""
    difference = stats.compare("loss", losses["base"], losses["adapter"], clusters)
    ends = {key: difference.get(key) for key in ("value", "low", "high", "p")}
    return {
        "texts": len(losses["base"]),
        **({"clusters": len(set(clusters))} if clusters else {}),
        "base": round(fmean(losses["base"]), 4),
        "adapter": round(fmean(losses["adapter"]), 4),
        "difference": {k: None if v is None else round(v, 4) for k, v in ends.items()},
    }


def measure_run(run: Run) -> dict[str, Any]:
    """The entry of a run: what its adapter changes in each dataset, and in prose."""
    subject = subjects.of_folder(run.folder)
    model, tokenizer = models.load(subject.config, subject.adapter)
    measured = {}
    for name, (pairs, clusters) in list_pairs(subject, tokenizer).items():
        measured[name] = compare_sides(measure_sides(model, pairs), clusters)
        gain = measured[name]["difference"]["value"]
        print(f"forgetting {run.name}, {name}: {gain:+.3f} nats a token", flush=True)
    return {
        "recipe": run.info["recipe"],
        "recipe_digest": run.info["recipe_digest"],
        "task": subject.task,
        "own_datasets": list_own_datasets(subject.task),
        "seed": run.config.get("seed"),
        "machine": detect_host().describe_machine(),
        "precision": models.precision(subject.config),
        "losses": measured,
    }


# ---- the command


def group_finished_runs() -> dict[str, list[Run]]:
    """The finished runs of SmolLM2 by the name of their recipe, with all its seeds.

    Without those that were trained on this project's examples, which are no evidence.
    """
    folder, groups = runs.RUNS / MODEL, defaultdict[str, list[Run]](list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        run = Run(path)
        other = runs.OTHER_SEED.fullmatch(path.name)
        is_of_examples = any(entry.get("from") == EXAMPLES for entry in run.info.get("data", ()))
        if ".previous" not in path.name and run.is_finished and not is_of_examples:
            groups[other["run"] if other else path.name].append(run)
    return dict(groups)


def choose_runs(names: str) -> list[Run]:
    """The runs of the named recipes, or all; raises WrongInput where one has no finished run."""
    groups = group_finished_runs()
    if not groups:
        raise WrongInput(
            f"{shown(runs.RUNS / MODEL)} has no finished run on rows other than the examples; "
            "`make train` makes one"
        )
    return [run for name in choose_names(names, groups, "finished run") for run in groups[name]]


def identify_run(run: Run) -> dict[str, Any]:
    """What an entry depends on; it stands while this is the same."""
    files = {name: sources.manifest(sources.test_path(name))["sha256"] for name in list_datasets()}
    return {"adapter": run.info["adapter_sha256"], "prose": SHA256, "rows": ROWS, "files": files}


def name_lost_datasets(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The datasets that would be lost with an entry; empty where another one has as many."""
    lost = before["files"].keys() - now["files"].keys()
    return ", ".join(sorted(lost)) if len(now["files"]) < len(before["files"]) else ""


def is_current(entry: dict[str, Any]) -> bool:
    """Whether an entry is of today's recipe and texts; test rows are not needed to tell."""
    try:
        recipe = recipes.find(entry["recipe"])
    except WrongInput:
        return False
    digest = recipe.with_seed(recipe.seed if entry["seed"] is None else entry["seed"]).digest
    read = (entry["identity"]["prose"], entry["identity"]["rows"])
    return entry["recipe_digest"] == digest and read == (SHA256, ROWS)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="what an adapter costs elsewhere")
    parser.add_argument("--runs", default="", help="recipes of SmolLM2; all finished ones if unset")
    options = parser.parse_args()
    finished = choose_runs(options.runs)
    read_prose()
    quiet()
    failed = 0
    for run in finished:
        content = read_json(RESULTS) if RESULTS.is_file() else {"runs": {}}
        identity, before = identify_run(run), content["runs"].get(run.name)
        if before and before["identity"] == identity:
            continue
        if (
            before
            and is_current(before)
            and (lost := name_lost_datasets(before["identity"], identity))
        ):
            print(
                f"forgetting {run.name} left out: its entry also has {lost}, whose rows are not "
                "here; `make data` converts them",
                flush=True,
            )
            continue
        try:
            entry = measure_run(run) | {"identity": identity}
        except (WrongInput, JobFailed) as error:
            print(f"forgetting {run.name} left out: {error}", flush=True)
            failed += 1
            continue
        content["runs"] = dict(sorted((content["runs"] | {run.name: entry}).items()))
        write_json(RESULTS, content)
    if failed:
        raise JobFailed(f"{failed} of {len(finished)} runs could not be measured")


if __name__ == "__main__":
    main()
