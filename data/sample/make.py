"""Writes the example rows of this folder from texts.yaml, in FinLoRA's row format.

    .venv/bin/python data/sample/make.py           rewrite every file; the bytes never differ
    .venv/bin/python data/sample/make.py --check   exit 1 and name the first file that differs

Each file has its own random stream. Answers that are numbers are computed with Decimal.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

FOLDER = Path(__file__).resolve().parent
TEXTS = yaml.safe_load((FOLDER / "texts.yaml").read_text())
NAMES = TEXTS["names"]
SEED = 20250
EXPRESSIONS = Environment(autoescape=True)

Row = dict[str, str]
Entry = dict[str, Any]  # a file's part of texts.yaml


def round_half_up(value: Decimal | int, places: int) -> str:
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def evaluate(formula: str, numbers: dict[str, Decimal]) -> str:
    """The value of a formula of texts.yaml, to the cent."""
    return round_half_up(EXPRESSIONS.compile_expression(formula)(**numbers, min=min), 2)


class Draws:
    """The random stream of one file, and what it draws for the slots of a template."""

    def __init__(self, seed: str, companies: list[str]) -> None:
        self.rng = random.Random(f"{SEED}:{seed}")
        self.companies = companies

    def fill(self, template: str, **values: str) -> str:
        return template.format_map(self.draw_slots() | values)

    def draw_slots(self) -> dict[str, str]:
        """A value for every slot; they agree with each other (`hi` is above `lo`)."""
        rng = self.rng
        co, co2 = rng.sample(self.companies, 2)
        slots = {"co": co, "co2": co2, "tick": co.split()[0][:4].upper()}
        for slot, key in {"city": "cities", "prod": "products", "p": "people"}.items():
            slots[slot], slots[f"{slot}2"] = rng.sample(NAMES[key], 2)
        currency = rng.choice(("EUR {} mn", "EUR {} million", "USD {} million", "${} million"))
        percent = "{}" + rng.choice(("%", " %"))
        low = Decimal(rng.randint(31, 640)) / 10
        high = Decimal(round_half_up(low * rng.randint(108, 160) / 100, 1))
        year, cents, strike = rng.randint(2021, 2025), rng.randint(12, 90), rng.randint(14, 90)
        return slots | {
            "role": rng.choice(NAMES["roles"]),
            "broker": rng.choice(NAMES["brokers"]),
            "q": rng.choice(NAMES["quarters"]),
            "qn": str(rng.randint(1, 4)),
            "m": rng.choice(NAMES["months"]),
            "day": str(rng.randint(2, 28)),
            "y": str(year),
            "y0": str(year - 1),
            "y2": str(year + rng.randint(2, 5)),
            "n": str(rng.randrange(60, 620, 10)),
            "few": str(rng.randint(5, 14)),
            "tt": str(rng.randint(21, 89)),
            "kilo": f"{rng.randrange(3, 60)},{rng.choice((200, 400, 500, 800))}",
            "sh": f"{rng.randint(1, 9)},{rng.randint(100, 999)},{rng.choice((250, 400, 750, 900))}",
            "lo": currency.format(low),
            "hi": currency.format(high),
            "up": percent.format(round_half_up((high / low - 1) * 100, 1)),
            "dn": percent.format(round_half_up((1 - low / high) * 100, 1)),
            "amt": currency.format(Decimal(rng.randint(25, 950)) / 10),
            "big": currency.format(rng.randrange(40, 400, 5)),
            "elo": f"EUR 0.{cents}",
            "ehi": f"EUR {Decimal(cents + rng.randint(3, 20)) / 100:.2f}",
            "pct": percent.format(rng.randint(5, 15)),
            "share": percent.format(Decimal(rng.randint(51, 299)) / 10),
            "tiny": percent.format(Decimal(rng.randint(4, 14)) / 10),
            "mid": percent.format(rng.randint(12, 24)),
            "crash": percent.format(rng.randint(46, 78)),
            "strike": str(strike),
            "plo": str(strike),
            "phi": str(strike + rng.randint(4, 18)),
            "usd": str(rng.randint(3, 28)),
            "oz": f"{rng.randint(1, 3)},{rng.randrange(310, 990, 5)}",
        }

    def draw_numbers(self, ranges: dict[str, list[int]]) -> tuple[dict[str, Decimal], Row]:
        """A number from each range (low, high, step), and the numbers as a question shows them."""
        numbers = {
            name: Decimal(self.rng.randrange(low, high + 1, step))
            for name, (low, high, step) in ranges.items()
        }
        return numbers, {name: f"{number:,f}" for name, number in numbers.items()}


# ---- Rows, by kind of file


def make_sentiment(entry: Entry, draws: Draws) -> Iterator[Row]:
    for label, templates in entry["sentences"].items():
        for template in templates:
            sentences: dict[str, None] = {}  # no sentence comes twice
            while len(sentences) < entry["copies"]:
                sentences[draws.fill(template)] = None
            for sentence in sentences:
                context = (
                    f"Instruction: What is the sentiment of this {entry['noun']}? Please choose an "
                    f"answer from {{{'/'.join(entry['labels'])}}}.\nInput: {sentence}\nAnswer: "
                )
                yield {"context": context, "target": label}


def make_headline(entry: Entry, draws: Draws) -> Iterator[Row]:
    """Asks at most two questions that are right of a headline, and two that are wrong."""
    for headline in entry["headlines"]:
        text = draws.fill(headline["text"])
        for answer, kinds in (("Yes", headline["right"]), ("No", headline["wrong"])):
            for kind in draws.rng.sample(kinds, min(2, len(kinds))):
                question = TEXTS["headline_questions"][kind]
                context = (
                    f"Instruction: {question} Please choose an answer from {{Yes/No}}.\n"
                    f"Input: {text}\nAnswer: "
                )
                yield {"context": context, "target": answer}


def make_entities(entry: Entry, draws: Draws) -> Iterator[Row]:
    """Asks for the type of each of the three entities in a sentence."""
    for template in entry["sentences"]:
        types = ("organization", "person", "location")
        entities = {label: draws.rng.choice(entry[label]) for label in types}
        for label, entity in entities.items():
            options = ", ".join(draws.rng.sample(("person", "location", "organization"), 3))
            context = (
                f'Instruction: What type of entity is "{entity}" in the input sentence?\n'
                f"Options: {options}\nInput: {template.format_map(entities)}\nAnswer: "
            )
            yield {"context": context, "target": label}


def make_exam(entry: Entry, draws: Draws) -> Iterator[Row]:
    for question, *choices in entry["questions"]:
        yield ask_choice(question, choices, draws.rng)
    for computed in entry["computed"]:
        questions: set[str] = set()
        while len(questions) < entry["copies"]:
            numbers, texts = draws.draw_numbers(computed["numbers"])
            question = computed["text"].format_map(texts)
            choices = [evaluate(formula, numbers) for formula in computed["choices"]]
            if question not in questions and len(set(choices)) == len(choices):
                questions.add(question)
                yield ask_choice(question, choices, draws.rng)


def ask_choice(question: str, choices: list[str], rng: random.Random) -> Row:
    """A row with the choices in any order; the first of `choices` is right."""
    order = list(choices)
    rng.shuffle(order)
    lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", order, strict=False)]
    letters = f"{', '.join('ABCD'[: len(order) - 1])} or {'ABCD'[len(order) - 1]}"
    context = (
        f"Read the question and pick the best of the choices {letters}. Answer with its letter and "
        f"text.\nQuestion: {question}\nChoices:\n" + "\n".join(lettered) + "\nAnswer: "
    )
    return {"context": context, "target": lettered[order.index(choices[0])]}


# The numbers that fit a tag: the first part that occurs in it decides.
TAGGED_SHARES = {
    "Stated": (2, 8),
    "TaxRate": (14, 28),
    "Concentration": (10, 38),
    "Owner": (20, 48),
}


def draw_tagged_number(tag: str, rng: random.Random) -> str:
    for part, (low, high) in TAGGED_SHARES.items():
        if part in tag:
            return f"{rng.randint(low, high)}.{rng.randint(1, 9)}"
    if "PerShare" in tag and not tag.endswith("Amount"):
        return f"{rng.randint(0, 3)}.{rng.randint(11, 98)}"
    if "UsefulLife" in tag or tag.startswith("NumberOf"):
        return str(rng.randint(3, 9))
    return f"{rng.randint(2, 340)}.{rng.randint(1, 9)}"


def make_tagging(entry: Entry, draws: Draws) -> Iterator[Row]:
    """Asks four questions in a prompt; the answer is a list of four tags."""
    rng, sentences = draws.rng, entry["sentences"]
    deck: list[str] = []
    for _ in range(entry["rows"]):
        if len(deck) < 4:
            deck = rng.sample(list(sentences), len(sentences))
        tags, deck = deck[:4], deck[4:]
        questions = []
        for place, tag in enumerate(tags, start=1):
            number = draw_tagged_number(tag, rng)
            sentence = draws.fill(sentences[tag], x=number)
            questions.append(
                f"{place}. What is the appropriate XBRL US GAAP tag for the number {number} in: "
                f'"{sentence}"'
            )
        others = rng.sample([tag for tag in sentences if tag not in tags], 4)
        context = (
            "Give the best US GAAP tag for each of the four numbers below. Answer with the four "
            "tags only, in the order of the questions, with commas between them.\n"
            f"Tags to choose from: {', '.join(sorted([*tags, *others]))}\n"
            + "\n".join(questions)
            + "\nAnswer: "
        )
        yield {"context": context, "target": ", ".join(tags)}


def make_terms(entry: Entry, draws: Draws) -> Iterator[Row]:
    for term, meaning in entry["meanings"].items():
        context = f"Explain this XBRL term briefly in one sentence: {term}. Answer:"
        yield {"context": context, "target": meaning}


def draw_facts(revenue: int, rng: random.Random) -> dict[str, int]:
    """The facts of a year of a filer with this revenue; they add up."""

    def take_share(whole: int, low: int, high: int) -> int:
        return whole * rng.randint(low, high) // 100_000 * 1000

    cost, expenses = take_share(revenue, 45, 70), take_share(revenue, 12, 24)
    income = revenue - cost - expenses
    interest = take_share(income, 5, 15)
    tax = take_share(income - interest, 18, 27)
    assets = take_share(revenue, 115, 135)
    current = take_share(assets, 30, 45)
    debts = take_share(assets, 46, 58)
    return {
        "Revenues": revenue,
        "CostOfRevenue": cost,
        "GrossProfit": revenue - cost,
        "OperatingExpenses": expenses,
        "OperatingIncomeLoss": income,
        "InterestExpense": interest,
        "IncomeTaxExpenseBenefit": tax,
        "ProfitLoss": income - interest - tax,
        "AssetsCurrent": current,
        "InventoryNet": take_share(current, 20, 40),
        "Assets": assets,
        "LiabilitiesCurrent": take_share(debts, 30, 55),
        "Liabilities": debts,
        "StockholdersEquity": assets - debts,
    }


def format_filing(years: dict[int, dict[str, int]], concepts: list[str], rng: random.Random) -> str:
    """XBRL with the contexts, the unit and the chosen facts of each year."""
    lines = ["<xbrl>"]
    for year in years:
        end = f"{year}-12-31"
        period = f"<startDate>{year}-01-01</startDate><endDate>{end}</endDate>"
        lines += [
            f'<context id="D{year}"><period>{period}</period></context>',
            f'<context id="I{year}"><period><instant>{end}</instant></period></context>',
        ]
    lines.append('<unit id="USD"><measure>iso4217:USD</measure></unit>')
    facts = [
        f'<us-gaap:{concept} contextRef="{"DI"[concept in TEXTS["balance_concepts"]]}{year}" '
        f'unitRef="USD" decimals="-3">{values[concept]}</us-gaap:{concept}>'
        for year, values in years.items()
        for concept in concepts
    ]
    rng.shuffle(facts)
    return "\n".join([*lines, *facts, "</xbrl>"])


def make_extract(entry: Entry, draws: Draws) -> Iterator[Row]:
    """Asks one question on each filing; its facts give the answer."""
    rng, concepts, ratios = draws.rng, TEXTS["concepts"], TEXTS["ratios"]
    for kind, question in entry["questions"].items():
        for place in range(entry["copies"]):
            year, revenue = rng.randint(2019, 2024), rng.randint(80_000, 900_000) * 1000
            before = revenue * rng.randint(88, 106) // 100_000 * 1000
            years = {year: draw_facts(revenue, rng), year - 1: draw_facts(before, rng)}
            concept = list(concepts)[place % len(concepts)]
            ratio = list(ratios)[place % len(ratios)]
            above, below, factor = ratios[ratio]
            answers = {
                "tags": f"us-gaap:{concept}",
                "value": str(years[year][concept]),
                "formula": f"(us-gaap:{above} / us-gaap:{below}){factor}",
                "formula_calculations": f"({years[year][above]} / {years[year][below]}){factor}",
            }
            needed = [concept] if kind in ("tags", "value") else [above, below]
            others = [name for name in concepts if name not in needed]
            shown = [*needed, *rng.sample(others, 6 - len(needed))]
            rng.shuffle(shown)
            text = question.format(
                co=rng.choice(draws.companies),
                what=concepts[concept],
                ratio=ratio,
                pct=" in percent" if factor else "",
                y=year,
            )
            context = (
                f"Use the XBRL data below. {TEXTS['extract_forms'][kind]}\nQuestion: {text}\n"
                f"{format_filing(years, shown, rng)}\nAnswer: "
            )
            yield {"context": context, "target": answers[kind]}


def make_formula(entry: Entry, draws: Draws) -> Iterator[Row]:
    for name, formula in TEXTS["formulas"].items():
        for template in entry["questions"][name]:
            answers: dict[str, str] = {}  # by question
            while len(answers) < entry["copies"]:
                numbers, texts = draws.draw_numbers(formula["numbers"])
                answers[template.format_map(texts)] = evaluate(formula["answer"], numbers)
            for question, answer in answers.items():
                context = (
                    f"Use formula {name} to answer the question. Answer with a numerical answer "
                    "with 2 decimal places and with no explanations or other text. Formula: "
                    f"{formula['formula']}, Explanation: {formula['explanation']}. "
                    f'Question: "{question}". Answer:'
                )
                yield {"context": context, "target": answer}


def draw_report(draws: Draws) -> dict[str, str]:
    """The figures of an annual report, in millions."""
    rng = draws.rng

    def take_share(whole: int, low: int, high: int) -> int:
        return whole * rng.randint(low, high) // 100

    rev0 = rng.randint(300, 2400)
    rev = rev0 + take_share(rev0, 3, 19)
    cost, cost0 = take_share(rev, 52, 70), take_share(rev0, 52, 70)
    rev1 = take_share(rev, 56, 74) if rng.random() < 0.5 else take_share(rev, 26, 44)
    seg1, seg2 = rng.sample(NAMES["segments"], 2)
    capex, ocf = take_share(rev, 4, 9), take_share(rev, 11, 18)
    ca, cl = take_share(rev, 36, 58), take_share(rev, 18, 34)
    numbers = {"rev": rev, "rev0": rev0, "cost": cost, "cost0": cost0, "rev1": rev1}
    numbers |= {"rev2": rev - rev1, "capex": capex, "capex0": take_share(rev0, 4, 9)}
    numbers |= {"ocf": ocf, "fcf": ocf - capex, "ca": ca, "cl": cl}
    numbers |= {"ppe": take_share(rev, 60, 90), "debt": take_share(rev, 20, 50)}
    numbers |= {"sga": take_share(rev, 12, 18), "sga0": take_share(rev0, 12, 18)}
    numbers |= {"rd": take_share(rev, 3, 8), "rd0": take_share(rev0, 3, 8)}
    numbers |= {"staff": rng.randint(1100, 9800), "claim": rng.randint(12, 80)}
    return {
        **draws.draw_slots(),
        **{name: f"{value:,}" for name, value in numbers.items()},
        "seg1": seg1,
        "seg2": seg2,
        "big_segment": seg1 if rev1 > rev - rev1 else seg2,
        "seg1_share": round_half_up(Decimal(rev1) / rev * 100, 1),
        "growth": round_half_up(Decimal(rev - rev0) / rev0 * 100, 1),
        "gm": round_half_up(Decimal(rev - cost) / rev * 100, 1),
        "cr": round_half_up(Decimal(ca) / cl, 2),
        "auditor": rng.choice(NAMES["auditors"]),
    }


def make_report(entry: Entry, draws: Draws) -> Iterator[Row]:
    for question in entry["questions"]:
        rows: dict[str, Row] = {}  # by question
        while len(rows) < entry["copies"]:
            values = draw_report(draws)
            text = question["text"].format_map(values)
            context = (
                "Answer the question in a few words from the scanned report page. "
                f"Question: {text}\nPage {draws.rng.randint(12, 118)}:\n"
                f"{question['page'].format_map(values)}\nAnswer:"
            )
            rows[text] = {"context": context, "target": question["answer"].format_map(values)}
        yield from rows.values()


MAKERS: dict[str, Callable[[Entry, Draws], Iterator[Row]]] = {
    "sentiment": make_sentiment,
    "headline": make_headline,
    "entities": make_entities,
    "exam": make_exam,
    "tagging": make_tagging,
    "terms": make_terms,
    "extract": make_extract,
    "formula": make_formula,
    "report": make_report,
}


def make_files() -> Iterator[tuple[Path, bytes]]:
    """The path and content of every file."""
    for kind, make_rows in MAKERS.items():
        for name, entry in TEXTS[kind].items():
            draws = Draws(entry["seed"], TEXTS["companies"][name.split("/")[0]])
            rows = list(make_rows(entry, draws))
            if kind != "tagging":
                draws.rng.shuffle(rows)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            yield FOLDER / f"{name}.jsonl", "".join(lines).encode()


def main(arguments: list[str]) -> str | None:
    """Writes the files, or with --check compares them; returns what is wrong."""
    if arguments not in ([], ["--check"]):
        return "usage: make.py [--check]"
    for path, content in make_files():
        if not arguments:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            return f"{path.relative_to(FOLDER)} differs from what make.py writes"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
