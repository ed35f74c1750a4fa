"""The only place where a conversation becomes text: for training, scoring, chat and serving.

Axolotl renders with the tokenizer's chat template, or with the one that a config names, and with
the config's `chat_template_kwargs`. A run's saved tokenizer carries the template of its training
(see `with_template`), so `render` calls the same template with the same options.
`tests/test_train.py` and `tests/test_catalogue.py` compare the two token by token.

For an adapter trained on another format (FinLoRA's) a template writes that format; a merged or
served model carries it as its own.
"""

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from os.path import commonprefix
from typing import Any

from tools.common import WrongInput

# How a prompt is written. `chat` is the base's chat template. FinLoRA's adapters were trained on
# `finlora`, and FinLoRA evaluates them on `bare`.
FORMATS = {"chat": "", "finlora": "[INST] {} [/INST]", "bare": "{}"}

# Keys of a config that give a run another tokenizer than its base's.
TOKENIZER = {
    *("tokens", "added_tokens_overrides", "chat_template", "chat_template_jinja"),
    *("default_system_message", "tokenizer_config", "tokenizer_type", "tokenizer_legacy"),
    *("tokenizer_use_fast", "tokenizer_use_mistral_common"),
}
DEFAULT = "tokenizer_default"
THOUGHT = "</think>"  # ends the reasoning before an answer


def templates(config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The distinct (`chat_template`, `chat_template_jinja`) that an Axolotl config's rows use."""

    def choice(options: dict[str, Any]) -> tuple[str, str | None]:
        jinja = options.get("chat_template_jinja")
        return options.get("chat_template") or ("jinja" if jinja else DEFAULT), jinja

    top = choice(config)
    rows = [choice(e) for e in config.get("datasets") or () if e.get("type") == "chat_template"]
    # Axolotl makes the top-level template the tokenizer's default.
    return list(dict.fromkeys(top if own[0] == DEFAULT else own for own in rows))


def with_template(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its datasets' chat template at the top level as well.

    Training is the same, and Axolotl saves the template with the run's tokenizer.
    """
    choices = templates(config)
    if len(choices) != 1 or choices[0][0] == DEFAULT:
        return config
    name, jinja = choices[0]
    return config | {"chat_template": name} | ({"chat_template_jinja": jinja} if jinja else {})


def has_own_template(config: dict[str, Any]) -> bool:
    """Whether a config brings a Jinja template of its own."""
    return any(jinja for _, jinja in templates(config))


def changes_tokenizer(config: dict[str, Any]) -> bool:
    """Whether a config trains with another tokenizer or chat template than its base's."""
    tokens = (config.get("special_tokens") or {}).keys() - {"pad_token"}
    return bool(tokens or TOKENIZER & with_template(config).keys())


def explain_unscorable(config: dict[str, Any]) -> str:
    """Why no single chat template renders the prompts of a config's rows; "" if one does."""
    kinds = [
        e.get("type") for e in config.get("datasets") or () if e.get("type") != "chat_template"
    ]
    if kinds:
        kind = kinds[0] if isinstance(kinds[0], str) else "custom" if kinds[0] else "pretokenized"
        return f'it trains rows of type "{kind}", whose prompt is not a chat template\'s'
    names = [name for name, _ in templates(config)]
    return f"its datasets have several chat templates: {', '.join(names)}" if names[1:] else ""


def template(tokenizer: Any, form: str) -> str | None:
    """The chat template of a format; None for `chat`, where the tokenizer's own applies.

    It starts with the token that the tokenizer puts before a text, if any, because plain text was
    trained behind it. An answer ends with the end token.
    """
    if form == "chat":
        return None
    first = tokenizer("")["input_ids"][:1]
    start = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
    before, after = FORMATS[form].split("{}")
    start, before, after, end = (
        "{{ " + repr(text) + " }}" if text else ""
        for text in (start, before, after, tokenizer.eos_token)
    )
    return (
        f"{start}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
        f"{{{{ ' ' + message['content'] }}}}{end}"
        f"{{% else %}}{before}{{{{ message['content'] }}}}{after}{{% endif %}}{{% endfor %}}"
    )


def read_conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools) of a chat row as a chat template takes them, and as Axolotl gives them.

    A row of a file may hold tools and arguments as JSON texts, and `datasets` fills the keys that
    other rows have with None.
    """
    messages = []
    for turn in row["messages"]:
        message = {key: value for key, value in turn.items() if value is not None}
        message.pop("train", None)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [parse_call(call) for call in calls]
        messages.append(message)
    tools = row.get("tools")
    return messages, _without_none(json.loads(tools) if isinstance(tools, str) else tools) or None


def parse_call(call: dict[str, Any]) -> dict[str, Any]:
    call = _without_none(call)
    function = call.get("function") or {}
    if isinstance(arguments := function.get("arguments"), str):
        call["function"] = function | {"arguments": json.loads(arguments)}
    return call


def write_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API takes them: the arguments of calls are JSON texts."""
    turns = deepcopy(messages)
    for call in (call for turn in turns for call in turn.get("tool_calls") or ()):
        call["function"]["arguments"] = json.dumps(call["function"].get("arguments") or {})
    return turns


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
    form: str = "chat",
    tools: list[Any] | None = None,
) -> str:
    """The prompt for `messages` ([{"role", "content"}, …]) up to where the assistant answers.

    `options` are the recipe's `chat_template_kwargs`, `form` is one of FORMATS, `tools` are those
    that the model may call. Raises WrongInput where the template cannot render them.
    """
    if form == "chat" and not tokenizer.chat_template:
        others = ", ".join(name for name in FORMATS if name != "chat")
        raise WrongInput(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; PROMPT_FORMAT= takes "
            f"another format: {others}"
        )
    if form != "chat" and tools:
        raise WrongInput(f'PROMPT_FORMAT="{form}" has no place for tools; "chat" has')
    return _apply_template(tokenizer, messages, options, form, tools)


def _apply_template(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    options: dict[str, Any] | None,
    form: str,
    tools: list[Any] | None,
    answering: bool = True,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template(tokenizer, form),
            tokenize=False,
            add_generation_prompt=answering,
            **(options or {}),
        )
    except Exception as error:  # a template is code, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise WrongInput(f"the chat template refuses the turns {roles}: {error}") from None
    return str(text)


def render_row(tokenizer: Any, row: dict[str, Any], options: dict[str, Any] | None = None) -> str:
    """A whole chat row as training sees it; raises WrongInput where the template refuses it."""
    messages, tools = read_conversation(row)
    return _apply_template(tokenizer, messages, options, "chat", tools, answering=False)


def pick_shapes(
    rows: Iterable[dict[str, Any]], with_pairs: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of the first chat row of each order of roles, calls and tools.

    A user's turn and its answer are a shape only `with_pairs`: the template of every base has them.
    Answers with reasoning are a shape of their own.
    """
    shapes = set[tuple[Any, ...]]()
    if not with_pairs:
        shapes.add((False, ("user", False, False), ("assistant", False, False)))
    for number, row in enumerate(rows, 1):
        turns = (
            (turn["role"], bool(turn.get("tool_calls")), THOUGHT in str(turn.get("content")))
            for turn in row["messages"]
        )
        if (shape := (bool(row.get("tools")), *turns)) not in shapes:
            shapes.add(shape)
            yield number, row


def explain_unrenderable(
    tokenizer: Any, row: dict[str, Any], options: dict[str, Any] | None = None
) -> str:
    """What a base's chat template refuses or leaves out of a chat row; "" where it keeps all.

    Many templates drop tools silently, and Mistral's the system turn before an answer.
    """
    messages, tools = read_conversation(row)
    try:
        text = render_row(tokenizer, row, options)
        for place, message in enumerate(messages):
            # Axolotl looks for a turn that is trained by putting another text in its place.
            if message.get("tool_calls") and row["messages"][place].get("train") is not False:
                spoken = {"role": message["role"], "content": "text"}
                turns = [*messages[:place], spoken, *messages[place + 1 :]]
                _apply_template(tokenizer, turns, options, "chat", tools, answering=False)
    except WrongInput as error:
        return str(error)
    parts = [(f"the tool {name}", name) for name in map(name_tool, tools or [])]
    for message in messages:
        # Earlier turns lose their reasoning, as templates of reasoning models have it.
        content = str(message.get("content") or "").rpartition(THOUGHT)[2].strip()
        parts.append((f"a turn of the role {message['role']}", content))
        names = map(name_tool, message.get("tool_calls") or [])
        parts += [(f"a call of {name}", name) for name in names]
    for what, part in parts:
        if not holds(text, part):
            return f"the chat template leaves out {what}"
    if messages[-1]["role"] != "assistant":
        return ""
    prompt = render(tokenizer, messages[:-1], options, tools=tools)
    if not text.startswith(prompt):
        written = prompt[len(commonprefix([prompt, text])) :]
        return f"the chat template asks with {written[:60]!r}, which no answer is trained after"
    answer = str(messages[-1].get("content") or "").rpartition(THOUGHT)[2].strip()
    kept = holds(text[len(prompt) :], answer)
    return "" if kept else "the chat template leaves out the answer"


def holds(text: str, part: str) -> bool:
    """Whether a text holds a part, as it is or as JSON writes it."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def name_tool(tool: dict[str, Any]) -> str:
    return str((tool.get("function") or tool).get("name") or "")


def tokens(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
    form: str = "chat",
    tools: list[Any] | None = None,
) -> list[int]:
    """The token ids of `render`; the template brings its own special tokens, so none are added."""
    text = render(tokenizer, messages, options, form, tools)
    return tokenizer.encode(text, add_special_tokens=False)
