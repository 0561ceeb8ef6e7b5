"""LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm.reference import widened


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim, in fp32, rounded once to the dtype of x."""
    wide = widened(x)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of r = x + residual, and r, which is rounded before it is normalised."""
    stream = (widened(x) + widened(residual)).to(x.dtype)
    return layer_norm_reference(stream, weight, bias, eps), stream


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(variance + eps), fp32 [...] of x [..., D]."""
    wide = widened(x)
    return wide.mean(-1).float(), (wide.var(-1, correction=0) + eps).rsqrt().float()
