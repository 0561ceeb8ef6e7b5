"""Losses of preferences, as functions of what policy and reference say of the two answers to a prompt.

d = log pi(y | x) - log pi_ref(y | x), a sum over the tokens of an answer; D = d_chosen - d_rejected; a bar means
divided by the number of its tokens; s is the logistic function.

    sigmoid   - (1 - e) log s(beta D) - e log s(- beta D)                          DPO (2305.18290, eq. 7); e > 0: cDPO
    robust    (- (1 - e) log s(beta D) + e log s(- beta D)) / (1 - 2 e)            2403.00409, eq. 7
    ipo       (bar D - 1 / (2 beta))^2, d divided by the tokens of its answer      2310.12036, eq. 17
    hinge     max(0, 1 - beta D)                                                   2309.06657, section 2
    simpo     - log s(beta (bar log pi_chosen - bar log pi_rejected) - gamma)      2405.14734, eq. 6
    orpo      - log s(log odds_chosen - log odds_rejected), odds = P / (1 - P)     2403.07691, eq. 7
              with log P = bar log pi; trained beside the chosen answer's negative log-likelihood
    kto       w (1 - s(+- beta (d - z))), + and w_good for good answers, - and w_bad     2402.01306, eq. 8
              for bad ones; z = max(0, mean of d over answers to other prompts)
    reward    - log s(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2    2204.05862; 2307.09288, eq. 2;
              2312.09244, section 3 (centring)

All arguments are tensors of one shape, one entry per pair (or [..., 2] of chosen and rejected), and differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WITH_REFERENCE = ("sigmoid", "robust", "ipo", "hinge")
WITHOUT_REFERENCE = ("simpo", "orpo")
LOSSES = (*WITH_REFERENCE, *WITHOUT_REFERENCE)


def preference_losses(
    kind: str,
    logprobs: Tensor,
    reference: Tensor | None,
    lengths: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    """Loss of each pair [...]. beta of orpo is not read: it weights the loss.

    logprobs, reference [..., 2]: of the chosen and the rejected answer, in nats, summed over their tokens; lengths
    [..., 2]: how many these are, at least 1.
    """
    if kind == "simpo":
        return -F.logsigmoid(beta * _difference(logprobs / lengths) - gamma)
    if kind == "orpo":
        return -F.logsigmoid(_difference(log_odds(logprobs / lengths)))
    assert reference is not None
    gain = logprobs - reference
    if kind == "ipo":
        return (_difference(gain / lengths) - 1 / (2 * beta)).square()
    scaled = beta * _difference(gain)
    if kind == "hinge":
        return F.relu(1 - scaled)
    agreeing, flipped = F.logsigmoid(scaled), F.logsigmoid(-scaled)
    if kind == "robust":
        return (-(1 - label_smoothing) * agreeing + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    assert kind == "sigmoid"
    return -(1 - label_smoothing) * agreeing - label_smoothing * flipped


def implicit_rewards(kind: str, logprobs: Tensor, reference: Tensor | None, lengths: Tensor, *, beta: float) -> Tensor:
    """What a policy's answers are worth to it [..., 2]: beta d (DPO, eq. 5); of simpo and orpo beta bar log pi."""
    return beta * (logprobs / lengths if reference is None else logprobs - reference)


def unpaired_losses(
    gains: Tensor, good: Tensor, baseline: Tensor, *, beta: float, weights: tuple[float, float]
) -> Tensor:
    """KTO's loss of each answer [...]: gains are d, good is positive for good answers and negative for bad ones, the
    baseline z; weights of good and of bad ones."""
    sign = torch.where(good > 0, 1.0, -1.0)
    return torch.where(good > 0, *weights) * torch.sigmoid(-sign * beta * (gains - baseline))


def reward_losses(rewards: Tensor, margins: Tensor, *, centering: float = 0.0) -> Tensor:
    """Loss of each pair [...] of rewards [..., 2] of the chosen and the rejected answer (Bradley-Terry)."""
    return -F.logsigmoid(_difference(rewards) - margins) + centering * rewards.sum(-1).square()


def log_odds(log_p: Tensor) -> Tensor:
    """log (p / (1 - p)) of log p <= 0; at log p = 0, where it is infinite, that of the largest p below 1."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _difference(values: Tensor) -> Tensor:
    return values[..., 0] - values[..., 1]
