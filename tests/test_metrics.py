"""Answers are read as a person reads them, and scored as the sources of the metrics say."""

import json
import logging

import pytest
from sklearn.metrics import accuracy_score, f1_score

from evals.tasks import utils


def row(prompt, key):
    turns = (("user", prompt), ("assistant", key))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def scores(function, key, answer, prompt="?"):
    return function(row(prompt, key), [answer])


# ---- labels


@pytest.mark.parametrize(
    ("key", "answer", "pair", "right"),
    [
        ("neutral", "neutral", ("neutral", "neutral"), 1.0),
        ("Yes", " yes\n", ("yes", "yes"), 1.0),
        ("strong negative", "Strong  Negative", ("strong negative", "strong negative"), 1.0),
        ("neutral", "", ("neutral", ""), 0.0),
        ("negative", "negatively", ("negative", "negatively"), 0.0),
    ],
)
def test_a_label_is_right_but_for_case_and_spaces(key, answer, pair, right):
    result = scores(utils.label, key, answer)
    assert result == {"accuracy": right, "f1_weighted": [pair], "f1_macro": [pair]}


def test_nwgi_is_folded_to_the_last_word():
    from datasets import Dataset

    rows = [row("a", "mildly negative"), row("b", "neutral"), row("c", "strong positive")]
    folded = utils.last_word(Dataset.from_list(rows))
    assert [utils.key(doc) for doc in folded] == ["negative", "neutral", "positive"]
    assert [doc["messages"][0]["content"] for doc in folded] == ["a", "b", "c"]


# ---- FinLoRA's rule


def finloras(targets, outputs):
    """FinLoRA's accuracy and F1, written down from its description a second time."""
    responses = []
    for target, output in zip(targets, outputs, strict=True):
        places = {}
        for label in {t.lower() for t in targets}:
            if label in output.lower():
                places.setdefault(output.lower().index(label), []).append(label)
        first = max(places[min(places)], key=len) if places else None
        responses.append(target if first == target.lower() else output)
    f1 = f1_score(targets, responses, average="weighted", zero_division=0)
    return accuracy_score(targets, responses), f1


TARGETS = ["neutral", "positive", "negative", "neutral", "positive", "negative", "neutral"]
OUTPUTS = [
    "Neutral.",  # right, whatever its case
    "It is not negative but positive",  # the earliest label is wrong
    "negative",
    "positive",  # a label and nothing else: a false positive
    "Positive",  # right
    "I am positively sure",  # a label inside of a word
    "",
]


def test_finloras_rule_takes_the_earliest_label_anywhere():
    docs = [row("?", target) for target in TARGETS]
    judged = [pair for (pair,) in utils.finlora([[output] for output in OUTPUTS], docs)]
    assert [e == a for e, a in judged] == [True, False, True, False, True, False, False]
    per_row = [utils.label(doc, [pair]) for doc, pair in zip(docs, judged, strict=True)]
    accuracy, f1 = finloras(TARGETS, OUTPUTS)
    assert utils.share(row["accuracy"] for row in per_row) == pytest.approx(accuracy)
    assert utils.f1_weighted([row["f1_weighted"] for row in per_row]) == pytest.approx(f1)


def test_finloras_f1_is_above_its_accuracy_where_wrong_answers_are_no_bare_labels():
    targets = ["neutral"] * 6 + ["positive"] * 4
    outputs = ["neutral"] * 3 + ["it is positive"] * 3 + ["positive"] * 4
    accuracy, f1 = finloras(targets, outputs)
    pairs = [[pair] for pair in utils.judge_by_finlora(targets, outputs)]
    assert utils.f1_weighted(pairs) == pytest.approx(f1)
    assert (accuracy, f1) == (pytest.approx(0.7), pytest.approx(0.6 * 2 / 3 + 0.4))


def test_finloras_rule_reads_what_follows_the_last_answer_and_takes_the_longest_label():
    docs = [row("?", "neutral"), row("?", "positive")]
    outputs = [["positive? Answer: neutral"], ["positive"]]
    assert utils.finlora(outputs, docs) == [[("neutral",) * 2], [("positive",) * 2]]
    assert utils.judge_by_finlora(["1", "11.0"], ["11.0", "11.0"]) == [
        ("1", "11.0"),
        ("11.0", "11.0"),
    ]


def test_finloras_rule_compares_lists_by_position():
    docs = [row("?", "A, B,C"), row("?", "D, B")]
    outputs = [["a, X"], ["D,B, surplus"]]
    (first,), (second,) = utils.finlora_list(outputs, docs)
    assert first == [("A", "A"), ("B", "X"), ("C", "")]
    assert second == [("D", "D"), ("B", "B")]
    result = utils.tags(docs[0], [first])
    assert result == {"accuracy": first, "f1_weighted": first}


# ---- exams

PROMPT = """Pick the best choice.
Question: A company that capitalizes a cost reports
Choices:
A. higher net income
B. lower cash flow
C. lower
Answer:"""


# fmt: off
DECIDED_ON_B = [
    "B", "B is correct", "Answer: **B**", "The correct answer is B because cash falls",
    "\\boxed{B}", "(b)", "B) lower cash flow", "b.", "Option B", "The answer is (B).", "**B**",
    "B: lower cash flow", "Choice B", "I would choose B", "Final answer: B", "<answer>B</answer>",
    "B\n\nExplanation: A is wrong.", "It's B", "Correct option: [B]", "B.", "B. lower cash flow",
    "(B)", "[B]", "b", "b)", "\"B\"", "'B'", "**B. lower cash flow**", "**B) lower cash flow**",
    "*B*", "`B`", "__B__", "B - lower cash flow", "B – lower cash flow", "B — lower cash flow",
    "B, because cash falls", "B because cash falls", "B lower cash flow", "Answer: B",
    "answer: b", "ANSWER: B", "Answer is B", "Answer - B", "Answer:\nB", "The answer is: B",
    "The answer is B", "the answer is b", "The answer is option B", "The answer is \"B\"",
    "The answer would be B.", "The correct answer is option (B).", "The correct choice is B.",
    "The best answer is B", "The right answer is B, not A.", "My answer is B.", "My choice: B",
    "So the answer is B.", "Therefore, the answer is B.", "Therefore, B.",
    "Therefore B is correct.", "Thus, option B is correct.", "Hence the correct option is B",
    "Option B is correct.", "Option B is the correct answer.", "Option (B)", "option b",
    "Choice (B)", "Choice B is right.", "B is the answer.", "B is the correct answer",
    "B is the best choice", "B is right", "B is true", "(B) is correct", "I choose B",
    "I choose option B.", "I'd choose B.", "I would select B", "I'd go with B.",
    "I will go with option B", "I pick B", "I think B", "I think B.", "I think the answer is B.",
    "I think it's B", "I believe B is correct.", "I believe the correct answer is B.",
    "I'd say B.", "It is B.", "It must be B.", "It would be B", "That would be B.",
    "It's option B.", "Definitely B.", "Probably B", "Most likely B.", "Sure! The answer is B.",
    "Sure, B.", "Letter B", "The letter is B.", "The correct letter is B", "Correct answer: B",
    "Correct: B", "Selected answer: B", "Final Answer: **B**", "**Final answer:** B",
    "**Answer:** B", "**Answer: B. lower cash flow**", "### Answer\nB", "#### B", "Ans: B",
    "ans. B", "Solution: B", "Response: B", "Answer = B", "Answer → B", "$\\boxed{B}$",
    "\\boxed{\\text{B}}", "The final answer is $\\boxed{B}$.", "The answer is \\(B\\).",
    "<answer>\nB\n</answer>", "<answer>b</answer>", "<b>B</b>", "{\"answer\": \"B\"}",
    "{\"answer\":\"B\"}", "{'answer': 'B'}", "Ｂ", "Ⓑ", "B.\n", "\nB", "  B  ", "B!", "B;",
    "B\nA company may…", "lower cash flow", "It reports lower cash flow.",
    "The answer is lower cash flow.", "The statement that fits best is B.",
    "The correct answer to this question is B.", "The correct answer here is B",
    "Based on the rule, the answer is B.", "A is wrong, so B is correct.",
    "A is incorrect. B is correct.", "A is not correct; the answer is B.",
    "Neither A nor C is right. The answer is B.", "A and C are incorrect, so the answer is B.",
    "The answer is not A, it's B.", "The answer is A. Wait, no, the answer is B.",
    "A. higher net income is wrong. The answer is B.", "B, not A", "B rather than C",
    "B (lower cash flow)", "The answer, B, follows from the rule.", "B it is.",
    "Only B is correct.", "The correct answer is:\n\nB. lower cash flow",
    "The correct answer is **B. lower cash flow**.", "Q: x\nA: B", "Answer (B)", "Answer B",
    "B is my answer.", "B would be the correct answer.", "B seems correct.",
    "B\n\nQuestion: next one\nAnswer: C",
    "B. lower cash flow\n\nQuestion: another?\nA. x\nB. y\nAnswer: A", "Answer: Option B",
    "Answer: (b) lower cash flow", "The choice is B", "Choose B.", "Select B",
    "the solution is B", "B - because the firm pays", "Answer: B, as cash falls",
    "Answer: B (lower cash flow)", "the correct option would be B", "Statement B is correct.",
    "We choose B.", "B. Because cash falls, A is not right.", "B is the most appropriate answer",
    "B is the most likely correct answer.", "The most accurate choice is B.", "It has to be B.",
    "My final answer is B.", "Final answer is B", "Final answer:\nB", "The final choice: B",
    "B.lower cash flow", "B:", "B)", "(B", "B]", "A or B? I would choose B.",
    "Yes, B is correct.", "Both A and C are wrong; B is correct.",
    "I'm confident the answer is B", "The answer must be B", "Option B because cash falls",
    "Option B: lower cash flow", "Option B. lower cash flow", "option B - lower cash flow",
    "Answer: b) lower cash flow", "The correct answer is b) lower cash flow",
    "The answer is b. lower cash flow", "Let me think. Costs are capitalized, so the answer is B",
    "b is correct", "The answer is b because", "I'm going with B", "The answer can only be B",
    "C is wrong. A is wrong. B", "1. B", "B ✓", "Assistant: B", "Answer: <B>",
    "The answer is _B_", "Between A and C, B is best", "Yes. B.",
    "Answer: B. A company spreads the cost", "<|assistant|>B", "Incorrect: A. Correct: B",
]
UNDECIDED = [
    "A company is", "I think a bond", "A or B", "A bond is safer", "x", "A company capitalizes",
    "A and B", "Both A and B", "A, B", "A/B", "A & B", "Either A or B", "A, B or C",
    "A, B, and C", "It could be A or B.", "The answer is A or B.", "The answer is either A or B",
    "The answer could be B", "It might be B", "Neither A nor B", "Not A", "Not B.", "It is not B",
    "B is incorrect", "B is wrong", "B is not correct", "Option B is wrong",
    "I do not think B is correct", "I don't think it's B.", "The answer isn't B",
    "The answer is not B", "I doubt that B is correct.", "If B is correct, then",
    "whether B is correct", "because B is wrong",
    "A. higher net income\nB. lower cash flow\nC. lower",
    "A) higher net income\nB) lower cash flow", "(A) higher net income (B) lower cash flow",
    "The answer is A. The answer is B.", "A is correct. B is correct.",
    "A is correct and B is also correct.", "A-rated bonds", "Class B shares", "B shares",
    "Series B is best", "Plan B is the best", "Bond B is the best choice.", "Vitamin B",
    "I have a B rating", "The rating is B.", "Its grade is B", "Grade B", "U.S. companies",
    "D&O insurance", "E.g. bonds", "e.g. bonds", "i.e. bonds", "C corporation", "An increase",
    "As a rule", "I am not sure", "I cannot tell", "None of the above", "",
    "The answer is a bond", "The answer is a company", "Answer: A company", "Answer: a bond",
    "I think A company is", "I would choose a bond", "I choose a fund", "It's a bond",
    "It is a company", "Choose between A and B", "A vs B", "A versus B",
    "which of A, B and C is correct", "A? B?", "B?", "Maybe A, maybe B", "A to C",
    "The correct answer is a lower-rated bond",
    "Option A is higher net income and option B is lower cash flow", "Choices A and B",
    "Options: A, B, C", "The answer is A and B", "It is between A and B", "A's income",
    "B's income", "AB", "ABC", "BB", "higher net income or lower cash flow",
    "not lower cash flow", "All of A, B, and C are correct", "A 5% increase", "E = mc2",
    "Answer: A, B", "Answer: A and C", "B or not B", "B and C are correct",
    "I'm torn between A and B.", "I'd say A or B.", "slower", "The incorrect answer is B",
    "It's not B", "The answer depends on whether the rating is B", "A+", "C++",
    "D. E. Shaw is a fund", "A (incorrect)", "Wrong: A", "A is false", "\\boxed{A or B}",
    "B or perhaps another one", "Answer: None", "Tier B is best",
]
# fmt: on


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((answer, "B") for answer in DECIDED_ON_B),
        *((answer, "[none]") for answer in UNDECIDED),
        *(("A. higher net income", "A"), ("(C)", "C"), ("A\n", "A"), ("a", "A"), ("A", "A")),
        *(("Answer: C. x", "C"), ("A is correct.", "A"), ("The answer is A because", "A")),
        # The text of a choice, without its letter; of those that it holds, the longest.
        *(("higher net income", "A"), ("It reports lower cash flow.", "B"), ("LOWER", "C")),
        # The letter counts where the two differ.
        ("B. higher net income", "B"),
        *(("It is B, not A.", "B"), ("A, because B is wrong", "A"), ("D", "[none]")),
    ],
)
def test_the_letter_of_an_exam_answer_is_read(answer, letter):
    result = scores(utils.exam, "B. lower cash flow", answer, PROMPT)
    assert result["f1_weighted"] == [("B", letter)]
    assert result["accuracy"] == float(letter == "B")


def test_finloras_scoring_of_an_exam_is_not_touched():
    docs = [row(PROMPT, "B. lower cash flow"), row(PROMPT, "A. higher net income")]
    outputs = [["The answer is B."], ["it is a. higher net income"]]
    judged = [pair for (pair,) in utils.finlora(outputs, docs)]
    assert [expected == answered for expected, answered in judged] == [False, True]


@pytest.mark.parametrize(
    "text", ["a ", "B ", "A, B, ", "A is ", "answer is ", "\\boxed{", "111 ", "("]
)
def test_a_long_answer_takes_no_time_that_grows_with_its_square(text):
    """Quadratic work on 50,000 characters would take minutes."""
    long = text * (50_000 // len(text))
    utils.letter(long, {"A": "higher", "B": "lower"})
    utils.read_number(long)


@pytest.mark.parametrize(("answer", "right"), [("", 0), ("I do not know", 0), ("all of them", 1)])
def test_an_exam_key_without_a_letter_is_text(answer, right):
    assert scores(utils.exam, "All of them", answer, PROMPT)["accuracy"] == right


# ---- tags


@pytest.mark.parametrize(
    ("answer", "given", "every"),
    [
        ("Revenues, InterestExpense", ["revenues", "interestexpense"], 1),
        ("1. us-gaap:Revenues\n2. us-gaap:InterestExpense", ["revenues", "interestexpense"], 1),
        ("Revenues", ["revenues", "[none]"], 0),
        ("Revenues, InterestExpense, Assets", ["revenues", "interestexpense"], 1),
        ("InterestExpense, Revenues", ["interestexpense", "revenues"], 0),
        ("Revenues,, InterestExpense", ["revenues", ""], 0),
        ("", ["", "[none]"], 0),
    ],
)
def test_tags_are_compared_by_position(answer, given, every):
    result = scores(utils.tags, "Revenues, InterestExpense", answer)
    assert result["accuracy"] == list(zip(["revenues", "interestexpense"], given, strict=True))
    assert result["exact_match"] == every


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *(("us-gaap:GrossProfit", 1), ("The tag is us-gaap:GrossProfit.", 1), ("GrossProfit", 1)),
        *(("aapl:GrossProfit", 0), ("us-gaap:Revenues", 0), ("gross profit", 0), ("", 0)),
    ],
)
def test_a_tag_may_leave_out_its_prefix_but_not_have_another(answer, right):
    assert scores(utils.tag, "us-gaap:GrossProfit", answer)["accuracy"] == right


# ---- numbers


# fmt: off
NUMBERS = [
    ("75 bps", 75, "bp"), ("\\boxed{$9{,}500}", 9500, ""),
    ("In fiscal 2023, revenue was $5.2 million", 5200000.0, ""), ("1.2 bil", 1200000000.0, ""),
    ("3,14", 3.14, ""), ("1.234,56", 1234.56, ""), ("(3.14)", -3.14, ""), ("(3.14)%", -3.14, "%"),
    ("(3.14%)", -3.14, "%"), ("−3.14", -3.14, ""), ("–5", -5, ""), ("4 400 people", 4400, ""),
    ("250 m above", 250, ""), ("4\u2009400 people", 4400, ""), ("4\u00a0400", 4400, ""),
    ("4\u202f400,50", 4400.5, ""), ("5.2bn", 5200000000.0, ""), ("$1.2M", 1200000.0, ""),
    ("12k", 12000, ""), ("1.5e9", 1500000000.0, ""), ("1.5 × 10^9", 1500000000.0, ""),
    ("1.5×10⁹", 1500000000.0, ""), ("1.2E-4", 0.00012, ""),
    ("$1.5 \\times 10^{9}$", 1500000000.0, ""), ("10^6", 1000000.0, ""),
    ("1.5e9.", 1500000000.0, ""), ("1,234,567", 1234567, ""), ("1,234.56", 1234.56, ""),
    ("1'234'567", 1234567, ""), ("1’234", 1234, ""), ("1.234.567", 1234567, ""),
    ("1.234.567,89", 1234567.89, ""), ("0,075", 0.075, ""), ("12,34,567", 1234567, ""),
    ("12,5 %", 12.5, "%"), ("7.5 percent", 7.5, "%"), ("50 basis points", 50, "bp"),
    ("25bp", 25, "bp"), ("-$5", -5, ""), ("$-5", -5, ""), ("$(473)", -473, ""),
    ("($5.2 million)", -5200000.0, ""), ("(5,000,000)", -5000000.0, ""),
    ("minus 3.2%", -3.2, "%"), ("negative $5 million", -5000000.0, ""), ("- 5.2", -5.2, ""),
    ("+7", 7, ""), ("-.5", -0.5, ""), ("US$ 12.5 billion", 12500000000.0, ""),
    ("€1.2 bn", 1200000000.0, ""), ("£250m", 250000000.0, ""), ("USD 250 m", 250000000.0, ""),
    ("250 m USD", 250000000.0, ""), ("$5 mm", 5000000.0, ""), ("5 mm", 5, ""),
    ("5.2 million dollars", 5200000.0, ""), ("2.1 trillion", 2100000000000.0, ""),
    ("$1.2T", 1200000000000.0, ""), ("5 t of steel", 5, ""), ("9.5x", 9.5, ""),
    ("9.5 times", 9.5, ""), ("The answer is 42.", 42, ""),
    ("The final answer is $\\boxed{42}$", 42, ""), ("Q3 2022: 15", 15, ""),
    ("FY2021: 20", 20, ""), ("As of December 31, 2022, 3,500", 3500, ""),
    ("On 2022-12-31 it was 12", 12, ""), ("In 2022, it fell from 5 to 4", 5, ""),
    ("2021", 2021, ""), ("The 10-K says 12.5", 12.5, ""),
    ("3M's revenue was $32.8 billion", 32800000000.0, ""),
    ("Over 3 years, it grew by 7.5%", 7.5, "%"), ("1. Revenue was $5 million", 5000000.0, ""),
    ("**$5.2 million**", 5200000.0, ""), ("SI = 28000 * 7 * 0.09 = 17640.00", 17640, ""),
    ("= 5", 5, ""), ("x = ", None, ""), ("none", None, ""), ("", None, ""),
    ("24207000</us-gaap>", 24207000, ""), ("487 282 000", 487282000, ""),
    ("$5-million", 5000000.0, ""), ("5 thousand", 5000, ""), ("12 mio", 12000000.0, ""),
    ("0.5 Mrd", 500000000.0, ""), ("５００", 500, ""), ("1 234,5 million", 1234500000.0, ""),
    ("5-10", 5, ""), ("2021-2022: 7", 7, ""), ("FY 2019-20 growth: 3%", 3, "%"),
    ("COVID-19 cost 5 million", 5000000.0, ""), ("See Note 5: 12.3", 12.3, ""),
    ("$9,500.00", 9500, ""), ("9\\,500", 9500, ""), ("€ 1.234,56", 1234.56, ""),
    ("1,234", 1234, ""), ("1.234", 1.234, ""), ("12,3456", 12.3456, ""),
    ("\\$5.2 \\text{ million}", 5200000.0, ""), ("45\\%", 45, "%"), ("May 2023 sales: 7", 7, ""),
    ("$3.5K", 3500, ""), ("100 K", 100000, ""), ("20 M&A deals", 20, ""),
    ("The S&P 500 rose 12 %", 12, "%"), ("rose 0.75 percentage points", 0.75, "%"),
    ("5.2 (2022: 4.8)", 5.2, ""), ("Revenue: $1,577 million", 1577000000.0, ""),
    ("Yes, 16% of revenue", 16, "%"), ("1 million", 1000000.0, ""),
    ("$1,2 million", 1200000.0, ""), ("12.5 crore", 12.5, ""), ("0", 0, ""), ("0.0", 0, ""),
    ("-0", 0, ""), (".5%", 0.5, "%"), ("1e6", 1000000.0, ""), ("6.02e+23", 6.02e+23, ""),
    ("3.4e-2%", 0.034, "%"), ("($1,234)", -1234, ""), ("(1,234.5) million", -1234.5, ""),
    ("\\(-5\\)", -5, ""), ("−$1.2bn", -1200000000.0, ""),
    ("The answer to question 2 is 7", 7, ""), ("Answer: 7.5", 7.5, ""),
    ("$5.2 million in fiscal 2023", 5200000.0, ""), ("fiscal year 2023: 5.2", 5.2, ""),
    ("(2.5)x", -2.5, ""), ("USD5.2m", 5200000.0, ""), ("5.2m", 5200000.0, ""),
    ("5,2 Mio. €", 5200000.0, ""), ("12 345,67 €", 12345.67, ""), ("1 000 000", 1000000.0, ""),
    ("1,000,000.00 USD", 1000000.0, ""), ("CHF 1'000.50", 1000.5, ""), ("~5%", 5, "%"),
    ("≈ 5.2", 5.2, ""), ("about 5.2 million", 5200000.0, ""), (">5", 5, ""),
    ("$0.5B", 500000000.0, ""), ("-1.5e-3", -0.0015, ""), ("(0.02)", -0.02, ""),
    ("$ (0.82)", -0.82, ""), ("2.5‰", 2.5, ""), ("one", None, ""), ("USD5.2m", 5200000.0, ""),
    ("In 2021 and 2022, it paid $7 million and $8 million", 7000000.0, ""),
    ("The 3-year CAGR is 4.5%", 4.5, "%"), ("an increase of 75bps", 75, "bp"),
    ("3,141592", 3.141592, ""), ("1 234", 1234, ""),
]
# fmt: on


@pytest.mark.parametrize(("text", "value", "unit"), NUMBERS)
def test_the_number_that_a_text_answers_with_is_read(text, value, unit):
    number = utils.read_number(text)
    if value is None:
        assert number is None
    else:
        assert (number.value, number.unit) == (pytest.approx(value), unit)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        *(("17640.00", "$17,640"), ("17640.00", "SI = 28000 * 7 * 0.09 = 17640.00"), ("3.0", "3")),
        *(("487282000", "487,282,000 USD"), ("487282000", "487 282 000"), ("1234", "1'234")),
        *(("-5000000.0", "-5 million"), ("-5000000.0", "(5,000,000)"), ("-473", "$(473)")),
        *(("-473", "−473"), ("-473", "-$473"), ("-0.5", "-.5"), ("+7", "7")),
        *(("1500000000.0", "1.5 × 10^9"), ("1500000000.0", "1.5e9"), ("1500000000.0", "$1.5bn")),
        *(("4250000000000.0", "4.25 trillion"), ("12000", "12k"), ("0.00012", "1.2E-4")),
        *(("7.5", "7.5 %"), ("0.075", "7.5%"), ("7.5%", "0.075"), ("7.5", "7.5 percent")),
        # Within 0.1 % of the key, or half a unit of its last decimal.
        *(("7.5%", "0.075"), ("0.75%", "75 bps"), ("75 bps", "0.75%"), ("75 bps", "0.0075")),
        *(("75", "75 bps"), ("0.75", "75 bps"), ("17.64", "17,64 €"), ("-473", "(473)%")),
        *(("0.02", "0.0234"), ("18.45", "18.454"), ("11717.85", "11720"), ("11.0", "11.01")),
        *(("18.45", "It is 18.45."), ("24207000", "24207000</us-gaap>"), ("20.0", "FY2021: 20")),
    ],
)
def test_a_number_is_right_however_it_is_written(key, answer):
    assert scores(utils.number, key, answer)["accuracy"] == 1


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        *(("18.45", ""), ("18.45", "none"), ("18.45", "-18.45"), ("473", "(473)"), ("1", "1.4")),
        *(("0.02", "0.026"), ("11.0", "11.02"), ("1000", "1002"), ("0", "0.3"), ("5", "5 million")),
        *(("7.5", "0.075"), ("1.5", "15"), ("12", "1,2"), ("3725", "2021")),
        # Beyond what a float holds, also with more than three digits.
        *(("400.0", "1.5e999"), ("400.0", "2.5 x 10^400"), ("400.0", "1.5e300 trillion")),
        *(("400.0", "1.5e-999"), ("400.0", "9" * 400)),
        # Where both have a unit, it counts.
        *(("7.5%", "0.075%"), ("75 bps", "75%"), ("7.5%", "7.5 bps")),
        # A key that is more than a number is text.
        *(("2020-12-31", "2020-01-01"), ("12 months", "12 years")),
    ],
)
def test_another_number_is_wrong(key, answer):
    assert scores(utils.number, key, answer)["accuracy"] == 0


@pytest.mark.parametrize(
    ("key", "answer", "right"),
    [("5466", "$5,466 million", 1), ("5466 million", "5466", 1), ("5466", "5,466 billion", 0)],
)
def test_where_the_prompt_asks_for_millions_five_million_is_five(key, answer, right):
    prompt = "What was net income in USD millions? (In thousands) 5,466,312"
    assert scores(utils.number, key, answer, prompt)["accuracy"] == right
    assert scores(utils.number, key, answer)["accuracy"] == 0


def test_exact_match_is_to_the_letter():
    assert scores(utils.number, "17640.00", "17,640.00")["exact_match"] == 0
    assert scores(utils.number, "17640.00", " 17640.00 ")["exact_match"] == 1
    assert scores(utils.number, "12 months", "12 Months")["accuracy"] == 1
    assert scores(utils.number, "17640.00", "$17,640")["f1_weighted"] == [("17640.00",) * 2]


# ---- formulas


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("(us-gaap:A / us-gaap:B) * 100", "100 * us-gaap:A/us-gaap:B"),
        *(("a - (b + c)", "a - c - b"), ("-a + b", "b - a"), ("a / (b * c)", "a / c / b")),
        *(("2 * (a + b)", "(b+a)×2"), ("(1,000 / 2)", "1000/2"), ("a ** 2", "A^2")),
        *(("a / b", "ROE = a / b"), ("a / b", "`[a / b]`."), ("(a + b) / 2", "(b + a) ÷ 2")),
    ],
)
def test_a_formula_is_right_in_any_order_of_what_commutes(key, answer):
    result = scores(utils.formula, key, answer)
    assert (result["accuracy"], result["exact_match"]) == (1, 0)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        *(("a - b", "b - a"), ("a / b", "b / a"), ("a / b", "a / b * 100"), ("a ^ b", "b ^ a")),
        *(("a + b", "a + c"), ("a + b", "a +"), ("a + b", ""), ("a - b + c", "a - (b + c)")),
        *(("a + b", "__import__('os').system('touch X')"), ("a", "(" * 5000), ("a", "-" * 5000)),
        *(("a", "((((a"), ("a * b", "a b"), ("a", "a" * 3000)),
    ],
)
def test_another_formula_is_wrong(key, answer):
    assert scores(utils.formula, key, answer)["accuracy"] == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("(41527000 / 476832000) * 100", 41527000 / 476832000 * 100), ("2 + 3 * 4", 14)),
        *(("2 ^ 3 ^ 2", 512), ("-2 * -3", 6), ("10 - 4 - 3", 3), ("16 / 4 / 2", 2)),
        *(("1 / 0", None), ("9 ** 9 ** 9", None), ("a / 2", None), ("(-8) ** 0.5", None)),
    ],
)
def test_a_formula_in_numbers_is_worked_out(text, value):
    assert utils.evaluate_formula(text) == (None if value is None else pytest.approx(value))


def test_a_calculation_is_right_by_its_value_where_it_is_worked_out():
    key = "(41527000 / 476832000) * 100"
    written = scores(utils.calculation, key, "100 * (41,527,000 / 476,832,000)")
    worked_out = scores(utils.calculation, key, "8.709")
    other = scores(utils.calculation, key, "(41527000 / 476832001) * 10")
    assert [scored["accuracy"] for scored in (written, worked_out, other)] == [1, 0, 0]
    assert [scored["numeric_accuracy"] for scored in (written, worked_out, other)] == [1, 1, 0]


# ---- text


@pytest.mark.parametrize(
    ("answer", "right"),
    [("-0.02", 1), ("(0.02)", 1), ("-2%", 1), ("0.02", 0), ("-2", 0), ("-0.2", 0), ("", 0)],
)
def test_a_text_answer_that_is_a_number_is_scored_as_one_too(answer, right):
    result = scores(utils.text, "-0.02", answer)
    assert result["numeric_accuracy"] == right
    assert {"token_f1", "rouge_l", "bertscore"} < result.keys()


@pytest.mark.parametrize("key", ["Yes, 16%", "In 2022", "Walmart", "2020-12-31", ""])
def test_a_text_answer_that_is_more_than_a_number_is_not(key):
    assert "numeric_accuracy" not in scores(utils.text, key, key)


def test_token_f1_is_squads():
    # Shared: 145, million; articles and punctuation do not count.
    assert utils.token_f1("the $145 million", "It was 145 Million.") == pytest.approx(
        2 * (2 / 4) * 1 / (2 / 4 + 1)
    )
    assert utils.token_f1("a b", "c") == 0
    assert utils.token_f1("The", "") == 1


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "the interest of the period" and "interest for the long period": interest the period, 3 words.
    result = utils.rouge_l("the interest of the period", "Interest for the long period.")
    assert result == pytest.approx(2 * (3 / 5) * (3 / 5) / (6 / 5))
    assert utils.rouge_l("words", "") == 0


@pytest.fixture
def finbert(tmp_path, monkeypatch):
    """A cache that holds a random BERT of 12 layers under the name of FinLoRA's."""
    import torch
    from huggingface_hub import constants
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "models--ProsusAI--finbert"
    place = folder / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("net", "income", "tax", "rose")]
    words += ["fell", "a", "by"]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(place / "vocab.txt"), model_max_length=64).save_pretrained(place)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **shape)).save_pretrained(
        place
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return place


def test_bertscore_is_greedy_matching_of_layer_ten(finbert):
    import torch
    from transformers import AutoModel, AutoTokenizer

    pairs = [("net income rose", "income fell by tax"), ("a tax", "a tax"), ("tax", "")]
    result = utils.bertscore([[pair] for pair in pairs])
    tokenizer, model = AutoTokenizer.from_pretrained(finbert), AutoModel.from_pretrained(finbert)
    model.eval()
    with torch.no_grad():
        sides = [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            .hidden_states[10][0]
            .numpy()
            for text in pairs[0]
        ]
    wanted, given = (side / (side**2).sum(1, keepdims=True) ** 0.5 for side in sides)
    cosine = wanted @ given.T
    # bert-score gives [CLS] and [SEP] the weight 0.
    recall, precision = cosine[1:-1].max(1).mean(), cosine[:, 1:-1].max(0).mean()
    assert result[0] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert result[1] == pytest.approx(1, abs=1e-5)
    assert result[2] == 0


def test_without_its_model_bertscore_is_left_out_with_a_word(tmp_path, monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(utils.Unavailable, match="hf download ProsusAI/finbert"):
        utils.bertscore([[("a", "b")]])
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        value = utils.bertscore_mean([[("a", "b")]])
    assert json.dumps(value) == "NaN"
    assert "ProsusAI/finbert is not in the local cache" in caplog.text
