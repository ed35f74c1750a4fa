"""What a step computes: logits at labels only, the order of rows, shares of a micro-batch.

How rows are packed is in tools/packs.py and tools/train/shared_prefix.py.
"""

from typing import Any

from tools.train.callbacks import Progress
from tools.train.ranks import read_rank


def compute_answer_logits_only(model: Any) -> None:
    """Lets a causal model compute logits only where some row of the batch has a label.

    The loss ignores every other position, so it stays the same; what is saved is the product with
    the vocabulary matrix, its gradient and their memory. Shapes: labels (batch, length) of token
    ids or -100; transformers' `logits_to_keep` takes the column indices, `shift_labels` the labels
    of those columns, already moved by one.
    """
    import torch

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        if labels is None or "segment_lengths" in kwargs:  # a pack has logits at its labels alone
            return None
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        columns = (shifted != -100).any(0).nonzero().flatten()
        if len(columns) == 0:
            return None
        chosen = {"logits_to_keep": columns, "shift_labels": shifted[:, columns].contiguous()}
        return args, kwargs | chosen

    model.register_forward_pre_hook(before, with_kwargs=True)


def order_by_epoch(trainer: Any) -> None:
    """Draws the order of `group_by_length` from the seed and the epoch.

    transformers draws it from the global random state, which dropout moves: a training resumed
    after its first epoch would see its rows in another order, and each of several processes in one
    of its own. The groups are those of one process, so the order is, too.
    """
    import torch
    from torch.utils.data import Sampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    make = trainer._get_train_sampler

    class ByEpoch(Sampler):
        def __init__(self, inner: Any):
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Any:
            epoch = int(trainer.state.epoch or 0)
            self.inner.generator = torch.Generator().manual_seed(trainer.args.seed + epoch)
            return iter(self.inner)

    def sampler(dataset: Any = None) -> Any:
        inner = make(dataset)
        if not isinstance(inner, LengthGroupedSampler):
            return inner
        inner.batch_size *= read_rank("WORLD_SIZE")
        return ByEpoch(inner)

    trainer._get_train_sampler = sampler


def count_real_tokens(trainer: Any, progress: "Progress") -> None:
    """Counts the tokens of each batch's rows that are no padding, in this process."""
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if model.training:
            mask, packed = inputs.get("attention_mask"), inputs.pop("real_tokens", None)
            real = inputs["labels"].numel() if mask is None else mask.sum()
            progress.real_tokens += real if packed is None else packed
        return compute(model, inputs, return_outputs=return_outputs, **kwargs)

    trainer.compute_loss = compute_loss


def weigh_parts(trainer: Any, parts: int) -> None:
    """Where `parts` processes share a micro-batch, lets their mean loss be that of the whole one.

    The loss is a mean over answer tokens. A process's mean counts by its share of the tokens, so
    that the gradient, averaged over the processes, is that of the undivided micro-batch.
    """
    import torch
    import torch.distributed as dist

    groups = [
        dist.new_group(list(range(first, first + parts)))
        for first in range(0, read_rank("WORLD_SIZE"), parts)
    ]
    group, compute = groups[read_rank("RANK") // parts], trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        # Packed rows have, for each token, the label of the next one.
        own = (inputs["labels"][:, 0 if "segment_lengths" in inputs else 1 :] != -100).sum()
        found = compute(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training:
            return found
        total = own.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        scale = (own * parts / total).to(torch.float32)
        return (found[0] * scale, found[1]) if return_outputs else found * scale

    trainer.compute_loss = compute_loss
