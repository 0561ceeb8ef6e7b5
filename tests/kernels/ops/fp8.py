"""Cases of fp8: quantized tensors are compared as what they dequantize to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import (
    E4M3,
    E5M2,
    Quantized,
    ScalingRecipe,
    dequantize,
    fp8_linear,
    fp8_matmul,
    quantize_blocks,
    quantize_rowwise,
    quantize_tensorwise,
    scale_from_amax,
)
from kernels.fp8.matmul.reference import matmul_reference
from kernels.fp8.quantize.op import _quantize_blocks, _quantize_dynamic, _quantize_rowwise, _quantize_scaled
from kernels.fp8.quantize.reference import (
    amax_reference,
    quantize_blocks_reference,
    quantize_rowwise_reference,
    quantize_tensorwise_reference,
)
from tests.kernels.ops.case import Case, Inputs, Shape, normal

# Hopper's tensor core adds fp8 products in a fixed point: a wgmma shifts 32 products and the sum so far to the largest
# exponent among them and drops what lies 14 bits below. An addend so loses up to 2^-13 of the largest; the losses have
# the signs of the addends and mostly cancel, so a block of 128 is off by some 2^-13 times its sum of |a||b|: by 0.7 of
# that at worst in the smallest case on an H200. Twice 2^-13 is allowed. Our kernel adds blocks in fp32, so it stays at
# that for any K. With random signs and K <= 272, sums of |a||b| are at most four times the largest element (3.4 for the
# largest case): 2^-10 of it. The interpreter adds in fp32.
CUDA = torch.cuda.is_available()
TOLERANCE = {torch.float32: 2.0**-10 if CUDA else 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(5, 123), (130, 20), (3, 300), (48, 32), (0, 16)]
FEW_ROWS = [(5, 123), (3, 300), (0, 16)]  # one program each


def _matrix(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Magnitudes over several powers of ten."""
    return (normal(shape, dtype, generator) * normal(shape, dtype, generator, scale=1.5).exp(),)


def _values(q: Quantized) -> tuple[Tensor, ...]:
    values = [dequantize(q.data, q.scale), q.scale.clone()]
    if q.transposed is not None and q.transposed_scale is not None:
        columns = q.transposed.shape[1]
        scale = q.transposed_scale
        if scale.ndim and scale.shape[1] > 1:  # blocks beyond the last row of x hold only padding
            scale = torch.nn.functional.pad(scale, (0, -(-columns // 128) - scale.shape[1]))
        values += [dequantize(q.transposed, scale), q.transposed_scale.clone()]
    return tuple(values)


def _dynamic_reference(x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool) -> Quantized:
    scale = scale_from_amax(amax_reference(x), dtype, power_of_two=power_of_two)
    return quantize_tensorwise_reference(x, scale, dtype, transpose)


def _quantization(
    name: str,
    op: Callable[..., Quantized],
    reference: Callable[..., Quantized],
    checks: Callable[[Inputs], Any],
    tuned: str | None,
    **other: Any,
) -> Case:
    return Case(
        name=f"fp8_quantize_{name}",
        op=lambda x: _values(op(x)),
        reference=lambda x: _values(reference(x)),
        inputs=_matrix,
        differentiable=(),
        extreme_arguments=(0,),
        checks=checks,
        tuned=tuned,
        **{"shapes": SHAPES, "batch_dim": None, **other},
    )


_KERNEL = "kernels.fp8.quantize.kernel"


def _tensorwise() -> list[Case]:
    def scaled(x: Tensor) -> Quantized:
        return quantize_tensorwise(x, torch.tensor(0.01, device=x.device), transpose=True)[0]

    def scaled_reference(x: Tensor) -> Quantized:
        return quantize_tensorwise_reference(x, torch.tensor(0.01, device=x.device), E4M3, True)

    return [
        _quantization(
            "dynamic",
            lambda x: quantize_tensorwise(x, dtype=E5M2)[0],
            partial(_dynamic_reference, dtype=E5M2, power_of_two=False, transpose=False),
            lambda inputs: [(_quantize_dynamic, (*inputs, E4M3, False, True))],
            f"{_KERNEL}:FLAT",
        ),
        _quantization(
            "scaled_transposed",
            scaled,
            scaled_reference,
            lambda inputs: [(_quantize_scaled, (*inputs, torch.tensor(0.01, device=inputs[0].device), E4M3, True))],
            f"{_KERNEL}:TILE",
        ),
    ]


def _rowwise(transpose: bool) -> Case:
    return _quantization(
        "rowwise_transposed" if transpose else "rowwise",
        lambda x: quantize_rowwise(x, power_of_two=transpose, transpose=transpose),
        partial(quantize_rowwise_reference, dtype=E4M3, power_of_two=transpose, transpose=transpose),
        lambda inputs: [(_quantize_rowwise, (*inputs, E4M3, False, transpose))],
        f"{_KERNEL}:TILE" if transpose else None,
        batch_dim=None if transpose else 0,
        shapes=SHAPES if transpose else FEW_ROWS,
    )


def _in_blocks(square: bool, transpose: bool) -> Case:
    return _quantization(
        f"{'128' if square else '1'}x128{'_transposed' if transpose else ''}",
        lambda x: quantize_blocks(x, square=square, power_of_two=square, transpose=transpose),
        partial(quantize_blocks_reference, dtype=E4M3, power_of_two=square, square=square, transpose=transpose),
        lambda inputs: [(_quantize_blocks, (*inputs, E4M3, False, square, transpose))],
        f"{_KERNEL}:SQUARES" if transpose else f"{_KERNEL}:ROWS_OF_BLOCKS",
        batch_dim=None if transpose else 0,
    )


def _product(x: Tensor, weight: Tensor, *, square: bool, multiply: Callable[..., Tensor]) -> Tensor:
    a, b = quantize_blocks_reference(x, E4M3, False, False, False), _weight_blocks(weight, square)
    return multiply(a.data, a.scale, b.data, b.scale, x.dtype)


def _weight_blocks(weight: Tensor, square: bool) -> Quantized:
    return quantize_blocks_reference(weight, E4M3, False, square, False)


def _layer(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    M, K, N = shape
    return normal((M, K), dtype, generator), normal((N, K), dtype, generator, scale=K**-0.5)


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8_matmul(a, a_scale, b, b_scale, out_dtype=dtype)


def _multiply_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return matmul_reference(a, a_scale, b, b_scale, None, dtype)


def _products() -> list[Case]:
    return [
        Case(
            name=f"fp8_matmul_{'128' if square else '1'}x128",
            op=partial(_product, square=square, multiply=_multiply),
            reference=partial(_product, square=square, multiply=_multiply_reference),
            inputs=_layer,
            shapes=[(5, 48, 32), (130, 272, 144), (1, 16, 16)],
            differentiable=(),
            extreme_arguments=(0, 1),
            extremes=(0.0, 1e2, -1e2),
            tuned="kernels.fp8.matmul.kernel:TILES",
            batch_dim=None,
            tolerance=TOLERANCE,
        )
        for square in (True, False)
    ]


class Emulated(torch.autograd.Function):
    """The layer of a recipe written out with dequantized matrices, each product with its own quantization."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: ScalingRecipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return (along(x, recipe, E4M3) @ along(weight, recipe, E4M3, square=True).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), recipe = ctx.saved_tensors, ctx.recipe
        weight_t = along(weight.t(), recipe, E4M3, square=True)
        d_x = along(d_y, recipe, recipe.gradient) @ weight_t.t()
        d_weight = along(d_y.t(), recipe, recipe.gradient) @ along(x.t(), recipe, E4M3).t()
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


def along(x: Tensor, recipe: ScalingRecipe, dtype: torch.dtype, square: bool = False) -> Tensor:
    """x as its quantization for a product along its last dimension has it, in fp32."""
    p2 = recipe.power_of_two
    if recipe.kind == "tensorwise_dynamic":
        q = _dynamic_reference(x, dtype, p2, False)
    elif recipe.kind == "rowwise":
        q = quantize_rowwise_reference(x, dtype, p2, False)
    else:
        q = quantize_blocks_reference(x, dtype, p2, square, False)
    return dequantize(q.data, q.scale)


def _linears() -> list[Case]:
    recipes = [ScalingRecipe("tensorwise_dynamic", gradient=E4M3), ScalingRecipe("block128", power_of_two=True)]
    return [
        Case(
            name=f"fp8_linear_{recipe.kind}",
            op=partial(fp8_linear, recipe=recipe),
            reference=lambda x, weight, recipe=recipe: Emulated.apply(x, weight, recipe),
            inputs=_layer,
            shapes=[(5, 48, 32), (130, 144, 16)],
            differentiable=(0, 1),
            batch_dim=None,
            tolerance=TOLERANCE,
        )
        for recipe in recipes
    ]


CASES = [
    *_tensorwise(),
    *(_rowwise(transpose) for transpose in (False, True)),
    *(_in_blocks(square, transpose) for square, transpose in ((False, False), (False, True), (True, True))),
    *_products(),
    *_linears(),
]
