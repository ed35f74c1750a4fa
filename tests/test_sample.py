"""The example data is what its script writes, is complete, keeps its splits apart and is right."""

import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from tools import sources
from tools.data import convert

SAMPLE = sources.SAMPLE
TEXTS = yaml.safe_load((SAMPLE / "texts.yaml").read_text())
TASKS, DATASETS = sources.tables()["tasks"], sources.tables()["datasets"]
FILES = sorted(path.relative_to(SAMPLE).as_posix() for path in SAMPLE.glob("t*/*.jsonl"))
SENTIMENT = TASKS["sentiment"]["train"]


def read_rows(file):
    return [json.loads(line) for line in (SAMPLE / file).read_text().splitlines()]


def read_sentences(*files):
    contexts = [row["context"] for file in files for row in read_rows(file)]
    return [re.search(r"\nInput: (.*)\nAnswer: $", context)[1] for context in contexts]


SENTENCES = {
    "train": read_sentences(SENTIMENT),
    "test": read_sentences(*(DATASETS[name]["file"] for name in TASKS["sentiment"]["eval"])),
}


def test_the_files_are_what_their_script_writes():
    command = [sys.executable, str(SAMPLE / "make.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("task", [name for name, spec in TASKS.items() if "parts" not in spec])
def test_a_task_converts_to_at_least_twenty_rows_a_file(task, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    convert.convert_task(task, SAMPLE)
    files = {sources.train_path(task): TASKS[task]["train"]}
    files |= {sources.test_path(name): DATASETS[name]["file"] for name in TASKS[task]["eval"]}
    for chat, source in files.items():
        manifest = sources.manifest(chat)
        held_out = (manifest["validation"] or {"rows": 0})["rows"]
        removed = sum(entry["rows"] for entry in manifest["removed"])
        assert manifest["rows"] + held_out + removed == len(read_rows(source)) >= 20, source
        assert removed <= 3
        assert manifest["from"] == "data/sample"


@pytest.mark.parametrize("file", FILES)
def test_every_row_has_the_form_of_its_file(file):
    for row in read_rows(file):
        prompt, answer = row["context"], row["target"]
        assert prompt.rstrip(" ").endswith("Answer:") and answer.strip()
        # No slot of a template is left, and nothing but plain text.
        assert (prompt + answer).isascii() and not re.search(r"[\x00-\x09\x0b-\x1f]|[{}]\w", answer)
        assert "_batched" not in file or len(answer.split(", ")) == 4
        assert not re.search("cfa|cpa", file) or f"\n{answer}\n" in prompt


def test_every_label_occurs():
    for dataset in DATASETS.values():
        if "labels" in dataset:
            assert {row["target"] for row in read_rows(dataset["file"])} == set(dataset["labels"])


def test_no_prompt_stands_twice_or_in_both_splits():
    prompts = [row["context"] for file in FILES for row in read_rows(file)]
    assert len(set(prompts)) == len(prompts)


def list_templates(kind, entry):
    """The templates of a file, as one list of texts."""
    if kind == "exam":
        questions = [question for question, *_ in entry["questions"]]
        return questions + [question["text"] for question in entry["computed"]]
    if kind == "formula":
        return [text for texts in entry["questions"].values() for text in texts]
    if kind in ("headline", "report"):
        return [question["text"] for question in entry.get("headlines") or entry["questions"]]
    if kind in ("tagging", "entities"):
        return list(entry["sentences"].values() if kind == "tagging" else entry["sentences"])
    return list(entry["meanings"])


@pytest.mark.parametrize(
    "kind", ["headline", "exam", "tagging", "terms", "formula", "report", "entities"]
)
def test_no_template_is_used_twice_or_in_both_splits(kind):
    texts = [text for entry in TEXTS[kind].values() for text in list_templates(kind, entry)]
    assert len(set(texts)) == len(texts) > 10


def test_every_dataset_belongs_to_a_task():
    assert {name for task in TASKS.values() for name in task["eval"]} == set(DATASETS)


def test_sentiment_has_enough_rows_and_no_sentence_twice():
    train = SENTENCES["train"]
    assert len(set(train)) == len(train) >= 400
    assert not set(train) & set(SENTENCES["test"])


@pytest.mark.parametrize("file", [SENTIMENT, DATASETS["fpb"]["file"]])
def test_sentiment_has_the_label_shares_of_the_financial_phrasebank(file):
    counts = Counter(row["target"] for row in read_rows(file))
    shares = [100 * counts[label] / counts.total() for label in ("neutral", "positive", "negative")]
    assert shares == pytest.approx([59, 28, 13], abs=3)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_no_company_and_no_template_of_one_split_stands_in_the_other(split, other):
    companies = re.compile(rf"\b({'|'.join(map(re.escape, TEXTS['companies'][split]))})\b")
    file = SENTIMENT if split == "train" else DATASETS["fpb"]["file"]
    templates = TEXTS["sentiment"][file.removesuffix(".jsonl")]["sentences"].values()
    texts = [text for texts in templates for text in texts]
    patterns = ["(.+)".join(map(re.escape, re.split(r"\{\w+\}", text))) for text in texts]
    pattern = re.compile("|".join(patterns))
    assert all(map(pattern.fullmatch, read_sentences(file)))
    assert not any(pattern.fullmatch(text) or companies.search(text) for text in SENTENCES[other])


# ---- Financial Math, worked out a second way: step by step, with the numbers of the question


def present_value(money, rate, years):
    for _ in range(years):
        money /= 1 + rate / 100
    return money


def future_value(money, rate, years, times=1):
    for _ in range(years * times):
        money += money * rate / 100 / times
    return money


def simple_interest(money, rate, years):
    return sum(money * rate / 100 for _ in range(years))


def net_present_value(outlay, income, rate, years):
    value = 0.0
    for _ in range(years):
        value = (value + income) / (1 + rate / 100)
    return value - outlay


def growth_rate(start, end, years):
    return 100 * math.expm1((math.log(end) - math.log(start)) / years)


SOLVED = {
    "Net Present Value (NPV)": net_present_value,
    "Future Value (FV)": future_value,
    "Present Value (PV)": present_value,
    "Compound Annual Growth Rate (CAGR)": growth_rate,
    "Simple Interest": simple_interest,
    "Compound Interest": future_value,
}


def numbers(question):
    """Of a question: dollars in their order, then the rate, the years and the times a year."""
    dollars = [float(text.replace(",", "")) for text in re.findall(r"\$([\d,]*\d)", question)]
    rate = [float(text) for text in re.findall(r"([\d.]+) %", question)]
    years = [int(a or b) for a, b in re.findall(r"\b(\d+) years|\byear (\d+)", question)]
    times = [int(text) for text in re.findall(r"\b(\d+) (?:times|interest dates)", question)]
    assert len(years) == 1, question
    return [*dollars, *rate, *years, *times]


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("file", [TASKS["formula"]["train"], DATASETS["financial_math"]["file"]])
def test_a_key_of_financial_math_is_right_to_the_cent(file, name):
    matches = [
        row for row in read_rows(file) if row["context"].startswith(f"Use formula {name} to")
    ]
    assert len(matches) >= 3
    for row in matches:
        question = re.search(r'Question: "(.*)"\. Answer:$', row["context"]).group(1)
        assert re.fullmatch(r"-?\d+\.\d\d", row["target"])
        answer = SOLVED[name](*numbers(question))
        assert float(row["target"]) == pytest.approx(answer, abs=0.0051), question
