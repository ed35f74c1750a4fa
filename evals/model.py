"""lm-eval's transformers model with this project's prompt, progress line and shared prefix."""

import copy
import sys
import time
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from tools import prompt

SHORTEST_PREFIX = 16  # tokens; computing a shorter one apart saves nothing


def common_prefix(context: torch.Tensor, mask: torch.Tensor) -> int:
    """How many leading tokens all rows share, one less than the shortest row at most.

    context, mask: (rows, length) int64, padded on the left.
    """
    lengths = mask.sum(1)
    shortest = int(lengths.min())
    starts = context.shape[1] - lengths
    heads = torch.stack(
        [row[start:][:shortest] for row, start in zip(context, starts, strict=True)]
    )
    same = (heads == heads[:1]).all(0).long().cumprod(0)
    return min(int(same.sum()), shortest - 1)


class Model(HFLM):
    """Scores a loaded model. `rows` is how many answers are to come, for the progress line."""

    def __init__(self, model: Any, tokenizer: Any, batch: int, label: str, rows: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.label, self.rows, self.done, self.start = label, rows, 0, time.monotonic()
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        self.share = kinds == {"full_attention"}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return prompt.render(self.tokenizer, chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Answers for (rows, length) prompts padded on the left: (rows, length + new tokens).

        What all prompts begin with (the system turn, the instruction) goes through the model once:
        its keys and values are repeated for every row, and each row's padding moves behind it.
        """
        mask = kwargs["attention_mask"]
        shared = common_prefix(context, mask) if self.share and len(context) > 1 else 0
        if shared >= SHORTEST_PREFIX:
            moved, moved_mask = context.clone(), mask.clone()
            for row, length in enumerate(mask.sum(1).tolist()):
                pad = context.shape[1] - length
                moved[row, :shared] = context[row, pad : pad + shared]
                moved[row, shared : shared + pad] = self.tokenizer.pad_token_id
                moved_mask[row, :shared], moved_mask[row, shared : shared + pad] = 1, 0
            with torch.inference_mode():
                cache = self.model(input_ids=moved[:1, :shared], use_cache=True).past_key_values
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(context))
            kwargs |= {"attention_mask": moved_mask, "past_key_values": cache}
            context = moved
        answers = super()._model_generate(context, max_length, stop, **kwargs)
        self._progress(len(context))
        return answers

    def _progress(self, rows: int) -> None:
        self.done += rows
        seconds = time.monotonic() - self.start
        text = f"eval       {self.label} {self.done}/{self.rows} rows, {self.done / seconds:.1f}/s"
        last = self.done >= self.rows
        if sys.stdout.isatty():
            print(f"\r{text:<70}", end="\n" if last else "", flush=True)
        elif last or self.done // 160 != (self.done - rows) // 160:
            print(text, flush=True)
