"""linear_cross_entropy with the vocabulary cut over ranks: no rank ever has, or sends, the logits of all words.

Rank r holds the words V_r and for each token its logits x_v, v in V_r. With m the maximum over all words,

    loss = m + log sum_r (sum_{v in V_r} exp(x_v - m)) - sum_r [label in V_r] x_label        (1909.08053, section 3)
    d loss / d x_v = exp(x_v - m) / sum - [v = label]

so an all-reduce (maximum) of one number and one (sum) of two numbers per token suffice, chunk by chunk. (A third
number counts the ranks that have the label, which must be one.) With triton=True each rank takes its own maximum, reads
the logits once, and one gather of four numbers does (kernels/cross_entropy/shards.py). Shapes as in op.py; V is the
number of words of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import combine_shards, shard_gradient_, shard_statistics
from kernels.linear_cross_entropy.op import (
    FP16_GRADIENT_SCALE,
    _accumulation_dtype,
    _add_product,
    _check,
    check_choice,
)

Exchange = Callable[[Tensor, Tensor, "VocabularyShard", int], tuple[Tensor, Callable[[float], Tensor]]]
"""From logits, labels, shard and ignore_index: sum of the losses, 0-d fp64, and d_logits from its scale. Collective."""


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
    compile: bool = False,
    triton: bool = False,
) -> Tensor:
    """Sum over valid tokens of -log softmax(hidden weight^T)[label], the same on every rank of shard.group. 0-d.

    hidden [..., D] and labels [...] are the same on all ranks, weight [V, D] has this rank's words; labels number the
    words of all ranks. The gradient of hidden is this rank's summand: add it up over the group. Dtypes, rounding,
    compile, triton and errors are those of `linear_cross_entropy`; a label that no rank has is a failed assertion (on
    CUDA on the device). Collective over shard.group.
    """
    _check(hidden, weight, labels, chunk_tokens)
    check_choice(hidden, compile=compile, triton=triton)
    exchange = _fused if triton else partial(_by_reductions, _compiled() if compile else (_local_sums, _d_logits))
    grad_hidden, grad_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _VocabParallel.apply(
        hidden, weight, labels, shard, ignore_index, chunk_tokens, exchange, grad_hidden, grad_weight
    )


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
        exchange: Exchange,
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
            logits_CV, labels_C = F.linear(flat_ND[chunk], weight), labels_N[chunk]
            chunk_sum, gradient = exchange(logits_CV, labels_C, shard, ignore_index)
            loss += chunk_sum
            if not (grad_hidden or grad_weight):
                continue
            d_logits_CV = gradient(scale)
            if d_hidden_ND is not None:
                _add_product(d_hidden_ND[chunk], d_logits_CV, weight)
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.t(), flat_ND[chunk])
            del logits_CV, d_logits_CV, gradient  # before those of the next chunk are allocated
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
        return d_hidden, d_weight, *[None] * 7


def _by_reductions(
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    logits_CV: Tensor,
    labels_C: Tensor,
    shard: VocabularyShard,
    ignore_index: int,
) -> tuple[Tensor, Callable[[float], Tensor]]:
    local_sums, d_logits = functions
    max_C1 = logits_CV.amax(dim=-1, keepdim=True).to(_accumulation_dtype(logits_CV))
    dist.all_reduce(max_C1, dist.ReduceOp.MAX, group=shard.group)
    sums_3C = local_sums(logits_CV, max_C1, labels_C, shard.first, ignore_index)
    dist.all_reduce(sums_3C, group=shard.group)
    return _loss_of(sums_3C, labels_C, ignore_index), lambda scale: d_logits(
        logits_CV, max_C1, sums_3C[0], labels_C, shard.first, ignore_index, scale
    )


def _fused(
    logits_CV: Tensor, labels_C: Tensor, shard: VocabularyShard, ignore_index: int
) -> tuple[Tensor, Callable[[float], Tensor]]:
    own_4C = shard_statistics(logits_CV, labels_C, first=shard.first, ignore_index=ignore_index)
    all_R4C = own_4C.new_empty(shard.group.size(), *own_4C.shape)
    dist.all_gather_into_tensor(all_R4C.flatten(0, 1), own_4C, group=shard.group)
    lse_C, at_label_C, ranks_C = combine_shards(all_R4C)
    valid_C = labels_C != ignore_index
    torch._assert_async((ranks_C == valid_C).all(), "a label is not in the vocabulary")

    def gradient(scale: float) -> Tensor:
        factor = torch.full((), scale, dtype=torch.float32, device=logits_CV.device)
        shard_gradient_(logits_CV, labels_C, lse_C, first=shard.first, scale=factor, ignore_index=ignore_index)
        return logits_CV

    return torch.where(valid_C, lse_C - at_label_C, 0.0).sum(dtype=torch.float64), gradient


def _loss_of(sums_3C: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    """Sum of the token losses of a chunk from what all ranks added up, 0-d fp64."""
    valid_C = labels_C != ignore_index
    torch._assert_async((sums_3C[2] == valid_C).all(), "a label is not in the vocabulary")
    return torch.where(valid_C, sums_3C[0].log() - sums_3C[1], 0.0).sum(dtype=torch.float64)


def _local_sums(logits_CV: Tensor, max_C1: Tensor, labels_C: Tensor, first: int, ignore_index: int) -> Tensor:
    """This rank's summands [3, C] of: sum exp(x - m), x_label - m, and the number of ranks that have the label."""
    x_CV = logits_CV.to(max_C1.dtype) - max_C1
    words_V = torch.arange(first, first + logits_CV.shape[-1], device=logits_CV.device)
    hit_CV = (words_V == labels_C.unsqueeze(-1)) & (labels_C != ignore_index).unsqueeze(-1)
    return torch.stack([x_CV.exp().sum(-1), torch.where(hit_CV, x_CV, 0.0).sum(-1), hit_CV.sum(-1).to(x_CV.dtype)])


def _d_logits(
    logits_CV: Tensor,
    max_C1: Tensor,
    sum_C: Tensor,
    labels_C: Tensor,
    first: int,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """scale (softmax - one_hot) of this rank's words, with zero rows for tokens that are not valid."""
    words_V = torch.arange(first, first + logits_CV.shape[-1], device=logits_CV.device)
    one_hot_CV = (words_V == labels_C.unsqueeze(-1)).to(max_C1.dtype)
    softmax_CV = (logits_CV.to(max_C1.dtype) - max_C1).exp() / sum_C.unsqueeze(-1)
    valid_C1 = (labels_C != ignore_index).unsqueeze(-1)
    return torch.where(valid_C1, (softmax_CV - one_hot_CV) * scale, 0.0).to(logits_CV.dtype)


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What lies between the products and the collectives under torch.compile; one pair per process."""
    return torch.compile(_local_sums, fullgraph=True), torch.compile(_d_logits, fullgraph=True)
