"""How far a student's next-token distributions are from a teacher's, under a linear head each, chunk by chunk.

The generalised Jensen-Shannon divergence (2306.13649, eq. 1) of S = softmax(x / tau), T = softmax(y / tau), logits x
of the student and y of the teacher,

    beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S,    0 < beta < 1
    KL(T || S) for beta = 0 (forward: covers the teacher),    KL(S || T) for beta = 1 (reverse: seeks its modes)

times tau^2, which keeps gradients of one size at every temperature (1503.02531, section 2).
By x_v / tau its gradient is

    (1 - beta) S_v (log(S_v / M_v) - KL(S || M)),    S_v - T_v,    S_v (log(S_v / T_v) - KL(S || T))

so that besides both log-sum-exps one more number per token is a sum over words, and words may lie on several ranks. The
gradient is known in the forward pass, as op.py's is. Shapes as there; K hidden of the teacher.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.op import FP16_GRADIENT_SCALE, _accumulation_dtype, _add_product, _check
from kernels.linear_cross_entropy.vocab_parallel import VocabularyShard

Compared = tuple[Tensor, Tensor | None]


class Compare(Protocol):
    def __call__(self, student_CV: Tensor, chunk: slice, *, gradient: bool) -> Compared: ...


class Divergence(NamedTuple):
    """Which one, and of which words."""

    beta: float
    temperature: float = 1.0
    shard: VocabularyShard | None = None  # both weights have these of all words

    def check(self) -> None:
        """Raises ValueError for beta outside [0, 1] and for a temperature that is not positive."""
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta} must lie in [0, 1]: 0 is KL(T || S), 1 is KL(S || T)")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature={self.temperature} must be positive")


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    divergence: Divergence,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over the tokens whose label is not ignore_index of the divergence in nats, 0-d fp32 (fp64 for fp64).

    hidden [..., D] and weight [V, D] of the student have one floating dtype, teacher_hidden [..., K] and teacher_weight
    [V, K] of the teacher another or the same; labels [...] int64 say no more than which tokens count. A gradient for
    hidden and weight; with a shard that of hidden is this rank's summand, and the call is collective. Logits are
    rounded to their dtype as a linear layer's are, all else is in fp32: about seven numbers per logit of a chunk.

    Raises TypeError and ValueError as `linear_cross_entropy`, and ValueError for beta outside [0, 1], for a temperature
    that is not positive and for a teacher of other words.
    """
    _check(hidden, weight, labels, chunk_tokens)
    _check(teacher_hidden, teacher_weight, labels, chunk_tokens)
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student has {len(weight)} words and the teacher {len(teacher_weight)}; they must be one's"
        )
    divergence.check()
    rows_NK, teacher_weight = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight.detach()

    def compare(student_CV: Tensor, chunk: slice, *, gradient: bool) -> Compared:
        teacher_CV = F.linear(rows_NK[chunk], teacher_weight).to(student_CV.dtype).div_(divergence.temperature)
        return _divergences(student_CV, teacher_CV, divergence, gradient=gradient)

    return divergence_sum(hidden, weight, labels != ignore_index, compare, divergence.temperature, chunk_tokens)


def divergence_sum(
    hidden: Tensor, weight: Tensor, valid: Tensor, compare: Compare, temperature: float, chunk_tokens: int
) -> Tensor:
    """Sum over valid tokens [...] bool of what compare finds, times temperature^2; its gradient is made with it.

    compare(logits [C, V] over temperature, wide, the tokens they are of, gradient=) gives divergences [C] and, where
    it is asked to, their gradient by these logits [C, V].
    """
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _DivergenceSum.apply(hidden, weight, valid, compare, temperature, chunk_tokens, wanted)


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        valid: Tensor,
        compare: Compare,
        temperature: float,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        dtype = _accumulation_dtype(hidden)
        scale = FP16_GRADIENT_SCALE / 8 if hidden.dtype == torch.float16 else 1.0  # |d_logits| < 8 but for rounding
        rows_ND = hidden.reshape(-1, hidden.shape[-1])
        d_hidden_ND = torch.zeros(rows_ND.shape, dtype=dtype, device=hidden.device) if wanted[0] else None
        d_weight_VD = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if wanted[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(rows_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            valid_C = valid.reshape(-1)[chunk]
            student_CV = F.linear(rows_ND[chunk], weight).to(dtype).div_(temperature)
            losses_C, d_logits_CV = compare(student_CV, chunk, gradient=any(wanted))
            total += torch.where(valid_C, losses_C, 0.0).sum(dtype=torch.float64)
            if d_logits_CV is None:
                continue
            d_logits_CV = torch.where(valid_C[:, None], d_logits_CV * (scale * temperature), 0.0).to(hidden.dtype)
            if d_hidden_ND is not None:
                _add_product(d_hidden_ND[chunk], d_logits_CV, weight)
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.t(), rows_ND[chunk])
            del student_CV, d_logits_CV
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.hidden_shape, ctx.dtype, ctx.scale = hidden.shape, hidden.dtype, scale
        return (total * temperature**2).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.scale
        d_hidden, d_weight = (
            None if g is None else torch.mul(g, factor, out=torch.empty_like(g, dtype=ctx.dtype))
            for g in ctx.saved_tensors
        )
        return None if d_hidden is None else d_hidden.view(ctx.hidden_shape), d_weight, *[None] * 5


def _divergences(student_CV: Tensor, teacher_CV: Tensor, divergence: Divergence, *, gradient: bool) -> Compared:
    """(divergences [C], their gradient by the student's logits [C, V]) of logits over temperature, wide."""
    beta, shard = divergence.beta, divergence.shard
    lse_2C = _log_sum_exps(torch.stack([student_CV.amax(1), teacher_CV.amax(1)]), student_CV, teacher_CV, shard)
    log_s_CV, log_t_CV = student_CV - lse_2C[0, :, None], teacher_CV - lse_2C[1, :, None]
    s_CV, t_CV = log_s_CV.exp(), log_t_CV.exp()
    if beta == 0.0:
        (losses_C,) = _sums([(t_CV * (log_t_CV - log_s_CV)).sum(1)], shard)
        return losses_C, s_CV.sub_(t_CV) if gradient else None
    if beta == 1.0:
        ratio_CV = log_s_CV - log_t_CV
        (losses_C,) = _sums([(s_CV * ratio_CV).sum(1)], shard)
        return losses_C, s_CV.mul_(ratio_CV - losses_C[:, None]) if gradient else None
    log_m_CV = torch.logaddexp(log_t_CV + math.log(beta), log_s_CV + math.log1p(-beta))
    ratio_CV = log_s_CV - log_m_CV
    of_teacher_C, of_student_C = _sums([(t_CV * (log_t_CV - log_m_CV)).sum(1), (s_CV * ratio_CV).sum(1)], shard)
    losses_C = beta * of_teacher_C + (1 - beta) * of_student_C
    return losses_C, s_CV.mul_(ratio_CV - of_student_C[:, None]).mul_(1 - beta) if gradient else None


def _log_sum_exps(highest_2C: Tensor, student_CV: Tensor, teacher_CV: Tensor, shard: VocabularyShard | None) -> Tensor:
    """[2, C] over all words; highest: of this rank's."""
    if shard is not None:
        dist.all_reduce(highest_2C, dist.ReduceOp.MAX, group=shard.group)
    parts = [(x - highest_2C[i, :, None]).exp_().sum(1) for i, x in enumerate((student_CV, teacher_CV))]
    return highest_2C + _sums(parts, shard).log()


def _sums(parts: list[Tensor], shard: VocabularyShard | None) -> Tensor:
    """[len(parts), C], added up over ranks."""
    sums = torch.stack(parts)
    if shard is not None:
        dist.all_reduce(sums, group=shard.group)
    return sums
