"""The audit finds planted and published defects, says how sure it is, and spares sound rows."""

import json
import os
import random
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tests.conftest import call, run
from tests.test_local import jsonl, mine  # noqa: F401
from tools import custom, sources
from tools.common import ROOT, JobFailed
from tools.data import audit, duplicates
from tools.data import card as datacard
from tools.data import formulas as finance
from tools.data.parts import find_parts
from tools.data.rows import read_batches
from tools.data.templates import check_templates

FINLORA = os.environ.get("FINLORA_DATA")
needs_finlora = pytest.mark.skipif(not FINLORA, reason="FINLORA_DATA is unset: no FinLoRA data")

ASK = "Instruction: What is the sentiment of this news? Choose negative, neutral or positive.\n"
NOUNS = ["Orders", "Sales", "Margins", "Costs", "Deliveries", "Profits", "Exports", "Salaries"]
VERBS = ["rose", "fell", "doubled", "halved", "stalled", "recovered", "slipped", "jumped"]
PLACES = ["Kemi", "Varna", "Ghent", "Porto", "Graz", "Split", "Turku", "Basel", "Lviv", "Brno"]


def news(text, answer="neutral"):
    return {"context": f"{ASK}Input: {text}\nAnswer: ", "target": answer}


def plenty(count, answer="neutral"):
    """Rows of different news, all alike in form."""
    draw = random.Random(f"{count} {answer}")
    words = [*NOUNS, *VERBS, *PLACES]
    return [news(f"{' '.join(draw.choices(words, k=9))}, report {n}", answer) for n in range(count)]


def maths(name, formula, question, key):
    return {
        "context": f"Use formula {name} to answer the question. Answer with a number. Formula: "
        f'{formula}, Explanation: as usual. Question: "{question}". Answer:',
        "target": str(key),
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of rows (or of raw lines) below a FINLORA_DATA that holds nothing else."""
    monkeypatch.setenv("FINLORA_DATA", str(tmp_path))
    monkeypatch.setattr(audit, "OUT", tmp_path / "out")

    def file(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return file


def audit_tasks(*tasks):
    """{(file, check): finding} of an audit."""
    return {(f["file"], f["check"]): f for f in audit.audit(list(tasks))["findings"]}


# ---- Rows


def test_sound_rows_have_no_findings(write):
    write("test/fiqa_test.jsonl", plenty(40) + plenty(40, "positive"))
    assert audit_tasks("sentiment") == {}


def test_rows_that_cannot_be_read_are_findings_and_the_others_are_still_read(write):
    broken = [b"{nonsense", b"[]", b'{"context": "x"}', b'{"context": "a\xff", "target": "b"}', b""]
    write("test/fiqa_test.jsonl", [*plenty(30), *broken, news("Rents fell in Graz", "great")])
    report = audit.audit(["sentiment"])
    rows, labels = report["findings"]
    assert (rows["check"], rows["severity"], rows["count"], rows["of"]) == ("rows", "error", 4, 35)
    assert [example["line"] for example in rows["examples"]] == [31, 32, 33]
    assert "not JSON" in rows["examples"][0]["text"]
    assert (labels["check"], labels["count"]) == ("labels", 1)
    assert (labels["examples"][0]["line"], labels["examples"][0]["answer"]) == (36, "great")
    assert report["files"][0]["rows"] == 31


def test_an_endless_line_is_one_unreadable_row(write, monkeypatch):
    monkeypatch.setattr("tools.data.rows.MAX_LINE", 1000)
    endless = json.dumps(news("x" * 5000)).encode()
    again = [news("Sales rose in Kemi")] * 2
    write("test/fiqa_test.jsonl", [*plenty(10), endless, *plenty(10, "positive"), *again])
    report = audit.audit(["sentiment"])
    rows, duplicates = report["findings"]
    assert (rows["check"], rows["count"], rows["examples"][0]["line"]) == ("rows", 1, 11)
    assert report["files"][0]["rows"] == 22
    # What stands behind it is read again from where it stands.
    assert [example["line"] for example in duplicates["examples"]] == [22, 23]
    assert all("Sales rose in Kemi" in example["text"] for example in duplicates["examples"])


def test_a_file_with_a_bom_and_crlf_is_audited_by_the_same_lines(write):
    lines = [json.dumps(row).encode() + b"\r" for row in plenty(20)]
    write("test/fiqa_test.jsonl", [b"\xef\xbb\xbf" + lines[0], *lines[1:], lines[0]])
    finding = audit_tasks("sentiment")["test/fiqa_test.jsonl", "duplicates"]
    assert [example["line"] for example in finding["examples"]] == [1, 21]


def test_a_repeated_prompt_is_counted_but_for_case_and_spaces(write):
    again, shouted = news("Sales rose in Kemi"), news("SALES  rose in  Kemi")
    write("test/fiqa_test.jsonl", [*plenty(30), again, again, shouted])
    finding = audit_tasks("sentiment")["test/fiqa_test.jsonl", "duplicates"]
    assert (finding["count"], finding["confidence"]) == (2, "certain")
    assert "1 of them letter for letter" in finding["text"]


def test_a_test_prompt_in_the_training_set_is_a_leak(write):
    write("train/finlora_sentiment_train.jsonl", [*plenty(50), news("Exports fell in Porto")])
    write("test/fiqa_test.jsonl", [*plenty(20, "positive"), news("exports FELL in Porto")])
    leak = audit_tasks("sentiment")["test/fiqa_test.jsonl", "leak"]
    assert (leak["severity"], leak["count"], leak["of"]) == ("error", 1, 21)
    assert [(e["file"], e["line"]) for e in leak["examples"]] == [
        ("train/finlora_sentiment_train.jsonl", 51),
        ("test/fiqa_test.jsonl", 21),
    ]


def test_a_prompt_with_two_labels_is_a_contradiction(write):
    twice = [news("Costs fell in Brno", answer) for answer in ("positive", "negative")]
    write("test/fiqa_test.jsonl", plenty(30) + twice)
    finding = audit_tasks("sentiment")["test/fiqa_test.jsonl", "contradiction"]
    assert (finding["severity"], finding["count"]) == ("warning", 1)


def test_prompts_that_differ_in_a_word_are_near_and_those_with_other_numbers_are_not(write):
    text = "The board of the shipyard in Turku proposed a dividend of {} euros a share for {}"
    usual, other_word, other_number = (
        news(text.format("2.50", "the last year")),
        news(text.format("2.50", "the past year")),
        news(text.format("3.75", "the last year")),
    )
    write("test/fiqa_test.jsonl", [*plenty(30), usual, other_number])
    assert audit_tasks("sentiment") == {}
    write("test/fiqa_test.jsonl", [*plenty(30), usual, other_word])
    finding = audit_tasks("sentiment")["test/fiqa_test.jsonl", "near duplicates"]
    assert (finding["count"], finding["severity"]) == (1, "note")
    assert [example["line"] for example in finding["examples"]] == [31, 32]


def test_a_near_duplicate_of_a_training_row_with_its_answer_is_a_warning(write):
    text = "After a weak spring the mill in {} Bergen expects its paper deliveries to recover soon"
    write(
        "train/finlora_sentiment_train.jsonl", [*plenty(40), news(text.format("old"), "positive")]
    )
    write("test/fiqa_test.jsonl", [*plenty(20, "negative"), news(text.format("the"), "positive")])
    assert audit_tasks("sentiment")["test/fiqa_test.jsonl", "near leak"]["severity"] == "warning"


def test_lsh_finds_nearly_every_pair_that_comparing_all_rows_finds(write):
    draw = random.Random(5)
    rows = []
    for n in range(150):
        words = draw.choices([*NOUNS, *VERBS, *PLACES], k=25)
        rows.append(news(" ".join(words)))
        words[draw.randrange(25)] = f"changed{n % 7}" if n % 2 else "Oslo"
        rows.append(news(" ".join(words)))
    write("test/fiqa_test.jsonl", rows)
    (part,) = find_parts("sentiment", sources.source_folder("sentiment"))
    list(check_templates(part))
    near = duplicates.Near([part])
    texts = list(map(duplicates.cut_shingles, part.texts))
    numbers = [sorted(duplicates.NUMBERS.findall(prompt)) for prompt in part.prompts]
    every = {
        b
        for b in range(300)
        for a in range(b)
        if len(texts[a] & texts[b]) >= duplicates.SIMILAR * len(texts[a] | texts[b])
        and numbers[a] == numbers[b]
    }
    proposed = {row for _, row in near.pairs[0, 0]}
    assert len(every) > 40
    assert proposed <= every
    assert len(proposed) >= 0.95 * len(every)


def test_a_prompt_outside_the_usual_template_is_an_outlier(write):
    odd = {"context": "Is it good or bad that rents fell in Lviv?", "target": "positive"}
    write("test/fiqa_test.jsonl", [*plenty(400), odd])
    report = audit.audit(["sentiment"])
    (finding,) = report["findings"]
    assert (finding["check"], finding["count"]) == ("template", 1)
    assert finding["examples"][0]["line"] == 401
    assert report["files"][0]["templates"]["most_common"][0]["rows"] == 400


def test_a_prompt_about_a_placeholder_is_named(write):
    terms = [
        {
            "context": f"Explain this XBRL term in one sentence: {noun} of {place}. Answer:",
            "target": "x",
        }
        for noun in NOUNS
        for place in PLACES
    ]
    empty = {"context": "Explain this XBRL term in one sentence: nan. Answer:", "target": "y"}
    write("test/xbrl_term_test.jsonl", [*terms, empty])
    assert audit_tasks("xbrl_term")["test/xbrl_term_test.jsonl", "empty"]["count"] == 1


def test_rows_longer_than_the_sequence_are_counted_in_tokens(write, smollm2):
    long_prompt = news("the mill " * 6000)
    long_answer = {"context": "Explain this: mill. Answer:", "target": "the mill " * 6000}
    write("test/fiqa_test.jsonl", [*plenty(30), long_prompt])
    finding = audit_tasks("sentiment")["test/fiqa_test.jsonl", "length"]
    assert (finding["severity"], finding["count"]) == ("warning", 1)
    write("test/xbrl_term_test.jsonl", [long_answer])
    assert audit_tasks("xbrl_term")["test/xbrl_term_test.jsonl", "length"]["severity"] == "error"


def test_token_counts_are_those_of_transformers(write, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = plenty(30)
    write("test/fiqa_test.jsonl", rows)
    counts = sorted(
        len(tokenizer(row["context"].strip())["input_ids"])
        + len(tokenizer(row["target"])["input_ids"])
        for row in rows
    )
    tokens = audit.audit(["sentiment"])["files"][0]["tokens"]
    assert tokens["max"] == counts[-1]
    assert tokens["median"] == (counts[14] + counts[15]) // 2


def test_without_the_tokenizer_the_report_says_that_tokens_were_not_counted(write, monkeypatch):
    monkeypatch.setattr(audit, "TOKENIZER", audit.OUT / "none.json")
    write("test/fiqa_test.jsonl", plenty(30))
    report = audit.audit(["sentiment"])
    assert report["tokenizer"] is None
    assert "tokens" not in report["files"][0]
    assert "Tokens were not counted" in audit.render_page(report)


def test_a_tokenizer_that_comes_later_is_found(smollm2, monkeypatch):
    monkeypatch.setattr(audit, "TOKENIZER", audit.OUT / "none.json")
    assert audit.load_tokenizer() is None
    monkeypatch.undo()
    assert audit.load_tokenizer() is not None


# ---- Class balance


def classes(negative, neutral, positive):
    rows = [
        *plenty(negative, "negative"),
        *plenty(neutral, "neutral"),
        *plenty(positive, "positive"),
    ]
    random.Random(1).shuffle(rows)
    return rows


def test_swapped_labels_are_certain_where_the_counts_fit_the_source_exactly(write):
    write("test/tfns_test.jsonl", classes(347, 475, 1566))
    finding = audit_tasks("sentiment")["test/tfns_test.jsonl", "balance"]
    assert (finding["severity"], finding["confidence"]) == ("error", "certain")
    assert finding["count"] == 475 + 1566
    assert "neutral stands where the source has positive" in finding["text"]
    assert "positive stands where the source has neutral" in finding["text"]
    # 5 of C(2390, 2) ways to split 2,388 rows into 3 classes fit a swap: 1.75e-6.
    assert "by chance: 2e-06" in finding["text"]


def test_the_counts_of_the_source_are_no_finding(write):
    write("test/tfns_test.jsonl", classes(347, 1566, 475))
    assert ("test/tfns_test.jsonl", "balance") not in audit_tasks("sentiment")


def test_a_part_of_the_source_is_compared_by_its_shares(write):
    write("test/fpb_test.jsonl", classes(60, 288, 136))  # a tenth of the Financial PhraseBank
    assert ("test/fpb_test.jsonl", "balance") not in audit_tasks("sentiment")
    write("test/fpb_test.jsonl", classes(60, 136, 288))
    finding = audit_tasks("sentiment")["test/fpb_test.jsonl", "balance"]
    assert (finding["severity"], finding["confidence"]) == ("error", "high")
    write("test/fpb_test.jsonl", classes(160, 160, 160))
    finding = audit_tasks("sentiment")["test/fpb_test.jsonl", "balance"]
    assert (finding["severity"], finding["confidence"]) == ("warning", "high")


# ---- Financial Math


def summed(rate, *flows):
    """The present value of flows at years 0, 1, …, in exact decimals."""
    factor = 1 + Decimal(rate)
    return sum(Decimal(flow) / factor**year for year, flow in enumerate(flows))


NPV = ("Net Present Value (NPV)", "NPV = sum of R_t / (1 + i)^t")
PV = ("Present Value (PV)", "PV = FV / (1 + r)^n")
FV = ("Future Value (FV)", "FV = PV × (1 + r)^n")
MARGIN = "{} = (Income / Revenue) × 100"
SOUND = [
    (*NPV, "A kiln costs $900 now and brings $400 annually for 3 years. NPV at 5%?",
     summed("0.05", -900, 400, 400, 400)),
    (*NPV, "A mine yields $10,000 in its first year and $4,000 in the second year. NPV at 10%?",
     summed("0.1", 0, 10000, 4000)),
    (*NPV, "Inflows start at $700, increasing by $50 annually, over 3 years at 4%. NPV?",
     summed("0.04", 0, 700, 750, 800)),
    (*PV, "What are $6,000 that fall due in 4 years worth today at 3%?",
     summed("0.03", 0, 0, 0, 0, 6000)),
    (*PV, "A lease pays $500 every year for 4 years. At 3%, what is it worth?",
     summed("0.03", 0, 500, 500, 500, 500)),
    (*PV, "You get $800 in 2 years and $900 in 3 years, at 6%. What is that now?",
     summed("0.06", 0, 0, 800, 900)),
    (*FV, "Deposit (PV): $300\n Monthly Rate (r): 1%\n Term (n): 2 years\n What is it then?",
     300 * Decimal("1.01") ** 24),
    (*FV, "Deposit (PV): $300\n Semi-Annual Rate (r): 3%\n Term (n): 4 semesters\n What is it?",
     300 * Decimal("1.03") ** 4),
    (*FV, "What do $300 become in 2 years at 5% a year?", 300 * Decimal("1.05") ** 2),
    ("Compound Interest", "A = P (1 + r/n)^(nt)", "$500 at 4% compounded quarterly for 3 years?",
     500 * Decimal("1.01") ** 12),
    ("Simple Interest", "I = P × r × t", "What interest do $700 bear at 2.5% a year over 4 years?",
     Decimal(70)),
    ("Annual Percentage Rate (APR)", "APR = ((Fees + Interest) / Principal) × (365 / Days)",
     "A loan of $1,000 costs $20 in fees and $30 of interest over 73 days. What is the APR?",
     Decimal("0.25")),
    ("Effective Annual Rate (EAR)", "EAR = (1 + r/n)^n - 1",
     "What is the EAR of 12% compounded every six months?", Decimal("0.1236")),
    ("Compound Annual Growth Rate (CAGR)", "CAGR = ((B / A)^(1 / n) - 1) × 100",
     "Sales went from $100 to $144 in 2 years. What was the CAGR in percent?", Decimal(20)),
    ("Return on Investment (ROI)", "ROI = (Gain - Cost) / Cost",
     "A cart for $2,000 raises sales from $9,000 to $12,000. What is the ROI?", Decimal("0.5")),
    ("Return on Investment (ROI)", "ROI = (Gain - Cost) / Cost * 100",
     "A cart for $2,000 earns $800 annually for three years. What is the ROI?", Decimal(20)),
    ("Gross Profit Margin", MARGIN.format("Gross Profit Margin"),
     "Revenue of $1.6 million and costs of $400,000: what is the margin?", Decimal(75)),
    ("Operating Margin", MARGIN.format("Operating Margin"),
     "What margin is an operating income of $30 on $120 of sales?", Decimal(25)),
    ("Net Profit Margin", MARGIN.format("Net Profit Margin"),
     "With revenue of $80 the net profit was $6. What is the margin?", Decimal("7.5")),
    ("Put-Call Parity", "C - P = S - X / (1 + r)^t",
     "The stock is at $100, the strike $110, the put costs $7, the rate is 10% for 1 year. Call?",
     Decimal(7)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "formula", "question", "value"), SOUND)
def test_a_key_that_its_formula_gives_is_reproduced(name, formula, question, value):
    row = maths(name, formula, question, f"{value:.2f}")
    verdict = finance.check_key(row["context"], row["target"])
    assert verdict is not None
    assert verdict.agrees
    assert verdict.value == pytest.approx(float(value), rel=1e-9)


@pytest.mark.parametrize(("name", "formula", "question", "value"), SOUND)
def test_the_same_key_a_little_off_is_not(name, formula, question, value):
    row = maths(name, formula, question, f"{value * Decimal('1.03') + Decimal('0.02'):.2f}")
    verdict = finance.check_key(row["context"], row["target"])
    assert verdict is not None
    assert not verdict.agrees


@pytest.mark.parametrize(
    ("key", "confidence", "why"),
    [
        (summed("0.05", 400, 400, 400), "high", "the outlay is left out, the first inflow"),
        (summed("0.05", 0, 400, 400, 400), "high", "the outlay is left out"),
        (summed("0.05", -900 + 400, 400, 400), "medium", "the first inflow is taken a year too"),
        (Decimal("123.45"), "high", "no reading gives it"),
    ],
)
def test_a_wrong_key_is_explained_by_the_reading_that_gives_it(key, confidence, why):
    question = "A kiln costs $900 now and brings $400 annually for 3 years. NPV at 5%?"
    row = maths(*NPV, question, f"{key:.2f}")
    verdict = finance.check_key(row["context"], row["target"])
    assert (verdict.agrees, verdict.confidence) == (False, confidence)
    assert verdict.why.startswith(why)


@pytest.mark.parametrize(
    ("name", "formula", "question", "key"),
    [
        ("Sunshine Index", "S = a + b", "What is it for $2 and $3?", "5"),
        (*NPV, "A kiln brings income for some years. What is its NPV at 5%?", "5"),
        (*NPV, "A kiln with an initial investment brings $400 annually for 3 years at 5%?", "5"),
        ("Simple Interest", "I = P × r × t", "$700 and $800 are lent at 2% for 4 years?", "5"),
        ("Simple Interest", "I = P × r × t", "$700 are lent at 2% for 4 years?", "about five"),
        ("Simple Interest", "I = P × r × t", "$700 are lent at 2% for 4 years?", "nan"),
        ("Treynor Ratio", "T = (R - F) / b", "R is 8%, F is 2% and the beta is 0. T?", "5"),
    ],
)
def test_what_cannot_be_computed_without_a_doubt_is_not_judged(name, formula, question, key):
    row = maths(name, formula, question, key)
    assert finance.check_key(row["context"], row["target"]) is None


@pytest.mark.parametrize(
    "question",
    [
        "$1 in 2 years, 3%, " * 50_000,
        "Formula: Question: " * 50_000,
        "$400 annually for 99999999999 years at 5%. NPV?",
        f"${'9' * 400} annually for 3 years at 5%. NPV?",
    ],
)
def test_a_hostile_question_is_left_alone_at_once(question):
    row = maths(*NPV, question, "5")
    assert finance.check_key(row["context"], row["target"]) is None


def test_wrong_keys_are_counted_among_those_that_could_be_computed(write):
    rows = [maths(*rest, f"{value:.2f}") for *rest, value in SOUND]
    rows += [maths(*NPV, "A kiln brings $400 annually for 3 years. NPV at 5%?", "99")]
    rows += [maths("Sunshine Index", "S = a + b", "What is it for $2 and $3?", "5")]
    write("test/formula_test.jsonl", rows)
    report = audit.audit(["formula"])
    (finding,) = [f for f in report["findings"] if f["check"] == "formula"]
    checked = len(SOUND) + 1
    assert (finding["count"], finding["of"], finding["severity"]) == (1, checked, "error")
    assert finding["examples"][0]["line"] == checked
    formulas = report["files"][0]["formulas"]
    assert (formulas["checked"], formulas["agree"]) == (checked, checked - 1)


# ---- The report


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> [red]boo[/] \u202e {{ 7 * 7 }}"


def test_rows_cannot_run_anything_in_the_page(write):
    write("test/fiqa_test.jsonl", [news(HOSTILE), news(HOSTILE), news("Sales", f"</pre>{HOSTILE}")])
    page = audit.render_page(audit.audit(["sentiment"]))
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(script|img|iframe|object|link|base)\b", page)
    assert "49" not in page
    assert "\u202e" not in page
    # Nothing is fetched from elsewhere.
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", page)


def test_the_command_leaves_a_table_a_json_file_and_a_page(write, monkeypatch, capsys):
    write("test/fiqa_test.jsonl", [*plenty(30), news(HOSTILE), news(HOSTILE)])
    call(monkeypatch, "audit", "sentiment")
    printed = capsys.readouterr().out
    assert re.search(r"warning +test/fiqa_test\.jsonl +1 row repeats", printed)
    report = json.loads((audit.OUT / "audit.json").read_text())
    assert report["findings"][0]["confidence"] == "certain"
    assert "<table" in (audit.OUT / "index.html").read_text()
    call(monkeypatch, "audit", "sentiment", "--json")
    assert json.loads(capsys.readouterr().out) == report


def test_an_unknown_task_is_one_line():
    done = run("audit", "sentimnt")
    assert done.returncode == 2
    assert done.stderr == 'error: unknown task "sentimnt"; did you mean sentiment?\n'


def test_help_answers_without_loading_a_model_library():
    code = "import sys; import tools.data.audit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"torch", "transformers", "scipy", "datasketch", "rich"} & set(done.stdout.split())


def test_more_rows_than_are_compared_are_sampled_evenly(write, monkeypatch):
    monkeypatch.setattr(duplicates, "NEAR_ROWS", 100)
    write("test/fiqa_test.jsonl", plenty(450))
    (part,) = find_parts("sentiment", sources.source_folder("sentiment"))
    list(check_templates(part))
    near = duplicates.Near([part])
    assert len(near.compared) == 90
    assert audit.audit(["sentiment"])["limits"]["rows compared for likeness, a task"] == 100


@pytest.mark.parametrize("task", list(sources.tables()["tasks"]))
def test_the_examples_have_no_errors(task, monkeypatch):
    monkeypatch.delenv("FINLORA_DATA", raising=False)
    monkeypatch.setattr(sources, "RAW", Path("nowhere"))
    report = audit.audit([task])
    assert [f for f in report["findings"] if f["severity"] == "error"] == []
    for file in report["files"]:
        if "formulas" in file:
            assert file["formulas"]["agree"] == file["formulas"]["checked"] == file["rows"]


# ---- The data card


def test_the_card_is_what_sources_yaml_gives():
    datacard.write(check=True)


def test_every_dataset_is_in_the_card():
    card = datacard.CARD.read_text()
    for name, row in sources.tables()["datasets"].items():
        assert f"### {name}\n" in card
        assert f"`{row['file']}`" in card
    for origin in sources.tables()["origins"].values():
        assert origin["url"] in card


def test_a_card_that_differs_fails_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(datacard, "CARD", tmp_path / "README.md")
    with pytest.raises(JobFailed, match="tools.data.card"):
        datacard.write(check=True)
    text = (ROOT / "data" / "README.md").read_text()
    datacard.CARD.write_text(text.replace("MIT", "MTI", 1))
    with pytest.raises(JobFailed, match="tools.data.card"):
        datacard.write(check=True)
    datacard.CARD.write_text(text)
    datacard.write(check=True)


def test_a_file_that_is_not_the_published_one_does_not_enter_the_card(write):
    write("test/fiqa_test.jsonl", plenty(30))
    assert datacard.select_facts(audit.audit(["sentiment"])) == {}


# ---- FinLoRA's own files


@pytest.fixture(scope="module")
def published():
    return audit.audit(audit.list_tasks())


@needs_finlora
def test_the_defects_of_the_published_files_are_found(published):
    whole = {file["file"] for file in published["files"] if file["as_published"]}
    expected = {
        ("test/tfns_test.jsonl", "balance"): ("error", "certain", 475 + 1566),
        ("test/xbrl_term_test.jsonl", "leak"): ("error", "certain", 2),
        ("test/fpb_test.jsonl", "duplicates"): ("warning", "certain", 2),
        ("test/fiqa_test.jsonl", "duplicates"): ("warning", "certain", 2),
        ("train/xbrl_term_train.jsonl", "duplicates"): ("warning", "certain", 15),
        ("train/xbrl_term_train.jsonl", "empty"): ("warning", "high", 7),
    }
    reported = {
        (f["file"], f["check"]): (f["severity"], f["confidence"], f["count"])
        for f in published["findings"]
    }
    for place, finding in expected.items():
        assert place[0] not in whole or reported[place] == finding
    assert whole & {file for file, _ in expected}
    (repeats,) = [
        f
        for f in published["findings"]
        if f["file"].startswith("train/xbrl") and f["check"] == "duplicates"
    ]
    assert "11 of them letter for letter" in repeats["text"]


@needs_finlora
def test_the_published_npv_without_its_outlay_is_found_and_computed(published):
    (finding,) = [
        f
        for f in published["findings"]
        if (f["file"], f["check"], f["severity"]) == ("test/formula_test.jsonl", "formula", "error")
    ]
    notes = " ".join(example["note"] for example in finding["examples"])
    assert "gives 974.49, the key is 15,092.44: the outlay is left out" in notes
    by_file = {file["file"]: file for file in published["files"]}
    # All of the formulas but three have a rule, and nearly all of their questions are plain.
    assert by_file["test/formula_test.jsonl"]["formulas"]["share"] > 0.85
    assert by_file["train/formula_train.jsonl"]["formulas"]["share"] > 0.85


@needs_finlora
def test_the_card_holds_the_counts_of_the_files_and_none_of_their_rows(published):
    card = datacard.CARD.read_text()
    facts = datacard.read_facts()
    for file, measured in datacard.select_facts(published).items():
        # Leaks and likeness depend on which other files are there; this does not.
        for key in ("rows", "labels", "fit", "formulas"):
            assert facts[file][key] == measured[key]
    for file in published["files"]:
        batches = read_batches(Path(FINLORA) / "data" / file["file"])
        for prompt in (prompt for batch in batches for prompt in batch.prompts):
            own = prompt.split("Input:")[-1].split("sentence:")[-1].split("Question:")[-1]
            own = own.removesuffix("Answer:").strip()
            assert len(own) < 25 or own not in card


# ---- Tasks of the user's own


def test_an_own_task_is_audited_with_the_same_checks(mine, capsys):  # noqa: F811
    rows = [
        {
            "question": f"Is filing {n} late, caf\u00c3\u00a9 {n}?",
            "answer": "Yes" if n % 2 else "No",
        }
        for n in range(60)
    ]
    custom.create_task("late", jsonl(mine / "rows.jsonl", rows))
    path = custom.DATA / "late_test.jsonl"
    train = (custom.DATA / "late_train.jsonl").read_text().splitlines()
    leaked = train[0].replace("Yes", "YES").replace("No", "NO")
    path.write_text(path.read_text() + leaked + "\n")
    report = audit.audit(["late"])
    checks = {finding["check"]: finding for finding in report["findings"]}
    assert checks["leak"]["file"].endswith("late_test.jsonl") and checks["leak"]["count"] == 1
    assert checks["labels"]["count"] == 1 and checks["spellings"]["count"] == 1
    assert "decoded wrongly" in checks["mojibake"]["text"]
    assert {file["split"] for file in report["files"]} == {"train", "validation", "test"}
