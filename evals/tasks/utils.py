"""How an answer is read and scored: the functions that the task files name.

This file stands alone, so that plain `lm_eval --include_path evals/tasks` finds all that it needs.
A row goes through a filter (the parse rule) and a `process_results` function. What that returns for
a metric is a number, or pairs (expected, answered) where a score such as F1 is made from all rows:

    number           accuracy, exact_match, numeric_accuracy, rouge_l, token_f1: their mean counts
    [pair, …]        f1_weighted, f1_macro; and accuracy, where one row holds several tags
    [pair]           bertscore, which a model computes for all rows together

`evals/stats.py` makes intervals and tests from the same values.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from itertools import chain
from typing import Any

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
    return str(doc["messages"][1]["content"]).strip()


def process_results(rule: Rule) -> Callable[[dict[str, Any], list[Any]], Scores]:
    """Makes lm-eval's function of a rule(expected, answer, prompt)."""

    @wraps(rule)
    def scores(doc: dict[str, Any], results: list[Any]) -> Scores:
        answer = results[0]
        if isinstance(answer, tuple):  # the filter `finlora` has judged it
            return {"accuracy": float(answer[0] == answer[1]), "f1_weighted": [answer]}
        if isinstance(answer, list):
            return {"accuracy": answer, "f1_weighted": answer}
        return rule(key(doc), answer.strip(), str(doc["messages"][0]["content"]))

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
    right = letter(expected, choices)
    if right == NONE:  # a key of another form is text
        return labelled(normal(expected), normal(answer))
    return labelled(right, letter(answer, choices))


def letter(answer: str, choices: dict[str, str]) -> str:
    """The letter that an answer gives or, without one, that of the choice whose text it holds.

    A letter alone, before `.`, `)` or `:`, in brackets, or after `answer is`; the `A` of
    `A company …` is none. Where the text of several choices occurs, the earliest (and of those, the
    longest) is taken.
    """
    letters = r"([A-E])(?=[.):,\]*]|\s*$|\s*\n)"
    given = r"(?:\A\W*|\(|\[|\b(?i:answer|choice|option)(?i:\s+is)?\W{0,3})"
    if found := re.search(given + letters, answer):
        return str(found.group(1))
    text = normal(answer)
    places = [
        (text.find(normal(choice)), -len(choice), name)
        for name, choice in choices.items()
        if normal(choice) in text
    ]
    return min(places)[2] if places else NONE


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
    return written(expected, answer, close(expected, answer))


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
        right = close(expected, answer)
    else:
        right = abs(given - wanted) <= RELATIVE * abs(wanted)
    return dict(scores) | {"numeric_accuracy": float(scores["accuracy"] == 1 or right)}


@process_results
def text(expected: str, answer: str, prompt: str) -> Scores:
    """Free text."""
    return {
        "bertscore": [(expected, answer)],
        "rouge_l": rouge_l(expected, answer),
        "token_f1": token_f1(expected, answer),
    }


# ---- numbers

RELATIVE = 0.001  # of the expected number
SCALES = {"thousand": 3, "k": 3, "million": 6, "mm": 6, "mn": 6, "m": 6}
SCALES |= {"billion": 9, "bn": 9, "b": 9, "trillion": 12, "tn": 12}
NUMBER = re.compile(
    r"""(?<![\w.,])
    (?P<open>\(\s*)? (?P<sign>[-−–+]?)\s*(?:(?:US|USD|EUR|GBP)?\s*[$€£¥]|USD|EUR|GBP)?\s*
    (?P<inner>\(\s*)? (?P<second>[-−]?)
    (?P<digits>\d{1,3}(?:[,'’\u00a0\u202f\ ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?:\s*(?:e|[x×*]\s*10\s*(?:\^|\*\*))\s*(?P<exponent>[-−+]?\d{1,3})(?![\d.]))?
    (?P<close>\s*\))?
    (?:\s*(?P<scale>"""
    + "|".join(sorted(SCALES, key=len, reverse=True))
    + r""")\b)?
    \s*(?P<percent>%|percent\b|per\ cent\b)?""",
    re.VERBOSE | re.IGNORECASE,
)


def numbers(text: str) -> list[tuple[float, float]]:
    """What the number in a text may mean, as (value, what half of its last place is worth).

    It is the first number after the last `=`; a text without digits has none. Understood are
    currency signs, thousands separators, minus signs, brackets around a negative number, exponents,
    thousand to trillion, and percent, which may mean 7.5 or 0.075.
    """
    found = NUMBER.search(text.rpartition("=")[2])
    if not found:
        return []
    digits = re.sub(r"[^\d.]", "", found["digits"])
    power = int((found["exponent"] or "0").replace("−", "-"))
    power += SCALES.get((found["scale"] or "").lower(), 0)
    value = float(f"{digits}e{power}")
    in_brackets = bool(found["close"] and (found["open"] or found["inner"]))
    if in_brackets or "-" in (found["sign"] + found["second"]).replace("−", "-").replace("–", "-"):
        value = -value
    places = len(digits.partition(".")[2])
    half = 0.5 * 10.0 ** (power - max(places, 2)) if places else 0.0
    meanings = [(value, half)]
    return meanings + [(value / 100, half / 100)] if found["percent"] else meanings


def close(expected: str, answer: str) -> bool:
    """Whether the answer's number is the expected one, within the larger of two tolerances.

    0.1 % of the expected number; and where that has decimals, half of a unit of the last one, 0.005
    at the most: FinLoRA's keys are rounded to 2 decimals. An expected text that is more than a
    number, such as a date, is none.
    """
    return bool(NUMBER.fullmatch(expected.strip())) and any(
        abs(given - wanted) <= max(RELATIVE * abs(wanted), half) * (1 + 1e-9)
        for wanted, half in numbers(expected)
        for given, _ in numbers(answer)
    )


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
