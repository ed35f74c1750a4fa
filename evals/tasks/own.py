"""How answers to a task of the user's own are read and scored. `make new` writes which rule counts.

    label      one of the labels that the task's filter names, in any number and any script
    number     a number, within the tolerance of `utils.close`
    items      a JSON list
    fields     a JSON object, as a whole and field by field
    calls      tool calls, in whatever form the base's template gives them
    text       free text

The key itself is right in every metric. Lists, objects and calls may stand in a code fence or
among other words.
"""

import ast
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import filter_registry, register_filter

# Plain lm_eval runs this file by its path.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from evals.tasks import utils  # noqa: E402
from evals.tasks.utils import Scores, process_results  # noqa: E402

# ---- rows


def write_prompt(doc: dict[str, Any]) -> str:
    """All turns before the last one as a text; of a single user turn, its content.

    `make eval` renders the turns themselves through the base's chat template, and knows them by
    this text.
    """
    turns = doc["messages"][:-1]
    if len(turns) == 1 and turns[0]["role"] == "user" and not doc.get("tools"):
        return str(turns[0]["content"])
    parts = [f"tools: {doc['tools']}"] if doc.get("tools") else []
    for turn in turns:
        parts.append(f"{turn['role']}: {turn['content'] or ''}")
        if turn.get("tool_calls"):
            parts.append(f"calls: {json.dumps(turn['tool_calls'])}")
    return "\n\n".join(parts)


# ---- labels

# Scripts without spaces between words: there a label may stand inside a longer run of letters.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
)
# Ratings and codes, such as `BBB-`, `AA`, `Baa1`, `10-K`, `-1`: they match as they are written. BUY
# and POSITIVE are words.
CODE = re.compile(r"(?=.*[0-9+-])[A-Z0-9+./-]{1,8}|A{2,3}|B{2,3}|C{2,3}|D{2,3}|[ABC]a{1,2}[1-3]?")
LETTER = re.compile("[A-Za-z]")
EDGE = " .,;:!\"'`*()[]<>“”‘’«»。，；：！「」"


def join_spaces(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def find_label(answer: str, labels: Iterable[str]) -> str:
    """The label that an answer is, else the first that it names; `utils.NONE` without one.

    Case counts in codes, and where two labels differ in nothing else. A letter counts only where
    it stands for a choice: the C in "A hard one: C", not the A.
    """
    spelled = {join_spaces(label): label for label in labels}
    text = join_spaces(answer)
    for whole in (text, text.strip(EDGE)):
        if whole in spelled:
            return spelled[whole]
    letters = {label.upper(): own for label, own in spelled.items() if LETTER.fullmatch(label)}
    if len(letters) == len(spelled):
        named = {utils.letter(answer, {}, letters.keys())} & letters.keys()
        named = named or {label.upper() for label in compile_labels(tuple(spelled)).findall(text)}
        return letters[named.pop()] if len(named) == 1 else utils.NONE
    match = compile_labels(tuple(spelled)).search(text)
    if not match:
        return utils.NONE
    if match[0] in spelled:
        return spelled[match[0]]
    named_label = match[0].casefold()
    alike = (own for label, own in spelled.items() if label.casefold() == named_label)
    return next(alike, utils.NONE)


@cache
def compile_labels(labels: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of some labels; the longest where several begin at the same place."""
    folds_case = len({label.casefold() for label in labels}) == len(labels)
    longest_first = sorted(labels, key=len, reverse=True)
    return re.compile("|".join(build_pattern(label, folds_case) for label in longest_first))


def build_pattern(label: str, folds_case: bool) -> str:
    """A regular expression for a label that stands as a word of its own."""
    escaped = re.escape(label)
    if CODE.fullmatch(label) or LETTER.fullmatch(label):
        # "AA-rated" has the rating AA and not AA-; "A strong firm" has none.
        article = r"(?!\s+[a-z])" if LETTER.fullmatch(label) else ""
        after = r"(?!\w)" if label[-1] in "+-" else r"(?![\w+]|-(?!\w)|[.,]\d)"
        return rf"(?<![\w+-])(?<!\d[.,]){escaped}{after}{article}"
    before = r"(?<!\w)" if is_spaced(label[0]) else ""
    after = r"(?!\w)" if is_spaced(label[-1]) else ""
    # (?i:ß) does not match SS as casefold does, so only letters of one case are folded.
    flag = "(?i:" if folds_case and label.lower() == label.casefold() else "(?:"
    return f"{flag}{before}{escaped}{after})"


def is_spaced(char: str) -> bool:
    """Whether a character is part of a word that spaces or punctuation end."""
    return (char.isalnum() or char == "_") and not UNSPACED.match(char)


class FindLabel(Filter):  # type: ignore[misc]
    """The filter `own_label`: the label of each answer. `labels` are the task's."""

    def __init__(self, labels: list[str]):
        self.labels = labels

    def apply(self, resps: Iterable[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
        return [[find_label(answer, self.labels) for answer in answers] for answers in resps]


if "own_label" not in filter_registry:  # lm-eval runs this file for each function
    register_filter("own_label")(FindLabel)


@process_results
def label(expected: str, answer: str, prompt: str) -> Scores:
    """A label that the filter has found, spelled as the task spells it."""
    return utils.labelled(join_spaces(expected), join_spaces(answer))


# ---- numbers


@process_results
def number(expected: str, answer: str, prompt: str) -> Scores:
    """A number, within a tolerance; a key that is none has to be answered to the letter."""
    exact = utils.normal(expected) == utils.normal(answer)
    right = exact or utils.close(expected, answer, prompt)
    return {"accuracy": float(right), "exact_match": float(exact)}


# ---- lists, objects and calls


OPENING = re.compile(r"[\[{]")


def find_json(text: str) -> Any:
    """The first list or object in a text, as JSON or as Python writes it; None without one."""
    text = text.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    return next(read_values(text), None)


def read_values(text: str) -> Iterator[Any]:
    """The lists and objects in a text, in their order."""
    decoder, place = json.JSONDecoder(), 0
    while match := OPENING.search(text, place):
        try:
            value, place = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            place = match.start() + 1
            try:
                value = ast.literal_eval(text[match.start() :].rstrip("`\n "))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            place = len(text)
        yield value


def freeze(value: Any) -> str:
    """A text that is the same for equal JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        pairs = sorted((str(key), freeze(part)) for key, part in value.items())
        return json.dumps(pairs)
    if isinstance(value, list | tuple):
        return json.dumps([freeze(part) for part in value])
    return json.dumps(join_spaces(value) if isinstance(value, str) else value, default=str)


@process_results
def items(expected: str, answer: str, prompt: str) -> Scores:
    """A list: the same items, in the same order for `exact_match`, and how many are shared."""
    wanted, answered = find_json(expected), find_json(answer)
    if not isinstance(wanted, list):
        exact = float(join_spaces(expected) == join_spaces(answer))
        return {"accuracy": exact, "exact_match": exact, "item_f1": exact}
    answered = answered if isinstance(answered, list) else None
    wanted_items = [freeze(item) for item in wanted]
    answered_items = [freeze(item) for item in answered or ()]
    shared = (Counter(wanted_items) & Counter(answered_items)).total()
    total = len(wanted_items) + len(answered_items)
    same = answered is not None and sorted(wanted_items) == sorted(answered_items)
    return {
        "accuracy": float(same),
        "exact_match": float(answered is not None and wanted_items == answered_items),
        "item_f1": 2 * shared / total if total else float(same),
    }


@process_results
def fields(expected: str, answer: str, prompt: str) -> Scores:
    """An object: equal as a whole, and the share of its fields that are right."""
    wanted, answered = find_json(expected), find_json(answer)
    if not isinstance(wanted, dict):
        exact = float(join_spaces(expected) == join_spaces(answer))
        return {"exact_match": exact, "field_accuracy": exact}
    exact = float(isinstance(answered, dict) and freeze(wanted) == freeze(answered))
    parts = answered if isinstance(answered, dict) else {}
    right = [key in parts and freeze(parts[key]) == freeze(value) for key, value in wanted.items()]
    return {"exact_match": exact, "field_accuracy": sum(right) / len(right) if right else exact}


@process_results
def calls(expected: str, answer: str, prompt: str) -> Scores:
    """Tool calls: their names and arguments. A key that is no call is text."""
    wanted, answered = read_calls(expected), read_calls(answer)
    if not wanted:
        return compare_texts(expected, answer)
    names = [name for name, _ in wanted] == [name for name, _ in answered]
    return {"exact_match": float(wanted == answered), "name_accuracy": float(names)}


def read_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of the tool calls in a text, whatever the template puts around them."""
    pairs = []
    for value in read_values(text):
        for call in value if isinstance(value, list) else [value]:
            call = call.get("function", call) if isinstance(call, dict) else {}
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                continue
            arguments = call.get("arguments", call.get("parameters"))
            arguments = find_json(arguments) if isinstance(arguments, str) else arguments
            if isinstance(arguments, dict):
                pairs.append((call["name"], freeze(arguments)))
    return pairs


# ---- free text

WORD = re.compile(rf"{UNSPACED.pattern}|[^\W_](?:(?!{UNSPACED.pattern})[^\W_])*")


def split_words(text: str) -> list[str]:
    """The words of a text in any script; a character each where a script has no spaces."""
    return WORD.findall(text.lower())


class Words:
    """The tokenizer that rouge_score takes: its own knows only English letters."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


@cache
def load_rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())


@process_results
def text(expected: str, answer: str, prompt: str) -> Scores:
    """Free text, in any script."""
    return compare_texts(expected, answer) | {"bertscore": [(expected, answer)]}


def compare_texts(expected: str, answer: str) -> Scores:
    """ROUGE-L and the F1 of shared words; equal texts have 1, also where they hold no word."""
    if join_spaces(expected) == join_spaces(answer):
        return {"rouge_l": 1.0, "token_f1": 1.0, "exact_match": 1.0}
    wanted, answered = Counter(split_words(expected)), Counter(split_words(answer))
    total = wanted.total() + answered.total()
    shared = 2 * (wanted & answered).total() / total if total else 0.0
    rouge = float(load_rouge().score(expected, answer)["rougeL"].fmeasure)
    return {"rouge_l": rouge, "token_f1": shared, "exact_match": 0.0}
