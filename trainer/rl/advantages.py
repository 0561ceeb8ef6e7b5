"""How much better a completion is than others of its prompt.

G completions of a prompt have rewards r_1 .. r_G (2402.03300, 4.1.2; 2503.20783; 2402.14740):

    standardized    (r - mean) / (std + 1e-4)       std of G - 1 degrees of freedom
    centered        r - mean
    leave_one_out   r - mean of the others = G / (G - 1) (r - mean)

A group whose rewards are all equal says nothing: its advantages are 0, exactly, whatever their mean rounds to.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STD_FLOOR = 1e-4
"""Added to the standard deviation. Below it differences are taken for noise."""


def group_advantages(rewards: Sequence[float], *, kind: str) -> list[float]:
    """Advantages of a group, in its order. rewards: finite; kind: one of trainer.rl.config.ADVANTAGES."""
    if len(rewards) < 2 or is_constant(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    if kind == "standardized":
        scale = 1 / (statistics.stdev(rewards) + STD_FLOOR)
    elif kind == "leave_one_out":
        scale = len(rewards) / (len(rewards) - 1)
    else:
        scale = 1.0
    return [(reward - mean) * scale for reward in rewards]


def is_constant(rewards: Sequence[float]) -> bool:
    """Whether nothing can be learned from a group: all its rewards are equal, or there is none."""
    return not rewards or max(rewards) == min(rewards)
