"""The one place where a conversation becomes text: training, scoring, chat and serving agree on it.

Axolotl renders with the tokenizer's chat template (`chat_template: tokenizer_default`) and a
recipe's `chat_template_kwargs`; `render` calls the same template of the same tokenizer with the
same. `tests/test_train.py` and `tests/test_catalogue.py` compare the two to the token.
"""

from typing import Any

# How a row's prompt is put to the model. `chat` is the base's chat template. FinLoRA's adapters
# were trained on `finlora`; `bare` is what it evaluates them on.
FORMATS = {"chat": "", "finlora": "[INST] {} [/INST]", "bare": "{}"}


def render(
    tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any] | None = None
) -> str:
    """The prompt for `messages` ([{"role", "content"}, …]) up to where the assistant answers.

    `options` are the recipe's `chat_template_kwargs`.
    """
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(options or {})
    )


def tokens(
    tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any] | None = None
) -> list[int]:
    """The token ids of `render`; the template brings its own special tokens, so none are added."""
    return tokenizer.encode(render(tokenizer, messages, options), add_special_tokens=False)
