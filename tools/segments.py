"""Attention in a packed sequence: a segment attends to the beginnings of its rows and to itself."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MOST_PADDING = 4  # times the pairs of query and key that one padded batch of all segments may have
# Queries from which a segment is a batch of its own, since padding it costs more than a call: on a
# CPU, and on a GPU, where a call of a short one costs more than its computation.
LONG, LONG_ON_GPU = 256, 1024


@dataclass(frozen=True)
class Group:
    """Segments as one padded batch, for kernels that take no lengths.

    `queries` (segments x longest) and `keys` (segments x farthest) are flat int64 places in the
    sequence, `mask` (segments, 1, longest, farthest) is True where a query attends to a key, and
    `own` are the places in `queries` that are the segments' tokens. Without a mask attention is
    causal, and the queries are all of the one segment's path.
    """

    count: int
    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    own: torch.Tensor

    def attend(self, heads: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        """SDPA of [query, key, value], each (1, heads, tokens, size); (own tokens, heads, size)."""

        def regroup(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            chosen = states[0].index_select(1, places)
            return chosen.unflatten(1, (self.count, -1)).transpose(0, 1)

        places = (self.queries, self.keys, self.keys)
        output = attend_by_sdpa(list(map(regroup, heads, places)), self.mask, options)
        return output.flatten(0, 1).index_select(0, self.own)


class Segments:
    """What attention needs to know of a packed sequence of segments.

    Segment s has `lengths[s]` queries and `reaches[s]` keys, which end at the same token. `paths`
    holds the places of the keys, one segment after the other; a cache may hold the first of them.
    """

    def __init__(self, lengths: torch.Tensor, reaches: torch.Tensor, paths: torch.Tensor):
        """Three flat int64 tensors, on the model's device."""
        self.lengths, self.reaches, self.paths = lengths, reaches, paths
        self.longest, self.farthest = int(lengths.max()), int(reaches.max())
        self.groups: list[Group] = []
        self.order: torch.Tensor | None = None  # of the groups' tokens, where it is not the pack's
        self.long = LONG if lengths.device.type == "cpu" else LONG_ON_GPU
        # Keys that a cache holds have no queries.
        self.is_cached = int(paths.max()) >= int(lengths.sum())

    @property
    def mask(self) -> torch.Tensor | None:
        """For a model's `attention_mask`: with four axes, transformers makes none of its own.

        Attention that does not know segments fails on it.
        """
        return self.lengths.new_ones((1, 1, 0, 0), dtype=torch.bool) if self.groups else None

    def pad(self) -> None:
        """Makes the segments one padded batch, or several where one would be mostly padding."""
        ends = self.lengths.cumsum(0)
        starts, path_ends = ends - self.lengths, self.reaches.cumsum(0)
        alone = self.lengths >= self.long
        short = [each.masked_fill(alone, 0) for each in (self.lengths, self.reaches)]
        padded = int((~alone).sum()) * int(short[0].max()) * int(short[1].max())
        kinds = torch.zeros_like(self.lengths)
        if padded > MOST_PADDING * int((short[0] * short[1]).sum()):
            # Segments whose lengths have as many binary digits are alike enough.
            digits = [torch.log2(each.double()).long() for each in (self.lengths, self.reaches)]
            kinds = 64 * digits[0] + digits[1]
        kinds = torch.where(alone, -1 - torch.arange(len(kinds), device=kinds.device), kinds)
        chosen = [(kinds == kind).nonzero().flatten() for kind in kinds.unique()]
        self.groups = [self._pad(group, starts, path_ends) for group in chosen]
        if len(chosen) > 1:
            tokens = [group.queries[group.own] for group in self.groups]
            self.order = torch.cat(tokens).argsort()

    def _pad(self, chosen: torch.Tensor, starts: torch.Tensor, path_ends: torch.Tensor) -> Group:
        """The segments with these numbers as one padded batch."""
        lengths, reaches = self.lengths[chosen][:, None], self.reaches[chosen][:, None]
        query = torch.arange(int(lengths.max()), device=lengths.device)
        key = torch.arange(int(reaches.max()), device=lengths.device)
        path = path_ends[chosen][:, None] - reaches + key
        keys = self.paths[torch.where(key < reaches, path, 0)]
        if not self.is_cached and len(query) >= self.long and len(key) < 2 * len(query):
            # Causal kernels pass over half of the pairs and need no mask, which is large here. The
            # outputs at the beginnings are left out.
            own = torch.arange(len(key) - len(query), len(key), device=lengths.device)
            return Group(1, keys.flatten(), keys.flatten(), None, own)
        queries = torch.where(query < lengths, starts[chosen][:, None] + query, 0)
        seen = (reaches - lengths + query)[:, :, None]  # the last key of each query
        own = (query < lengths).flatten().nonzero().flatten()
        mask = (key <= seen)[:, None]
        return Group(len(chosen), queries.flatten(), keys.flatten(), mask, own)

    def attend_padded(self, heads: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        """SDPA of [query, key, value], each (1, heads, tokens, size); (1, tokens, heads, size)."""
        parts = [group.attend(heads, options) for group in self.groups]
        if self.order is None:
            return parts[0][None]
        return torch.cat(parts).index_select(0, self.order)[None]

    def attend_varlen(self, heads: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        """The same by flash-attn's kernel for sequences of several lengths.

        Its causal mask lets the last query see the last key, so that the queries of a segment see
        all that comes before it.
        """
        from flash_attn import flash_attn_varlen_func

        def count(lengths: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

        query, key, value = (states[0].transpose(0, 1) for states in heads)
        output = flash_attn_varlen_func(
            query,
            key.index_select(0, self.paths),
            value.index_select(0, self.paths),
            cu_seqlens_q=count(self.lengths),
            cu_seqlens_k=count(self.reaches),
            max_seqlen_q=self.longest,
            max_seqlen_k=self.farthest,
            dropout_p=options.get("dropout") or 0.0,
            softmax_scale=options.get("scaling"),
            causal=True,
        )
        return output[None]


def attend_by_sdpa(
    heads: list[torch.Tensor], mask: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """SDPA of [query, key, value], each (batch, heads, tokens, size); (batch, tokens, heads, size).

    Causal without a mask. On a CPU, keys and values stand once for the query heads that share them.
    On a GPU they are repeated, since the kernels of older cards take no groups.
    """
    query, key, value = heads
    groups = query.shape[1] // key.shape[1]
    on_cpu = key.device.type == "cpu"
    if groups > 1 and not on_cpu:
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.get("dropout") or 0.0,
        is_causal=mask is None,
        scale=options.get("scaling"),
        enable_gqa=groups > 1 and on_cpu,
    )
    return output.transpose(1, 2)


def attend_to_segments(name: str) -> None:
    """Teaches transformers' attention of this name, SDPA or flash-attn, to attend to segments.

    Models pass on to their attention what they do not know: here it is `segments`. Without it,
    attention is what it was, save that a CPU does not repeat keys and values for the next tokens.
    """
    original = ALL_ATTENTION_FUNCTIONS[name]
    if hasattr(original, "attends_to_segments"):
        return

    def attention(module: Any, *heads_and_mask: Any, segments: Any = None, **options: Any) -> Any:
        heads, mask = list(heads_and_mask[:3]), heads_and_mask[3]
        if segments is None:
            is_next_token = heads[0].shape[2] == 1 and mask is not None
            on_cpu = heads[0].device.type == "cpu"
            if name == "sdpa" and is_next_token and on_cpu and not module.training:
                return attend_by_sdpa(heads, mask, options), None
            return original(module, *heads_and_mask, **options)
        if name == "sdpa":
            return segments.attend_padded(heads, options), None
        return segments.attend_varlen(heads, options), None

    attention.attends_to_segments = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
