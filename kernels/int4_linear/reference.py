"""Weights of 4-bit integers in plain PyTorch.

A group is G consecutive weights of one output feature; it has a scale and a zero point, the code of the weight 0. Its
G/2 bytes are G/4 words of 16 bits, low byte first. Word j holds the weights j, j + G/4, j + G/2 and j + 3G/4 of the
group, from its lowest four bits up: a kernel unpacks words into quarters of the group, each in order, and moves nothing
between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 15
GROUP_SIZES = (64, 128, 256)


class Int4Weight(NamedTuple):
    """(code - zero) * scale is the weight [N, K]."""

    packed: Tensor  # uint8 [N, K/2]
    scale_zero: Tensor  # bf16 [K/G, N, 2], as programs read them: of a group the scale, and the zero point 0 to 15


def quantize_int4(weight: Tensor, *, group_size: int = 128) -> Int4Weight:
    """A weight [N, K] with a scale and a zero point per output feature and group along K.

    A group's range, extended to hold 0, is covered by codes 0 to 15, rounded to nearest even; 0 is exact, and scales
    are rounded to bf16 before codes are chosen. Done once, where the weight lies, in fp32. Raises
    ValueError for shapes and group sizes, and for inf or NaN.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; quantize a floating [N, K]")
    if group_size not in GROUP_SIZES or weight.shape[1] % group_size:
        fitting = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
        raise ValueError(f"group_size={group_size} for K = {weight.shape[1]}; use one of {fitting or 'none: pad K'}")
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    low, high = groups.amin(dim=2).clamp(max=0.0), groups.amax(dim=2).clamp(min=0.0)
    if not bool((high - low).isfinite().all()):
        raise ValueError("weight holds inf or NaN, or a range beyond fp32, which integers cannot represent")
    scale = ((high - low) / LARGEST).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round_().clamp_(0, LARGEST)
    codes = ((groups / scale[:, :, None]).round_() + zero[:, :, None]).clamp_(0, LARGEST).to(torch.uint8)
    q0, q1, q2, q3 = codes.chunk(4, dim=2)
    packed = torch.stack([q0 | (q1 << 4), q2 | (q3 << 4)], dim=3).flatten(1)
    return Int4Weight(packed, torch.stack([scale.t(), zero.t()], dim=2).bfloat16())


def dequantize_int4(packed: Tensor, scale_zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K], computed in `dtype`."""
    low, high = packed.unflatten(1, (scale_zero.shape[0], -1, 2)).unbind(dim=3)
    codes = torch.cat([low & 15, low >> 4, high & 15, high >> 4], dim=2).to(dtype)
    scale, zero = scale_zero.to(dtype).permute(2, 1, 0)[..., None]
    return ((codes - zero) * scale).flatten(1)


def int4_linear_reference(x: Tensor, packed: Tensor, scale_zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] to [..., N] in fp32 (fp64 for fp64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ dequantize_int4(packed, scale_zero, wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
