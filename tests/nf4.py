"""NF4 and double quantization written from the paper, to hold bitsandbytes against.

    python -m tests.nf4

prints the quantization error of NF4, FP4 and uniform int4 on normal weights and on SmolLM2's, the
loss of SmolLM2 with its weights so rounded, and the error of double quantization's 8-bit constants.
Three minutes on one core.

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), sec. 3 and appendix E. bitsandbytes' tables
and kernels are not used here. Values are float32 unless said otherwise.
"""

import json
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights with one maximum
BLOCK_2 = 256  # maxima with one maximum of their own
# The outermost quantile is this far from 0 and 1. Equation 4 of the paper cannot be used as it is
# printed (its first quantile is that of 0, which is minus infinity); the table of appendix E comes
# from this value, as Yoshida 2023 (arXiv 2306.06965, sec. 3) found in the authors' code.
TAIL = (1 / 30 + 1 / 32) / 2


def levels() -> Tensor:
    """The 16 levels of NF4, rising from -1 to 1, with an exact 0.

    8 quantiles of the normal distribution from TAIL to 1/2 and 9 from 1/2 to 1 - TAIL share the
    0 at 1/2; all are divided by the largest.
    """
    quantile, reach = NormalDist().inv_cdf, 0.5 - TAIL
    negative = [quantile(TAIL + reach * step / 7) for step in range(7)]
    positive = [quantile(0.5 + reach * step / 8) for step in range(1, 9)]
    return torch.tensor([value / positive[-1] for value in (*negative, 0.0, *positive)])


def dynamic_levels() -> Tensor:
    """The 256 levels of dynamic 8-bit quantization, rising from below -0.99 to 1.

    For each power of ten 10^(e - 6), e from 0 to 6: the midpoints of 2^e equal parts of [0.1, 1],
    with both signs; and 0 and 1 (Dettmers 2015, arXiv 1511.04561, sec. 3.2).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        width = 0.9 / 2**exponent
        middles = [0.1 + width * (part + 0.5) for part in range(2**exponent)]
        values += [sign * 10.0 ** (exponent - 6) * m for m in middles for sign in (-1, 1)]
    return torch.tensor(sorted(values))


def fp8_levels() -> Tensor:
    """The levels of FP8 E4M3 scaled to [-1, 1], which the paper names for the constants."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (every[every.isfinite()] / 448).unique()


# FP4 with 2 exponent bits and 1 mantissa bit, as IEEE 754 builds it; and 15 equal steps, what the
# authors call int4. bitsandbytes' own `fp4` has another least level, 1/192 instead of 1/12.
E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12]) / 12
TYPES = {
    "nf4": levels(),
    "fp4 (E2M1)": torch.cat([-E2M1.flip(0), E2M1[1:]]),
    "int4": torch.arange(-7, 8) / 7,
    "fp4 (bitsandbytes)": torch.tensor([-12, -8, -6, -4, -3, -2, -1 / 16, 0])
    .div(12)
    .repeat(2)
    .mul(torch.tensor([1.0] * 8 + [-1.0] * 8))
    .unique(),
}


def encode(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(index of the nearest level, int64, of the shape of `values`; maximum of each block).

    Blocks run along the rows of `values`; the last one may be shorter.
    """
    flat = values.flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    maxima = padded.abs().amax(1)
    middles = (table[1:] + table[:-1]) / 2
    scaled = padded / maxima.clamp(min=1e-30)[:, None]
    index = torch.bucketize(scaled, middles).flatten()[: len(flat)]
    return index.view(values.shape), maxima


def decode(index: Tensor, table: Tensor, maxima: Tensor, block: int = BLOCK) -> Tensor:
    """Each index's level times the maximum of its block, of the shape of `index`."""
    tensor = maxima.repeat_interleave(block)[: index.numel()]
    return (table[index.flatten()] * tensor).view(index.shape)


def double_decode(index: Tensor, second: Tensor, table: Tensor, offset: Tensor) -> Tensor:
    """Maxima from their 8-bit indices: the paper's inner dequantization, dequant(c1, c2).

    index: uint8, one for each block of 64 weights; second: one float32 for 256 of them; offset:
    the mean that was subtracted before they were quantized (sec. 3, "Double Quantization").
    """
    return decode(index.long(), table, second, BLOCK_2) + offset


def unpack(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """4-bit indices, int64, from bitsandbytes' bytes; of two, the high half holds the first."""
    pairs = packed.flatten().view(torch.uint8)
    return torch.stack([pairs >> 4, pairs & 15], 1).long().view(*shape)


def pack(index: Tensor) -> Tensor:
    """uint8 of two 4-bit indices each."""
    pairs = index.flatten().view(-1, 2).to(torch.uint8)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def rounded(values: Tensor, table: Tensor, block: int = BLOCK) -> Tensor:
    """`values` as they come back from blockwise quantization."""
    index, maxima = encode(values, table, block)
    return decode(index, table, maxima, block)


def error(weights: Iterable[Tensor], table: Tensor, block: int = BLOCK) -> float:
    """Squared error of quantization over the sum of squares, of several tensors together."""
    wrong = total = 0.0
    for weight in weights:
        wrong += float((rounded(weight, table, block) - weight).square().sum())
        total += float(weight.square().sum())
    return wrong / total


def linear(model: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    """The layers that a 4-bit base quantizes: the linear ones without the head."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            yield layer


def losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token of each row of (rows, length) token ids."""
    with torch.inference_mode():
        return torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])


def texts(tokenizer: Any) -> list[Tensor]:
    """(16, 128) token ids each, of English prose and of finance.

    The prose is on every machine (Python's own reference); the finance are example rows.
    """
    from pydoc_data.topics import topics

    from tools.common import ROOT

    prose = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    rows = [
        row
        for name in ("financebench", "fiqa")
        for row in (ROOT / f"data/sample/test/{name}_test.jsonl").read_text().splitlines()
    ]
    finance = "\n".join(" ".join(json.loads(row).values()) for row in rows)
    ids = [torch.tensor(tokenizer.encode(text)) for text in (prose, finance)]
    return [tokens[: 16 * 128].view(16, 128) for tokens in ids]


def main() -> None:
    from tools import common, smollm2

    common.quiet()
    smollm2.ensure(str(smollm2.FOLDER))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2.FOLDER, dtype=torch.float32)
    both = texts(AutoTokenizer.from_pretrained(smollm2.FOLDER))
    layers = list(linear(model))
    weights = [layer.weight.data.clone() for layer in layers]
    normal = [torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))]
    print("error: of the weights, squared, over their squares, %")
    print("loss: of SmolLM2 on prose and on finance, nats a token; - nf4: what it is over NF4's,")
    print("with the half width of its 95 % interval over 16 rows of 128 tokens")
    pair = f"{'loss':>8}{'- nf4':>8}{'±':>7}"
    print(f"{'':20}{'normal':>8}{'SmolLM2':>9}{pair}{pair}")
    print(f"{'32 bits':20}{0:8.3f}{0:9.3f}", end="")
    print("".join(f"{float(losses(model, ids).mean()):8.3f}{'':15}" for ids in both), flush=True)
    of_nf4: list[Tensor] = []
    for name, table in TYPES.items():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = rounded(weight, table)
        shares = [100 * error(tensor, table) for tensor in (normal, weights)]
        line = f"{name:20}{shares[0]:8.3f}{shares[1]:9.3f}"
        values = [losses(model, ids) for ids in both]
        of_nf4 = of_nf4 or values  # NF4 is the first
        for loss, other in zip(values, of_nf4, strict=True):
            more = loss - other
            half = 1.96 * float(more.std()) / len(more) ** 0.5
            line += f"{float(loss.mean()):8.3f}{float(more.mean()):8.3f}{half:7.3f}"
        print(line, flush=True)
    print("\nerror of SmolLM2's block maxima at 8 bits, their mean subtracted, squared, %")
    maxima = [encode(weight, TYPES["nf4"], BLOCK)[1] for weight in weights]
    centred = [tensor - tensor.mean() for tensor in maxima]
    for name, table in (("dynamic (bitsandbytes)", dynamic_levels()), ("FP8 E4M3", fp8_levels())):
        print(f"{name:24}{100 * error(centred, table, BLOCK_2):9.4f}")


if __name__ == "__main__":
    main()
