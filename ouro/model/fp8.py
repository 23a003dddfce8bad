"""Frozen weights and activations in fp8 (e4m3) for Hopper's tensor cores, scaled by row."""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


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
    """`by_row` of matrices (rows, width) that stand beside each other. In one kernel that reads them once: the compiler
    computes them anew for the largest number of a row, and anew for the division."""
    if not parts[0].is_cuda:
        return by_row(torch.cat(list(parts), 1))
    return by_row_in_one_kernel([part if part.stride(1) == 1 else part.contiguous() for part in parts])


def by_row_in_one_kernel(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, width = parts[0].shape
    out = parts[0].new_empty(rows, len(parts) * width, dtype=torch.float8_e4m3fn)
    scales = parts[0].new_empty(rows, 1, dtype=torch.float32)
    three = [*parts, parts[0]][:3]
    _by_row[(rows,)](
        *three, out, scales, width, *(part.stride(0) for part in three), PARTS=len(parts),
        BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out, scales


def fp8_product(x: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, in) times the transpose of weight (out, in), both scaled by row."""
    return torch._scaled_mm(x[0], weight.t(), x[1], scale.t(), out_dtype=dtype, use_fast_accum=True)
