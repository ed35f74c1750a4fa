"""How an answer is read and scored: the functions that the task files name.

This file imports nothing of the project, so plain `lm_eval --include_path evals/tasks` works. A
filter reads the answer, then a `process_results` function scores it. For each metric it returns

    number           accuracy, exact_match, numeric_accuracy, rouge_l, token_f1: the score is the
                     mean over the rows that have one
    [pair, …]        (expected, answered) for f1_weighted and f1_macro, and for accuracy where a row
                     holds several tags
    [pair]           for bertscore, which a model computes for all rows together

`evals/stats.py` makes intervals and tests from the same values.
"""

import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial, wraps
from itertools import chain, product
from typing import Any, NamedTuple

Pair = tuple[str, str]
Value = float | list[Pair]
Scores = dict[str, Value]
Rule = Callable[[str, str, str], Scores]

NONE = "[none]"  # the answered label where an answer has none


def normal(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


# ---- FinLoRA's scoring, beside ours


def judge_by_finlora(targets: Sequence[str], outputs: Sequence[str]) -> list[Pair]:
    """Pairs (target, response) by the label rule of FinLoRA's test/test_dataset.py.

    The labels are all targets of the file. The one that occurs earliest anywhere in an output is
    its answer, ignoring case. The response is the target where that is right, else the whole
    output: a wrong answer is a false positive only where it is a label and nothing else, which
    lifts FinLoRA's F1 above its accuracy. Of labels that begin at the same place, FinLoRA takes one
    by the order of a Python set, which changes from run to run; this function takes the longest.
    """
    labels = sorted({target.lower() for target in targets}, key=len, reverse=True)
    pairs = []
    for target, output in zip(targets, outputs, strict=True):
        text = output.lower()
        present = (label for label in labels if label in text)
        earliest = min(present, key=text.find, default=None)
        pairs.append((target, target if earliest == target.lower() else output))
    return pairs


def _cut_prompt(output: str) -> str:
    """What FinLoRA takes for the answer: the text after the last `Answer:`."""
    return output.rpartition("Answer:")[2].strip()


def finlora(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[Pair]]:
    """Filter: FinLoRA's judgement of each row, a pair."""
    outputs = [_cut_prompt(resp[0]) for resp in resps]
    return [[pair] for pair in judge_by_finlora([key(doc) for doc in docs], outputs)]


def finlora_list(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[list[Pair]]]:
    """Filter: FinLoRA's judgement of rows that hold several tags, a list of pairs each."""
    targets = [[tag.strip() for tag in key(doc).split(",")] for doc in docs]
    outputs = []
    for resp, expected in zip(resps, targets, strict=True):
        parts = [part.strip().replace("\n", "") for part in _cut_prompt(resp[0]).split(",")]
        outputs.append((parts + [""] * len(expected))[: len(expected)])
    pairs = iter(judge_by_finlora([*chain(*targets)], [*chain(*outputs)]))
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
    def score_row(doc: dict[str, Any], results: list[Any]) -> Scores:
        answer = results[0]
        if isinstance(answer, tuple):  # judged by the filter `finlora`
            return {"accuracy": float(answer[0] == answer[1]), "f1_weighted": [answer]}
        if isinstance(answer, list):
            return {"accuracy": answer, "f1_weighted": answer}
        return rule(key(doc), answer.strip(), str(doc["messages"][-2]["content"]))

    return score_row


def labelled(expected: str, answered: str) -> Scores:
    pair = (expected, answered)
    return {"accuracy": float(expected == answered), "f1_weighted": [pair], "f1_macro": [pair]}


def _score_text(expected: str, answer: str, right: bool) -> Scores:
    """Scores of an answer that counts if it is `right`, or the expected text to the letter."""
    wanted, answered = normal(expected), normal(answer)
    pair = (wanted, wanted if right else answered)
    return {
        "accuracy": float(pair[0] == pair[1]),
        "exact_match": float(wanted == answered),
        "f1_weighted": [pair],
    }


@process_results
def label(expected: str, answer: str, prompt: str) -> Scores:
    """A label that the filter has read, ignoring case and spaces."""
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
    """Several tags in one answer, by position: missing ones are wrong, surplus ones ignored."""
    wanted, answered = _split_tags(expected), _split_tags(answer)
    pairs = list(zip(wanted, answered + [NONE] * len(wanted), strict=False))
    all_right = float(all(one == other for one, other in pairs))
    return {"accuracy": pairs, "f1_weighted": pairs, "f1_macro": pairs, "exact_match": all_right}


def _split_tags(text: str) -> list[str]:
    """The tags between commas or line ends, without numbering, quotes and the prefix `us-gaap:`."""
    parts = re.split(r"\s*(?:,\s*\n|[,;\n])\s*", text.strip())
    parts = [re.sub(r"^(?:\d+[.):]\s*|[-*]\s+)", "", part.strip(" \t.'\"`[]")) for part in parts]
    return [re.sub(r"^us-gaap[:_]", "", part.lower()) for part in parts]


@process_results
def tag(expected: str, answer: str, prompt: str) -> Scores:
    """One XBRL tag: the first `prefix:Name` of the answer, or a name without a prefix."""
    match = re.search(r"[A-Za-z][\w-]*:[A-Za-z]\w*", answer)
    answered = (match.group() if match else answer.strip(" .'\"`")).lower()
    wanted = expected.lower()
    is_right = answered in (wanted, wanted.partition(":")[2])
    return labelled(wanted, wanted if is_right else answered)


@process_results
def number(expected: str, answer: str, prompt: str) -> Scores:
    """A number, within the tolerance of `close`."""
    return _score_text(expected, answer, close(expected, answer, prompt))


@process_results
def formula(expected: str, answer: str, prompt: str) -> Scores:
    """A formula, up to the order of the operands of + and *, brackets, spaces and case."""
    wanted = _parse_formula(expected)
    return _score_text(expected, answer, wanted is not None and wanted == _parse_formula(answer))


@process_results
def calculation(expected: str, answer: str, prompt: str) -> Scores:
    """A formula of numbers; numeric_accuracy compares its value, written out or worked out."""
    scores = formula.__wrapped__(expected, answer, prompt)  # type: ignore[attr-defined]
    wanted, answered = evaluate_formula(expected), evaluate_formula(answer)
    if wanted is None or answered is None:
        right = close(expected, answer, prompt)
    else:
        right = abs(answered - wanted) <= RELATIVE * abs(wanted)
    return dict(scores) | {"numeric_accuracy": float(scores["accuracy"] == 1 or right)}


@process_results
def worked(expected: str, answer: str, prompt: str) -> Scores:
    """A calculation of numbers, `(7 - 5) / 5 = 0.4`: its value counts, and the stated one apart.

    Only the first line is read. A number alone is its own value.
    """
    line = answer.partition("\n")[0].strip()
    calculation, equals, _ = line.rpartition("=")
    value = evaluate_formula(PERCENT.sub(r"(\1 / 100)", calculation if equals else line))
    is_plain = is_number(line)
    stated = bool(equals or is_plain) and close(expected, line, prompt)
    right = value is not None and close(expected, f"{value:.12f}", prompt)
    return {"accuracy": float(stated if is_plain else right), "numeric_accuracy": float(stated)}


@process_results
def text(expected: str, answer: str, prompt: str) -> Scores:
    """Free text, and numeric_accuracy where the key is only a number: token F1 sees neither its
    sign nor its decimal point.
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
# "A bond", "B shares", "Series B", "A-rated", "D&O", "e.g." and "D. E. Shaw" name no choice: the
# text before and after a letter decides.
# A letter that stands alone: (B), [B], "B" surely, B maybe.
_ALONE = re.compile(
    r"[(\[{<\"'](?P<sure>[A-Za-z])[)\]}>\"']|(?<![\w&'.+-])(?P<bare>[A-Za-z])(?![\w&'+%])"
)
# What may stand before a bare one: a beginning, "answer: ", "so ", "choose ", "A and ".
_BEFORE = re.compile(
    r"(?:\A|[^\w\s]|\n|\b(?:answer|ans|option|choice|letter|alternative|statement|selection|is|be|was|it's"
    r"|that's|that|think|believe|say|guess|choose|choosing|pick|select|selected|correct|with|for|so"
    r"|therefore|thus|hence|only|both|either|neither|between|and|or|nor|than|not|to|maybe|perhaps"
    r"|possibly|probably|likely|definitely|clearly|certainly|obviously|indeed|sure|ok|yes|because|why|but|if"
    r"|whether|also|versus|vs))\s*\Z",
    re.IGNORECASE,
)
# What may stand behind it: an end, "B.", "B) text", "B because …", "B - text", "B or C".
_AFTER = re.compile(
    r"\s*(?:\Z|[\n;!?)\]}/&<—。✓✔✅]|,(?!\d)|[.:](?!\w|\s?[A-Z]\.))|\s+[-–(]"
    r"|\s+(?:because|since|as|due|given|which|based|not|rather|instead|but|with|and|or|nor|versus|vs|to|is"
    r"|isn't|was|are|aren't|would|must|should|seems|appears|could|might|may|has|it is)\b"
)
# Several marked letters decide nothing: ⟦A⟧ and ⟦B⟧; ⟦A⟧, ⟦B⟧, ⟦C⟧; ⟦A⟧ or maybe ⟦B⟧.
_LIST = re.compile(
    r"⟦\w*⟧(?:\s*(?:,?\s*(?:and|or(?:\s+not)?|nor|to|vs\.?|versus|&|/)|,(?!\s*⟦\w*⟧\s+(?:is|was|would|must|should"
    r"|seems|appears)\b))\s*(?:(?:maybe|perhaps|possibly|even|also"
    r"|option|choice|answer)\s+)?⟦\w*⟧)+",
    re.IGNORECASE,
)
# "'s", "is", "would be"; what may follow it, "is most likely the"; and what it is said of.
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
# Cues before a letter.
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
# Before the letter, in the same clause, this denies it.
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|no|doubt|unlikely|unclear|unsure|whether|if|unless|incorrect"
    r"|wrong|except|rather\s+than|instead\s+of)\b|n't\b)[^.;,\n]*\Z",
    re.IGNORECASE,
)
# Before the text of a choice, this denies it: "not the bond", "rather than the bond".
_NEGATED = re.compile(r"(?:\b(?:not|nor|neither|than|instead of|except)\b|n't)[^.;,]*\Z")
# Behind a small letter, which may be the article: "b.", "b) text", or its line ends.
_CLOSED = re.compile(r"[.):,]?\s*(?:\Z|\n)|[.):]\s")
# An answer that changes its mind: the last letter that it states counts.
_REVISED = re.compile(r"\b(?:wait|actually|correction|second thought|sorry)\b", re.IGNORECASE)
# What an answer marks as final.
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
    """The letter that an answer decides on, else that of the only choice that it quotes, else NONE.

    What the answer marks as final counts first (`\\boxed{B}`, `<answer>`, `Final answer: B`), then
    what it states (`B is correct`, `I would choose B`), then a letter that it begins with. An
    answer that names several letters without deciding has none.
    """
    text = unicodedata.normalize("NFKC", answer).translate(_TYPOGRAPHY)
    # A small model may go on with a question of its own.
    text = re.split(r"\n\s*(?:Question|Q\d*)\s*[:.]", text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?m)^A:\s*(?=\W*[A-E]\b)", "Answer: ", text)
    text = re.sub(r"\\[()\[\]]|<\|[^|>]*\|>", "", text)
    text = re.sub(r"<(b|strong|p)>(.*?)</\1>", r"\2", text, flags=re.IGNORECASE)
    marked = [part for pattern in _MARKED for part in reversed(pattern.findall(text))]
    decisions = (_find_decision(part.strip(), choices, allowed) for part in [*marked, text])
    return next(filter(None, decisions), "") or _find_quoted_choice(text, choices)


def _find_decision(text: str, choices: dict[str, str], allowed: Iterable[str]) -> str:
    """The letter that a text states or begins with; empty where it decides on none."""
    listed: set[str] = set()  # letters that their choice's text follows

    def mark(mention: re.Match[str]) -> str:
        """⟦B⟧ in the place of a B that is meant as a letter."""
        name, bare = str(mention["sure"] or mention["bare"]), mention["bare"] or ""
        start, end = mention.span()
        choice = normal(choices.get(name.upper(), ""))
        after = normal(text[end : end + 2 * len(choice) + 9]).lstrip(".:) -")
        if choice and after.startswith(choice):
            listed.add(name)
        is_letter = mention["sure"] or (
            _BEFORE.search(text, max(0, start - 30), start)
            and (_AFTER.match(text, end) or name in listed)
        )
        # A small letter, the article above all, needs punctuation or a word that announces it.
        if is_letter and bare.islower():
            is_letter = _CLOSED.match(text, end) or (
                bare != "a"
                and (
                    _ANNOUNCED.search(text, max(0, start - 30), start)
                    or text.startswith((" is correct", " is right", " is the"), end)
                )
            )
        return f"⟦{name.upper()}⟧" if is_letter and name.upper() in allowed else mention[0]

    text = _LIST.sub("⟦⟧", _ALONE.sub(mark, text))
    stated = [
        (match.start(1), match[1])
        for pattern in _ASSERTED
        for match in pattern.finditer(text)
        if not _DENIED.search(text, max(0, match.start(1) - 80), match.start(1))
    ]
    if stated:
        place, last = max(stated)
        is_settled = {name for _, name in stated} == {last} or _REVISED.search(text[:place])
        return last if is_settled else ""
    # An answer that repeats the choices decides on none.
    lines = re.findall(r"^\W*⟦(\w)⟧[.):]", text, re.MULTILINE)
    if len(listed) > 1 or lines[:2] == ["A", "B"]:
        return ""
    alone = re.match(rf"\W*(?:\d+[.)]\s+)?⟦(\w+)⟧(?!\?){_DOUBT}", text)
    alone = alone or re.search(r"[.!\n]\s*⟦(\w+)⟧[.!]?\s*\Z", text)
    return alone[1] if alone else ""


def _find_quoted_choice(text: str, choices: dict[str, str]) -> str:
    """The letter of the only choice that an answer quotes, outside of another's text; else NONE."""
    spans = {}
    body = normal(text)
    for name, choice in choices.items():
        match = re.search(rf"(?<![\w.,-]){re.escape(normal(choice))}(?![\w-]|[.,]\d)", body)
        if match and not _NEGATED.search(body[: match.start()]):
            spans[name] = match.span()
    outer = [
        name
        for name, (start, end) in spans.items()
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans.values())
    ]
    return outer[0] if len(outer) == 1 else NONE


# ---- numbers

RELATIVE = 0.001  # of the expected number
SCALES = dict.fromkeys(("hundred",), 2) | dict.fromkeys(("thousand", "thousands"), 3)
SCALES |= dict.fromkeys(("million", "millions", "mil", "mill", "mln", "mio", "mn"), 6)
SCALES |= dict.fromkeys(("billion", "billions", "bil", "bill", "bln", "bn", "mrd"), 9)
SCALES |= dict.fromkeys(("trillion", "trillions", "tril", "trn", "tn"), 12)
# A letter is a scale after an amount of money, or directly after the digits: not in "250 m above".
SHORT = {"k": 3, "m": 6, "mm": 6, "b": 9, "t": 12}
PER_ONE = {"": 1.0, "%": 100.0, "bp": 10_000.0}
# Factors of a number with a unit, where the other number has none.
READINGS = {"": [1.0], "%": [1.0, 0.01], "bp": [1.0, 0.01, 0.0001]}

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
# A number after one of these is part of a name, and before one of those a span of time.
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
    half: float  # half a unit of the last decimal
    unit: str  # of PER_ONE
    scale: int  # the power of ten that a word or letter stands for


def read_number(text: str) -> Number | None:
    """The number that a text answers with; None where it has none.

    The number in `\\boxed{}` counts, else the one after `answer is`, else the one after the last
    `=`. Of several, the first counts that is no date, year, span of time or name (`Note 5`).
    """
    text = _normalize_numbers(text)
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    answers = re.split(r"\banswer\b[^.\n]{0,40}?(?:\bis\b|\bbe\b|[:=])", text, flags=re.IGNORECASE)
    for part in (*reversed(boxed), *reversed(answers[1:]), text.rpartition("=")[2], text):
        for body in (_DATE.sub(" ", part), part):
            matches = list(NUMBER.finditer(body))
            answered = [match for match in matches if not _is_aside(match, body)]
            if answered or (matches and body is part):
                return _convert_number((answered or matches)[0], body)
    return None


def _normalize_numbers(text: str) -> str:
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
    """Whether a number is a year, a span of time, or part of a name."""
    if any(match[part] for part in ("currency", "late", "scale", "unit", "outer")):
        return False
    plain = match["plain"] or ""
    is_year = not match["short"] and re.fullmatch(r"(?:19|20)\d\d", plain)
    is_company = plain == "3" and match["short"] == "M" and not match["space"]
    is_name = _NAMED.search(text[: match.start()])
    return bool(is_year or is_company or is_name or _SPAN.match(text, match.end()))


def _convert_number(match: re.Match[str], text: str) -> Number:
    if match["point"]:
        digits = match["point"].replace(",", "")
    elif match["comma"]:
        digits = match["comma"].replace(".", "").replace(",", ".")
    else:
        digits = re.sub("[' ]", "", match["plain"]).replace(",", ".")
    scale = SCALES.get((match["scale"] or "").lower(), 0)
    if short := match["short"]:
        is_money = match["currency"] or match["late"] or _BEHIND.match(text, match.end("short"))
        if is_money or short in ("KMBT" if match["space"] else "kmbKMBT"):
            scale = SHORT[short.lower()]
    power = max(-400, min(400, int(match["exponent"] or 0) + scale))  # a float has 308
    value = float(f"{digits}e{power}")
    signs = (match["sign"] or "").lower() + (match["second"] or "")
    is_in_brackets = match["close"] and (match["open"] or match["inner"])
    if is_in_brackets or re.search("-|minus|negative", signs):
        value = -value
    decimals = len(digits.partition(".")[2])
    half = float(f"0.5e{power - max(decimals, 2)}") if decimals else 0.0
    unit = (match["unit"] or match["outer"] or "").lower()
    return Number(value, half, "" if not unit else "bp" if unit.startswith("b") else "%", scale)


def is_number(text: str) -> bool:
    """Whether a text is only a number."""
    return bool(NUMBER.fullmatch(_normalize_numbers(text)))


def close(expected: str, answer: str, prompt: str = "") -> bool:
    """Whether the answer's number is the expected one, within the larger of two tolerances.

    These are 0.1 % of the expected number, and half a unit of its last decimal but at most 0.005:
    FinLoRA's keys are rounded to 2 decimals. A key that is more than a number has no close answer.
    Where only one of the two has a unit (7.5 %, 75 bps), the other may be in it or not. Where the
    prompt asks for millions, 5 million may be written as 5.
    """
    wanted, answered = read_number(expected), read_number(answer)
    if not is_number(expected) or wanted is None or answered is None:
        return False
    scales = [1.0]
    requested = re.search(
        r"\bin\s+(?:\w*[$€£]\s?|\w+\s+)?(thousands|millions|billions)\b", prompt, re.IGNORECASE
    )
    if requested and bool(wanted.scale) != bool(answered.scale):
        factor = 10.0 ** SCALES[requested[1].lower()]
        scales.append(factor if wanted.scale else 1 / factor)
    if wanted.unit and answered.unit:
        units = [(1 / PER_ONE[wanted.unit], 1 / PER_ONE[answered.unit])]
    else:
        units = list(product(READINGS[wanted.unit], READINGS[answered.unit]))
    return any(
        abs(answered.value * there * scale - wanted.value * here)
        <= max(RELATIVE * abs(wanted.value * here), wanted.half * here) * (1 + 1e-9)
        for scale in scales
        for here, there in units
    )


# ---- formulas

Node = tuple[Any, ...]
# A function, an operand (a number or a name such as us-gaap:Revenues), or an operator.
TOKEN = re.compile(
    r"\s*(?:(?P<function>(?:ln|exp|sqrt)(?=\s*\())"
    r"|(?P<operand>\d+(?:\.\d+)?|\.\d+|[a-z][\w-]*:[a-z]\w*|[a-z_]\w*)"
    r"|(?P<sign>\*\*|[-+*/^()]))"
)
SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
SAME |= str.maketrans({"[": "(", "]": ")", "{": "(", "}": ")", "$": "", "`": ""})
LONGEST = 2000  # characters; longer answers are no formula
DEEPEST = 100  # formulas within formulas
LARGEST = 1e100  # of the values on the way
FUNCTIONS = {"ln": math.log, "exp": math.exp, "sqrt": math.sqrt}
PERCENT = re.compile(r"((?:\d+\.)?\d+)\s*%")


def _parse_formula(text: str) -> Node | None:
    """A formula as nested tuples in which + and * have no order; None where it cannot be read.

    The text before the last `=` is left out. Python's parser reads a formula whose operands are
    replaced by names, so an answer is never evaluated as code.
    """
    body = text.rpartition("=")[2].strip().rstrip(".").lower().translate(SAME)
    body = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", body)
    operands: list[str] = []
    source, place = [], 0
    while place < len(body):
        match = TOKEN.match(body, place)
        if not match or len(body) > LONGEST:
            return None
        if match["operand"]:
            source.append(f"x{len(operands)}")
            operands.append(match["operand"])
        else:
            source.append(match["function"] or match["sign"].replace("^", "**"))
        place = match.end()
    try:
        return _sort_operands(ast.parse(" ".join(source), mode="eval").body, operands)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _sort_operands(node: ast.expr, operands: list[str], depth: int = 0) -> Node:
    """A formula as ("sum" or "product", ((sign, node), …)), ("power", base, exponent), ("function",
    name, node), ("number", value) or ("name", text).

    Raises ValueError for any other Python expression, and for one that is too deep.
    """
    if depth > DEEPEST:
        raise ValueError("too deep")
    sort = partial(_sort_operands, operands=operands, depth=depth + 1)
    match node:
        case ast.Name(id=name):
            operand = operands[int(name[1:])]
            is_number = operand[0] in "0123456789."
            return ("number", float(operand)) if is_number else ("name", operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return sort(inner)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return ("sum", ((-1, sort(inner)),))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in FUNCTIONS:
            return ("function", name, sort(inner))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return ("power", sort(left), sort(right))
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            kind = "sum" if isinstance(node.op, ast.Add | ast.Sub) else "product"
            sign = 1 if isinstance(node.op, ast.Add | ast.Mult) else -1
            terms: list[tuple[int, Node]] = []
            for factor, side in ((1, left), (sign, right)):
                part = sort(side)
                inner_terms = part[1] if part[0] == kind else [(1, part)]
                terms += [(factor * inner_sign, term) for inner_sign, term in inner_terms]
            return (kind, tuple(sorted(terms, key=repr)))
    raise ValueError("not a formula")


def evaluate_formula(text: str) -> float | None:
    """The value of a formula of numbers; None where it holds names or has no real value."""
    node = _parse_formula(text)
    try:
        return None if node is None else _evaluate_node(node)
    except (ArithmeticError, ValueError):
        return None


def _evaluate_node(node: Node) -> float:
    """The value of a node without names; ArithmeticError or ValueError where it has none."""
    match node:
        case ("number", number):
            value = float(number)
        case ("sum", terms):
            value = float(sum(sign * _evaluate_node(term) for sign, term in terms))
        case ("product", factors):
            value = math.prod(_evaluate_node(factor) ** power for power, factor in factors)
        case ("power", base, exponent):
            value = _evaluate_node(base) ** _evaluate_node(exponent)
        case ("function", name, inner):
            value = FUNCTIONS[name](_evaluate_node(inner))
        case _:
            raise ValueError("not a number")
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError("no real number, or too large")
    return value


# ---- text


@cache
def _load_rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def rouge_l(expected: str, answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004) by the package rouge_score, without stemming."""
    return float(_load_rouge().score(expected, answer)["rougeL"].fmeasure)


def token_f1(expected: str, answer: str) -> float:
    """F1 of the words that two texts share, as in SQuAD (Rajpurkar et al. 2016).

    Lower case, without punctuation and the articles a, an, the. Two empty texts are equal.
    """

    def words(text: str) -> Counter[str]:
        text = re.sub(r"[^\w\s]", "", text.lower())
        return Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())

    wanted, answered = words(expected), words(answer)
    total = wanted.total() + answered.total()
    return 2 * (wanted & answered).total() / total if total else 1.0


BERT = "ProsusAI/finbert"  # FinLoRA's; bert-score takes its layer 10


class Unavailable(Exception):
    """A metric cannot be computed here; says why, and what to do."""


def bertscore(values: list[list[Pair]]) -> list[float]:
    """BERTScore F1 (Zhang et al. 2020) of every row, by the package bert-score with FinBERT.

    Like FinLoRA, without inverse document frequencies and rescaling; an empty answer has 0. Raises
    Unavailable where the model is not in the local cache: no other replaces it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(BERT, local_files_only=True)
    except LocalEntryNotFoundError:
        raise Unavailable(
            f"left out: {BERT} is not in the local cache; `hf download {BERT}` brings it"
        ) from None
    scores = [0.0] * len(values)
    pairs = {row: pair for row, (pair,) in enumerate(values) if pair[1].strip()}
    if pairs:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers

        scorer = BERTScorer(folder, num_layers=model2layers[BERT], use_fast_tokenizer=True)
        expected, answered = zip(*pairs.values(), strict=True)
        _, _, f1 = scorer.score(list(answered), list(expected))
        for row, value in zip(pairs, f1.tolist(), strict=True):
            scores[row] = value
    return scores


# Metrics that are computed for all rows together: values of all rows → a number for each.
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
    """Mean BERTScore F1; not a number, with a warning, where the model is missing."""
    try:
        scores = bertscore(values)
    except Unavailable as error:
        import logging

        logging.getLogger("lm_eval").warning("BERTScore %s", error)
        return float("nan")
    return sum(scores) / len(scores)


# ---- datasets


def last_word(dataset: Any) -> Any:
    """`process_docs`: expects the last word of each answer: `negative` for `mildly negative`."""

    def fold(row: dict[str, Any]) -> dict[str, Any]:
        question, answer = row["messages"]
        return {"messages": [question, answer | {"content": answer["content"].split()[-1]}]}

    return dataset.map(fold)
