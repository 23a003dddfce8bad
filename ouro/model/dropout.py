"""Dropout on LoRA's input x. A hash decides which numbers of x become zero, so that no mask is stored, and a CPU and a
GPU drop the same numbers.

Two products need dropout(x): A dropout(x) in the forward pass, and the gradient of A. On a GPU each of them is a kernel
that applies dropout to the part of x that it has just read. To write dropout(x) to memory and read it again would take
3 % of a step.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


def signed(number: int) -> int:
    """A number from 0 to 2**32 - 1 -> the int32 of the same 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


GOLDEN, FIRST, SECOND = (signed(odd) for odd in (0x9E3779B1, 0x7FEB352D, 0x846CA68B))


def shifted(h: Tensor, by: int) -> Tensor:
    """The bits of int32 numbers moved to the right, with zeros on the left."""
    return (h >> by) & ((1 << (32 - by)) - 1)  # `>>` alone would fill the left with copies of the sign bit


def hashed(h: Tensor) -> Tensor:
    """A hash of each int32, an int32: any bit of the number changes half of the hash's bits (C. Wellons' lowbias32)."""
    h = (h ^ shifted(h, 16)) * FIRST
    h = (h ^ shifted(h, 15)) * SECOND
    return h ^ shifted(h, 16)


def least(p: float) -> int:
    """The threshold of a dropout of p: a share p of all int32 hashes lies below it, and their numbers become zero."""
    return round(p * 2**32) - 2**31


def dropout(x: Tensor, key: Tensor, p: float, zero: Tensor | float = 0.0) -> Tensor:
    """x (rows, columns) with a share p of its numbers set to zero and the others multiplied by 1 / (1 - p).

    key: int32 (rows,), a hash for each row. It is mixed with the column's number as in `hashed`, without the two shifts
    by 16, which would take time and make no visible difference.
    zero: 0, or the tensor of that value which `lora._Products.backward` explains."""
    column = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) * GOLDEN
    h = (key[:, None] ^ column) * FIRST
    h = (h ^ shifted(h, 15)) * SECOND
    return torch.where(h >= least(p), x / (1 - p + zero), 0).to(x.dtype)


if triton:

    @triton.jit
    def _dropped(x, key, column, least, larger,
                 GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
        """`dropout` of a part x (rows, columns) that a kernel has read. larger: 1 / (1 - p)."""
        h = (key[:, None] ^ (column * GOLDEN)[None]) * FIRST
        h = (h ^ ((h >> 15) & 0x1FFFF)) * SECOND
        return tl.where(h >= least, x.to(tl.float32) * larger, 0.0).to(x.dtype)

    @triton.jit
    def _low_rank(x, key, a, out, count, width, ranks, x_stride, a_stride, scale, least, larger,
                  GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """ROWS rows of out (count, ranks) = scale * dropout(x) a', of x (count, width) and a (ranks, width)."""
        row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
        keys = tl.load(key + row, mask=row < count, other=0)
        start = x + row[:, None].to(tl.int64) * x_stride
        sums = tl.zeros([ROWS, RANKS], tl.float32)
        for first in tl.range(0, width, BLOCK, num_stages=STAGES):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            tile = tl.load(start + column[None], mask=(row < count)[:, None] & inside[None], other=0.0)
            tile = _dropped(tile, keys, column, least, larger, GOLDEN, FIRST, SECOND)
            here = rank[None] * a_stride + column[:, None]
            factor = tl.load(a + here, mask=(rank < ranks)[None] & inside[:, None], other=0.0)
            sums = tl.dot(tile, factor, sums, input_precision="ieee")
        dtype = out.dtype.element_ty
        sums = (sums.to(dtype).to(tl.float32) * scale).to(dtype)
        here = row[:, None].to(tl.int64) * ranks + rank[None]
        tl.store(out + here, sums, mask=(row < count)[:, None] & (rank < ranks)[None])

    @triton.jit
    def _gradient(part, x, key, out, count, width, ranks, part_stride, x_stride, share, least, larger,
                  GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """BLOCK columns of part' dropout(x), of part (count, ranks) and x (count, width), summed over one share of the
        rows. out (shares, ranks, width) has a sum for each share; the caller adds them."""
        column, rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANKS)
        inside = column < width
        low = tl.program_id(1) * share
        high = tl.minimum(low + share, count)
        sums = tl.zeros([RANKS, BLOCK], tl.float32)
        for first in tl.range(low, high, ROWS, num_stages=STAGES):
            row = first + tl.arange(0, ROWS)
            keys = tl.load(key + row, mask=row < high, other=0)
            here = row[:, None].to(tl.int64) * x_stride + column[None]
            tile = tl.load(x + here, mask=(row < high)[:, None] & inside[None], other=0.0)
            tile = _dropped(tile, keys, column, least, larger, GOLDEN, FIRST, SECOND)
            here = row[None].to(tl.int64) * part_stride + rank[:, None]
            gradient = tl.load(part + here, mask=(rank < ranks)[:, None] & (row < high)[None], other=0.0)
            sums = tl.dot(gradient, tile, sums, input_precision="ieee")
        here = (tl.program_id(1) * ranks + rank[:, None]).to(tl.int64) * width + column[None]
        tl.store(out + here, sums, mask=(rank < ranks)[:, None] & inside[None])


def _constants(p: float, ranks: int) -> dict:
    """The keyword arguments of both kernels: the threshold and factor of dropout, the hash's constants, block sizes."""
    sizes = {"RANKS": max(16, triton.next_power_of_2(ranks)), "BLOCK": 128, "STAGES": 3, "num_warps": 4}
    return {"least": least(p), "larger": 1 / (1 - p), "GOLDEN": GOLDEN, "FIRST": FIRST, "SECOND": SECOND} | sizes


def by_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the numbers of a row do not stand side by side in memory, as the kernels need them."""
    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("ouro::dropped_low_rank", mutates_args=())
def low_rank_in_one_kernel(x: Tensor, key: Tensor, p: float, a: Tensor, scale: float) -> Tensor:
    """`low_rank` with dropout on a GPU, where x is read once and dropout(x) is never in memory."""
    x, a = by_rows(x, a)
    (count, width), ranks = x.shape, len(a)
    out = x.new_empty(count, ranks)
    rows = 64 if count >= 8192 else 32  # 32 rows a program make more programs, to fill the GPU; 64 read A half as often
    with torch.cuda.device_of(x):
        _low_rank[(triton.cdiv(count, rows),)](
            x, key, a, out, count, width, ranks, x.stride(0), a.stride(0), scale, ROWS=rows, **_constants(p, ranks)
        )
    return out


@low_rank_in_one_kernel.register_fake
def _(x: Tensor, key: Tensor, p: float, a: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("ouro::dropped_gradient", mutates_args=())
def gradient_in_one_kernel(part: Tensor, x: Tensor, key: Tensor, p: float) -> Tensor:
    """`gradient` with dropout on a GPU, where dropout(x) is never in memory."""
    part, x = by_rows(part, x)
    (count, width), ranks, rows = x.shape, part.shape[1], 64
    options = _constants(p, ranks)
    blocks = triton.cdiv(width, options["BLOCK"])
    share = rows * triton.cdiv(count, rows * triton.cdiv(512, blocks))  # 512 programs: several for each processor
    shares = triton.cdiv(count, share)
    out = x.new_empty(shares, ranks, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradient[(blocks, shares)](
            part, x, key, out, count, width, ranks, part.stride(0), x.stride(0), share, ROWS=rows, **options
        )
    return out.sum(0)


@gradient_in_one_kernel.register_fake
def _(part: Tensor, x: Tensor, key: Tensor, p: float) -> Tensor:
    return x.new_empty(part.shape[1], x.shape[1], dtype=torch.float32)


def low_rank(x: Tensor, key: Tensor | None, p: float, a: Tensor, scale: float) -> Tensor:
    """scale * dropout(x) a', (rows, ranks), of x (rows, in) and a (ranks, in). key: as of `dropout`, or None."""
    if key is not None and x.is_cuda and triton:
        return low_rank_in_one_kernel(x, key, p, a, scale)
    return ((x if key is None else dropout(x, key, p)) @ a.t()) * scale


def gradient(part: Tensor, x: Tensor, key: Tensor | None, p: float, zero: Tensor) -> Tensor:
    """The gradient of A, (ranks, in) in fp32: part' dropout(x), of x (rows, in) and part (rows, ranks), the gradient of
    A dropout(x). key, zero: as of `dropout`; without a key there is no dropout."""
    if key is not None and x.is_cuda and triton:
        return gradient_in_one_kernel(part, x, key, p)
    return (part.t() @ (x if key is None else dropout(x, key, p, zero))).float()
