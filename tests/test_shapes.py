"""Rows of every usual shape become chat rows, and what cannot is refused with the column's name."""

import json
from dataclasses import dataclass, field

import pytest

from tools.common import WrongInput
from tools.data import labels, shapes, turns
from tools.data.recognize import parse_map, recognize, refuse_unwanted


@dataclass
class Listed:
    """Rows of a file, as `open_rows` gives them."""

    rows: list
    label_names: dict = field(default_factory=dict)
    name: str = "my.jsonl"
    format: str = "jsonl"
    notes: list = field(default_factory=list)

    @property
    def columns(self):
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def __iter__(self):
        return ((f"line {n}", row) for n, row in enumerate(self.rows, 1))


def say(*contents, system=None):
    """Turns with these contents, the user's and the assistant's in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def build(row, mapping=None, template=None, labels=None, **listed):
    shape = recognize(Listed([row], **listed), mapping, template, labels)
    copy = shapes.Shape(**json.loads(json.dumps(shape.to_dict())))
    assert copy.build_chat(row) == shape.build_chat(row)
    return shape.build_chat(row)["messages"]


CALL = {"function": {"name": "quote", "arguments": {"ticker": "ABC"}}}
WRITTEN_CALL = {
    "type": "function",
    "function": {"name": "quote", "arguments": '{"ticker": "ABC"}'},
}
TOOL_TURNS = [
    {"role": "user", "content": "Price?"},
    {"role": "assistant", "content": "", "tool_calls": [WRITTEN_CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]

SHAPES = {
    "FinLoRA": ({"context": "Rose?", "target": "yes"}, say("Rose?", "yes")),
    "prompt and completion": ({"prompt": "p", "completion": " c "}, say("p", "c")),
    "prompt and response": ({"prompt": "p", "response": "c"}, say("p", "c")),
    "Alpaca": (
        {"instruction": "Sum up.", "input": "Sales rose.", "output": "Up."},
        say("Sum up.\n\nSales rose.", "Up."),
    ),
    "Alpaca without input": (
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        say("Say hi.", "Hi."),
    ),
    "Alpaca with system and history": (
        {
            "instruction": "And then?",
            "input": None,
            "output": "Down.",
            "system": "Be short.",
            "history": [["Sales?", "Up."]],
        },
        say("Sales?", "Up.", "And then?", "Down.", system="Be short."),
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann met Bob.", "response": "Ann", "category": "qa"},
        say("Who?\n\nAnn met Bob.", "Ann"),
    ),
    "TRL's lists of messages": (
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
        say("p", "c"),
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "p"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ]
        },
        say("p", "c"),
    ),
    "OpenAI's messages": ({"messages": say("p", "c", "q", "d", system="s")}, None),
    "messages as JSON text": ({"messages": json.dumps(say("p", "c"))}, say("p", "c")),
    "tool calls": (
        {"messages": [TOOL_TURNS[0], {"role": "assistant", "tool_calls": [CALL]}, *TOOL_TURNS[2:]]},
        TOOL_TURNS,
    ),
    "a function call of old": (
        {
            "messages": [
                TOOL_TURNS[0],
                {"role": "assistant", "content": None, "function_call": WRITTEN_CALL["function"]},
                {"role": "function", "content": "3"},
                TOOL_TURNS[3],
            ]
        },
        TOOL_TURNS,
    ),
    "ShareGPT": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}],
        },
        say("p", "c", system="s"),
    ),
    "ShareGPT's tool calls": (
        {
            "conversations": [
                {"from": "human", "value": "Price?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3."},
            ]
        },
        TOOL_TURNS,
    ),
    "question, context and answer": (
        {"question": "How much?", "context": "Sales: 3.", "answer": 3},
        say("Sales: 3.\n\nHow much?", "3"),
    ),
    "SQuAD": (
        {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        say("c\n\nq", "a"),
    ),
    "choices with a number": (
        {"question": "Which?", "choices": ["one", "two"], "answer": 1},
        say("Which?\n\nA. one\nB. two", "B"),
    ),
    "ARC": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        say("q\n\n1. x\n2. y", "2"),
    ),
    "PIXIU": (
        {"id": 1, "query": "Tone?", "answer": "good", "choices": ["bad", "good"], "gold": 1},
        say("Tone?\n\nA. bad\nB. good", "good"),
    ),
    "PIXIU with choices in the query": (
        {"query": "bad or good?", "choices": ["bad", "good"], "gold": 0},
        say("bad or good?", "bad"),
    ),
    "an object as the answer": (
        {"prompt": "p", "completion": {"firm": "Ä", "year": 2}},
        say("p", '{"firm": "Ä", "year": 2}'),
    ),
    "a page break": (
        {"question": "Page one.\fPage two?", "answer": "a"},
        say("Page one.\nPage two?", "a"),
    ),
    "choices whose texts the passage holds": (
        {"question": "Who sued?", "context": "Apple sued Nokia.", "choices": ["Apple", "Nokia"]}
        | {"answer": 0},
        say("Apple sued Nokia.\n\nWho sued?\n\nA. Apple\nB. Nokia", "A"),
    ),
    "choices that the question lists": (
        {"question": "Who? (A) Apple (B) Nokia", "choices": ["Apple", "Nokia"], "answer": 1},
        say("Who? (A) Apple (B) Nokia", "B"),
    ),
    "choices with their letters": (
        {"question": "Who?", "choices": ["A. Apple", "B. Nokia"], "answer": "B"},
        say("Who?\n\nA. Apple\nB. Nokia", "B"),
    ),
    "choices that are numbers": (
        {"question": "1 + 1?", "choices": ["0", "2", "1"], "answer": 1},
        say("1 + 1?\n\nA. 0\nB. 2\nC. 1", "B"),
    ),
    "choices by key": (
        {"question": "q", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]}
        | {"answer": "B"},
        say("q\n\nA. x\nB. y", "B"),
    ),
    "a choice that is missing": (
        {"question": "q", "choices": ["x", None, "y"], "answer": 2},
        say("q\n\nA. x\nC. y", "C"),
    ),
    "gold as a float": (
        {"query": "q", "choices": ["x", "y", "z"], "gold": 2.0},
        say("q\n\nA. x\nB. y\nC. z", "z"),
    ),
    "gold without choices": ({"query": "q", "answer": None, "gold": "yes"}, say("q", "yes")),
    "gold as a letter": (
        {"query": "q", "choices": ["x", "y"], "gold": "B"},
        say("q\n\nA. x\nB. y", "y"),
    ),
    "a question beside FinLoRA's columns": (
        {"question": "How much?", "context": "Sales: 3.", "target": "3"},
        say("Sales: 3.\n\nHow much?", "3"),
    ),
    "TRL's turns with a passage": (
        {"prompt": say("How much?"), "completion": "3", "context": "Sales: 3."},
        say("Sales: 3.\n\nHow much?", "3"),
    ),
    "a system column beside turns": (
        {"system": "Be brief.", "messages": say("p", "c")},
        [{"role": "system", "content": "Be brief."}, *say("p", "c")],
    ),
    "a system column beside turns with their own": (
        {"system": "Be brief.", "messages": say("p", "c", system="Be exact.")},
        say("p", "c", system="Be exact."),
    ),
    "a system column beside TRL's turns with their own": (
        {"system": "Be brief.", "prompt": say("p", system="Be exact."), "completion": "c"},
        say("p", "c", system="Be exact."),
    ),
    "a system column beside an empty turn": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": ""}, *say("p", "c")]},
        [{"role": "system", "content": "Be brief."}, *say("p", "c")],
    ),
    "history of a question": (
        {"question": "q", "answer": "a", "history": "as told"},
        say("q", "a"),
    ),
    "a history without a pair": (
        {"question": "q", "answer": "a", "history": "[]"},
        say("q", "a"),
    ),
    "an empty system turn": (
        {"messages": [{"role": "system", "content": ""}, *say("p", "c")]},
        say("p", "c"),
    ),
    "an input that is nan": (
        {"instruction": "i", "input": "nan", "output": "o"},
        say("i", "o"),
    ),
    "names in capitals": ({"Question": "q", " Answer ": "a"}, say("q", "a")),
    "passages with titles": (
        {"question": "q", "answer": "a"}
        | {"context": [{"title": "T", "text": "x", "page": 3}, {"evidence_text": "y"}]},
        say("T\nx\n\ny\n\nq", "a"),
    ),
    "HotpotQA's passages": (
        {"question": "q", "answer": "a"}
        | {"context": {"title": ["T", "U"], "sentences": [["x.", "y."], ["z."]]}},
        say("T\nx. y.\n\nU\nz.\n\nq", "a"),
    ),
    "choices as objects": (
        {"question": "q", "answer": "b"}
        | {"options": [{"id": "a", "text": "x", "right": False}, {"id": "b", "text": "y"}]},
        say("q\n\na. x\nb. y", "b"),
    ),
    "choices as objects with numbers of rows": (
        {
            "question": "q",
            "answer": "B",
            "options": [{"id": 10, "text": "x"}, {"id": 11, "text": "y"}],
        },
        say("q\n\nA. x\nB. y", "B"),
    ),
    "choices as objects of an option and its text": (
        {"question": "q", "answer": "B"}
        | {"options": [{"option": "A", "choice": "x"}, {"option": "B", "choice": "y"}]},
        say("q\n\nA. x\nB. y", "B"),
    ),
    "pairs of numbers": (
        {"prompt": "p", "completion": [[0, 1], [1, 0]]},
        say("p", "[[0, 1], [1, 0]]"),
    ),
    "a user beside a text": (
        {"user": "bob", "text": "t", "label": "x", "assistant": "n"},
        say("t", "x"),
    ),
    "the number of a choice in a list": (
        {"question": "q", "choices": ["x", "y"], "answer": [1]},
        say("q\n\nA. x\nB. y", "B"),
    ),
    "choices as objects without a letter": (
        {"question": "q", "answer": "y", "options": [{"option": "x"}, {"option": "y"}]},
        say("q\n\nA. x\nB. y", "y"),
    ),
    "Gemini's thoughts and single parts": (
        {
            "contents": [
                {"role": "user", "parts": {"text": "p"}, "content": ""},
                {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "c"}]},
            ]
        },
        say("p", "c"),
    ),
    "contents that are a passage": (
        {"question": "q", "answer": "a", "contents": "Passage."},
        say("q", "a"),
    ),
    "Gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "p"}]},
                {"role": "model", "parts": [{"text": "c"}]},
            ],
        },
        say("p", "c", system="s"),
    ),
    "Anthropic's system": (
        {"system": [{"type": "text", "text": "s"}], "messages": say("p", "c")},
        say("p", "c", system="s"),
    ),
    "inputs and targets": ({"inputs": "p", "targets": "c"}, say("p", "c")),
    "a user's prompt beside its text": (
        {"inputs": "x", "user_prompt": "p", "system_prompt": "s", "answer": "c"},
        say("p", "c", system="s"),
    ),
    "user and assistant": ({"user": "p", "assistant": "c"}, say("p", "c")),
    "several passages": (
        {"question": "q", "contexts": ["x", "y"], "answer": "a"},
        say("x\n\ny\n\nq", "a"),
    ),
}


@pytest.mark.parametrize(("row", "messages"), SHAPES.values(), ids=SHAPES)
def test_a_shape_is_recognized_and_becomes_turns(row, messages):
    assert build(row) == (messages or row["messages"])


def test_a_system_column_that_gives_way_to_another_system_turn_is_counted():
    row = {"system": "Be brief.", "messages": say("p", "c", system="Be exact.")}
    same = {"system": "Be exact.", "messages": say("p", "c", system="Be exact.")}
    shape = recognize(Listed([row, same]))
    for one in (row, same, row):
        shape.build_chat(one)
    assert +shape.repairs == {'"system" left out: the turns have their own': 2}


TEXTS = [
    {"text": f"Line {n}", "label": label, "id": n}
    for n, label in enumerate(["up", "down", "Up"] * 3 + ["up"])
]


def test_text_and_label_list_the_labels_in_the_prompt_and_name_the_column_that_is_not_used():
    shape = recognize(Listed(TEXTS))
    assert shape.build_chat(TEXTS[0])["messages"] == say(
        "Line 0\n\nAnswer with one of: down, up.", "up"
    )
    assert shape.unused == ["id"]
    assert "text and label" in shape.describe()


@pytest.mark.parametrize(
    ("labels", "label_names", "value", "answer"),
    [
        (["bad", "good"], {}, 1, "good"),
        (["bad", "good"], {}, "1", "good"),
        (["bad", "good"], {}, "GOOD", "good"),
        (["-1=bad", "1=good"], {}, -1, "bad"),
        (None, {"label": ["bad", "good"]}, 0, "bad"),
        (["bad", "good"], {}, [0, 1], '["bad", "good"]'),
    ],
)
def test_integer_labels_get_their_names(labels, label_names, value, answer):
    rows = Listed([{"sentence": "s", "label": value}], label_names)
    shape = recognize(rows, labels=labels)
    assert shape.build_chat(rows.rows[0])["messages"][-1]["content"] == answer


def test_columns_named_by_hand_and_a_template_word_the_prompt():
    row = {"q": "How much?", "p": "Sales: 3.", "gold": "3", "firm": "ABC"}
    mapping = parse_map("prompt=q, context=p, answer=gold")
    assert build(row, mapping) == say("Sales: 3.\n\nHow much?", "3")
    template = "{firm}:\\n{context}\\n{{x}} {prompt}"
    assert build(row, mapping, template) == say("ABC:\nSales: 3.\n{x} How much?", "3")
    shape = recognize(Listed([row]), mapping, "{prompt}")
    assert shape.unused == ["p", "firm"]


def test_a_prompt_is_made_without_an_answer_as_with_one():
    for name, (row, _) in SHAPES.items():
        shape = recognize(Listed([row]))
        messages = shape.build_chat(row)["messages"]
        if "completion" not in row or isinstance(row["completion"], str):
            assert shape.build_prompt(row)["messages"] == messages[:-1], name
    shape = recognize(Listed(TEXTS))
    bare = {"text": "Line 0"}
    assert shape.build_prompt(bare)["messages"] == shape.build_chat(TEXTS[0])["messages"][:-1]
    assert shape.list_missing(Listed([bare])) == []
    assert shape.list_missing(Listed([{"id": 1}])) == ["text"]


def test_rows_without_answers_are_prompts():
    shape = recognize(Listed([{"headline": "h", "date": "d"}]))
    assert not shape.has_answer and shape.unused == ["date"]
    assert shape.build_prompt({"headline": "h"}) == {"messages": say("h")}


def test_tools_become_a_text_of_openais_list():
    tool = {"name": "quote", "parameters": {"type": "object", "properties": {}}}
    row = {"messages": TOOL_TURNS, "functions": [tool]}
    chat = recognize(Listed([row])).build_chat(row)
    assert json.loads(chat["tools"]) == [{"type": "function", "function": tool}]


def test_a_weight_of_0_is_not_trained_on():
    messages = say("p", "c", "q", "d")
    messages[1]["weight"] = 0
    assert [turn.get("train") for turn in build({"messages": messages})] == [
        None,
        False,
        None,
        None,
    ]


def test_keys_of_turns_that_are_not_used_are_named():
    messages = say("p", "c")
    messages[1]["reasoning_content"] = "hm"
    assert recognize(Listed([{"messages": messages}])).unused == ["messages[].reasoning_content"]


def test_answers_count_choices_from_1_where_0_never_occurs():
    rows = [
        {"question": f"q {n}", "choices": ["x", "y", "z"], "answer": n % 3 + 1} for n in range(12)
    ]
    shape = recognize(Listed(rows))
    assert shape.build_chat(rows[0])["messages"][-1]["content"] == "A"
    assert "count the choices from 1" in shape.describe()
    assert shapes.Shape(**shape.to_dict()).counted_from == "1"
    listed = Listed([row | {"answer": row["answer"] % 3} for row in rows])
    assert recognize(listed).counted_from == "0"
    listed = Listed([row | {"answer": 1} for row in rows])  # from 0 or from 1: nobody can tell
    assert recognize(listed).counted_from == "0"
    assert listed.notes == ['"answer" counts the choices from 0, and 0 never occurs in it']


def test_answers_that_are_choices_of_numbers_stay_numbers():
    for choices in (["2", "4", "6", "8"], [2, 4, 6, 8]):
        rows = [{"question": "q", "choices": choices, "answer": n} for n in (2, 4, 6, 8)]
        shape = recognize(Listed(rows))
        answers = [shape.build_chat(row)["messages"][-1]["content"] for row in rows]
        assert answers == ["2", "4", "6", "8"] and not shape.counted_from


def test_a_number_that_names_no_choice_is_refused():
    rows = [{"query": "q", "choices": ["x", None, "z"], "gold": n} for n in (0, 1, 5, "E", [0])]
    shape = recognize(Listed(rows))
    assert shape.build_chat(rows[0])["messages"][-1]["content"] == "x"
    for row in rows[1:]:
        with pytest.raises(ValueError, match='"gold"'):
            shape.build_chat(row)


def test_labels_that_are_yes_or_no_are_listed_as_they_are_answered():
    rows = Listed([{"text": f"t {n}", "label": n % 2 == 0} for n in range(20)])
    shape = recognize(rows)
    assert shape.options == ["false", "true"]
    assert shape.build_chat(rows.rows[0])["messages"][-1]["content"] == "true"
    for names, answer in ((["no", "yes"], "yes"), (["true", "false"], "true")):
        named = recognize(rows, labels=names)
        assert named.build_chat(rows.rows[0])["messages"][-1]["content"] == answer


def test_names_of_labels_that_count_from_1_are_asked_for_with_their_numbers():
    for kind in (float, int):
        rows = Listed([{"text": f"t {n}", "label": kind(n % 3 + 1)} for n in range(20)])
        with pytest.raises(WrongInput, match='write LABELS="1=bad,2=so,3=good"'):
            recognize(rows, labels=["bad", "so", "good"])
    shape = recognize(rows, labels=["1=bad", "2=so", "3=good"])
    assert shape.build_chat(rows.rows[0])["messages"][-1]["content"] == "bad"


CONTROL = "<|im_end|>\n<|im_start|>system"

REFUSED = {
    "a control token in a call": (
        {
            "messages": [
                say("p")[0],
                {"role": "assistant", "content": ""}
                | {"tool_calls": [{"function": {"name": "f", "arguments": {"q": CONTROL}}}]},
            ]
        },
        '"<|im_end|>" is a control token',
    ),
    "a control token in a tool": (
        {"messages": say("p", "c"), "tools": [{"name": "f", "description": CONTROL}]},
        '"<|im_end|>" is a control token',
    ),
    "half a weight": (
        {"messages": [say("p")[0], {"role": "assistant", "content": "c", "weight": 0.5}]},
        "the weight 0.5; it must be 0 or 1",
    ),
    "an empty answer": ({"question": "q", "answer": " "}, '"answer" is empty'),
    "null": ({"question": "q", "answer": None}, '"answer" is null'),
    "nan": ({"question": "q", "answer": "nan"}, '"answer" is "nan", which stands for a missing'),
    "NaN": ({"text": "q", "label": float("nan")}, '"label" is null'),
    "an empty prompt": ({"instruction": "", "output": "a"}, '"instruction" is empty'),
    "a control character": ({"question": "a\x00b", "answer": "a"}, "control character '\\x00'"),
    "a lone surrogate": ({"question": "a\ud800", "answer": "a"}, "lone surrogate"),
    "no answer at the end": ({"messages": say("p", "c", "q")}, "ends with the user's turn"),
    "two users": ({"messages": say("p")[:1] * 2}, "two turns of the user in a row"),
    "an assistant first": ({"messages": say("p", "c")[1:]}, "a user's turn must come first"),
    "a late system turn": (
        {"messages": [*say("p"), {"role": "system", "content": "s"}]},
        "a system turn must be the first",
    ),
    "an unknown role": ({"messages": [{"role": "critic", "content": "x"}]}, "the role 'critic'"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of type image_url; only text is trained",
    ),
    "an empty turn": (
        {"conversations": [{"from": "human", "value": ""}]},
        '"conversations, turn 1"',
    ),
    "no list": ({"messages": "hello"}, "not a JSON list of turns"),
    "a result without a call": (
        {"messages": [*say("p", "c"), {"role": "tool", "content": "3"}]},
        "follows no call",
    ),
    "a call in a text": (
        {"messages": [*say("p", "<tool_call>{}</tool_call>"), {"role": "tool", "content": "3"}]},
        "follows no call; a call belongs in tool_calls",
    ),
    "gold and answer that differ": (
        {"query": "q", "answer": "bad", "choices": ["bad", "good"], "gold": 1},
        '"answer" is "bad", "gold" is "good"',
    ),
    "an empty choice": (
        {"question": "q", "choices": ["x", ""], "answer": "B"},
        '"answer" is "B", none of its choices',
    ),
    "a choice without a value": (
        {"question": "q", "choices": ["x", "NaN"], "answer": 1},
        '"answer" is 1, and there are 2 choices',
    ),
    "choices without a text": (
        {"question": "q", "choices": [{"right": True}, {"right": False}], "answer": 0},
        '"choices" holds objects without a text',
    ),
    "places of characters": (
        {"text": "Acme rose", "label": [[0, 4, "ORG"]]},
        '"label" marks a text by the places of its characters ([0, 4,',
    ),
    "another text behind a letter": (
        {"question": "q", "choices": ["x", "y"], "answer": "A) y"},
        "none of its choices",
    ),
    "a choice that is not there": (
        {"question": "q", "choices": ["x", "y"], "answer": "z"},
        "none of its choices",
    ),
    "a prompt of pandas": ({"text": "nan", "label": "up"}, '"text" is "nan", which stands for'),
    "a cell's fault": ({"question": "#REF!", "answer": "a"}, '"question" is "#REF!", which stands'),
    "a question that is missing": (
        {"messages": say("null", "c")},
        '"messages", turn 1 is "null", which stands for a missing value',
    ),
    "a part without a text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "content": "x"}]}]},
        "has a part without a text",
    ),
    "a list of texts": (
        {"messages": [{"role": "user", "content": ["Sales rose.", "Why?"]}]},
        "holds a list of 2 texts; join them",
    ),
    "a German sheet": ({"question": "#WERT!", "answer": "a"}, '"#WERT!", which stands for'),
    "a time that is missing": ({"question": "q", "answer": "NaT"}, '"NaT", which stands for'),
    "a letter without choices": (
        {"question": "q", "choices": None, "answer": "A"},
        '"answer" is "A", and the row has no choices',
    ),
    "an object of pandas": (
        {"question": "q", "answer": "{'text': array(['x']), 'answer_start': array([3])}"},
        '"answer" holds an object as text',
    ),
    "bytes": ({"question": b"q", "answer": "a"}, '"question" holds bytes'),
    "all weights 0": (
        {"messages": [say("p")[0], {"role": "assistant", "content": "c", "weight": 0}]},
        "no assistant turn to train on",
    ),
}


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_row_is_refused_with_the_files_own_column(row, reason):
    shape = recognize(Listed([row]))
    with pytest.raises(ValueError) as error:
        shape.build_chat(row)
    assert reason in str(error.value) and "\n" not in str(error.value)


UNKNOWN = {
    "no prompt": ({"a": 1, "b": 2}, {}, "no prompt and answer among its columns a, b; MAP="),
    "preferences": ({"chosen": "x", "rejected": "y"}, {}, "rows of preferences"),
    "a number that is a choice and may count another": (
        {"question": "q", "choices": [1, 2, 3], "answer": 2},
        {},
        "numbers that are choices and may also count them",
    ),
    "an answer in the prompt": (
        {"text": "x", "label": "y"},
        {"template": "{text}: {label}"},
        'TEMPLATE: "{label}" is the answer',
    ),
    "a column that is not there": (
        {"q": "x", "a": "y"},
        {"mapping": {"prompt": "Q", "answer": "a"}},
        'MAP: prompt names the column "Q", which does not exist',
    ),
    "a template's column": (
        {"text": "x", "label": "y"},
        {"template": "{txt}"},
        'TEMPLATE: "{txt}" is no column; did you mean text',
    ),
    "a template without columns": (
        {"text": "x", "label": "y"},
        {"template": "Hello"},
        "name a column in braces",
    ),
    "a brace of JSON": (
        {"text": "x", "label": "y"},
        {"template": '{"sentiment": "x"} {text}'},
        "a brace of the text is doubled",
    ),
    "a format": ({"text": "x", "label": "y"}, {"template": "{text:>9}"}, "opens no name of a"),
    "an open brace": ({"text": "x", "label": "y"}, {"template": "{text"}, "a brace of the text"),
    "a template of turns": (
        {"messages": []},
        {"template": "{x}"},
        "does not apply to rows that hold turns",
    ),
    "names before numbers": (
        {"text": "x", "label": 0},
        {"labels": ["bad=0", "good=1"]},
        'LABELS=: "bad=0" is no number=name',
    ),
    "numbers with a colon": (
        {"text": "x", "label": 0},
        {"labels": ["0:bad", "1:good"]},
        'LABELS=: "0:bad" is no number=name',
    ),
    "numbers for some names": (
        {"text": "x", "label": 0},
        {"labels": ["0=bad", "good"]},
        'LABELS=: "good" is no number=name',
    ),
    "two labels of one name": (
        {"text": "x", "label": 0},
        {"labels": ["a", "a"]},
        "each label needs a name of its own",
    ),
}


@pytest.mark.parametrize(("row", "options", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_rows_of_no_shape_are_refused_in_one_line(row, options, reason):
    with pytest.raises(WrongInput) as error:
        recognize(Listed([row]), **options)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("question", "write part=column"),
        ("promt=q,answer=a", '"promt" is not a part of a row; did you mean prompt'),
        ("prompt=q,prompt=r", '"prompt" is named twice'),
        ("answer=a", "the column of the prompt is missing"),
        ("prompt=q,answer=q", 'the column "q" is named for two parts'),
    ],
)
def test_a_wrong_map_is_refused(text, reason):
    with pytest.raises(WrongInput, match=reason):
        parse_map(text)


def test_spellings_are_folded_into_the_most_frequent_but_for_grades():
    from collections import Counter

    counts = Counter({"Pos": 3, "pos": 5, "POS\u200b": 1, "Aa": 2, "AA": 4, "neg": 2})
    counts |= {"Bad": 1, "BAD": 2, "arre\u0302t": 1, "arr\u00eat": 2}
    counts |= {"1": 3, "1.0": 2, "0.0": 4, "0": 1, "1.5": 2, "10": 1}
    folded = {"1.0": "1", "0": "0.0"}
    folded |= {"Pos": "pos", "POS\u200b": "pos", "Bad": "BAD", "arre\u0302t": "arr\u00eat"}
    assert turns.fold_spellings(counts) == folded


@pytest.mark.parametrize(
    "names",
    [["A)", "B)", "C)"], ["Option A", "Option B"], ["choice0", "choice1"], ["ans1", "ans2"]]
    + [["A", "B", "C"], ["option_a", "option_b"], ["opa", "opb", "opc"], ["Choice1", "Choice2"]],
)
def test_choices_may_have_a_column_each(names):
    choices = dict(zip(names, ["up", "down", "flat"], strict=False))
    spellings = ("B", "b", "(B)", "[B]", "B) down", "B - Down.", "b.", "Option B", names[1])
    for answer in (*spellings, 1, "down"):
        rows = [{"question": f"q {n}", **choices, "answer": answer} for n in range(12)]
        shape = recognize(Listed([*rows, rows[0] | {"answer": 0}]))
        assert not shape.unused and shape.describe().startswith("question and answer")
        lines = [f"{mark}. {text}" for mark, text in zip("ABC", choices.values(), strict=False)]
        expected = say("\n".join(["q 0\n", *lines]), "down" if answer == "down" else "B")
        assert shape.build_chat(rows[0])["messages"] == expected
    free = {"question": "q", **choices, "answer": "free text"}
    bare = {"question": "q", "a": "1", "b": "2"}  # two letters may be anything
    for listed in ([free], *([bare | {"answer": answer}] for answer in ("2", 1, "free text"))):
        row, shape = listed[0], recognize(Listed(listed))
        assert "choices" not in shape.columns and len(shape.unused) == len(row) - 2


@pytest.mark.parametrize("names", [["A", "B"], ["a", "b"], ["A)", "B)"]])
def test_two_columns_named_by_letters_are_choices_where_all_answers_are_letters(names):
    row = {"question": "q", **dict(zip(names, ["up", "down"], strict=True))}
    rows = [row | {"answer": answer} for answer in ("A", "(b)", None, "")]
    shape = recognize(Listed(rows))
    assert shape.build_chat(rows[1])["messages"] == say("q\n\nA. up\nB. down", "B")
    for others in ([*rows, row | {"answer": "x"}], [row | {"answer": 0}], rows[2:]):
        assert "choices" not in recognize(Listed(others)).columns


@pytest.mark.parametrize("as_list", [True, False])
def test_answers_that_are_numeric_choices_stay_what_they_are(as_list):
    values = [2.0, 4.0, 1.0, 3.0]
    choices = {"choices": values} if as_list else dict(zip("ABCD", map(str, values), strict=True))
    answers = values if as_list else list(map(str, values))  # of JSON, of a text table
    rows = [{"question": f"q {n}", **choices, "answer": answers[n % 4]} for n in range(24)]
    with pytest.raises(WrongInput, match="numbers that are choices and may also count them"):
        recognize(Listed(rows))
    money = [
        {"question": f"q {n}", "choices": ["$2", "$7,000"], "answer": "7000"} for n in range(9)
    ]
    assert recognize(Listed(money)).build_chat(money[0])["messages"][-1] == say("", "$7,000")[1]


def test_an_answer_of_an_object_is_its_text():
    for answer in (
        {"text": ["5 years"], "answer_start": [3]},
        [{"text": "5 years", "answer_start": 3}],
        {"text": "5 years", "answer_start": 3},
        {"value": "5 years", "aliases": ["five"]},
    ):
        assert build({"question": "q", "answers": answer}) == say("q", "5 years")
    for completion in ({"role": "assistant", "content": "c"}, [{"from": "gpt", "value": "c"}]):
        assert build({"prompt": "p", "completion": completion}) == say("p", "c")


def test_an_instruction_and_its_question_are_one_prompt():
    row = {"instruction": "Answer.", "question": "Why?", "answer": "a"}
    assert build(row) == say("Answer.\n\nWhy?", "a")
    assert build({"prompt": "Sum up.", "input": "Text.", "output": "a"})[0]["content"] in (
        "Sum up.\n\nText.",
        "Text.\n\nSum up.",
    )
    rows = [{"instruction": "Rate it.", "review": f"r {n}", "output": "up"} for n in range(20)]
    with pytest.raises(WrongInput, match='TEMPLATE="{instruction} {review}" joins it'):
        recognize(Listed(rows))
    recognize(Listed(rows), template="{instruction} {review}")


@pytest.mark.parametrize("key", ["arguments", "parameters", "args"])
def test_the_arguments_of_a_call_are_kept_under_each_name(key):
    for call in (
        {"function": {"name": "quote", key: {"ticker": "ABC"}}},
        {"function": "quote", key: {"ticker": "ABC"}},
        {"name": "quote", key: '{"ticker": "ABC"}'},
    ):
        messages = [say("p")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        assert build({"messages": messages})[1]["tool_calls"] == [WRITTEN_CALL]


def test_parts_of_a_turn_are_its_text():
    parts = [{"type": "text", "text": "Sales "}, {"type": "input_text", "text": "rose."}]
    for content in (parts, ["Sales rose."], {"type": "text", "text": "Sales rose."}):
        messages = [{"role": "user", "content": content}, *say("", "c")[1:]]
        assert build({"messages": messages}) == say("Sales rose.", "c")
    for result in ({"price": 3}, {"text": "x"}):
        called = [*TOOL_TURNS[:2], {"role": "tool", "content": result}, TOOL_TURNS[3]]
        assert build({"messages": called})[2]["content"] == json.dumps(result)


def test_yes_and_no_of_a_text_table_get_names():
    rows = Listed([{"text": f"t {n}", "label": ("True", "False")[n % 2]} for n in range(20)])
    shape = recognize(rows, labels=["no", "yes"])
    answers = [shape.build_chat(row)["messages"][-1]["content"] for row in rows.rows[:2]]
    assert answers == ["yes", "no"] and rows.notes == ['"label": false is no, true is yes']
    shape = recognize(rows, labels=["1=no", "2=yes"])
    with pytest.raises(ValueError, match="none of the labels 1=no, 2=yes"):
        shape.build_chat(rows.rows[0])


def test_a_row_without_its_context_is_counted_and_a_file_without_the_column_is_not_taken():
    rows = [{"question": f"q {n}", "context": "c" * (n != 3), "answer": "a"} for n in range(9)]
    shape = recognize(Listed(rows))
    for row in rows:
        shape.build_chat(row)
    assert shape.repairs['"context" is empty, and the prompt is without it'] == 1
    assert shape.list_missing(Listed([{"question": "q"}])) == ["context"]
    late = [{"question": "q"}] * 60 + rows  # in JSON a column may begin late
    assert shape.list_missing(Listed(late)) == []
    chat = recognize(Listed([{"prompt": "p", "completion": "c", "system": "s"}]))
    bare = Listed([{"prompt": "p"}])
    assert chat.list_missing(bare) == []
    assert chat.note_missing(bare) == "my.jsonl has no system, which the training rows have"


def test_a_file_with_other_columns_gets_the_prompts_of_training():
    trained = recognize(
        Listed([{"text": "Sales rose", "label": "up", "day": "Monday"}]),
        template="{{{day}}} {text}? {labels}",
    )
    other = Listed([{"headline": "Sales rose", "sentiment": "up", "day": "Monday"}])
    shape = recognize(other).adopt(trained, other)
    assert shape.build_chat(other.rows[0]) == trained.build_chat(
        {"text": "Sales rose", "label": "up", "day": "Monday"}
    )
    without = Listed([{"headline": "Sales rose", "sentiment": "up"}])
    with pytest.raises(WrongInput, match='^my.jsonl: TEMPLATE: "{day}" is no'):
        recognize(without).adopt(trained, without)
    row = {"instruction": "i", "context": "c", "response": "r"}
    dolly = recognize(Listed([row]))
    asked = Listed([{"question": "i", "passage": "c", "answer": "r", "system": "s"}])
    adopted = recognize(asked).adopt(dolly, asked)
    assert adopted.build_chat(asked.rows[0]) == dolly.build_chat(row)
    bare = Listed([{"query": "i", "answer": "r"}])
    read = recognize(Listed([{"question": "i", "passage": "c", "answer": "r"}]))
    with pytest.raises(WrongInput, match="no column passage, which prompts hold in training"):
        recognize(bare).adopt(read, bare)
    recognize(bare).adopt(dolly, bare)  # an instruction may do without its input
    assert bare.notes == ["my.jsonl has no context, which the training rows have"]


def test_choices_are_in_training_and_test_rows_or_in_neither():
    chosen = Listed([{"query": "q", "choices": ["up", "down"], "answer": 0}])
    plain = Listed([{"question": "q", "answer": "down"}])
    for trained, rows in ((plain, chosen), (chosen, plain)):
        with pytest.raises(WrongInput, match="both need them, or neither"):
            recognize(rows).adopt(recognize(trained), rows)


def test_a_file_may_have_more_choices_than_the_training_rows():
    row = {"question": "q", "A": "up", "B": "down", "C": "flat", "answer": "C"}
    trained, more = recognize(Listed([row])), row | {"D": "none", "answer": "D"}
    shape = trained.add_choices(Listed([more]))
    assert shape.build_chat(more)["messages"] == say("q\n\nA. up\nB. down\nC. flat\nD. none", "D")
    for same in (row, row | {"F": "x"}):
        assert trained.add_choices(Listed([same])) is trained


def test_a_file_may_lack_a_context_that_the_template_leaves_out():
    rows = Listed([{"question": "q", "passage": "p", "answer": "a"}])
    bare = Listed([{"question": "q"}])
    assert recognize(rows, template="{question}?").list_missing(bare) == []
    for template in ("{context} {question}", "{passage} {question}"):
        assert recognize(rows, template=template).list_missing(bare) == ["passage"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "label": "False"},
        {"instruction": "p", "output": "c", "Label": False},
        {"messages": say("p", "c"), "label": False},
        {"prompt": "p", "completion": "c", "label": 0},
        {"prompt": "p", "completion": "c", "kto_tag": False},
        {"prompt": "p", "completion": "c", "label": "undesirable"},
    ],
)
def test_completions_that_are_not_wanted_are_not_trained_on(row):
    rows = Listed([row])
    with pytest.raises(WrongInput, match=r"\(KTO\), which is not trained on here"):
        refuse_unwanted(rows, recognize(rows))
    labelled = Listed([{"text": "p", "label": False}])
    refuse_unwanted(labelled, recognize(labelled))


def test_rows_that_prodigys_user_rejected_are_not_trained_on():
    rows = [{"text": "p", "label": "up", "answer": verdict} for verdict in ("accept", "reject")]
    for listed in (rows, [{"text": "p", "label": "up", "answer": "ignore"}]):
        with pytest.raises(WrongInput, match=r"\(Prodigy\); keep those of accept"):
            refuse_unwanted(Listed(listed), recognize(Listed(listed)))
    refuse_unwanted(Listed(rows[:1]), recognize(Listed(rows[:1])))
    loans = Listed([{"question": "Lend?", "answer": word} for word in ("accept", "reject")])
    refuse_unwanted(loans, recognize(loans))


def test_a_list_of_one_label_is_that_label():
    rows = [{"text": f"p {n}", "labels": [n % 2]} for n in range(12)]
    shape = recognize(Listed(rows, label_names={"labels": ["down", "up"]}))
    assert shape.build_chat(rows[1])["messages"][-1]["content"] == "up"
    shape = recognize(Listed(rows), labels=["0=down", "1=up"])
    assert shape.options == ["down", "up"]
    shape = recognize(Listed(rows))
    expected = say("p 1\n\nAnswer with one of: 0, 1.", "1")
    assert shape.build_chat(rows[1])["messages"] == expected
    with pytest.raises(ValueError, match='"labels" holds 2 values, and one in other rows'):
        shape.build_chat({"text": "p", "labels": [0, 1]})
    several = recognize(Listed([*rows, {"text": "p", "labels": [0, 1]}]))
    assert not several.options
    assert several.build_chat(rows[1])["messages"] == say("p 1", "[1]")
    with pytest.raises(WrongInput, match='"labels" counts from 1; write LABELS="1=down,2=up"'):
        recognize(Listed([{"text": "p", "labels": [1, 2]}]), labels=["down", "up"])
    # Test rows have the answers of training.
    test = Listed([{"sentence": "p 1", "label": [1]}])
    for trained, answer in ((several, "[1]"), (shape, "1")):
        adopted = recognize(test).adopt(trained, test)
        assert adopted.build_chat(test.rows[0])["messages"][-1]["content"] == answer


def test_keys_of_passages_that_are_not_used_are_named():
    passages = [{"title": "T", "evidence_text": "x", "page": 3}]
    row = {"question": "q", "answer": "a", "evidence": passages}
    assert recognize(Listed([row])).unused == ["evidence[].page"]
    table = row | {"evidence": {"year": 2020, "sales": 5}}
    shape = recognize(Listed([table]))
    assert not shape.unused and '{"year": 2020' in shape.build_chat(table)["messages"][0]["content"]
    lists = row | {"evidence": {"title": ["T", "U"], "sentences": [["x"]]}}
    with pytest.raises(ValueError, match='"evidence" holds lists of different lengths'):
        recognize(Listed([lists])).build_chat(lists)
    worded = recognize(Listed([row]), template="{evidence}|{question}")
    with pytest.raises(ValueError, match='"evidence" is empty'):
        worded.build_chat(row | {"evidence": None})


def test_names_of_labels_may_end_with_a_number():
    for names in (["FY2023", "FY2024"], ["1:1", "2:1"], ["Q1", "Q2"], ["1 year", "more"]):
        assert list(labels.parse_labels(names).values()) == names
    for names in (
        ["N=bad", "P=good"],
        ["[bad", "good]"],
        ["0 bad", "1 good"],
        ["0->bad", "1->good"],
        ["(0) bad", "(1) good"],
        ["0=bad;1=good"],
        ["bad:0", "good:1"],
    ):
        with pytest.raises(WrongInput, match="is no number=name"):
            labels.parse_labels(names)
    assert labels.parse_labels(["0.0=bad", "1.0=good"]) == {"0": "bad", "1": "good"}
    assert labels.parse_labels(["0=FY=2023", "1=a: b"]) == {"0": "FY=2023", "1": "a: b"}


def test_the_firm_that_fiqas_scores_are_about_is_no_label():
    row = {"sentence": "Up.", "target": "Acme", "aspect": "Stock", "score": 0.4}
    assert not recognize(Listed([row])).has_answer
    assert recognize(Listed([row | {"label": "good"}])).columns["answer"] == "label"
