"""The linear layer in fp8: y = x W^T with three products of quantized matrices.

M rows, K features in, N features out. Every product wants both matrices with the contraction in the last dimension:

    y  [M, N] = x [M, K] (W [N, K])^T        quantized along K
    dx [M, K] = dy [M, N] (W^T [K, N])^T     along N
    dW [N, K] = dy^T [N, M] (x^T [K, M])^T   along M, padded to a multiple of 16

so each tensor is quantized together with its transpose, in one pass. What backward keeps is x^T and W^T in fp8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors
from kernels.fp8.formats import E4M3, PAD, Quantized, scale_from_amax
from kernels.fp8.matmul import fp8_matmul
from kernels.fp8.matmul.op import _fp8_matmul
from kernels.fp8.quantize import quantize_blocks, quantize_rowwise, quantize_tensorwise
from kernels.fp8.scaling import GRADIENT, INPUT, WEIGHT, LayerScaling, ScalingRecipe


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: ScalingRecipe,
    scaling: LayerScaling | None = None,
    x_amax: Tensor | None = None,
    weight_amax: Tensor | None = None,
) -> Tensor:
    """x [..., K] weight [N, K]^T + bias [N] to [..., N] in x's dtype, forward and backward products in fp8.

    K and N are multiples of 16. On a GPU with fp8 tensor cores; on the CPU the same numbers are quantized, and
    multiplied in fp32. tensorwise_delayed takes its scales from `scaling`, one of `DelayedScaling.layers`.
    tensorwise_dynamic finds the largest magnitudes, fp32 [], unless they are passed: a kernel before may know them, and
    ranks with parts of one tensor may have agreed on them. Raises TypeError for DTensors and for dtypes, ValueError for
    shapes and for arguments that the recipe does not take.
    """
    refuse_dtensors(x=x, weight=weight, bias=bias)
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype} and weight {weight.dtype}; use floating dtypes")
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}; pass [..., K] and [N, K]")
    if weight.shape[0] % PAD or weight.shape[1] % PAD:
        raise ValueError(f"weight has shape {list(weight.shape)}; fp8 takes [N, K] with both multiples of {PAD}")
    if (scaling is None) == (recipe.kind == "tensorwise_delayed"):
        raise ValueError(f"recipe {recipe.kind} and scaling={scaling}; pass it for tensorwise_delayed and only there")
    if recipe.kind != "tensorwise_dynamic" and (x_amax is not None or weight_amax is not None):
        raise ValueError(f"x_amax and weight_amax are for tensorwise_dynamic; recipe.kind is {recipe.kind}")
    rows = x.reshape(-1, x.shape[-1])
    recorded = torch.is_grad_enabled()
    x_q = _quantized(rows, recipe, INPUT, recorded and weight.requires_grad, scaling, x_amax)
    weight_q = _quantized(weight, recipe, WEIGHT, recorded and x.requires_grad, scaling, weight_amax)
    carrier = gradient_scale = None
    if scaling is not None:
        carrier, gradient_scale = scaling.carrier, scaling.scale[GRADIENT]
    y = _linear(
        rows, weight, bias, carrier, gradient_scale,
        x_q.data, x_q.scale, x_q.transposed, x_q.transposed_scale,
        weight_q.data, weight_q.scale, weight_q.transposed, weight_q.transposed_scale,
        recipe.kind, recipe.gradient, recipe.power_of_two, *recipe.fast_accumulation,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


def _quantized(
    tensor: Tensor,
    recipe: ScalingRecipe,
    which: int,
    transpose: bool,
    scaling: LayerScaling | None,
    amax: Tensor | None,
) -> Quantized:
    """The layer's input or weight."""
    scale = None
    if scaling is not None:
        scale = scaling.scale[which]
    elif amax is not None:
        scale = scale_from_amax(amax.detach(), E4M3, power_of_two=recipe.power_of_two)
    quantized, found = quantize_by_kind(
        tensor, recipe.kind, E4M3, recipe.power_of_two, transpose, which == WEIGHT, scale
    )
    if scaling is not None and found is not None:
        scaling.record(which, found)
    return quantized


def quantize_by_kind(
    tensor: Tensor,
    kind: str,
    dtype: torch.dtype,
    power_of_two: bool,
    transpose: bool,
    square: bool,
    scale: Tensor | None,
) -> tuple[Quantized, Tensor | None]:
    """By a recipe's kind; also the largest magnitude, if that is tensorwise. square: of block128, as for weights."""
    if kind == "rowwise":
        return quantize_rowwise(tensor, dtype=dtype, power_of_two=power_of_two, transpose=transpose), None
    if kind == "block128":
        made = quantize_blocks(tensor, square=square, dtype=dtype, power_of_two=power_of_two, transpose=transpose)
        return made, None
    return quantize_tensorwise(tensor, scale, dtype=dtype, power_of_two=power_of_two, transpose=transpose)


@torch.library.custom_op("lattice::fp8_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    carrier: Tensor | None,
    gradient_scale: Tensor | None,
    x_data: Tensor,
    x_scale: Tensor,
    x_transposed: Tensor | None,
    x_transposed_scale: Tensor | None,
    weight_data: Tensor,
    weight_scale: Tensor,
    weight_transposed: Tensor | None,
    weight_transposed_scale: Tensor | None,
    kind: str,
    gradient: torch.dtype,
    power_of_two: bool,
    fast_forward: bool,
    fast_backward: bool,
) -> Tensor:
    """y [M, N]. x and weight stand for what their gradients belong to; they are not read and not kept."""
    return _fp8_matmul(x_data, x_scale, weight_data, weight_scale, bias, x.dtype, fast_forward)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.lattice.fp8_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """The forward's; the backward's products are ops of their own."""
    return 2 * x[0] * weight[0] * weight[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gradient_scale, _, _, *x_transposed, _, _, w_transposed, w_transposed_scale = inputs[:13]
    ctx.save_for_backward(gradient_scale, *x_transposed, w_transposed, w_transposed_scale)
    ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.kind, ctx.gradient, ctx.power_of_two, _, ctx.fast = inputs[13:]


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    gradient_scale, x_t, x_t_scale, weight_t, weight_t_scale = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    wants_x, wants_weight, wants_bias, wants_amax = ctx.needs_input_grad[:4]
    d_x = d_weight = d_bias = amax = None
    if wants_x or wants_weight or wants_amax:
        d_q, amax = quantize_by_kind(d_y, ctx.kind, ctx.gradient, ctx.power_of_two, wants_weight, False, gradient_scale)
        if wants_x:
            d_x = fp8_matmul(
                d_q.data, d_q.scale, weight_t, weight_t_scale, out_dtype=x_dtype, fast_accumulation=ctx.fast
            )
        if d_q.transposed is not None and d_q.transposed_scale is not None:  # as wants_weight says
            d_weight = fp8_matmul(
                d_q.transposed, d_q.transposed_scale, x_t, x_t_scale, out_dtype=weight_dtype, fast_accumulation=ctx.fast
            )
    if wants_bias:
        d_bias = d_y.sum(dim=0, dtype=torch.float32).to(bias_dtype)
    return d_x, d_weight, d_bias, amax if wants_amax else None, *[None] * 14


_linear.register_autograd(_gradients, setup_context=_save)
