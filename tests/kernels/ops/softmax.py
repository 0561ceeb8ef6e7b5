"""Cases of softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.softmax import softmax
from kernels.softmax.op import _softmax, _softmax_backward
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return (normal(shape, dtype, generator, scale=3.0),)


def _by_torch(x: Tensor) -> Tensor:
    """Keeps the rounded result for backward, as ours does. In bf16 the gradient then is off by up to 2^-9 of the
    largest probability's, where a reference that keeps fp32 is not."""
    return x.softmax(-1)


CASES = [
    Case(
        name="softmax",
        op=softmax,
        reference=_by_torch,
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (1, 1), (35, 64), (2, 2050), (0, 5)],
        differentiable=(0,),
        checks=lambda inputs: [(_softmax, inputs), (_softmax_backward, detached(inputs[0], inputs[0]))],
        tuned="kernels.softmax.kernel:FORWARD",
    ),
    Case(
        name="softmax_wide",  # beyond what fits in registers
        op=softmax,
        reference=_by_torch,
        inputs=_inputs,
        shapes=[(2, 33000)],
        differentiable=(0,),
        tuned="kernels.softmax.kernel:BACKWARD",
    ),
]
