"""Cases of the grouped linear layer by its kernel."""

from __future__ import annotations

from functools import partial

import torch

from kernels.grouped_linear import grouped_linear
from kernels.grouped_linear.op import _grouped_linear
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
    )
]
