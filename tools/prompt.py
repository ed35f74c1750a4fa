"""The one place where a conversation becomes text: training, scoring, chat and serving agree on it.

Axolotl renders with the tokenizer's chat template (`chat_template: tokenizer_default`); `render`
calls the same template of the same tokenizer. `tests/test_train.py` compares the two to the token.
"""

from typing import Any


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The prompt for `messages` ([{"role", "content"}, …]) up to where the assistant answers."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of `render`; the template brings its own special tokens, so none are added."""
    return tokenizer.encode(render(tokenizer, messages), add_special_tokens=False)
