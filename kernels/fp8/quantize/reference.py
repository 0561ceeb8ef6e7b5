"""Quantization to fp8 in plain PyTorch. Computes in fp32 whatever the input's dtype.

R rows, C columns. Each function returns data, scale and the transposed copy with its scale, or None for both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8.formats import BLOCK, Quantized, blocks, padded, saturated, scale_from_amax


def amax_reference(x: Tensor) -> Tensor:
    """The largest magnitude, fp32 []; 0 of an empty tensor, NaN if any element is."""
    return x.float().abs().amax() if x.numel() else torch.zeros((), device=x.device)


def quantize_tensorwise_reference(x: Tensor, scale: Tensor, dtype: torch.dtype, transpose: bool) -> Quantized:
    """x [R, C] by one scale []."""
    data = saturated(x.float() * (1.0 / scale), dtype)
    return Quantized(data, scale, *((transposed_reference(data), scale) if transpose else ()))


def quantize_rowwise_reference(x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool) -> Quantized:
    """A scale per row [R, 1]; the transposed copy has one per row of its own, per column of x: [C, 1]."""

    def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        amax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
        scale = scale_from_amax(amax, dtype, power_of_two=power_of_two)
        return saturated(x * (1.0 / scale), dtype), scale

    data, scale = by_rows(x.float())
    if not transpose:
        return Quantized(data, scale)
    transposed, transposed_scale = by_rows(x.float().t())
    return Quantized(data, scale, _pad(transposed), transposed_scale)


def quantize_blocks_reference(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, square: bool, transpose: bool
) -> Quantized:
    """Blocks of 1x128: scale [R, C/128], and [C, R/128] of the transposed copy. Square, 128x128: [R/128, C/128] and its
    transpose. Numbers of blocks are rounded up."""

    def by_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        height = BLOCK if square else 1
        whole = F.pad(x, (0, blocks(columns) * BLOCK - columns, 0, -rows % height))
        tiles = whole.view(whole.shape[0] // height, height, blocks(columns), BLOCK)
        scale = scale_from_amax(tiles.abs().amax(dim=(1, 3)), dtype, power_of_two=power_of_two)
        data = saturated(tiles * (1.0 / scale)[:, None, :, None], dtype)
        return data.view(torch.uint8).view(whole.shape)[:rows, :columns].contiguous().view(dtype), scale

    data, scale = by_blocks(x.float())
    if not transpose:
        return Quantized(data, scale)
    transposed, transposed_scale = by_blocks(x.float().t())
    return Quantized(data, scale, _pad(transposed), transposed_scale)


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """data * scale in fp32, for data [R, C] and the scales of any of the above: [], [R, 1], [R, C/128],
    [R/128, C/128]."""
    if scale.ndim == 0:
        return data.float() * scale
    rows, columns = data.shape
    by_row = scale if scale.shape[0] == rows else scale.repeat_interleave(BLOCK, dim=0)[:rows]
    if scale.shape[1] == 1:
        return data.float() * by_row
    return data.float() * by_row.repeat_interleave(BLOCK, dim=1)[:, :columns]


def transposed_reference(data: Tensor) -> Tensor:
    return _pad(data.t())


def _pad(data: Tensor) -> Tensor:
    """data [C, R] with zeros up to the next multiple of 16 columns; fp8 tensors are padded as bytes."""
    bytes_ = data.contiguous().view(torch.uint8)
    return F.pad(bytes_, (0, padded(data.shape[1]) - data.shape[1])).view(data.dtype)
