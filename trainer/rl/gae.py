"""Advantages by values, and the coefficient of the KL divergence in rewards: the numbers of PPO, on the host in fp64.

T tokens were generated, with a reward r_t for each (that of the completion at the last) and a value V_t of what was
there before it; V_T = 0, for the completion has ended (1506.02438, eq. 16; 1707.06347, eq. 11 and 12):

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        returns_t = A_t + V_t
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

VARIANCE_FLOOR = 1e-8
"""Added to the variance that advantages are divided by the root of."""
LARGEST_ERROR = 0.2
"""Of the KL divergence, relative, that the coefficient reacts to."""


class Estimate(NamedTuple):
    """Of one completion, T each. Filled by `generalized_advantages`."""

    advantages: list[float]
    returns: list[float]


def generalized_advantages(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, gae_lambda: float
) -> Estimate:
    """See the top of this file. rewards, values: of T tokens."""
    advantages = [0.0] * len(rewards)
    following = next_value = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = following = delta + gamma * gae_lambda * following
        next_value = values[t]
    return Estimate(advantages, [a + v for a, v in zip(advantages, values, strict=True)])


class Moments(NamedTuple):
    """Of numbers of all ranks. Filled by `moments`."""

    size: int
    mean: float
    variance: float  # of size - 1 degrees of freedom; 0 for fewer than two numbers


def moments(numbers: Sequence[float], all_gather: Callable[[Any], list[Any]]) -> Moments:
    """Of the numbers of all ranks. all_gather: one object of every rank. Collective."""
    parts = all_gather((len(numbers), math.fsum(numbers)))
    size = sum(size for size, _ in parts)
    mean = math.fsum(total for _, total in parts) / max(size, 1)
    squares = math.fsum(all_gather(math.fsum((number - mean) ** 2 for number in numbers)))
    return Moments(size, mean, squares / (size - 1) if size > 1 else 0.0)


def whitened(advantages: Sequence[float], of_all: Moments) -> list[float]:
    """With mean 0 and standard deviation 1 over all of them."""
    scale = 1 / math.sqrt(of_all.variance + VARIANCE_FLOOR)
    return [(advantage - of_all.mean) * scale for advantage in advantages]


def explained_variance(returns: Moments, errors: Moments) -> float:
    """1 - Var(returns - values) / Var(returns): 1 where values foretell them, 0 where a constant would do as well, and
    where returns are all equal."""
    return 1 - errors.variance / returns.variance if returns.variance > 0 else 0.0


def next_coefficient(coefficient: float, kl: float, *, target: float | None, gain: float) -> float:
    """What the KL divergence is weighed by in the next batch (1909.08593, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2)        coefficient (1 + gain e)

    kl: log pi - log pi_ref summed over a completion, the mean of a batch, in nats. target None: it stays.
    """
    if target is None:
        return coefficient
    return coefficient * (1 + gain * min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR))
