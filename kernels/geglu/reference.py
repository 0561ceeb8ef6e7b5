"""GeGLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.swiglu.reference import halves


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up of two tensors of one shape and dtype, in their dtype."""
    return F.gelu(gate, approximate=approximate) * up


def geglu_fused_reference(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """Of [..., 2I], whose first half is the gate."""
    return geglu_reference(*halves(gate_up), approximate)
