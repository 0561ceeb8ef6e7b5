"""AdamW by torch's fused kernel: the update rule of all parameters, or of those that Muon is not for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config import OptimConfig
from trainer.gradients import local_gradient, local_shard_of


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 1711.05101, algorithm 2) and bias correction.

    Each rank updates its local shards with torch's fused kernel, which needs no communication. The moments have the
    dtype and placements of their parameter, as in torch.optim.AdamW. Other moments, and bf16 parameters, which this
    kernel rounds to nearest: trainer/adamw_kernel.py.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: Mapping[str, float], config: OptimConfig) -> None:
        """decay: weight decay coefficient of each parameter, by name."""
        self.config = config
        self.parameters = dict(parameters)
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._groups: dict[tuple[float, torch.dtype], list[str]] = {}  # one kernel call each
        for name, p in parameters.items():
            # A rank may hold no row of a small parameter.
            if local_shard_of(p).numel():
                self._groups.setdefault((decay[name], p.dtype), []).append(name)

    def state(self) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME of every parameter."""
        first = {f"exp_avg/{name}": t for name, t in self.exp_avg.items()}
        return first | {f"exp_avg_sq/{name}": t for name, t in self.exp_avg_sq.items()}

    def update(self, *, lr: float, grad_scale: Tensor, skip: Tensor, num_steps: Tensor) -> None:
        """One update in place. num_steps counts this one; see Optimizer.step. Gradients may be left scaled."""
        # The kernel divides gradients by its grad_scale, a loss scale.
        divisor = grad_scale.reciprocal()
        for (decay, _), names in self._groups.items():
            torch._fused_adamw_(
                [local_shard_of(self.parameters[name]) for name in names],
                [local_gradient(name, self.parameters[name]) for name in names],
                [local_shard_of(self.exp_avg[name]) for name in names],
                [local_shard_of(self.exp_avg_sq[name]) for name in names],
                [],
                [num_steps] * len(names),
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=decay,
                eps=self.config.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=skip,
            )
