"""Cases of the global norm."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.global_norm import global_norm
from kernels.global_norm.op import _sum_of_squares
from kernels.global_norm.reference import global_norm_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal((3,), torch.float32, generator), normal(shape, dtype, generator)


def _norm(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return global_norm([a, b, c])


def _reference(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return global_norm_reference([a, b, c])


CASES = [
    Case(
        name="global_norm",
        op=_norm,
        reference=_reference,
        inputs=_inputs,
        shapes=[(5, 123), (17000,), (1, 1), (0, 5)],
        differentiable=(),
        extreme_arguments=(0, 1, 2),
        checks=lambda inputs: [(_sum_of_squares, (list(inputs),))],
        tuned="kernels.global_norm.kernel:BLOCKS",
        batch_dim=None,
    )
]
