"""Cases of linear layers of a few rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.skinny_linear import add_skinny_linear, skinny_linear
from kernels.skinny_linear.op import _add_skinny_linear, _skinny_linear
from kernels.skinny_linear.reference import add_skinny_linear_reference, skinny_linear_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    M, features, outputs = shape
    return (
        normal((M, features), dtype, generator),
        normal((2 * outputs, features), dtype, generator, scale=features**-0.5),
        normal((features,), dtype, generator),
        normal((M, outputs), dtype, generator),
    )


def _call(function: Any, x: Tensor, weight: Tensor, norm: Tensor, residual: Tensor, *, fused: str) -> Tensor:
    weight = weight if fused == "gated" else weight[: residual.shape[1]]
    if function is skinny_linear_reference:
        return function(
            x,
            weight,
            norm if fused != "residual" else None,
            1e-5,
            residual if fused == "residual" else None,
            fused == "gated",
        )
    if fused == "residual":
        return function(x, weight, residual=residual)
    return function(x, weight, norm_weight=norm, eps=1e-5, gated=fused == "gated")


def _checks(inputs: Inputs) -> list[tuple[Any, Inputs]]:
    x, weight, norm, residual = inputs
    return [(_skinny_linear, (x, weight, norm, 1e-5, residual, True))]


CASES = [
    Case(
        name=f"skinny_linear_{fused}",
        op=partial(_call, skinny_linear, fused=fused),
        reference=partial(_call, skinny_linear_reference, fused=fused),
        inputs=_inputs,
        shapes=[(1, 72, 11), (3, 1100, 9)],
        differentiable=(),
        extreme_arguments=(0, 3),
        batch_dim=None,  # one row alone has a kernel of its own
        checks=_checks,
        tuned=f"kernels.skinny_linear.kernel:{table}",
    )
    for fused, table in (("norm", "ROW_BLOCKS"), ("residual", "BLOCKS"), ("gated", "ROW_BLOCKS"))
]


def _inputs_added(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    x, weight, norm, _ = _inputs(shape, dtype, generator)
    return x, normal(x.shape, dtype, generator), weight, norm


def _call_added(
    function: Any, x: Tensor, residual: Tensor, weight: Tensor, norm: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor]:
    if function is add_skinny_linear_reference:
        return function(x, residual, weight, norm, 1e-5, gated)
    return function(x, residual, weight, norm_weight=norm, eps=1e-5, gated=gated)


def _checks_added(inputs: Inputs) -> list[tuple[Any, Inputs]]:
    x, residual, weight, norm = inputs
    return [(_add_skinny_linear, (x, residual, weight, norm, 1e-5, True))]


CASES += [
    Case(
        name=f"add_skinny_linear{'_gated' if gated else ''}",
        op=partial(_call_added, add_skinny_linear, gated=gated),
        reference=partial(_call_added, add_skinny_linear_reference, gated=gated),
        inputs=_inputs_added,
        shapes=[(1, 72, 11), (3, 1100, 9)],
        differentiable=(),
        extreme_arguments=(0, 1),
        batch_dim=None,
        checks=_checks_added,
        tuned=f"kernels.skinny_linear.kernel:{table}",
    )
    for gated, table in ((False, "BLOCKS"), (True, "ROW_BLOCKS"))
]
