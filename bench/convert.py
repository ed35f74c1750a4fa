"""Measures a conversion against a lower bound and against the datasets library.

    python -m bench.convert                      files of 100 MB with short, long and mixed rows
    python -m bench.convert --mb 2000 --kinds mixed --rounds 1

    limit      a loop that parses each row with orjson and writes its chat row with orjson
    convert    tools.data.chatfile: every check, labels, digests of source and output, manifest
    datasets   load_dataset("json").map(…).to_json(…)

Rows are made up in FinLoRA's shapes: `short` as in sentiment (0.3 kB), `long` as in XBRL extraction
(15 kB), `mixed` with sizes in between. Every measurement is a process of its own, and the best of
the rounds counts. Seconds leave out the start of Python; limit and convert end when the bytes are
on the disk. On a busy machine, seconds of work (CPU time) say more than the clock. Memory is the
peak of the process's resident set.
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

    kinds = draw.choices(list(KINDS[kind]), list(KINDS[kind].values()), k=2000)
    rows = [row(*ROWS[name]) for name in kinds]
    with open(path, "wb") as file:
        while file.tell() < size:
            file.writelines(draw.choices(rows, k=200))


def limit(source: Path, target: Path, kind: str) -> None:
    with open(source, "rb") as rows, open(target, "wb") as chat_file:
        for line in rows:
            row = orjson.loads(line)
            turns = [
                {"role": "user", "content": row["context"]},
                {"role": "assistant", "content": row["target"]},
            ]
            chat = orjson.dumps({"messages": turns}, option=orjson.OPT_APPEND_NEWLINE)
            chat_file.write(chat)
        chat_file.flush()
        os.fsync(chat_file.fileno())


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


def measure(name: str, source: Path, target: Path, kind: str) -> dict[str, float]:
    """Measures one conversion in a process of its own: clock seconds, seconds of work, MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--run", name, str(source), str(target), kind]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    target.unlink()
    return json.loads(done.stdout)


def run(name: str, source: str, target: str, kind: str) -> None:
    """The measured process: imports, conversion, and one line of JSON."""
    if name == "datasets":
        import datasets as _datasets  # noqa: F401
    else:
        import tools.data.chatfile  # noqa: F401
    clock, work = time.perf_counter(), time.process_time()
    globals()[name](Path(source), Path(target), kind)
    figures = {"seconds": time.perf_counter() - clock, "work": time.process_time() - work}
    with open("/proc/self/status") as status:  # ru_maxrss would hold the parent's, too
        peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps(figures | {"memory": int(peak.split()[1]) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description="the speed and memory of a conversion")
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="for the files; a temporary folder if unset")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
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
            print(f"{kind}: {size:.0f} MB, load {os.getloadavg()[0]:.1f}")
            seconds = {}
            for what in ("limit", "convert", "datasets"):
                # Once is enough for the slow one: it is further off than any noise.
                rounds = 1 if what == "datasets" else arguments.rounds
                runs = [measure(what, source, folder / "out.jsonl", kind) for _ in range(rounds)]
                best = {key: min(figures[key] for figures in runs) for key in runs[0]}
                seconds[what] = best["seconds"]
                print(
                    f"  {what:<9} {seconds[what]:8.2f} s {size / seconds[what]:7.0f} MB/s "
                    f"{best['work']:8.2f} s of work {best['memory']:7.0f} MB of memory"
                )
            share = seconds["limit"] / seconds["convert"]
            times = seconds["datasets"] / seconds["convert"]
            print(f"  {share:.2f} of the limit, {times:.1f} times as fast as datasets", flush=True)
            source.unlink()


if __name__ == "__main__":
    main()
