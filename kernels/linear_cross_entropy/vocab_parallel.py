"""linear_cross_entropy with the vocabulary cut over ranks: no rank ever has, or sends, the logits of all words.

Rank r holds the words V_r and for each token its logits x_v, v in V_r. With m the maximum over all words,

    loss = m + log sum_r (sum_{v in V_r} exp(x_v - m)) - sum_r [label in V_r] x_label        (1909.08053, section 3)
    d loss / d x_v = exp(x_v - m) / sum - [v = label]

so an all-reduce (maximum) of one number and one (sum) of two numbers per token suffice, chunk by chunk. Shapes as in
op.py; V is the number of words of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.op import FP16_GRADIENT_SCALE, _accumulation_dtype, _add_product, _check


@dataclass(frozen=True)
class VocabularyShard:
    """The words a rank has: those from `first` on, as many as its weight has rows."""

    group: dist.ProcessGroup  # ranks that together have all words
    first: int


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
) -> Tensor:
    """Sum over valid tokens of -log softmax(hidden weight^T)[label], the same on every rank of shard.group. 0-d.

    hidden [..., D] and labels [...] are the same on all ranks, weight [V, D] has this rank's words; labels number the
    words of all ranks. The gradient of hidden is this rank's summand: add it up over the group. Dtypes, rounding and
    errors are those of `linear_cross_entropy`, except that a label no rank has costs what a word of logit 0 would.
    Collective over shard.group.
    """
    _check(hidden, weight, labels, chunk_tokens)
    grad_hidden, grad_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _VocabParallel.apply(hidden, weight, labels, shard, ignore_index, chunk_tokens, grad_hidden, grad_weight)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabularyShard,
        ignore_index: int,
        chunk_tokens: int,
        grad_hidden: bool,
        grad_weight: bool,
    ) -> Tensor:
        scale = FP16_GRADIENT_SCALE if hidden.dtype == torch.float16 else 1.0
        dtype = _accumulation_dtype(hidden)
        flat_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        d_hidden_ND = torch.zeros(flat_ND.shape, dtype=dtype, device=hidden.device) if grad_hidden else None
        d_weight_VD = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if grad_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, flat_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = F.linear(flat_ND[chunk], weight)
            chunk_sum, d_logits_CV = _chunk_loss_and_gradient(logits_CV, labels_N[chunk], shard, ignore_index, scale)
            loss += chunk_sum
            if d_hidden_ND is not None:
                _add_product(d_hidden_ND[chunk], d_logits_CV, weight)
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.t(), flat_ND[chunk])
            del logits_CV, d_logits_CV  # before those of the next chunk are allocated
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.hidden_shape, ctx.dtype, ctx.scale = hidden.shape, hidden.dtype, scale
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.scale
        d_hidden, d_weight = (
            None if g is None else torch.mul(g, factor, out=torch.empty_like(g, dtype=ctx.dtype))
            for g in ctx.saved_tensors
        )
        d_hidden = None if d_hidden is None else d_hidden.view(ctx.hidden_shape)
        return d_hidden, d_weight, None, None, None, None, None, None


def _chunk_loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, shard: VocabularyShard, ignore_index: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses over all words, 0-d fp64, and scale (softmax - one_hot) of this rank's words."""
    x_CV = logits_CV.to(_accumulation_dtype(logits_CV))
    max_C1 = x_CV.amax(dim=-1, keepdim=True)
    dist.all_reduce(max_C1, dist.ReduceOp.MAX, group=shard.group)
    x_CV = x_CV - max_C1
    valid_C = labels_C != ignore_index
    local_C = labels_C - shard.first
    mine_C = valid_C & (local_C >= 0) & (local_C < x_CV.shape[-1])
    target_C1 = torch.where(mine_C, local_C, 0).unsqueeze(-1)
    target_logit_C = torch.where(mine_C, x_CV.gather(-1, target_C1).squeeze(-1), 0.0)
    p_CV = x_CV.exp_()
    sums_2C = torch.stack([p_CV.sum(-1), target_logit_C])
    dist.all_reduce(sums_2C, group=shard.group)
    losses_C = torch.where(valid_C, sums_2C[0].log() - sums_2C[1], 0.0)
    d_logits_CV = p_CV.div_(sums_2C[0].unsqueeze(-1))
    d_logits_CV.scatter_add_(-1, target_C1, -mine_C.to(p_CV.dtype).unsqueeze(-1))
    d_logits_CV.mul_((valid_C * scale).unsqueeze(-1))
    return losses_C.sum(dtype=torch.float64), d_logits_CV.to(logits_CV.dtype)
