"""The addition of a low-rank product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_low_rank_reference(y: Tensor, u: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """y [N, O] + scale u [N, R] v [R, O], out of place."""
    return torch.addmm(y, u, v, alpha=scale)
