"""RMSNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8.formats import E4M3, LARGEST, scale_from_amax


def widened(x: Tensor) -> Tensor:
    """In the dtype of sums: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32, rounded once to the dtype of x."""
    wide = widened(x)
    return F.rms_norm(wide, x.shape[-1:], None if weight is None else weight.to(wide), eps).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of r = x + residual, and r, which is rounded before it is normalised."""
    stream = (widened(x) + widened(residual)).to(x.dtype)
    return rms_norm_reference(stream, weight, eps), stream


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), fp32 [...] of x [..., D]."""
    return (widened(x).square().mean(-1) + eps).rsqrt().float()


def quantize_reference(y: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [..., D] as float8_e4m3fn times a scale, saturated.

    With a scale (fp32, one element): y * (1 / scale), and max |y|, fp32 []. Without, each row has its own,
    max |row| / 448, or 1 for a row of zeros; returned are those, fp32 [..., 1].
    """
    wide = widened(y)
    if scale is None:
        amax = wide.abs().amax(-1, keepdim=True)
        factor = extra = scale_from_amax(amax, E4M3)
    else:
        factor = scale.reshape(())
        extra = wide.abs().amax().float() if y.numel() else y.new_zeros((), dtype=torch.float32)
    return (wide * (1.0 / factor)).clamp(-LARGEST[E4M3], LARGEST[E4M3]).to(E4M3), extra
