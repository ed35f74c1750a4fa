"""Reads text tables (CSV, TSV) row by row: the delimiter, quotes and header that a file shows.

    table = inspect_table(text, "my.csv")
    for place, row in read_table(text, table): …

A row with more or fewer cells than the header, or with a quote that is not closed, is refused and
the next line is read. Empty cells beyond the header, as spreadsheets write them into each row, do
not count.
"""

import csv
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tools.common import WrongInput
from tools.data.encodings import HEAD, Text

LONGEST = 16 * 2**20  # characters of a row
csv.field_size_limit(min(LONGEST, sys.maxsize))
HEAD_ROWS = 200  # rows that decide on the delimiter
LONGEST_NAME, MOST_WORDS = 60, 6  # of a column; longer ones are text
YEAR = re.compile("(19|20)[0-9]{2}")  # names a column of figures
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)*%?")
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "|"}
# Quotes are doubled inside of quoted cells (the standard), escaped by \, or plain characters.
DOUBLED: dict[str, Any] = {"doublequote": True}
ESCAPED: dict[str, Any] = {"doublequote": False, "escapechar": "\\"}
PLAIN: dict[str, Any] = {"quoting": csv.QUOTE_NONE}

# Number of the first line, cells, the lines.
Record = tuple[int, list[str] | ValueError, list[str]]


@dataclass(frozen=True)
class Table:
    """How a text table is written."""

    delimiter: str
    quotes: dict[str, Any]
    header: list[str]
    line_end: str
    notes: list[str]
    first: list[str] = field(default_factory=list)  # the header as it is written
    spare: int = 0  # empty cells beyond the header, in most rows
    suspects: list[int] = field(default_factory=list)  # lines with a quote that may not be closed


def read_records(lines: Iterator[str], delimiter: str, quotes: dict[str, Any]) -> Iterator[Record]:
    """The records of a table. Where a quote is not closed, the record is its first line."""
    again: deque[str] = deque()  # lines that come once more, after a record that broke off
    taken: list[str] = []
    number, size = 1, 0

    def feed() -> Iterator[str]:
        nonlocal size
        while True:
            line = again.popleft() if again else next(lines, "")
            if not line:
                return
            taken.append(line)
            size += len(line)
            if size > LONGEST:
                raise csv.Error("the row is longer than 16 MB")
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, strict=True, **quotes)
    while True:
        try:
            cells: list[str] | ValueError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = ValueError(explain_quote(str(error), taken))
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(feed(), delimiter=delimiter, strict=True, **quotes)
        if cells:  # a line that is not empty
            yield number, cells, taken
        number += len(taken)
        taken = []
        size = 0


def explain_quote(reason: str, lines: list[str]) -> str:
    if "16 MB" in reason:
        return reason
    if "expected after" in reason:
        return 'a quoted cell goes on after its closing "; double the quotes inside of a cell'
    return 'a " opens a cell and is not closed' if len(lines) else reason


def inspect_table(text: Text, name: str) -> Table:
    """The table in a text; raises WrongInput where there is none, or it has no header."""
    lines = read_head(text)
    choices = [(delimiter, DOUBLED) for delimiter in DELIMITERS] + [("\t", PLAIN)]
    if any('\\"' in line for line in lines):
        choices += [(delimiter, ESCAPED) for delimiter in DELIMITERS]
    scores = {}
    for number, (delimiter, quotes) in enumerate(choices):
        records = [cells for _, cells, _ in read_records(iter(lines), delimiter, quotes)]
        if not records or isinstance(records[0], ValueError):
            continue
        width = count_cells(records[0])
        whole = (cells for cells in records if isinstance(cells, list))
        fits = sum(count_cells(cells) <= width <= len(cells) for cells in whole)
        if width > 1:
            scores[number] = (fits / len(records), width)
    first = next((line for line in lines if line.strip()), "")
    if not scores:
        delimiter, quotes = ",", DOUBLED
    else:
        delimiter, quotes = choices[max(scores, key=lambda number: (scores[number], -number))]
    if quotes is DOUBLED and sum(f'{delimiter} "' in line for line in lines) * 2 > len(lines):
        quotes = DOUBLED | {"skipinitialspace": True}  # a space stands before the quotes
    records = [cells for _, cells, _ in read_records(iter(lines), delimiter, quotes)]
    rows = [cells for cells in records if isinstance(cells, list)]
    spare = trim_spare(rows) if rows else 0
    line_end = "\r\n" if first.endswith("\r\n") else "\n"
    header, notes = check_header(rows, name)
    refuse_other_delimiter(header, records, delimiter, name)
    written = [cell.strip() for cell in rows[0]]
    return Table(delimiter, quotes, header, line_end, notes, written, spare)


def count_cells(cells: list[str]) -> int:
    """The cells of a record up to the last that is not empty."""
    return max((place for place, cell in enumerate(cells, 1) if cell.strip()), default=0)


def trim_spare(rows: list[list[str]]) -> int:
    """Takes columns without a name and without a cell off a table's rows; returns how many empty
    cells most rows have there.
    """
    named = max(count_cells(rows[0]), 1)
    if any(count_cells(cells[: len(rows[0])]) > named for cells in rows[1:]):
        return 0
    del rows[0][named:]
    widths = Counter(len(cells) for cells in rows[1:] if count_cells(cells) <= named <= len(cells))
    spare = widths.most_common(1)[0][0] - named if widths else 0
    for cells in rows[1:]:
        trim(cells, named, spare)
    return spare


def trim(cells: list[str], width: int, spare: int) -> None:
    """Takes the cells beyond `width` off a record where they are empty and at most `spare`."""
    if len(cells) <= width + spare and count_cells(cells) <= width:
        del cells[width:]


def read_head(text: Text) -> list[str]:
    """The first lines of a text that are whole."""
    with text.open() as file:
        lines, size = list[str](), 0
        for line in islice(iter(lambda: file.readline(LONGEST), ""), HEAD_ROWS * 5):
            lines.append(line)
            size += len(line)
            if size > HEAD * 16:
                break
        return lines


def check_header(rows: list[list[str]], name: str) -> tuple[list[str], list[str]]:
    """The names of the columns, and notes on them; raises WrongInput where line 1 is a row."""
    if not rows:
        raise WrongInput(f"{name}: no table row is readable; JSONL, JSON or CSV is needed")
    header = [cell.strip() for cell in rows[0]]
    if header[0].lower().startswith("sep="):
        raise WrongInput(
            f'{name}: line 1 is Excel\'s "sep=" and not the names of columns; delete it'
        )
    missing = (
        f"{name}: line 1 looks like a row and not like the names of columns; put a header before "
        "it, such as text,label"
    )
    for place, cell in enumerate(header):
        others = (row for row in rows[1:] if len(row) == len(header) and row != rows[0])
        below = Counter(row[place].strip() for row in others)
        is_text = len(cell) > LONGEST_NAME or len(cell.split()) > MOST_WORDS or "\n" in cell
        is_number = NUMBER.fullmatch(cell) and not YEAR.fullmatch(cell)
        if is_text or is_number or (cell and below[cell] > 1):
            raise WrongInput(missing)
    notes = []
    if header[0] == "" and header.count("") == 1:
        header[0] = "index"
        notes.append('the first column has no name (an index of pandas); it is read as "index"')
    if "" in header:
        raise WrongInput(f"{name}: column {header.index('') + 1} has no name in line 1; name it")
    twice = [cell for cell, count in Counter(header).items() if count > 1]
    if twice:
        raise WrongInput(f'{name}: the column "{twice[0]}" occurs twice in line 1; rename one')
    if len(rows) == 1:
        raise WrongInput(f"{name}: there is no row below line 1, the names of the columns")
    return header, notes


def refuse_other_delimiter(
    header: list[str], records: list[list[str] | ValueError], delimiter: str, name: str
) -> None:
    """Raises WrongInput where most rows have another number of cells than the header."""
    widths = Counter(len(cells) for cells in records[1:] if isinstance(cells, list))
    if not widths:
        return
    width, count = widths.most_common(1)[0]
    if width != len(header) and count > len(records) / 2:
        raise WrongInput(
            f"{name}: by {DELIMITERS[delimiter]}, line 1 has the columns "
            f"{', '.join(header)[:80]}, and most rows have {width} of {len(header)} cells; write "
            "header and rows with the same delimiter, and quote cells that hold it"
        )


def looks_like_row(line: str, table: Table) -> bool:
    """Whether a line has as many cells as the header, none of them empty, quotes left aside."""
    cells = [cell.strip(' "\r\n') for cell in line.split(table.delimiter)]
    return len(cells) == len(table.header) and all(cells)


def read_table(text: Text, table: Table) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(place, row) of each row below the header; a row that is ragged is a ValueError."""
    width = len(table.header)
    with text.open() as file:
        lines = iter(lambda: file.readline(LONGEST + 1), "")
        table.suspects.clear()
        records = read_records(lines, table.delimiter, table.quotes)
        for number, cells, taken in islice(records, 1, None):
            if len(taken) > 1 and all(looks_like_row(line, table) for line in taken):
                table.suspects.append(number)
            if isinstance(cells, ValueError):
                yield f"line {number}", cells
                continue
            trim(cells, width, table.spare)
            texts = [cell.strip() for cell in cells]
            if texts == table.first:
                yield f"line {number}", ValueError("it repeats the header; take it out")
            elif not any(texts):
                continue  # an empty row of a spreadsheet
            elif len(cells) == width:
                yield f"line {number}", dict(zip(table.header, cells, strict=True))
            else:
                hint = "; quote cells that hold a " + DELIMITERS[table.delimiter]
                yield (
                    f"line {number}",
                    ValueError(
                        f"{len(cells)} cell{'s'[: len(cells) != 1]}, and the header has {width} "
                        f"({', '.join(table.header)[:80]}){hint if len(cells) > width else ''}"
                    ),
                )
