"""SwiGLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and dtype, in their dtype."""
    return F.silu(gate) * up
