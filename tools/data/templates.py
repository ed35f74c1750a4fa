"""Splits prompts into a template, the sentences that recur in their file, and the rest.

    "Instruction: Good or bad? Input: Sales rose. Answer:"
 →  "Instruction: Good or bad? … Answer:" and "input sales rose"

Prompts with an unusual template, or with nothing beside it, are findings.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator

from tools.common import spell_out
from tools.data.parts import EXAMPLES, Finding, Part, count_noun, normalize

SENTENCE = re.compile(r"(?<=[.:?!])\s+|\n+|(?<=Answer:)")
PLACEHOLDER = re.compile(r"(?:nan|none|null|n a|na|undefined)?")  # of an empty cell
TEMPLATE_SHARE = 0.01  # of the prompts hold a sentence of a template
OUTLIER_SHARE = 0.005  # of the rows use an outlier at most
NEAR_CHARS = 2_000  # that are compared of a long prompt: its first and last half


def check_templates(part: Part) -> Iterator[Finding]:
    """Finds prompts that follow no usual template or ask for nothing; sets the part's `texts`."""
    common, rows = find_common_sentences(part.prompts), len(part.prompts)
    part.texts = [extract_text(prompt, common) for prompt in part.prompts]
    templates = [find_template(prompt, common) for prompt in part.prompts]
    used = Counter(templates).most_common()
    part.report["templates"] = {
        "distinct": len(used),
        "most_common": [{"rows": count, "text": spell_out(text)} for text, count in used[:5]],
    }
    odd = [(text, count) for text, count in used if count < OUTLIER_SHARE * rows]
    count, usual = sum(count for _, count in odd), len(used) - len(odd)
    # If most prompts differ, there is no template.
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
    """Returns the marks of the sentences that recur."""
    counts: Counter[int] = Counter()
    for prompt in prompts:
        counts.update({zlib.crc32(text.encode()) for text in split_sentences(prompt)})
    least = max(3, TEMPLATE_SHARE * len(prompts))
    return {mark for mark, count in counts.items() if count >= least}


def split_sentences(prompt: str) -> list[str]:
    """Splits a prompt into sentences, without the middle of a long one."""
    sentences = [text for text in SENTENCE.split(prompt) if text]
    return sentences if len(sentences) <= 40 else sentences[:20] + sentences[-20:]


def find_template(prompt: str, common: set[int]) -> str:
    """Returns the sentences of a prompt that recur in its file, with … for the others."""
    pieces: list[str] = []
    for text in split_sentences(prompt):
        is_common = zlib.crc32(text.encode()) in common
        if is_common or pieces[-1:] != ["…"]:
            pieces.append(text if is_common else "…")
    return " ".join(pieces)[:600]


def extract_text(prompt: str, common: set[int]) -> str:
    """Returns a prompt without its template, as letters, digits and single spaces."""
    texts = [text for text in SENTENCE.split(prompt) if zlib.crc32(text.encode()) not in common]
    text = re.sub(r"\W+", " ", normalize(" ".join(filter(None, texts)))).strip()
    return text if len(text) <= NEAR_CHARS else text[: NEAR_CHARS // 2] + text[-NEAR_CHARS // 2 :]
