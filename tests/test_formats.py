"""Rows are read from whatever format people have, or refused in one clear sentence."""

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import run_first
from tools import common
from tools.common import WrongInput
from tools.data.formats import open_rows, read_label_names

CASES = common.ROOT.parent / "shared" / "cases" / "data"
ROW = '{"q": "Sales rose?", "a": "yes"}\n'


@pytest.fixture
def read(tmp_path):
    """Reads a file with some content: (RowFile, rows, {place: reason} of those refused)."""

    def read_content(content, name="rows"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = open_rows(str(path))
        pairs = list(rows)
        refused = {place: str(row) for place, row in pairs if isinstance(row, ValueError)}
        return rows, [row for _, row in pairs if isinstance(row, dict)], refused

    return read_content


# ---- formats by content


QA = [{"q": "Sales rose?", "a": "yes"}] * 3
CHAT = {"messages": [{"role": "user", "content": "a"}]}
READ = {
    "JSONL": (ROW * 3, "jsonl", QA),
    "JSONL with a byte order mark": (b"\xef\xbb\xbf" + ROW.encode() * 3, "jsonl", QA),
    "JSONL in UTF-16": ((ROW * 3).encode("utf-16"), "jsonl", QA),
    "JSONL in UTF-16 without a mark": ((ROW * 3).encode("utf-16-be"), "jsonl", QA),
    "JSONL in gzip": (gzip.compress(ROW.encode() * 3), "jsonl", QA),
    "JSONL with blank lines": (f"\n{ROW}\r\n{ROW}  \n{ROW}", "jsonl", QA),
    "a list": (json.dumps(QA), "json", QA),
    "an indented list": (json.dumps(QA, indent=2), "json", QA),
    "an empty text after a list": (json.dumps(QA) + "\n \n", "json", QA),
    "a list in an object": (json.dumps({"version": 1, "data": QA}), "json", QA),
    "indented objects": (json.dumps(CHAT, indent=1) * 2, "json", [CHAT] * 2),
    "a single chat row": (json.dumps(CHAT), "json", [CHAT]),
    "CSV with an object": ('q,a\nSales rose?,yes\n{},""\n', "csv", [*QA[:1], {"q": "{}", "a": ""}]),
    "CSV": ("q,a\nSales rose?,yes\n" * 1, "csv", QA[:1]),
    "CSV in gzip": (gzip.compress(b"q,a\nSales rose?,yes\n"), "csv", QA[:1]),
    "CSV of Excel": ("q;a\r\nSales rose?;yes\r\n".encode("utf-8-sig"), "csv", QA[:1]),
    "CSV of a Mac of old": ("q,a\rSales rose?,yes\r", "csv", QA[:1]),
    "TSV": ("q\ta\nSales rose?\tyes\n", "tsv", QA[:1]),
    "TSV with bare quotes": (
        'q\ta\n"Sales" rose\tyes\n',
        "tsv",
        [{"q": '"Sales" rose', "a": "yes"}],
    ),
    "quoted line ends": (
        'q,a\n"Sales\nrose, ""too""",yes\n',
        "csv",
        [{"q": 'Sales\nrose, "too"', "a": "yes"}],
    ),
    "escaped quotes": (
        'q,a\n"a \\"b\\", c",yes\nd,no\n',
        "csv",
        [{"q": 'a "b", c', "a": "yes"}, {"q": "d", "a": "no"}],
    ),
    "one column": (
        "headline\nSales rose\nSales fell\n",
        "csv",
        [{"headline": "Sales rose"}, {"headline": "Sales fell"}],
    ),
    "an index of pandas": (",q,a\n0,Sales rose?,yes\n", "csv", [{"index": "0"} | QA[0]]),
    "sentences with labels": (
        "Sales rose .@positive\na@b fell@negative\n",
        "sentences",
        [
            {"sentence": "Sales rose .", "label": "positive"},
            {"sentence": "a@b fell", "label": "negative"},
        ],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_format_is_recognized_by_its_content(name, read):
    content, kind, expected = READ[name]
    rows, dicts, refused = read(content)
    assert (rows.format, dicts, refused) == (kind, expected, {})
    assert rows.columns == list(expected[0])
    assert [row for _, row in rows] == expected  # it can be read again


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"
REFUSED = {
    "an empty file": (b"", "the file is empty"),
    "white space": (b" \n\n", "the file is empty"),
    "a pointer of Git LFS": (LFS_POINTER, "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html>", "this is a web page"),
    "a sheet of Excel": (b"PK\x03\x04\x14\x00", "zip or Excel file"),
    "a PDF": (b"%PDF-1.7", "this is a PDF"),
    "a pickle": (b"\x80\x04\x95", "a pickle, which can run code"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "packed with zstd"),
    "few bytes": (b"\x93\xff\x8eab\x00\xfe,\xf0\n1,2\n", "neither text nor a supported format"),
    "bytes": (bytes(range(256)) * 9, "neither text nor a supported format"),
    "gzip that is cut off": (gzip.compress(ROW.encode() * 999)[:-9], "cut off or damaged"),
    "parquet that is cut off": (b"PAR1abcPAR1", "cut off or damaged"),
    "prose": (
        "Sales rose by ten per cent in the last quarter.\nThey fell.\n",
        "line 1 looks like a row",
    ),
    "no header": (
        "Sales rose,up\nSales fell,down\nSales stood,up\nx,up\n",
        "put a header before it",
    ),
    "numbers for a header": ("1,2\n3,4\n", "line 1 looks like a row"),
    "a header alone": ("q,a\n", "there is no row below line 1"),
    "two columns of a name": ("q,q\na,b\n", 'the column "q" occurs twice'),
    "a column without a name": ("q,,a\n1,2,3\n", "column 2 has no name"),
    "another delimiter in the rows": (
        "q,a\nb;c\nd;e\nf;g\n",
        "by comma, line 1 has the columns q, a",
    ),
    "a list that is not closed": (
        '[{"q": "a"},\n{"q": "b"}',
        'line 2: not JSON: "," or "\\]" is expected, not the end of the file',
    ),
    "a list with a fault": ('[{"q": "a"},\n{"q": "b"\n{"q": "c"}]', "line 3: not JSON"),
    "text behind a list": ('[{"q": "a"}]\nx', "line 2: not JSON: more text follows"),
    "two lists": (
        '{"train": [{"q": "a"}], "test": [{"q": "b"}]}',
        r"several lists of rows \(train, test\)",
    ),
    "columns of pandas": ('{"q": {"0": "a"}, "a": {"0": "b"}}', "columns and no rows"),
    "columns": ('{"q": ["a", "b"], "a": ["c", "d"]}', "columns and no rows"),
    "parquet in gzip": (gzip.compress(b"PAR1 and more"), "parquet or Arrow in gzip"),
    "a line of Excel": ("sep=;\nq;a\nSales rose?;yes\n", 'line 1 is Excel\'s "sep="'),
    "rows of Python": ("{'q': 'a'}\n{'q': 'b'}\n", "line 1: not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_of_rows_is_refused_in_one_line(name, read):
    content, message = REFUSED[name]
    with pytest.raises(WrongInput, match=message) as error:
        read(content)
    assert "\n" not in str(error.value) and "rows" in str(error.value)


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(WrongInput, match="nothing is not there"):
        open_rows(str(tmp_path / "nothing"))
    with pytest.raises(WrongInput, match="save_to_disk. did not write; name a file, such as"):
        open_rows(str(tmp_path))
    with pytest.raises(WrongInput, match="it is hf:owner/name"):
        open_rows("hf:name")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (str(tmp_path / "loop"), "~nobody-of-this-name/rows.csv"):
        with pytest.raises(WrongInput, match="is not there; a file of rows"):
            open_rows(name)


# ---- bad rows


@pytest.mark.parametrize("header", ["text,label", "text, label", ",text,label"])
def test_a_header_that_comes_again_is_no_row(header, read):
    start = "7," * header.startswith(",")
    rows, taken, refused = read(f"{header}\n{start}a b,up\n{header}\n{start}c d,down\n{header}\n")
    assert rows.columns[-2:] == ["text", "label"]
    assert [row["label"] for row in taken] == ["up", "down"]
    assert refused == {f"line {n}": "it repeats the header; take it out" for n in (3, 5)}


def test_empty_rows_of_a_spreadsheet_are_passed_over(read):
    rows, taken, refused = read("text,label\na b,up\n,\n ,\nc d,down\n,\n")
    assert [row["label"] for row in taken] == ["up", "down"] and not refused


def test_a_space_may_stand_before_the_quotes_of_a_cell(read):
    rows, taken, refused = read('"text", "label"\n"Up, they say", "good"\n"Down", "bad"\n')
    assert rows.columns == ["text", "label"] and not refused
    assert taken[0] == {"text": "Up, they say", "label": "good"}
    _, taken, _ = read('text,label\n"He said, ""no""",bad\nWell,good\n')
    assert taken[0] == {"text": 'He said, "no"', "label": "bad"}


def test_a_single_row_with_choices_is_that_row(read):
    row = {"question": "q", "choices": [{"label": "A", "text": "x"}], "answer": "A"}
    _, taken, _ = read(json.dumps(row))
    assert taken == [row]


def test_years_name_columns(read):
    rows, taken, _ = read("firm,2022,2023\nA,1,2\nB,1,2\nC,1,2\n")
    assert rows.columns == ["firm", "2022", "2023"] and len(taken) == 3


def test_a_stray_nul_is_the_fault_of_its_row(read):
    lines = [f"text {n},up\n" for n in range(30)]
    lines[3] = "te\0xt,up\n"
    _, taken, refused = read("text,label\n" + "".join(lines))
    assert len(taken) == 30 and taken[3]["text"] == "te\0xt" and not refused
    _, taken, refused = read(ROW * 5 + ROW.replace("Sales", "Sa\0les") + ROW * 5)
    assert len(taken) == 11 and not refused  # and a shape refuses the control character


def test_a_row_of_json_that_breaks_a_rule_is_named_and_the_rest_is_read(read):
    lines = [
        ROW.strip(),
        '{"q": "a", "q": "b"}',
        '{"q": Infinity}',
        '{"q": 1e999}',
        '{"q": "\\ud83d"}',
        "[1]",
        "oops",
        '{"q": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"q": "' + "x" * 17_000_000 + '"}',
        '{"q": ' + "1" * 5000 + "}",
        ROW.strip(),
    ]
    _, rows, refused = read("\n".join(lines))
    assert rows == QA[:2]
    words = ["repeated", "Infinity", "too large", "surrogate", "object", "not JSON", "deep"]
    words += ["16 MB", "5000 digits"]
    assert list(refused) == [f"line {number}" for number in range(2, 11)]
    for word, reason in zip(words, refused.values(), strict=True):
        assert word in reason


def test_a_bad_row_in_a_list_is_named_and_the_rest_is_read(read):
    values = ['{"q": "a", "q": "b"}', '{"q": Infinity}', '{"q": "ok"}', "5", '{"q": "\\ud83d"}']
    _, rows, refused = read(f"[{', '.join(values)}]")
    assert rows == [{"q": "ok"}] and list(refused) == ["row 1", "row 2", "row 4", "row 5"]


def test_nan_is_a_value_that_is_missing(read):
    _, rows, refused = read('{"q": "a", "score": NaN}\n{"q": NaN, "score": 1}\n')
    assert rows == [{"q": "a", "score": None}, {"q": None, "score": 1}] and not refused


def test_one_object_of_turns_is_a_row(read):
    for key in ("messages", "contents"):
        _, rows, _ = read(json.dumps({key: [{"role": "user"}, {"role": "model"}]}))
        assert [list(row) for row in rows] == [[key]]


@pytest.mark.parametrize("header", ["q,a", "q,a,", "q,a,,"])
def test_empty_cells_beyond_the_header_of_most_rows_do_not_count(read, header):
    rows, taken, refused = read(f"{header}\n" + "x,1,\n" * 8 + "y,2\n")
    assert rows.columns == ["q", "a"] and len(taken) == 9 and not refused
    assert taken[-2:] == [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]
    # The comma of a text, and an empty answer.
    for ends in (["", ","], [",", ",,"]):
        _, taken, refused = read(f"{header}\n" + f"x,1{ends[0]}\n" * 8 + f"up, more{ends[1]}\n")
        assert len(taken) == 8 and " cells, and the header has 2" in refused["line 10"]
    with pytest.raises(WrongInput, match="column 3 has no name in line 1"):
        read("q,a,\n" + "x,1,more\n" * 5)
    _, taken, refused = read("q,a\n" + "x,1,\n" * 5 + "y,2,more\n")
    assert len(taken) == 5 and "3 cells, and the header has 2" in refused["line 7"]


def test_digits_are_not_lost(read):
    number = 123456789012345678901234567890
    _, rows, _ = read(f'{{"a": {number}}}\n{{"a": {-number}}}\n')
    assert [row["a"] for row in rows] == [number, -number]
    _, rows, _ = read(f'[{{"a": {number}}}]')
    assert rows == [{"a": number}]


def test_raw_tabs_and_page_breaks_in_json_are_read(read):
    _, rows, refused = read('{"a": "one\ftwo\tthree"}\n{"a": "x"}\n')
    assert rows[0] == {"a": "one\ftwo\tthree"} and not refused


def test_ragged_rows_are_named_with_the_columns(read):
    _, rows, refused = read("q,a\nx,y\nx,y,z\nx\n,\n\nx,y\n")
    assert rows == [{"q": "x", "a": "y"}] * 2
    assert refused == {
        "line 3": "3 cells, and the header has 2 (q, a); quote cells that hold a comma",
        "line 4": "1 cell, and the header has 2 (q, a)",
    }


@pytest.mark.parametrize("rest", ["e,f\n", '"g ""x""",h\ne,f\n', "e,f\n" * 3000])
def test_a_quote_that_is_not_closed_costs_one_row(rest, read):
    _, rows, refused = read(f'q,a\nb,c\n"d,c\n{rest}')
    assert list(refused) == ["line 3"]
    assert "not closed" in refused["line 3"] or "after its closing" in refused["line 3"]
    assert rows[0] == {"q": "b", "a": "c"} and rows[-1] == {"q": "e", "a": "f"}
    assert len(rows) == 1 + rest.count("\n")


# ---- encodings


def test_a_quote_that_swallows_rows_is_said(read):
    rows, kept, _ = read('text,label\nt 1,up\n"t 2,up\nt 3,down\nt 4 by 5",up\nt 5,up\n')
    assert len(kept) == 3 and rows.table.suspects == [3]
    rows, kept, _ = read('text,label\nt 1,up\n"t 2,\nand more",up\nt 5,up\n')
    assert len(kept) == 3 and not rows.table.suspects


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pyarrow.array([9 * 10**18] * 2, pyarrow.timestamp("us")), '"when" cannot be read'),
        (pyarrow.array([1, 2], pyarrow.timestamp("s", "Moon/Base")), '"when" cannot be read'),
    ],
)
def test_a_column_that_python_cannot_hold_is_named(column, reason, tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "when": column})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(WrongInput, match=reason):
        list(open_rows(str(tmp_path / "rows.parquet")))


def test_numbers_of_32_bits_keep_their_digits(tmp_path):
    values = [0.1, 16777216.0, None]
    table = pyarrow.table({"label": pyarrow.array(values, pyarrow.float32())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    read = [row["label"] for _, row in open_rows(str(tmp_path / "rows.parquet"))]
    assert read == values


def test_latin_1_is_read_and_said_so(read):
    rows, dicts, _ = read("text,label\nKäyttökate nousi 5 € – „ja“,up\nx,down\n".encode("cp1252"))
    assert dicts[0]["text"] == "Käyttökate nousi 5 € – „ja“" and rows.encoding == "latin-1"
    assert "not UTF-8 (line 2): read as latin-1" in rows.notes[0]


def test_two_encodings_in_a_file_are_each_read_and_said_so(read):
    content = "text,label\nää,up\n".encode() + "öö,down\n".encode("latin-1")
    rows, dicts, _ = read(content)
    assert [row["text"] for row in dicts] == ["ää", "öö"]
    assert "two encodings" in rows.notes[0] and "line 3" in rows.notes[0]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("公司营收同比增长百分之五,利好", "gb18030"),
        ("公司營收成長,利多", "big5"),
        ("売上高は前年同期比で増加した,増益", "shift_jis"),
        ("トヨタのシェアがアップ,ポジ", "shift_jis"),
        ("売上高は前年同期比で増加した,増益", "euc_jp"),
        ("매출이 전년 대비 증가했다,상승", "euc_kr"),
        ("Выручка выросла на 5 процентов,рост", "cp1251"),
        ("но мы за то что он не был,рост", "cp1251"),
        ("Выручка выросла на 5 процентов,рост", "koi8_r"),
        ("Τα έσοδα αυξήθηκαν,άνοδος", "cp1253"),
        ("הרווח עלה,עלייה", "cp1255"),
        ("ارتفعت الأرباح,صعود", "cp1256"),
    ],
)
def test_text_that_is_not_western_is_refused_and_not_read_as_latin_1(read, text, encoding):
    rows = f"text,label\n{text}\n".encode(encoding)
    for content in (rows, "text,label\nUmsätze übertrafen,up\n".encode() + rows):
        with pytest.raises(WrongInput, match="neither UTF-8 .*line [24]\\) nor Western text"):
            read(content)


@pytest.mark.parametrize(
    "text",
    ["määräpäivä ja yöaika", "l'œuvre «très» élevée", "………… 5 €", "schön öde", "ŠKODA – „žádný“"]
    + [
        "He said “…”—“no”",
        "5 €\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}.",
        "ÄÖÜäöüß",
        "PÄÄJOHTAJA ÄÄNI",
    ],
)
def test_western_letters_and_marks_beside_each_other_are_read_as_latin_1(read, text):
    for before in ("", "Gewinn gestiegen über Plan: "):
        _, dicts, _ = read(f"text,label\n{before}{text},up\n".encode("cp1252"))
        assert dicts[0]["text"] == f"{before}{text}".strip()


def test_utf_16_that_is_broken_is_refused(read):
    with pytest.raises(WrongInput, match="not utf-16; save it as UTF-8"):
        read(ROW.encode("utf-16") + b"\x00\xd8\x00\x00\x00")


# ---- columnar files


def write_labels():
    features = {"text": {"dtype": "string", "_type": "Value"}}
    features["label"] = {"names": ["down", "up"], "_type": "ClassLabel"}
    table = pyarrow.table({"text": ["a", "b"] * 1500, "label": [0, 1] * 1500})
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_columnar_files_name_their_labels(kind, tmp_path):
    table, path = write_labels(), tmp_path / "rows"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table)
    rows = open_rows(str(path))
    assert rows.format == ("parquet" if kind == "parquet" else "arrow")
    assert rows.label_names == {"label": ["down", "up"]} and rows.columns == ["text", "label"]
    assert [row for _, row in rows] == table.to_pylist()
    assert [place for place, _ in rows][-1] == "row 3000"


def test_a_folder_of_save_to_disk_is_read_with_its_splits(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["down", "up"])})
    train = Dataset.from_list([{"text": "a", "label": 1}] * 5, features=features)
    test = Dataset.from_list([{"text": "b", "label": 0}] * 2, features=features)
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    rows = open_rows(str(tmp_path / "both"))
    assert rows.format == "arrow" and rows.splits == ["test"] and "train" in rows.notes[0]
    assert rows.label_names == {"label": ["down", "up"]}
    kind = ClassLabel(names=["down", "up"])
    several = Features({"labels": [kind], "label": kind})
    dataset = Dataset.from_list([{"labels": [1], "label": 1}], features=several)
    dataset.save_to_disk(tmp_path / "several")
    names = {"labels": ["down", "up"], "label": ["down", "up"]}
    assert open_rows(str(tmp_path / "several")).label_names == names
    # As `datasets` wrote a list before 4.0.
    old = {"labels": [{"names": ["down", "up"], "_type": "ClassLabel"}]}
    metadata = {b"huggingface": json.dumps({"info": {"features": old}}).encode()}
    assert read_label_names(metadata) == {"labels": ["down", "up"]}
    assert [row for _, row in rows] == [{"text": "a", "label": 1}] * 5
    assert [row for _, row in rows.open_split("test")] == [{"text": "b", "label": 0}] * 2
    with pytest.raises(WrongInput, match="no split dev; its other splits: test"):
        rows.open_split("dev")
    next((tmp_path / "both" / "train").glob("*.arrow")).unlink()
    with pytest.raises(WrongInput, match="is missing, which .*state.json names"):
        open_rows(str(tmp_path / "both"))


# ---- memory


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A quarter of a million rows, 60 MB, of a text format take no more memory than ten rows."""
    script = """
import sys
from tools.data.formats import open_rows
rows = sum(isinstance(row, dict) for _, row in open_rows(sys.argv[1]))
peak = next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)
print(rows, int(peak) // 1024)
"""
    text = " ".join(["word"] * 45)
    contents = {
        "csv": ("text,label\n", f"{text},up\n", ""),
        "jsonl": ("", json.dumps({"text": text, "label": "up"}) + "\n", ""),
        "json": ("[", json.dumps({"text": text, "label": "up"}) + ",\n", '{"text": ""}]'),
    }
    for name, (start, row, end) in contents.items():
        peaks = []
        for count in (10, 250_000):
            path = tmp_path / name
            path.write_text(start + row * count + end)
            command = [sys.executable, "-c", script, str(path)]
            output = subprocess.run(
                command, cwd=common.ROOT, capture_output=True, text=True, check=True
            )
            rows, peak = map(int, output.stdout.split())
            assert rows == count + bool(end)
            peaks.append(peak)
        assert peaks[1] < peaks[0] + 30, name


# ---- what people reported


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
def test_the_reported_files_are_read():
    formats = {path.name: open_rows(str(path)) for path in sorted(CASES.iterdir())}
    counts = {name: len(list(rows)) for name, rows in formats.items()}
    assert {rows.format for rows in formats.values()} == {"jsonl", "json", "csv", "sentences"}
    assert formats["Sentences_AllAgree.txt"].encoding == "latin-1"
    refused = {
        name
        for name, rows in formats.items()
        if any(isinstance(row, ValueError) for _, row in rows)
    }
    assert refused == {"dupkey.jsonl"} and min(counts.values()) >= 20


# ---- the Hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def list_folders(files):
    names = dict.fromkeys(file.rpartition("/")[0] for file in files if "/" in file)
    return [{"type": "directory", "path": name, "size": 0, "oid": "2" * 40} for name in names]


class Datasets(BaseHTTPRequestHandler):
    """Datasets of a Hub, as its client asks for them: facts, listings and files at a commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        start, end = 0, len(body)
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end - 1) + 1
            headers["Content-Range"], status = f"bytes {start}-{end - 1}/{len(body)}", 206
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start:end])

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        hub.requests.append(f"{self.command} {path}")
        name, _, rest = path.removeprefix("/api").removeprefix("/datasets/").partition("/")
        repo, _, rest = rest.partition("/")
        files = hub.files.get(f"{name}/{repo}")
        if files is None:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        listing = [
            {"type": "file", "path": file, "size": len(content), "oid": "1" * 40}
            for file, content in files.items()
        ]
        if path.startswith("/api/") and rest.partition("/")[0] in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            facts = {"id": f"{name}/{repo}", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.reply(facts | {"private": False, "downloads": 0, "likes": 0})
        if path.startswith("/api/") and rest.startswith("tree/"):
            folder = rest.removeprefix("tree/").partition("/")[2]
            inside = [e for e in listing if e["path"].startswith(f"{folder}/" if folder else "")]
            return self.reply(inside if folder else [*list_folders(files), *inside])
        if path.startswith("/api/") and rest.startswith("paths-info/"):
            length = int(self.headers.get("Content-Length") or 0)
            wanted = self.rfile.read(length).decode()
            return self.reply([entry for entry in listing if entry["path"] in unquote(wanted)])
        if rest.startswith("resolve/"):
            commit, _, file = rest.removeprefix("resolve/").partition("/")
            hub.commits.add(commit)
            if file in files:
                content = files[file]
                return self.reply(content, ETag='"1"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_POST = do_GET


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Datasets)
    server.requests, server.commits = [], set()
    table = pyarrow.BufferOutputStream()
    parquet.write_table(write_labels(), table)
    server.files = {
        "me/news": {
            "README.md": b"---\nlicense: mit\n---\n",
            "data/train.jsonl": ROW.encode() * 9,
            "data/test.jsonl": ROW.encode() * 4,
        },
        "me/labels": {"data/train-00000-of-00001.parquet": table.getvalue().to_pybytes()},
        "me/code": {"code.py": b"raise SystemExit('run')", "README.md": b""},
    }
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from tools.common import JobFailed, WrongInput, quiet
quiet()
from tools.data.formats import open_rows
try:
    rows = open_rows(sys.argv[1])
    pairs = list(rows)
    other = list(rows.open_split(rows.splits[0])) if rows.splits else []
    print(json.dumps([rows.format, rows.source, rows.revision, rows.columns, rows.label_names,
                      rows.splits, len(pairs), pairs[-1], len(other), rows.notes]))
except (WrongInput, JobFailed) as error:
    print(json.dumps(str(error)))
"""


def open_on(hub, source, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    command = [sys.executable, "-c", SCRIPT, source]
    process = subprocess.run(
        command, cwd=common.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_dataset_of_the_hub_is_streamed_at_a_commit(hub, tmp_path):
    hub.commits.clear()
    kind, source, revision, columns, _, splits, count, last, others, notes = open_on(
        hub, "hf:me/news", tmp_path
    )
    assert (kind, revision, columns, splits) == ("hub", COMMIT, ["q", "a"], ["test"])
    assert (count, last, others) == (9, ["row 9", QA[0]], 4)
    assert source == f"hf:me/news@{COMMIT}:train" and hub.commits == {COMMIT}
    assert any(COMMIT in note for note in notes) and any("train, test" in note for note in notes)
    again = open_on(hub, source.replace(":train", ":test"), tmp_path)
    assert again[6] == 4 and again[5] == ["train"]


@pytest.mark.slow
def test_labels_of_the_hub_have_their_names(hub, tmp_path):
    result = open_on(hub, "hf:me/labels:train", tmp_path)
    assert result[4] == {"label": ["down", "up"]} and result[6] == 3000


@pytest.mark.parametrize(
    "source, message",
    run_first(
        1,
        [
            ("hf:me/nothing", "me/nothing is not on the Hub"),
            ("hf:me/news:dev", "me/news has no split dev; it has train, test"),
            ("hf:me/code", "me/code"),
        ],
    ),
)
def test_what_the_hub_has_not_is_one_line(source, message, hub, tmp_path):
    result = open_on(hub, source, tmp_path)
    assert isinstance(result, str) and message in result and "\n" not in result
