"""Quantization to fp8 as ops that compiled graphs keep whole. Not differentiable: kernels.fp8.linear has the gradients.

All take x [R, C] of a floating dtype, compute in fp32, saturate, and give the same bits in every call and on every
device. `transpose` also gives the quantized copy of x^T (Quantized.transposed) that a weight gradient multiplies.
`power_of_two` rounds scales up to powers of two: scaling is then exact. Raise TypeError for DTensors and for dtypes,
ValueError for shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.fp8.formats import E4M3, Quantized, block_outputs, padded, require_fp8, scale_from_amax
from kernels.fp8.quantize.reference import (
    amax_reference,
    quantize_blocks_reference,
    quantize_rowwise_reference,
    quantize_tensorwise_reference,
    transposed_reference,
)


def quantize_tensorwise(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    transpose: bool = False,
) -> tuple[Quantized, Tensor]:
    """One scale for all of x. Also returns the largest magnitude, fp32 [], of which delayed scaling keeps a history.

    With a `scale` (fp32 []), x is read once: delayed scaling, and larger numbers saturate; the result has a copy of it.
    Without one, it follows from the largest magnitude: x is read twice, by two launches.
    """
    _check(x, dtype)
    if scale is not None and (scale.dtype != torch.float32 or scale.ndim):
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}; pass a float32 tensor of no dimensions")
    if scale is not None:
        data, transposed, scale, amax = _quantize_scaled(x.detach(), scale.detach(), dtype, transpose)
    else:
        data, transposed, scale, amax = _quantize_dynamic(x.detach(), dtype, power_of_two, transpose)
    return Quantized(data, scale, *((transposed, scale) if transpose else ())), amax


def quantize_rowwise(
    x: Tensor, *, dtype: torch.dtype = E4M3, power_of_two: bool = False, transpose: bool = False
) -> Quantized:
    """A scale per row, [R, 1]; of the transposed copy, one per column of x, [C, 1]."""
    _check(x, dtype)
    data, scale, transposed, transposed_scale = _quantize_rowwise(x.detach(), dtype, power_of_two, transpose)
    return Quantized(data, scale, *((transposed, transposed_scale) if transpose else ()))


def quantize_blocks(
    x: Tensor, *, square: bool, dtype: torch.dtype = E4M3, power_of_two: bool = False, transpose: bool = False
) -> Quantized:
    """Scales of DeepSeek-V3 (2412.19437, 3.3.2): per 1x128, [R, C/128], as for activations, or `square`, per 128x128,
    [R/128, C/128], as for weights; numbers of blocks rounded up.

    The transposed copy has blocks of its own along its rows, [C, R/128], or the same square ones, [C/128, R/128].
    """
    _check(x, dtype)
    data, scale, transposed, transposed_scale = _quantize_blocks(x.detach(), dtype, power_of_two, square, transpose)
    return Quantized(data, scale, *((transposed, transposed_scale) if transpose else ()))


def transpose_quantized(data: Tensor, *, after: Tensor | None = None) -> Tensor:
    """Quantized.transposed of data [R, C] whose scale reaches over all of it: its bytes, [C, R padded to 16].

    after: not read. A compiled graph computes what depends on no gradient in the forward pass and keeps it; with a
    gradient here the copy is made in backward.
    """
    refuse_dtensors(data=data)
    require_fp8(data.dtype, name="data")
    if data.ndim != 2:
        raise ValueError(f"data has shape {list(data.shape)}; pass [rows, columns]")
    return _transpose(data, after)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    refuse_dtensors(x=x)
    require_fp8(dtype)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; quantize a floating dtype")
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}; pass [rows, columns]")


@torch.library.custom_op("lattice::fp8_quantize_scaled", mutates_args=())
def _quantize_scaled(
    x: Tensor, scale: Tensor, dtype: torch.dtype, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, transposed (empty without), the scale in memory of its own, amax."""
    if not runs_triton(x) or not x.numel():
        made = quantize_tensorwise_reference(x, scale, dtype, transpose)
        return made.data, _or_empty(made.transposed, made.data), scale.clone(), amax_reference(x)
    from kernels.fp8.quantize.kernel import quantize_tensorwise

    return quantize_tensorwise(x.contiguous(), scale, dtype, False, transpose)


@torch.library.custom_op("lattice::fp8_quantize_dynamic", mutates_args=())
def _quantize_dynamic(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, transposed (empty without), scale, amax."""
    if not runs_triton(x) or not x.numel():
        amax = amax_reference(x)
        scale = scale_from_amax(amax, dtype, power_of_two=power_of_two)
        made = quantize_tensorwise_reference(x, scale, dtype, transpose)
        return made.data, _or_empty(made.transposed, made.data), scale, amax
    from kernels.fp8.quantize.kernel import quantize_tensorwise

    return quantize_tensorwise(x.contiguous(), None, dtype, power_of_two, transpose)


@torch.library.custom_op("lattice::fp8_quantize_rowwise", mutates_args=())
def _quantize_rowwise(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scale, transposed, its scale (both empty without)."""
    if not runs_triton(x) or not x.numel():
        return _all_four(quantize_rowwise_reference(x, dtype, power_of_two, transpose))
    from kernels.fp8.quantize.kernel import quantize_rowwise

    return quantize_rowwise(x.contiguous(), dtype, power_of_two, transpose)


@torch.library.custom_op("lattice::fp8_quantize_blocks", mutates_args=())
def _quantize_blocks(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, square: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scale, transposed, its scale (both empty without)."""
    if not runs_triton(x) or not x.numel():
        made = quantize_blocks_reference(x, dtype, power_of_two, square, transpose)
        scale, _, transposed_scale = block_outputs(x, dtype, square, transpose)
        scale.copy_(made.scale)
        if made.transposed_scale is not None:
            transposed_scale.copy_(made.transposed_scale)
        return made.data, scale, _or_empty(made.transposed, made.data), transposed_scale
    from kernels.fp8.quantize.kernel import quantize_blocks

    return quantize_blocks(x.contiguous(), dtype, power_of_two, square, transpose)


@torch.library.custom_op("lattice::fp8_transpose", mutates_args=())
def _transpose(data: Tensor, after: Tensor | None) -> Tensor:
    if not runs_triton(data) or not data.numel():
        return transposed_reference(data)
    from kernels.fp8.quantize.kernel import transpose

    return transpose(data.contiguous())


@_transpose.register_fake
def _(data: Tensor, after: Tensor | None) -> Tensor:
    return data.new_empty(data.shape[1], padded(data.shape[0]))


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _all_four(made: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    transposed = _or_empty(made.transposed, made.data)
    return made.data, made.scale, transposed, _or_empty(made.transposed_scale, made.scale)


def _fake_copies(x: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1], padded(x.shape[0])) if transpose else (0,)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@_quantize_scaled.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    used, amax = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return *_fake_copies(x, dtype, transpose), used, amax


@_quantize_dynamic.register_fake
def _(x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, amax = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return *_fake_copies(x, dtype, transpose), scale, amax


@_quantize_rowwise.register_fake
def _(x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data, transposed = _fake_copies(x, dtype, transpose)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return data, scale, transposed, x.new_empty((x.shape[1], 1) if transpose else (0,), dtype=torch.float32)


@_quantize_blocks.register_fake
def _(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, square: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, transposed, transposed_scale = block_outputs(x, dtype, square, transpose)
    return x.new_empty(x.shape, dtype=dtype), scale, transposed, transposed_scale
