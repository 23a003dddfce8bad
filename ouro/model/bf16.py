"""Frozen weights as they are, bf16 or fp32, in one matrix with LoRA's factors: one large product computes both.

The projections k of a group have one input x (rows, in). Their weights W_k (out_k, in) and the factors A_k (rank, in)
and B_k (out_k, rank) stand in

    [[W, B],       W: all W_k below each other; B: each B_k beside its W_k, in columns of its own
     [A, 0]]       A: all A_k below each other

The forward pass is [x, s A x] times the rows [W, B], the backward pass [dy, s B' dy] times the columns [W; A]: LoRA
costs 0.3 to 2.3 % more inner dimension of the large products at rank 16. With dropout the backward pass is dy times the
columns W, added to dropout(A' s B' dy), which dropout.py computes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; bf16 is added in fp32, so that the compiler adds in the kernel that reads the sum. It would turn the plain
    sum of a matrix and a product into a product that adds to a copy of the matrix, and the copy takes time."""
    return (x.float() + y.float()).to(x.dtype) if x.dtype == torch.bfloat16 else x + y


@torch.library.custom_op("ouro::add_product", mutates_args=("y",))
def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y (rows, out) += x (rows, in) times the transpose of weight (out, in). An operation of its own, so that the
    compiler adds in place, too: else it writes the product, and reads it again wherever the sum is used, which took
    2.8 % of a step."""
    y.addmm_(x, weight.t())


@add_product.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    pass


class Bf16:
    """How a group of projections keeps and multiplies its weights. `Group.frozen` is [the matrix (outputs + ranks,
    in + ranks)]; outputs, ranks: summed over the projections."""

    @classmethod
    def keep(cls, bases: list[nn.Linear], rank: int) -> list[Tensor]:
        """The matrix with zeros for A and B; the layers' own weights become views of it."""
        outs, width, ranks = [base.out_features for base in bases], bases[0].in_features, rank * len(bases)
        matrix = bases[0].weight.new_zeros(sum(outs) + ranks, width + ranks, requires_grad=False)
        for base, rows in zip(bases, matrix[: sum(outs)].split(outs), strict=True):
            rows[:, :width] = base.weight.detach()
            base.weight.data = rows[:, :width]
        return [matrix]

    @classmethod
    def factors(cls, frozen: list[Tensor], outs: tuple[int, ...], width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The copies of A, all below each other (ranks, in), and of each B (out, rank)."""
        total = sum(outs)
        return frozen[0][total:, :width], own_columns(frozen[0][:total, width:], outs)

    @classmethod
    def outputs(
        cls, frozen: list[Tensor], a: Tensor, bs: tuple[Tensor, ...], x: Tensor, low_rank_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(x, low_rank_of(x) = s A x (rows, ranks), the outputs (rows, out)); the first two as they are kept for the
        backward pass."""
        width = x.shape[1]
        both = torch.cat((x, x.new_zeros(len(x), len(a))), 1)
        # From `both`, not from x: the compiler would write x a second time for that product.
        low = low_rank_of(both[:, :width])
        # Compiled this is a write in place; assigning to the last columns would copy the whole matrix.
        both = torch.as_strided_scatter(both, low, low.shape, both.stride(), width)
        return both[:, :width], both[:, width:], tuple(both @ rows.t() for rows in cls.rows(frozen, bs, width))

    @classmethod
    def input_gradient(
        cls,
        frozen: list[Tensor],
        a: Tensor,
        dys: tuple[Tensor, ...],
        part: Tensor,
        dropped: Tensor | None,
        zero: Tensor,
    ) -> Tensor:
        """W' dy + A' part (rows, in), of part = s B' dy (rows, ranks). dropped: A' part where it is computed already,
        with dropout; its memory becomes the result's."""
        columns = cls.columns(frozen, a, len(dys), zero)
        if dropped is None:
            return torch.cat((*dys, part), 1) @ columns
        add_product(dropped, torch.cat(dys, 1), columns[: len(columns) - len(a)].t())
        return dropped

    @classmethod
    def rows(cls, frozen: list[Tensor], bs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        """[W_k, B] for each projection."""
        outs = [len(b) for b in bs]
        return frozen[0][: sum(outs)].split(outs)

    @classmethod
    def columns(cls, frozen: list[Tensor], a: Tensor, count: int, zero: Tensor) -> Tensor:
        """[W; A] of `count` projections. zero: `lora._Products.backward` says why it is there."""
        return frozen[0][:, : a.shape[1]]


def own_columns(side: Tensor, outs: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Each B_k (out_k, rank) of all of them (outputs, ranks), where it stands in its own rows and columns."""
    rank = side.shape[1] // len(outs)
    return tuple(b[:, k * rank : (k + 1) * rank] for k, b in enumerate(side.split(outs)))
