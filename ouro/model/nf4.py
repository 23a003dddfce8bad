"""Frozen weights in bitsandbytes' NF4, half a byte each. They are decoded in plain PyTorch for each product and then
dropped.

The products are those of bf16.py, whose matrix is put together from the decoded weights each time.
"""

from ouro.model.bf16 import Bf16

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nf4_weight(state: tuple[Tensor, ...], code: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """W (out, width), decoded from bitsandbytes' NF4 to the same bits as by bitsandbytes.

    code: the 16 numbers of the format. state: `nf4_state`, which is first the weights as indices into `code`, two in a
    byte, the first in the higher half; then a scale for each 64 weights. With double quantisation the scales are
    indices, too, and are followed by the numbers that these mean, a scale for each 256 of them, and the mean that was
    subtracted from all."""
    packed, absmax, *nested = state
    if nested:
        scales_code, scales, mean = nested
        each = torch.arange(absmax.numel(), device=absmax.device) // 256
        absmax = scales_code[absmax.flatten().int()] * scales[each] + mean
    halves = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).view(-1, 64)
    return (code[halves.int()] * absmax.view(-1, 1)).to(dtype).view(-1, width)


def nf4_state(weight: Tensor) -> list[Tensor]:
    """The tensors of a bitsandbytes Params4bit that `nf4_weight` reads. Raises ValueError: another kind of
    quantisation."""
    state = weight.quant_state
    nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
    if state.quant_type != "nf4" or state.blocksize != 64 or (nested and state.state2.blocksize != 256):
        raise ValueError(f"NF4 in blocks of 64 (and 256) is supported, this is {state.quant_type}, {state.blocksize}")
    return [weight.detach().as_subclass(Tensor), state.absmax, *nested]


class Nf4(Bf16):
    """What a group keeps: [A (ranks, in), B (outputs, rank), the code, and each weight's state]."""

    @classmethod
    def keep(cls, bases: list[nn.Linear], rank: int) -> list[Tensor]:
        weights = [base.weight for base in bases]
        new = {"dtype": bases[0].compute_dtype, "device": weights[0].device}
        a = torch.zeros(rank * len(bases), bases[0].in_features, **new)
        b = torch.zeros(sum(base.out_features for base in bases), rank, **new)
        return [a, b, weights[0].quant_state.code, *(tensor for w in weights for tensor in nf4_state(w))]

    @classmethod
    def factors(cls, frozen: list[Tensor], outs: tuple[int, ...], width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        return frozen[0], frozen[1].split(outs)

    @classmethod
    def rows(cls, frozen: list[Tensor], bs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        weights, (n, rank) = decoded(frozen, len(bs), width, bs[0].dtype), (len(bs), bs[0].shape[1])
        return tuple(
            torch.cat((w, F.pad(b, (k * rank, (n - 1 - k) * rank))), 1)
            for k, (w, b) in enumerate(zip(weights, bs, strict=True))
        )

    @classmethod
    def columns(cls, frozen: list[Tensor], a: Tensor, count: int, zero: Tensor) -> Tensor:
        return torch.cat((*decoded(frozen, count, a.shape[1], a.dtype, zero), a))


def decoded(
    frozen: list[Tensor], count: int, width: int, dtype: torch.dtype, zero: Tensor | None = None
) -> list[Tensor]:
    """The weights (out, width) of `count` projections. zero: added before decoding, see `lora._Products.backward`."""
    _, _, code, *states = frozen
    each = len(states) // count
    if zero is not None:
        states = [t + zero.to(t.dtype) for t in states]
    return [nf4_weight(states[k * each : (k + 1) * each], code, width, dtype) for k in range(count)]
