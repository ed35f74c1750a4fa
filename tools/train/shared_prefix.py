"""Trains on each token once: rows that begin alike share the computation of their beginning.

    python -m tools profile RECIPE          says whether a recipe is trained so, and why

The rows of a step become one sequence without padding. What several rows begin with stands in it
once, and each row attends to its own beginning and to itself; positions count within the row. A
token's hidden state depends only on the tokens before it, so loss and gradients are those of padded
rows (docs/shared-prefix.md). Of a row only the tokens that its loss depends on are computed: those
before its last label.
"""

from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.samplers import get_dataset_lengths

from tools.packs import IGNORED, Pack, Row, pack_rows
from tools.segments import Segments, attend_to_segments
from tools.train.ranks import read_rank

PLAIN_KEYS = {"input_ids", "attention_mask", "labels"}


def build_inputs(pack: Pack, device: Any) -> dict[str, torch.Tensor]:
    """A pack as tensors of shape (1, …), which a trainer passes to a model as keywords."""

    def tensor(values: list[Any]) -> torch.Tensor:
        return torch.tensor([values], device=device)

    return {
        "input_ids": tensor(pack.ids),
        "position_ids": tensor(pack.positions),
        "labels": tensor(pack.labels),
        "label_weights": tensor(pack.weights),
        "segment_lengths": tensor(pack.lengths),
        "path_lengths": tensor([len(path) for path in pack.paths]),
        "paths": tensor([place for path in pack.paths for place in path]),
    }


def read_rows(batch: dict[str, torch.Tensor], items: int | None = None) -> list[Row]:
    """The rows of a padded micro-batch, without those that have no label.

    Each label counts 1 / `items`, or without it 1 / the number of labels in the micro-batch.
    """
    masks = batch["attention_mask"].tolist()
    rows = []
    for ids, mask, labels in zip(
        batch["input_ids"].tolist(), masks, batch["labels"].tolist(), strict=True
    ):
        real = [place for place, bit in enumerate(mask) if bit]
        following = [labels[place] for place in real[1:]]
        end = max((at + 1 for at, label in enumerate(following) if label != IGNORED), default=0)
        if end:
            rows.append(([ids[place] for place in real[:end]], following[:end]))
    count = items or sum(label != IGNORED for _, labels in rows for label in labels)
    return [Row(ids, labels, 1 / count) for ids, labels in rows]


def accept_packs(model: Any) -> None:
    """Lets a causal model take what `build_inputs` gives, beside ordinary batches.

    Logits are computed where there is a label, and the loss is the weighted sum over the labels.
    """
    implementation = model.config.get_text_config()._attn_implementation
    attend_to_segments(implementation)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "segment_lengths" not in kwargs:
            return None
        kwargs = dict(kwargs)
        names = ("segment_lengths", "path_lengths", "paths")
        segments = Segments(*(kwargs.pop(name)[0] for name in names))
        labels, weights = kwargs.pop("labels")[0], kwargs.pop("label_weights")[0]
        places = (labels != IGNORED).nonzero().flatten()
        if implementation == "sdpa":
            segments.pad()
        trained = {"packed_labels": labels[places], "packed_weights": weights[places]}
        extra = {"attention_mask": segments.mask, "logits_to_keep": places, "segments": segments}
        return args, kwargs | extra | trained

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if "packed_labels" not in kwargs:  # the packs of scoring have segments as well
            return None
        logits = output.logits[0].float()
        losses = torch.nn.functional.cross_entropy(
            logits, kwargs["packed_labels"], reduction="none"
        )
        return type(output)(loss=(losses * kwargs["packed_weights"]).sum(), logits=output.logits)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)


def find_window(config: Any) -> int | None:
    """How many tokens a model's sliding windows hold; None where all of its attention is full."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    return window if "sliding_attention" in kinds else None


@dataclass(frozen=True)
class Packer:
    """Packs the micro-batches of a step where that is exact and saves tokens."""

    window: int | None = None  # of the model's sliding attention
    budget: int = 0  # tokens up to which micro-batches of a step are merged

    def pack_step(
        self, batches: list[dict[str, torch.Tensor]], items: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """As many micro-batches as there were; those that were merged into a later one are empty.

        The trainer divides the sum of their losses by their number, where `items`, the labels of
        the whole step, are not given.
        """
        packed: list[dict[str, torch.Tensor]] = []
        waiting: list[dict[str, torch.Tensor]] = []
        for batch in batches:
            if self.budget and waiting and self.pack([*waiting, batch], self.budget, items):
                waiting.append(batch)
                continue
            packed += self.finish(waiting, items)
            waiting = [batch]
        packed += self.finish(waiting, items)
        # The last one of a step must be a real one: the trainer synchronizes the gradients there.
        device = batches[0]["input_ids"].device if batches else None
        empty = {"input_ids": torch.empty((1, 0), dtype=torch.int64, device=device)}
        return [empty] * (len(batches) - len(packed)) + packed

    def pack(self, batches: list[dict[str, torch.Tensor]], most: int, items: Any) -> Pack | None:
        """Micro-batches as one pack; None where that is not exact or takes over `most` tokens."""
        if any(batch.keys() != PLAIN_KEYS for batch in batches):
            return None
        rows = [row for batch in batches for row in read_rows(batch, items and int(items))]
        if not rows or (self.window and max(len(row.ids) for row in rows) > self.window):
            return None
        pack = pack_rows(rows)
        return pack if len(pack.ids) <= most else None

    def finish(self, batches: list[dict[str, torch.Tensor]], items: Any) -> list[Any]:
        """[the pack of micro-batches that go together]; [the micro-batch] where it stays plain."""
        if not batches:
            return []
        padded = sum(batch["input_ids"].numel() for batch in batches)
        pack = self.pack(batches, padded, items)
        if pack is None:
            return batches
        ids = batches[0]["input_ids"]
        real = sum(batch["attention_mask"].sum() for batch in batches)
        return [build_inputs(pack, ids.device) | {"real_tokens": real}]


def count_largest(trainer: Any) -> int:
    """Tokens of the largest padded micro-batch: the one with the longest row."""
    longest = int(max(get_dataset_lengths(trainer.train_dataset), default=0))
    return longest * int(trainer.args.per_device_train_batch_size)


def share_prefixes(trainer: Any) -> None:
    """Lets a trainer pack the rows of each step. Evaluation keeps its batches.

    Micro-batches of a step are merged up to the tokens that the largest one would hold padded, so
    memory hardly grows. Several processes, and DeepSpeed, count micro-batches: there none are
    merged. bitsandbytes' int8 on a GPU picks its outlier columns by batch, so there neither.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    alone = read_rank("WORLD_SIZE") == 1 and not trainer.is_deepspeed_enabled
    by_batch = getattr(model, "is_loaded_in_8bit", False) and torch.cuda.is_available()
    merges = alone and not by_batch and trainer.args.gradient_accumulation_steps > 1
    packer = Packer(find_window(model.config), count_largest(trainer) if merges else 0)
    take, train = trainer.get_batch_samples, trainer.training_step

    def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
        batches, items = take(*args, **kwargs)
        return packer.pack_step(batches, items), items

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=trainer.args.device)
        return train(model, inputs, *args, **kwargs)

    trainer.get_batch_samples, trainer.training_step = get_batch_samples, training_step
