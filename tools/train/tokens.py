"""Counts the rows of data files and their tokens, without loading torch or transformers.

measure_rows([ROOT / "data/chat/sentiment_train.jsonl"], "meta-llama/Llama-3.1-8B-Instruct").mean
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tools import architectures
from tools.common import WrongInput, shown
from tools.data.bases import read_tokenizer
from tools.data.formats import open_rows

# Characters a token where no tokenizer is at hand. Ten of FinLoRA's files (14,973 rows) have 3.0
# (financebench) to 5.0 in SmolLM2's tokenizer, and no row has fewer than 1.85: hours are for the
# least of the files, the peak is for the least of the rows.
CHARACTERS_PER_TOKEN, LEAST_CHARACTERS_PER_TOKEN = 2.9, 1.8
TEMPLATE_TOKENS = 40  # of a row's chat template; SmolLM2's adds 32
SAMPLED, LONGEST = 1000, 64  # rows whose tokens are counted: from all over the file; the longest
MOST_BYTES = 200_000_000  # of a file that is not JSONL; its rows take many times as much memory


@dataclass(frozen=True)
class RowLengths:
    """The rows of files, the tokens of the mean and of the longest one, and who counted them.

    Without a `tokenizer` tokens are estimated from characters, rather too many than too few.
    """

    rows: int | None = None
    mean: int | None = None
    longest: int | None = None
    tokenizer: str | None = None


def list_texts(value: Any) -> list[str]:
    """The texts of a row of any shape, without the names of roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key not in ("role", "from")]
    return [text for part in value for text in list_texts(part)] if isinstance(value, list) else []


def read_lines(path: Path) -> Iterator[Any]:
    """The values of a JSONL file; raises WrongInput that names a line that is not JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield orjson.loads(line)
            except ValueError as error:
                raise WrongInput(f"{shown(path)}, line {number}: not JSON: {error}") from None


def read_rows(path: Path) -> list[Any]:
    """The rows of a data file of any format; raises WrongInput where it cannot be read."""
    if path.suffix == ".jsonl":  # the fast way, as FinLoRA's files have up to 82,000 rows
        return list(read_lines(path))
    if path.suffix == ".txt":  # as the library `datasets` reads it
        return [{"text": line} for line in path.read_text().splitlines()]
    return [row for _, row in open_rows(str(path)) if not isinstance(row, ValueError)]


def measure_rows(files: Sequence[Path], base: str) -> RowLengths:
    """The rows of files and their tokens, by the base's tokenizer where it is at hand.

    Empty where a file is missing, too large or cannot be read, or all have no rows: training names
    the fault.
    """
    try:
        if any(path.suffix != ".jsonl" and path.stat().st_size > MOST_BYTES for path in files):
            return RowLengths()
        values = [row for path in files for row in read_rows(path)]
    except (OSError, UnicodeError, WrongInput):
        return RowLengths()
    rows = sorted(("\n".join(list_texts(value)) for value in values), key=len)
    if not rows:
        return RowLengths()
    file = architectures.find_file(base, "tokenizer.json")
    if file:
        # Sorted by length, so rows at equal distances have the file's mean.
        step = math.ceil(len(rows) / SAMPLED)
        sample = rows[step // 2 :: step]
        sizes = count_tokens(file, sample + rows[-LONGEST:])
        mean = sum(sizes[: len(sample)]) / len(sample)
        longest = float(max(sizes[len(sample) :]))
    else:
        mean = sum(map(len, rows)) / len(rows) / CHARACTERS_PER_TOKEN
        longest = len(rows[-1]) / LEAST_CHARACTERS_PER_TOKEN
    return RowLengths(
        rows=len(rows),
        mean=int(mean) + TEMPLATE_TOKENS,
        longest=int(longest) + TEMPLATE_TOKENS,
        tokenizer=shown(file) if file else None,
    )


def count_tokens(tokenizer_file: Path, texts: list[str]) -> list[int]:
    encoded = read_tokenizer(tokenizer_file).encode_batch(texts, add_special_tokens=False)
    return [len(text.ids) for text in encoded]
