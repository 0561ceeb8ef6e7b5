"""What linear_cross_entropy computes, with all logits in memory at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Sum over valid tokens of -log softmax(hidden weight^T)[label], 0-d.

    hidden [..., D] and weight [V, D] of one floating dtype, labels [...] int64. The logits have that dtype; the softmax
    is in fp32 (fp64 for fp64).
    """
    logits = F.linear(hidden, weight).flatten(0, -2)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")
