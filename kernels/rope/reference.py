"""Rotary position embedding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x [B, T, H, K], its dimensions i and i + K/2 turned as a pair by the angles of cos and sin [B or 1, T, 1, K/2],
    or back; in fp32, rounded once to the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    sin = -sin if inverse else sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_reference(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, K] and k [B, T, Hkv, K], turned."""
    q = rotate_reference(q, cos, sin, inverse=inverse)
    return q, None if k is None else rotate_reference(k, cos, sin, inverse=inverse)


def rope_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, turned, and v of one tensor [B, T, H + 2 Hkv, K]."""
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v.clone()
