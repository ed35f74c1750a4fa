"""The example data is what its script writes, is complete, keeps its splits apart and is right."""

import json
import math
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest

from tools import sources
from tools.common import ROOT
from tools.data import convert

SAMPLE = ROOT / "data" / "sample"
MAKE = runpy.run_path(str(SAMPLE / "make.py"), run_name="sample_make")
TASKS, DATASETS = sources.tables()["tasks"], sources.tables()["datasets"]
FILES = sorted(path.relative_to(SAMPLE).as_posix() for path in SAMPLE.glob("t*/*.jsonl"))
SENTIMENT_TESTS = [DATASETS[name]["file"] for name in TASKS["sentiment"]["eval"]]


def rows(file):
    return [json.loads(line) for line in (SAMPLE / file).read_text().splitlines()]


def sentences(*files):
    matches = [re.search(r"\nInput: (.*)\nAnswer: $", r["context"]) for f in files for r in rows(f)]
    return [match.group(1) for match in matches]


TRAIN_SENTENCES = sentences(TASKS["sentiment"]["train"])
TEST_SENTENCES = sentences(*SENTIMENT_TESTS)


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
        held = (manifest["validation"] or {"rows": 0})["rows"]
        assert manifest["rows"] + held == len(rows(source)) >= 20, source
        assert manifest["from"] == "data/sample"


@pytest.mark.parametrize("file", FILES)
def test_every_row_has_the_form_of_its_file(file):
    for row in rows(file):
        prompt, answer = row["context"], row["target"]
        assert prompt.rstrip(" ").endswith("Answer:") and answer.strip()
        # No slot of a template is left, and nothing but plain text.
        assert (prompt + answer).isascii() and not re.search(r"[\x00-\x09\x0b-\x1f]|[{}]\w", answer)
        assert "_batched" not in file or len(answer.split(", ")) == 4
        assert not re.search("cfa|cpa", file) or f"\n{answer}\n" in prompt


def test_every_label_occurs():
    for dataset in DATASETS.values():
        if "labels" in dataset:
            assert {row["target"] for row in rows(dataset["file"])} == set(dataset["labels"])


def test_no_prompt_stands_twice_or_in_both_splits():
    prompts = [row["context"] for file in FILES for row in rows(file)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("train", "tests", "column"),
    [
        ("TRAIN_HEADLINES", ["TEST_HEADLINES"], 0),
        ("TRAIN_EXAM", ["LEVEL1_EXAM", "LEVEL2_EXAM", "LEVEL3_EXAM", "REG_EXAM"], 0),
        ("TRAIN_TAGGING", ["TEST_TAGGING", "FNXL_TAGGING"], 1),
        ("TRAIN_TERMS", ["TEST_TERMS"], 0),
        ("TRAIN_QUESTIONS", ["TEST_QUESTIONS"], 1),
        ("TRAIN_PAGES", ["TEST_PAGES"], 0),
        ("TRAIN_LOAN_SENTENCES", ["TEST_LOAN_SENTENCES"], 0),
    ],
)
def test_no_template_is_used_twice_or_in_both_splits(train, tests, column):
    texts = [row[column] for name in (train, *tests) for row in MAKE["fields"](MAKE[name])]
    assert len(set(texts)) == len(texts)


def test_no_computed_exam_question_is_in_both_splits():
    names = ("TRAIN_COMPUTED", "LEVEL1_COMPUTED", "LEVEL2_COMPUTED", "LEVEL3_COMPUTED")
    texts = [question.text for name in (*names, "REG_COMPUTED") for question in MAKE[name]]
    assert len(set(texts)) == len(texts)


def test_every_formula_has_questions():
    names = {spec.name for spec in MAKE["FORMULAS"]}
    for block in (MAKE["TRAIN_QUESTIONS"], MAKE["TEST_QUESTIONS"]):
        assert {name for name, _ in MAKE["fields"](block)} == names


def test_every_dataset_belongs_to_a_task():
    assert {name for task in TASKS.values() for name in task["eval"]} == set(DATASETS)


def test_sentiment_has_enough_rows_and_no_sentence_twice():
    assert len(TRAIN_SENTENCES) >= 400
    assert len(set(TRAIN_SENTENCES)) == len(TRAIN_SENTENCES)
    assert not set(TRAIN_SENTENCES) & set(TEST_SENTENCES)


@pytest.mark.parametrize("file", [TASKS["sentiment"]["train"], DATASETS["fpb"]["file"]])
def test_sentiment_has_the_label_shares_of_the_financial_phrasebank(file):
    counts = Counter(row["target"] for row in rows(file))
    shares = [100 * counts[label] / counts.total() for label in ("neutral", "positive", "negative")]
    assert shares == pytest.approx([59, 28, 13], abs=3)


@pytest.mark.parametrize(
    ("mine", "other"),
    [("TRAIN_COMPANIES", TEST_SENTENCES), ("TEST_COMPANIES", TRAIN_SENTENCES)],
    ids=["train companies", "test companies"],
)
def test_no_company_of_one_split_stands_in_the_other(mine, other):
    company = re.compile(rf"\b({'|'.join(map(re.escape, MAKE[mine]))})\b")
    assert [sentence for sentence in other if company.search(sentence)] == []


@pytest.mark.parametrize(
    ("mine", "own", "other"),
    [
        ("TRAIN_SENTIMENT", TRAIN_SENTENCES, TEST_SENTENCES),
        ("TEST_SENTIMENT", sentences(DATASETS["fpb"]["file"]), TRAIN_SENTENCES),
    ],
    ids=["train templates", "test templates"],
)
def test_no_template_of_one_split_gives_a_sentence_of_the_other(mine, own, other):
    templates = [text for block in MAKE[mine].values() for text in MAKE["items"](block)]
    forms = ["(.+)".join(map(re.escape, re.split(r"\{\w+\}", text))) for text in templates]
    form = re.compile("|".join(forms))
    assert all(form.fullmatch(sentence) for sentence in own)
    assert [sentence for sentence in other if form.fullmatch(sentence)] == []


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
    asked = [row for row in rows(file) if row["context"].startswith(f"Use formula {name} to")]
    assert len(asked) >= 3
    for row in asked:
        question = re.search(r'Question: "(.*)"\. Answer:$', row["context"]).group(1)
        assert re.fullmatch(r"-?\d+\.\d\d", row["target"])
        answer = SOLVED[name](*numbers(question))
        assert float(row["target"]) == pytest.approx(answer, abs=0.0051), question
