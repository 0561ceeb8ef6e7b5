"""Cross entropy with the words cut over ranks: what a rank knows of its shard, and what all of them make of it.

With (m_r, s_r) the maximum and the sum of exp(x - m_r) over the words of rank r,

    lse = m + log sum_r s_r exp(m_r - m),    m = max_r m_r

so that one pass over the logits and one gather of four numbers per token do. C tokens, V words of this rank, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rows import has_kernel


def shard_statistics(logits: Tensor, labels: Tensor, *, first: int, ignore_index: int = -100) -> Tensor:
    """[4, C] fp32 (fp64 for fp64): maximum, sum of exp(x - maximum), the label's logit or 0, and whether it is here.

    logits [C, V], of the words from `first` on; labels [C] int64 number the words of all ranks.
    """
    if has_kernel(logits):
        from kernels.cross_entropy import kernel

        return kernel.shard_statistics(logits.contiguous(), labels.contiguous(), first, ignore_index)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    place = labels - first
    here = (labels != ignore_index) & (place >= 0) & (place < logits.shape[1])
    at_label = wide.gather(1, torch.where(here, place, 0)[:, None])[:, 0]
    highest = wide.amax(1)
    total = (wide - highest[:, None]).exp().sum(1)
    return torch.stack([highest, total, torch.where(here, at_label, 0.0), here.to(wide.dtype)])


def combine_shards(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, label's logit, number of ranks that have the label), each [C], of the statistics [R, 4, C] of all ranks.

    The same bits on all ranks that give the same statistics in the same order. A token's loss is lse - label's logit.
    """
    highest, total, at_label, here = statistics.unbind(1)
    maximum = highest.amax(0)
    lse = maximum + (total * (highest - maximum).exp()).sum(0).log()
    return lse, at_label.sum(0), here.sum(0)


def shard_gradient_(
    logits: Tensor, labels: Tensor, lse: Tensor, *, first: int, scale: Tensor, ignore_index: int = -100
) -> None:
    """The logits [C, V], contiguous, become scale (softmax - one_hot) of this rank's words; 0 where ignored.

    lse [C] as `combine_shards` returns it and scale, 0-d or [C], are fp32 (fp64 for fp64).
    """
    if has_kernel(logits):
        from kernels.cross_entropy import kernel

        kernel.gradient(logits, logits, labels.contiguous(), lse, scale, ignore_index=ignore_index, first=first)
        return
    words = torch.arange(first, first + logits.shape[1], device=logits.device)
    softmax = (logits.to(lse.dtype) - lse[:, None]).exp()
    d_logits = (softmax - (words == labels[:, None]).to(lse.dtype)) * scale.view(-1, 1)
    logits.copy_(torch.where((labels != ignore_index)[:, None], d_logits, 0.0))
