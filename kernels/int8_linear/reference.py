"""Weights of 8-bit integers in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used, so that the code is symmetric


class Int8Weight(NamedTuple):
    """data * scale[:, None] is the weight [N, K]."""

    data: Tensor  # int8 [N, K]
    scale: Tensor  # fp32 [N]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """A weight [N, K] with one scale per output feature: its largest magnitude becomes 127. Rounds to nearest even.

    Done once, where the weight lies, in fp32. Raises ValueError for other shapes and for inf or NaN.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; quantize a floating [N, K]")
    wide = weight.detach().float()
    amax = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not bool(amax.isfinite().all()):
        raise ValueError("weight holds inf or NaN, which integers cannot represent")
    scale = torch.where(amax > 0, amax / LARGEST, 1.0)
    data = (wide / scale[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(data, scale)


def dequantize_int8(data: Tensor, scale: Tensor) -> Tensor:
    """The weight [N, K] in fp32."""
    return data.float() * scale[:, None].float()


def int8_linear_reference(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] to [..., N] in fp32 (fp64 for fp64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ (data.to(wide) * scale[:, None].to(wide)).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
