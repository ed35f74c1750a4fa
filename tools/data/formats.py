"""Opens the rows that people have, in whatever format: recognized by content, read row by row.

    rows = open_rows("my.csv.gz")                 or "hf:owner/name:test"
    rows.format, rows.columns, rows.notes
    for place, row in rows:                       "line 3", {"text": …} or a ValueError

Memory does not grow with the file. A row that cannot be read comes as a ValueError that says why,
and the rest goes on; a file that cannot be read as a whole raises WrongInput.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from tools.common import WrongInput, read_json, refuse_other_content, shown
from tools.data import hub_rows, tables
from tools.data.encodings import HEAD, Text, inspect_text, open_bytes
from tools.data.jsonstream import LONGEST, WHITE, JsonStream, Malformed, parse_row

Row = dict[str, Any]
Reader = Callable[[], Iterator[tuple[str, Row | ValueError]]]

COLUMN_ROWS = 50  # rows of JSON whose keys are the columns
SENTENCE = re.compile(r"(?P<sentence>.+)@(?P<label>\w+)\s*")  # Financial PhraseBank
# Lists of an object that is a row.
TURNS = {
    *("messages", "conversations", "conversation", "history", "tools", "prompt", "completion"),
    *("choices", "options", "answers", "evidence", "context", "contexts", "contents"),
}
# First bytes of what is refused, and what to do instead.
OTHERS = {
    b"PK\x03\x04": "a zip or Excel file; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file of old; save the sheet as CSV",
    b"%PDF": "a PDF; rows are needed, such as CSV or JSONL",
    b"SQLite format 3": "a SQLite database; export the table as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it with `zstd -d`",
    b"BZh": "packed with bzip2; unpack it with `bunzip2`",
    b"\xfd7zXZ": "packed with xz; unpack it with `unxz`",
    b"\x89HDF": "an HDF5 file; export the table as CSV or parquet",
    b"Obj\x01": "an Avro file; export the table as CSV or parquet",
    b"ORC": "an ORC file; export the table as CSV or parquet",
    b"\x80\x04": "a pickle, which can run code; save the rows as CSV, JSONL or parquet",
    b"\x80\x05": "a pickle, which can run code; save the rows as CSV, JSONL or parquet",
}


@dataclass
class RowFile:
    """Rows of a file, a folder or a dataset of the Hub; iterating again reads them again."""

    source: str
    format: str  # jsonl, json, csv, tsv, parquet, arrow, sentences or hub
    columns: list[str]
    read: Reader
    encoding: str = "utf-8"
    label_names: dict[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns
    splits: list[str] = field(default_factory=list)  # names of the dataset's other splits
    notes: list[str] = field(default_factory=list)  # sentences that its user should read
    revision: str | None = None  # the commit of a dataset of the Hub
    table: tables.Table | None = None  # how a text table is written
    schema: Any = None  # the pyarrow.Schema of columnar files

    @property
    def name(self) -> str:
        """The source as messages show it."""
        return self.source if self.format == "hub" else shown(Path(self.source))

    def __iter__(self) -> Iterator[tuple[str, Row | ValueError]]:
        return self.read()

    def open_split(self, split: str) -> "RowFile":
        """The rows of another split of the same dataset."""
        if split not in self.splits:
            others = ", ".join(self.splits) or "none"
            raise WrongInput(f"{self.name} has no split {split}; its other splits: {others}")
        if self.format == "hub":
            return open_hub(hub_rows.name_split(self.source, split))
        return open_rows(str(Path(self.source).with_name(split)))


def open_rows(source: str) -> RowFile:
    """The rows of a path, or of `hf:owner/name[:split]`; raises WrongInput for what is neither."""
    if source.startswith("hf:"):
        return open_hub(source)
    if "://" in source:
        raise WrongInput(
            f"{source}: addresses are not read; download the file, or name hf:owner/name"
        )
    path = Path(os.path.expanduser(source))  # Path's own raises for an unknown user
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise WrongInput(f"{shown(path)} is not there; a file of rows or hf:owner/name is needed")
    with open_bytes(path) as file:
        head = file.read(HEAD)
    refuse_others(head, shown(path))
    is_parquet = head.startswith(b"PAR1")
    if is_parquet or head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        with open(path, "rb") as file:
            if file.read(6) != head[:6]:
                raise WrongInput(
                    f"{shown(path)}: parquet or Arrow in gzip; unpack it with `gunzip`"
                )
        return open_parquet(path) if is_parquet else open_arrow(path, [path])
    return open_text(inspect_text(path))


def refuse_others(head: bytes, name: str) -> None:
    """Raises WrongInput for a file whose first bytes belong to no supported format."""
    if not head.strip(b" \t\r\n\0\xef\xbb\xbf\xfe\xff"):
        raise WrongInput(f"{name}: the file is empty; rows are needed")
    for start, advice in OTHERS.items():
        if head.startswith(start):
            raise WrongInput(f"{name}: this is {advice}")
    refuse_other_content(head, name)


# ---- Text


def open_text(text: Text) -> RowFile:
    """The rows of JSON, of sentences with labels, or of a text table."""
    lines = [line for line in tables.read_head(text) if line.strip(WHITE)]
    start = lines[0].lstrip(WHITE)[:1] if lines else ""
    if start == "[":
        rows = open_json(text, read_list)
    elif lines[1:] and sum(map(is_object, lines[:COLUMN_ROWS])) * 2 >= len(lines[:COLUMN_ROWS]):
        rows = RowFile(str(text.path), "jsonl", [], lambda: read_lines(text))
    elif start == "{":
        rows = open_object(text)
    elif all(map(SENTENCE.fullmatch, map(str.strip, lines[:COLUMN_ROWS]))):
        columns = ["sentence", "label"]
        rows = RowFile(str(text.path), "sentences", columns, lambda: read_sentences(text))
    else:
        table = tables.inspect_table(text, shown(text.path))
        kind = "tsv" if table.delimiter == "\t" else "csv"
        rows = RowFile(str(text.path), kind, table.header, lambda: tables.read_table(text, table))
        rows.table, rows.notes = table, [*table.notes]
    rows.encoding = text.encoding
    rows.notes += [text.note] if text.note else []
    if rows.format in ("jsonl", "json"):
        head = (row for _, row in islice(rows, COLUMN_ROWS) if isinstance(row, dict))
        rows.columns = list(dict.fromkeys(key for row in head for key in row))
    return rows


def is_object(line: str) -> bool:
    """Whether a line is a JSON object, with or without a fault that refuses the row."""
    line = line.strip(WHITE)
    if not (line.startswith("{") and line.endswith("}")):
        return False
    try:
        return isinstance(json.loads(line, strict=False), dict)
    except (ValueError, RecursionError):
        return False


def read_lines(text: Text) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of JSONL."""
    number = 0
    with text.open() as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                while line and line[-1] not in "\r\n":
                    line = file.readline(LONGEST)
                yield f"line {number}", ValueError("longer than 16 MB; one row stands on one line")
            elif line.strip(WHITE):
                try:
                    yield f"line {number}", parse_row(line)
                except ValueError as error:
                    yield f"line {number}", error


def read_sentences(text: Text) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of Financial PhraseBank's text files, `sentence@label`."""
    with text.open() as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
            if not line.strip():
                continue
            parts = SENTENCE.fullmatch(line.strip())
            row: Row | ValueError = parts.groupdict() if parts else ValueError("no @label ends it")
            yield f"line {number}", row


def open_json(text: Text, take_rows: Callable[[JsonStream], Iterator[Any]]) -> RowFile:
    """The rows that `take_rows` takes from a JSON text."""

    def read() -> Iterator[tuple[str, Row | ValueError]]:
        with text.open() as file:
            try:
                for number, row in enumerate(take_rows(JsonStream(file)), 1):
                    yield f"row {number}", row
            except Malformed as error:
                raise WrongInput(f"{shown(text.path)}, {error}") from None

    return RowFile(str(text.path), "json", [], read)


def read_list(stream: JsonStream) -> Iterator[Any]:
    yield from stream.take_list()
    stream.require_end()


def read_objects(stream: JsonStream) -> Iterator[Any]:
    while stream.peek():
        yield stream.take_value()


def open_object(text: Text) -> RowFile:
    """The rows of objects that follow each other, of the list in a single object, or that one."""
    members = dict[str, str]()  # what the object holds: rows, an object, or else
    try:
        with text.open() as file:
            stream = JsonStream(file)
            for key in stream.take_members():
                if stream.peek() == "[":
                    head = list(islice(values := stream.take_list(), 1))
                    is_rows = key not in TURNS and head and isinstance(head[0], dict)
                    members[key] = "rows" if is_rows else "values"
                    for _ in values:
                        pass
                else:
                    value = stream.take_value(strict=False)
                    members[key] = "object" if isinstance(value, dict) else "value"
            follows = stream.peek()
    except Malformed as error:
        raise WrongInput(f"{shown(text.path)}, {error}") from None
    lists = [key for key, content in members.items() if content == "rows"]
    kinds = set(members.values())
    is_columns = kinds == {"object"} or (
        kinds == {"values"} and len(members) > 1 and not TURNS & members.keys()
    )
    if follows or not (lists or is_columns):
        return open_json(text, read_objects)
    if len(lists) != 1:
        what = f"several lists of rows ({', '.join(lists)})" if lists else "columns and no rows"
        raise WrongInput(
            f"{shown(text.path)}: one object with {what}; its keys are {', '.join(members)[:100]}. "
            "Put each list of rows into a file of its own (pandas: orient='records')"
        )
    return open_member(text, lists[0], [key for key in members if key != lists[0]])


def open_member(text: Text, name: str, others: list[str]) -> RowFile:
    """The rows of the list `name` in a single object; the other members are not read."""

    def read_rows(stream: JsonStream) -> Iterator[Any]:
        for key in stream.take_members():
            if key == name:
                yield from stream.take_list()
            else:
                stream.take_value(strict=False)

    rows = open_json(text, read_rows)
    rest = f"; {', '.join(others)[:80]} beside it is not read" if others else ""
    rows.notes.append(f'the rows are the list "{name}"{rest}')
    return rows


# ---- Columnar files


def open_parquet(path: Path) -> RowFile:
    from pyarrow import ArrowException, parquet

    def read_tables() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1000)

    try:
        schema = parquet.read_schema(path)
    except (ArrowException, OSError) as error:
        raise damaged(path, error) from None
    return open_columns(str(path), "parquet", schema, lambda: guard(path, read_tables()))


def open_arrow(source: Path, files: list[Path]) -> RowFile:
    """The rows of Arrow files, of the format with random access or of the stream's."""
    import pyarrow
    from pyarrow import ipc

    def read_file(path: Path) -> Iterator[Any]:
        with open(path, "rb") as file:
            is_stream = not file.read(6).startswith(b"ARROW1")
        with pyarrow.OSFile(str(path)) as file:
            if is_stream:
                yield from ipc.open_stream(file)
            else:
                reader = ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))

    def read_batches() -> Iterator[Any]:
        for path in files:
            for batch in guard(path, read_file(path)):
                for start in range(0, batch.num_rows, 1000):
                    yield batch.slice(start, 1000)

    first = next(read_batches(), None)
    if first is None:
        raise WrongInput(f"{shown(source)}: the file is empty; rows are needed")
    return open_columns(str(source), "arrow", first.schema, read_batches)


def guard(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of a file; a damaged one raises WrongInput."""
    from pyarrow import ArrowException

    try:
        yield from batches
    except (ArrowException, OSError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> WrongInput:
    reason = str(error).splitlines()[0][:120]
    return WrongInput(f"{shown(path)}: cut off or damaged ({reason}); download or write it again")


def open_columns(
    source: str, kind: str, schema: Any, read_batches: Callable[[], Iterator[Any]]
) -> RowFile:
    """The rows of record batches, with the names of their labels."""

    def read() -> Iterator[tuple[str, Row | ValueError]]:
        number = 0
        for batch in read_batches():
            try:
                batch_rows = batch.to_pylist()
            except (OverflowError, ValueError, KeyError):
                refuse_column(batch, shown(Path(source)))
                raise
            for row in batch_rows:
                number += 1
                yield f"row {number}", row | {name: shorten(row[name]) for name in short_floats}

    short_floats = [field.name for field in schema if str(field.type) == "float"]
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise WrongInput(f'{shown(Path(source))}: the column "{twice[0]}" occurs twice; rename one')
    rows = RowFile(source, kind, schema.names, read, schema=schema)
    rows.label_names = read_label_names(schema.metadata or {})
    return rows


def refuse_column(batch: Any, name: str) -> None:
    """Raises WrongInput that names the column of a batch whose values Python cannot hold."""
    for column in batch.schema.names:
        try:
            batch.column(column).to_pylist()
        except (OverflowError, ValueError, KeyError) as error:
            raise WrongInput(
                f'{name}: the column "{column}" cannot be read ({str(error)[:80]}); leave it out, '
                "or write it as text"
            ) from None


def shorten(value: float | None) -> float | None:
    """A number of 32 bits with the digits that it was written with: 0.1, not 0.10000000149."""
    return None if value is None else float(str(numpy.float32(value)))


def read_label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """{column: names} of the ClassLabel features that `datasets` keeps with a schema, or of lists
    of them.
    """
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        lists = {name: f[0] if isinstance(f, list) else f for name, f in features.items()}
        labels = {name: feature.get("feature", feature) for name, feature in lists.items()}
        return {
            name: list(map(str, label["names"]))
            for name, label in labels.items()
            if label.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


# ---- Folders and the Hub


def open_folder(path: Path) -> RowFile:
    """The rows of a folder that `datasets.save_to_disk` wrote."""
    splits_file, state_file = path / "dataset_dict.json", path / "state.json"
    if splits_file.is_file():
        splits = read_member(splits_file, "splits")
        chosen = "train" if "train" in splits else next(iter(splits), "")
        if not chosen:
            raise WrongInput(f"{shown(path)} has no split")
        rows = open_folder(path / chosen)
        rows.notes.append(f"the split {chosen} is read; DATA={shown(path)}/… names another")
        return rows
    if not state_file.is_file():
        inside = sorted(p.name for p in path.iterdir() if p.is_file() and p.name[0] != ".")
        hint = f"; name a file, such as {shown(path / inside[0])}" if inside else ""
        raise WrongInput(
            f"{shown(path)} is a folder that `datasets.save_to_disk` did not write{hint}"
        )
    names = [str(entry["filename"]) for entry in read_member(state_file, "_data_files")]
    files = [path / Path(name).name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise WrongInput(f"{shown(missing[0])} is missing, which {shown(state_file)} names")
    rows = open_arrow(path, files)
    siblings = path.parent / "dataset_dict.json"
    if siblings.is_file():
        rows.splits = [name for name in read_member(siblings, "splits") if name != path.name]
    return rows


def read_member(path: Path, key: str) -> list[Any]:
    value = read_json(path).get(key)
    if not isinstance(value, list):
        raise WrongInput(f'{shown(path)}: "{key}" must be a list; write the dataset again')
    return value


def open_hub(source: str) -> RowFile:
    """The rows of a dataset of the Hub, streamed at a commit."""
    dataset = hub_rows.find_dataset(source)
    rows = RowFile(dataset.source, "hub", dataset.read_columns(), dataset.read)
    rows.splits, rows.notes = dataset.other_splits, dataset.notes
    rows.revision, rows.schema = dataset.revision, dataset.schema
    if rows.schema:
        rows.label_names = read_label_names(rows.schema.metadata or {})
    return rows
