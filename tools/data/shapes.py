"""Makes chat rows of a file's rows, whose columns hold the parts of a row.

    shape = recognize(open_rows("my.csv"))      tools/data/recognize.py
    shape.build_chat({"text": "Profit rose", "label": "positive"})   {"messages": [...]}
    shape.build_prompt({"text": "Profit rose"})                      the same without the answer

`TEMPLATE="{passage}\\n\\n{question}"` words the prompt.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from string import Formatter
from typing import Any

import orjson

from tools.common import WrongInput, nearest
from tools.data import turns
from tools.data.choices import (
    Choice,
    find_choice_columns,
    name_choice,
    parse_choices,
    write_choices,
)
from tools.data.formats import RowFile
from tools.data.labels import read_number
from tools.data.turns import Turn

SURROUNDING = {"tools", "system", "history"}  # parts of a chat before its last prompt
INSTRUCTION_FIRST = ("prompt", "context")
# Keys of a passage that is an object, of which the first that it has holds the text.
PASSAGE = (
    *("text", "evidence_text", "content", "contents", "contexts", "passage", "sentences"),
    *("page_content", "paragraph_text"),
)


@dataclass
class Shape:
    """Which column holds which part of a row, and how a prompt is worded.

    `names` gives the labels of integer answers. `options` are the labels that a prompt lists.
    `choice_columns` are the columns of choices where each has its own.
    `counted_from` is the number, "0" or "1", that answers give to the first choice; "" where they
    are choices or letters themselves.
    `lists`: "of one" where answers are lists of one text or number, which is the answer; "of
    several" where there are longer ones, which are answers as a whole.
    """

    kind: str
    columns: dict[str, str]
    order: tuple[str, ...] = ("context", "prompt", "choices")
    template: str | None = None
    names: dict[str, str] | None = None
    options: list[str] = field(default_factory=list)
    choice_columns: list[str] = field(default_factory=list)
    counted_from: str = ""
    lists: str = ""
    unused: list[str] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)  # rows by what was repaired in them

    def __post_init__(self) -> None:
        self.order = tuple(self.order)
        self.fields = [name for _, name, _, _ in Formatter().parse(self.template or "") if name]

    def to_dict(self) -> dict[str, Any]:
        """The shape as plain values, from which `Shape(**values)` makes it again."""
        content = asdict(self)
        del content["unused"], content["repairs"]
        content["order"] = list(self.order)
        return {key: value for key, value in content.items() if value}

    def describe(self) -> str:
        """The shape in words: its kind, and which column is what."""
        parts = [f"{part} {column}" for part, column in self.columns.items()]
        worded = (
            f"; worded {json.dumps(self.template, ensure_ascii=False)}" if self.template else ""
        )
        start = self.counted_from
        counted = f"; answers count the choices from {start}" if start else ""
        return f"{self.kind}: {', '.join(parts)}{worded}{counted}"

    @property
    def has_answer(self) -> bool:
        return bool({"messages", "answer", "gold"} & self.columns.keys())

    def list_missing(self, rows: RowFile, with_answer: bool = False) -> list[str]:
        """The columns that a prompt needs, or a whole row, and that a file does not have.

        A row may be without a context, but a file without that column has other prompts.
        """
        optional = {*self.list_optional(), "gold"} | (set() if with_answer else {"answer"})
        needed = {c for part in self.columns.keys() - optional for c in self.list_columns(part)}
        needed |= {name for name in self.fields if name not in self.columns and name != "labels"}
        return sorted(needed - set(find_columns(rows, needed)))

    def list_optional(self) -> list[str]:
        """The parts that a whole file may lack: turns before the prompt, and an instruction's input
        or any context that the template leaves out.
        """
        parts = [part for part in SURROUNDING if part in self.columns]
        context = self.columns.get("context", "")
        is_worded = self.template is None or "context" in self.fields or context in self.fields
        if context and (self.order == INSTRUCTION_FIRST or not is_worded):
            parts.append("context")
        return parts

    def adopt(self, trained: "Shape", rows: RowFile) -> "Shape":
        """This shape of a file with other columns, with its prompts worded as those trained on.

        Raises WrongInput where a part of those prompts is missing.
        """
        shape = Shape(**self.to_dict() | {"options": trained.options})
        shape.names = trained.names or shape.names
        if self.lists:
            shape.lists = "of several" if trained.lists == "of several" else "of one"
        if "prompt" not in self.columns or "prompt" not in trained.columns:
            return shape
        if "choices" in self.columns.keys() ^ trained.columns.keys():
            sides = ["training", "test"] if "choices" in trained.columns else ["test", "training"]
            raise WrongInput(
                f"{rows.name}: the {sides[0]} rows have choices and the {sides[1]} rows have none; "
                "both need them, or neither"
            )
        missing = trained.columns.keys() - self.columns.keys() - {"answer", "gold"}
        if needed := sorted(missing - {*trained.list_optional()}):
            name = trained.columns[needed[0]]
            raise WrongInput(
                f"{rows.name} has no column {name}, which prompts hold in training; add it, empty "
                "where a row has none"
            )
        if missing:
            names = [trained.columns[part] for part in sorted(missing)]
            rows.notes.append(describe_missing(rows, names))
        for part in self.columns.keys() - trained.columns.keys() - {"answer", "gold"}:
            del shape.columns[part]
        shape.order = trained.order
        if trained.template is None:
            return shape
        parts = {column: part for part, column in trained.columns.items()}
        template = "".join(
            text.replace("{", "{{").replace("}", "}}")
            + ("" if name is None else f"{{{parts.get(name, name)}}}")
            for text, name, _, _ in Formatter().parse(trained.template)
        )
        try:
            return shape.word(template, rows.columns)
        except WrongInput as error:
            raise WrongInput(f"{rows.name}: {error}") from None

    def list_columns(self, part: str) -> list[str]:
        """The column of a part, or of choices all of them."""
        if part == "choices" and self.choice_columns:
            return self.choice_columns
        return [self.columns[part]]

    def note_missing(self, rows: RowFile) -> str:
        """A sentence on optional columns that a file does not have; "" where it has them."""
        wanted = {self.columns[part] for part in self.list_optional()}
        missing = sorted(wanted - set(find_columns(rows, wanted)))
        return describe_missing(rows, missing) if missing else ""

    def add_choices(self, rows: RowFile) -> "Shape":
        """The shape with a file's further columns of choices, such as E beside A to D."""
        known = self.choice_columns
        found = find_choice_columns(rows.columns) if known else []
        if found[: len(known)] != known or found == known:
            return self
        columns = self.columns | {"choices": ", ".join(found)}
        return Shape(**self.to_dict() | {"columns": columns, "choice_columns": found})

    def word(self, template: str, columns: list[str]) -> "Shape":
        """The shape with prompts worded by TEMPLATE=; raises WrongInput for one that cannot be."""
        text = template.replace("\\n", "\n").replace("\\t", "\t")
        check_template(text, self, columns)
        return Shape(**self.to_dict() | {"template": text})

    # ---- rows

    def build_chat(self, row: dict[str, Any]) -> dict[str, Any]:
        """The chat row of a row of the file; raises ValueError that names the file's column."""
        if "messages" in self.columns:
            chat = self.build_conversation(row)
        else:
            chat = self.build_turns(row)
            chat["messages"] += self.build_answer(row)
        turns.mend_turns(chat["messages"], self.repairs)
        turns.check_row(chat, self.columns.get("messages") or self.columns["prompt"])
        return chat

    def build_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """The chat row without its answer, for rows that have none."""
        if "messages" in self.columns:
            chat = self.build_conversation(row)
            if chat["messages"][-1]["role"] == "assistant":
                chat["messages"].pop()
        else:
            chat = self.build_turns(row)
        turns.mend_turns(chat["messages"], self.repairs)
        column = self.columns.get("messages") or self.columns["prompt"]
        turns.check_turns(chat["messages"], column)
        if not chat["messages"]:
            raise ValueError(f'"{column}" holds no prompt')
        return chat

    def build_turns(self, row: dict[str, Any]) -> dict[str, Any]:
        """The turns before the answer, of columns of texts."""
        column = self.columns["prompt"]
        prompt, messages = row.get(column), self.read_history(row)
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            messages += turns.read_turns(prompt, column)  # TRL's conversational prompts
            if messages[-1]["role"] == "user":
                messages[-1]["content"] = self.write_prompt(row, messages[-1]["content"])
        else:
            messages.append({"role": "user", "content": self.write_prompt(row)})
        self.add_system(row, messages)
        return {"messages": messages}

    def add_system(self, row: dict[str, Any], messages: list[Turn]) -> None:
        """Puts the text of a system column first; counts where turns have another of their own."""
        system = self.read_part(row, "system") if "system" in self.columns else ""
        own = messages[0]["content"] if messages[0]["role"] == "system" else ""
        if system and not own:
            messages.insert(0, {"role": "system", "content": system})
        elif own != system and system:
            self.repairs[f'"{self.columns["system"]}" left out: the turns have their own'] += 1

    def build_conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        column = self.columns["messages"]
        messages = turns.read_turns(row.get(column), column)
        self.add_system(row, messages)
        chat: dict[str, Any] = {"messages": messages}
        if "tools" in self.columns:
            name = self.columns["tools"]
            if tools := turns.read_tools(row.get(name), name):
                chat["tools"] = tools
        return chat

    def read_part(self, row: dict[str, Any], part: str) -> str:
        column = self.columns[part]
        value = row.get(column)
        if part == "context":
            text = write_passages(value, column)
        else:
            text = turns.read_content(value, column)
        text = "" if turns.is_stand_in(text) else text
        if part == "context" and not text and self.order != INSTRUCTION_FIRST:
            self.repairs[f'"{column}" is empty, and the prompt is without it'] += 1
        return text

    def read_history(self, row: dict[str, Any]) -> list[Turn]:
        """The earlier turns of an Alpaca row: pairs of a question and its answer."""
        column = self.columns.get("history", "")
        value: Any = row.get(column) if column else None
        if isinstance(value, str) and value.strip():
            try:
                value = orjson.loads(value)
            except ValueError:
                raise ValueError(f'"{column}" is a text and not a JSON list of pairs') from None
        if turns.is_missing(value) or value in ([], {}):
            return []
        pairs: list[Any] = value if isinstance(value, list) else [None]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError(f'"{column}" must be a list of pairs of a question and an answer')
        return [
            {"role": role, "content": turns.require_text(text, column)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def write_prompt(self, row: dict[str, Any], prompt: str = "") -> str:
        """The user's turn: the template filled in, or the parts of the prompt below each other.

        prompt: the text of the prompt where its column holds turns.
        """
        prompt_column = self.columns["prompt"]
        if self.template is None:
            texts = {"prompt": prompt or turns.require_text(row.get(prompt_column), prompt_column)}
            if "context" in self.columns:
                texts["context"] = self.read_part(row, "context")
            if "choices" in self.columns:
                texts["choices"] = self.write_choices(row, texts["prompt"])
            parts = [texts.get(part, "") for part in self.order]
            if self.options:
                parts.append(f"Answer with one of: {', '.join(self.options)}.")
            return "\n\n".join(filter(None, parts))
        values = {}
        for name in self.fields:
            column = self.columns.get(name, name)
            if name == "labels":
                values[name] = ", ".join(self.options)
            elif name == "choices":
                values[name] = self.write_choices(row, "")
            elif column == self.columns.get("context"):
                values[name] = self.read_part(row, "context")
                if not values[name] and name != "context":
                    raise ValueError(f'"{column}" is empty')
            elif column == prompt_column and prompt:
                values[name] = prompt
            else:
                values[name] = turns.require_text(row.get(column), column)
        return "".join(
            text + (values[name] if name else "")
            for text, name, _, _ in Formatter().parse(self.template)
        ).strip()

    def take(self, row: dict[str, Any], column: str) -> Any:
        """The value of a column of answers; of a list of one that stands for it, that one."""
        value = row.get(column)
        if self.lists == "of one" and isinstance(value, list) and len(value) == 1:
            return value[0]
        return value

    def take_choices(self, row: dict[str, Any]) -> Any:
        """The choices as the row has them, or a list of those that have a column each."""
        if self.choice_columns:
            return [row.get(column) for column in self.choice_columns]
        return row.get(self.columns["choices"])

    def read_choices(self, row: dict[str, Any]) -> list[Choice]:
        return parse_choices(self.take_choices(row), self.columns["choices"])

    def write_choices(self, row: dict[str, Any], prompt: str) -> str:
        return write_choices(self.read_choices(row), prompt, "gold" in self.columns)

    def build_answer(self, row: dict[str, Any]) -> list[Turn]:
        column = self.columns.get("answer", "")
        value = self.take(row, column) if column else None
        if self.lists == "of one" and isinstance(value, list):
            raise ValueError(f'"{column}" holds {len(value)} values, and one in other rows')
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and set(turns.ROLE_KEYS) & first.keys():
            return turns.read_turns(value if isinstance(value, list) else [value], column)  # TRL's
        if isinstance(first, dict):
            value = find_answer_text(first, value)
        elif isinstance(first, list) and [*map(type, first)] == [int, int, str]:
            raise ValueError(
                f'"{column}" marks a text by the places of its characters ({str(first)[:40]}); '
                "write the text itself"
            )
        elif isinstance(value, str) and value.lstrip()[:1] == "{" and "answer_start" in value:
            raise ValueError(f'"{column}" holds an object as text; write its text alone')
        if column and value is None and "gold" not in self.columns:
            raise ValueError(f'"{column}" is {"null" if column in row else "missing"}')
        text = self.read_gold(row, value) if "gold" in self.columns else self.name_label(value)
        if "choices" in self.columns and "gold" not in self.columns:
            text = self.name_choice(row, value, text)
        return [{"role": "assistant", "content": text}]

    def name_choice(self, row: dict[str, Any], value: Any, answer: str) -> str:
        """The letter of an answer that is a letter or a number; the text of a choice stays."""
        column, choices, number = self.columns["answer"], self.read_choices(row), read_number(value)
        is_counted = bool(self.counted_from) and number is not None
        if not choices:
            if is_counted or re.fullmatch("[A-Ja-j]", answer):
                raise ValueError(f'"{column}" is "{answer}", and the row has no choices')
            return answer
        if number is not None and is_counted and answer not in dict(choices):
            return self.find_choice(choices, number, column)[0]
        named = name_choice(choices, answer, self.choice_columns)
        if named is None:
            raise ValueError(f'"{column}" is "{answer[:60]}", none of its choices')
        return named

    def answers_a_choice(self, row: dict[str, Any]) -> bool:
        """Whether the answer of a row is one of its choices."""
        with suppress(ValueError):
            return bool(self.read_choices(row)) and bool(self.build_answer(row))
        return False

    def find_choice(self, choices: list[Choice], number: int, column: str) -> Choice:
        """The choice that a number of `column` counts; ValueError where there is none."""
        place = number - int(self.counted_from or 0)
        if not 0 <= place < len(choices) or not choices[place][1]:
            raise ValueError(f'"{column}" is {number}, and there are {len(choices)} choices')
        return choices[place]

    def read_gold(self, row: dict[str, Any], value: Any) -> str:
        """The answer of a PIXIU row, which its `gold` says as well, as a number of a choice."""
        column = self.columns["gold"]
        gold, answer_column = row.get(column), self.columns.get("answer", column)
        choices = self.read_choices(row) if "choices" in self.columns else []
        number = read_number(gold)
        chosen = ("", "")
        if choices and number is not None:
            chosen = self.find_choice(choices, number, column)
        elif choices and isinstance(gold, str):
            matches = (choice for choice in choices if gold in choice)
            chosen = next(matches, chosen)
        if turns.is_missing(value):
            if not choices:
                return turns.require_text(gold, column)
            if not chosen[1]:
                raise ValueError(f'"{column}" names none of the choices')
            return chosen[1]
        answer = turns.require_text(value, answer_column)
        if chosen[1] and answer.casefold() not in {str(gold), *map(str.casefold, chosen)}:
            raise ValueError(
                f'"{answer_column}" is "{answer[:60]}", "{column}" is "{chosen[1][:60]}"'
            )
        return answer

    def name_label(self, value: Any) -> str:
        """An answer as text: the name of an integer label, or the answer itself."""
        column = self.columns["answer"]
        if isinstance(value, list) and self.names:
            labels = [self.name_label(label) for label in value]
            return json.dumps(labels, ensure_ascii=False)
        text = turns.require_text(value, column)
        if not self.names:
            return text
        spellings = {name.casefold(): name for name in self.names.values()}
        number = read_number(value)
        if self.names.keys() == {"0", "1"}:
            number = {"true": 1, "false": 0}.get(str(value).strip().lower(), number)
        if text in self.names.values():
            return text
        if number is not None and str(number) in self.names and text.casefold() not in spellings:
            return self.names[str(number)]
        if text.casefold() in spellings:
            return spellings[text.casefold()]
        accepted = ", ".join(f"{key}={name}" for key, name in self.names.items())
        raise ValueError(f'"{column}" is "{text[:60]}", none of the labels {accepted}')


def list_passages(value: Any, column: str) -> list[Any]:
    """The passages of a context; those of HotpotQA are lists in one object."""
    if isinstance(value, dict) and isinstance(value.get("title"), list):
        lists = {key: entry for key, entry in value.items() if isinstance(entry, list)}
        if len({*map(len, lists.values())}) > 1:
            raise ValueError(f'"{column}" holds lists of different lengths')
        return [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]
    return value if isinstance(value, list) else [value]


def write_passages(value: Any, column: str) -> str:
    """Passages below each other; of one that is an object, its title above its text."""
    texts = []
    for passage in list_passages(value, column):
        keys = [key for key in PASSAGE if isinstance(passage, dict) and passage.get(key)]
        if not keys:
            texts.append(turns.write_value(passage, column))
            continue
        text = passage[keys[0]]
        sentences = text if isinstance(text, list) else [text]
        parts = [turns.write_value(passage.get("title"), column)]
        parts += [" ".join(turns.write_value(sentence, column) for sentence in sentences)]
        texts.append("\n".join(filter(None, parts)))
    return "\n\n".join(filter(None, texts))


def find_answer_text(answer: dict[str, Any], whole: Any) -> Any:
    """The text of an answer as SQuAD and TriviaQA have it; any other object as it is."""
    texts = answer.get("text", answer.get("value"))
    if isinstance(texts, list):
        return texts[0] if texts else None
    return texts if isinstance(texts, str) else whole


def check_template(template: str, shape: Shape, columns: list[str]) -> None:
    """Raises WrongInput where a template names no column, or one that is not there."""
    if "messages" in shape.columns:
        raise WrongInput("TEMPLATE= does not apply to rows that hold turns")
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise WrongInput(
            f"TEMPLATE: {error}; a brace of the text is doubled: {{{{ or }}}}"
        ) from None
    fields = [name for _, name, _, _ in parsed if name is not None]
    names = [*shape.columns, *columns, "labels"]
    parts = [part for part in ("answer", "gold") if part in shape.columns]
    answers = {name for part in parts for name in (part, shape.columns[part])}
    if leaks := sorted(answers & set(fields)):
        raise WrongInput(f'TEMPLATE: "{{{leaks[0]}}}" is the answer, and a prompt must not hold it')
    for name, extra, conversion in ((n, e, c) for _, n, e, c in parsed if n is not None):
        if extra or conversion or re.search(r'^$|["{}\']', name):
            raise WrongInput(
                f'TEMPLATE: "{{{name}" opens no name of a column; a brace of the text is doubled: '
                "{{ or }}"
            )
        if name not in names:
            hint = nearest(name, names) or f"; there are {', '.join(columns)}"
            raise WrongInput(f'TEMPLATE: "{{{name}}}" is no column{hint}')
    if not set(fields) - {"labels"}:
        raise WrongInput('TEMPLATE: name a column in braces, such as "{text}"')


def describe_missing(rows: RowFile, columns: list[str]) -> str:
    return f"{rows.name} has no {', '.join(columns)}, which the training rows have"


def find_columns(rows: RowFile, wanted: set[str]) -> list[str]:
    """The columns of a file; of JSON, whose first rows give them, those of any row as well."""
    if wanted <= set(rows.columns) or rows.format not in ("jsonl", "json"):
        return rows.columns
    later = {key for _, row in rows if isinstance(row, dict) for key in wanted & row.keys()}
    return [*rows.columns, *later]
