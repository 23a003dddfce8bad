"""Triton's kernels give what torch gives, on this GPU and on a CPU in Triton's interpreter; a CPU compiles them, too.

The interpreter is chosen when a kernel is defined, so it runs in a process of its own:
PYTHONPATH=. TRITON_INTERPRET=1 python tests/test_kernels.py 37 24      # size and width of the matrix of one row
"""

import itertools
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

from ouro.model import dropout, generate, kernels
from ouro.model.fp8 import by_row, by_row_in_one_kernel
from ouro.model.generate import Decoder

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from tiny_ouro import SIZES, assert_close, tiny

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def decoding_attends(device: str, dtype: torch.dtype, dim: int, relative: float, parts: tuple[int, ...]) -> None:
    """Attention's kernel gives what `attend_to_cache` gives, and leaves the same cache, in one part or several."""
    torch.manual_seed(0)
    batch, heads, capacity = 3, 2, 128
    new = {"device": device, "dtype": dtype}
    qkv, angle = torch.randn(batch, 3 * heads * dim, **new), torch.randn(batch, 1, dim, **new)
    position = torch.tensor([0, 67, 127], device=device)
    slots = torch.randn(2, 2, batch, heads, capacity, dim, **new)
    for splits in parts:
        plain, fast = slots.clone(), slots.clone()
        expected, _ = kernels.attend_to_cache(qkv, angle.cos(), angle.sin(), *plain[1], position)
        y, weight = kernels.attend_by_kernel(qkv, angle.cos(), angle.sin(), *fast[1], position, splits)
        assert (weight is None) == (splits == 1)
        y = y if weight is None else (y * weight.softmax(-1)[..., None]).sum(2, keepdim=True)
        assert_close(y.to(dtype), expected, relative)
        assert_close(fast, plain, relative)
        assert torch.equal(fast[0], slots[0])


def rows_multiply(device: str, dtype: torch.dtype, relative: float, shapes: dict[tuple[int, int], list[str]]) -> None:
    """The products of one row, for matrices (size, width) that do not fill their blocks, with the norms named."""
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    for (size, width), forms in shapes.items():
        matrix, x, y = torch.randn(size, width, **new), torch.randn(1, width, **new), torch.randn(1, width, **new)
        before, after, last = (torch.rand(width, **new) + 0.5 for _ in range(3))
        for has in map(str.split, forms):
            state = x + kernels.rms_norm(y, after, 1e-6) if "y" in has else x
            state = kernels.rms_norm(state, last, 1e-6) if "last" in has else state
            row = kernels.rms_norm(state, before, 1e-6) if "before" in has else state
            options = {"before": before, "last": last, "y": y}
            options = {name: value if name in has else None for name, value in options.items()}
            ours, out = kernels.multiply(x, matrix, 1e-6, after=after if "y" in has else None, **options)
            assert_close(ours, state, relative)
            assert_close(out.double(), row.double() @ matrix.double().t(), relative)
        gates = torch.randn(1, 2 * width, **new)
        inner = F.silu(gates[:, :width]) * gates[:, width:]
        assert_close(kernels.multiply_gated(gates, matrix).double(), inner.double() @ matrix.double().t(), relative)


EVERY_FORM = ["", "before", "y before", "y last before", "y last"]
EVERY_SHAPE = {(37, 24): EVERY_FORM, (4099, 40): ["", "y last before"], (64, 128): EVERY_FORM}  # 4096: other blocks


@torch.no_grad()
def one_row_decodes(device: str) -> None:
    """A step of one row by kernels gives the logits and the cache, and so the tokens, of the step of several."""
    model = tiny(SIZES[0] | {"total_ut_steps": 2}).float().to(device)
    decoder = Decoder(model)
    decoder.copy_weights()
    decoder.cuda = False  # captures nothing
    decoder.prepare(2, 1, 64)
    decoder.read([[5, 9, 7]], [0], [0])
    slots = decoder.slots.clone()
    cos, sin = (t[0] for t in model.model.rotations(decoder.position[None], torch.float32))
    x = F.embedding(decoder.token, model.model.embed_tokens.weight)
    expected, cache = decoder.rows_together(x, cos, sin), decoder.slots.clone()
    decoder.slots.copy_(slots)
    assert_close(decoder.one_row(x, cos, sin), expected, 1e-4)
    assert_close(decoder.slots, cache, 1e-4)


def rows_scale_to_fp8(device: str, widths: tuple[int, ...], differing: float) -> None:
    """differing: share of the numbers that may be rounded to the other side."""
    for width, count in itertools.product(widths, (2, 3)):
        torch.manual_seed(0)
        parts = [torch.randn(5, width, device=device) * torch.rand(5, 1, device=device) for _ in range(count)]
        parts[1] = torch.randn(5, width + 3, device=device)[:, :width]  # columns of a wider matrix
        parts = [part.bfloat16() for part in parts]
        parts[0][3] = parts[-1][3] = 0
        (got, scales), (expected, expected_scales) = by_row_in_one_kernel(parts), by_row(torch.cat(parts, 1))
        assert torch.equal(scales, expected_scales) and got.shape == expected.shape
        assert (got.float() != expected.float()).float().mean() <= differing


def products_drop(device: str, dtype: torch.dtype, relative: float, shapes: list[tuple[int, int, int]]) -> None:
    """The products with x after dropout, of shapes (rows, width, ranks) that do not fill their blocks, from columns of
    wider matrices: what the mask leaves out and makes larger is exactly what `dropout` does."""
    for count, width, ranks in shapes:
        torch.manual_seed(0)
        new = {"device": device, "dtype": dtype}
        x, a = torch.randn(count, width + 3, **new)[:, :width], torch.randn(ranks, width + 5, **new)[:, :width]
        part = torch.randn(count, ranks, **new)
        key = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)
        whole = dropout.dropout(x, key, 0.3).double()
        low = dropout.low_rank_in_one_kernel(x, key, 0.3, a, 2.0)
        assert low.dtype == dtype
        assert_close(low.double(), whole @ a.double().t() * 2, relative)
        das = dropout.gradient_in_one_kernel(part, x, key, 0.3)
        assert das.dtype == torch.float32
        product = dropout.product_in_one_kernel(part, key, 0.3, a)
        assert product.dtype == dtype
        assert_close(product.double(), dropout.dropout((part.double() @ a.double()), key, 0.3), relative)
        assert_close(das.double(), part.double().t() @ whole, relative)


@pytest.mark.skipif(kernels.triton is None, reason="needs triton")
@pytest.mark.parametrize("shape", [("37", "24"), pytest.param(("4099", "40"), marks=pytest.mark.slow)], ids=str)
def test_kernels_are_right_in_tritons_interpreter(shape):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, *shape], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHARED = {80: 163, 86: 99, 90: 227}  # KiB that a block may have on A100; RTX 3080 to 3090; H100 (CUDA's guide)


@pytest.mark.skipif(kernels.triton is None, reason="needs triton")
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 86, pytest.param(90, marks=pytest.mark.slow)]
)
def test_the_kernels_that_decoding_and_fp8_start_compile_for_other_gpus(capability, monkeypatch, tmp_path):
    """As they are called for the 2.6B model, down to machine code by Triton's own ptxas; started they are not."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    start, made = JITFunction.run, []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", lambda *a, **named: made.append(start(*a, **named | {"warmup": True})))
    machine = {"device": capability, "stream": 0, "target": GPUTarget("cuda", capability, 32)}
    driver.set_active(SimpleNamespace(**{f"get_current_{name}": lambda *_, x=x: x for name, x in machine.items()}))
    try:
        start_all(fp8=capability >= 90)
    finally:
        driver.reset_active()
    names = {"_decode": 2, "_multiply": 5, "_multiply_gated": 1}
    names |= {"_low_rank": 4, "_gradient": 4, "_dropped_product": 4} | ({"_by_row": 2} if capability >= 90 else {})
    assert Counter(kernel.name for kernel in made) == names
    for kernel in made:
        assert kernel.metadata.target.arch == capability and kernel.asm["cubin"].startswith(b"\x7fELF")
        assert kernel.metadata.shared <= SHARED[capability] * 1024


def start_all(fp8: bool) -> None:
    """Every form of every kernel that decoding at the sizes of Ouro-2.6B uses, and those of the fp8 weights."""
    heads, dim, inner = 16, 128, 5632
    hidden = heads * dim

    def new(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.bfloat16)

    position, cache = torch.zeros(2, dtype=torch.int64), (new(2, heads, 64, dim), new(2, heads, 64, dim))
    for splits in (1, 4):
        kernels.attend_by_kernel(new(2, 3 * hidden), new(2, 1, dim), new(2, 1, dim), *cache, position, splits)
    x, norm = new(1, hidden), new(hidden)
    kernels.multiply(x, new(hidden, hidden), 1e-6)
    kernels.multiply(x, new(3 * hidden, hidden), 1e-6, norm)
    kernels.multiply(x, new(2 * inner, hidden), 1e-6, norm, x, norm)
    kernels.multiply(x, new(3 * hidden, hidden), 1e-6, norm, x, norm, norm)
    kernels.multiply(x, new(2 * inner, hidden), 1e-6, None, x, norm, norm)
    kernels.multiply_gated(new(1, 2 * inner), new(hidden, inner))
    for width, ranks in ((hidden, 48), (hidden, 16), (hidden, 32), (inner, 16)):
        x, key, a = new(64, width + ranks)[:, :width], torch.zeros(64, dtype=torch.int32), new(ranks, width + ranks)
        dropout.low_rank_in_one_kernel(x, key, 0.05, a[:, :width], 2.0)
        dropout.gradient_in_one_kernel(new(64, ranks), x, key, 0.05)
        dropout.product_in_one_kernel(new(64, ranks), key, 0.05, a[:, :width])
    for count in (2, 3) if fp8 else ():
        by_row_in_one_kernel([new(4, hidden)] * count)


@gpu
def test_kernels_are_right_on_this_gpu():
    for dtype, dim, one, other in ((torch.float32, 64, 1e-5, 1e-5), (torch.bfloat16, 128, 1e-2, 2e-2)):
        decoding_attends("cuda", dtype, dim, one, (1, 3, 16))
        rows_multiply("cuda", dtype, other, EVERY_SHAPE)
        products_drop("cuda", dtype, one, [(1, 24, 8), (300, 2048, 48), (9000, 5632, 16), (1000, 500, 64)])
    rows_scale_to_fp8("cuda", (24, 2048, 5632), 1e-4)
    one_row_decodes("cuda")


def interpret(size: str, width: str) -> None:
    from triton.runtime import interpreter

    usual = interpreter._patch_lang_tensor

    def patch(tensor, *scope):  # triton 3.6 gives the scope of its patches, too
        usual(tensor, *scope)
        # NumPy 2.4 no longer converts an array of one number, which the interpreter relies on.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    generate.compiled = lambda function: function
    # The interpreter's fp8 loses the carry where rounding reaches the next power of two.
    rows_scale_to_fp8("cpu", (24, 40), 0.04)
    one_row_decodes("cpu")
    decoding_attends("cpu", torch.bfloat16, 16, 1e-2, (1, 3))
    rows_multiply("cpu", torch.float32, 1e-6, {(int(size), int(width)): EVERY_FORM})
    # The interpreter's products of bf16 multiply the bits.
    products_drop("cpu", torch.float32, 1e-5, [(70, 130, 16), (1, 24, 8), (300, 260, 48)])


if __name__ == "__main__":
    interpret(*sys.argv[1:])
