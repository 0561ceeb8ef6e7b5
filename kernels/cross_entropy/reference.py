"""Cross entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Loss of each token [...] of logits [..., V] and int64 labels [...], in fp32 (fp64 for fp64); 0 where ignored."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    flat, labels_N = logits.flatten(0, -2), labels.flatten()
    losses = F.cross_entropy(
        flat, labels_N, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if z_loss:
        losses = losses + torch.where(labels_N != ignore_index, z_loss * flat.logsumexp(-1).square(), 0.0)
    return losses.view(labels.shape)
