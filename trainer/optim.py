"""Optimizers over named master parameters, wherever their elements lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainer.adamw import AdamW
from trainer.config import OPTIMIZERS, OptimConfig
from trainer.gradients import clip_coefficient, global_grad_norm, local_shard_of
from trainer.muon import Muon

__all__ = ["Optimizer", "build_optimizer", "clip_coefficient", "decay_of", "global_grad_norm", "problems"]

EMBEDDINGS = ("embedding.", "positions.")
"""Names of the parameters that are tables of vectors start with one of these."""
OUTPUT = ("head.",)
"""The untied output projection."""


class UpdateRule(Protocol):
    """How some of the parameters change in a step: AdamW, Muon."""

    def state(self) -> dict[str, Tensor]:
        """State tensors by name, KIND/PARAMETER; always the same objects."""
        ...

    def update(self, *, lr: float, grad_scale: Tensor, skip: Tensor, num_steps: Tensor) -> None:
        """One update in place; the tensors are on the parameters' device, num_steps counts this update."""
        ...


class Optimizer:
    """Updates every parameter once per step, by one of its rules.

    A parameter is a plain tensor that all ranks hold whole (ZeRO stage 0) or a DTensor (stages 1 to 3); each rank
    updates what it holds. State exists from construction, zero, and is updated in place: a checkpoint writes and reads
    it as it is.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rules: list[UpdateRule]) -> None:
        self.parameters = dict(parameters)
        self.rules = rules
        devices = {p.device for p in parameters.values()}
        if len(devices) != 1:
            raise ValueError(f"parameters are on {len(devices)} devices {sorted(map(str, devices))}; they need one")
        self._device = devices.pop()
        for name, parameter in parameters.items():
            if not local_shard_of(parameter).is_contiguous():
                # The fused kernels walk memory: weights and moments of another order would be matched wrongly.
                raise ValueError(f"parameter {name} is not contiguous in memory; make it so with .contiguous()")
        # fp32, as the fused kernels want it; exact up to 16.7 M steps.
        self._num_steps = torch.zeros((), dtype=torch.float32, device=self._device)

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: Tensor, skip: Tensor) -> None:
        """One update from `p.grad` of every parameter.

        grad_scale: 0-d fp32, multiplies all gradients (clipping coefficient / loss scale). skip: 0-d fp32; 0: update;
        1: leave parameters and state, the step count included, bit for bit as they are, whatever the gradients hold.
        `p.grad` may be left scaled: call zero_grad next. No host synchronisation, except that for masters in host
        memory (offloaded) both scalars are copied there. Collective where matrices are sharded and the rule is Muon.
        Raises RuntimeError for a parameter without a gradient, or with one of another dtype, shape or placement.
        """
        grad_scale, skip = grad_scale.to(self._device), skip.to(self._device)
        self._num_steps += 1 - skip
        for rule in self.rules:
            rule.update(lr=lr, grad_scale=grad_scale, skip=skip, num_steps=self._num_steps)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name: "step" (0-d fp32, updates done) and KIND/PARAMETER, with the parameter's placements."""
        state = {"step": self._num_steps}
        for rule in self.rules:
            state |= rule.state()
        return state


def decay_of(name: str, parameter: Tensor, config: OptimConfig) -> float:
    """Weight decay of a parameter: none for vectors (norms, biases), for embeddings only if config says so."""
    if parameter.ndim < 2 or (name.startswith(EMBEDDINGS) and not config.decay_embeddings):
        return 0.0
    return config.weight_decay


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for this parameter: a linear map between hidden vectors, not a table, output or vector."""
    return parameter.ndim == 2 and not name.startswith(EMBEDDINGS + OUTPUT)


def build_optimizer(parameters: Mapping[str, Tensor], config: OptimConfig) -> Optimizer:
    """The optimizer that config names, over master parameters by name (order and names the same on all ranks).

    muon: hidden matrices by Muon, all else by AdamW with the same lr and weight decay. Raises ValueError for an unknown
    name, no parameters, or, with muon, a layout that it cannot divide.
    """
    if found := problems(config):
        raise ValueError("; ".join(found))
    decay = {name: decay_of(name, p, config) for name, p in parameters.items()}
    if config.name == "adamw":
        return Optimizer(parameters, [AdamW(parameters, decay, config)])
    hidden = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p)}
    others = {name: p for name, p in parameters.items() if name not in hidden}
    return Optimizer(parameters, [Muon(hidden, decay, config), AdamW(others, decay, config)])


def problems(config: OptimConfig) -> list[str]:
    """Every reason why these settings cannot work, one line each."""
    found = []
    if config.name not in OPTIMIZERS:
        found.append(f"optim.name={config.name} is not an optimizer; use one of {', '.join(OPTIMIZERS)}")
    for field in ("lr", "weight_decay"):
        value = getattr(config, field)
        if not (math.isfinite(value) and value >= 0):
            found.append(f"optim.{field}={value} must be a number of at least 0")
    for field in ("beta1", "beta2", "momentum"):
        value = getattr(config, field)
        if not 0 <= value < 1:
            found.append(f"optim.{field}={value} must be at least 0 and below 1")
    if not (math.isfinite(config.eps) and config.eps > 0):
        found.append(f"optim.eps={config.eps} must be positive; 1e-8 is usual")
    if config.newton_schulz_steps < 1:
        found.append(f"optim.newton_schulz_steps={config.newton_schulz_steps} must be at least 1; 5 is usual")
    return found
