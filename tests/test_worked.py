"""Answers that are calculations: found from a question and its key, scored by what they give."""

import ast
import json
import math
import random
import subprocess
import sys

import pytest

from bench import jobs
from evals.tasks import utils
from tests.chat_files import read_turns
from tools import common, sources
from tools.data import convert
from tools.data.expressions import Quantity, exp, ln
from tools.data.formulas import find_expressions
from tools.data.rules import load_train_rules

PROMPT = (
    "Use formula {} to answer the question. Answer with a numerical answer with 2 decimal places "
    "and with no explanations or other text. Formula: {}, Explanation: as usual. "
    'Question: "{}". Answer:'
)
QUICK = ("Quick Ratio (Acid-Test Ratio)", "QR = (CA - I) / CL")
GROWTH = ("Future Value (FV)", "FV = PV × (1 + r)^n")
QUESTIONS = {
    "one": (
        QUICK,
        "Current assets are $90,000, inventories $30,000 and current liabilities $40,000.",
        "1.5",
        ("(90000 - 30000) / 40000",),
    ),
    "several": (
        QUICK,
        "Current assets are $90,000, inventories $30,000 and current liabilities $60,000.",
        "1.0",
        ("(90000 - 30000) / 60000", "(90000 - 60000) / 30000"),
    ),
    "none": (
        QUICK,
        "Current assets are $90,000, inventories $30,000 and current liabilities $40,000.",
        "7.0",
        (),
    ),
    "the order of a sum alone": (
        ("Operating Cash Flow (OCF)", "OCF = NI + D + ΔWC"),
        "Net income is $70, depreciation $20 and the change of working capital $10.",
        "100",
        ("70 + 20 + 10",),
    ),
    "a rate and a time": (
        GROWTH,
        "$2,000 grow at 3% a year for 10 years.",
        "2687.83",
        ("2000 * (1 + 0.03) ^ 10",),
    ),
    "percent": (
        ("Operating Margin", "OM = (OI / R) × 100"),
        "Operating income is $12,000 and revenue $50,000.",
        "24.0",
        ("12000 / 50000 * 100",),
    ),
    "no expression": (
        ("Black-Scholes Option Pricing Model", "C = S N(d1) - X e^(-rt) N(d2)"),
        "The stock is at $100, the strike at $100, the rate 5%, the volatility 20%, in 1 year.",
        "10.45",
        (),
    ),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_a_question_and_its_key_give_the_calculations_between_them(case):
    (name, formula), question, answer, expressions = QUESTIONS[case]
    assert find_expressions(PROMPT.format(name, formula, question), answer) == expressions


def test_quantities_write_what_they_compute():
    rate, years, amount = Quantity(0.05), Quantity(3), Quantity(1000)
    written = {
        amount * (1 + rate) ** years: "1000 * (1 + 0.05) ^ 3",
        amount - (rate - years): "1000 - (0.05 - 3)",
        amount / (rate * years): "1000 / (0.05 * 3)",
        (amount / 4) * 4: "1000",
        sum([amount, years]) * 1 - 0: "1000 + 3",
        amount * exp(-rate * years): "1000 * exp((-0.05) * 3)",
        ln(amount) / ln(1 + rate): "ln(1000) / ln(1 + 0.05)",
        Quantity(-5) * years: "(-5) * 3",
    }
    for quantity, text in written.items():
        assert quantity.text == text
        assert utils.evaluate_formula(text) == pytest.approx(float(quantity), rel=1e-12)


def test_every_reading_of_random_quantities_comes_to_its_value():
    draw = random.Random(3)
    operations = [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: (a * a) ** b,
        lambda a, b: -a - b,
    ]
    for _ in range(300):
        numbers = [Quantity(round(draw.uniform(0.5, 3), 2)) for _ in range(4)] + [2, 1.0]
        while len(numbers) > 1:
            draw.shuffle(numbers)
            left, right = numbers.pop(), numbers.pop()
            try:
                numbers.append(draw.choice(operations)(left, right))
            except ArithmeticError:
                numbers.append(left)
        if isinstance(numbers[0], Quantity) and 1e-9 < abs(numbers[0]) < 1e90:
            value = utils.evaluate_formula(numbers[0].text)
            assert value == pytest.approx(float(numbers[0]), rel=1e-9)


# ---- the rows


def test_training_rows_get_calculations_and_test_rows_keep_their_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    folder = tmp_path / "data"
    rows = [
        {"context": PROMPT.format(*formula, question), "target": answer}
        for formula, question, answer, _ in QUESTIONS.values()
    ]
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"formula_{name}.jsonl").write_text(text)
    convert.convert_task("formula_worked", folder)
    manifest = sources.manifest(sources.train_path("formula_worked"))
    removed = {entry["repair"]: entry["rows"] for entry in manifest["removed"]}
    assert removed == {"without_expression": 2, "with_several_expressions": 1}
    trained = read_turns(sources.train_path("formula_worked"))
    assert [answer for _, answer in trained] == [
        f"{expressions[0]} = {answer}"
        for _, _, answer, expressions in QUESTIONS.values()
        if len(expressions) == 1
    ]
    tested = read_turns(sources.test_path("financial_math_worked"))
    assert [answer for _, answer in tested] == [row["target"] for row in rows]
    for prompt, _ in trained + tested:
        assert "Answer with the calculation in numbers" in prompt
        assert "with no explanations" not in prompt


def test_a_prompt_without_the_instruction_is_refused():
    reword = load_train_rules("formula_worked", sources.SAMPLE).reword
    with pytest.raises(ValueError, match="the prompt lacks its instruction"):
        reword("What is 1 + 1?", "2")


# ---- scoring


@pytest.mark.parametrize(
    ("answer", "accuracy", "stated"),
    [
        ("(120.5 - 98.2) / 98.2 * 100 = 22.71", 1, 1),
        ("(120.5 - 98.2) / 98.2 * 100 = 12", 1, 0),
        ("(120.5 - 98.2) / 98.2 = 22.71", 0, 1),
        ("R = (120.5 - 98.2) / 98.2 * 100 = 22.71", 1, 1),
        ("(120.5 - 98.2) / 98.2 * 100", 1, 0),
        ("22.71", 1, 1),
        ("22.71%", 1, 1),
        ("exp(ln(22.71))", 1, 0),
        ("sqrt(22.71 ^ 2) = 22.71\nQuestion: …", 1, 1),
        ("100 * 22.71% = 22.71", 1, 1),
        ("revenue / cost = 22.71", 0, 1),
        ("", 0, 0),
        ("= ", 0, 0),
    ],
)
def test_the_value_of_a_calculation_counts_and_the_stated_one_apart(answer, accuracy, stated):
    doc = {
        "messages": [
            {"role": "user", "content": "How much?"},
            {"role": "assistant", "content": "22.71"},
        ]
    }
    scores = utils.worked(doc, [answer])
    assert scores == {"accuracy": accuracy, "numeric_accuracy": stated}


HOSTILE = [
    "__import__('os').system('touch X')",
    "().__class__.__bases__[0].__subclasses__()",
    "exp.__globals__",
    "(lambda: 1)()",
    "[x for x in (1, 2)]",
    "ln(1, 2)",
    "ln(*(1, 2))",
    "exp(x=1)",
    "open(1)",
    "1 if 1 else 2",
    "2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 9",
    "9 ^ 9 ^ 9 ^ 9",
    "exp(exp(exp(9)))",
    "1e9",
    "1_000",
    "0x1f",
    "1j",
    "ln(0)",
    "sqrt(0 - 1)",
    "(0 - 8) ^ 0.5",
    "1 / 0",
    "(" * 900 + "1" + ")" * 900,
    "-" * 1500 + "1",
    "1" + " + 1" * 700,
    "2 ^ " * 400 + "1",
    "ln(" * 300 + "1" + ")" * 300,
    "9" * 3000,
    "True",
    "1 @ 2",
    "1; 2",
    "f'{1}'",
    "1 # 2",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_calculation_of_numbers_has_no_value(text):
    assert utils.evaluate_formula(text) is None


def test_whatever_is_thrown_at_the_evaluator_only_arithmetic_runs():
    """Random texts of its alphabet and of Python's give a float or None, and nothing else."""
    draw = random.Random(20)
    arithmetic = list("0123456789.+-*/^() ") + ["ln(", "exp(", "sqrt(", ")"]
    others = ["x", "os", "__", "[", "]", "{", "'", '"', ",", ":", "=", "\\", "lambda ", "eval("]
    values = 0
    for number in range(20_000):
        pieces = arithmetic if number % 2 else arithmetic + others
        text = "".join(draw.choices(pieces, k=draw.randint(1, 14)))
        value = utils.evaluate_formula(text)
        assert value is None or (type(value) is float and abs(value) <= utils.LARGEST), text
        values += value is not None
    assert values > 500


def test_the_evaluator_calls_nothing_of_pythons_that_an_audit_hook_sees():
    """Python reports imports, files, processes and more. None may occur but `compile`, with which
    `ast.parse` reads.
    """
    code = (
        "import sys\nfrom evals.tasks import utils\nutils.evaluate_formula('ln(2) + 1')\n"
        "events = []\nsys.addaudithook(lambda name, args: events.append(name))\n"
        f"for text in {HOSTILE!r}: utils.evaluate_formula(text)\n"
        "print(sorted(set(events)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["compile"]


def test_a_value_is_what_python_computes():
    draw = random.Random(5)
    for _ in range(200):
        a, b, c = (round(draw.uniform(0.1, 9), 2) for _ in range(3))
        text = f"ln({a}) * ({b} - {c}) ^ 2 / exp({c}) + sqrt({b})"
        value = math.log(a) * (b - c) ** 2 / math.exp(c) + math.sqrt(b)
        assert utils.evaluate_formula(text) == pytest.approx(value, rel=1e-9, abs=1e-12)


# ---- the experiment


def test_fewer_seeds_do_not_take_the_place_of_more(tmp_path, monkeypatch):
    results = tmp_path / "worked.json"
    common.write_json(results, {"seeds": [42, 43, 44]})
    monkeypatch.setattr(sys, "argv", ["bench.worked", "--seeds", "2"])
    with pytest.raises(common.WrongInput, match="worked.json holds 3 seeds"):
        jobs.read_seed_count("calculations", results)
    monkeypatch.setattr(sys, "argv", ["bench.worked", "--seeds", "3"])
    assert jobs.read_seed_count("calculations", results) == 3
    results.unlink()
    monkeypatch.setattr(sys, "argv", ["bench.worked", "--seeds", "1"])
    assert jobs.read_seed_count("calculations", results) == 1
