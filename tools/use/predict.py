"""Answers the rows of a file: any format in, the same format out, with the answers in new columns.

    python -m tools predict smollm2-135m/sentiment_r4 --data headlines.csv --out labelled.csv

Prompts are made as in training: by the shape that `make new` recorded with the task, or as MAP= and
TEMPLATE= say. Answers are read as `make eval` reads them. Each row gets its answer in the column
`predicted` and, where the backend gives them, the probability of each label. Answers are saved row
by row beside OUT, so the same command continues where it was interrupted.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.answers import Prompts
from evals.backends import BACKENDS
from evals.choices import allow_labels, widen_budget
from evals.run import find_rows, naming_refusal, read_labels, read_tasks
from tools import adapters, models, sources
from tools.common import JobFailed, WrongInput, check_name, digest, quiet, shown, spell_out
from tools.data.formats import Row, RowFile, open_rows
from tools.data.recognize import FINLORA_PROMPT, FINLORA_START, parse_map, recognize
from tools.data.shapes import Shape
from tools.data.writers import choose_form, write_rows
from tools.subjects import Subject

if TYPE_CHECKING:
    from evals.endpoint import Endpoint

CHUNK = 1024  # rows that a model gets at a time
BUDGET = 200  # tokens of an answer, where no task says how many
LISTED = 10  # rows without an answer that are named
SECONDS = 5  # between two lines of progress
NO_TASK: dict[str, Any] = {
    "process_results": "",
    "filter_list": [{"name": "text", "filter": [{"function": "take_first"}]}],
    "generation_kwargs": {"max_gen_toks": BUDGET, "do_sample": False, "until": []},
}


@dataclass(frozen=True)
class Request:
    """Which rows are answered, where the answers go, and how prompts are made."""

    data: str
    out: Path
    task: str | None = None  # whose labels and wording count; the adapter's if omitted
    mapping: str | None = None
    template: str | None = None
    backend: str = "transformers"
    force: bool = False
    constrain: bool = False  # answers can only be labels


@dataclass(frozen=True)
class Reading:
    """How answers are read: the dataset whose evaluation says so, if any, and its labels."""

    dataset: str | None

    @cached_property
    def content(self) -> dict[str, Any]:
        return read_tasks()[self.dataset] if self.dataset else NO_TASK

    @cached_property
    def labels(self) -> list[str]:
        """The labels whose probabilities are measured, as `make eval` does."""
        return read_labels(self.dataset) if self.dataset else []

    def read_answers(self, texts: list[str]) -> list[str]:
        """What `make eval` takes from the texts of a model."""
        from lm_eval.api.instance import Instance
        from lm_eval.filters import build_filter_ensemble

        import evals.tasks.own  # noqa: F401 (registers the filter `own_label`)
        from evals.tasks import utils

        first = self.content["filter_list"][0]
        steps = [
            (s["function"], {k: v for k, v in s.items() if k != "function"})
            for s in first["filter"]
        ]
        instances = [Instance("generate_until", {}, ("",), 0, resps=[text]) for text in texts]
        if instances:
            build_filter_ensemble(first["name"], steps).apply(instances)
        answers = [instance.filtered_resps[first["name"]].strip() for instance in instances]
        spellings = {utils.normal(label): label for label in self.labels}
        return [spellings.get(utils.normal(answer), answer) for answer in answers]


def find_task(task: str | None) -> dict[str, Any]:
    """The row of a task in the tables; of a dataset, that of the first task scored on it."""
    if task is None:
        return {"eval": []}
    tables = sources.tables()
    check_name("task", task, {**tables["tasks"], **tables["datasets"]})
    if task in tables["tasks"]:
        return dict(tables["tasks"][task])
    owners = (row for row in tables["tasks"].values() if task in row["eval"])
    return next(owners, {}) | {"eval": [task]}


def find_shape(rows: RowFile, task_row: dict[str, Any], request: Request) -> Shape:
    """Which columns make the prompts: as in training, but for what MAP= and TEMPLATE= say.

    A task of `make new` has recorded its `shape`; where that is of turns, a file without them goes
    by its own columns. A task of the catalogue may have a `wording` for plain texts, where its own
    rows hold whole prompts.
    """
    mapping = parse_map(request.mapping) if request.mapping else {}
    recorded = task_row.get("shape")
    turns = (recorded or {}).get("columns", {}).get("messages")
    if not recorded or "messages" in mapping or (turns and turns not in rows.columns):
        shape = recognize(rows, mapping or None, request.template)
        wording = task_row.get("wording")
        if wording and request.template is None and holds_texts(shape, rows):
            shape = Shape(**shape.to_dict() | {"template": wording})
        return shape
    content = recorded | {"columns": recorded["columns"] | mapping}
    if "choices" in mapping:
        content.pop("choice_columns", None)
    if request.template is not None:
        shape = Shape(**content | {"template": None}).word(request.template, rows.columns)
    else:
        shape = Shape(**content)
    if missing := shape.list_missing(rows):
        parts = (part for part in shape.columns if {*shape.list_columns(part)} & {*missing})
        part = next(parts, "prompt")
        empty = ", or add it, empty where a row has none" if part == "context" else ""
        raise WrongInput(
            f"{rows.name} has no column {missing[0]}, which the prompts of {request.task} need; it "
            f'has {", ".join(rows.columns)[:200]}. MAP="{part}=…" names another{empty}'
        )
    if note := shape.note_missing(rows):
        rows.notes.append(note)
    return shape.add_choices(rows)


def holds_texts(shape: Shape, rows: RowFile) -> bool:
    """Whether rows hold plain texts, and neither turns nor FinLoRA's whole prompts."""
    column = shape.columns.get("prompt", FINLORA_PROMPT)
    first_row: Row = next((row for _, row in rows if isinstance(row, dict)), {})
    is_whole = str(first_row.get(column)).lstrip().startswith(FINLORA_START)
    return column.lower() != FINLORA_PROMPT and not is_whole


# ---- answers


@dataclass
class Saved:
    """The answers on the disk: a line for each row; chunks are in the order of the rows.

    A line is {"row": number from 0} with the answer, or with the error that the row has in place
    of one. It is valid for one identity.
    """

    path: Path
    identity: dict[str, Any]
    rows: int = 0  # that are saved, of chunks that are complete
    open_rows: dict[int, Row] = field(default_factory=dict)  # of the chunk that is not

    def load(self) -> None:
        """Goes on with what is saved for the same identity; a torn last line is dropped."""
        if not self.path.is_file():
            self.start()
            return
        lines, sound = 0, 0
        with open(self.path, "rb+") as file:
            for line in file:
                try:
                    content = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or (not sound and content != self.identity):
                    break
                sound += len(line)
                if "row" not in content:
                    continue
                lines += 1
                self.open_rows[content["row"]] = content
                if lines % CHUNK == 0:
                    self.open_rows.clear()
            file.truncate(sound)
        self.rows = lines // CHUNK * CHUNK
        if not sound:
            self.start()

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.identity) + "\n")

    def add(self, line: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def read_chunks(self) -> Iterator[list[Row]]:
        """The lines of each chunk, in the order of the rows."""
        with open(self.path, encoding="utf-8") as file:
            lines = (json.loads(line) for line in islice(file, 1, None))
            while chunk := list(islice(lines, CHUNK)):
                yield sorted(chunk, key=lambda line: int(line["row"]))


@dataclass
class Hook:
    """Saves each answer as the model gives it: lm-eval calls `add_partial`."""

    lm: Any
    numbers: dict[str, list[int]]  # rows by the prompt that they share
    save: Callable[[Row], None]

    def add_partial(self, kind: str, request: Any, answer: str) -> None:
        line: Row = {"answer": answer}
        if shares := getattr(self.lm, "probabilities", None):
            line["probabilities"] = shares.pop(0)
        if reason := getattr(self.lm, "refusals", {}).get(request[0]):
            line = {"error": reason}
        for number in self.numbers[request[0]]:
            self.save({"row": number, **line})


class Progress:
    """Prints how many rows are answered."""

    def __init__(self, total: int | None, done: int):
        self.total, self.first, self.done = total, done, done
        self.start = self.last = time.monotonic()

    def count(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= SECONDS:
            self.last = now
            rate = (self.done - self.first) / max(now - self.start, 1e-3)
            total = f"/{self.total:,}" if self.total else ""
            text = f"predict    {self.done:,}{total} rows, {rate:.1f}/s"
            is_last = self.done == self.total
            end = "\n" if is_last or not sys.stdout.isatty() else ""
            print(f"\r{text:<60}" if sys.stdout.isatty() else text, end=end, flush=True)


class Job:
    """Answers the rows of a file."""

    def __init__(self, subject: "Subject | Endpoint", request: Request):
        task = request.task or subject.task
        self.subject, self.request = subject, request
        self.rows = open_rows(request.data)
        self.form = choose_form(self.rows, request.out)
        if request.out.exists():
            raise WrongInput(f"OUT={request.out} already exists; delete it or name another file")
        self.task_row = find_task(task)
        datasets = [name for name in self.task_row["eval"] if name in read_tasks()]
        self.reading = Reading(datasets[0] if datasets else None)
        self.choices = self.list_choices()
        self.shape = find_shape(self.rows, self.task_row, replace(request, task=task))
        path = request.out.absolute().with_name(f".{request.out.name}.partial.jsonl")
        self.saved = Saved(path, self.identify())

    def list_choices(self) -> list[str]:
        """The only answers of CONSTRAIN=1; none where answers are free."""
        if not self.request.constrain:
            return []
        dataset = self.reading.dataset
        labels = read_labels(dataset) if dataset and "parts" not in self.task_row else []
        if labels:
            return labels
        reason = f"{dataset} has none" if dataset else "no task is named; TASK= names it"
        if "parts" in self.task_row:
            reason = "the adapter has several tasks; TASK= names one of them"
        raise WrongInput(f"CONSTRAIN=1 limits answers to labels, and {reason}")

    def identify(self) -> dict[str, Any]:
        """What the answers depend on: saved ones count while this is the same."""
        subject, rows = self.subject, self.rows
        path = Path(rows.source)
        if rows.format == "hub":
            data = rows.source
        else:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            data = ",".join(digest(file) for file in files if file.is_file())
        if isinstance(subject, Subject):
            model: dict[str, Any] = {"config": subject.config}
            model |= {"adapter": adapters.identify(subject.adapter) if subject.adapter else None}
            model |= {"prompt_format": subject.prompt_format, "backend": self.request.backend}
        else:
            model = subject.identity()
        content = [data, model, self.shape.to_dict(), self.reading.content, self.reading.labels]
        content += [self.choices] if self.choices else []
        text = json.dumps(content, sort_keys=True, default=str)
        return {"identity": hashlib.sha256(text.encode()).hexdigest(), "chunk": CHUNK}

    def describe(self) -> int | None:
        """Prints what is answered and which rows have no prompt; returns the number of rows.

        Rows of the Hub are not read a second time for that.
        """
        rows = self.rows
        print(f"predict    {rows.name}: {rows.format}; {spell_out(self.shape.describe())}")
        for note in rows.notes:
            print(f"predict    {spell_out(note)}")
        if self.choices:
            print(f"predict    CONSTRAIN=1: an answer can only be {', '.join(self.choices)}")
        if not self.reading.dataset:
            print("predict    no task: answers are free text; TASK= names a task with labels")
        total, faults, example = 0, Counter[str](), ""
        for place, row in islice(rows, CHUNK if rows.format == "hub" else None):
            total += 1
            try:
                chat = self.build_prompt(row)
                example = example or str(chat["messages"][-1]["content"])
            except ValueError as error:
                faults[str(error)] += 1
                if faults.total() <= LISTED:
                    print(f"left out   {place}: {spell_out(str(error))}")
        if faults.total() > LISTED:
            reason, count = faults.most_common(1)[0]
            print(
                f"left out   {faults.total():,} rows in all; {count:,} of them: {spell_out(reason)}"
            )
        if not example:
            raise WrongInput(f"{rows.name}: no row has a prompt; {next(iter(faults), 'no row')}")
        print(f"predict    the first prompt: {spell_out(example[:200])}")
        for repair, count in (+self.shape.repairs).items():
            print(f"predict    {count:,} rows: {spell_out(repair)}")
        if usual := self.find_usual_prompt():
            print(f"predict    in training, a prompt was: {spell_out(usual[:200])}")
            print('predict    TEMPLATE="… {prompt} …" words these alike')
        return None if rows.format == "hub" else total

    def find_usual_prompt(self) -> str:
        """A prompt of the task's own rows, where nothing says how plain texts are worded."""
        dataset = self.reading.dataset
        is_worded = self.shape.template is not None or "shape" in self.task_row
        if not dataset or is_worded or not holds_texts(self.shape, self.rows):
            return ""
        try:
            path = find_rows(dataset)
            sources.manifest(path)
        except WrongInput:  # the rows are on another machine
            return ""
        from evals.tasks import own

        with open(path, "rb") as file:
            return own.write_prompt(json.loads(file.readline()))

    def build_prompt(self, row: Row | ValueError) -> dict[str, Any]:
        if isinstance(row, ValueError):
            raise row
        return self.shape.build_prompt(row)

    def answer(self, total: int | None) -> None:
        """Answers the rows that have no answer yet."""
        subject = self.subject
        self.saved.load()
        start = self.saved.rows + len(self.saved.open_rows)
        if start:
            print(f"predict    {start:,} rows are answered already")
        if start == total:
            return
        quiet()
        if isinstance(subject, Subject):
            models.bring_base(subject.config["base_model"])
        self.progress = Progress(total, start)
        side = "adapter" if isinstance(subject, Subject) and subject.adapter else "base"
        with BACKENDS[self.request.backend](subject)(side, "predict:", total or 0) as lm:
            lm.progress = lambda rows: None  # this job prints its own
            if self.reading.labels:
                lm.labels = self.reading.labels
            if self.choices:
                allow_labels(lm, self.choices)
            rows = islice(enumerate(self.rows), self.saved.rows, None)
            while chunk := list(islice(rows, CHUNK)):
                self.answer_chunk(lm, [(n, row) for n, (_, row) in chunk])
                self.saved.open_rows.clear()

    def answer_chunk(self, lm: Any, chunk: list[tuple[int, Row | ValueError]]) -> None:
        from lm_eval.api.instance import Instance

        from evals.tasks import own

        settings = self.reading.content["generation_kwargs"]
        settings = widen_budget(settings, self.choices) if self.choices else settings
        writer = Prompts(self.subject.prompt_format, self.subject.options)
        contents = {}
        for number, row in chunk:
            if number in self.saved.open_rows:
                continue
            try:
                chat = self.build_prompt(row)
            except ValueError as error:
                self.save({"row": number, "error": str(error)})
                continue
            doc = chat | {"messages": [*chat["messages"], {"role": "assistant", "content": ""}]}
            contents[number] = own.write_prompt(doc)
            writer.rows[contents[number]] = doc
        writer.attach(lm, settings["max_gen_toks"])
        numbers: dict[str, list[int]] = {}
        for number, content in contents.items():
            text = lm.apply_chat_template([{"role": "user", "content": content}])
            numbers.setdefault(text, []).append(number)
        if not numbers:
            return
        lm.rows, lm.done = len(numbers), 0
        lm.set_cache_hook(Hook(lm, numbers, self.save))
        texts = list(numbers)
        lm.generate_until(
            [
                Instance("generate_until", {}, (text, dict(settings)), n)
                for n, text in enumerate(texts)
            ]
        )
        for text, tokens in writer.cut.items():
            for number in numbers.get(text, ()):
                print(f"predict    row {number + 1}: {tokens} tokens of its prompt do not fit")

    def save(self, line: Row) -> None:
        self.saved.add(line)
        self.progress.count()

    # ---- output

    def write(self) -> tuple[int, int, str]:
        """Writes OUT; returns (rows with an answer, rows without, the first of those)."""
        errors, answered, first = 0, 0, ""
        labels = list[str]()
        places = (place for place, _ in self.rows)
        for chunk in self.saved.read_chunks():
            # In the other order, zip would take a place too many at the end of each chunk.
            for line, place in zip(chunk, places, strict=False):
                if "error" in line:
                    errors += 1
                    first = first or f"{place}: {line['error']}"
                    continue
                answered += 1
                labels = labels or list(line.get("probabilities", ()))
        names = self.name_columns(labels, bool(errors))
        added: dict[str, type] = {name: float for name in names.values()}
        added |= {names[key]: str for key in ("answer", "error") if key in names}
        write_rows(self.rows, self.form, added, self.pair_rows(names, labels))
        return answered, errors, first

    def name_columns(self, labels: list[str], with_errors: bool) -> dict[str, str]:
        """The columns that are added, by what they hold, with a number where a name is taken."""
        wanted = {"answer": "predicted"} | {f"p:{label}": f"p_{label}" for label in labels}
        wanted |= {"error": "predicted_error"} if with_errors else {}
        for number in range(1, 1000):
            end = f"_{number}" if number > 1 else ""
            names = {key: name + end for key, name in wanted.items()}
            if not set(names.values()) & set(self.rows.columns):
                return names
        raise WrongInput(f"{self.rows.name} has a thousand columns such as predicted; rename them")

    def pair_rows(self, names: dict[str, str], labels: list[str]) -> Iterator[tuple[Row, Row]]:
        """Each row that can be read, with the values to add to it."""
        rows = (row for _, row in self.rows)
        for chunk in self.saved.read_chunks():
            texts = [line["answer"] for line in chunk if "error" not in line]
            answers = iter(self.reading.read_answers(texts))
            for line, row in zip(chunk, rows, strict=False):
                if "error" in line:
                    values: Row = dict.fromkeys(names.values()) | {names["error"]: line["error"]}
                else:
                    values = {names["answer"]: next(answers)}
                    shares = line.get("probabilities") or {}
                    values |= {names[f"p:{label}"]: shares.get(label) for label in labels}
                    values |= {names["error"]: None} if "error" in names else {}
                if isinstance(row, dict):
                    yield row, values


def predict(subject: "Subject | Endpoint", request: Request) -> None:
    """Writes OUT; raises JobFailed at the end where rows have no answer."""
    from filelock import FileLock, Timeout

    job = Job(subject, request)
    total = job.describe()
    lock = FileLock(job.saved.path.with_suffix(".lock"), timeout=0)
    with naming_refusal(request.out):
        request.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock:
                if request.force:
                    job.saved.path.unlink(missing_ok=True)
                job.answer(total)
                answered, errors, first = job.write()
                job.saved.path.unlink()
        except Timeout:
            raise WrongInput(f"another job is writing OUT={request.out}; wait for it") from None
    Path(lock.lock_file).unlink(missing_ok=True)
    print(f"predict    {answered:,} rows are answered, in {shown(request.out)}")
    if errors:
        raise JobFailed(
            f"{errors:,} of {answered + errors:,} rows have no answer; {spell_out(first)}"
        )
