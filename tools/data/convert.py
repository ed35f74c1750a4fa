"""Turns FinLoRA's files into the chat rows that Axolotl and lm-eval read, task by task.

    python -m tools data                        every task of data/sources.yaml
    python -m tools data sentiment              one task: its training set and its test sets
    python -m tools data --recipe NAME          a recipe's task, with its tokens counted
    python -m tools convert fpb IN OUT          one file by the rules of one dataset

A task's training set is split by prompt into `<task>_train.jsonl` and `<task>_val.jsonl`. Whether
labels are swapped, tools/data/swap.py decides from the rows, or REPAIR=0 or REPAIR=1 by hand.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import sources
from tools.common import WrongInput, check_name, shown, write_json
from tools.data.chatfile import DEFAULT, UNCOUNTED, Options, convert_rows, remove
from tools.data.join import join_parts
from tools.data.rules import check_labels, load_test_rules, load_train_rules
from tools.data.split import choose_mark, split_test_set

if TYPE_CHECKING:
    from tools.data.lengths import Lengths


def convert_tasks(
    tasks: list[str],
    recipe: str | None = None,
    quarantine: bool = False,
    repair: bool | None = None,
) -> None:
    """Converts the tasks, else the recipe's task, else all. See `Options` for the rest."""
    lengths, recipe_task = load_lengths(recipe)
    if recipe and isinstance(lengths, str):
        print(f"data       tokens are {lengths}")
    options = Options(quarantine, lengths, repair=repair)
    table = sources.tables()["tasks"]
    tasks = tasks or ([recipe_task] if recipe_task else list(table))
    for name in tasks:
        check_name("task", name, table)
    printed = None
    names = (name for task in tasks for name in [*table[task].get("parts", ()), task])
    for name in dict.fromkeys(names):
        folder, train = sources.source_folder(name), Path(table[name]["train"])
        place = train.parent if train.is_absolute() else folder
        is_joined = "parts" in table[name] and not (folder / train).is_file()
        if place != printed and not is_joined:
            examples = " (examples)" if place == sources.SAMPLE else ""
            print(f"data       from {shown(place)}{examples}")
            printed = place
        convert_task(name, folder, options)


def convert_task(task: str, folder: Path, options: Options = DEFAULT) -> None:
    """Converts a task's training set and test sets; removes those without a source.

    The test sets of a multi-task set are converted with its parts.
    """
    spec, datasets = sources.tables()["tasks"][task], sources.tables()["datasets"]
    test_rows = convert_train(task, folder, options)
    for name in () if "parts" in spec else spec["eval"]:
        source, target = folder / datasets[name]["file"], sources.test_path(name)
        if not source.is_file():
            discard(target, f"{source.name} is not at hand")
            continue
        rules = load_test_rules(name, source, options.repair, options.quarantine)
        selected, unbounded = test_rows.get(name), replace(options, bounded=False)
        print_conversion(convert_rows(source, target, rules, selected, unbounded), target)


def convert_train(task: str, folder: Path, options: Options) -> dict[str, frozenset[int]]:
    """Converts a training set; returns the rows left to test on, where a test set replaces it."""
    spec, target = sources.tables()["tasks"][task], sources.train_path(task)
    source, split = folder / spec["train"], spec.get("without_train")
    test_set = folder / sources.tables()["datasets"][split["split"]]["file"] if split else None
    holding_out = replace(options, validation=sources.val_path(task))
    if "val" in spec and source.is_file():
        convert_own(task, options)
    elif source.is_file():
        rules = load_train_rules(task, folder)
        rules = check_labels(source, rules, options.repair, options.quarantine)
        print_conversion(convert_rows(source, target, rules, options=holding_out), target)
    elif split and (elsewhere := find_train_file_elsewhere(task, folder)):
        discard(target, f"{shown(elsewhere)} is there, but its test files are in {shown(folder)}")
    elif split and test_set and test_set.is_file():
        return divide_test_set(task, test_set, holding_out)
    elif "parts" not in spec:
        discard(target, f"{source.name} is not at hand")
    elif isinstance(result := join_parts(task, options), str):
        discard(target, f"{source.name} is not at hand, nor can its parts be joined: {result}")
    else:
        print_conversion(result, target)
    return {}


def find_train_file_elsewhere(task: str, folder: Path) -> Path | None:
    """A task's training file in another folder than the one that its files are taken from."""
    file = sources.tables()["tasks"][task]["train"]
    folders = (place for place in sources.list_folders().values() if place != sources.SAMPLE)
    places = (place / file for place in folders if place != folder)
    return next((place for place in places if place.is_file()), None)


def divide_test_set(task: str, test_set: Path, options: Options) -> dict[str, frozenset[int]]:
    """Converts the rows of a test set that train; returns the others, by dataset of the file."""
    spec, datasets = sources.tables()["tasks"][task], sources.tables()["datasets"]
    split, target = spec["without_train"], sources.train_path(task)
    rules = load_test_rules(split["split"], test_set, options.repair, options.quarantine)
    train, test = split_test_set(test_set, rules, split)
    options = replace(options, mark=choose_mark(split))
    manifest = convert_rows(test_set, target, rules, train, options)
    manifest["in_place_of"] = f"{Path(spec['train']).name}, which is not at hand"
    write_json(sources.manifest_path(target), manifest)
    print_conversion(manifest, target)
    file = datasets[split["split"]]["file"]
    return {name: test for name in spec["eval"] if datasets[name]["file"] == file}


def convert_own(task: str, options: Options) -> None:
    """Converts the training rows of a task that `make new` has split, and its validation rows."""
    spec = sources.tables()["tasks"][task]
    rules, held_out = load_train_rules(task, Path()), {"rows": 0, "reason": spec["split"]}
    target, val_target = sources.train_path(task), sources.val_path(task)
    remove(val_target)
    if (val := Path(spec["val"])).is_file():
        manifest = convert_rows(val, val_target, rules, options=options)
        facts = {key: manifest[key] for key in ("rows", "sha256", "labels")}
        held_out = {"file": val_target.name, **facts}
    manifest = convert_rows(Path(spec["train"]), target, rules, options=options)
    manifest |= {"validation": held_out, "split": spec["split"]}
    write_json(sources.manifest_path(target), manifest)
    print_conversion(manifest, target)


def convert_file(dataset: str, source: Path, target: Path, options: Options = DEFAULT) -> None:
    """Converts one file by the rules of one dataset and prints the result."""
    check_name("dataset", dataset, sources.tables()["datasets"])
    if not source.is_file():
        raise WrongInput(f"{source} is not there")
    rules = load_test_rules(dataset, source, options.repair, options.quarantine)
    print_conversion(convert_rows(source, target, rules, options=options), target)


def discard(target: Path, reason: str) -> None:
    """Removes what an earlier conversion of other data left, so that the two never mix."""
    remove(target)
    if target.name.endswith("_train.jsonl"):
        remove(target.with_name(target.name.removesuffix("_train.jsonl") + "_val.jsonl"))
    print(f"data       {target.name:<32} left out: {reason}")


def print_conversion(manifest: dict[str, Any], target: Path) -> None:
    labels = ", ".join(f"{count} {label}" for label, count in manifest["labels"].items())
    removed = manifest["removed"]
    notes = ["repaired"] if manifest["repair"] else []
    notes += [
        f"{entry['rows']} taken out: {entry['repair']}" for entry in removed if entry.get("rows")
    ]
    notes += [f"{entry['repair']} {entry['note']}" for entry in removed if "note" in entry]
    notes += [f"{rows:,} rows: {repair}" for repair, rows in manifest["repairs"].items()]
    if manifest["refused"]:
        notes.append(f"{manifest['refused']} refused: {shown(sources.refused_path(target))}")
    text = "; ".join(filter(None, [labels[:70], *notes]))
    print(f"data       {target.name:<32} {manifest['rows']:>6} rows  {text}".rstrip())
    if missing := manifest.get("in_place_of"):
        print(f"           in place of {missing}; other rows of {manifest['source']} test")
    if held_out := manifest.get("validation"):
        if held_out["rows"]:
            rows, file = held_out["rows"], held_out["file"]
            print(f"           validation, other prompts: {rows:,} rows in {file}")
        else:
            print(f"           no validation rows: {held_out['reason']}")
    if check := manifest.get("label_check"):
        print(f"           {check['text']}")
    if isinstance(tokens := manifest["tokens"], dict):
        parts = [
            f"{name} " + "{min} … {median} … {p95} … {max}".format(**tokens[name])
            for name in ("prompt", "answer")
        ]
        if over := tokens["over"]:
            parts.append(f"{over['rows']} rows over {tokens['sequence_len']}")
            parts += [f"{over['cut']} prompts cut"] if over["cut"] else []
        print(f"           tokens: {', '.join(parts)}")


def load_lengths(
    recipe: str | None, tokenizer: str | None = None, sequence_len: int | None = None
) -> "tuple[Lengths | str, str | None]":
    """Returns the token counter (or why there is none) and the recipe's task.

    `tokenizer` (a folder) and `sequence_len` (tokens) override the recipe's.
    """
    if not recipe and not tokenizer:
        return UNCOUNTED, None
    from tools import recipes
    from tools.data.lengths import load
    from tools.prompts import changes_tokenizer

    chosen = recipes.find(recipe) if recipe else None
    config = chosen.config if chosen else {}
    base = tokenizer or config.get("tokenizer_config") or config["base_model"]
    lengths = load(base, sequence_len or config.get("sequence_len"))
    if tokenizer and not lengths:
        raise WrongInput(f"{tokenizer} holds no tokenizer")
    if lengths:
        lengths.options = config.get("chat_template_kwargs")
    if lengths and chosen and changes_tokenizer(config):
        from tools.models import load_tokenizer

        lengths.tokenizer = load_tokenizer(config)
    reason = f"not counted: the tokenizer of {base} is not at hand"
    return lengths or reason, chosen.task if chosen else None
