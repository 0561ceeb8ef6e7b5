"""Cases of the linear layer whose rows do not depend on others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.invariant_linear import invariant_linear
from kernels.invariant_linear.op import _linear
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    M, K, N = shape
    return (
        normal((M, K), dtype, generator),
        normal((N, K), dtype, generator, scale=K**-0.5),
        normal((N,), dtype, generator),
    )


CASES = [
    Case(
        name="invariant_linear",
        op=invariant_linear,
        reference=F.linear,
        inputs=_inputs,
        shapes=[(5, 123, 37), (70, 65, 70), (1, 1, 1), (3, 5, 0), (0, 5, 3)],
        differentiable=(0, 1, 2),
        checks=lambda inputs: [(_linear, inputs)],
        tuned="kernels.invariant_linear.kernel:TILES",
        tuned_dtype=torch.bfloat16,
        stride_bits=False,  # of gradients
        extremes=(0.0, 1e2, -1e2),
    ),
]
