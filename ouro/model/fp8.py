"""Frozen weights and activations in fp8 (e4m3) for Hopper's tensor cores, scaled by row; LoRA stays in bf16.

A group's W is kept twice, scaled by row for W x, and transposed and scaled by row for W' dy; x and dy are scaled as
they come.
"""

from collections.abc import Callable, Sequence

from ouro.model.bf16 import add, add_product, own_columns

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


class Fp8:
    """What a group keeps: [A (ranks, in), B (outputs, ranks) with zeros beside each B_k, W in fp8, its scales, W' in
    fp8, its scales]. The methods are those of bf16.Bf16."""

    @classmethod
    def keep(cls, bases: list[nn.Linear], rank: int) -> list[Tensor]:
        """The layers' own weights are emptied: nothing reads them any more."""
        whole = torch.cat([base.weight for base in bases]).detach()
        ranks = rank * len(bases)
        factors = [whole.new_zeros(ranks, whole.shape[1]), whole.new_zeros(len(whole), ranks)]
        for base in bases:
            base.weight.data = base.weight.new_empty(0)
        return [*factors, *by_row(whole), *by_row(whole.t().contiguous())]

    @classmethod
    def factors(cls, frozen: list[Tensor], outs: tuple[int, ...], width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        return frozen[0], own_columns(frozen[1], outs)

    @classmethod
    def outputs(
        cls, frozen: list[Tensor], a: Tensor, bs: tuple[Tensor, ...], x: Tensor, low_rank_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        low, outs = low_rank_of(x), [len(b) for b in bs]
        y = fp8_product(by_row(x), *frozen[2:4], x.dtype)
        if len(outs) < 3:
            add_product(y, low, frozen[1])
            return x, low, y.split(outs, 1)
        # Attention keeps v for its backward pass. As a part of y it would keep q and k in memory, too.
        lows = zip(y.split(outs, 1), low.split(len(a) // len(outs), 1), bs, strict=True)
        return x, low, tuple(add(y, z @ b.t()) for y, z, b in lows)

    @classmethod
    def input_gradient(
        cls,
        frozen: list[Tensor],
        a: Tensor,
        dys: tuple[Tensor, ...],
        part: Tensor,
        dropped: Tensor | None,
        zero: Tensor,
    ) -> Tensor:
        # A single gradient is left to the compiler, whose own kernel is as fast as by_row_together's.
        d8 = by_row_together(dys) if len(dys) > 1 else by_row(dys[0])
        dx = fp8_product(d8, *frozen[4:], dys[0].dtype)
        return add(dx, part @ a if dropped is None else dropped)

    @classmethod
    def decoded(cls, frozen: list[Tensor], outs: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The frozen weights (out, in) in fp32, as the products with x read them."""
        return (frozen[2].float() * frozen[3]).split(outs)


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) in e4m3, each row scaled to the format's largest number, 448, and the scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


if triton:

    @triton.jit
    def _by_row(first, second, third, out, scales, width, stride1, stride2, stride3,
                PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """A row of each of PARTS matrices (rows, width), as one row of `out` in e4m3, and its scale."""
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        inside = place < width
        a = tl.load(first + row * stride1 + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(second + row * stride2 + place, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
        if PARTS == 3:
            c = tl.load(third + row * stride3 + place, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(c), 0))
        scale = tl.maximum(largest, 1e-12) / 448
        tl.store(scales + row, scale)
        out += row * PARTS * width + place
        tl.store(out, (a / scale).to(out.dtype.element_ty), mask=inside)
        tl.store(out + width, (b / scale).to(out.dtype.element_ty), mask=inside)
        if PARTS == 3:
            tl.store(out + 2 * width, (c / scale).to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("ouro::by_row_together", mutates_args=())
def by_row_together(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`by_row` of matrices (rows, width) that stand beside each other, in one kernel that reads them once. The compiler
    would compute the matrices twice, for the largest number of each row and for the division by it."""
    if not parts[0].is_cuda:
        return by_row(torch.cat(list(parts), 1))
    return by_row_in_one_kernel([part if part.stride(1) == 1 else part.contiguous() for part in parts])


@by_row_together.register_fake
def _(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, width = parts[0].shape
    whole = parts[0].new_empty(rows, len(parts) * width, dtype=torch.float8_e4m3fn)
    return whole, parts[0].new_empty(rows, 1, dtype=torch.float32)


def by_row_in_one_kernel(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, width = parts[0].shape
    out = parts[0].new_empty(rows, len(parts) * width, dtype=torch.float8_e4m3fn)
    scales = parts[0].new_empty(rows, 1, dtype=torch.float32)
    three = [*parts, parts[0]][:3]
    with torch.cuda.device_of(out):
        _by_row[(rows,)](
            *three, out, scales, width, *(part.stride(0) for part in three), PARTS=len(parts),
            BLOCK=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
    return out, scales


def fp8_product(x: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, in) times the transpose of weight (out, in), both scaled by row."""
    return torch._scaled_mm(x[0], weight.t(), x[1], scale.t(), out_dtype=dtype, use_fast_accum=True)
