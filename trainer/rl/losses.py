"""What is minimised for each token of a completion, by its log-probabilities then and now.

N tokens with log-probabilities log pi (now, with a gradient) and log pi_old (of the policy that the ratios are
against), the advantage A of the completion o that each belongs to, rho = pi / pi_old:

    clip            -min(rho A, clip(rho, 1 - low, 1 + high) A)           PPO, 1707.06347, eq. 7; asymmetric: 2503.14476
                    with dual_clip c: at most -c A where A < 0             1912.09729, eq. 5
    sequence_clip   the same of s = exp(mean over o of log rho)           GSPO, 2507.18071, eq. 5 and 7
    cispo           -stopgrad(clip(rho, 1 - low, 1 + high)) A log pi      2506.13585, eq. 4

Values V (now, with a gradient), of which V_old was before the updates, for returns R:

    value           1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)      2005.12729, section 3

A token of a sequence_clip has its completion's loss: weights that add up to 1 over a completion give the paper's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallel.collectives import Axis, all_reduce, sum_of_gradients


class TokenLosses(NamedTuple):
    """All [N], of the dtype of the log-probabilities. Filled by `policy_losses`."""

    loss: Tensor  # with a gradient
    ratio: Tensor  # rho, or s
    below: Tensor  # 1 where the lower clip took the gradient away
    above: Tensor  # the same of the upper one


def policy_losses(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    sequences: Tensor | None = None,
    num_sequences: int = 0,
    context: Axis | None = None,
) -> TokenLosses:
    """See the top of this file. logprobs, old, advantages [N]; kind: one of trainer.rl.config.LOSSES.

    sequences [N] int64: which of num_sequences completions each token belongs to; context: the ranks that have others
    of their tokens. Both read by sequence_clip alone.
    """
    log_ratio = logprobs - old
    if kind == "sequence_clip":
        assert sequences is not None
        log_ratio = mean_over_sequences(log_ratio, sequences, num_sequences, context)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    below, above = (ratio < clipped), (ratio > clipped)
    if kind == "cispo":
        return TokenLosses(-clipped.detach() * advantages * logprobs, ratio.detach(), _float(below), _float(above))
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    # The clipped branch is the smaller one only on the side that the advantage pushes towards.
    below, above = below & (advantages < 0), above & (advantages > 0)
    return TokenLosses(-objective, ratio.detach(), _float(below), _float(above))


class ValueLosses(NamedTuple):
    """Both [N]. Filled by `value_losses`."""

    loss: Tensor  # with a gradient
    clipped: Tensor  # 1 where clipping took the gradient away


def value_losses(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> ValueLosses:
    """See the top of this file. values, old, returns [N]; clip 0: the square alone."""
    squares = (values - returns).square()
    if not clip:
        return ValueLosses(squares / 2, torch.zeros_like(squares, requires_grad=False))
    # Not old + (values - old).clamp: rounding would make that larger than values, or not, where nothing is clipped.
    of_clipped = (values.clamp(old - clip, old + clip) - returns).square()
    return ValueLosses(torch.maximum(squares, of_clipped) / 2, _float(of_clipped > squares))


def mean_over_sequences(values: Tensor, sequences: Tensor, num_sequences: int, context: Axis | None = None) -> Tensor:
    """The mean of values [N] over each token's sequence, at every token: [N]. context: of `policy_losses`, whose ranks
    call it together."""
    sums = values.new_zeros(num_sequences).index_add(0, sequences, values)
    counts = values.new_zeros(num_sequences).index_add(0, sequences, torch.ones_like(values))
    if context is not None:  # each rank uses the sum for losses of its own
        sums, counts = sum_of_gradients(all_reduce(sums, context), context), all_reduce(counts, context)
    return (sums / counts.clamp(min=1))[sequences]


def importance_weights(logprobs: Tensor, sampler: Tensor, *, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) [N], without a gradient: exactly 1 where log-probabilities are equal.

    Both by the weights that rollouts were made with: tokens were drawn from the sampler's distribution, and the
    trainer's differs from it by the rounding of two programs. Truncating bounds the variance and leaves a bias.
    """
    return (logprobs.detach() - sampler).exp().clamp(max=cap)


def kl_divergence(logprobs: Tensor, reference: Tensor, *, kind: str) -> Tensor:
    """An estimate [N] of KL(pi || pi_ref) at tokens drawn from pi; x = log pi - log pi_ref.

    k1: x, unbiased; k2: x^2 / 2; k3: exp(-x) - 1 + x, unbiased and never negative (Schulman, Approximating KL
    divergence, 2020). As a loss its gradient on-policy is 0 (k1), that of KL(pi || pi_ref) (k2), or of KL(pi_ref || pi)
    (k3).
    """
    x = logprobs - reference
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    return torch.expm1(-x) + x


def _float(which: Tensor) -> Tensor:
    return which.to(torch.float32)
