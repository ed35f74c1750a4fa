"""Answers that can be nothing but labels, in transformers and behind vLLM's server.

    spell_labels(["up", "down"])                        ["up", "down", " up", " down"]
    Constraint(tokenizer, ["up", "down"], [2])          which tokens may come next

A model spells a label as it likes, with any tokens whose texts make it up. vLLM's structured
outputs leave it the same freedom, so that both give the same answers.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tools.common import WrongInput

if TYPE_CHECKING:
    from transformers import PrefixConstrainedLogitsProcessor

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in the vocabularies of SentencePiece
SPACE = "▁"  # a token of SentencePiece; vocabularies of bytes have no such letter


def spell_labels(labels: Sequence[str]) -> list[str]:
    """The answers that are allowed: some templates and formats were trained with a space before."""
    return [space + label for space in ("", " ") for label in labels]


def widen_budget(settings: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A task's generation settings with room for each label, spelled byte by byte, and its end."""
    longest = max(len(text.encode()) for text in spell_labels(labels))
    return settings | {"max_gen_toks": max(settings["max_gen_toks"], longest + 1)}


def request_choice(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a request that limit an answer of vLLM's server to labels.

    Today's servers ignore `guided_choice`, which earlier ones had, without a warning.
    """
    return {"structured_outputs": {"choice": spell_labels(labels)}}


def allow_labels(lm: Any, labels: Sequence[str]) -> None:
    """Limits the answers of an lm-eval model; raises WrongInput where its backend cannot."""
    if not hasattr(lm, "choices"):
        raise WrongInput("this BACKEND has no CONSTRAIN=1; BACKEND=transformers has")
    lm.choices = labels


def spell_tokens(tokenizer: Any) -> Iterator[tuple[int, bytes]]:
    """(token, its text) of each token that is no special one, as the tokenizer's file has them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    byte_by_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    has_bytes = SPACE not in vocabulary
    for text, token in vocabulary.items():
        if token in special:
            continue
        if text in added:
            yield token, text.encode()
        elif has_bytes:
            yield token, bytes(byte_by_letter[letter] for letter in text)
        elif byte := BYTE.fullmatch(text):
            yield token, bytes.fromhex(byte[1])
        else:
            yield token, text.replace(SPACE, " ").encode()


class Constraint:
    """Which tokens continue an answer to one of `labels`; `ends` are the tokens that end it."""

    def __init__(self, tokenizer: Any, labels: Sequence[str], ends: Collection[int]):
        self.texts = [text.encode() for text in spell_labels(labels)]
        self.ends = sorted(set(ends))
        parts = {
            text[start:end]
            for text in self.texts
            for start in range(len(text))
            for end in range(start + 1, len(text) + 1)
        }
        self.text_by_token = {
            token: text for token, text in spell_tokens(tokenizer) if text in parts
        }
        self.tokens: dict[bytes, list[int]] = {}
        for token, text in self.text_by_token.items():
            self.tokens.setdefault(text, []).append(token)
        self.places = {text: self.find_places(text) for text in self.texts}
        for label in labels:
            if all(0 not in self.places[text.encode()] for text in spell_labels([label])):
                raise WrongInput(f'CONSTRAIN=1: the tokenizer cannot spell the label "{label}"')
        self.list_next = cache(self._list_next)

    def find_places(self, text: bytes) -> set[int]:
        """The places in a text from which tokens spell the rest of it."""
        places = {len(text)}
        for start in reversed(range(len(text))):
            if any(text[start:end] in self.tokens for end in places):
                places.add(start)
        return places

    def _list_next(self, answer: bytes) -> list[int]:
        """The tokens that may follow the beginning of an answer."""
        tokens = {
            token
            for text in self.texts
            if text.startswith(answer)
            for end in self.places[text]
            if end > len(answer)
            for token in self.tokens.get(text[len(answer) : end], ())
        }
        return sorted(tokens) + (self.ends if answer in self.texts else [])

    def begin_at(self, width: int) -> "PrefixConstrainedLogitsProcessor":
        """The logits processor for prompts of `width` tokens, padding included."""
        from transformers import PrefixConstrainedLogitsProcessor

        def list_allowed(_: int, ids: Any) -> list[int]:
            answer = ids[width:].tolist()
            if not self.text_by_token.keys() >= set(answer):  # it has ended, and is padded
                return self.ends
            return self.list_next(b"".join(map(self.text_by_token.__getitem__, answer)))

        return PrefixConstrainedLogitsProcessor(list_allowed, num_beams=1)


def build_constraint(model: Any, tokenizer: Any, labels: Sequence[str]) -> Constraint:
    """The constraint for a model of transformers, whose answers end as its config says."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Constraint(tokenizer, labels, [tokenizer.eos_token_id, *ends])
