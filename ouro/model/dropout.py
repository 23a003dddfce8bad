"""Dropout before LoRA's A, by a hash: nothing of the mask is stored, and a CPU and a GPU draw the same.

On a GPU the two thin products that read x after dropout draw the mask while they read x: written to memory and read
again, x after dropout would cost 3 % of a step.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


def signed(number: int) -> int:
    """The number below 2**32 of the same 32 bits as an int32."""
    return (number + 2**31) % 2**32 - 2**31


GOLDEN, FIRST, SECOND = (signed(odd) for odd in (0x9E3779B1, 0x7FEB352D, 0x846CA68B))


def shifted(h: Tensor, by: int) -> Tensor:
    return (h >> by) & ((1 << (32 - by)) - 1)  # int32's own shift would repeat the sign


def hashed(h: Tensor) -> Tensor:
    """Each int32 mixed into another, so that any bit changes half of them (C. Wellons' lowbias32)."""
    h = (h ^ shifted(h, 16)) * FIRST
    h = (h ^ shifted(h, 15)) * SECOND
    return h ^ shifted(h, 16)


def least(p: float) -> int:
    """The smallest hash, as an int32, of a number that a dropout of p keeps."""
    return round(p * 2**32) - 2**31


def dropout(x: Tensor, key: Tensor, p: float, zero: Tensor | float = 0.0) -> Tensor:
    """x (rows, columns) with a share p of its numbers zero and the others larger by 1 / (1 - p); key: int32 (rows,),
    hashed, one a row. The half of `hashed` that is left out here would cost time and improve nothing that shows.

    zero: see `lora._Products.backward`."""
    column = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) * GOLDEN
    h = (key[:, None] ^ column) * FIRST
    h = (h ^ shifted(h, 15)) * SECOND
    return torch.where(h >= least(p), x / (1 - p + zero), 0).to(x.dtype)


if triton:

    @triton.jit
    def _dropped(x, key, column, least, larger,
                 GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
        """`dropout` of a tile x (rows, columns)."""
        h = (key[:, None] ^ (column * GOLDEN)[None]) * FIRST
        h = (h ^ ((h >> 15) & 0x1FFFF)) * SECOND
        return tl.where(h >= least, x.to(tl.float32) * larger, 0.0).to(x.dtype)

    @triton.jit
    def _low_rank(x, key, a, out, count, width, ranks, x_stride, a_stride, scale, least, larger,
                  GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """out (count, ranks) of ROWS rows of x (count, width)."""
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
        """BLOCK columns of out (shares, ranks, width), summed over one share of the rows of x and part."""
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
    """What both kernels are given by name."""
    sizes = {"RANKS": max(16, triton.next_power_of_2(ranks)), "BLOCK": 128, "STAGES": 3, "num_warps": 4}
    return {"least": least(p), "larger": 1 / (1 - p), "GOLDEN": GOLDEN, "FIRST": FIRST, "SECOND": SECOND} | sizes


def by_rows(*tensors: Tensor) -> list[Tensor]:
    """With the numbers of a row beside each other, as the kernels read them."""
    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("ouro::dropped_low_rank", mutates_args=())
def low_rank_in_one_kernel(x: Tensor, key: Tensor, p: float, a: Tensor, scale: float) -> Tensor:
    """`low_rank` on a GPU."""
    x, a = by_rows(x, a)
    (count, width), ranks = x.shape, len(a)
    out = x.new_empty(count, ranks)
    rows = 64 if count >= 8192 else 32  # with fewer there are more programs, with more they read A less often
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
    """`gradient` on a GPU."""
    part, x = by_rows(part, x)
    (count, width), ranks, rows = x.shape, part.shape[1], 64
    options = _constants(p, ranks)
    blocks = triton.cdiv(width, options["BLOCK"])
    share = rows * triton.cdiv(count, rows * triton.cdiv(512, blocks))  # 512: a few programs for each processor
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
    """s A dropout(x), (rows, ranks), of x (rows, in) and A (ranks, in); without a key nothing is dropped."""
    if key is not None and x.is_cuda and triton:
        return low_rank_in_one_kernel(x, key, p, a, scale)
    return ((x if key is None else dropout(x, key, p)) @ a.t()) * scale


def gradient(part: Tensor, x: Tensor, key: Tensor | None, p: float, zero: Tensor) -> Tensor:
    """part' dropout(x), (ranks, in) in fp32, of part (rows, ranks). zero: see `lora._Products.backward`."""
    if key is not None and x.is_cuda and triton:
        return gradient_in_one_kernel(part, x, key, p)
    return (part.t() @ (x if key is None else dropout(x, key, p, zero))).float()
