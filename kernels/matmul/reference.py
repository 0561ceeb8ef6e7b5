"""Matrix product and linear layer with GELU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N], in their dtype."""
    return a @ b


def linear_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """gelu(x [..., K] weight [N, K]^T + bias [N]) + residual [..., N], in their dtype."""
    y = F.gelu(F.linear(x, weight, bias))
    return y if residual is None else y + residual


def linear_gelu_parts(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, what GELU was applied to), computed in fp32 at least and each rounded once, as the kernel does."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = F.gelu(h) if residual is None else F.gelu(h) + residual.to(wide)
    return y.to(x.dtype), h.to(x.dtype)


def gelu_gradient(d_y: Tensor, h: Tensor) -> Tensor:
    """d_h of y = gelu(h) = h Phi(h): d_y (Phi(h) + h phi(h)), with the normal distribution's Phi and density phi."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return torch.ops.aten.gelu_backward(d_y.to(wide), h.to(wide)).to(d_y.dtype)
