"""GeGLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up of two tensors of one shape and dtype, in their dtype."""
    return F.gelu(gate, approximate=approximate) * up


def geglu_fused_reference(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """Of [..., 2I], whose first half is the gate."""
    return geglu_reference(*gate_up.chunk(2, dim=-1), approximate)
