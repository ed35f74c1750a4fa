"""Measures how long rows take to read, and how much memory, beside `datasets.load_dataset`.

    python -m bench.read                     200,000 rows of JSONL, JSON, CSV and parquet
    python -m bench.read --rows 1000000

    ours       tools.data.formats: every check, each row as a dict
    datasets   load_dataset(…, streaming=True) on the same file, each row as a dict

Rows are made up, of 40 words (0.3 kB). Every measurement is a process of its own. Seconds leave
out the start of Python; memory is the peak of the process' resident set (VmHWM: that of
getrusage is the parent's, where the parent holds more).
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = """
import sys, time
start = time.perf_counter()
from tools.data.formats import open_rows
rows = sum(isinstance(row, dict) for _, row in open_rows(sys.argv[1]))
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)
print(rows, seconds, int(peak) / 1024)
"""
DATASETS = """
import sys, time
start = time.perf_counter()
from datasets import load_dataset
kind = {"jsonl": "json"}.get(sys.argv[1].rpartition(".")[2], sys.argv[1].rpartition(".")[2])
rows = load_dataset(kind, data_files=sys.argv[1], split="train", streaming=True)
count = sum(1 for _ in rows)
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)
print(count, seconds, int(peak) / 1024)
"""


def make_rows(count: int) -> Iterator[dict[str, str]]:
    """Made-up rows; the same count gives the same rows."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlcumwf", k=draw.randint(2, 9))) for _ in range(4000)]
    for _ in range(count):
        text = " ".join(draw.choices(words, k=40))
        yield {"text": text, "label": draw.choice(["negative", "neutral", "positive"])}


def write_files(folder: Path, count: int) -> list[Path]:
    """The same rows in each format."""
    import pyarrow
    from pyarrow import parquet

    rows = list(make_rows(count))
    paths = [folder / f"rows.{kind}" for kind in ("jsonl", "json", "csv", "parquet")]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths[1].write_text(json.dumps(rows, indent=1))
    with open(paths[2], "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    return paths


def measure_reading(script: str, path: Path) -> tuple[int, float, float]:
    """(rows, seconds, MB) of a process that reads a file."""
    command = [sys.executable, "-c", script, str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows, seconds, megabytes = process.stdout.split()
    return int(rows), float(seconds), float(megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in write_files(Path(folder), arguments.rows):
            size = path.stat().st_size / 1e6
            for name, script in (("ours", OURS), ("datasets", DATASETS)):
                rows, seconds, megabytes = measure_reading(script, path)
                print(
                    f"{path.suffix[1:]:8} {size:6.1f} MB  {name:9} {rows:,} rows  "
                    f"{seconds:5.1f} s  {megabytes:4.0f} MB of memory",
                    flush=True,
                )


if __name__ == "__main__":
    main()
