"""Cases of SwiGLU."""

from __future__ import annotations

import torch

from kernels.swiglu import swiglu, swiglu_fused
from kernels.swiglu.op import _glu, _glu_backward, _glu_fused, _glu_fused_backward
from kernels.swiglu.reference import swiglu_fused_reference, swiglu_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal(shape, dtype, generator)


def _inputs_fused(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return (normal((*shape[:-1], 2 * shape[-1]), dtype, generator),)


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    return [(_glu, (*inputs, "silu")), (_glu_backward, detached(inputs[0], *inputs, "silu"))]


def _checks_fused(inputs: Inputs) -> list[tuple[object, Inputs]]:
    (gate_up,) = inputs
    d_y = gate_up[..., : gate_up.shape[-1] // 2].detach().clone()
    return [(_glu_fused, (gate_up, "silu")), (_glu_fused_backward, detached(d_y, gate_up, "silu"))]


CASES = [
    Case(
        name="swiglu",
        op=swiglu,
        reference=swiglu_reference,
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (1, 1), (3, 4096), (0, 5)],
        differentiable=(0, 1),
        checks=_checks,
        tuned="kernels.swiglu.kernel:BLOCKS",
        batched=(0, 1),
        extremes=(0.0, 1e2, -1e2),
    ),
    Case(
        name="swiglu_fused",
        op=swiglu_fused,
        reference=swiglu_fused_reference,
        inputs=_inputs_fused,
        shapes=[(5, 123), (2, 3, 7), (1, 1), (3, 2050), (0, 5)],
        differentiable=(0,),
        checks=_checks_fused,
        tuned="kernels.swiglu.kernel:BLOCKS",
        extremes=(0.0, 1e2, -1e2),
    ),
]
