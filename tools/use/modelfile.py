"""Writes a Modelfile, with which Ollama imports a merged model with the prompts of its training.

    ollama create my-model -f runs/smollm2-135m/sentiment_r4/merged-16bit/Modelfile

Ollama renders prompts with a Go template, not with the tokenizer's Jinja template. The Go template
here is built from the texts that the Jinja template writes around the turns of a few conversations,
and it is compared with the Jinja template on others.
"""

import json
from dataclasses import dataclass
from typing import Any

from tools import prompts
from tools.common import WrongInput

Turns = list[tuple[str, str]]  # (role, text)
# Conversations that a derived template must render as the Jinja template does.
TRIALS: list[list[str]] = [
    ["user"],
    ["user", "assistant", "user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around turns; None where it has no place for a system turn."""

    before_user: str  # before a first turn of the user
    before_answer: str  # between a turn of the user and its answer
    after_answer: str  # between an answer and the next turn of the user
    end: str  # after the last turn of the user: where the model answers
    before_system: str | None = None
    after_system: str | None = None  # up to the user's turn

    def render(self, turns: Turns) -> str:
        """A conversation that ends with the user, as the Go template renders it."""
        text = "" if turns[0][0] == "system" else self.before_user
        for role, content in turns:
            before, after = self.find_surroundings(role)
            text += before + content + after
        return text + self.end

    def find_surroundings(self, role: str) -> tuple[str, str]:
        """The texts before and after a turn of a role."""
        if role == "system":
            return self.before_system or "", self.after_system or ""
        return (self.before_answer, self.after_answer) if role == "assistant" else ("", "")

    def write_go(self) -> str:
        """The template as Ollama takes it. All text stands in actions, so no space is added."""
        system = [
            '{{- if eq $turn.Role "system" }}',
            f"{write_action(self.before_system or '')}{{{{ $turn.Content }}}}"
            f"{write_action(self.after_system or '')}",
            '{{- else if eq $turn.Role "user" }}',
        ]
        return "\n".join(
            [
                "{{- range $place, $turn := .Messages }}",
                "{{- $last := eq (len (slice $.Messages $place)) 1 }}",
                *(system if self.before_system is not None else ['{{- if eq $turn.Role "user" }}']),
                f"{{{{- if eq $place 0 }}}}{write_action(self.before_user)}{{{{- end }}}}"
                f"{{{{- $turn.Content }}}}"
                f"{{{{- if $last }}}}{write_action(self.end)}{{{{- end }}}}",
                '{{- else if eq $turn.Role "assistant" }}',
                f"{write_action(self.before_answer)}{{{{- $turn.Content }}}}"
                f"{{{{- if not $last }}}}{write_action(self.after_answer)}{{{{- end }}}}",
                "{{- end }}",
                "{{- end }}",
            ]
        )


def write_action(text: str) -> str:
    """The action of a Go template that writes a text; Go reads strings of JSON."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def derive_pieces(tokenizer: Any, options: dict[str, Any] | None = None) -> Pieces:
    """The pieces of a tokenizer's chat template.

    options: of the chat template. Raises WrongInput where the template writes more than texts
    around turns.
    """

    def render(roles: list[str]) -> tuple[str, Turns]:
        turns = [(role, f"TEXT{place}OF{role.upper()}") for place, role in enumerate(roles)]
        messages = [{"role": role, "content": text} for role, text in turns]
        return drop_start(tokenizer, prompts.render(tokenizer, messages, options)), turns

    def cut(roles: list[str]) -> list[str]:
        text, turns = render(roles)
        pieces = []
        for _, content in turns:
            piece, separator, text = text.partition(content)
            pieces.append(piece if separator else "")
        return [*pieces, text]

    def is_right(pieces: Pieces, trials: list[list[str]]) -> bool:
        return all(pieces.render(turns) == text for text, turns in map(render, trials))

    before_user, before_answer, after_answer, end = cut(["user", "assistant", "user"])
    pieces = Pieces(before_user, before_answer, after_answer, end)
    if not is_right(pieces, TRIALS[:2]):
        raise WrongInput("the chat template is not made of texts around turns, as Ollama needs it")
    try:
        before_system, after_system, _ = cut(["system", "user"])
        full = Pieces(before_user, before_answer, after_answer, end, before_system, after_system)
        return full if is_right(full, TRIALS) else pieces
    except WrongInput:  # the template refuses a system turn
        return pieces


def drop_start(tokenizer: Any, text: str) -> str:
    """A prompt without the token that llama.cpp and Ollama put before it themselves."""
    first = tokenizer("")["input_ids"][:1]
    return text.removeprefix(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else text


def list_stops(tokenizer: Any, generation: Any) -> list[str]:
    """The tokens that end an answer, by the tokenizer and by the model's generation config."""
    ids = generation.eos_token_id
    ids = [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    return [tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys(ids) if i is not None]


def write_modelfile(source: str, pieces: Pieces, stops: list[str], context: int) -> str:
    """The text of a Modelfile. `source` is a GGUF file, or "." for the folder's safetensors."""
    lines = ["# ollama create my-model -f Modelfile"]
    if pieces.before_system is None:
        lines.append("# The chat template has no place for a system turn: it is left out.")
    # Answers as they are scored: the likeliest tokens, and no penalty on those that were used.
    parameters = [("temperature", "0"), ("repeat_penalty", "1"), ("num_ctx", str(context))]
    parameters += [("stop", json.dumps(stop, ensure_ascii=False)) for stop in stops]
    lines += [f"FROM {source}", f'TEMPLATE """{pieces.write_go()}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    return "\n".join(lines) + "\n"
