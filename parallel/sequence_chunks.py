"""Sequence parallelism in chunks: gathers and scatters of activations travel while products are computed.

At the ends of a branch (parallel/tensor.py) a product waits for the whole all-gather before it, and a reduce-scatter
begins when the whole product before it is done. With `parallel.sp_chunks` = C > 1 each rank's slice of a sequence is
cut into C chunks. All gathers start at once and arrive one after the other, chunk c is multiplied while c+1 is on its
way; and the product of chunk c is scattered while that of c+1 is computed. 1 - 1/C of each transfer can be hidden:

    forward    gather 0, 1, ... | x_0 A | x_1 A | ...             y_0 B | y_1 B, scatter 0 | ... | scatter C-1
    backward   dx = scatter(dy A^T) | dy^T x                      gather 0, 1, ... | dz_0 B^T | dz_1 B^T | ... | y^T dz

(of the first layers of a branch the backward is that of parallel/tensor.py: its one scatter travels during the weight
gradients). The same numbers are sent, in C times as many messages; rows are multiplied and put back where they were, so
only the order of sums inside a product may change. It costs copies of what is put in order, which a compiled graph
fuses with what reads them, and products with fewer rows: whether it pays, benchmarks/sequence_parallel.py measures.

Letters as in parallel/tensor.py; C chunks, t = T / (R C) tokens of a chunk on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis, start_all_gather, start_reduce_scatter, wait

SEQUENCE_DIM = 1
"""Of activations [B, T, ...]."""


def _start_gathers(x: Tensor, axis: Axis, chunks: int) -> list[Tensor]:
    """The chunks [R B, t, F] of all ranks' slices x [B, T/R, F], on their way, one behind the other."""
    return [start_all_gather(chunk, axis) for chunk in x.chunk(chunks, dim=SEQUENCE_DIM)]


def _in_order(parts: Sequence[Tensor], ranks: int) -> Tensor:
    """[B, T, F] from what was made of each gathered chunk, [R B, t, F]."""
    return torch.stack([part.unflatten(0, (ranks, -1)).transpose(0, 1) for part in parts], dim=2).flatten(1, 3)


def products_while_gathering(
    x: Tensor, axis: Axis, chunks: int, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """The whole x [B, T, I] of all ranks' slices [B, T/R, I]; and x W^T + b [B, T, O] for each W [O, I] and b [O]."""
    gathered: list[Tensor] = []
    products: list[list[Tensor]] = [[] for _ in weights]
    for pending in _start_gathers(x, axis, chunks):
        gathered.append(wait(pending))
        for parts, weight, bias in zip(products, weights, biases, strict=True):
            parts.append(F.linear(gathered[-1], weight, bias))
    return _in_order(gathered, axis.size), [_in_order(parts, axis.size) for parts in products]


class _ScatteredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, chunks: int) -> Tensor:
        ctx.axis, ctx.chunks = axis, chunks
        ctx.save_for_backward(x, weight)
        # What is scattered as chunk c has chunk c of every rank's slice: rows [B, R, t, I], brought together by a copy.
        rows = x.unflatten(SEQUENCE_DIM, (axis.size, chunks, -1)).unbind(2)
        products = (F.linear(part.flatten(1, 2), weight) for part in rows)
        pending = [start_reduce_scatter(product, axis, dim=SEQUENCE_DIM) for product in products]
        return torch.cat([wait(part) for part in pending], dim=SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gathered, d_x = [], []
        for pending in _start_gathers(grad, ctx.axis, ctx.chunks):
            gathered.append(wait(pending))
            d_x.append(gathered[-1] @ weight)
        whole = _in_order(gathered, ctx.axis.size)
        return _in_order(d_x, ctx.axis.size), whole.flatten(0, -2).t() @ x.flatten(0, -2), None, None


def scattered_product(x: Tensor, weight: Tensor, axis: Axis, chunks: int) -> Tensor:
    """This rank's slice [B, T/R, O] of the sum over ranks of x W^T: x [B, T, I/R], W [O, I/R]."""
    return _ScatteredProduct.apply(x, weight, axis, chunks)
