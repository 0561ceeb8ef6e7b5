"""What all kernels share."""

from __future__ import annotations

import torch

from kernels.swiglu import swiglu
from kernels.swiglu.reference import swiglu_reference


def test_references_have_gradients_inside_custom_ops() -> None:
    """An op off the GPU whose backward fails: the dispatcher hides autograd from what runs inside a custom op."""
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = (torch.autograd.grad(f(gate, up).square().sum(), (gate, up)) for f in (swiglu, swiglu_reference))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)
