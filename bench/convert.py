"""Measures a conversion against the least that such a job costs and against what people use.

    python -m bench.convert                      files of 100 MB with short, long and mixed rows
    python -m bench.convert --mb 2000 --kinds mixed --rounds 1

    limit      a loop that parses each row with orjson and writes its chat row with orjson
    convert    tools.data.chatfile: every check, labels, digests of source and output, manifest
    datasets   load_dataset("json").map(…).to_json(…)

Rows are made up, in the shapes of FinLoRA's: `short` as in sentiment (0.3 kB), `long` as in XBRL
extraction (15 kB), `mixed` of both and of what lies between, by row. Every measurement is a process
of its own, on one core and on all, and the best of the rounds counts. Seconds do not hold the
start of Python; limit and convert end with the bytes on the disk. Seconds of work (CPU time) tell
more than the clock where other programs run. Memory is the peak of the process' resident set.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["negative", "neutral", "positive"]
# (words of a prompt, words of an answer; 0: a label), and how often each kind of row is drawn.
ROWS = {"short": (40, 0), "term": (12, 25), "tagging": (600, 4), "long": (1900, 2)}
KINDS = {
    "short": {"short": 1},
    "long": {"long": 1},
    "mixed": {"short": 60, "term": 15, "tagging": 15, "long": 10},
}


def make(path: Path, kind: str, size: int) -> None:
    """Writes a file of about `size` bytes; the same arguments give the same bytes."""
    draw = random.Random(kind)
    words = ["".join(draw.choices("etaoinshrdlcumwf", k=draw.randint(2, 9))) for _ in range(4000)]
    words += ["$1,250.5", "12.4%", '"quoted"', "<us-gaap:Cash>", "Ä2", "–", "Q3\n", "\t"] * 20

    def row(words_of_prompt: int, words_of_answer: int) -> bytes:
        length = max(5, int(words_of_prompt * draw.lognormvariate(0, 0.3)))
        prompt = (
            f"Instruction: What is it?\nInput: {' '.join(draw.choices(words, k=length))}\nAnswer: "
        )
        answer = " ".join(draw.choices(words[:4000], k=words_of_answer)) or draw.choice(LABELS)
        return json.dumps({"context": prompt, "target": answer}).encode() + b"\n"

    drawn = draw.choices(list(KINDS[kind]), list(KINDS[kind].values()), k=2000)
    rows = [row(*ROWS[name]) for name in drawn]
    with open(path, "wb") as file:
        while file.tell() < size:
            file.writelines(draw.choices(rows, k=200))


def limit(source: Path, target: Path, kind: str) -> None:
    with open(source, "rb") as read, open(target, "wb") as written:
        for line in read:
            row = orjson.loads(line)
            turns = [
                {"role": "user", "content": row["context"]},
                {"role": "assistant", "content": row["target"]},
            ]
            chat = orjson.dumps({"messages": turns}, option=orjson.OPT_APPEND_NEWLINE)
            written.write(chat)
        written.flush()
        os.fsync(written.fileno())


def convert(source: Path, target: Path, kind: str) -> None:
    from tools.data.chatfile import convert_rows
    from tools.data.rows import Rules

    convert_rows(source, target, Rules(frozenset(LABELS if kind == "short" else ())))


def datasets(source: Path, target: Path, kind: str) -> None:
    from datasets import load_dataset

    cache = tempfile.mkdtemp(dir=target.parent)
    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=cache)

    def chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        user = {"role": "user", "content": row["context"].strip()}
        return {"messages": [user, {"role": "assistant", "content": row["target"].strip()}]}

    rows.map(chat, remove_columns=rows.column_names).to_json(str(target), force_ascii=False)


def measure(
    name: str, source: Path, target: Path, kind: str, cores: int | None
) -> dict[str, float]:
    """Seconds by the clock, seconds of work and MB of one conversion in a process of its own."""
    arguments = ["--run", name, str(source), str(target), kind, str(cores or 0)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, check=True
    )
    target.unlink()
    return json.loads(done.stdout)


def run(name: str, source: str, target: str, kind: str, cores: str) -> None:
    """What the process does: imports, conversion, and one line of JSON."""
    if int(cores):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    if name == "datasets":
        import datasets as _datasets  # noqa: F401
    else:
        import tools.data.chatfile  # noqa: F401
    before, worked = time.perf_counter(), time.process_time()
    globals()[name](Path(source), Path(target), kind)
    found = {"seconds": time.perf_counter() - before, "worked": time.process_time() - worked}
    with open("/proc/self/status") as status:  # ru_maxrss would hold the parent's, too
        found["memory"] = int(next(li for li in status if li.startswith("VmHWM")).split()[1]) / 1024
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="the speed and memory of a conversion")
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="where the files lie meanwhile; a temporary folder if unset"
    )
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(*arguments.run)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for kind in arguments.kinds.split(","):
            source = folder / f"{kind}.jsonl"
            make(source, kind, arguments.mb * 10**6)
            size = source.stat().st_size / 1e6
            best: dict[tuple[str, int | None], dict[str, float]] = {}
            for _ in range(arguments.rounds):
                # The slow one once is enough: it is further off than any noise.
                wanted = [("limit", 1), ("convert", 1), ("limit", None), ("convert", None)]
                wanted += [("datasets", None)] if ("datasets", None) not in best else []
                for each in wanted:
                    found = measure(each[0], source, folder / "out.jsonl", kind, each[1])
                    so_far = best.setdefault(each, found)
                    best[each] = {key: min(so_far[key], found[key]) for key in found}
            source.unlink()
            print(f"{kind}: {size:.0f} MB, load {os.getloadavg()[0]:.1f}")
            for (what, cores), found in best.items():
                where = "one core" if cores else f"{os.cpu_count()} cores"
                rate = size / found["seconds"]
                print(f"  {what:<9} {where:<9} {found['seconds']:8.2f} s {rate:7.0f} MB/s", end="")
                print(f" {found['worked']:8.2f} s of work", end="")
                print(f" {found['memory']:7.0f} MB of memory")
            speed = {each: found["seconds"] for each, found in best.items()}
            one = speed["limit", 1] / speed["convert", 1]
            all_ = speed["limit", None] / speed["convert", None]
            times = speed["datasets", None] / speed["convert", None]
            alone = speed["datasets", None] / speed["convert", 1]
            work = best["limit", 1]["worked"] / best["convert", 1]["worked"]
            print(f"  of the limit: {one:.2f} on one core ({work:.2f} by work), {all_:.2f} on all")
            print(
                f"  times as fast as datasets: {alone:.1f} on one core, {times:.1f} on all",
                flush=True,
            )


if __name__ == "__main__":
    main()
