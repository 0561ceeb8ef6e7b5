"""Cases of RMSNorm."""

from __future__ import annotations

import torch

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm.op import _rms_norm, _rms_norm_backward
from kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal

EPS = 1e-5


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal(shape[-1:], dtype, generator), EPS


def _inputs_unweighted(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), None, EPS


def _inputs_added(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x, weight, eps = _inputs(shape, dtype, generator)
    return x, normal(shape, dtype, generator), weight, eps


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    x, weight, eps = inputs
    rstd = torch.rand(x.shape[:-1], device=x.device)
    return [(_rms_norm, (x, weight, None, eps)), (_rms_norm_backward, detached(x, x, weight, rstd, None, eps))]


def _checks_added(inputs: Inputs) -> list[tuple[object, Inputs]]:
    x, residual, weight, eps = inputs
    rstd = torch.rand(x.shape[:-1], device=x.device)
    return [(_rms_norm, (x, weight, residual, eps)), (_rms_norm_backward, detached(x, x, weight, rstd, residual, eps))]


CASES = [
    Case(
        name="rms_norm",
        op=rms_norm,
        reference=rms_norm_reference,
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (1, 1), (35, 128), (2, 2050), (0, 5)],
        differentiable=(0, 1),
        checks=_checks,
        tuned="kernels.rms_norm.kernel:FORWARD",
    ),
    Case(
        name="rms_norm_unweighted",
        op=rms_norm,
        reference=rms_norm_reference,
        inputs=_inputs_unweighted,
        shapes=[(5, 123)],
        differentiable=(0,),
        tuned="kernels.rms_norm.kernel:BACKWARD",
    ),
    Case(
        name="add_rms_norm",
        op=add_rms_norm,
        reference=add_rms_norm_reference,
        inputs=_inputs_added,
        shapes=[(3, 2, 123), (40, 64), (0, 5)],
        differentiable=(0, 1, 2),
        checks=_checks_added,
        tuned="kernels.rms_norm.kernel:BACKWARD",
        batched=(0, 1),
        extremes=(0.0, 1e4),
    ),
]
