"""The only place where a conversation becomes text: for training, scoring, chat and serving.

Axolotl renders with the tokenizer's chat template, or with the one that a config names, and with
the config's `chat_template_kwargs`. A run's saved tokenizer carries the template of its training
(see `with_template`), so `render` calls the same template with the same options.
`tests/test_train.py` and `tests/test_catalogue.py` compare the two token by token.

For an adapter trained on another format (FinLoRA's) a template writes that format; a merged or
served model carries it as its own.
"""

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
