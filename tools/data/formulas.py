"""Computes the answers of Financial Math questions from their text, to check the answer keys.

    check_key("Use formula Simple Interest to answer the question. … Formula: I = P × r × t, …
           Question: $2,000 is lent at 4% a year for 5 years. …", "400.0")  →  Verdict(agrees=True)

A question is computed only if it holds exactly the quantities that its formula takes. Which of two
amounts is which (income and preferred dividend of an EPS) is not read from the text: every order is
tried, and a key that one of them gives counts as reproduced. So no reading gives a reported key.
The formulas are the textbook ones, as the prompts spell them out.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, permutations, product

from tools.data.expressions import Quantity, exp, ln

TOLERANCE = 0.005 + 1e-9  # keys have 2 decimals; halves may be rounded either way
LONGEST = 4000, 200  # characters and years of a question that is computed
LONGEST_EXPRESSION = 160  # characters; those of FinLoRA's keys have up to 65, but for one of 276

WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6}
SCALE = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
UNITS = {"year": 1, "semester": 2, "quarter": 4, "month": 12, "week": 52, "day": 365}  # a year has
COUNT = rf"(?:\d+(?:\.\d+)?|{'|'.join(WORDS)})"
SCALED = r"(\d[\d,]*(?:\.\d+)?)(?:\s*(thousand|million|billion|trillion)\b)?"

MONEY = re.compile(rf"(-?)[$€£]\s?{SCALED}", re.I)
RATE = re.compile(r"(?<![\w.$])(-?\d+(?:\.\d+)?)\s?(?:%|percent\b)")
TIMES = re.compile(r"\b(\d+) (?:\w+ )?\w+s (?:a|per) year|\bn ?= ?(\d+)\b")
DURATION = re.compile(rf"(?<![\w.$,])({COUNT})[\s-]+({'|'.join(UNITS)})s?\b", re.I)
CALENDAR = re.compile(r"\b(?:19|20)\d\d\b(?!,)")
NUMBER = re.compile(rf"(?<![\w.$,])(-?){SCALED}(?!\w)", re.I)

# Periods a year; the first pattern that matches decides.
FREQUENCY = {
    r"continuous": math.inf,
    r"bi-?month|(?:two|2) months": 6,
    r"(?:three|3) months|quarter": 4,
    r"(?:six|6) months|semi-?annual|bi-?annual|half-?year|semester": 2,
    r"daily": 365,
    r"week": 52,
    r"month": 12,
}

EVERY = r"(?:annually|yearly|(?:a|per|each|every) year|annual)"
SERIES = re.compile(rf"\$[\d,.]*\d {EVERY}", re.I)
STEP = re.compile(r"(increas|decreas)\w* by \$", re.I)
AT_THE_START = re.compile(r"upfront|\bnow\b|today|outlay|\bbuys?\b", re.I)
DATED = re.compile(
    rf"\$([\d,]*\d(?:\.\d+)?) in (?:(?:its |the )?({'|'.join(ORDINALS)}) year|({COUNT}) years?)",
    re.I,
)


@dataclass(frozen=True)
class Question:
    """The quantities of a question in order: dollars, rates as fractions, years, the rest."""

    text: str
    money: list[float]
    rates: list[float]
    years: list[float]
    numbers: list[float]


@dataclass(frozen=True)
class Reading:
    """A question's value under one convention; `why` is empty for the plain one.

    `confidence`: how surely a key that only this convention gives is wrong.
    """

    value: float
    why: str = ""
    confidence: str = "high"


@dataclass(frozen=True)
class Verdict:
    """A key, checked against the `value` of its formula, in the formula's unit.

    `readings`: how many values the question may have; `value` is the nearest to the key.
    """

    formula: str
    value: float
    key: float
    readings: int
    agrees: bool = False
    why: str = "no reading gives it"
    confidence: str = "high"


def check_key(prompt: str, answer: str) -> Verdict | None:
    """Checks whether a prompt's formula gives its key; None if the question cannot be computed."""
    key, readings = parse_number(answer), list_readings(prompt)
    plain = [reading.value for reading in readings if not reading.why]
    if key is None or not plain:
        return None
    name = split_prompt(prompt)[0]
    value = min(plain, key=lambda value: abs(value - key))
    verdict = partial(Verdict, name, float(value), key, len({round(v, 2) for v in plain}))
    if abs(value - key) <= TOLERANCE:
        return verdict(True, "")
    for reading in readings:
        if abs(reading.value - key) <= TOLERANCE:
            return verdict(False, reading.why, reading.confidence)
    if abs(value - key) <= 1e-4 * abs(value):
        return verdict(False, "within 0.01 %, rounded on the way", "low")
    for factor, unit_name in ((100, "in percent"), (0.01, "as a fraction")):
        if value and abs(value * factor - key) <= TOLERANCE:
            why = f"the key stands {unit_name}, which is not the formula's unit"
            return verdict(False, why, "medium")
    return verdict()


def list_readings(prompt: str) -> list[Reading]:
    """What a prompt's formula may give, in its unit; [] if the question cannot be computed."""
    name, formula, question = split_prompt(prompt)
    rule = next((rule for words, rule in RULES.items() if re.search(words, name, re.I)), None)
    if not rule or len(question) > LONGEST[0]:
        return []
    q = read_quantities(question)
    if any(time > LONGEST[1] for time in q.years):
        return []
    # The formulas of shares are fractions in RULES; a prompt's own formula may ask for percent.
    is_percent = re.search(r"[×*]\s*100\b", formula)
    try:
        readings = list(rule(q))
    except (ArithmeticError, ValueError):  # a payout of no income, an option without volatility
        return []
    if any(not math.isfinite(reading.value) for reading in readings if not reading.why):
        return []
    return [replace(r, value=r.value * 100) if is_percent else r for r in readings]


@cache
def find_expressions(prompt: str, answer: str) -> tuple[str, ...]:
    """How a prompt's formula gives its key, as expressions of numbers; several are ambiguous.

    Expressions that differ only in the order of their operands count as one.
    """
    key, texts = parse_number(answer), dict[str, str]()
    if key is None:
        return ()
    for reading in list_readings(prompt):
        value = reading.value
        if reading.why or abs(value - key) > TOLERANCE or not isinstance(value, Quantity):
            continue
        if len(value.text) <= LONGEST_EXPRESSION:
            texts.setdefault(f"{complex(value.stand_in):.9g}", value.text)
    return tuple(dict.fromkeys(texts.values()))


def split_prompt(prompt: str) -> tuple[str, str, str]:
    """Returns a prompt's formula name, formula and question; empty texts for missing parts."""
    name, _, rest = prompt.partition("Use formula ")[2].partition(" to answer ")
    formula, _, rest = rest.partition("Formula: ")[2].partition(", Explanation:")
    return name.strip(), formula, rest.partition("Question:")[2].strip().removesuffix("Answer:")


def parse_number(text: str) -> float | None:
    """Parses a number with a currency sign, a percent sign or commas; None for other texts."""
    bare = text.strip().strip("$%").replace(",", "")
    try:
        value = float(bare)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_quantities(text: str) -> Question:
    """Reads a question's amounts, rates, durations and other numbers; each counts once."""

    rest = text

    def scaled(match: re.Match[str]) -> float:
        value = float(match[2].replace(",", "")) * SCALE[(match[3] or "").lower()]
        return Quantity(-value if match[1] else value)

    def take(pattern: re.Pattern[str]) -> list[re.Match[str]]:
        nonlocal rest
        matches = list(pattern.finditer(rest))
        rest = pattern.sub(" ; ", rest)
        return matches

    money = [scaled(match) for match in take(MONEY)]
    rates: list[float] = [Quantity(float(match[1]) / 100) for match in take(RATE)]
    take(TIMES)
    years = [read_duration(match) for match in take(DURATION)]
    take(CALENDAR)
    return Question(text, money, rates, years, [scaled(match) for match in take(NUMBER)])


def read_duration(match: re.Match[str]) -> float:
    """Years of a match of DURATION."""
    count, unit = Quantity(parse_count(match[1])), UNITS[match[2].lower()]
    return count if unit == 1 else count / unit


def parse_count(word: str) -> float:
    return float(WORDS.get(word.lower()) or word)


def find_frequency(text: str) -> float:
    """Finds the periods a year that a text names; 1 by default."""
    if times := TIMES.search(text):
        return float(times[1] or times[2])
    return next((n for words, n in FREQUENCY.items() if re.search(words, text, re.I)), 1.0)


def pair_amounts_with_times(q: Question) -> list[tuple[float, float]]:
    """Returns (amount, years until it is paid) if every amount of the question has a date."""
    pairs: list[tuple[float, float]] = [
        (
            Quantity(float(m[1].replace(",", ""))),
            float(ORDINALS.get((m[2] or "").lower()) or parse_count(m[3])),
        )
        for m in DATED.finditer(q.text)
    ]
    return pairs if len(pairs) == len(q.money) else []


def value_annuity(payment: float, rate: float, n: float) -> float:
    """Computes the present value of n payments, each at the end of its year."""
    return payment * n if rate == 0 else payment * (1 - (1 + rate) ** -n) / rate


def compound(rate: float, time: float, periods: float) -> float:
    """Computes what 1 becomes in `time` years at a yearly `rate`, with `periods` a year."""
    if periods == math.inf:
        return exp(rate * time)
    growth: float = (1 + rate / periods) ** (periods * time)
    return growth


def read_npv(q: Question) -> Iterator[Reading]:
    if len(q.rates) != 1 or find_frequency(q.text) != 1:
        return
    (rate,), outlay, flows = q.rates, 0.0, list(q.money)
    if len(flows) == 2 and (start := AT_THE_START.search(q.text)):
        spans = [abs(match.start() - start.start()) for match in MONEY.finditer(q.text)]
        outlay = flows.pop(spans.index(min(spans)))
    elif re.search(r"initial investment|upfront", q.text, re.I):
        return  # an outlay of an unknown amount
    if len(q.money) > 1 and (paid := pair_amounts_with_times(q)):
        pass
    elif len(q.years) == 1 and len(flows) == 1:
        paid = [(flows[0], 1.0 + k) for k in range(round(q.years[0]))]
    elif len(q.years) == 1 and len(flows) == 2 and (step := STEP.search(q.text)):
        change = flows[1] if step[1].lower() == "increas" else -flows[1]
        paid = [(flows[0] + k * change, 1.0 + k) for k in range(round(q.years[0]))]
    else:
        return
    end = sum(amount * (1 + rate) ** -time for amount, time in paid)
    due = end * (1 + rate)
    if re.search(r"immediate", q.text, re.I):
        end, due = due, end
    yield Reading(end - outlay)
    yield Reading(due - outlay, "the first inflow is taken a year too early", "medium")
    if outlay:
        yield Reading(end, "the outlay is left out")
        yield Reading(due, "the outlay is left out, the first inflow is taken a year too early")


def read_present_value(q: Question) -> Iterator[Reading]:
    if len(q.rates) != 1 or not q.money:
        return
    (rate,), amount = q.rates, q.money[0]
    if len(q.money) > 1 and (paid := pair_amounts_with_times(q)):
        yield Reading(sum(amount * (1 + rate) ** -time for amount, time in paid))
    elif len(q.money) == 1 and SERIES.search(q.text):
        if len(q.years) == 1:
            worth = value_annuity(amount, rate, q.years[0])
            yield Reading(worth)
            yield Reading(worth * (1 + rate), "the first payment is taken a year early", "medium")
        elif len(q.years) == 2 and (start := re.search(r"starting in (\d+) years?", q.text)):
            term = next(n for n in (*q.years, float(start[1])) if n != float(start[1]))
            yield Reading(value_annuity(amount, rate, term) * (1 + rate) ** (1 - float(start[1])))
        yield Reading(amount / (1 + rate), "one payment stands for all, discounted by one year")
    elif len(q.money) == 1 and len(set(q.years)) == 1:
        continuous = math.inf if "continuous" in q.text.lower() else 1
        yield Reading(amount / compound(rate, q.years[0], continuous))
        yield Reading(amount / compound(rate, q.years[0], 1), "discounted once a year")


def read_future_value(q: Question) -> Iterator[Reading]:
    """FV = PV × (1 + r)^n has a rate per period; the rate's line names the period."""
    if len(q.rates) != 1 or len(q.money) != 1:
        return
    line = next(line for line in q.text.splitlines() if RATE.search(line))
    if len(q.years) == 1:
        n = q.years[0] * (find_frequency(line) if MONEY.search(line) is None else 1)
        yield Reading(q.money[0] * (1 + q.rates[0]) ** n)
        yield Reading(q.money[0] * (1 + q.rates[0]) ** q.years[0], "the rate is taken as yearly")
    elif not q.years and len(q.numbers) == 1:
        yield Reading(q.money[0] * (1 + q.rates[0]) ** q.numbers[0])


def read_compound_interest(q: Question) -> Iterator[Reading]:
    if len(q.money) == len(q.rates) == len(q.years) == 1:
        amount = q.money[0] * compound(
            q.rates[0], q.years[0], find_frequency(DURATION.sub("", q.text))
        )
        yield Reading(amount)
        yield Reading(amount - q.money[0], "the interest alone", "medium")
        yield Reading(q.money[0] * compound(q.rates[0], q.years[0], 1), "compounded once a year")


def read_effective_rate(q: Question) -> Iterator[Reading]:
    if len(q.rates) == 1 and re.search("compound", q.text, re.I):
        yield Reading(compound(q.rates[0], 1, find_frequency(q.text)) - 1)


def read_simple_interest(q: Question) -> Iterator[Reading]:
    if len(q.money) == len(q.rates) == len(q.years) == 1:
        interest = q.money[0] * q.rates[0] * q.years[0]
        yield Reading(interest)
        yield Reading(q.money[0] + interest, "the principal is added")


def read_percentage_rate(q: Question) -> Iterator[Reading]:
    days = re.search(r"(\d+)[\s-]days?\b", q.text)
    if len(q.money) == 3 and days:
        *costs, principal = sorted(q.money)
        yield Reading(sum(costs) / principal * 365 / int(days[1]))


def read_roi(q: Question) -> Iterator[Reading]:
    change = re.search(r"from \$[\d,.]*\d to \$[\d,.]*\d", q.text)
    if change and len(q.money) == 3:
        cost, before, after = q.money
        yield Reading((after - before - cost) / cost)
        yield Reading((after - cost) / cost, "the whole income counts, not its increase")
    elif len(q.money) == 2 and re.search(EVERY, q.text) and len(q.years) == 1:
        cost, gain = q.money
        yield Reading((gain * q.years[0] - cost) / cost)
    elif len(q.money) == 2:
        yield from (Reading((gain - cost) / cost) for cost, gain in permutations(q.money))
    elif len(q.money) == 3 and "additional" in q.text:
        cost, more, gain = q.money
        yield Reading((gain - cost - more) / (cost + more))


def read_gross_margin(q: Question) -> Iterator[Reading]:
    if len(q.money) == 2:
        small, large = sorted(q.money)
        is_profit = re.search(r"gross profit of \$|in gross profit\b", q.text, re.I)
        yield Reading(small / large if is_profit else (large - small) / large)


def read_growth_rate(q: Question) -> Iterator[Reading]:
    if len(q.money) == 2 and len(q.years) == 1:
        start, end = q.money
        yield Reading((end / start) ** (1 / q.years[0]) - 1)
        yield Reading((end / start - 1) / q.years[0], "the total growth, divided by the years")


def read_put_call_parity(q: Question) -> Iterator[Reading]:
    """Solves C - P = S - X / (1 + r)^t for what the question leaves out."""
    if len(q.money) in (2, 3) and len(q.rates) == len(q.years) == 1:
        discount = (1 + q.rates[0]) ** -q.years[0]
        for a, b, *c in permutations(q.money):
            if not c:
                yield Reading(a - b * discount)
                continue
            yield Reading(a - b * discount + c[0])  # the call, of stock, strike and put
            yield Reading(c[0] - a + b * discount)  # the put, of stock, strike and call
            yield Reading(a - c[0] + b * discount)  # the stock, of call, strike and put
            yield Reading((a - b + c[0]) / discount)  # the strike, of stock, call and put
    elif len(q.money) == 4 and len(q.rates) + len(q.years) == 1:
        for call, put, stock, strike in permutations(q.money):
            if (growth := strike / (stock - call + put)) > 0:
                if q.years:
                    yield Reading(growth ** (1 / q.years[0]) - 1)
                else:
                    yield Reading(ln(growth) / ln(1 + q.rates[0]))


def call_price(s: float, x: float, r: float, sigma: float, t: float) -> float:
    """Prices a European call on a stock without dividends (Black and Scholes, 1973).

    The error function is none of an expression's, so the price is a plain float.
    """
    d1 = (math.log(s / x) + (r + sigma**2 / 2) * t) / (sigma * math.sqrt(t))
    n1, n2 = (0.5 * (1 + math.erf(d / math.sqrt(2))) for d in (d1, d1 - sigma * math.sqrt(t)))
    return float(s) * n1 - float(x) * math.exp(-r * t) * n2


def make_rule(
    kinds: str, *formulas: Callable[..., float]
) -> Callable[[Question], Iterator[Reading]]:
    """Makes the rule of a formula that takes exactly these quantities, each kind in any order.

    `kinds` has a letter for each: $ an amount, % a rate, # another number, y a time in years.
    """

    def rule(q: Question) -> Iterator[Reading]:
        amounts = {"$": q.money, "%": q.rates, "#": q.numbers, "y": q.years}
        if any(len(amounts[kind]) != kinds.count(kind) for kind in set(kinds) | {"$", "%"}):
            return
        orders = product(*(permutations(amounts[kind]) for kind in dict.fromkeys(kinds)))
        for order in orders:
            for formula in formulas:
                yield Reading(formula(*chain(*order)))

    return rule


RULES: dict[str, Callable[[Question], Iterable[Reading]]] = {
    r"\bNPV\b|net present value": read_npv,
    r"\bPV\b|^present value": read_present_value,
    r"\bFV\b|^future value": read_future_value,
    r"compound interest": read_compound_interest,
    r"simple interest": read_simple_interest,
    r"\bAPR\b": read_percentage_rate,
    r"\bEAR\b": read_effective_rate,
    r"\bCAGR\b|compound annual growth": read_growth_rate,
    r"return on investment|\bROI\b": read_roi,
    r"gross profit margin|gross margin": read_gross_margin,
    r"operating margin|net profit margin|net margin": make_rule(
        "$$", lambda a, b: min(a, b) / max(a, b)
    ),
    r"return on (?:assets|equity)|debt-to-equity|current ratio|inventory turnover|receivable "
    r"turnover|debt service|dividend (?:yield|payout)|interest coverage|price-to-|"
    r"ev/ebitda": make_rule("$$", lambda a, b: a / b),
    r"earnings per share": make_rule("$$#", lambda a, b, n: (a - b) / n),
    r"quick ratio": make_rule("$$$", lambda a, b, c: (a - b) / c),
    r"free cash flow|working capital|balance of trade": make_rule("$$", lambda a, b: a - b),
    # Prompts disagree on the sign of working capital.
    r"operating cash flow": make_rule("$$$", lambda a, b, c: a + b + c, lambda a, b, c: a + b - c),
    r"enterprise value": make_rule("$$$", lambda a, b, c: a + b - c),
    r"market cap": make_rule("$#", lambda price, n: price * n),
    r"days sales": make_rule("$$y", lambda a, b, t: a / b * (t * 365)),
    r"inflation": make_rule("##", lambda a, b: (a - b) / b),
    r"unemployment|^beta": make_rule("##", lambda a, b: a / b),
    r"\bCAPM\b": make_rule("%%#", lambda a, b, beta: a + beta * (b - a)),
    r"sharpe|sortino": make_rule("%%%", lambda a, b, sigma: (a - b) / sigma),
    r"treynor": make_rule("%%#", lambda a, b, beta: (a - b) / beta),
    r"jensen": make_rule("%%%#", lambda r, rf, rm, beta: r - (rf + beta * (rm - rf))),
    r"modigliani": make_rule("$$%", lambda value, debt, tax: value + tax * debt),
    r"dividend discount": make_rule("$%%", lambda d, r, g: d / (r - g)),
    r"gordon": make_rule("$$%", lambda d, p, g: d / p + g),
    r"\bWACC\b": make_rule(
        "$$%%%", lambda e, d, re_, rd, tax: (e * re_ + d * rd * (1 - tax)) / (e + d)
    ),
    r"put-call parity": read_put_call_parity,
    r"black-scholes": make_rule("$$%%y", call_price),
}
