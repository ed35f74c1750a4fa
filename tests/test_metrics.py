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
    found = scores(utils.label, key, answer)
    assert found == {"accuracy": right, "f1_weighted": [pair], "f1_macro": [pair]}


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
    judged = [one for (one,) in utils.finlora([[output] for output in OUTPUTS], docs)]
    assert [e == a for e, a in judged] == [True, False, True, False, True, False, False]
    per_row = [utils.label(doc, [pair]) for doc, pair in zip(docs, judged, strict=True)]
    accuracy, f1 = finloras(TARGETS, OUTPUTS)
    assert utils.share(one["accuracy"] for one in per_row) == pytest.approx(accuracy)
    assert utils.f1_weighted([one["f1_weighted"] for one in per_row]) == pytest.approx(f1)


def test_finloras_f1_is_above_its_accuracy_where_wrong_answers_are_no_bare_labels():
    targets = ["neutral"] * 6 + ["positive"] * 4
    outputs = ["neutral"] * 3 + ["it is positive"] * 3 + ["positive"] * 4
    accuracy, f1 = finloras(targets, outputs)
    pairs = [[pair] for pair in utils.judged(targets, outputs)]
    assert utils.f1_weighted(pairs) == pytest.approx(f1)
    assert (accuracy, f1) == (pytest.approx(0.7), pytest.approx(0.6 * 2 / 3 + 0.4))


def test_finloras_rule_reads_what_follows_the_last_answer():
    docs = [row("?", "neutral"), row("?", "positive")]
    outputs = [["positive? Answer: neutral"], ["positive"]]
    assert [one[0] for one in utils.finlora(outputs, docs)] == [("neutral",) * 2, ("positive",) * 2]


def test_a_label_that_begins_another_does_not_hide_it():
    assert utils.judged(["1", "11.0"], ["11.0", "11.0"]) == [("1", "11.0"), ("11.0", "11.0")]


def test_finloras_rule_compares_lists_by_position():
    docs = [row("?", "A, B,C"), row("?", "D, B")]
    outputs = [["a, X"], ["D,B, surplus"]]
    (first,), (second,) = utils.finlora_list(outputs, docs)
    assert first == [("A", "A"), ("B", "X"), ("C", "")]
    assert second == [("D", "D"), ("B", "B")]
    found = utils.tags(docs[0], [first])
    assert found == {"accuracy": first, "f1_weighted": first}


# ---- exams

PROMPT = """Pick the best choice.
Question: A company that capitalizes a cost reports
Choices:
A. higher net income
B. lower cash flow
C. lower
Answer:"""


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("A. higher net income", "A"), ("B", "B"), ("(C)", "C"), ("B) lower", "B"), ("A\n", "A")),
        *(("The answer is B.", "B"), ("Answer: C. x", "C"), ("**B. lower**", "B")),
        # The text of a choice, without its letter; of those that it holds, the longest.
        *(("higher net income", "A"), ("It reports lower cash flow.", "B"), ("LOWER", "C")),
        # The letter counts where the two differ.
        ("B. higher net income", "B"),
        *(("A company", "[none]"), ("because B is wrong", "[none]"), ("", "[none]")),
    ],
)
def test_the_letter_of_an_exam_answer_is_found(answer, letter):
    found = scores(utils.exam, "B. lower cash flow", answer, PROMPT)
    assert found["f1_weighted"] == [("B", letter)]
    assert found["accuracy"] == float(letter == "B")


def test_an_exam_key_without_a_letter_is_text_and_no_answer_does_not_match_it():
    assert scores(utils.exam, "All of them", "", PROMPT)["accuracy"] == 0
    assert scores(utils.exam, "All of them", "I do not know", PROMPT)["accuracy"] == 0
    assert scores(utils.exam, "All of them", "all of them", PROMPT)["accuracy"] == 1


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
    found = scores(utils.tags, "Revenues, InterestExpense", answer)
    assert found["accuracy"] == list(zip(["revenues", "interestexpense"], given, strict=True))
    assert found["exact_match"] == every


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
        # A key that is more than a number is text.
        *(("2020-12-31", "2020-01-01"), ("12 months", "12 years")),
    ],
)
def test_another_number_is_wrong(key, answer):
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
    found = scores(utils.formula, key, answer)
    assert (found["accuracy"], found["exact_match"]) == (1, 0)


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
    assert utils.result(text) == (None if value is None else pytest.approx(value))


def test_a_calculation_is_right_by_its_value_where_it_is_worked_out():
    key = "(41527000 / 476832000) * 100"
    written = scores(utils.calculation, key, "100 * (41,527,000 / 476,832,000)")
    worked_out = scores(utils.calculation, key, "8.709")
    other = scores(utils.calculation, key, "(41527000 / 476832001) * 10")
    assert [one["accuracy"] for one in (written, worked_out, other)] == [1, 0, 0]
    assert [one["numeric_accuracy"] for one in (written, worked_out, other)] == [1, 1, 0]


# ---- text


def test_token_f1_is_squads():
    # Shared: 145, million; articles and punctuation do not count.
    assert utils.token_f1("the $145 million", "It was 145 Million.") == pytest.approx(
        2 * (2 / 4) * 1 / (2 / 4 + 1)
    )
    assert utils.token_f1("a b", "c") == 0
    assert utils.token_f1("The", "") == 1


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "the interest of the period" and "interest for the long period": interest the period, 3 words.
    found = utils.rouge_l("the interest of the period", "Interest for the long period.")
    assert found == pytest.approx(2 * (3 / 5) * (3 / 5) / (6 / 5))
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
    found = utils.bertscore([[pair] for pair in pairs])
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
    assert found[0] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[2] == 0


def test_without_its_model_bertscore_is_left_out_with_a_word(tmp_path, monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(utils.Unavailable, match="hf download ProsusAI/finbert"):
        utils.bertscore([[("a", "b")]])
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        value = utils.bertscore_mean([[("a", "b")]])
    assert json.dumps(value) == "NaN"
    assert "ProsusAI/finbert is not in the local cache" in caplog.text
