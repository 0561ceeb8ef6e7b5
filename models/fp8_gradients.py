"""Gradients of products in fp8: what models/fp8.py and models/fp8_producers.py share.

dx = dy W
dW = dy^T x        of dy and x^T in fp8; the weight is quantized anew
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import E4M3, ScalingRecipe, fp8_matmul, transpose_quantized
from kernels.fp8.linear import quantize_by_kind
from parallel.collectives import Axis, start_all_reduce, start_reduce_scatter, wait
from parallel.tensor import SEQUENCE_DIM


@dataclass(frozen=True)
class Plan:
    """How some layers of one input are evaluated; constants of a compiled graph."""

    recipe: ScalingRecipe
    axis: Axis | None = None  # tp
    gathers: bool = False  # the input is this rank's slice of the tokens, and so is its gradient
    sums: bool = False  # the input is the same on all ranks, and its gradient the sum of theirs
    cut: tuple[bool, bool, bool] = (False, False, False)  # INPUT, WEIGHT, GRADIENT: this rank has a part of it
    as_one: bool = False  # layers that are one in other layouts, where they have one scale

    def agrees_on(self, which: int) -> bool:
        """Whether ranks have to find a largest magnitude together."""
        return self.cut[which] and self.recipe.kind.startswith("tensorwise")


def start_gradients(
    plan: Plan,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    gradients: Sequence[Any],
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    x_t: Tensor,
    x_t_scale: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """From Quantized gradients [rows, N_i], with transposed copies, of products with weights [N_i, K], or their
    bytes in fp8: that of the input, of this shape, on its way (take it with `arrived`), and those of the weights.
    dtypes: of both."""
    fast = plan.recipe.fast_accumulation[1]
    d_x: Any = None
    for d_y, weight, scale in zip(gradients, weights, weight_scales, strict=True):
        if weight.dtype == E4M3:
            w_t, w_t_scale = transpose_quantized(weight, after=d_y.data), scale
        else:
            known = scale if plan.recipe.kind.startswith("tensorwise") else None
            w, _ = quantized(weight, plan, E4M3, known, square=True, transpose=True)
            w_t, w_t_scale = w.transposed, w.transposed_scale
        part = fp8_matmul(d_y.data, d_y.scale, w_t, w_t_scale, out_dtype=dtypes[0], fast_accumulation=fast)
        d_x = part if d_x is None else d_x + part
    d_x = _start_to_ranks(d_x, shape, plan)  # travels while the weight gradients are computed
    d_weights = [
        fp8_matmul(d_y.transposed, d_y.transposed_scale, x_t, x_t_scale, out_dtype=dtypes[1], fast_accumulation=fast)
        for d_y in gradients
    ]
    return d_x, d_weights


def arrived(d_x: Tensor, plan: Plan) -> Tensor:
    """The gradient of an input from `start_gradients`, or once ranks have summed it."""
    return wait(d_x) if plan.gathers or plan.sums else d_x


def _start_to_ranks(d_x: Tensor, shape: Sequence[int], plan: Plan) -> Tensor:
    """From the gradient [rows, K] of what was multiplied, that of the input: summed over tp where each rank has a
    summand, and then on its way."""
    if plan.gathers:
        assert plan.axis is not None
        return start_reduce_scatter(d_x.view(shape[0], -1, shape[-1]), plan.axis, dim=SEQUENCE_DIM)
    if plan.sums:
        assert plan.axis is not None
        return start_all_reduce(d_x.view(shape), plan.axis)
    return d_x.view(shape)


def quantized(
    tensor: Tensor,
    plan: Plan,
    dtype: torch.dtype,
    scale: Tensor | None,
    *,
    square: bool = False,
    transpose: bool = False,
) -> tuple[Any, Tensor | None]:
    recipe = plan.recipe
    return quantize_by_kind(tensor.detach(), recipe.kind, dtype, recipe.power_of_two, transpose, square, scale)
