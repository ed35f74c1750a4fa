"""The rules for texts and turns of chat rows, the same in `make new`, `make data` and `make audit`.

    require_text(row["answer"], "answer")         its text; ValueError where it is missing
    read_turns(row["messages"], "messages")       turns of any spelling as a chat row has them
    check_turns(messages, "messages")             the order of roles that a chat template takes

What is repaired is repaired here, and what is refused is refused with the file's own column names.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import orjson

Turn = dict[str, Any]

# A page break of a filing, or the vertical tab of a spreadsheet cell, is white space.
BREAKS = re.compile("[\x0b\x0c]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
SURROGATE = re.compile("[\ud800-\udfff]")
GAP = "\n[…]\n"  # in place of the middle of a prompt
# What pandas, SQL, spreadsheets and Bloomberg write for a value that is not there.
MISSING = {
    *("nan", "nat", "null", "<na>", r"\n", "#n/a", "#nv", "#null!", "#ref!", "#bezug!", "#value!"),
    *("#wert!", "#name?", "#div/0!", "#num!", "#zahl!", "#spill!", "#calc!", "#field!"),
    *("#getting_data", "#n/a n/a", "#n/a requesting data...", "#n/a field not applicable"),
}
LONGEST_MISSING = max(map(len, MISSING))
WHOLE_NUMBER = re.compile(r"\A\s*([+-]?\d+)\.0+\s*\Z")  # as pandas writes them beside gaps
# Grades of rating agencies: Aa and AA are two of them. Bad and Add are words.
RATING = re.compile(r"(?i:a{2,3}|b{2,3}|ba{1,2}|c{2,3}|ca{1,2}|d{2,3})[0-9]?[+-]?")

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bot", "model", "ai"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),  # of ShareGPT: an assistant's turn that calls tools
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # of a tool call
PART_KEYS = {"type", "text", "annotations", "cache_control"}  # of a content part of OpenAI's API
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
TURN_KEYS = {
    *(*ROLE_KEYS, *CONTENT_KEYS, "tool_calls", "function_call", "tool_call_id", "name"),
    *("weight", "train"),
}


# ---- Texts


def check_text(text: str, name: str) -> str:
    """The text itself; raises ValueError where it holds a control character."""
    if text.isprintable():  # most texts of one line
        return text
    if control := CONTROL.search(text):
        raise ValueError(f'"{name}" holds the control character {control.group()!r}')
    if SURROGATE.search(text):
        raise ValueError(f'"{name}" holds half of a character (a lone surrogate)')
    return text


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, NaN, or nothing but white space."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def is_stand_in(text: str) -> bool:
    """Whether a text stands for a value that is missing."""
    return len(text) <= LONGEST_MISSING and text.lower() in MISSING


def write_value(value: Any, name: str) -> str:
    """A value of any type as text: numbers as they are written, lists and objects as JSON."""
    if isinstance(value, str):
        return check_text(value, name).strip()
    if is_missing(value):
        return ""
    if isinstance(value, bytes):
        raise ValueError(f'"{name}" holds bytes; text is needed')
    if isinstance(value, bool | list | dict):
        try:
            return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
        except ValueError:
            raise ValueError(f'"{name}" holds NaN or infinity') from None
    return str(value)


def require_text(value: Any, name: str) -> str:
    """A value as text; raises ValueError where it is missing, or a word for that."""
    text = write_value(value, name)
    if not text:
        empty = value is not None and isinstance(value, str)
        raise ValueError(f'"{name}" is {"empty" if empty else "null"}')
    if is_stand_in(text):
        raise ValueError(f'"{name}" is "{text}", which stands for a missing value')
    return text


def fold_spellings(counts: Counter[str]) -> dict[str, str]:
    """{answer: the most frequent spelling} of answers that differ in case, spaces or invisible
    characters alone, or as 1 and 1.0 do.

    Grades such as Aa and AA stay apart.
    """
    groups: dict[str, list[str]] = {}
    for answer in counts:
        visible = "".join(c for c in answer if unicodedata.category(c) != "Cf")
        folded_case = unicodedata.normalize("NFC", visible).casefold()
        folded_case = WHOLE_NUMBER.sub(r"\1", folded_case)
        groups.setdefault(" ".join(folded_case.split()), []).append(answer)
    folded: dict[str, str] = {}
    for spellings in groups.values():
        if len(spellings) > 1 and not all(map(RATING.fullmatch, spellings)):
            best = max(spellings, key=lambda answer: counts[answer])
            folded |= {answer: best for answer in spellings if answer != best}
    return folded


# ---- Control tokens: a tokenizer makes real ones of their text, wherever it stands

END_TOKENS = (
    r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return)\|>|</s>|<eos>|<end_of_turn>"
)
AT_END = re.compile(rf"(?:\s*(?:{END_TOKENS}))+\s*\Z")
# The tokens of the catalogue's bases and their kin that begin, end or divide turns.
CONTROL_TOKEN = re.compile(
    rf"{END_TOKENS}|<\|[a-z_0-9]+\|>|<s>|<(?:bos|start_of_turn|start_of_image)>"
    r"|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]"
)


def strip_end_tokens(answer: str) -> str:
    """An answer without the tokens that end it: the chat template writes the base's own."""
    return AT_END.sub("", answer)


def refuse_control_token(text: str, where: str) -> None:
    """Raises ValueError where a text holds a token that would begin or end a turn inside of it."""
    if match := CONTROL_TOKEN.search(text):
        raise ValueError(
            f'{where}: "{match[0]}" is a control token, which would begin or end a turn inside the '
            "text; take it out"
        )


def clean_turns(messages: list[Turn]) -> int:
    """Takes the end tokens off the assistant's turns; returns how many turns had one.

    Raises ValueError that names the turn with any other control token.
    """
    repaired = 0
    for number, message in enumerate(messages, 1):
        text = message.get("content")
        if not isinstance(text, str) or ("<" not in text and "[" not in text):
            continue  # every control token has one of the two
        if message["role"] == "assistant":
            message["content"] = strip_end_tokens(text)
            repaired += message["content"] != text
        refuse_control_token(message["content"], f"turn {number} ({message['role']})")
    return repaired


def mend_turns(messages: list[Turn], repairs: Counter[str]) -> None:
    """Repairs what can be repaired in turns, and counts rows by it; ValueError for the rest."""
    has_breaks, count = False, len(messages)
    messages[:] = [turn for turn in messages if turn["role"] != "system" or turn["content"]]
    repairs["empty system turns left out"] += len(messages) < count
    for message in messages:
        text = message.get("content") or ""
        if not text.isprintable() and (mended := BREAKS.sub("\n", text)) != text:
            message["content"], has_breaks = mended, True
    repairs["page breaks made line breaks"] += has_breaks
    repairs["end tokens taken off answers"] += bool(clean_turns(messages))


# ---- Turns


def read_turns(value: Any, name: str) -> list[Turn]:
    """Turns as a chat row has them, of OpenAI's or ShareGPT's spelling, or of their JSON text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except ValueError:
            raise ValueError(f'"{name}" is a text and not a JSON list of turns') from None
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{name}" must be a list of turns, not {type(value).__name__}')
    return [read_turn(turn, f"{name}, turn {n}") for n, turn in enumerate(value, 1)]


def read_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f'"{where}" must be an object with role and content')
    name = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
    role = ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(
            f'"{where}" has the role {name!r}; it must be user, assistant, system or tool'
        )
    key = next((k for k in CONTENT_KEYS if turn.get(k) not in (None, "")), "content")
    content = read_content(turn if key == "parts" else turn.get(key), where)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": parse_calls(content, where)}
    row: Turn = {"role": role, "content": content}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if calls and role == "assistant":
        row["tool_calls"] = parse_calls(calls, where)
    if role == "tool":
        row |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    weight = turn.get("weight")
    if weight not in (None, 0, 1, "0", "1"):
        raise ValueError(f'"{where}" has the weight {weight!r}; it must be 0 or 1')
    if role == "assistant" and (weight in (0, "0") or turn.get("train") is False):
        row["train"] = False
    if not content and role != "system" and not row.get("tool_calls"):
        raise ValueError(f'"{where}", the {role}\'s, is empty')
    return row


def read_content(content: Any, where: str) -> str:
    """The text of a turn; of content parts, their texts. Raises ValueError for other lists."""
    if isinstance(content, dict) and "parts" in content:  # Gemini's
        parts = content["parts"]
        content = parts if isinstance(parts, list) else [parts]
    if isinstance(content, dict) and {"type", "text"} <= content.keys() <= PART_KEYS:
        content = [content]
    if isinstance(content, list):
        content = [part for part in content if not (isinstance(part, dict) and part.get("thought"))]
        texts = [read_content_part(part, where) for part in content]
        if len(texts) > 1 and not all(isinstance(part, dict) for part in content):
            raise ValueError(f'"{where}" holds a list of {len(texts)} texts; join them to one')
        content = "".join(texts)
    return write_value(content, where)


def read_content_part(part: Any, where: str) -> str:
    """The text of a part as OpenAI's API has it, or of a list that holds one text."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind not in ("text", "input_text", "output_text"):
        raise ValueError(f'"{where}" has a part of type {kind}; only text is trained')
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise ValueError(f'"{where}" has a part without a text: {str(part)[:60]}')
    return text


def parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, with their arguments as JSON text."""
    if isinstance(calls, str):
        try:
            calls = orjson.loads(calls)
        except ValueError:
            raise ValueError(f'"{where}" is not the JSON of a tool call') from None
    rows = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else {}
        if isinstance(function, str):  # {"function": name, "arguments": …}
            function = {"name": function} | {k: v for k, v in call.items() if k in ARGUMENT_KEYS}
        name = function.get("name")
        arguments: Any = next((function[key] for key in ARGUMENT_KEYS if key in function), {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments or "{}")
            except ValueError:
                raise ValueError(
                    f'"{where}" calls {name} with arguments that are not JSON'
                ) from None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(f'"{where}" has a tool call without a name or without arguments')
        text = write_value(arguments, where)
        refuse_control_token(f"{name} {text}", where)
        row: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": text}}
        rows.append({"id": call["id"], **row} if call.get("id") else row)
    return rows


def read_tools(value: Any, name: str) -> str:
    """The tools of a row as a JSON text of OpenAI's list; "" where there are none.

    A text, since rows of one file describe parameters of different types.
    """
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else []
        except ValueError:
            raise ValueError(f'"{name}" is a text and not a JSON list of tools') from None
    if not value:
        return ""
    tools = [
        tool
        if isinstance(tool, dict) and "function" in tool
        else {"type": "function", "function": tool}
        for tool in (value if isinstance(value, list) else [value])
    ]
    for tool in tools:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'"{name}" has a tool without a name')
    text = write_value(tools, name)
    refuse_control_token(text, name)
    return text


def check_turns(messages: list[Turn], name: str) -> None:
    """Raises ValueError for an order that no chat template takes, and for a missing text."""
    roles = [turn["role"] for turn in messages]
    before = ""
    for number, role in enumerate(roles, 1):
        where = f'"{name}", turn {number}'
        if role == "system" and number > 1:
            raise ValueError(f"{where}: a system turn must be the first")
        if before in ("", "system") and role not in ("system", "user"):
            raise ValueError(f"{where} is the {role}'s; a user's turn must come first")
        if role == before and role != "tool":
            raise ValueError(f"{where}: two turns of the {role} in a row")
        if role == "tool" and before != "tool" and not messages[number - 2].get("tool_calls"):
            as_text = "<tool_call>" in (messages[number - 2]["content"] or "")  # Hermes
            advice = "; a call belongs in tool_calls and not in the text" if as_text else ""
            raise ValueError(f"{where}: a tool's result follows no call{advice}")
        if before == "tool" and role == "user":
            raise ValueError(f"{where}: a user's turn follows a tool's result without an answer")
        text = messages[number - 1]["content"] or ""
        if role in ("user", "assistant") and is_stand_in(text):
            raise ValueError(f'{where} is "{text}", which stands for a missing value')
        before = role


def check_row(row: dict[str, Any], name: str = "messages") -> None:
    """Raises ValueError unless a chat row ends with an answer that training can learn."""
    messages = row["messages"]
    check_turns(messages, name)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f'"{name}" ends with the {messages[-1]["role"]}\'s turn, not with an answer'
        )
    for number, turn in enumerate(messages, 1):
        where = f"{name}, turn {number}"
        if not turn["content"] and not turn.get("tool_calls"):
            raise ValueError(f'"{where}", the {turn["role"]}\'s, is empty')
    if not any(turn.get("train", True) for turn in messages if turn["role"] == "assistant"):
        raise ValueError(f'"{name}" has no assistant turn to train on: all have weight 0')


def cut_longest(
    messages: list[Turn],
    find_offsets: Callable[[str], Sequence[tuple[int, int]]],
    count_excess: Callable[[], int],
) -> bool:
    """Cuts as little out of the middle of the longest prompt as makes a row fit.

    `find_offsets`: (start, end) of each token of a text, in characters. `count_excess`: tokens that
    the row has too many, with `messages` as they are. Returns False where no cut suffices; the
    messages are then as before.
    """
    longest = max(
        (turn for turn in messages if turn["role"] != "assistant"),
        key=lambda turn: len(turn["content"]),
    )
    text = longest["content"]
    offsets = find_offsets(text)
    left = len(offsets)
    while (excess := count_excess()) > 0:
        left -= excess
        if left < 2:
            longest["content"] = text
            return False
        end, start = offsets[(left + 1) // 2 - 1][1], offsets[-(left // 2)][0]
        longest["content"] = text[:end] + GAP + text[start:]
    return True


def join_turns(messages: Iterable[Turn]) -> str:
    """The turns before an answer as one text, by which prompts are compared and split."""
    turns = list(messages)
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(
        f"{turn['role']}: {turn['content']}"
        + "".join(f" {call['function']}" for call in turn.get("tool_calls", ()))
        for turn in turns
    )


def write_answer(turn: Turn) -> str:
    """The text of an answer, and its tool calls as JSON, as scoring reads them."""
    calls = turn.get("tool_calls")
    return "\n".join(filter(None, [turn["content"], json.dumps(calls) if calls else ""]))
