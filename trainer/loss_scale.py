"""Dynamic loss scaling for fp16 (Micikevicius et al., 1710.03740, section 3.2), without a host sync."""

from __future__ import annotations

import torch

from parallel.precision import PrecisionConfig

GROWTH = 2.0
BACKOFF = 0.5
SMALLEST, LARGEST = 2.0**-24, 2.0**24
"""Bounds of the scale: without the upper one, gradients of zero would let it grow to infinity, where it stays."""


class LossScale:
    """The factor the loss is multiplied by before backward; 1 and constant unless precision.compute is fp16.

    A step whose gradients are not finite is skipped and halves the scale; `interval` good steps in a row double it.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        self.dynamic = config.scales_loss
        self.interval = config.loss_scale_growth_interval
        self.first = config.loss_scale if self.dynamic else 1.0
        self.scale = torch.tensor(self.first, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, skipped: torch.Tensor) -> None:
        """After a step; skipped: 0-d fp32, 1 if the step was skipped."""
        if not self.dynamic:
            return
        good = (self.good_steps + 1) * (1 - skipped)
        grow = good >= self.interval
        factor = torch.where(skipped.bool(), BACKOFF, torch.where(grow, GROWTH, 1.0))
        self.scale.mul_(factor).clamp_(SMALLEST, LARGEST)
        self.good_steps.copy_(torch.where(grow, 0.0, good))

    def reset(self) -> None:
        """Back to the first scale: one that belongs to another precision says nothing about this one."""
        self.scale.fill_(self.first)
        self.good_steps.zero_()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds; loaded in place."""
        return {"scale": self.scale, "good_steps": self.good_steps}
