"""A case of the addition of a low-rank product, its second factor as it is stored and transposed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.low_rank import add_low_rank_
from kernels.low_rank.op import _add
from kernels.low_rank.reference import add_low_rank_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """shape: N, O, R."""
    rows, columns, rank = shape
    of = ((rows, columns), (rows, rank), (rank, columns))
    return tuple(normal(sizes, dtype, generator) for sizes in of)


def _added(y: Tensor, u: Tensor, v: Tensor, transposed: bool = False) -> Tensor:
    """To a copy, which the generic tests do not miss."""
    v = v.t().contiguous().t() if transposed else v
    return add_low_rank_(y.clone(memory_format=torch.contiguous_format), u, v, scale=0.5)


SHAPES = [(37, 53, 5), (64, 130, 16), (1, 1, 1), (9, 300, 40), (0, 4, 2), (5, 7, 0), (6, 10, 200)]
CASES = [
    Case(
        name=name,
        op=partial(_added, transposed=transposed),
        reference=partial(add_low_rank_reference, scale=0.5),
        inputs=_inputs,
        shapes=SHAPES,
        differentiable=(),
        extreme_arguments=(0, 1, 2),
        checks=lambda inputs: [(_add, (detached(*inputs)[0].clone(), *inputs[1:], 0.5))],
        tuned=tuned,
        batch_dim=None,  # of ranks that the kernel does not have the product is torch's
        stride_bits=False,
    )
    for name, transposed, tuned in (
        ("add_low_rank", False, "kernels.low_rank.kernel:TILES"),
        ("add_low_rank_transposed", True, None),
    )
]
