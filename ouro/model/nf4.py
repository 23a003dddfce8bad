"""bitsandbytes' NF4 weights, decoded in plain PyTorch."""

import torch
from torch import Tensor


def nf4_weight(state: tuple[Tensor, ...], code: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """W (out, width) from bitsandbytes' NF4, rounded as theirs.

    code: the 16 numbers. state: indices into it, two a byte, the first in the higher half; a scale for each 64; or,
    doubly quantised, an index for each 64 into the scales' own code, that, its scales, one for 256, and its mean.
    """
    packed, absmax, *nested = state
    if nested:
        scales_code, scales, mean = nested
        each = torch.arange(absmax.numel(), device=absmax.device) // 256
        absmax = scales_code[absmax.flatten().int()] * scales[each] + mean
    halves = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).view(-1, 64)
    return (code[halves.int()] * absmax.view(-1, 1)).to(dtype).view(-1, width)


def nf4_state(weight: Tensor) -> list[Tensor]:
    """What `nf4_weight` reads, of a bitsandbytes Params4bit."""
    state = weight.quant_state
    nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
    if state.quant_type != "nf4" or state.blocksize != 64 or (nested and state.state2.blocksize != 256):
        raise ValueError(f"NF4 in blocks of 64 (and 256) is supported, this is {state.quant_type}, {state.blocksize}")
    return [weight.detach().as_subclass(Tensor), state.absmax, *nested]
