"""LoRA beside frozen weights, a group of projections at a time: what makes training fast and small.

    model = get_peft_model(load_ouro(...), LoraConfig(...))     # PEFT makes, saves and loads the adapters, as ever
    fuse(model, "bf16")                                         # or "fp8", "nf4": how the frozen weights are kept
    loss.backward(); optimizer.step(); refresh(model)           # after every change of the adapters

PEFT computes y = W x + s B A x for each projection by itself: two thin products and an addition beside each large one.
Here the projections of one input (q, k, v; o; gate, up; down) are one group, written as if they were one, and

* bf16 (and fp32): the frozen W and the adapters A and B lie in one matrix [[W, B], [A, 0]]. The forward pass is
  [x, s A x] times its rows [W, B], the backward pass [dy, s B' dy] times its columns [W; A]: LoRA costs 0.3 to
  2.3 % more inner dimension of the large products at rank 16.
* nf4: the same, and the matrix is made from bitsandbytes' 4-bit numbers for one product, and dropped.
* fp8: W is kept twice in e4m3 for Hopper's tensor cores, scaled by row for W x and by column for W' dy; x and dy are
  scaled by row as they come. LoRA stays in bf16.

The adapters' gradients are those of PEFT's layers. Dropout on LoRA's input has one mask a group, not one a projection.
"""

from collections.abc import Sequence

from ouro.model.fp8 import by_row, by_row_together, fp8_product
from ouro.model.nf4 import nf4_state, nf4_weight

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
ADAPTER = "default"  # PEFT's name for the one adapter of a run


@by_row_together.register_fake
def _(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, width = parts[0].shape
    whole = parts[0].new_empty(rows, len(parts) * width, dtype=torch.float8_e4m3fn)
    return whole, parts[0].new_empty(rows, 1, dtype=torch.float32)


@torch.library.custom_op("ouro::add_product", mutates_args=("y",))
def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y (rows, out) += x (rows, in) times the transpose of weight (out, in). In place for the compiler too, which would
    else write the product, and read it wherever the sum is used: 2.8 % of a step of fp8."""
    y.addmm_(x, weight.t())


@add_product.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    pass


def dropout(x: Tensor, kept: Tensor, p: Tensor | float) -> Tensor:
    """x (rows, columns) where `kept`, larger by 1 / (1 - p), and zero elsewhere."""
    return torch.where(kept, x / (1 - p), 0).to(x.dtype)


def with_room(x: Tensor, columns: int) -> Tensor:
    """x (rows, …) and beside it as many columns of zeros."""
    return torch.cat((x, x.new_zeros(len(x), columns)), 1)


def fill(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` with `part` as its last columns: compiled, a write in place, where plain indexing would copy it all."""
    return torch.as_strided_scatter(whole, part, part.shape, whole.stride(), whole.shape[1] - part.shape[1])


class _Products(torch.autograd.Function):
    """y_k = W_k x + s B_k A_k dropout(x), for the projections k of a group; x (rows, in), y_k (rows, outs[k]).

    kept: bool (rows, in), what dropout leaves, or None where there is none. tensors: the group's, copies of A and B
    among them; and the parameters that those are copies of, here only to be given their gradients.
    """

    @staticmethod
    def forward(ctx, x, kept, p, kind, outs, scale, *tensors):
        n, width = len(outs), x.shape[1]
        frozen = tensors[: -2 * n]
        a, bs = _factors(kind, frozen, outs, width)
        if kind != "fp8":
            both = with_room(x, len(a))
            x = both[:, :width]  # so that it is not written twice, here and for the product with A
        low = ((x if kept is None else dropout(x, kept, p)) @ a.t()) * scale  # (rows, projections x rank)
        if kind == "fp8":
            y = fp8_product(by_row(x), *frozen[2:4], x.dtype)
            if n < 3:
                add_product(y, low, frozen[1])
                ys = y.split(outs, 1)
            else:  # of q, k and v only v is kept as it is, and as a part of y it would keep the other two in memory
                lows = zip(y.split(outs, 1), low.split(len(a) // n, 1), bs, strict=True)
                ys = tuple(_sum(y, z @ b.t()) for y, z, b in lows)
        else:
            both = fill(both, low)
            x, low = both[:, :width], both[:, width:]
            ys = tuple(both @ rows.t() for rows in _rows(kind, frozen, bs, width))
        ctx.save_for_backward(x, low, kept, *frozen)
        ctx.constants = p, kind, outs, scale
        return ys

    @staticmethod
    def backward(ctx, *dys):
        p, kind, outs, scale = ctx.constants
        n = len(outs)
        x, low, kept, *frozen = ctx.saved_tensors
        a, bs = _factors(kind, frozen, outs, x.shape[1])
        # The compiler sees that what is computed here was computed in the forward pass already, and would keep it till
        # now: the decoded weights, 5 GB, and x after dropout. With a zero that is only known now, it does not.
        zero = dys[0][0, 0].float() * 0
        part = torch.cat([d @ b for d, b in zip(dys, bs, strict=True)], 1) * scale  # (rows, projections x rank)
        dropped = x if kept is None else dropout(x, kept, p + zero)
        das = [da.float() for da in (part.t() @ dropped).split(len(a) // n)]
        dbs = [(d.t() @ z).float() for d, z in zip(dys, low.split(len(a) // n, 1), strict=True)]
        # The gradients stand beside each other only here: the thin products above, taken of columns of one matrix, make
        # the compiler write that matrix in a form that took four times as long.
        if kind == "fp8":
            d8 = by_row_together(dys) if n > 1 else by_row(dys[0])  # of one the compiler writes as good a kernel
            dx = fp8_product(d8, *frozen[4:], x.dtype)
        elif kept is None:
            dx = torch.cat((*dys, part), 1) @ _columns(kind, frozen, a, n, zero)
        else:
            dx = torch.cat(dys, 1) @ _columns(kind, frozen, a, n, zero)[: sum(outs)]
        if kept is not None:
            dx = _sum(dx, dropout(part @ a, kept, p))
        elif kind == "fp8":
            dx = _sum(dx, part @ a)
        return dx, *[None] * (5 + len(frozen)), *das, *dbs


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y. In fp32, so that it is added where it is used: of a plain sum the compiler makes a copy of x and a product
    that adds to it."""
    return (x.float() + y.float()).to(x.dtype) if x.dtype == torch.bfloat16 else x + y


def _factors(kind: str, frozen, outs: tuple[int, ...], width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The copies of A, all of them below each other (projections x rank, in), and of each B (out, rank)."""
    total = sum(outs)
    if kind == "nf4":
        return frozen[0], frozen[1].split(outs)
    a, side = (frozen[0], frozen[1]) if kind == "fp8" else (frozen[0][total:, :width], frozen[0][:total, width:])
    rank = side.shape[1] // len(outs)
    return a, tuple(b[:, k * rank : (k + 1) * rank] for k, b in enumerate(side.split(outs)))


def _decoded(frozen, n: int, width: int, dtype: torch.dtype, zero: Tensor | float = 0.0) -> list[Tensor]:
    _, _, code, *states = frozen
    each = len(states) // n
    return [nf4_weight(states[k * each : (k + 1) * each], code + zero, width, dtype) for k in range(n)]


def _rows(kind: str, frozen, bs, width: int) -> list[Tensor]:
    """[W, B] of a group's matrix [[W, B], [A, 0]], for each projection; B_k stands in the columns of its rank."""
    if kind == "bf16":
        return frozen[0][: sum(len(b) for b in bs)].split([len(b) for b in bs])
    weights, (n, rank) = _decoded(frozen, len(bs), width, bs[0].dtype), (len(bs), bs[0].shape[1])
    return [
        torch.cat((w, F.pad(b, (k * rank, (n - 1 - k) * rank))), 1)
        for k, (w, b) in enumerate(zip(weights, bs, strict=True))
    ]


def _columns(kind: str, frozen, a: Tensor, n: int, zero: Tensor) -> Tensor:
    """[W; A] of a group's matrix [[W, B], [A, 0]]."""
    width = a.shape[1]
    return frozen[0][:, :width] if kind == "bf16" else torch.cat((*_decoded(frozen, n, width, a.dtype, zero), a))


class Group(nn.Module):
    """The projections of one input, computed together: (…, in) -> one (…, out) each.

    It owns no parameter and nothing of the state dict: the adapters stay PEFT's, and what is here are copies in the
    weights' dtype, which `refresh` brings up to date.
    """

    def __init__(self, projections: list[LoraLayer], kind: str):
        super().__init__()
        self.projections, self.kind = projections, kind  # a plain list: registered, their names would change
        bases = [p.get_base_layer() for p in projections]
        self.outs, self.scale = tuple(base.out_features for base in bases), projections[0].scaling[ADAPTER]
        self.dropout = getattr(projections[0].lora_dropout[ADAPTER], "p", 0.0)
        self.rank, self.width = projections[0].r[ADAPTER], bases[0].in_features
        ranks, total = self.rank * len(bases), sum(self.outs)
        weights = [base.weight for base in bases]
        dtype = bases[0].compute_dtype if kind == "nf4" else weights[0].dtype
        new = {"dtype": dtype, "device": weights[0].device}
        if kind == "bf16":
            frozen = [torch.zeros(total + ranks, self.width + ranks, **new)]
            for base, rows in zip(bases, frozen[0][:total].split(self.outs), strict=True):
                rows[:, : self.width] = base.weight.detach()
                base.weight.data = rows[:, : self.width]
        else:
            frozen = [torch.zeros(ranks, self.width, **new)]
            frozen += [torch.zeros(total, self.rank if kind == "nf4" else ranks, **new)]
            if kind == "nf4":
                frozen += [weights[0].quant_state.code, *(tensor for w in weights for tensor in nf4_state(w))]
            else:
                whole = torch.cat(weights).detach()
                frozen += [*by_row(whole), *by_row(whole.t().contiguous())]
                for base in bases:
                    base.weight.data = base.weight.new_empty(0)
        self.count = len(frozen)
        for number, tensor in enumerate(frozen):
            self.register_buffer(f"frozen{number}", tensor, persistent=False)

    def frozen(self) -> list[Tensor]:
        return [getattr(self, f"frozen{number}") for number in range(self.count)]

    def decoded_fp8(self) -> tuple[Tensor, ...]:
        """Of kind fp8, the projections' frozen weights (out, in) in fp32: what the products with x multiply by."""
        whole, scale = self.frozen()[2:4]
        return (whole.float() * scale).split(self.outs)

    def copies(self) -> list[Tensor]:
        """What is kept of each A (rank, in), then of each B (out, rank)."""
        a, bs = _factors(self.kind, self.frozen(), self.outs, self.width)
        return [*a.split(self.rank), *bs]

    def adapters(self) -> list[nn.Linear]:
        """PEFT's: of each A, then of each B."""
        return [getattr(p, name)[ADAPTER] for name in ("lora_A", "lora_B") for p in self.projections]

    def parameters_of(self) -> list[nn.Parameter]:
        """PEFT's parameters: each A (rank, in), then each B (out, rank)."""
        return [adapter.weight for adapter in self.adapters()]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, self.width)
        kept = None
        if self.training and self.dropout:
            kept = torch.rand(rows.shape, device=x.device) >= self.dropout
        constants = self.dropout, self.kind, self.outs, self.scale
        ys = _Products.apply(rows, kept, *constants, *self.frozen(), *self.parameters_of())
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def fuse(model: PeftModel, kind: str) -> None:
    """Makes the layers' groups compute together, in place; `kind` is how frozen weights are kept: bf16, fp8 or nf4.

    Raises:
        ValueError: an adapter whose products are not plain LoRA's (DoRA).
    """
    for layer in model.get_base_model().model.layers:
        parts = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        for names in GROUPS:
            projections = [parts[name] for name in names]
            if any(p.lora_variant for p in projections):
                raise ValueError("DoRA's products are not plain LoRA's: leave this model as PEFT made it")
            projections[0].group = Group(projections, kind)
    model.train(model.training)  # new modules are in training mode, with dropout: a model to be scored is not
    refresh(model)


@torch.no_grad()
def refresh(model: PeftModel) -> None:
    """Copies the adapters into the groups, zeros where they are disabled; to be called after either changed."""
    groups = [module for module in model.modules() if isinstance(module, Group)]
    if groups:  # none where the layers are PEFT's
        copies = [t for g in groups for t in g.copies()]
        torch._foreach_copy_(copies, [p for g in groups for p in g.parameters_of()])
        if groups[0].projections[0].disable_adapters:
            torch._foreach_zero_(copies)
