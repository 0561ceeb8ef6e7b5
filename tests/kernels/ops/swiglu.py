"""Cases of SwiGLU."""

from __future__ import annotations

import torch

from kernels.swiglu import swiglu
from kernels.swiglu.op import _swiglu, _swiglu_backward
from kernels.swiglu.reference import swiglu_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal(shape, dtype, generator)


CASES = [
    Case(
        name="swiglu",
        op=swiglu,
        reference=swiglu_reference,
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (1, 1), (3, 4096), (0, 5)],
        differentiable=(0, 1),
        checks=lambda inputs: [(_swiglu, inputs), (_swiglu_backward, detached(inputs[0], *inputs))],
        tuned="kernels.swiglu.kernel:BLOCKS",
        batched=(0, 1),
        extremes=(0.0, 1e2, -1e2),
    )
]
