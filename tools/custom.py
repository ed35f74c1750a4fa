"""A task of the user's own, beside the catalogue's: `make new` makes it from a file of rows.

    python -m tools new my_task my.csv             data, recipes for all models, an evaluation

It divides the rows into data/local/, writes recipes and tables into recipes/local/, which `make
render` leaves alone, an lm-eval task to evals/tasks/local/, and chat rows to data/chat/. Where
anything is wrong it writes nothing.
"""

import math
import os
import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from evals.own import build_evaluation, find_labels, find_metric
from tools import prompts, recipes, rendering, sources
from tools.common import (
    ROOT,
    WrongInput,
    atomic,
    digest,
    nearest,
    read_yaml,
    shown,
    spell_out,
    write_text,
)
from tools.data import bases, convert, turns
from tools.data.formats import RowFile, open_rows
from tools.data.intake import Intake, IntakeOptions, take_in
from tools.data.labels import MOST_OPTIONS, choose_options
from tools.data.recognize import (
    explain_preferences,
    list_unused,
    parse_map,
    recognize,
    refuse_unwanted,
)
from tools.data.shapes import Shape
from tools.data.split import TEST_SHARE, VALIDATION_SHARE, divide_rows
from tools.rendering import write_own
from tools.train.tokens import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS

NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
LEAST_PROMPTS = 10
# Steps follow from the rows: few rows are seen often enough to be learned, many are seen less.
LEAST_STEPS, MOST_EPOCHS = 100, 10
EPOCHS = {20_000: 4, 100_000: 2, math.inf: 1}  # up to so many rows
FEW_ROWS = 200
LENGTH_STEP, TEMPLATE_BYTES = 256, 400
PATIENCE = 2  # evaluations in a row that are no better, of four or more, end a training

DATA = ROOT / "data" / "local"
SIDES = ("train", "val", "test")
TASKS = ROOT / "evals" / "tasks" / "local"


@dataclass(frozen=True)
class Choices:
    """What a user specifies beside the file of rows; see `python -m tools new --help`."""

    test: str | None = None
    mapping: str | None = None
    template: str | None = None
    labels: str | None = None
    group: str | None = None
    time: str | None = None
    quarantine: bool = False
    cut: bool = False
    last_only: bool = False
    repair: bool | None = None
    early_stopping: str | None = None  # by "loss" or "metric"


DEFAULTS = Choices()


def require_free_name(task: str) -> None:
    """Raises WrongInput for a task's name that is malformed or already in use."""
    own_file = recipes.LOCAL / f"{task}.yaml"
    if not NAME.fullmatch(task):
        raise WrongInput(
            f'TASK "{task}": small letters, digits and _ are needed, such as TASK=my_task'
        )
    methods = list(recipes.read_matrix()["methods"])
    files = [recipes.LOCAL.glob(f"*/{task}_{method}.yaml") for method in methods]
    if own_file.exists() or any(map(any, files)):
        pattern = f"{shown(recipes.LOCAL)}/*/{task}_{{{','.join(methods)}}}.yaml"
        raise WrongInput(
            f"the task {task} already exists; to make it again: rm -f {shown(own_file)} {pattern}"
        )
    tables = sources.tables()
    taken = {*tables["datasets"], *tables["tasks"], *recipes.list_aliases()}
    if {task, *(f"{task}_{method}" for method in methods)} & taken:
        raise WrongInput(f'TASK "{task}" is already a name in the catalogue; choose another')


def create_task(task: str, source: Path | str, choices: Choices = DEFAULTS) -> None:
    """Makes a task of the user's rows: data, recipes for all models and methods, evaluation."""
    require_free_name(task)
    written = [str(DATA / f"{task}_{side}.jsonl") for side in SIDES]
    for name in (source, choices.test):
        if name and os.path.realpath(name) in written:
            raise WrongInput(
                f"{name}: the task {task} writes this file; choose another name for the task"
            )
    rows = open_rows(str(source))
    mapping = parse_map(choices.mapping) if choices.mapping else None
    labels = choices.labels.split(",") if choices.labels else None
    shape = recognize(rows, mapping, choices.template, labels)
    require_answers(rows, shape, '; MAP="prompt=…,answer=…" names it')
    if not mapping:
        refuse_unwanted(rows, shape)
    for name, column in (("GROUP", choices.group), ("TIME", choices.time)):
        if column and column not in rows.columns:
            hint = nearest(column, rows.columns) or f"; there are {', '.join(rows.columns)}"
            raise WrongInput(f'{name}: {rows.name} has no column "{column}"{hint}')
    print_shape(rows, shape, [choices.group, choices.time])
    with ExitStack() as undo:  # the task appears whole or not at all
        OwnTask(task, rows, shape, choices, undo).write()
        undo.pop_all()


def require_answers(rows: RowFile, shape: Shape, advice: str = "") -> None:
    """Raises WrongInput where no column of a file holds answers."""
    if shape.has_answer:
        return
    if reason := explain_preferences(rows.columns):
        raise WrongInput(f"{rows.name}: {reason}")
    raise WrongInput(f"{rows.name}: no column holds answers ({shape.describe()}){advice}")


def print_shape(rows: RowFile, shape: Shape, others: list[str | None]) -> None:
    """Prints what was recognized in a file, and which columns are not used."""
    encoding = "" if rows.encoding.replace("-", "").lower() == "utf8" else f", {rows.encoding}"
    print(f"new        {rows.name}: {rows.format}{encoding}; {spell_out(shape.describe())}")
    for note in rows.notes:
        print(f"new        {note}")
    if unused := [column for column in shape.unused if column not in others]:
        names = spell_out(", ".join(unused))
        can_be_worded = "messages" not in shape.columns and any("[]." not in c for c in unused)
        hint = ' (TEMPLATE="{column} …" uses one)' if can_be_worded else ""
        print(f"new        not used: {names}{hint}")
    numbers = shape.options and all(re.fullmatch(r"-?\d+(\.0+)?", label) for label in shape.options)
    if shape.kind == "text and label" and numbers and not shape.names:
        print("new        the labels are numbers; LABELS=negative,neutral,… names them in order")


@dataclass
class OwnTask:
    """A task while `make new` makes it. What it writes is removed through `undo` if it fails."""

    task: str
    rows: RowFile
    shape: Shape
    choices: Choices
    undo: ExitStack

    def __post_init__(self) -> None:
        self.bases = bases.list_bases()
        self.test_shapes: dict[str, Shape] = {}  # of files with other columns, by their name
        common = recipes.read_matrix()["common"]
        self.options = IntakeOptions(
            group=self.choices.group,
            time=self.choices.time,
            last_only=self.choices.last_only,
            cut=self.choices.cut,
            sequence_len=common["sequence_len"],
            bases=self.bases,
        )

    def write(self) -> None:
        intakes, answers, folded = self.take_in_files()
        intake = intakes.pop("train")
        self.print_unrenderable(intake)
        self.print_lengths([intake, *intakes.values()])
        if folded:
            pairs = ", ".join(f"{answer} → {label}" for answer, label in list(folded.items())[:6])
            print(f"new        labels that are spelled in several ways are merged: {pairs}")
        labels, answer_names = self.find_labels(answers), list(intake.answers)
        if labels and intake.marks.labels:  # spellings of one label are one stratum
            numbers = {answer: number for number, answer in enumerate(intake.answers)}
            for number, row_label in enumerate(intake.marks.labels):
                answer = answer_names[row_label]
                intake.marks.labels[number] = numbers.get(folded.get(answer, answer), row_label)
        else:
            del intake.marks.labels[:]
        if labels and "test" in intakes:
            print_untrained(intake, intakes["test"], folded)
        sides, rule = self.divide(intake, intakes, labels)
        counts = self.write_sides(intake, intakes, sides, folded)
        evaluation = build_evaluation(self.task, answers, labels)
        longest = max(part.longest for part in (intake, *intakes.values()))
        settings = build_settings(longest, counts["train"], bool(counts["val"]))
        settings |= self.stop_early(evaluation, counts)
        tables = {"tasks": {self.task: self.build_row(settings, longest)}}
        self.write_tables(evaluation, tables | self.build_sources(labels, counts, rule))
        print(f"new        {describe_counts(counts)}; {rule}")
        kind = evaluation["include"].removeprefix("../_own_").removesuffix(".yaml")
        if labels:
            more = ", …" if labels[8:] else ""
            kind = f"{len(labels)} labels: {', '.join(labels[:8])}{more}"
        print(f"new        answers: {spell_out(kind)} ({shown(TASKS / f'{self.task}.yaml')})")
        convert.convert_task(
            self.task, Path(), convert.Options(self.choices.quarantine, repair=self.choices.repair)
        )
        print(
            f"next       make look TASK={self.task}; make train RECIPE=smollm2-135m/{self.task}_r4"
        )

    # ---- rows

    def take_in_files(self) -> tuple[dict[str, Intake], list[str], dict[str, str]]:
        """(chat rows of each file, all answers, the spellings that are folded in them).

        Prompts list the labels of the rows that can be used, as they are spelled in the end. These
        are known once all rows are read, so where they differ the rows are read again.
        """
        files = {"train": self.rows} | self.open_held_out()
        intakes = {side: self.take_in(rows, side) for side, rows in files.items()}
        answers = [text for intake in intakes.values() for text in intake.list_answers()]
        folded = fold_labels(answers, bool(self.shape.options))
        answers = [folded.get(answer, answer) for answer in answers]
        options = choose_options(answers)
        if self.shape.options and not self.shape.names and options != self.shape.options:
            if not options:
                print(f"new        over {MOST_OPTIONS} labels, so prompts do not list them")
            self.shape.options = options
            intakes = {side: self.take_in(rows, side) for side, rows in files.items()}
        for side, intake in intakes.items():
            self.print_intake(intake, files[side], side)
        return intakes, answers, folded

    def take_in(self, rows: RowFile, side: str) -> Intake:
        """The chat rows of a file; WrongInput where it has no answers, or no row can be used."""
        shape = self.choose_shape(rows)
        options = self.options
        if rows is not self.rows:
            options = IntakeOptions(**vars(options) | {"group": None, "time": None})
            if self.choices.group in rows.columns:
                options.group = self.choices.group
        path = self.locate_refused(side)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.undo.callback(path.unlink, missing_ok=True)
        shape.repairs.clear()
        intake = take_in(rows, shape, options, path)
        intake.repairs = +shape.repairs
        self.undo.callback(intake.spool.close)
        if not self.choices.quarantine:
            intake.refusals.stop()
        if not intake.rows:
            first = "; ".join(f"{place}: {reason}" for place, reason in intake.refusals.first[:1])
            raise WrongInput(f"{rows.name}: no row can be used; {first or 'it has none'}")
        return intake

    def choose_shape(self, rows: RowFile) -> Shape:
        """The shape of the main file, or of a file of test rows with other columns."""
        shape = self.shape
        if rows is self.rows:
            return shape
        if rows.name not in self.test_shapes:
            test_shape = shape
            if shape.list_missing(rows, with_answer=True):
                names = [f"{number}={name}" for number, name in (shape.names or {}).items()]
                test_shape = recognize(rows, labels=names or None)
                require_answers(rows, test_shape)
                refuse_unwanted(rows, test_shape)
                test_shape = test_shape.adopt(shape, rows)
                test_shape.unused = list_unused(test_shape, rows.columns, [])
                print_shape(rows, test_shape, [self.choices.group, self.choices.time])
            elif note := shape.note_missing(rows):
                print(f"new        {note}")
            self.test_shapes[rows.name] = test_shape.add_choices(rows)
        test_shape = self.test_shapes[rows.name]
        test_shape.options = shape.options
        return test_shape

    def locate_refused(self, side: str) -> Path:
        return DATA / f"{self.task}{'' if side == 'train' else f'.{side}'}.refused.jsonl"

    def print_intake(self, intake: Intake, rows: RowFile, side: str) -> None:
        """Prints what of a file was refused, repaired and cut, and its first row."""
        if intake.refusals.first:
            total = intake.refusals.reasons.total()
            print(f"refused    {rows.name}: {total:,} rows, in {shown(self.locate_refused(side))}")
            for line in intake.refusals.list_lines():
                print(f"           {spell_out(line)}")
        for repair, count in intake.repairs.items():
            print(f"new        {rows.name}: {count:,} rows: {repair}")
        if rows.table and rows.table.suspects:
            place = f"{rows.name}, line {rows.table.suspects[0]}"
            print(
                f"new        {place}: a quoted cell goes on over lines that each look like a row; "
                "is its quote closed?"
            )
        if intake.cut:
            print(f"new        {rows.name}: {intake.cut:,} prompts lost their middle (CUT=1)")
        if side == "train":
            self.print_example(intake)

    def print_example(self, intake: Intake) -> None:
        """Prints the first row as a base at hand will see it."""
        chat = orjson.loads(next(intake.read()))
        intake.spool.seek(0, 2)
        for base in self.bases:
            with suppress(WrongInput):  # `print_unrenderable` reports it
                text = base.render(chat)[:1500]
                print(f"new        the first row as {base.name} sees it:")
                for line in spell_out(text).splitlines():
                    print(f"           {line}")
                return

    def print_unrenderable(self, intake: Intake) -> None:
        """Prints for each base at hand what its chat template refuses or leaves out of the rows."""
        shapes = list(prompts.pick_shapes(map(orjson.loads, intake.read())))
        intake.spool.seek(0, 2)
        for base in self.bases:
            reasons = (prompts.explain_unrenderable(base, row, base.options) for _, row in shapes)
            if reason := next(filter(None, reasons), ""):
                print(
                    f"new        {base.name} cannot be trained on these rows: {spell_out(reason)}"
                )

    def print_lengths(self, intakes: list[Intake]) -> None:
        """Prints for each base at hand how many rows are too long for it."""
        limit = self.options.sequence_len
        for base in self.bases:
            over = sum(intake.over[base.name] for intake in intakes)
            print(f"new        {base.name}: {over:,} rows over sequence_len ({limit:,} tokens)")
        longest = max(intake.longest for intake in intakes)
        if longest + TEMPLATE_BYTES > limit and (missing := bases.name_missing(self.bases)):
            print(
                f"new        not counted for {', '.join(missing)}: their tokenizers are not here, "
                f"and the longest row has {longest:,} bytes"
            )

    def open_held_out(self) -> dict[str, RowFile]:
        """The files of test and validation rows: `TEST=`, else the dataset's own splits."""
        # Where `train` is among the others, these rows are a split that the user chose by name.
        own_splits = [] if "train" in self.rows.splits else self.rows.splits
        held_out = {}
        if self.choices.test:
            held_out["test"] = open_rows(self.choices.test)
        elif "test" in own_splits:
            held_out["test"] = self.rows.open_split("test")
        for name in ("validation", "val", "valid", "dev"):
            if name in own_splits:
                held_out["val"] = self.rows.open_split(name)
                break
        return held_out

    def find_labels(self, answers: list[str]) -> list[str]:
        names = list((self.shape.names or {}).values())
        return names if names and set(answers) <= set(names) else find_labels(answers)

    # ---- sides

    def divide(
        self, intake: Intake, held_out: dict[str, Intake], labels: list[str]
    ) -> tuple[list[str], str]:
        """The side of each row of the main file, and the rule in words."""
        tested = {mark for other in held_out.values() for mark in other.marks.prompts}
        groups = {mark for other in held_out.values() for mark in other.marks.groups}
        prompts = set(intake.marks.prompts) - tested
        if len(prompts) < LEAST_PROMPTS:
            unused = " that do not test or validate" if tested else ""
            raise WrongInput(
                f"{self.rows.name}: {intake.rows} rows with {len(prompts)} prompts{unused}; at "
                f"least {LEAST_PROMPTS} prompts are needed"
            )
        shares = [] if "test" in held_out else [TEST_SHARE]
        least = sources.tables()["validation"]["least"]
        shares += [] if "val" in held_out or len(prompts) < least else [VALIDATION_SHARE]
        sides = divide_rows(intake.marks, shares)
        for number, mark in enumerate(intake.marks.prompts):
            if mark in tested or (groups and intake.marks.groups[number] in groups):
                sides[number] = ""
        if dropped := sides.count(""):
            print(f"new        {dropped:,} rows do not train: their prompts test or validate")
        if "train" not in sides:
            raise WrongInput(f"{self.rows.name}: no rows are left to train on")
        rule = "by label" if labels else "at random"
        if self.choices.time:
            newest = "validate" if "test" in held_out else "test"
            rule = f"by time ({self.choices.time}), the newest rows {newest}"
        units = "by prompt" if not self.choices.group else f"by {self.choices.group} and prompt"
        text = f"divided {rule}, grouped {units}" if shares else "divided as the files are"
        if "test" in held_out:
            text += f"; tested on {self.choices.test or 'the split test'}"
        return ["val" if side == "validation" else side for side in sides], text

    def write_sides(
        self,
        intake: Intake,
        held_out: dict[str, Intake],
        sides: list[str],
        folded: dict[str, str],
    ) -> Counter[str]:
        """Writes data/local/<task>_<side>.jsonl; returns the rows of each side."""
        counts = Counter[str]()
        tested = set(held_out["test"].marks.prompts) if "test" in held_out else set()
        for side in SIDES:  # of an earlier task of this name
            (DATA / f"{self.task}_{side}.jsonl").unlink(missing_ok=True)
        with ExitStack() as files:
            opened: dict[str, Any] = {}

            def put(side: str, line: bytes) -> None:
                if side not in opened:
                    path = DATA / f"{self.task}_{side}.jsonl"
                    self.undo.callback(path.unlink, missing_ok=True)
                    opened[side] = files.enter_context(atomic(path))
                opened[side].write(fold_answer(line, folded) if folded else line)
                counts[side] += 1

            for side, line in zip(sides, intake.read(), strict=True):
                if side:
                    put(side, line)
            for side, other in held_out.items():
                for mark, line in zip(other.marks.prompts, other.read(), strict=True):
                    if side == "test" or mark not in tested:
                        put(side, line)
        if "val" in held_out and (dropped := held_out["val"].rows - counts["val"]):
            print(
                f"new        {dropped:,} rows do not validate: their prompts are in the test rows"
            )
        return counts

    # ---- files

    def write_tables(self, evaluation: dict[str, Any], tables: dict[str, Any]) -> None:
        """Writes the evaluation, the task's row of the tables, and a recipe for each model."""
        own_file, evaluation_file = recipes.LOCAL / f"{self.task}.yaml", TASKS / f"{self.task}.yaml"
        self.undo.callback(self.forget)
        write_own(evaluation_file, self.rows.name, evaluation)
        write_own(own_file, self.rows.name, tables)
        forget_tables()
        names = [name for name, parts in recipes.list_names().items() if parts[1] == self.task]
        for name in names:
            path = recipes.LOCAL / f"{name}.yaml"
            self.undo.callback(path.unlink, missing_ok=True)
            write_text(path, rendering.render_recipe(name))
        print(f"new        {shown(own_file)} and {len(names)} recipes")

    def stop_early(self, evaluation: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
        """The settings of EARLY_STOPPING; {} without it."""
        if not (choice := self.choices.early_stopping):
            return {}
        if not counts["val"]:
            least = sources.tables()["validation"]["least"]
            raise WrongInput(
                f"EARLY_STOPPING={choice} needs validation rows, and they are held out from "
                f"{least} prompts on"
            )
        settings: dict[str, Any] = {"early_stopping_patience": PATIENCE}
        if choice == "metric":
            name = f"eval_{find_metric(evaluation)}"
            settings |= {"metric_for_best_model": name, "greater_is_better": True}
        return settings

    def forget(self) -> None:
        """Removes the task's tables and converted rows."""
        for path in (recipes.LOCAL / f"{self.task}.yaml", TASKS / f"{self.task}.yaml"):
            path.unlink(missing_ok=True)
        for side in ("train", "val", "test"):
            convert.remove(sources.CHAT / f"{self.task}_{side}.jsonl")
        forget_tables()

    def build_sources(self, labels: list[str], counts: Counter[str], rule: str) -> dict[str, Any]:
        """The rows that a task adds to the tables of data/sources.yaml."""
        path = Path(os.path.expanduser(self.rows.source))
        origin = {"from": self.rows.name, "format": self.rows.format, "rows": dict(counts)}
        origin |= {"sha256": digest(path)} if path.is_file() else {}
        origin |= {"revision": self.rows.revision} if self.rows.revision else {}
        files = {side: shown(DATA / f"{self.task}_{side}.jsonl") for side in ("train", "val")}
        dataset = {"file": shown(DATA / f"{self.task}_test.jsonl")}
        task = {**files, "eval": [self.task], "split": rule, "shape": self.shape.to_dict()}
        datasets = {self.task: dataset | ({"labels": labels} if labels else {})}
        return {"sources": {"datasets": datasets, "tasks": {self.task: task | {"made": origin}}}}

    def build_row(self, settings: dict[str, Any], longest: int) -> dict[str, Any]:
        """The task's row of recipes/matrix.yaml; `longest` is a row's in bytes."""
        tokens = int(longest / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS
        row: dict[str, Any] = {
            "title": self.task.replace("_", " "),
            "longest": min(tokens, settings["sequence_len"]),
            "settings": settings,
        }
        if self.choices.last_only or "messages" in self.shape.columns:
            row["rows"] = {"message_field_training": "train"}
        return row


def write_tuned(recipe: recipes.Recipe, changes: dict[str, Any], version: str) -> None:
    """Writes what a search found as a recipe of the user's own, beside the one it began with."""
    if not changes:
        print(f"tune       {recipe.name} stays as it is; APPLY=1 has nothing to write")
        return
    stem = Path(recipe.name).with_suffix("").name
    name = recipe.name if recipe.name in recipes.list_aliases() else f"tuned/{stem}"
    name = f"{name}_tuned"
    path = recipes.LOCAL / f"{name}.yaml"
    config = recipe.config | changes
    config |= {"output_dir": f"runs/{name}", "dataset_prepared_path": f"runs/{name}/prepared"}
    config = {key: value for key, value in config.items() if value is not None}
    if path.exists():
        if read_yaml(path) != config:
            raise WrongInput(f"{shown(path)} says something else; delete it to write the winner")
        return
    origin = [f"Found by a search that began with {recipe.name}"]
    rendering.write_local_recipe(name, config, version, origin)
    recipes.clear_caches()
    print(f"tune       {shown(path)}; make train RECIPE={name}")


def forget_tables() -> None:
    sources.tables.cache_clear()
    recipes.clear_caches()


def describe_counts(counts: Counter[str]) -> str:
    words = {"train": "train", "val": "validate", "test": "test"}
    parts = (f"{counts[side]:,} rows {word}" for side, word in words.items() if counts[side])
    return ", ".join(parts)


def fold_labels(answers: list[str], are_labels: bool) -> dict[str, str]:
    """{answer: label} of answers spelled in several ways, where they are labels once folded."""
    folded = turns.fold_spellings(Counter(answers))
    are_labels = are_labels or bool(find_labels([folded.get(answer, answer) for answer in answers]))
    return folded if are_labels else {}


def print_untrained(train: Intake, test: Intake, folded: dict[str, str]) -> None:
    """Prints the labels of test rows that no row of the main file has."""
    trained = {folded.get(answer, answer) for answer in train.list_answers()}
    missing = {folded.get(answer, answer) for answer in test.list_answers()} - trained
    if missing:
        names = spell_out(", ".join(sorted(missing)[:8]))
        print(f"new        no training row has these labels of the test rows: {names}")


def fold_answer(line: bytes, folded: dict[str, str]) -> bytes:
    chat = orjson.loads(line)
    last = chat["messages"][-1]
    if last["content"] not in folded:
        return line
    last["content"] = folded[last["content"]]
    return orjson.dumps(chat, option=orjson.OPT_APPEND_NEWLINE)


def build_settings(longest: int, rows: int, validated: bool) -> dict[str, Any]:
    """Batch, length and steps that follow from the rows; `longest` is a row's in bytes.

    A token is a byte at least, so rows of fewer bytes than sequence_len fit every base. Validation
    and saving fall on the same steps, so that the run can be the checkpoint that validates best.
    """
    limit = recipes.read_matrix()["common"]["sequence_len"]
    room = LENGTH_STEP * math.ceil((longest + TEMPLATE_BYTES) / LENGTH_STEP)
    tokens = longest / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
    micro_batch, accumulation = (8, 2) if tokens <= 512 else (4, 4) if tokens <= 1024 else (1, 8)
    if rows < FEW_ROWS:
        accumulation //= 2
    steps = math.ceil(rows / (micro_batch * accumulation))
    epochs = next(epochs for most, epochs in EPOCHS.items() if rows <= most)
    epochs = max(epochs, min(MOST_EPOCHS, math.ceil(LEAST_STEPS / steps)))
    every = max(1, steps * epochs // max(4, epochs))
    return {
        "num_epochs": epochs,
        "max_steps": None,
        "micro_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "sequence_len": min(limit, room),
        "save_steps": every,
        "eval_steps": every if validated else None,
        "load_best_model_at_end": True if validated else None,
    }
