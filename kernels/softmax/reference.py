"""Softmax in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from kernels.rms_norm.reference import widened


def softmax_reference(x: Tensor) -> Tensor:
    """exp(x - max) / sum of it, over the last dim, in fp32, rounded once to the dtype of x."""
    return widened(x).softmax(-1).to(x.dtype)


def softmax_backward_reference(d_y: Tensor, y: Tensor) -> Tensor:
    """Gradient of x for that of y."""
    wide, grad = widened(y), widened(d_y)
    return (wide * (grad - (wide * grad).sum(-1, keepdim=True))).to(y.dtype)
