"""Writes rows in the format that they were read in, with columns added to each.

    form = choose_form(rows, Path("labelled.csv.gz"))
    write_rows(rows, form, {"predicted": str}, pairs)      pairs of a row and the values to add

A file appears whole or not at all, and memory does not grow with it.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tools.common import WrongInput, atomic
from tools.data.formats import Row, RowFile

BATCH = 1000  # rows that are written at a time
SUFFIXES = {
    **{".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
    **{".parquet": "parquet", ".arrow": "arrow"},
}
# The formats that can hold the rows of each format.
TEXT = ("csv", "tsv", "jsonl", "json")
COLUMNS = (*TEXT, "parquet", "arrow", "folder")
HOLDING = {
    **{"jsonl": ("jsonl", "json"), "json": ("jsonl", "json")},
    **{"csv": TEXT, "tsv": TEXT, "sentences": TEXT, "parquet": COLUMNS, "arrow": COLUMNS},
}
Pairs = Iterable[tuple[Row, Row]]


@dataclass(frozen=True)
class Form:
    """Where rows are written to, and how."""

    path: Path
    kind: str  # a value of SUFFIXES, or folder
    packed: bool  # with gzip


def choose_form(rows: RowFile, path: Path) -> Form:
    """The format of DATA, or the one that the suffix of OUT names; raises WrongInput."""
    packed = path.suffix == ".gz"
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    kind = {"sentences": "csv", "hub": "jsonl"}.get(rows.format, rows.format)
    if rows.format == "arrow" and Path(rows.source).is_dir():
        kind = "folder"
    is_lines = kind == "jsonl" and suffix == ".json" and rows.source.endswith((".json", ".json.gz"))
    if suffix in SUFFIXES and not is_lines:
        kind = SUFFIXES[suffix]
    elif kind != "folder" and suffix != ".txt" and re.fullmatch(r"\.[a-z]{2,8}", suffix):
        raise WrongInput(
            f"OUT={path}: {suffix} is none of the formats that are written: {', '.join(SUFFIXES)}"
        )
    holding = HOLDING.get(rows.format, COLUMNS if rows.schema else ("jsonl", "json"))
    if kind not in holding:
        raise WrongInput(
            f"OUT={path}: rows of {rows.format} are not written as {kind}; these are possible: "
            f"{', '.join(holding)}"
        )
    if packed and kind not in TEXT:
        raise WrongInput(f"OUT={path}: {kind} has a compression of its own; leave .gz out")
    return Form(path, kind, packed)


def write_rows(rows: RowFile, form: Form, added: dict[str, type], pairs: Pairs) -> None:
    """Writes each row with the values that are added to it; `added` are their columns."""
    if form.kind in TEXT:
        with atomic(form.path) as file, pack(file, form.packed) as packed:
            if form.kind in ("csv", "tsv"):
                write_table(packed, rows, form, list(added), pairs)
            else:
                write_json_rows(packed, form.kind, pairs)
        return
    schema = extend_schema(rows.schema, added)
    tables = read_batches(pairs, schema)
    if form.kind == "folder":
        write_folder(form.path, schema, tables)
        return
    with atomic(form.path) as file:
        write_columns(file, form.kind, schema, tables)


@contextmanager
def pack(file: IO[bytes], packed: bool) -> Iterator[IO[bytes]]:
    if not packed:
        yield file
        return
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as compressed:
        yield compressed  # type: ignore[misc]


def write_table(file: IO[bytes], rows: RowFile, form: Form, added: list[str], pairs: Pairs) -> None:
    """CSV or TSV, with the delimiter, line ends and Unicode encoding of the rows' own file."""
    table = rows.table if rows.format == form.kind else None
    delimiter = table.delimiter if table else {"csv": ",", "tsv": "\t"}[form.kind]
    encoding = rows.encoding if "utf" in rows.encoding and "latin" not in rows.encoding else "utf-8"
    text = io.TextIOWrapper(file, encoding=encoding, newline="", write_through=True)
    line_end = table.line_end if table else "\n"
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end)
    writer.writerow([*rows.columns, *added])
    for row, values in pairs:
        cells = [*(row.get(name) for name in rows.columns), *(values.get(name) for name in added)]
        writer.writerow([write_cell(cell) for cell in cells])
    text.flush()
    text.detach()


def write_cell(value: Any) -> str:
    if value is None:
        return ""
    return dump_json(value) if isinstance(value, dict | list) else str(value)


def dump_json(value: Any) -> str:
    """JSON in one line; NaN and infinity, which it does not have, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(value, ensure_ascii=False, default=str)
        return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def write_json_rows(file: IO[bytes], kind: str, pairs: Pairs) -> None:
    """One row a line, or a list with one row a line."""
    lines = (dump_json(row | values).encode() for row, values in pairs)
    if kind == "jsonl":
        file.writelines(line + b"\n" for line in lines)
        return
    separator = b"[\n"
    for line in lines:
        file.write(separator + line)
        separator = b",\n"
    file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


# ---- Columnar files


def extend_schema(schema: Any, added: dict[str, type]) -> Any:
    """A schema with columns added, which its own metadata of `datasets` names, too."""
    import pyarrow

    types = {str: ("string", pyarrow.string()), float: ("float64", pyarrow.float64())}
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        content = json.loads(metadata[b"huggingface"])
        features = content.get("info", {}).get("features")
        if isinstance(features, dict):
            for name, kind in added.items():
                features[name] = {"dtype": types[kind][0], "_type": "Value"}
            metadata[b"huggingface"] = json.dumps(content).encode()
    for name, kind in added.items():
        schema = schema.append(pyarrow.field(name, types[kind][1]))
    return schema.with_metadata({k: v for k, v in metadata.items() if k != b"pandas"})


def read_batches(pairs: Pairs, schema: Any) -> Iterator[Any]:
    import pyarrow

    merged = (row | values for row, values in pairs)
    while batch := list(islice(merged, BATCH)):
        yield pyarrow.RecordBatch.from_pylist(batch, schema=schema)


def write_columns(file: IO[bytes], kind: str, schema: Any, batches: Iterable[Any]) -> None:
    from pyarrow import ipc, parquet

    if kind == "arrow":
        with ipc.new_stream(file, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        return
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_folder(folder: Path, schema: Any, batches: Iterator[Any]) -> None:
    """A folder as `datasets.save_to_disk` writes it."""
    from datasets import Dataset

    first = list(islice(batches, 1))
    with TemporaryDirectory(dir=folder.absolute().parent, prefix=".rows.") as place:
        path = Path(place) / "rows.arrow"
        with open(path, "wb") as file:
            write_columns(file, "arrow", schema, chain(first, batches))
        Dataset.from_file(str(path)).save_to_disk(Path(place) / "saved")
        (Path(place) / "saved").rename(folder)
