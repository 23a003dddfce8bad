"""Dropout on LoRA's input x. A hash decides which numbers of x become zero, so that no mask is stored, and a CPU and a
GPU drop the same numbers.

Three products need it: A dropout(x) in the forward pass, the gradient of A, and LoRA's part of the gradient of x. On a
GPU each of them is a kernel that applies dropout to what it has just read, or is about to write. To write dropout(x) to
memory and read it again would take 3 % of a step.
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
    """The threshold of a dropout of p: an int32 below which a share p of all 16-bit numbers lies, as the upper bits."""
    return (round(p * 2**16) << 16) - 2**31


def dropout(x: Tensor, key: Tensor, p: float, zero: Tensor | float = 0.0) -> Tensor:
    """x (rows, columns) with a share p of its numbers set to zero and the others multiplied by 1 / (1 - p).

    key: int32 (rows,), a hash for each row. It is mixed with the column's number as in `hashed`, without the two shifts
    by 16, which would take time and make no visible difference. A hash decides for two columns: its upper 16 bits for
    one of the first half, its lower bits for the one that stands so far in the second half.
    zero: 0, or the tensor of that value which `lora._Products.backward` explains."""
    half, column = (x.shape[1] + 1) // 2, torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    h = (key[:, None] ^ (column % half * GOLDEN)) * FIRST
    h = (h ^ shifted(h, 15)) * SECOND
    return torch.where(torch.where(column < half, h, h << 16) >= least(p), x / (1 - p + zero), 0).to(x.dtype)


if triton:

    @triton.jit
    def _kept(key, column, least, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
        """Whether `dropout` keeps the numbers (rows, columns) of the first half, and those of the second."""
        h = (key[:, None] ^ (column * GOLDEN)[None]) * FIRST
        h = (h ^ ((h >> 15) & 0x1FFFF)) * SECOND
        return h >= least, (h << 16) >= least

    @triton.jit
    def _low_rank(x, key, a, out, count, width, half, ranks, x_stride, a_stride, scale, least, larger,
                  GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """ROWS rows of out (count, ranks) = scale * dropout(x) a', of x (count, width) and a (ranks, width)."""
        row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
        keys = tl.load(key + row, mask=row < count, other=0)
        x += row[:, None].to(tl.int64) * x_stride
        a += rank[None] * a_stride
        rows, ranked = (row < count)[:, None], (rank < ranks)[None]
        sums = tl.zeros([ROWS, RANKS], tl.float32)
        for first in tl.range(0, half, BLOCK, num_stages=STAGES):
            column = first + tl.arange(0, BLOCK)
            one, other = column < half, half + column < width
            keep, keep_other = _kept(keys, column, least, GOLDEN, FIRST, SECOND)
            tile = tl.load(x + column[None], mask=rows & one[None], other=0.0)
            factor = tl.load(a + column[:, None], mask=ranked & one[:, None], other=0.0)
            sums = tl.dot(tl.where(keep, tile, 0.0), factor, sums, input_precision="ieee")
            tile = tl.load(x + half + column[None], mask=rows & other[None], other=0.0)
            factor = tl.load(a + half + column[:, None], mask=ranked & other[:, None], other=0.0)
            sums = tl.dot(tl.where(keep_other, tile, 0.0), factor, sums, input_precision="ieee")
        dtype = out.dtype.element_ty
        sums = ((sums * larger).to(dtype).to(tl.float32) * scale).to(dtype)
        here = row[:, None].to(tl.int64) * ranks + rank[None]
        tl.store(out + here, sums, mask=rows & ranked)

    @triton.jit
    def _gradient(part, x, key, out, count, width, half, ranks, part_stride, x_stride, share, least, larger,
                  GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """BLOCK columns of each half of part' dropout(x), of part (count, ranks) and x (count, width), summed over one
        share of the rows. out (shares, ranks, width) has a sum for each share; the caller adds them."""
        column, rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANKS)
        one, other = (column < half)[None], (half + column < width)[None]
        low = tl.program_id(1) * share
        high = tl.minimum(low + share, count)
        sums = tl.zeros([RANKS, BLOCK], tl.float32)
        sums_other = tl.zeros([RANKS, BLOCK], tl.float32)
        for first in tl.range(low, high, ROWS, num_stages=STAGES):
            row = first + tl.arange(0, ROWS)
            keys = tl.load(key + row, mask=row < high, other=0)
            keep, keep_other = _kept(keys, column, least, GOLDEN, FIRST, SECOND)
            here = row[None].to(tl.int64) * part_stride + rank[:, None]
            gradient = tl.load(part + here, mask=(rank < ranks)[:, None] & (row < high)[None], other=0.0)
            here = row[:, None].to(tl.int64) * x_stride + column[None]
            tile = tl.load(x + here, mask=(row < high)[:, None] & one, other=0.0)
            sums = tl.dot(gradient, tl.where(keep, tile, 0.0), sums, input_precision="ieee")
            tile = tl.load(x + half + here, mask=(row < high)[:, None] & other, other=0.0)
            sums_other = tl.dot(gradient, tl.where(keep_other, tile, 0.0), sums_other, input_precision="ieee")
        out += (tl.program_id(1) * ranks + rank[:, None]).to(tl.int64) * width + column[None]
        tl.store(out, sums * larger, mask=(rank < ranks)[:, None] & one)
        tl.store(out + half, sums_other * larger, mask=(rank < ranks)[:, None] & other)

    @triton.jit
    def _dropped_product(part, key, a, out, count, width, half, ranks, part_stride, a_stride, least, larger,
                         GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                         RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """ROWS rows and BLOCK columns of each half of out (count, width) = dropout(part a), of part (count, ranks) and
        a (ranks, width)."""
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        rank = tl.arange(0, RANKS)
        rows, ranked = (row < count)[:, None], rank < ranks
        one, other = (column < half)[None], (half + column < width)[None]
        keys = tl.load(key + row, mask=row < count, other=0)
        keep, keep_other = _kept(keys, column, least, GOLDEN, FIRST, SECOND)
        here = row[:, None].to(tl.int64) * part_stride + rank[None]
        left = tl.load(part + here, mask=rows & ranked[None], other=0.0)
        a += rank[:, None] * a_stride + column[None]
        out += row[:, None].to(tl.int64) * width + column[None]
        factor = tl.load(a, mask=ranked[:, None] & one, other=0.0)
        product = tl.where(keep, tl.dot(left, factor, input_precision="ieee") * larger, 0.0)
        tl.store(out, product.to(out.dtype.element_ty), mask=rows & one)
        factor = tl.load(a + half, mask=ranked[:, None] & other, other=0.0)
        product = tl.where(keep_other, tl.dot(left, factor, input_precision="ieee") * larger, 0.0)
        tl.store(out + half, product.to(out.dtype.element_ty), mask=rows & other)


def _constants(p: float, ranks: int) -> dict:
    """Keyword arguments of all kernels: the threshold and factor of dropout, the hash's constants, block sizes."""
    sizes = {"RANKS": max(16, triton.next_power_of_2(ranks)), "BLOCK": 64, "num_warps": 4}
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
    with torch.cuda.device_of(x):
        _low_rank[(triton.cdiv(count, 32),)](
            x, key, a, out, count, width, (width + 1) // 2, ranks, x.stride(0), a.stride(0), scale, ROWS=32, STAGES=4,
            **_constants(p, ranks),
        )  # fmt: skip
    return out


@low_rank_in_one_kernel.register_fake
def _(x: Tensor, key: Tensor, p: float, a: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("ouro::dropped_gradient", mutates_args=())
def gradient_in_one_kernel(part: Tensor, x: Tensor, key: Tensor, p: float) -> Tensor:
    """`gradient` with dropout on a GPU, where dropout(x) is never in memory."""
    part, x = by_rows(part, x)
    (count, width), ranks, rows = x.shape, part.shape[1], 32
    options = _constants(p, ranks)
    half = (width + 1) // 2
    blocks = triton.cdiv(half, options["BLOCK"])
    share = rows * triton.cdiv(count, rows * triton.cdiv(512, blocks))  # 512 programs: several for each processor
    shares = triton.cdiv(count, share)
    out = x.new_empty(shares, ranks, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradient[(blocks, shares)](
            part, x, key, out, count, width, half, ranks, part.stride(0), x.stride(0), share, ROWS=rows, STAGES=4,
            **options,
        )  # fmt: skip
    return out.sum(0)


@gradient_in_one_kernel.register_fake
def _(part: Tensor, x: Tensor, key: Tensor, p: float) -> Tensor:
    return x.new_empty(part.shape[1], x.shape[1], dtype=torch.float32)


@torch.library.custom_op("ouro::dropped_product", mutates_args=())
def product_in_one_kernel(part: Tensor, key: Tensor, p: float, a: Tensor) -> Tensor:
    """`dropped_product` on a GPU, which writes nothing else."""
    part, a = by_rows(part, a)
    (count, ranks), width, rows = part.shape, a.shape[1], 64
    half, options = (width + 1) // 2, _constants(p, ranks)
    out = part.new_empty(count, width)
    with torch.cuda.device_of(part):
        _dropped_product[(triton.cdiv(count, rows), triton.cdiv(half, options["BLOCK"]))](
            part, key, a, out, count, width, half, ranks, part.stride(0), a.stride(0), ROWS=rows, **options
        )
    return out


@product_in_one_kernel.register_fake
def _(part: Tensor, key: Tensor, p: float, a: Tensor) -> Tensor:
    return part.new_empty(part.shape[0], a.shape[1])


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


def dropped_product(part: Tensor, key: Tensor, p: float, a: Tensor) -> Tensor:
    """dropout(part a), (rows, in), of part (rows, ranks) and a (ranks, in): LoRA's part of the gradient of x."""
    if part.is_cuda and triton:
        return product_in_one_kernel(part, key, p, a)
    return dropout(part @ a, key, p)
