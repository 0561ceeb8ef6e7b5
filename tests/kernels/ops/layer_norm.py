"""Cases of LayerNorm."""

from __future__ import annotations

import torch

from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.layer_norm.op import _layer_norm, _layer_norm_backward
from kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal

EPS = 1e-5


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x, weight, bias = (normal(s, dtype, generator) for s in (shape, shape[-1:], shape[-1:]))
    return x, weight, bias, EPS


def _inputs_unbiased(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal(shape[-1:], dtype, generator), None, EPS


def _inputs_added(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x, weight, bias, eps = _inputs(shape, dtype, generator)
    return x, normal(shape, dtype, generator), weight, bias, eps


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    x, weight, bias, eps = inputs
    mean, rstd = (torch.rand(x.shape[:-1], device=x.device) for _ in range(2))
    backward = detached(x, x, weight, bias, mean, rstd, None, eps)
    return [(_layer_norm, (x, weight, bias, None, eps)), (_layer_norm_backward, backward)]


CASES = [
    Case(
        name="layer_norm",
        op=layer_norm,
        reference=layer_norm_reference,
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (35, 128), (0, 5)],
        differentiable=(0, 1, 2),
        checks=_checks,
        tuned="kernels.rms_norm.kernel:FORWARD",
        # Rows of equal numbers: the result is rounding of the mean times 1 / sqrt(eps), except where it is exact.
        extremes=(0.0, 1.0),
    ),
    Case(
        name="layer_norm_unbiased",
        op=layer_norm,
        reference=layer_norm_reference,
        inputs=_inputs_unbiased,
        shapes=[(5, 123)],
        differentiable=(0, 1),
        tuned="kernels.rms_norm.kernel:BACKWARD",
        extremes=(0.0,),
    ),
    Case(
        name="add_layer_norm",
        op=add_layer_norm,
        reference=add_layer_norm_reference,
        inputs=_inputs_added,
        shapes=[(3, 2, 123), (40, 64)],
        differentiable=(0, 1, 2, 3),
        tuned="kernels.rms_norm.kernel:BACKWARD",
        batched=(0, 1),
        extremes=(0.0,),
    ),
]
