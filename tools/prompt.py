"""The one place where a conversation becomes text: training, scoring, chat and serving agree on it.

Axolotl renders with the tokenizer's chat template (`chat_template: tokenizer_default`) and a
recipe's `chat_template_kwargs`; `render` calls the same template of the same tokenizer with the
same. `tests/test_train.py` and `tests/test_catalogue.py` compare the two to the token.

What was trained on another format than the base's chat template (FinLoRA's adapters) is rendered by
a template of that format, which a merged or served model carries as its own.
"""

from typing import Any

from tools.cli import WrongInput

# How a row's prompt is put to the model. `chat` is the base's chat template. FinLoRA's adapters
# were trained on `finlora`; `bare` is what it evaluates them on.
FORMATS = {"chat": "", "finlora": "[INST] {} [/INST]", "bare": "{}"}


def template(tokenizer: Any, form: str) -> str | None:
    """The chat template of a format; None for `chat`, where the tokenizer's own counts.

    It starts with the token that the tokenizer puts before every text, if it does: what was trained
    on plain text was trained behind it. An answer ends with the end token.
    """
    if form == "chat":
        return None
    start = tokenizer.bos_token_id
    first = tokenizer("")["input_ids"][:1]
    begin = tokenizer.bos_token if first and first[0] == start else ""
    before, after = FORMATS[form].split("{}")

    def literal(text: str) -> str:
        return "{{ " + repr(text) + " }}" if text else ""

    return (
        literal(begin)
        + "{% for message in messages %}"
        + "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] }}"
        + literal(tokenizer.eos_token or "")
        + "{% else %}"
        + literal(before)
        + "{{ message['content'] }}"
        + literal(after)
        + "{% endif %}{% endfor %}"
    )


def render(
    tokenizer: Any,
    messages: list[dict[str, str]],
    options: dict[str, Any] | None = None,
    form: str = "chat",
) -> str:
    """The prompt for `messages` ([{"role", "content"}, …]) up to where the assistant answers.

    `options` are the recipe's `chat_template_kwargs`, `form` is one of FORMATS. Raises WrongInput
    where the format is `chat` and the tokenizer has no chat template.
    """
    if form == "chat" and not tokenizer.chat_template:
        others = ", ".join(name for name in FORMATS if name != "chat")
        raise WrongInput(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; PROMPT_FORMAT= takes "
            f"another format: {others}"
        )
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template(tokenizer, form),
        tokenize=False,
        add_generation_prompt=True,
        **(options or {}),
    )


def tokens(
    tokenizer: Any,
    messages: list[dict[str, str]],
    options: dict[str, Any] | None = None,
    form: str = "chat",
) -> list[int]:
    """The token ids of `render`; the template brings its own special tokens, so none are added."""
    return tokenizer.encode(render(tokenizer, messages, options, form), add_special_tokens=False)
