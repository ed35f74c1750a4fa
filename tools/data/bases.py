"""Counts the tokens of chat rows for the bases of the catalogue that are on this machine.

    for base in list_bases():
        base.name, base.count_tokens([{"messages": [...]}])

The tokenizer comes from tokenizers alone, the template from Jinja: AutoTokenizer loads torch, which
takes longer than reading most files.
"""

from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tools import architectures, prompts, recipes
from tools.common import WrongInput, read_json


@cache
def read_tokenizer(file: Path) -> Any:
    """The tokenizer in a tokenizer.json, which neither cuts texts nor pads them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class BaseTokenizer:
    """The tokenizer and the chat template of a base, as its recipes use them."""

    def __init__(self, name: str, base: str, settings: dict[str, Any]):
        self.name = self.name_or_path = name
        file = architectures.find_file(base, "tokenizer.json")
        assert file
        self.file: Path = file
        config = self.read_config("tokenizer_config.json")
        template = architectures.find_file(base, "chat_template.jinja")
        text = template.read_text(encoding="utf-8") if template else config.get("chat_template")
        text = settings.get("chat_template_jinja") or text
        self.chat_template = text if isinstance(text, str) else None
        self.options = settings.get("chat_template_kwargs") or {}
        tokens = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token")}
        tokens |= settings.get("special_tokens") or {}
        self.tokens = {
            key: token["content"] if isinstance(token, dict) else token
            for key, token in tokens.items()
            if token
        }

    def read_config(self, name: str) -> dict[str, Any]:
        path = self.file.with_name(name)
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.file)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """The text of turns, as transformers' tokenizers of the same name render it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options.pop("tokenize", None)
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self.tokens | options,
        )
        return str(texts[0])

    def render(self, chat: dict[str, Any]) -> str:
        """The text of a whole chat row; raises WrongInput where the template refuses it."""
        return prompts.render_row(self, chat, self.options)

    def count_tokens(self, chats: list[dict[str, Any]]) -> list[int | str]:
        """The tokens of each chat row, or why the template cannot render it."""
        counts: list[int | str] = []
        texts: list[str] = []
        for chat in chats:
            try:
                texts.append(self.render(chat))
                counts.append(0)
            except WrongInput as error:
                counts.append(str(error))
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [count if isinstance(count, str) else len(next(encoded)) for count in counts]

    def find_offsets(self, text: str) -> list[tuple[int, int]]:
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return [(int(start), int(end)) for start, end in offsets]

    def count_overhead(self, turns: int) -> int:
        """Bytes that the template adds to a row of so many turns, at the most."""
        first, more = self.overhead
        return first + more * turns

    @cached_property
    def overhead(self) -> tuple[int, int]:
        pair = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        sizes = [len(self.render({"messages": pair * count}).encode()) for count in (1, 2)]
        return sizes[0], max(sizes[1] - sizes[0], 32)


def list_bases() -> list[BaseTokenizer]:
    """The tokenizers of the catalogue's bases that are at hand, one for each different file."""
    bases: dict[Path, BaseTokenizer] = {}
    for name, row in recipes.read_matrix()["models"].items():
        base = row.get("base_model", row["hub"])
        if architectures.find_file(base, "tokenizer.json"):
            tokenizer = BaseTokenizer(name, base, row["settings"])
            if tokenizer.chat_template:
                bases.setdefault(tokenizer.file.resolve(), tokenizer)
    return list(bases.values())


def name_missing(bases: Iterable[BaseTokenizer]) -> list[str]:
    """The models of the catalogue whose tokenizer is not at hand."""
    files = {base.file for base in bases}
    return [
        name
        for name, row in recipes.read_matrix()["models"].items()
        if architectures.find_file(row.get("base_model", row["hub"]), "tokenizer.json") not in files
    ]
