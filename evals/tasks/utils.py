"""How an answer is read and scored: the functions that the task files name.

This file stands alone, so that plain `lm_eval --include_path evals/tasks` finds all that it needs.
A row goes through a filter (the parse rule) and a `process_results` function. What that returns for
a metric is a number, or pairs (expected, answered) where a score such as F1 is made from all rows:

    number           accuracy, exact_match, numeric_accuracy, rouge_l, token_f1: their mean counts,
                     over the rows that have one
    [pair, …]        f1_weighted, f1_macro; and accuracy, where one row holds several tags
    [pair]           bertscore, which a model computes for all rows together

`evals/stats.py` makes intervals and tests from the same values.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from itertools import chain
from typing import Any, NamedTuple

Pair = tuple[str, str]
Value = float | list[Pair]
Scores = dict[str, Value]
Rule = Callable[[str, str, str], Scores]

NONE = "[none]"  # stands for an answer in which no label was found


def normal(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


# ---- FinLoRA's scoring, beside ours


def judged(targets: Sequence[str], outputs: Sequence[str]) -> list[Pair]:
    """Pairs (target, response) by the label rule of FinLoRA's test/test_dataset.py.

    The labels are all targets of the file. Case aside, the label that occurs earliest anywhere in
    an output is its answer. The response is the target where that is right, and else the whole
    output: a wrong answer is a false positive of a label only if it is that label and nothing else,
    which lifts FinLoRA's F1 above its accuracy. Where labels begin at the same place, FinLoRA takes
    one by the order of a Python set, which changes from run to run; here the longest one is taken.
    """
    labels = sorted({target.lower() for target in targets}, key=len, reverse=True)
    pairs = []
    for target, output in zip(targets, outputs, strict=True):
        text = output.lower()
        found = [(place, label) for label in labels if (place := text.find(label)) >= 0]
        earliest = min(found, key=lambda one: one[0])[1] if found else None
        pairs.append((target, target if earliest == target.lower() else output))
    return pairs


def continuation(output: str) -> str:
    """What FinLoRA takes for the answer: what follows the last `Answer:`."""
    return output.rpartition("Answer:")[2].strip()


def finlora(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[Pair]]:
    """Filter: FinLoRA's judgement of each row, a pair."""
    pairs = judged([key(doc) for doc in docs], [continuation(resp[0]) for resp in resps])
    return [[pair] for pair in pairs]


def finlora_list(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[list[Pair]]]:
    """Filter: FinLoRA's judgement of rows that hold several tags, a list of pairs each."""
    targets = [[tag.strip() for tag in key(doc).split(",")] for doc in docs]
    outputs = []
    for resp, expected in zip(resps, targets, strict=True):
        parts = [part.strip().replace("\n", "") for part in continuation(resp[0]).split(",")]
        outputs.append((parts + [""] * len(expected))[: len(expected)])
    pairs = iter(judged([*chain.from_iterable(targets)], [*chain.from_iterable(outputs)]))
    return [[[next(pairs) for _ in expected]] for expected in targets]


# ---- a row's scores


def key(doc: dict[str, Any]) -> str:
    """The expected answer: the text of the last turn, and the tools that it calls as JSON."""
    turn = doc["messages"][-1]
    calls = turn.get("tool_calls")
    parts = [str(turn["content"] or "").strip(), json.dumps(calls) if calls else ""]
    return "\n".join(filter(None, parts))


def process_results(rule: Rule) -> Callable[[dict[str, Any], list[Any]], Scores]:
    """Makes lm-eval's function of a rule(expected, answer, prompt)."""

    @wraps(rule)
    def scores(doc: dict[str, Any], results: list[Any]) -> Scores:
        answer = results[0]
        if isinstance(answer, tuple):  # the filter `finlora` has judged it
            return {"accuracy": float(answer[0] == answer[1]), "f1_weighted": [answer]}
        if isinstance(answer, list):
            return {"accuracy": answer, "f1_weighted": answer}
        return rule(key(doc), answer.strip(), str(doc["messages"][-2]["content"]))

    return scores


def labelled(expected: str, answered: str) -> Scores:
    pair = (expected, answered)
    return {"accuracy": float(expected == answered), "f1_weighted": [pair], "f1_macro": [pair]}


def written(expected: str, answer: str, right: bool) -> Scores:
    """Of an answer that is `right`, or to the letter the expected one."""
    exact = normal(expected) == normal(answer)
    pair = (normal(expected), normal(expected if right else answer))
    right = pair[0] == pair[1]
    return {"accuracy": float(right), "exact_match": float(exact), "f1_weighted": [pair]}


@process_results
def label(expected: str, answer: str, prompt: str) -> Scores:
    """A label that the filter has found; right but for case and spaces."""
    return labelled(normal(expected), normal(answer))


@process_results
def exam(expected: str, answer: str, prompt: str) -> Scores:
    """A multiple-choice answer, `B. text of the choice`; the letter counts."""
    choices = dict(re.findall(r"^\W*([A-Z])[.):]\s+(.+?)\s*$", prompt, re.MULTILINE))
    right = letter(expected, choices, LETTERS | choices.keys())
    if right == NONE:  # a key of another form is text
        return labelled(normal(expected), normal(answer))
    allowed = choices.keys() if len(choices) > 1 else LETTERS
    return labelled(right, letter(answer, choices, allowed | {right}))


@process_results
def tags(expected: str, answer: str, prompt: str) -> Scores:
    """Several tags in one answer, compared by position: missing ones are wrong, surplus ignored."""
    wanted, given = tag_list(expected), tag_list(answer)
    pairs = list(zip(wanted, given + [NONE] * len(wanted), strict=False))
    every = float(all(one == other for one, other in pairs))
    return {"accuracy": pairs, "f1_weighted": pairs, "f1_macro": pairs, "exact_match": every}


def tag_list(text: str) -> list[str]:
    """The tags between commas or line ends, without numbering, quotes and the prefix `us-gaap:`."""
    parts = re.split(r"\s*(?:,\s*\n|[,;\n])\s*", text.strip())
    parts = [re.sub(r"^(?:\d+[.):]\s*|[-*]\s+)", "", part.strip(" \t.'\"`[]")) for part in parts]
    return [re.sub(r"^us-gaap[:_]", "", part.lower()) for part in parts]


@process_results
def tag(expected: str, answer: str, prompt: str) -> Scores:
    """One XBRL tag: the first `prefix:Name` of the answer, or a name alone, of any prefix."""
    found = re.search(r"[A-Za-z][\w-]*:[A-Za-z]\w*", answer)
    given = (found.group() if found else answer.strip(" .'\"`")).lower()
    wanted = expected.lower()
    return labelled(wanted, wanted if given in (wanted, wanted.partition(":")[2]) else given)


@process_results
def number(expected: str, answer: str, prompt: str) -> Scores:
    """A number, within the tolerance of `close`."""
    return written(expected, answer, close(expected, answer, prompt))


@process_results
def formula(expected: str, answer: str, prompt: str) -> Scores:
    """A formula, up to the order of the operands of + and *, brackets, spaces and case."""
    wanted = canonical(expected)
    return written(expected, answer, wanted is not None and wanted == canonical(answer))


@process_results
def calculation(expected: str, answer: str, prompt: str) -> Scores:
    """A formula in numbers; numeric_accuracy takes what it comes to, written out or worked out."""
    scores = formula.__wrapped__(expected, answer, prompt)  # type: ignore[attr-defined]
    wanted, given = result(expected), result(answer)
    if wanted is None or given is None:
        right = close(expected, answer, prompt)
    else:
        right = abs(given - wanted) <= RELATIVE * abs(wanted)
    return dict(scores) | {"numeric_accuracy": float(scores["accuracy"] == 1 or right)}


@process_results
def text(expected: str, answer: str, prompt: str) -> Scores:
    """Free text. Where the key is a number, token F1 sees neither its sign nor its decimal point,
    and numeric_accuracy stands beside it, of those rows alone.
    """
    scores: Scores = {
        "bertscore": [(expected, answer)],
        "rouge_l": rouge_l(expected, answer),
        "token_f1": token_f1(expected, answer),
    }
    if is_number(expected):
        scores["numeric_accuracy"] = float(close(expected, answer, prompt))
    return scores


# ---- the letter of a multiple-choice answer

LETTERS = frozenset("ABCDE")
# A letter is meant as one only where it stands alone. "A bond", "B shares", "Series B", "A-rated",
# "D&O", "e.g." and "D. E. Shaw" name no choice: what stands before and after decides.
_ALONE = re.compile(
    r"[(\[{<\"'](?P<sure>[A-Za-z])[)\]}>\"']|(?<![\w&'.+-])(?P<bare>[A-Za-z])(?![\w&'+%])"
)
_BEFORE = re.compile(
    r"(?:\A|[^\w\s]|\n|\b(?:answer|ans|option|choice|letter|alternative|statement|selection|is|be|was|it's"
    r"|that's|that|think|believe|say|guess|choose|choosing|pick|select|selected|correct|with|for|so"
    r"|therefore|thus|hence|only|both|either|neither|between|and|or|nor|than|not|to|maybe|perhaps"
    r"|possibly|probably|likely|definitely|clearly|certainly|obviously|indeed|sure|ok|yes|because|why|but|if"
    r"|whether|also|versus|vs))\s*\Z",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\s*(?:\Z|[\n;!?)\]}/&<—。✓✔✅]|,(?!\d)|[.:](?!\w|\s?[A-Z]\.))|\s+[-–(]"
    r"|\s+(?:because|since|as|due|given|which|based|not|rather|instead|but|with|and|or|nor|versus|vs|to|is"
    r"|isn't|was|are|aren't|would|must|should|seems|appears|could|might|may|has|it is)\b"
)
_LIST = re.compile(
    r"⟦\w*⟧(?:\s*(?:,?\s*(?:and|or(?:\s+not)?|nor|to|vs\.?|versus|&|/)|,(?!\s*⟦\w*⟧\s+(?:is|was|would|must|should"
    r"|seems|appears)\b))\s*(?:(?:maybe|perhaps|possibly|even|also"
    r"|option|choice|answer)\s+)?⟦\w*⟧)+",
    re.IGNORECASE,
)
_IS = r"(?:'s|\s+(?:(?:would|should|must|will|has\s+to|can\s+only)\s+be|is|was|seems|appears))"
_MOST = (
    r"(?:\s+(?:to|be|the|clearly|definitely|certainly|obviously|most|likely|probably|also|indeed|thus"
    r"|therefore|simply|only|my|final|best))*"
)
_NOUN = (
    r"(?:answer|ans|choice|option|selection|response|letter|alternative|solution|conclusion|pick"
    r"|result|output|assistant)"
)
_ANNOUNCED = re.compile(rf"(?:\b{_NOUN}|\bis)\s*\Z", re.IGNORECASE)
_NAME = rf"(?:\s+{_NOUN})?[\s:#]*"
# A cue before the letter, or what is said of the letter after it.
_CUES = [
    # The answer is B. Correct option: B. The statement that fits best is B. The answer, B, is …
    rf"\b(?:{_NOUN}|statement|correct|selected|verdict)\b"
    rf"(?:\s+(?!(?:is|was|not|never|whether|if|depends|could|might|may)\b)[\w'-]+){{0,6}}?"
    rf"(?:{_IS}{_MOST}|[\"']?\s*[:=>→.,–—-])+(?:\s+(?:i\s+think|it\s+is|it's|that\s+is))?{_MOST}{_NAME}",
    # Option B. The correct answer B.
    rf"(?:\A|[.:;,!\n#])\s*(?:the\s+)?(?:(?:correct|final|best|right)\s+)?{_NOUN}\]?\s+",
    # I would choose option B. I think that it is B.
    r"\b(?:choose|choosing|pick|select|go(?:ing)?\s+with|opt\s+for|vote\s+for|say|think|believe|guess|suggest"
    rf"|conclude)(?:\s+(?:that|it\s+is|it's|the))*{_NAME}",
    # It's B. Therefore, B.
    rf"\b(?:it|that|this){_IS}{_MOST}{_NAME}",
    r"(?:\A|[.;!\n])\s*(?:so|therefore|thus|hence|definitely|certainly|clearly|obviously|sure|ok|okay|yes"
    rf"|probably|likely|most\s+likely)[\s,:!.]*{_NAME}",
]
_DOUBT = (
    r"(?!,?\s+(?:is|was|are|isn't|aren't|could|might|may|would|must|should|seems|appears|has|or)\b"
    r"|\W{0,3}(?:incorrect|wrong|false)\b)"
)
_ASSERTED = [re.compile(rf"(?:{cue})⟦(\w*)⟧{_DOUBT}", re.IGNORECASE) for cue in _CUES] + [
    re.compile(
        rf"⟦(\w*)⟧,?(?:{_IS}{_MOST}\s+(?:correct|right|true|accurate|appropriate|answer|choice|option"
        r"|solution|one|it|best)\b|\s+it\s+is\b)",
        re.IGNORECASE,
    )
]
# Before the letter, in the same clause, this takes back what is said of it.
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|no|doubt|unlikely|unclear|unsure|whether|if|unless|incorrect"
    r"|wrong|except|rather\s+than|instead\s+of)\b|n't\b)[^.;,\n]*\Z",
    re.IGNORECASE,
)
_REVISED = re.compile(r"\b(?:wait|actually|correction|second thought|sorry)\b", re.IGNORECASE)
# What an answer marks as its last word.
_MARKED = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\\boxed\s*\{([^{}]*)",
        r"<answer>(.*?)(?:</answer>|\Z)",
        r"\bfinal (?:answer|choice)\b(?:\s+is)?\s*[:=-]?(.*)",
        r"####(.*)",
    )
]
_TYPOGRAPHY = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "*": "", "_": " ", "`": "", "$": ""}
)


def letter(answer: str, choices: dict[str, str], allowed: Iterable[str] = LETTERS) -> str:
    """The letter that an answer decides on or, without one, that of the one choice that it quotes.

    What it marks as final counts first (`\\boxed{B}`, `<answer>`, `Final answer: B`), then what it
    says (`B is correct`, `I would choose B`), then a letter that it begins with. An answer that
    names several letters without deciding gives none.
    """
    text = unicodedata.normalize("NFKC", answer).translate(_TYPOGRAPHY)
    # A small model may go on with a question of its own.
    text = re.split(r"\n\s*(?:Question|Q\d*)\s*[:.]", text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?m)^A:\s*(?=\W*[A-E]\b)", "Answer: ", text)
    text = re.sub(r"\\[()\[\]]|<\|[^|>]*\|>", "", text)
    text = re.sub(r"<(b|strong|p)>(.*?)</\1>", r"\2", text, flags=re.IGNORECASE)
    parts = [part for pattern in _MARKED for part in reversed(pattern.findall(text))]
    decided = (_decided(part.strip(), choices, allowed) for part in [*parts, text])
    return next(filter(None, decided), "") or _quoted(text, choices)


def _decided(text: str, choices: dict[str, str], allowed: Iterable[str]) -> str:
    """The letter that a text says or begins with; empty where it decides on none."""

    listed: set[str] = set()  # letters that their choice's text follows

    def mark(mention: re.Match[str]) -> str:
        name, small = str(mention["sure"] or mention["bare"]), mention["bare"] or ""
        start, end = mention.span()
        quoted = normal(choices.get(name.upper(), ""))
        after = normal(text[end : end + 2 * len(quoted) + 9]).lstrip(".:) -")
        if quoted and after.startswith(quoted):
            listed.add(name)
        alone = mention["sure"] or (
            _BEFORE.search(text, max(0, start - 30), start)
            and (_AFTER.match(text, end) or name in listed)
        )
        # A small letter, the article above all, needs punctuation or a word that announces it.
        if small.islower():
            alone = alone and (
                re.compile(r"[.):,]?\s*(?:\Z|\n)|[.):]\s").match(text, end)
                or (small != "a" and _ANNOUNCED.search(text, max(0, start - 30), start))
                or (small != "a" and text.startswith((" is correct", " is right", " is the"), end))
            )
        return f"⟦{name.upper()}⟧" if alone and name.upper() in allowed else mention[0]

    text = _LIST.sub("⟦⟧", _ALONE.sub(mark, text))
    said = [
        (match.start(1), match[1])
        for pattern in _ASSERTED
        for match in pattern.finditer(text)
        if not _DENIED.search(text, max(0, match.start(1) - 80), match.start(1))
    ]
    if said:
        place, last = max(said)
        others = {name for _, name in said} - {last}
        return last if not others or _REVISED.search(text[:place]) else ""
    # The choices said again are no decision.
    lines = re.findall(r"^\W*⟦(\w)⟧[.):]", text, re.MULTILINE)
    if len(listed) > 1 or lines[:2] == ["A", "B"]:
        return ""
    alone = re.match(rf"\W*(?:\d+[.)]\s+)?⟦(\w+)⟧(?!\?){_DOUBT}", text)
    alone = alone or re.search(r"[.!\n]\s*⟦(\w+)⟧[.!]?\s*\Z", text)
    return alone[1] if alone else ""


def _quoted(text: str, choices: dict[str, str]) -> str:
    """The letter of the one choice whose text an answer holds, not inside of another's."""
    places = {}
    body = normal(text)
    for name, choice in choices.items():
        found = re.search(rf"(?<![\w.,-]){re.escape(normal(choice))}(?![\w-]|[.,]\d)", body)
        if found and not re.search(
            r"(?:\b(?:not|nor|neither|than|instead of|except)\b|n't)[^.;,]*\Z",
            body[: found.start()],
        ):
            places[name] = found.span()
    outer = [
        name
        for name, (start, end) in places.items()
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in places.values())
    ]
    return outer[0] if len(outer) == 1 else NONE


# ---- numbers

RELATIVE = 0.001  # of the expected number
SCALES = dict.fromkeys(("hundred",), 2) | dict.fromkeys(("thousand", "thousands"), 3)
SCALES |= dict.fromkeys(("million", "millions", "mil", "mill", "mln", "mio", "mn"), 6)
SCALES |= dict.fromkeys(("billion", "billions", "bil", "bill", "bln", "bn", "mrd"), 9)
SCALES |= dict.fromkeys(("trillion", "trillions", "tril", "trn", "tn"), 12)
# One letter is a scale behind a currency's number or right behind the digits. "250 m above" and
# "4 400 people" have none.
SHORT = {"k": 3, "m": 6, "mm": 6, "b": 9, "t": 12}
PER_ONE = {"": 1.0, "%": 100.0, "bp": 10_000.0}

_CURRENCY = (
    r"(?:(?:US|CA|AU|HK|NZ|[CAS])?[$€£¥₹₩]"
    r"|\b(?:USD|EUR|GBP|JPY|CHF|CAD|AUD|INR|CNY|RMB|dollars|euros|pounds)(?![A-Za-z])|\bRs\.?)"
)
NUMBER = re.compile(
    rf"""(?<![\w.,])(?<![A-Za-z]-)
    (?P<open>\(\s*)? (?P<currency>{_CURRENCY}\s*)? (?P<sign>-\s?|\+\s?|\b(?:minus|negative)\s)?
    (?P<late>{_CURRENCY}\s*)? (?P<inner>\(\s*)? (?P<second>-)?
    (?: (?P<point> (?!0,)\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?
                 | \d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)(?:\.\d+)?  )      # 1,234.56  12,34,567
      | (?P<comma> \d{{1,3}}(?:\.\d{{3}})+,\d+ | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d) )  # 1.234,56
      | (?P<plain> (?: \d{{1,3}}(?:['\ ]\d{{3}})+(?!\d) | \d+ )           # 1 234,56
                   (?:\.\d+|,\d+(?![,.]?\d))? | \.\d+ ) )
    (?:e(?P<exponent>[-+]?\d{{1,3}})(?!\w|\.\d))?
    (?: (?:\s|-)?(?P<scale>{"|".join(sorted(SCALES, key=len, reverse=True))})\b
      | (?P<space>\s?)(?P<short>mm|[kmbt])\b(?!&) )?
    \s*(?P<unit>%|percent\b|per\ cent\b|pct\b|percentage\ points?\b|bps?\b|basis\ points?\b)?
    (?P<close>\s*\))? \s*(?P<outer>%|percent\b|per\ cent\b)?""",
    re.VERBOSE | re.IGNORECASE,
)
_BEHIND = re.compile(rf"\s*{_CURRENCY}", re.IGNORECASE)
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)[a-z]*\.?"
# Dates, spans of years, and the first number of a numbered list.
_DATE = re.compile(
    r"\b\d{4}-\d\d-\d\d\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b|\b(?:19|20)\d\d\s?[-/]\s?(?:\d\d)?\d\d\b"
    rf"|\b{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s\d{{4}}\b)?|\b\d{{1,2}}\s{_MONTH}(?:\s\d{{4}}\b)?"
    r"|^\s*\(?1[.)]\s+(?=[^\d\s])",
    re.MULTILINE,
)
# A number after one of these is a name, and before one of those a span of time. 3M is a company.
_NAMED = re.compile(
    r"(?:\b(?:note|item|form|section|table|page|figure|step|level|question|exhibit|chapter|part|phase"
    r"|S&P|russell|fortune|nasdaq|no\.|FY|CY|fiscal|years?|Q[1-4])\s?'?|[#\[])\Z",
    re.IGNORECASE,
)
_SPAN = re.compile(
    r"[\s-]?(?:years?|quarters?|months?|weeks?|days?|hours?)\b|-[A-Z]\b", re.IGNORECASE
)
_SIGNS = str.maketrans("−–‒‑﹣⁻⁺", "------+")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


class Number(NamedTuple):
    """A number of a text, e.g. `$1.2 million` or `75 bps`."""

    value: float
    half: float  # what half of its last decimal is worth
    unit: str  # of PER_ONE
    scale: int  # a power of ten that is written out as a word or letter


def read_number(text: str) -> Number | None:
    """The number that a text answers with; None where it has none.

    What is in `\\boxed{}` counts, then what follows `answer is`, then what follows the last `=`. Of
    several numbers it is the first one that is no date, year, span of time or name (`Note 5`), if
    there is one. Understood are currency signs, separators of thousands, decimal commas, minus
    signs, brackets around a negative number, exponents, thousand to trillion, percent and basis
    points.
    """
    text = _tidy(text)
    for part in (
        *reversed(re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)),
        *reversed(
            re.split(r"\banswer\b[^.\n]{0,40}?(?:\bis\b|\bbe\b|[:=])", text, flags=re.IGNORECASE)[
                1:
            ]
        ),
        text.rpartition("=")[2],
        text,
    ):
        undated = _DATE.sub(" ", part)
        for body in (undated, part):
            matches = list(NUMBER.finditer(body))
            meant = [match for match in matches if not _is_aside(match, body)]
            if meant or (matches and body is part):
                return _number((meant or matches)[0], body)
    return None


def _tidy(text: str) -> str:
    """A text with its typography and LaTeX written plainly, and powers of ten as exponents."""
    text = re.sub(
        r"(?<=10)[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: "^" + power[0].translate(_RAISED), text
    )
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", "", text)  # marks of footnotes
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).replace("’", "'")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:times|cdot)\b", "×", text.replace("{,}", ","))
    text = re.sub(r"\\([$%])", r"\1", re.sub(r"\\[,;: !]|~", " ", text))
    power = r"10\s*(?:\^|\*\*)\s*\{?\s*([-+]?\d{1,3})\}?"
    text = re.sub(rf"(?<=\d)\s*[x×*·]\s*{power}", r"e\1", text)
    text = re.sub(rf"(?<![\w.]){power}", r"1e\1", text)
    text = re.sub(r" {2,}", " ", re.sub(r"\*\*|__|`", "", text)).strip()
    return re.sub(r"(?m)^\s*[-•]\s+", "", text) if "\n" in text else text


def _is_aside(match: re.Match[str], text: str) -> bool:
    plain = match["plain"] or ""
    bare = not (
        match["currency"] or match["late"] or match["scale"] or match["unit"] or match["outer"]
    )
    year = bare and not match["short"] and re.fullmatch(r"(?:19|20)\d\d", plain)
    named = bare and _NAMED.search(text[: match.start()])
    company = plain == "3" and match["short"] == "M" and not match["space"] and bare
    return bool(year or named or company or (bare and _SPAN.match(text, match.end())))


def _number(match: re.Match[str], text: str) -> Number:
    if match["point"]:
        digits = match["point"].replace(",", "")
    elif match["comma"]:
        digits = match["comma"].replace(".", "").replace(",", ".")
    else:
        digits = re.sub("[' ]", "", match["plain"]).replace(",", ".")
    scale = SCALES.get((match["scale"] or "").lower(), 0)
    if short := match["short"]:
        money = match["currency"] or match["late"] or _BEHIND.match(text, match.end("short"))
        if money or short in ("KMBT" if match["space"] else "kmbKMBT"):
            scale = SHORT[short.lower()]
    power = int(match["exponent"] or 0) + scale
    value = float(f"{digits}e{power}")
    in_brackets = bool(match["close"] and (match["open"] or match["inner"]))
    signs = (match["sign"] or "").lower() + (match["second"] or "")
    if in_brackets or re.search("-|minus|negative", signs):
        value = -value
    places = len(digits.partition(".")[2])
    half = 0.5 * 10.0 ** (power - max(places, 2)) if places else 0.0
    unit = (match["unit"] or match["outer"] or "").lower()
    kind = "" if not unit else "bp" if unit.startswith("b") else "%"
    return Number(value, half, kind, scale)


def is_number(text: str) -> bool:
    """Whether a text is a number and no more."""
    return bool(NUMBER.fullmatch(_tidy(text)))


def close(expected: str, answer: str, prompt: str = "") -> bool:
    """Whether the answer's number is the expected one, within the larger of two tolerances.

    0.1 % of the expected number; and where that has decimals, half of a unit of the last one, 0.005
    at the most: FinLoRA's keys are rounded to 2 decimals. An expected text that is more than a
    number, such as a date, is none. Where one of the two has a unit (7.5 %, 75 bps), the other one
    may be written in it or not. Where the prompt asks for a number in millions, so is 5 million 5.
    """
    if not is_number(expected):
        return False
    wanted, got = read_number(expected), read_number(answer)
    if wanted is None or got is None:
        return False
    scales = [1.0]
    asked = re.search(
        r"\bin\s+(?:\w*[$€£]\s?|\w+\s+)?(thousands|millions|billions)\b", prompt, re.IGNORECASE
    )
    if asked and bool(wanted.scale) != bool(got.scale):
        factor = 10.0 ** SCALES[asked[1].lower()]
        scales.append(factor if wanted.scale else 1 / factor)
    return any(
        abs(got.value * there * scale - wanted.value * here)
        <= max(RELATIVE * abs(wanted.value * here), wanted.half * here) * (1 + 1e-9)
        for scale in scales
        for here, there in _pairs(wanted.unit, got.unit)
    )


def _pairs(wanted: str, got: str) -> list[tuple[float, float]]:
    """Factors of an expected and an answered number under which their units are the same."""
    if wanted and got:
        return [(1 / PER_ONE[wanted], 1 / PER_ONE[got])]
    sizes = {"": [1.0], "%": [1.0, 0.01], "bp": [1.0, 0.01, 0.0001]}
    return [(here, there) for here in sizes[wanted] for there in sizes[got]]


# ---- formulas

Node = tuple[Any, ...]
TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<name>[a-z][\w-]*:[a-z]\w*|[a-z_]\w*)|(?P<sign>\*\*|[-+*/^()]))"
)
SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
SAME |= str.maketrans({"[": "(", "]": ")", "{": "(", "}": ")", "$": "", "`": ""})
LONGEST = 2000  # characters; longer answers are no formula


def canonical(text: str) -> Node | None:
    """A formula as nested tuples in which + and * have no order; None where it cannot be read.

    What stands before the last `=` is left out. A recursive-descent parser over tokens; nothing of
    an answer is ever evaluated as code.
    """
    body = text.rpartition("=")[2].strip().rstrip(".").lower().translate(SAME)
    body = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", body)
    tokens, place = [], 0
    while place < len(body):
        found = TOKEN.match(body, place)
        if not found or len(body) > LONGEST:
            return None
        tokens.append((str(found.lastgroup), found.group().strip()))
        place = found.end()
    try:
        node, rest = _sum(tokens, 0)
    except (ValueError, IndexError):
        return None
    return node if rest == len(tokens) else None


def _sum(tokens: list[tuple[str, str]], at: int, depth: int = 0) -> tuple[Node, int]:
    if depth > 40:
        raise ValueError("nested too deeply")
    terms: list[tuple[int, Node]] = []
    sign = 1
    while True:
        node, at = _product(tokens, at, depth)
        inner = node[1] if node[0] == "sum" else [(1, node)]
        terms += [(sign * one, term) for one, term in inner]
        if at == len(tokens) or tokens[at][1] not in "+-":
            break
        sign = 1 if tokens[at][1] == "+" else -1
        at += 1
    terms.sort(key=repr)
    return (terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else ("sum", tuple(terms))), at


def _product(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Node, int]:
    factors: list[tuple[int, Node]] = []
    power = 1
    while True:
        node, at = _factor(tokens, at, depth)
        inner = node[1] if node[0] == "product" else [(1, node)]
        factors += [(power * one, factor) for one, factor in inner]
        if at == len(tokens) or tokens[at][1] not in ("*", "/"):
            break
        power = 1 if tokens[at][1] == "*" else -1
        at += 1
    factors.sort(key=repr)
    single = len(factors) == 1 and factors[0][0] == 1
    return (factors[0][1] if single else ("product", tuple(factors))), at


def _factor(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Node, int]:
    kind, token = tokens[at]
    if token in "+-":
        node, at = _factor(tokens, at + 1, depth + 1 if depth < 40 else _deep())
        return (node if token == "+" else ("sum", ((-1, node),))), at
    if token == "(":
        node, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at][1] != ")":
            raise ValueError("a bracket is not closed")
    elif kind == "number":
        node = ("number", float(token))
    elif kind == "name":
        node = ("name", token)
    else:
        raise ValueError(f"{token} has no operand")
    at += 1
    if at < len(tokens) and tokens[at][1] in ("^", "**"):
        exponent, at = _factor(tokens, at + 1, depth + 1 if depth < 40 else _deep())
        node = ("power", node, exponent)
    return node, at


def _deep() -> int:
    raise ValueError("nested too deeply")


def result(text: str) -> float | None:
    """What a formula in numbers comes to; None where it holds names or cannot be worked out."""
    node = canonical(text)
    try:
        return None if node is None else _result(node)
    except (ArithmeticError, ValueError):
        return None


def _result(node: Node) -> float:
    kind, content = node[0], node[1]
    if kind == "number":
        return float(content)
    if kind == "sum":
        return float(sum(sign * _result(term) for sign, term in content))
    if kind == "product":
        value = 1.0
        for power, factor in content:
            value = value * _result(factor) if power == 1 else value / _result(factor)
        return value
    if kind == "power":
        value = _result(content) ** _result(node[2])
        if isinstance(value, float):
            return value
    raise ValueError("not a number")


# ---- text


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def rouge_l(expected: str, answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004) by the package rouge_score, without stemming."""
    return float(_rouge().score(expected, answer)["rougeL"].fmeasure)


def token_f1(expected: str, answer: str) -> float:
    """F1 of the words that two texts share, as SQuAD has it (Rajpurkar et al. 2016).

    Lower case, without punctuation and the articles a, an, the. Two empty texts are equal.
    """

    def words(text: str) -> Counter[str]:
        text = re.sub(r"[^\w\s]", "", text.lower())
        return Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())

    wanted, given = words(expected), words(answer)
    total = wanted.total() + given.total()
    return 2 * (wanted & given).total() / total if total else 1.0


BERT = "ProsusAI/finbert"  # FinLoRA's; bert-score takes its layer 10


class Unavailable(Exception):
    """A metric cannot be computed here; says why, and what to do."""


def bertscore(values: list[list[Pair]]) -> list[float]:
    """BERTScore F1 (Zhang et al. 2020) of every row, by the package bert-score with FinBERT.

    Without inverse document frequencies and without rescaling, as FinLoRA has it; an empty answer
    has 0. Raises Unavailable where the model is not in the local cache: no other takes its place.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(BERT, local_files_only=True)
    except LocalEntryNotFoundError:
        raise Unavailable(
            f"left out: {BERT} is not in the local cache; `hf download {BERT}` brings it"
        ) from None
    from bert_score import BERTScorer
    from bert_score.utils import model2layers

    scorer = BERTScorer(folder, num_layers=model2layers[BERT], use_fast_tokenizer=True)
    scores = [0.0] * len(values)
    pairs = {row: pair for row, (pair,) in enumerate(values) if pair[1].strip()}
    if pairs:
        expected, answered = zip(*pairs.values(), strict=True)
        _, _, f1 = scorer.score(list(answered), list(expected))
        for row, value in zip(pairs, f1.tolist(), strict=True):
            scores[row] = value
    return scores


# Metrics whose rows are scored together: values of all rows → a number for each.
CORPUS: dict[str, Callable[[list[list[Pair]]], list[float]]] = {"bertscore": bertscore}


# ---- aggregations: the values of all rows → the score


def share(values: Iterable[Value]) -> float:
    """Share of right answers among all rows' numbers and pairs."""
    right = [
        float(item if isinstance(item, float) else item[0] == item[1])
        for value in values
        for item in (value if isinstance(value, list) else [value])
    ]
    return sum(right) / len(right)


def f1(values: Iterable[list[Pair]], average: str) -> float:
    """F1 averaged over the labels that are expected somewhere (scikit-learn's `f1_score`).

    An answer that is no label counts as a miss of its row's label and not as a class of its own.
    """
    from sklearn.metrics import f1_score

    expected, answered = zip(*(pair for value in values for pair in value), strict=True)
    labels = sorted(set(expected))
    return float(f1_score(expected, answered, labels=labels, average=average, zero_division=0))


def f1_weighted(values: Iterable[list[Pair]]) -> float:
    return f1(values, "weighted")


def f1_macro(values: Iterable[list[Pair]]) -> float:
    return f1(values, "macro")


def bertscore_mean(values: list[list[Pair]]) -> float:
    """Mean BERTScore F1, or not a number, with a word about why, where there is no model."""
    try:
        scores = bertscore(values)
    except Unavailable as error:
        import logging

        logging.getLogger("lm_eval").warning("BERTScore %s", error)
        return float("nan")
    return sum(scores) / len(scores)


# ---- datasets


def last_word(dataset: Any) -> Any:
    """`process_docs`: expects the last word of each answer: `mildly negative` is `negative`."""

    def folded(row: dict[str, Any]) -> dict[str, Any]:
        question, answer = row["messages"]
        return {"messages": [question, answer | {"content": answer["content"].split()[-1]}]}

    return dataset.map(folded)
