"""SwiGLU in plain PyTorch, and the other gated linear units of 2002.05202 that share its kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of two tensors of one shape and dtype, in their dtype."""
    return ACTIVATIONS[activation](gate) * up


def halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up [..., I] of [..., 2I], views."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def glu_fused_reference(gate_up: Tensor, activation: str) -> Tensor:
    """Of [..., 2I], whose first half is the gate."""
    return glu_reference(*halves(gate_up), activation)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and dtype, in their dtype."""
    return glu_reference(gate, up, "silu")


def swiglu_fused_reference(gate_up: Tensor) -> Tensor:
    """Of [..., 2I], whose first half is the gate."""
    return glu_fused_reference(gate_up, "silu")
