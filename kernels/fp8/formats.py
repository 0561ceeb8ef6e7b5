"""The two 8-bit floating-point formats of 2209.05433, and how a scale follows from a largest magnitude.

A quantized tensor is data * scale: `scale` is what dequantizes. E4M3 has 3 bits of mantissa and reaches 448, E5M2 has
2 and reaches 57344. Casts saturate: what lies beyond the largest number becomes the largest number; NaN stays NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST: dict[torch.dtype, float] = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_SCALE = 2.0**-126  # its inverse is finite in fp32
PAD = 16  # fp8 matrix products take a contraction of a multiple of 16 elements, 16 bytes
BLOCK = 128  # of DeepSeek-V3's scaling


class Quantized(NamedTuple):
    """A tensor [rows, columns] in fp8, and the copy of its transpose that a weight gradient multiplies.

    `transposed` is [columns, rows rounded up to a multiple of 16], the columns beyond `rows` zero, with scales of its
    own layout: the values are those of `data` where both share their scales (tensorwise, 128x128), else quantized anew.
    """

    data: Tensor
    scale: Tensor
    transposed: Tensor | None = None
    transposed_scale: Tensor | None = None


def padded(rows: int) -> int:
    """The next multiple of 16."""
    return -(-rows // PAD) * PAD


def blocks(size: int) -> int:
    """How many blocks of 128 cover this many elements."""
    return -(-size // BLOCK)


def require_fp8(dtype: torch.dtype, *, name: str = "dtype") -> None:
    """Raise TypeError for anything but the two formats."""
    if dtype not in LARGEST:
        raise TypeError(f"{name} is {dtype}; use torch.float8_e4m3fn or torch.float8_e5m2")


def scale_from_amax(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """The scale that maps a largest magnitude onto the format's largest number: amax / LARGEST, of amax's shape, fp32.

    1 where amax is 0, at least 2^-126; the next power of two at or above it with `power_of_two`. inf and NaN stay what
    they are, so a tensor that holds one dequantizes to NaN everywhere its scale reaches.
    """
    require_fp8(dtype)
    # A tensor's quotient is rounded as IEEE says; by a number, CUDA multiplies with its inverse.
    ratio = amax.float() / torch.full_like(amax, LARGEST[dtype], dtype=torch.float32)
    scale = torch.where(amax == 0, 1.0, torch.where(ratio < SMALLEST_SCALE, SMALLEST_SCALE, ratio))
    return next_power_of_two(scale) if power_of_two else scale


def next_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two >= x, for positive normal fp32; inf and NaN stay what they are."""
    up = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000  # any bit of the mantissa carries into the exponent
    return torch.where(x.isfinite(), up.view(torch.float32), x)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 x cast to the format, beyond its range to its largest number."""
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def block_outputs(x: Tensor, dtype: torch.dtype, square: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the scale, the transposed copy and its scale of x [R, C] in blocks; empty ones without a copy.

    Scales of 1x128 lie column by column in memory, as a tile of a matrix product reads them.
    """
    R, C = x.shape

    def scales(rows: int, columns: int) -> Tensor:
        if square:
            return x.new_empty(blocks(rows), blocks(columns), dtype=torch.float32)
        return x.new_empty(blocks(columns), rows, dtype=torch.float32).t()

    if not transpose:
        return scales(R, C), x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
    return scales(R, C), x.new_empty(C, padded(R), dtype=dtype), scales(C, R)
