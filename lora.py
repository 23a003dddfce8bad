"""LoRA beside frozen weights, a group of projections at a time: what makes training fast and small.

    model = get_peft_model(load_ouro(...), LoraConfig(...))     # PEFT makes, saves and loads the adapters, as ever
    fuse(model, "bf16")                                         # or "fp8", "nf4": how the frozen weights are kept
    loss.backward(); optimizer.step(); refresh(model)           # after every change of the adapters

PEFT computes y = W x + s B A x for each projection by itself: two thin products and an addition beside each large one.
Here the projections of one input (q, k, v; o; gate, up; down) are one group, and

* bf16 (and fp32): the frozen W and the adapters A and B lie in one matrix [[W, B], [A, 0]]. The forward pass is
  [x, s A x] times its rows [W, B], the backward pass [dy, s B' dy] times its columns [W; A]: LoRA costs 1 to 3 % more
  inner dimension of the large products.
* fp8: W is kept twice in e4m3 for Hopper's tensor cores, scaled by row for W x and by column for W' dy; x and dy are
  scaled by row as they come. LoRA stays in bf16.
* nf4: bitsandbytes' 4-bit weights become bf16 one projection at a time, for one product, and are dropped.

The adapters' gradients are those of PEFT's layers. Dropout on LoRA's input has one mask a group, not one a projection.
"""

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

FROZEN = ("bf16", "fp8", "nf4")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
ADAPTER = "default"  # PEFT's name for the one adapter of a run


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) in e4m3, each row scaled to the format's largest number, 448, and the scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (rows, in) times the transpose of weight (out, in), which is scaled by row; in x's dtype."""
    x8, x_scale = by_row(x)
    return torch._scaled_mm(x8, weight.t(), x_scale, scale.t(), out_dtype=x.dtype, use_fast_accum=True)


# An operation of its own: the compiler would see that the forward and the backward pass decode the same weights, and
# keep them decoded in between, all 5 GB.
@torch.library.custom_op("ouro::nf4_product", mutates_args=())
def nf4_product(x: Tensor, state: list[Tensor], out_features: int, transposed: bool) -> Tensor:
    """x (rows, in) W', or with `transposed` x (rows, out) W, for W (out, in) in bitsandbytes' NF4.

    state: the packed numbers and their scales, one for 64; or, doubly quantised, the numbers, the scales in 8 bits,
    those scales' scales, one for 256, their code and their mean.
    """
    packed, absmax, *nested = state
    if nested:
        scales, code, mean = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scales, code, 256, torch.float32) + mean
    shape = [out_features, 2 * packed.numel() // out_features]
    weight = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", shape, x.dtype)
    return x @ (weight if transposed else weight.t())


@nf4_product.register_fake
def _(x, state, out_features, transposed):
    return x.new_empty(x.shape[0], 2 * state[0].numel() // out_features if transposed else out_features)


def _frozen_forward(x: Tensor, kind: str, outs: tuple[int, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if kind == "fp8":
        return fp8_product(x, *weights[:2]).split(outs, 1)
    each = len(weights) // len(outs)
    return tuple(nf4_product(x, weights[k * each : (k + 1) * each], o, False) for k, o in enumerate(outs))


def _frozen_backward(dys: tuple[Tensor, ...], kind: str, outs: tuple[int, ...], weights: tuple[Tensor, ...]) -> Tensor:
    if kind == "fp8":
        return fp8_product(torch.cat(dys, 1), *weights[2:])
    each = len(weights) // len(outs)
    return sum(
        nf4_product(dy, weights[k * each : (k + 1) * each], o, True)
        for k, (dy, o) in enumerate(zip(dys, outs, strict=True))
    )


class _Products(torch.autograd.Function):
    """y_k = W_k x + s B_k A_k dropped, for the projections k of a group; x and dropped (rows, in), y_k (rows, outs[k]).

    dropped: x after dropout, or None where there is none. tensors: A, all of them, (projections x rank, in); B_k; the
    frozen weights; and the parameters that A and B_k are copies of, here only to be given their gradients.
    """

    @staticmethod
    def forward(ctx, x, dropped, kind, outs, scale, *tensors):
        n = len(outs)
        a, bs, weights = tensors[0], tensors[1 : n + 1], tensors[n + 1 : -2 * n]
        source = x if dropped is None else dropped
        low = (source @ a.t()) * scale  # (rows, projections x rank)
        rank = low.shape[1] // n
        if kind == "bf16":
            both = torch.cat((x, low), 1)
            ys = tuple(both @ rows.t() for rows in weights[0][: sum(outs)].split(outs))
            # what is kept for the backward pass are parts of `both`: x needs no second copy
            low = both[:, x.shape[1] :]
            source = both[:, : x.shape[1]] if dropped is None else dropped
        else:
            ys = _frozen_forward(x, kind, outs, weights)
            ys = tuple(torch.addmm(y, z, b.t()) for y, z, b in zip(ys, low.split(rank, 1), bs, strict=True))
        ctx.save_for_backward(source, low, a, *bs, *weights)
        ctx.constants = kind, outs, scale, rank, dropped is not None
        return ys

    @staticmethod
    def backward(ctx, *dys):
        kind, outs, scale, rank, dropout = ctx.constants
        n = len(outs)
        source, low, a, *rest = ctx.saved_tensors
        bs, weights = rest[:n], tuple(rest[n:])
        parts = [(dy @ b) * scale for dy, b in zip(dys, bs, strict=True)]  # (rows, rank) each
        part = torch.cat(parts, 1)
        das = (part.t() @ source).split(rank)
        dbs = [dy.t() @ z for dy, z in zip(dys, low.split(rank, 1), strict=True)]
        if kind == "bf16":
            columns = weights[0][:, : source.shape[1]]
            dx = torch.cat(dys, 1) @ columns[: sum(outs)] if dropout else torch.cat((*dys, part), 1) @ columns
        else:
            dx = _frozen_backward(dys, kind, outs, weights)
            dx = dx if dropout else torch.addmm(dx, part, a)
        nothing = [None] * (3 + 1 + n + len(weights))
        return dx, part @ a if dropout else None, *nothing, *das, *dbs


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
            self.register_buffer("a", torch.zeros(ranks, self.width, **new), persistent=False)
            self.register_buffer("b", torch.zeros(total, self.rank, **new), persistent=False)
            if kind == "nf4":
                frozen = [tensor for weight in weights for tensor in nf4_state(weight)]
            else:
                whole = torch.cat(weights).detach()
                frozen = [*by_row(whole), *by_row(whole.t().contiguous())]
                for base in bases:
                    base.weight.data = base.weight.new_empty(0)
        self.count = len(frozen)
        for number, tensor in enumerate(frozen):
            self.register_buffer(f"frozen{number}", tensor, persistent=False)

    def factors(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The copies of A, all of them below each other (projections x rank, in), and of each B (out, rank)."""
        if self.kind != "bf16":
            return self.a, self.b.split(self.outs)
        total = sum(self.outs)
        rows = self.frozen0[:total, self.width :].split(self.outs)
        bs = tuple(r[:, k * self.rank : (k + 1) * self.rank] for k, r in enumerate(rows))
        return self.frozen0[total:, : self.width], bs

    def parameters_of(self) -> list[nn.Parameter]:
        """PEFT's parameters: each A (rank, in), then each B (out, rank)."""
        return [getattr(p, name)[ADAPTER].weight for name in ("lora_A", "lora_B") for p in self.projections]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, self.width)
        dropped = F.dropout(rows, self.dropout) if self.training and self.dropout else None
        a, bs = self.factors()
        frozen = [getattr(self, f"frozen{number}") for number in range(self.count)]
        ys = _Products.apply(rows, dropped, self.kind, self.outs, self.scale, a, *bs, *frozen, *self.parameters_of())
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def nf4_state(weight: Tensor) -> list[Tensor]:
    """What `nf4_product` reads, of a bitsandbytes Params4bit."""
    state = weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    if state.quant_type != "nf4" or state.blocksize != 64 or (nested and state.state2.blocksize != 256):
        raise ValueError(f"NF4 in blocks of 64 (and 256) is supported, this is {state.quant_type}, {state.blocksize}")
    return [weight.detach().as_subclass(Tensor), state.absmax, *nested]


def fuse(model: PeftModel, kind: str) -> None:
    """Makes the layers' groups compute together, in place; `kind` is how frozen weights are kept, one of FROZEN.

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
    refresh(model)


@torch.no_grad()
def refresh(model: PeftModel) -> None:
    """Copies the adapters into the groups; to be called after they changed."""
    groups = [module for module in model.modules() if isinstance(module, Group)]
    copies = [tensor for g in groups for a, bs in [g.factors()] for tensor in (*a.split(g.rank), *bs)]
    torch._foreach_copy_(copies, [p for g in groups for p in g.parameters_of()])
