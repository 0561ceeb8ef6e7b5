"""Cases of the grouped linear layer by its kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.grouped_linear import grouped_linear, grouped_linear_pair
from kernels.grouped_linear.op import _grouped_linear, _grouped_linear_pair
from kernels.grouped_linear.reference import grouped_linear_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal

ENDS = (3, 3, 40, 41, 70)
"""An empty group, small ones, and rows of no group where there are more than 70."""


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """shape: N, K, M."""
    rows, features, width = shape
    ends = torch.tensor([min(end, rows) for end in ENDS], dtype=torch.int32)
    x, weight = normal((rows, features), dtype, generator), normal((len(ENDS), width, features), dtype, generator)
    return x, weight * features**-0.5, ends


def _pair(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x, weight, ends = _inputs(shape, dtype, generator)
    return x, weight, normal(tuple(weight.shape), dtype, generator) * shape[1] ** -0.5, ends


def _pair_reference(x: Tensor, first: Tensor, second: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return grouped_linear_reference(x, first, ends), grouped_linear_reference(x, second, ends)


CASES = [
    Case(
        name="grouped_linear",
        op=partial(grouped_linear, implementation="triton"),
        reference=grouped_linear_reference,
        inputs=_inputs,
        shapes=[(75, 40, 24), (200, 136, 72)],
        differentiable=(0, 1),
        checks=lambda inputs: [(_grouped_linear, (*inputs, "triton"))],
        tuned="kernels.grouped_linear.kernel:TILES",
        batch_dim=None,
        extremes=(0.0, 1e2, -1e2),
    ),
    Case(
        name="grouped_linear_pair",
        op=partial(grouped_linear_pair, implementation="triton"),
        reference=_pair_reference,
        inputs=_pair,
        shapes=[(75, 40, 24), (200, 136, 72)],
        differentiable=(0, 1, 2),
        checks=lambda inputs: [(_grouped_linear_pair, (*inputs, "triton"))],
        tuned="kernels.grouped_linear.kernel:TILES",
        batch_dim=None,
        extremes=(0.0, 1e2, -1e2),
    ),
]
