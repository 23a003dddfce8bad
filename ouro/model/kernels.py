"""What decoding computes between two tokens: a layer in thin products, and kernels for one row."""

import math
from collections.abc import Callable
from functools import cache

from ouro.model.modeling_ouro import rms_norm, rotate

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


def begin(x: Tensor, weight: Tensor, qkv: Tensor, eps: float) -> Tensor:
    """q, k, v of x (batch, hidden), side by side in (batch, 3 x inner), before they are rotated."""
    return F.linear(rms_norm(x, weight, eps), qkv)


def combine(y: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention's result (batch, inner) from its parts (see `attend_to_cache`)."""
    if weight is not None:
        weight = weight[..., None].expand_as(y)  # of one shape with y: so the compiler makes one kernel of all of it
        weight = (weight - weight.amax(2, keepdim=True)).exp()
        y = (y * weight).sum(2) / weight.sum(2)
    return y.flatten(1).to(dtype)


def middle(x: Tensor, y: Tensor, weight: Tensor | None, layer: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """From the parts of a layer's attention (see `attend_to_cache`) to (state, silu(gate) * up).

    Compiled together with the MLP's last product, silu(gate) * up would be computed again for each row of its matrix.
    """
    o, after, before, gate_up, _, _ = layer
    x = x + rms_norm(F.linear(combine(y, weight, x.dtype), o), after, eps)
    gate, up = F.linear(rms_norm(x, before, eps), gate_up).chunk(2, -1)
    return x, F.silu(gate) * up


def finish(x: Tensor, inner: Tensor, layer: tuple[Tensor, ...], last: Tensor | None, eps: float) -> Tensor:
    """From `middle` to the layer's output; `last`: the norm that follows the last layer."""
    _, _, _, _, down, end = layer
    x = x + rms_norm(F.linear(inner, down), end, eps)
    return x if last is None else rms_norm(x, last, eps)


def to_next(x, inner, layer, last, following, eps: float) -> tuple[Tensor, Tensor]:
    """(state, q k v of the following layer)."""
    x = finish(x, inner, layer, last, eps)
    return x, begin(x, *following, eps)


def to_logits(x, inner, layer, last, head, eps: float) -> Tensor:
    return F.linear(finish(x, inner, layer, last, eps), head)


@cache
def compiled(function: Callable) -> Callable:
    # By default torch stops compiling, without a word, after eight translations of a function, here of batch sizes.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)


if triton:

    @triton.jit
    def _decode(qkv, cos, sin, keys, values, position, out, weight, row_stride, head_stride, scale, splits,
                HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """One head of one sequence, one of `splits` parts of its past; the last part holds the new token too.

        Each of a block's BLOCK places has its own running softmax: threads wait for each other only at the end."""
        batch, head, part = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
        at = tl.load(position + batch).to(tl.int32)
        d = tl.arange(0, DIM)
        other = (d + DIM // 2) % DIM
        c, s = tl.load(cos + batch * DIM + d).to(tl.float32), tl.load(sin + batch * DIM + d).to(tl.float32)
        new = qkv + batch * 3 * HEADS * DIM + head * DIM
        q = tl.load(new + d).to(tl.float32) * c + tl.load(new + other).to(tl.float32) * s
        q *= scale
        # head_stride is not computed as row_stride / HEADS: Triton knows of an argument whether it is a multiple of 16,
        # and loads 16 bytes at a time; of a quotient it does not, and would load 2.
        start = batch.to(tl.int64) * row_stride + head * head_stride
        share = tl.cdiv(tl.cdiv(at, splits), BLOCK) * BLOCK
        low = part * share
        high = tl.minimum(low + share, at)
        largest = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, DIM], tl.float32)
        for first in tl.range(low, high, BLOCK, num_stages=STAGES):
            n = first + tl.arange(0, BLOCK)
            here = start + n[:, None] * DIM + d[None, :]
            k = tl.load(keys + here, mask=n[:, None] < high, other=0.0)
            v = tl.load(values + here, mask=n[:, None] < high, other=0.0)
            score = tl.where(n < high, tl.sum(q[None, :] * k.to(tl.float32), 1), -1e30)
            larger = tl.maximum(largest, score)
            p = tl.where(n < high, tl.exp2(score - larger), 0.0)
            old = tl.exp2(largest - larger)
            total = total * old + p
            sums = sums * old[:, None] + p[:, None] * v.to(tl.float32)
            largest = larger
        top = tl.max(largest, 0)
        scaled = tl.exp2(largest - top)
        whole = tl.sum(total * scaled, 0)
        y = tl.sum(sums * scaled[:, None], 0)
        if part == splits - 1:
            new += HEADS * DIM
            newest = tl.load(new + d).to(tl.float32) * c + tl.load(new + other).to(tl.float32) * s
            newest = newest.to(keys.dtype.element_ty)
            value = tl.load(new + HEADS * DIM + d)
            tl.store(keys + start + at * DIM + d, newest)
            tl.store(values + start + at * DIM + d, value)
            mine = tl.sum(q * newest.to(tl.float32), 0)
            larger = tl.maximum(top, mine)
            old = tl.exp2(top - larger)
            p = tl.exp2(mine - larger)
            whole = whole * old + p
            y = y * old + value.to(tl.float32) * p
            top = larger
        cell = tl.program_id(0) * splits + part
        tl.store(out + cell * DIM + d, y / tl.maximum(whole, 1e-30))
        tl.store(weight + cell, (top + tl.log2(tl.maximum(whole, 1e-30))) * 0.6931471805599453)

    @triton.jit
    def _normed(x, weight, width, eps, place, inside):
        """modeling_ouro.OuroRMSNorm of a row: x in fp32, and what is given back, rounded where the model rounds."""
        dtype = weight.dtype.element_ty
        y = (x * tl.rsqrt(tl.sum(x * x) / width + eps)).to(dtype).to(tl.float32)
        return (y * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)

    @triton.jit
    def _multiply(x, y, after, last, before, matrix, out, state, size, width, eps,
                  ADD: tl.constexpr, LAST: tl.constexpr, NORM: tl.constexpr,
                  BLOCK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
        """out (size,) = matrix (size, width) times a row: x, or with ADD x + norm(y), with LAST normed once more, which
        is then the new state; with NORM normed for this product alone. Each program computes the row anew."""
        place = tl.arange(0, BLOCK)
        inside = place < width
        n = tl.program_id(0) * ROWS * TILES + tl.arange(0, ROWS)
        # The load of the matrix's first rows is started before x is loaded and normed, and goes on meanwhile.
        w = tl.load(
            matrix + n[:, None].to(tl.int64) * width + place[None], (n < size)[:, None] & inside[None], other=0.0
        )
        h = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            h += _normed(tl.load(y + place, mask=inside, other=0.0).to(tl.float32), after, width, eps, place, inside)
            h = h.to(out.dtype.element_ty).to(tl.float32)
            if LAST:
                h = _normed(h, last, width, eps, place, inside)
            if tl.program_id(0) == 0:
                tl.store(state + place, h, mask=inside)
        if NORM:
            h = _normed(h, before, width, eps, place, inside)
        tl.store(out + n, tl.sum(w.to(tl.float32) * h[None], 1), mask=n < size)
        for _ in tl.static_range(TILES - 1):
            n += ROWS
            here = n[:, None].to(tl.int64) * width + place[None]
            w = tl.load(matrix + here, mask=(n < size)[:, None] & inside[None], other=0.0)
            tl.store(out + n, tl.sum(w.to(tl.float32) * h[None], 1), mask=n < size)

    @triton.jit
    def _multiply_gated(x, matrix, out, size, width,
                        BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """out (size,) = matrix (size, width) times silu(gate) * up, which stand in x (2 x width) beside each other."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.range(0, width, BLOCK, num_stages=STAGES):
            place = first + tl.arange(0, BLOCK)
            inside = place < width
            here = n[:, None].to(tl.int64) * width + place[None]
            w = tl.load(matrix + here, mask=(n < size)[:, None] & inside[None], other=0.0)
            gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(x + width + place, mask=inside, other=0.0).to(tl.float32)
            inner = (gate / (1 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32) * up
            sums += w.to(tl.float32) * inner.to(x.dtype.element_ty).to(tl.float32)[None]
        tl.store(out + n, tl.sum(sums, 1), mask=n < size)


def multiply(
    x: Tensor, matrix: Tensor, eps: float, before: Tensor | None = None, y: Tensor | None = None,
    after: Tensor | None = None, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(state, matrix times it) of one row in one kernel, which reads the matrix at nearly the rate of a copy, and what
    stands between two products takes no kernel of its own.

    x, y: (1, width). state: x, or where y is given x + norm(y, after), then normed by `last` if that is given.
    before: the weight of a norm for this product alone."""
    size, width = matrix.shape
    out = x.new_empty(1, size)
    state = x if y is None else torch.empty_like(x)  # not into x: programs of the kernel that start later read it
    rows, tiles, warps = (4, 2, 4) if size >= 4096 else (4, 1, 8)  # what ran fastest on an H100
    _multiply[(-(-size // (rows * tiles)),)](
        x, y, after, last, before, matrix, out, state, size, width, eps, y is not None, last is not None,
        before is not None, BLOCK=triton.next_power_of_2(width), ROWS=rows, TILES=tiles, num_warps=warps,
    )  # fmt: skip
    return state, out


def multiply_gated(x: Tensor, matrix: Tensor) -> Tensor:
    """matrix (size, width) times silu(gate) * up, of one row x (1, 2 x width) of gate and up."""
    size, width = matrix.shape
    out = x.new_empty(1, size)
    _multiply_gated[(-(-size // 8),)](x, matrix, out, size, width, BLOCK=1024, ROWS=8, STAGES=3, num_warps=4)
    return out


def attend_by_kernel(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, splits: int
) -> tuple[Tensor, Tensor | None]:
    """`attend_to_cache` in one kernel, each past in `splits` parts; with one part its result has no weight."""
    batch, heads, _, dim = keys.shape
    out = qkv.new_empty(batch, heads, splits, dim, dtype=torch.float32 if splits > 1 else qkv.dtype)
    weight = qkv.new_empty(batch, heads, splits, dtype=torch.float32)
    scale = math.log2(math.e) / math.sqrt(dim)
    _decode[(batch * heads, splits)](
        qkv, cos, sin, keys, values, position, out, weight, keys.stride(0), keys.stride(1), scale, splits,
        heads, dim, BLOCK=16, STAGES=4, num_warps=2,
    )  # fmt: skip
    return out, weight if splits > 1 else None


def attend_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token a row, whose key and value are written into the cache at its position.

    qkv: (batch, 3 x inner). cos, sin: (batch, 1, head_dim). keys, values: (batch, heads, capacity, head_dim).
    Gives (batch, heads, parts, head_dim), and the log of each part's weight (batch, heads, parts), None for one part.
    """
    batch, heads, _, dim = keys.shape
    q, k, v = qkv.view(batch, 3, heads, dim).unbind(1)
    rows = torch.arange(batch, device=qkv.device)
    keys[rows, :, position], values[rows, :, position] = rotate(k, cos, sin), v
    used = int(position.max()) + 1
    seen = torch.arange(used, device=qkv.device) <= position[:, None]
    q = rotate(q, cos, sin)[:, :, None]
    return F.scaled_dot_product_attention(q, keys[:, :, :used], values[:, :, :used], seen[:, None, None]), None
