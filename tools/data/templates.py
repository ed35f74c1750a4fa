"""Splits prompts into the sentences that recur in their file, the template, and those that do not.

find_template("Instruction: … Input: Sales rose.\\nAnswer:", part)    "Instruction: … … Answer:"
extract_variable_text(the same)                                       "sales rose"
"""

import re
import zlib
from array import array
from collections.abc import Iterator

from tools.data.parts import EXAMPLES, Finding, Part, count_noun, escape, normalize

SENTENCE = re.compile(r"(?<=[.:?!])\s+|\n+|(?<=Answer:)")
PLACEHOLDER = re.compile(r"(?:nan|none|null|n a|na|undefined)?")  # of a cell that was empty
SENTENCES = 200_000  # sentences that are counted at a time; beyond, those seen once are dropped
TEMPLATES = 1_000  # that are told apart in a file
TEMPLATE_SHARE = 0.01  # a sentence that this share of the prompts hold is part of a template
OUTLIER_SHARE = 0.005  # a template that fewer rows use is an outlier
NEAR_CHARS = 2_000  # characters that are compared of a long prompt: its first and last half


def count_sentences(prompt: str, part: Part) -> None:
    part.sentences.update({zlib.crc32(text.encode()) for text in split_sentences(prompt)})
    if len(part.sentences) > SENTENCES:  # what is common is seen twice before long
        for mark in [mark for mark, count in part.sentences.items() if count == 1]:
            del part.sentences[mark]


def choose_common_sentences(part: Part) -> None:
    """Keeps the sentences that recur, once all are counted."""
    least = max(3, TEMPLATE_SHARE * len(part.lines))
    part.common = {mark for mark, count in part.sentences.items() if count >= least}
    part.sentences.clear()


def split_sentences(prompt: str) -> list[str]:
    """The sentences that a template is made of; the middle of a long prompt is left out."""
    sentences = [text for text in SENTENCE.split(prompt) if text]
    return sentences if len(sentences) <= 40 else sentences[:20] + sentences[-20:]


def find_template(prompt: str, part: Part) -> str:
    """The sentences of a prompt that recur in its file, with … for the others."""
    pieces: list[str] = []
    for text in split_sentences(prompt):
        is_common = zlib.crc32(text.encode()) in part.common
        if is_common or pieces[-1:] != ["…"]:
            pieces.append(text if is_common else "…")
    template = " ".join(pieces)[:600]
    has_room = template in part.templates or len(part.templates) < TEMPLATES
    return template if has_room else "(others)"


def extract_variable_text(prompt: str, part: Part) -> str:
    """The rest of a prompt beside its template, as letters, digits and single spaces."""
    texts = [t for t in SENTENCE.split(prompt) if t and zlib.crc32(t.encode()) not in part.common]
    text = re.sub(r"\W+", " ", normalize(" ".join(texts))).strip()
    return text if len(text) <= NEAR_CHARS else text[: NEAR_CHARS // 2] + text[-NEAR_CHARS // 2 :]


class TemplateCheck:
    """Counts the templates of a file, and the prompts that ask for nothing."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.first_rows: dict[str, int] = {}  # of each template
        self.empty_rows = array("I")

    def add(self, row: int, prompt: str, variable_text: str) -> None:
        template = find_template(prompt, self.part)
        self.part.templates[template] += 1
        self.first_rows.setdefault(template, row)
        if PLACEHOLDER.fullmatch(variable_text):
            self.empty_rows.append(row)

    def findings(self) -> Iterator[Finding]:
        part, rows = self.part, len(self.part.lines)
        used = part.templates.most_common()
        part.report["templates"] = {
            "distinct": len(used),
            "most_common": [{"rows": count, "text": escape(text)} for text, count in used[:5]],
        }
        odd = [(text, count) for text, count in used if count < OUTLIER_SHARE * rows]
        count, usual = sum(count for _, count in odd), len(used) - len(odd)
        # Where most prompts differ there is no template to be out of.
        if odd and count < 0.1 * rows:
            text = count_noun(count, "prompt follows", "prompts follow") + " none of the "
            text += count_noun(usual, "usual template", "usual templates")
            examples = [self.first_rows[template] for template, _ in odd[:EXAMPLES]]
            yield part.finding(("note", "template", "medium"), text, count, examples)
        empty = len(self.empty_rows)
        if 0 < empty < 0.1 * rows:
            text = count_noun(empty, "prompt asks", "prompts ask")
            text += " for nothing: a placeholder, like nan"
            grade = ("warning", "empty", "high")
            yield part.finding(grade, text, empty, self.empty_rows[:EXAMPLES])
