"""LoRA beside frozen weights, computed for a group of projections at a time: faster than PEFT's layers, in less memory.

    model = get_peft_model(load_ouro(...), LoraConfig(...))     # PEFT makes, saves and loads the adapters
    fuse(model, "bf16")                                         # or "fp8", "nf4": how the frozen weights are kept
    loss.backward(); optimizer.step(); refresh(model)           # after every change of the adapters

PEFT computes y = W x + s B A x for each projection by itself: two thin products and an addition beside each large one.
Here the projections that read the same input are one group (q, k, v; o; gate, up; down) and are computed together. How
the large product W x is made depends on how the frozen weights are kept: bf16.py (and fp32), nf4.py, fp8.py.

The adapters get the same gradients as from PEFT's layers. But dropout on LoRA's input has one mask for a group, not one
for each projection, and the mask is a hash of the token's random number (`noise`), loop, layer, group and column: it is
not stored, and a CPU, a GPU and any number of processes make the same one (dropout.py).
"""

import math

from ouro.model.bf16 import Bf16
from ouro.model.dropout import GOLDEN, dropped_product, gradient, hashed, low_rank, signed
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

    key: int32 (rows,), as of `dropout`; None: no dropout. kind: a key of KINDS. outs: the projections' output sizes.
    tensors: first the group's own tensors (`Group.frozen`), which hold W and the copies of A and B that are computed
    with; then PEFT's parameters A and B, which are not read here, and stand among the arguments because autograd gives
    gradients to arguments alone."""

    @staticmethod
    def forward(ctx, x, key, p, kind, outs, scale, *tensors):
        frozen, weights = tensors[: -2 * len(outs)], KINDS[kind]
        a, bs = weights.factors(frozen, outs, x.shape[1])

        x, low, ys = weights.outputs(frozen, a, bs, x, lambda rows: low_rank(rows, key, p, a, scale))
        ctx.save_for_backward(x, low, key, *frozen)
        ctx.constants = p, kind, outs, scale
        return ys

    @staticmethod
    def backward(ctx, *dys):
        p, kind, outs, scale = ctx.constants
        x, low, key, *frozen = ctx.saved_tensors
        weights, rank = KINDS[kind], low.shape[1] // len(outs)
        a, bs = weights.factors(frozen, outs, x.shape[1])
        # Always 0. The weights that are decoded below, and dropout(x), were computed in the forward pass, too, and the
        # compiler would therefore keep them from there: 5 GB. Both are computed with this zero here, and so depend on
        # the gradients, which the forward pass does not know. It is a comparison with infinity, because the compiler
        # of torch 2.11 knows that a product with 0 is 0, and does not know that no number is larger than infinity.
        zero = (dys[0][0, 0] > math.inf).float()
        part = torch.cat([d @ b for d, b in zip(dys, bs, strict=True)], 1) * scale  # (rows, ranks)
        key = None if key is None else key + zero.to(key.dtype)
        das = gradient(part, x, key, p, zero).split(rank)
        dbs = [(d.t() @ z).float() for d, z in zip(dys, low.split(rank, 1), strict=True)]
        # `input_gradient` puts the gradients dys side by side into one matrix. The thin products above read dys and not
        # the columns of that matrix: the compiler would then write it in a layout that takes four times as long.
        dropped = None if key is None else dropped_product(part, key, p, a)
        dx = weights.input_gradient(frozen, a, dys, part, dropped, zero)
        return dx, *[None] * (5 + len(frozen)), *das, *dbs


class Group(nn.Module):
    """The projections that read one input, computed together: (…, in) -> one (…, out) for each of them.

    The adapters' parameters stay PEFT's. A group has copies of them in the weights' dtype, which `refresh` brings up to
    date, and adds nothing to the model's state dict. number: of the group in the model, by which its dropout differs
    from other groups'."""

    def __init__(self, projections: list[LoraLayer], kind: str, number: int):
        super().__init__()
        self.projections, self.kind = projections, kind  # no ModuleList: the state dict would have them twice
        bases = [p.get_base_layer() for p in projections]
        self.outs, self.scale = tuple(base.out_features for base in bases), projections[0].scaling[ADAPTER]
        self.dropout = getattr(projections[0].lora_dropout[ADAPTER], "p", 0.0)
        self.rank, self.width = projections[0].r[ADAPTER], bases[0].in_features
        frozen = KINDS[kind].keep(bases, self.rank)
        self.count = len(frozen)
        for at, tensor in enumerate(frozen):
            self.register_buffer(f"frozen{at}", tensor, persistent=False)
        # A tensor, and no Python number: that would be a constant for the compiler, which would compile each layer.
        salt = torch.tensor(signed(number * GOLDEN), dtype=torch.int32, device=frozen[0].device)
        self.register_buffer("salt", salt, persistent=False)

    def frozen(self) -> list[Tensor]:
        """The tensors that the class of this kind of weights (`KINDS`) keeps: frozen weights and copies of A and B."""
        return [getattr(self, f"frozen{at}") for at in range(self.count)]

    def copies(self) -> list[Tensor]:
        """The group's copies, as views of `frozen`: of each A (rank, in), then of each B (out, rank)."""
        a, bs = KINDS[self.kind].factors(self.frozen(), self.outs, self.width)
        return [*a.split(self.rank), *bs]

    def linears(self) -> list[nn.Linear]:
        """PEFT's layers: each projection's A, then each one's B."""
        return [getattr(p, name)[ADAPTER] for name in ("lora_A", "lora_B") for p in self.projections]

    def adapters(self) -> list[nn.Parameter]:
        """PEFT's parameters: each A (rank, in), then each B (out, rank)."""
        return [linear.weight for linear in self.linears()]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output of each projection for x (…, in). noise: int32 (…), a random number for each token.
        Raises ValueError: there is dropout and no noise."""
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
    """Puts a `Group` in the place of each group of projections, in the model itself. kind: how the frozen weights are
    kept, bf16, fp8 or nf4.
    Raises ValueError: a DoRA adapter, which does not compute W x + s B A x."""
    number = 0
    for layer in model.get_base_model().model.layers:
        parts = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        for names in GROUPS:
            projections = [parts[name] for name in names]
            if any(p.lora_variant for p in projections):
                raise ValueError("DoRA's products are not plain LoRA's: leave this model as PEFT made it")
            projections[0].group = Group(projections, kind, number)
            number += 1
    model.train(model.training)  # a new Group is in training mode, and would drop in a model that is to be scored
    refresh(model)


@torch.no_grad()
def refresh(model: PeftModel) -> None:
    """Copies PEFT's parameters into the groups, or zeros where adapters are disabled (`disable_adapter`). To be called
    after each change of the parameters, and after adapters were disabled or enabled."""
    groups = [module for module in model.modules() if isinstance(module, Group)]
    if groups:  # there are none where PEFT's own layers compute, as with DoRA
        copies = [t for g in groups for t in g.copies()]
        torch._foreach_copy_(copies, [p for g in groups for p in g.adapters()])
        if groups[0].projections[0].disable_adapters:
            torch._foreach_zero_(copies)
