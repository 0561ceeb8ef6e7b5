"""Linear layers of a few rows in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def skinny_linear_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    """Arguments and result as in op.skinny_linear; in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if norm_weight is not None:
        h = F.rms_norm(h, h.shape[-1:], norm_weight.to(wide), eps)
    y = F.linear(h, weight.to(wide))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def add_skinny_linear_reference(
    x: Tensor, residual: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, gated: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in op.add_skinny_linear."""
    stream = x + residual
    return skinny_linear_reference(stream, weight, norm_weight, eps, None, gated), stream
