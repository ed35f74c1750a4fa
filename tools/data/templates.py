"""Splits prompts into the sentences that recur in their file, the template, and those that do not.

    "Instruction: Good or bad? Input: Sales rose. Answer:"
 →  "Instruction: Good or bad? … Answer:" and "input sales rose"

Prompts that follow no usual template, or that hold nothing else, are findings.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator

from tools.data.parts import EXAMPLES, Finding, Part, count_noun, escape, normalize

SENTENCE = re.compile(r"(?<=[.:?!])\s+|\n+|(?<=Answer:)")
PLACEHOLDER = re.compile(r"(?:nan|none|null|n a|na|undefined)?")  # of a cell that was empty
TEMPLATE_SHARE = 0.01  # a sentence that this share of the prompts hold is part of a template
OUTLIER_SHARE = 0.005  # a template that fewer rows use is an outlier
NEAR_CHARS = 2_000  # characters that are compared of a long prompt: its first and last half


def check_templates(part: Part) -> Iterator[Finding]:
    """Prompts that follow no usual template or ask for nothing; sets the part's `texts`."""
    common, rows = find_common_sentences(part.prompts), len(part.prompts)
    part.texts = [extract_text(prompt, common) for prompt in part.prompts]
    templates = [find_template(prompt, common) for prompt in part.prompts]
    used = Counter(templates).most_common()
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
        examples = [templates.index(template) for template, _ in odd[:EXAMPLES]]
        yield part.finding(("note", "template", "medium"), text, count, examples)
    empty = [row for row, text in enumerate(part.texts) if PLACEHOLDER.fullmatch(text)]
    if 0 < len(empty) < 0.1 * rows:
        text = count_noun(len(empty), "prompt asks", "prompts ask")
        text += " for nothing: a placeholder, like nan"
        yield part.finding(("warning", "empty", "high"), text, len(empty), empty[:EXAMPLES])


def find_common_sentences(prompts: list[str]) -> set[int]:
    """Marks of the sentences that recur."""
    counts: Counter[int] = Counter()
    for prompt in prompts:
        counts.update({zlib.crc32(text.encode()) for text in split_sentences(prompt)})
    least = max(3, TEMPLATE_SHARE * len(prompts))
    return {mark for mark, count in counts.items() if count >= least}


def split_sentences(prompt: str) -> list[str]:
    """The sentences that a template is made of; the middle of a long prompt is left out."""
    sentences = [text for text in SENTENCE.split(prompt) if text]
    return sentences if len(sentences) <= 40 else sentences[:20] + sentences[-20:]


def find_template(prompt: str, common: set[int]) -> str:
    """The sentences of a prompt that recur in its file, with … for the others."""
    pieces: list[str] = []
    for text in split_sentences(prompt):
        is_common = zlib.crc32(text.encode()) in common
        if is_common or pieces[-1:] != ["…"]:
            pieces.append(text if is_common else "…")
    return " ".join(pieces)[:600]


def extract_text(prompt: str, common: set[int]) -> str:
    """The rest of a prompt beside its template, as letters, digits and single spaces."""
    texts = [text for text in SENTENCE.split(prompt) if zlib.crc32(text.encode()) not in common]
    text = re.sub(r"\W+", " ", normalize(" ".join(filter(None, texts)))).strip()
    return text if len(text) <= NEAR_CHARS else text[: NEAR_CHARS // 2] + text[-NEAR_CHARS // 2 :]
