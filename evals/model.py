"""lm-eval's transformers model, with batches filled to a number of tokens and a shared prefix.

It also reports how likely each label was as the answer's first token.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer

from evals.answers import Progress
from tools import prompts as prompt

SHORTEST_PREFIX = 16  # tokens; sharing a shorter one saves nothing
# Tokens of a batch, prompts and answers: enough to keep two cores, or a GPU, busy. More would only
# pad rows of more different lengths.
TOKENS = {"cpu": 1024, "cuda": 16384}
CACHED = 16384  # tokens whose keys and values a batch holds, the shared prefix's once for each row


def common_prefix(rows: list[list[int]]) -> int:
    """How many leading tokens all rows share, at most one less than the shortest row has."""
    first, last = min(rows), max(rows)  # rows sorted between these share what these share
    longest = min(map(len, rows)) - 1
    return next((at for at in range(longest) if first[at] != last[at]), longest)


def first_tokens(tokenizer: Any, labels: Sequence[str]) -> dict[str, list[int]]:
    """The tokens that an answer with each label can begin with; {} where two labels share one.

    A label may begin with a capital, and follow a space.
    """
    by_label = {}
    for label in labels:
        spellings = (label, label[:1].upper() + label[1:])
        texts = [space + spelling for space in ("", " ") for spelling in spellings]
        ids = {tokenizer.encode(text, add_special_tokens=False)[0] for text in texts}
        by_label[label] = sorted(ids)
    tokens = [token for ids in by_label.values() for token in ids]
    return by_label if len(by_label) > 1 and len(tokens) == len(set(tokens)) else {}


class FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Records the probabilities of labels at the first new token, as shares of one, by row."""

    def __init__(self, tokens: dict[str, list[int]]):
        self.tokens = tokens
        self.shares: list[dict[str, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.shares:
            logs = scores.float().log_softmax(-1)
            by_label = [logs[:, tokens].logsumexp(-1) for tokens in self.tokens.values()]
            rows = torch.stack(by_label, 1).softmax(1).tolist()
            self.shares = [dict(zip(self.tokens, row, strict=True)) for row in rows]
        return scores


class Model(Progress, HFLM):
    """Answers with a loaded model. `rows` is how many answers are to come, for the progress line.

    Where `labels` are set, `probabilities` gets those of each answer, in the order of the calls of
    the cache hook.
    """

    def __init__(self, model: Any, tokenizer: Any, label: str, rows: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.expect(label, rows)
        # Sliding windows, chunks and linear attention do not keep all of a prefix.
        layers = DynamicCache(config=model.config).layers
        self.share = all(type(layer) is DynamicLayer for layer in layers)
        head = model.get_output_embeddings()
        if not head._forward_pre_hooks:
            # The rows' last tokens are a slice, which torch would multiply row by row.
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        self.tokens = TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        self.labels: Sequence[str] = ()
        self.probabilities: list[dict[str, float]] = []

    @property
    def max_length(self) -> int:
        """The context in tokens; a multimodal model has it in its text model's config."""
        config = self.model.config.get_text_config(decoder=True)
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        sizes = (getattr(config, name, None) for name in names)
        return next((int(size) for size in sizes if size), super().max_length)

    def batch_size_of(self, longest: int, shared: int, budget: int) -> int:
        """How many rows of at most `longest` tokens go together."""
        whole = longest + budget
        return max(1, min(self.tokens // (whole - shared), CACHED // whole))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return prompt.render(self.tokenizer, chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The answers to requests of one task, which share their settings.

        The prefix of all prompts (the system turn, the instruction) goes through the model once.
        """
        settings = requests[0].args[1]
        rest = normalize_gen_kwargs(settings, self.max_gen_toks)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(rest.pop("until", None), eos=end)
        budget = rest.pop("max_gen_toks")
        labels = first_tokens(self.tokenizer, self.labels)
        texts = [request.args[0] for request in requests]
        prompts = [self.tok_encode(text)[-(self.max_length - budget) :] for text in texts]
        prefix = self._prefix(prompts)
        shared = prefix.get_seq_length() if prefix else 0
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        answers = [""] * len(prompts)
        while order:
            size = self.batch_size_of(len(prompts[order[0]]), shared, budget)
            batch, order = order[:size], order[size:]
            context, mask = self._padded([prompts[row] for row in batch], shared)
            first = FirstToken(labels)
            if prefix:
                rest["past_key_values"] = copy.deepcopy(prefix)
                rest["past_key_values"].batch_repeat_interleave(len(batch))
            generated = self._model_generate(
                context=context,
                attention_mask=mask,
                max_length=context.shape[1] + budget,
                stop=stop,
                logits_processor=LogitsProcessorList([first] if labels else []),
                **rest,
            )
            self.probabilities += first.shares
            new = generated[:, context.shape[1] :].tolist()
            for row, answer in zip(batch, map(self.tok_decode, new), strict=True):
                answers[row] = postprocess_generated_text(answer, stop, None)
                self.cache_hook.add_partial("generate_until", (texts[row], settings), answers[row])
            self.progress(len(batch))
        return answers

    def _prefix(self, prompts: list[list[int]]) -> Any:
        """The keys and values of the prompts' shared prefix; None where sharing saves nothing."""
        shared = common_prefix(prompts) if self.share and len(prompts) > 1 else 0
        if shared < SHORTEST_PREFIX:
            return None
        ids = torch.tensor([prompts[0][:shared]], device=self.device)
        with torch.inference_mode():
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return output.past_key_values if type(output.past_key_values) is DynamicCache else None

    def _padded(self, rows: list[list[int]], shared: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, length) int64 prompts and their mask, with the padding behind `shared` tokens."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [row[:shared] + [pad] * (longest - len(row)) + row[shared:] for row in rows]
        mask = torch.ones((len(rows), longest), dtype=torch.long)
        for number, row in enumerate(rows):
            mask[number, shared : shared + longest - len(row)] = 0
        return torch.tensor(ids, device=self.device), mask.to(self.device)
