"""The global norm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_of_squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Sum over all elements of all tensors of their squares, 0-d fp64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def global_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Its root, 0-d fp32."""
    return sum_of_squares_reference(tensors).sqrt().float()
