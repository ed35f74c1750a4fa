"""Counts the rows of a data file and their tokens, without loading torch or transformers.

measure_rows(ROOT / "data/chat/sentiment_train.jsonl", "meta-llama/Llama-3.1-8B-Instruct").mean
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tools import architectures
from tools.common import shown

# Characters a token where no tokenizer is at hand. Ten of FinLoRA's files (14,973 rows) have 3.0
# (financebench) to 5.0 in SmolLM2's tokenizer, and no row has fewer than 1.85: hours are for the
# least of the files, the peak is for the least of the rows.
CHARACTERS_PER_TOKEN, LEAST_CHARACTERS_PER_TOKEN = 2.9, 1.8
TEMPLATE_TOKENS = 40  # of a row's chat template; SmolLM2's adds 32
SAMPLED, LONGEST = 1000, 64  # rows whose tokens are counted: from all over the file; the longest


@dataclass(frozen=True)
class RowLengths:
    """The rows of a file, the tokens of the mean and of the longest one, and who counted them.

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


def measure_rows(path: Path, base: str) -> RowLengths:
    """The rows of a JSONL file and their tokens, by the base's tokenizer where it is at hand.

    Empty where there is no such file, or it has no rows, or is not JSONL: training names the line.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    try:
        values = [orjson.loads(line) for line in lines if line.strip()]
    except ValueError:
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
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(text.ids) for text in tokenizer.encode_batch(texts, add_special_tokens=False)]
