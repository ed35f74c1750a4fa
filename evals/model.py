"""lm-eval's transformers model, on prompts without padding that share what they begin with.

It also reports how likely each label was as the answer's first token.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import wraps
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
from transformers.modeling_outputs import CausalLMOutputWithPast

from evals.answers import Progress
from evals.choices import Constraint, build_constraint
from tools import packs
from tools import prompts as prompt
from tools.common import JobFailed
from tools.models import NOT_FINITE
from tools.packs import SHORTEST
from tools.segments import Segments, attend_to_segments

# Tokens that go through the model together: enough to keep two cores, or a GPU, busy.
TOKENS = {"cpu": 1024, "cuda": 16384}
# Bytes of the keys and values of a batch of packed prompts: every later token of its answers reads
# all weights once, so that large batches read them seldom.
CACHED = {"cpu": 2**29, "cuda": 2**31}


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
    """Records the probabilities of labels at the first new token, as shares of one, by row.

    Raises JobFailed where a logit of it is not a number.
    """

    def __init__(self, tokens: dict[str, list[int]]):
        self.tokens = tokens
        self.shares: list[dict[str, float]] = []
        self.is_checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.is_checked and bool(scores.isnan().any()):
            raise JobFailed(f"no answer: {NOT_FINITE}")
        self.is_checked = True
        if self.tokens and not self.shares:
            logs = scores.float().log_softmax(-1)
            by_label = [logs[:, tokens].logsumexp(-1) for tokens in self.tokens.values()]
            rows = torch.stack(by_label, 1).softmax(1).tolist()
            self.shares = [dict(zip(self.tokens, row, strict=True)) for row in rows]
        return scores


def accepts_packs(config: Any) -> bool:
    """Whether prompts are packed: not with sliding windows, chunks or linear attention.

    Nor where rotary embeddings depend on the longest row of a batch.
    """
    text = config.get_text_config(decoder=True)
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    tested = text.model_type in packs.TESTED and text._attn_implementation == "sdpa"
    return full and tested and rope in packs.FIXED_ROPES


def count_cached(model: Any, size: int) -> int:
    """Of how many tokens `size` bytes hold the keys and values."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size // int(2 * text.num_hidden_layers * heads * head * model.dtype.itemsize)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in tensors with room for later tokens.

    Transformers' own layer copies all keys and values for each new token. `keys` and `values` are
    (rows, heads, tokens + room, size); the first `tokens` are in use.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.room = (keys, values)
        self.use(tokens)

    def use(self, tokens: int) -> None:
        """Makes the first tokens in the tensors the layer's keys and values."""
        keys, values = self.room
        self.used = self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if self.keys is not self.used[0] or end > self.room[0].shape[2]:  # reordered, or full
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        for part, new in zip(self.room, (key_states, value_states), strict=True):
            part[:, :, start:end] = new
        self.use(end)
        return self.keys, self.values


def make_cache(layers: list[RoomyLayer]) -> DynamicCache:
    """A cache of these layers; its constructor would copy their keys and values."""
    cache = DynamicCache()
    cache.layers = layers
    return cache


class Model(Progress, HFLM):
    """Answers with a loaded model. `rows` is how many answers are to come, for the progress line.

    Where `labels` are set, `probabilities` gets those of each answer, in the order of the calls of
    the cache hook. `choices` are the only answers, where there are some.
    """

    choices: Sequence[str] = ()

    def __init__(self, model: Any, tokenizer: Any, label: str, rows: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.expect(label, rows)
        self.packs = accepts_packs(model.config)
        if self.packs:
            attend_to_segments("sdpa")
        head = model.get_output_embeddings()
        if not head._forward_pre_hooks:
            # The rows' last tokens are a slice, which torch would multiply row by row.
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.tokens = TOKENS[kind]
        self.cached = count_cached(model, CACHED[kind]) if self.packs else self.tokens
        self.memory = torch.empty(0)
        self.labels: Sequence[str] = ()
        self.probabilities: list[dict[str, float]] = []

    @property
    def max_length(self) -> int:
        """The context in tokens; a multimodal model has it in its text model's config."""
        config = self.model.config.get_text_config(decoder=True)
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        sizes = (getattr(config, name, None) for name in names)
        return next((int(size) for size in sizes if size), super().max_length)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return prompt.render(self.tokenizer, chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The answers to requests of one task, which share their settings.

        What prompts begin with (the system turn, the instruction, a text with several questions)
        goes through the model once.
        """
        settings = requests[0].args[1]
        rest = normalize_gen_kwargs(settings, self.max_gen_toks)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(rest.pop("until", None), eos=end)
        budget = rest.pop("max_gen_toks")
        labels = first_tokens(self.tokenizer, self.labels)
        constraint = self.make_constraint() if self.choices else None
        texts = [request.args[0] for request in requests]
        prompts = [self.tok_encode(text)[-(self.max_length - budget) :] for text in texts]
        prefix = self.compute_prefix(prompts) if self.packs else None
        answers = [""] * len(prompts)
        for batch in self.divide(prompts, budget):
            rows = [prompts[row] for row in batch]
            first = FirstToken(labels)
            context, mask = self._pad(rows)
            processors: list[LogitsProcessor] = [first]
            processors += [constraint.begin_at(context.shape[1])] if constraint else []
            options = rest | {
                "context": context,
                "attention_mask": mask,
                "max_length": context.shape[1] + budget,
                "stop": stop,
                "logits_processor": LogitsProcessorList(processors),
            }
            if self.packs:
                generated = self.generate_behind(rows, prefix, options)
            else:
                generated = self._model_generate(**options)
            self.probabilities += first.shares
            new = generated[:, context.shape[1] :].tolist()
            for row, answer in zip(batch, map(self.tok_decode, new), strict=True):
                answers[row] = postprocess_generated_text(answer, stop, None)
                self.cache_hook.add_partial("generate_until", (texts[row], settings), answers[row])
            self.progress(len(batch))
        self.memory = torch.empty(0)
        return answers

    def make_constraint(self) -> Constraint | None:
        """What limits answers to `choices` here; None where the engine does it."""
        return build_constraint(self.model, self.tokenizer, self.choices)

    def divide(self, prompts: list[list[int]], budget: int) -> list[list[int]]:
        """Batches of the prompts' numbers; prompts of similar length that begin alike are close.

        A batch holds at most `self.cached` tokens, padding and answers included.
        """

        def place(row: int) -> Any:
            length = len(prompts[row])
            return (-length.bit_length(), prompts[row]) if self.packs else -length

        batches: list[list[int]] = []
        longest = 0
        for row in sorted(range(len(prompts)), key=place):
            longest = max(longest, len(prompts[row]) + budget)
            if not batches or longest * (len(batches[-1]) + 1) > self.cached:
                batches.append([])
                longest = len(prompts[row]) + budget
            batches[-1].append(row)
        return batches

    def compute_prefix(self, prompts: list[list[int]]) -> Any:
        """The keys and values of what all prompts begin with; None where that is too short."""
        shared = common_prefix(prompts)
        if len(prompts) == 1 or shared < SHORTEST:
            return None
        ids = torch.tensor([prompts[0][:shared]], device=self.device)
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def generate_behind(
        self, rows: list[list[int]], prefix: Any, settings: dict[str, Any]
    ) -> torch.Tensor:
        """(rows, tokens) what `_model_generate` gives, with prompts that went through in packs.

        `generate` computes at least one token of each prompt. That pass is answered with what the
        packs have given, so that the rules by which it chooses a token stay its own.
        """
        room = settings["max_length"] - settings["context"].shape[1]
        logits, cache = self.compute_keys(rows, prefix, room)
        inner = getattr(self.model, "get_base_model", lambda: self.model)()
        own, forward = "forward" in vars(inner), inner.forward

        def restore() -> None:
            if own:
                inner.forward = forward
            else:
                vars(inner).pop("forward", None)

        @wraps(forward)  # `generate` reads the names of its parameters
        def answer(*_: Any, **__: Any) -> CausalLMOutputWithPast:
            restore()
            return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

        shorter = [
            RoomyLayer(layer.keys, layer.values, layer.keys.shape[2] - 1) for layer in cache.layers
        ]
        inner.forward = answer
        try:
            return self._model_generate(past_key_values=make_cache(shorter), **settings)
        finally:
            restore()

    def compute_keys(
        self, rows: list[list[int]], prefix: Any, room: int = 0
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Prompts' logits at their last tokens, and their keys and values, padded on the left.

        The logits are (rows, vocabulary); for each layer there are two tensors (rows, heads,
        longest prompt, size), with room for so many tokens more.
        """
        width = max(map(len, rows))
        states: list[torch.Tensor] = []  # keys and values of each layer
        logits: list[torch.Tensor] = []
        done = 0
        for pack in self.pack(rows, prefix.get_seq_length() if prefix else 0):
            places = torch.zeros((len(pack.ends), width + room), dtype=torch.int64)
            for row, end in enumerate(pack.ends):
                path = pack.paths[end]
                places[row, width - len(path) : width] = torch.tensor(path)
            places = places.to(self.device)
            output = self.compute_pack(pack, prefix)
            logits.append(output.logits[0])
            layers = output.past_key_values.layers
            packed = [part[0].transpose(0, 1) for x in layers for part in (x.keys, x.values)]
            if not states:
                states = self.make_room(packed, len(rows), width + room)
            for part, of_pack in zip(states, packed, strict=True):
                spread = part[done : done + len(places)].flatten(0, 1)
                torch.index_select(of_pack, 0, places.flatten(), out=spread)
            done += len(places)
            del output, layers, packed  # or the next pack cannot have their memory
        by_head = [part.transpose(1, 2) for part in states]
        pairs = zip(by_head[::2], by_head[1::2], strict=True)
        return torch.cat(logits), make_cache([RoomyLayer(*pair, width) for pair in pairs])

    def make_room(self, packed: list[torch.Tensor], rows: int, tokens: int) -> list[torch.Tensor]:
        """A tensor (rows, tokens, heads, size) for each of `packed` (any tokens, heads, size).

        All batches use the same memory, which is faster than new memory for each.
        """
        sizes = [rows * tokens * part[0].numel() for part in packed]
        if self.memory.numel() < sum(sizes):
            self.memory = packed[0].new_empty(sum(sizes))
        parts = self.memory[: sum(sizes)].split(sizes)
        shapes = [(rows, tokens, *part.shape[1:]) for part in packed]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def pack(self, rows: list[list[int]], cached: int) -> Iterator[packs.Pack]:
        """Packs of consecutive prompts, of about `self.tokens` tokens each."""
        chosen: list[packs.Row] = []
        tokens = 0
        for number, row in enumerate(rows):
            shared = common_prefix([row, rows[number - 1]]) if chosen else 0
            new = len(row) - (shared if shared >= cached + SHORTEST else cached)
            if chosen and tokens + new > self.tokens:
                yield packs.pack_rows(chosen, cached)
                chosen, tokens, new = [], 0, len(row) - cached
            chosen.append(packs.Row(row, [packs.IGNORED] * (len(row) - 1) + [0], 1.0))
            tokens += new
        yield packs.pack_rows(chosen, cached)

    def compute_pack(self, pack: packs.Pack, prefix: Any) -> Any:
        """The model's output of a pack behind what all prompts begin with.

        Its logits (1, rows, vocabulary) are those at the rows' last tokens.
        """

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=self.device)

        places = [place for path in pack.paths for place in path]
        segments = Segments(
            tensor(pack.lengths), tensor(list(map(len, pack.paths))), tensor(places)
        )
        segments.pad()
        with torch.inference_mode():
            return self.model(
                input_ids=tensor(pack.ids)[None],
                position_ids=tensor(pack.positions)[None],
                attention_mask=segments.mask,
                segments=segments,
                past_key_values=copy.deepcopy(prefix) if prefix else DynamicCache(),
                use_cache=True,
                logits_to_keep=tensor([pack.paths[end][-1] - pack.cached for end in pack.ends]),
            )

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, longest) int64 prompts, padded on the left, and their mask."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        lengths = torch.tensor([[len(row)] for row in rows])
        mask = (torch.arange(longest) >= longest - lengths).long()
        return ids.to(self.device), mask.to(self.device)
