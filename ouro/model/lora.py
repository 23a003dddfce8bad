"""LoRA beside frozen weights, a group of projections at a time: what makes training fast and small.

    model = get_peft_model(load_ouro(...), LoraConfig(...))     # PEFT makes, saves and loads the adapters, as ever
    fuse(model, "bf16")                                         # or "fp8", "nf4": how the frozen weights are kept
    loss.backward(); optimizer.step(); refresh(model)           # after every change of the adapters

PEFT computes y = W x + s B A x for each projection by itself: two thin products and an addition beside each large one.
Here the projections of one input (q, k, v; o; gate, up; down) are one group, computed together. How the large product
is made is another matter for each kind of frozen weights: bf16.py (and fp32), nf4.py, fp8.py.

The adapters' gradients are those of PEFT's layers. Dropout on LoRA's input has one mask a group, not one a projection,
and the mask is a hash of the token's number (`noise`), loop, layer, group and column: nothing of it is stored, and a
CPU, a GPU and any number of processes draw the same.
"""

import math

from ouro.model.bf16 import Bf16, add
from ouro.model.dropout import GOLDEN, dropout, gradient, hashed, low_rank, signed
from ouro.model.fp8 import Fp8
from ouro.model.nf4 import Nf4

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
KINDS = {"bf16": Bf16, "nf4": Nf4, "fp8": Fp8}
ADAPTER = "default"  # PEFT's name for the one adapter of a run


class _Products(torch.autograd.Function):
    """y_k = W_k x + s B_k A_k dropout(x), for the projections k of a group; x (rows, in), y_k (rows, outs[k]).

    key: int32 (rows,), as of `dropout`, or None where there is none. tensors: what the group keeps, copies of A
    and B among it; and the parameters that those are copies of, here only to be given their gradients."""

    @staticmethod
    def forward(ctx, x, key, p, kind, outs, scale, *tensors):
        frozen, weights = tensors[: -2 * len(outs)], KINDS[kind]
        a, bs = weights.factors(frozen, outs, x.shape[1])

        x, low, ys = weights.outputs(frozen, a, bs, x, lambda x: low_rank(x, key, p, a, scale))
        ctx.save_for_backward(x, low, key, *frozen)
        ctx.constants = p, kind, outs, scale
        return ys

    @staticmethod
    def backward(ctx, *dys):
        p, kind, outs, scale = ctx.constants
        x, low, key, *frozen = ctx.saved_tensors
        weights, rank = KINDS[kind], low.shape[1] // len(outs)
        a, bs = weights.factors(frozen, outs, x.shape[1])
        # Without this zero the compiler keeps 5 GB of decoded weights, and x after dropout, for the backward pass: the
        # forward pass computes the same. What depends on the zero cannot be computed before the gradients are known,
        # and no compiler knows that no number is larger than infinity (of a product with 0 torch 2.11 does).
        zero = (dys[0][0, 0] > math.inf).float()
        part = torch.cat([d @ b for d, b in zip(dys, bs, strict=True)], 1) * scale  # (rows, ranks)
        key = None if key is None else key + zero.to(key.dtype)
        das = gradient(part, x, key, p, zero).split(rank)
        dbs = [(d.t() @ z).float() for d, z in zip(dys, low.split(rank, 1), strict=True)]
        # The gradients are put beside each other in one matrix only here. If the thin products above read columns of
        # that matrix, the compiler writes it in a layout that takes four times as long.
        if key is None:
            dx = weights.input_gradient(frozen, a, dys, part, zero)
        else:
            dx = add(weights.input_gradient(frozen, a, dys, None, zero), dropout(part @ a, key, p))
        return dx, *[None] * (5 + len(frozen)), *das, *dbs


class Group(nn.Module):
    """The projections of one input, computed together: (…, in) -> one (…, out) each.

    It owns no parameter and nothing of the state dict: the adapters stay PEFT's, and what is here are copies in the
    weights' dtype, which `refresh` brings up to date."""

    def __init__(self, projections: list[LoraLayer], kind: str, number: int):
        super().__init__()
        self.projections, self.kind = projections, kind  # a plain list: as submodules they would change their names
        bases = [p.get_base_layer() for p in projections]
        self.outs, self.scale = tuple(base.out_features for base in bases), projections[0].scaling[ADAPTER]
        self.dropout = getattr(projections[0].lora_dropout[ADAPTER], "p", 0.0)
        self.rank, self.width = projections[0].r[ADAPTER], bases[0].in_features
        frozen = KINDS[kind].keep(bases, self.rank)
        self.count = len(frozen)
        for at, tensor in enumerate(frozen):
            self.register_buffer(f"frozen{at}", tensor, persistent=False)
        # As a tensor: with a number the compiler would translate every layer by itself.
        salt = torch.tensor(signed(number * GOLDEN), dtype=torch.int32, device=frozen[0].device)
        self.register_buffer("salt", salt, persistent=False)

    def frozen(self) -> list[Tensor]:
        return [getattr(self, f"frozen{at}") for at in range(self.count)]

    def copies(self) -> list[Tensor]:
        """What is kept of each A (rank, in), then of each B (out, rank)."""
        a, bs = KINDS[self.kind].factors(self.frozen(), self.outs, self.width)
        return [*a.split(self.rank), *bs]

    def linears(self) -> list[nn.Linear]:
        """PEFT's layers: of each A, then of each B."""
        return [getattr(p, name)[ADAPTER] for name in ("lora_A", "lora_B") for p in self.projections]

    def adapters(self) -> list[nn.Parameter]:
        """PEFT's parameters: each A (rank, in), then each B (out, rank)."""
        return [linear.weight for linear in self.linears()]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """noise: int32 of x's shape but the last; needed where there is dropout (ValueError)."""
        rows = x.reshape(-1, self.width)
        key = None
        if self.training and self.dropout:
            if noise is None:
                raise ValueError("dropout is drawn from noise, a number a token: give it to the model's forward")
            key = hashed(noise.flatten() ^ self.salt)
        constants = self.dropout, self.kind, self.outs, self.scale
        ys = _Products.apply(rows, key, *constants, *self.frozen(), *self.adapters())
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def fuse(model: PeftModel, kind: str) -> None:
    """Makes the layers' groups compute together, in place; `kind` is how frozen weights are kept: bf16, fp8 or nf4.
    Raises ValueError: an adapter whose products are not plain LoRA's (DoRA)."""
    number = 0
    for layer in model.get_base_model().model.layers:
        parts = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        for names in GROUPS:
            projections = [parts[name] for name in names]
            if any(p.lora_variant for p in projections):
                raise ValueError("DoRA's products are not plain LoRA's: leave this model as PEFT made it")
            projections[0].group = Group(projections, kind, number)
            number += 1
    model.train(model.training)  # new modules are in training mode, with dropout: a model to be scored is not
    refresh(model)


@torch.no_grad()
def refresh(model: PeftModel) -> None:
    """Copies the adapters into the groups, zeros where they are disabled; to be called after either changed."""
    groups = [module for module in model.modules() if isinstance(module, Group)]
    if groups:  # none where the layers are PEFT's
        copies = [t for g in groups for t in g.copies()]
        torch._foreach_copy_(copies, [p for g in groups for p in g.adapters()])
        if groups[0].projections[0].disable_adapters:
            torch._foreach_zero_(copies)
