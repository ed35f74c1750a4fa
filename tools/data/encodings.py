"""Opens text files of any origin: gzip or not, and the encoding that their bytes show.

text = inspect_text(Path("export.csv.gz"))
text.encoding, text.note        "latin-1", "not UTF-8 from line 3 on; read as latin-1 …"
with text.open() as file: …     line ends stay as they are
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from charset_normalizer import from_bytes

from tools.common import WrongInput, shown

GZIP = b"\x1f\x8b"
HEAD = 2**16  # bytes or characters that show what a file is
CHUNK = 2**20
# A byte order mark, and the codec that takes it off.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like the next one
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_bytes(error: UnicodeError) -> tuple[str, int]:
    """Reads the bytes that are not UTF-8 as Windows-1252: latin-1 with the euro and quotes."""
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    text = "".join(
        byte.to_bytes().decode("cp1252") if byte not in UNDEFINED else chr(byte) for byte in bad
    )
    return text, error.end


UNDEFINED = {0x81, 0x8D, 0x8F, 0x90, 0x9D}  # in Windows-1252
codecs.register_error("read_as_latin_1", decode_bytes)


@dataclass(frozen=True)
class Text:
    """How the text of a file is read. `note` says what a reader should know; empty if nothing."""

    path: Path
    encoding: str  # utf-8, utf-8-sig, utf-16…, utf-32, latin-1, or utf-8 and latin-1
    note: str = ""

    @property
    def codec(self) -> str:
        return "utf-8" if "latin-1" in self.encoding else self.encoding

    @contextmanager
    def open(self) -> Iterator[io.TextIOWrapper]:
        errors = "read_as_latin_1" if "latin-1" in self.encoding else "strict"
        with (
            open_bytes(self.path) as file,
            io.TextIOWrapper(file, encoding=self.codec, errors=errors, newline="") as text,
        ):
            yield text


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked where it is gzip."""
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise WrongInput(
            f"{shown(path)}: the gzip file is cut off or damaged; download or pack it again"
        ) from None


def inspect_text(path: Path) -> Text:
    """Reads a file once to learn its encoding; raises WrongInput where it is no text."""
    with open_bytes(path) as file:
        encoding = guess_encoding(file.read(HEAD), path)
    fault = find_fault(path, encoding)
    if fault is None:
        return Text(path, encoding)
    if not encoding.startswith("utf-8"):
        raise WrongInput(f"{shown(path)}, byte {fault + 1:,}: not {encoding}; save it as UTF-8")
    return describe_latin(path)


def guess_encoding(head: bytes, path: Path) -> str:
    """The codec of a text that begins with `head`; raises WrongInput where that is no text."""
    for mark, codec in MARKS.items():
        if head.startswith(mark):
            return codec
    if b"\0" not in head:
        return "utf-8"
    # ASCII in UTF-16 has a zero in every second byte.
    zeros = head[::2].count(0), head[1::2].count(0)
    if min(zeros) == 0 and max(zeros) > len(head) / 8:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    with suppress(UnicodeDecodeError):
        if sum(zeros) <= max(1, len(head) // 1000):  # a stray one: its row is refused
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return "utf-8"
    raise WrongInput(f"{shown(path)}: neither text nor a supported format; {FORMATS}")


FORMATS = (
    "JSONL, JSON, CSV, TSV, parquet, arrow, gzip of text, a folder of datasets.save_to_disk and "
    "hf:owner/name are"
)


def find_fault(path: Path, encoding: str) -> int | None:
    """The place near the first byte that an encoding does not have; None where it has all."""
    decoder, place = codecs.getincrementaldecoder(encoding)(), 0
    with open_bytes(path) as file:
        while True:
            chunk = file.read(CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return place + error.start
            if not chunk:
                return None
            place += len(chunk)


# Marks of Windows-1252 that stand beside each other in any Western text.
MARKS_BETWEEN = "“”‘’…–—•€™«»°§\N{NO-BREAK SPACE}".encode("cp1252")
AS_SPACES = bytes.maketrans(MARKS_BETWEEN, b" " * len(MARKS_BETWEEN))
NOT_ASCII = bytes(range(128, 256))
FEW = 8  # letters beyond ASCII
UTF_8 = re.compile("[^\0-\x7f\udc80-\udcff]+")  # where `surrogateescape` reads all other bytes


def is_western(sample: bytes) -> bool:
    """Whether the bytes of a text that are not UTF-8 make Western words in Windows-1252.

    charset-normalizer judges, by which letters stand beside each other. Fewer than FEW letters do
    not show it and count as Western.
    """
    others = UTF_8.sub(" ", sample.decode(errors="surrogateescape"))
    text = others.encode(errors="surrogateescape").translate(AS_SPACES)
    if len(text) - len(text.translate(None, NOT_ASCII)) < FEW:
        return True
    return bool(from_bytes(text, cp_isolation=["cp1252"]))


def describe_latin(path: Path) -> Text:
    """A text that is not UTF-8, or not all of it: the bytes that are not are read as latin-1.

    Raises WrongInput where those bytes are not Western text.
    """
    latin, unicode_lines, first, sample = 0, 0, 0, b""
    with open_bytes(path) as file:
        # An endless line comes in pieces.
        for number, line in enumerate(iter(lambda: file.readline(CHUNK * 16), b""), 1):
            if line.isascii():
                continue
            try:
                line.decode()
                unicode_lines += 1
            except UnicodeDecodeError:
                latin += 1
                first = first or number
                if len(sample) < HEAD:
                    sample += line[:HEAD]
    where = f"line {first}" if latin == 1 else f"{latin:,} lines, the first is line {first}"
    if not is_western(sample):
        raise WrongInput(
            f"{shown(path)}: neither UTF-8 ({where}) nor Western text in Windows-1252; save it as "
            "UTF-8 with `iconv -f CODE -t UTF-8`, where CODE is GB18030 for Chinese, CP1250 for "
            "Central European, CP1251 for Cyrillic, CP1254 for Turkish, MAC for old Macs"
        )
    read = "read as latin-1 (Windows-1252); save it as UTF-8 if letters look wrong"
    if not unicode_lines:
        return Text(path, "latin-1", f"not UTF-8 ({where}): {read}")
    note = f"two encodings: UTF-8 ({unicode_lines:,} lines with such letters) and another ({where})"
    return Text(path, "utf-8 and latin-1", f"{note}, {read}")
