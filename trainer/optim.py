"""Optimizers over named master parameters, wherever their elements lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from kernels.backend import runs_triton
from parallel.fused import NOTHING_FUSED, Parts
from parallel.problem import Problem, values
from trainer.adamw import AdamW
from trainer.adamw_kernel import NO_COPIES, KernelAdamW, is_quantized
from trainer.config import OPTIMIZER_KERNELS, OPTIMIZERS, STATE_DTYPES, OptimConfig
from trainer.gradients import clip_coefficient, global_grad_norm, local_shard_of
from trainer.muon import Muon

__all__ = ["Optimizer", "build_optimizer", "clip_coefficient", "decay_of", "global_grad_norm", "problems"]

EMBEDDINGS = ("embedding.", "positions.")
"""Names of the parameters that are tables of vectors start with one of these."""
OUTPUT = ("head.",)
"""The untied output projection."""
AUTO_KERNEL = {"cuda": "triton"}
"""By where the weights are, what optim.kernel=auto takes where torch can do the same; elsewhere torch. On 4 H200 a step
of llama3_8b took 1.534 s with kernels/adamw and kernels/global_norm and 1.562 s with torch's; since then the update by
itself is 1.39 times as fast as torch's fused one with scaled gradients. Where torch cannot (int8 and bf16 moments,
stochastic rounding), auto is triton everywhere."""

NOTHING_SCALED: Mapping[str, float] = MappingProxyType({})

SMALLEST_BF16_STEP = 2.0**-8
"""Of a bf16 number, relative, that rounding to nearest does not undo wherever the number lies between powers of 2."""
LARGEST_BF16_BETA = 0.996
"""By which a moment in bf16 may shrink, in three digits: 1 - SMALLEST_BF16_STEP."""


class UpdateRule(Protocol):
    """How some of the parameters change in a step: AdamW, Muon."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Those, by name."""
        ...

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

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rules: list[UpdateRule],
        *,
        norm_kernel: str = "torch",
        lr_factors: Sequence[float] | None = None,
    ) -> None:
        """norm_kernel: what `global_grad_norm` of these parameters is to be taken by. lr_factors: what multiplies the
        learning rate, by rule; None: nothing does."""
        self.parameters = dict(parameters)
        self.written = frozenset(name for rule in rules if isinstance(rule, KernelAdamW) for name in rule.copies)
        """Parameters whose copies in another dtype an update writes too."""
        self.rules = rules
        self.lr_factors = [1.0] * len(rules) if lr_factors is None else lr_factors
        self.norm_kernel = norm_kernel
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
    def step(
        self,
        *,
        lr: float,
        grad_scale: Tensor,
        skip: Tensor,
        updated: Callable[[Collection[str]], None] = lambda names: None,
    ) -> None:
        """One update from `p.grad` of every parameter.

        grad_scale: 0-d fp32, multiplies all gradients (clipping coefficient / loss scale). skip: 0-d fp32; 0: update;
        1: leave parameters and state, the step count included, bit for bit as they are, whatever the gradients hold.
        updated: called with the names of parameters right after their update was launched, before that of others.

        `p.grad` may be left scaled: call zero_grad next. No host synchronisation, except that for masters in host
        memory (offloaded) both scalars are copied there. Collective where matrices are sharded and the rule is Muon.
        Raises RuntimeError for a parameter without a gradient, or with one of another dtype, shape or placement.
        """
        grad_scale, skip = grad_scale.to(self._device), skip.to(self._device)
        self._num_steps += 1 - skip
        for rule, factor in zip(self.rules, self.lr_factors, strict=True):
            rule.update(lr=lr * factor, grad_scale=grad_scale, skip=skip, num_steps=self._num_steps)
            updated(rule.parameters)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name: "step" (0-d fp32, updates done) and KIND/PARAMETER, with the parameter's placements.

        Moments in 8 bits are codes (KIND) and scales (KIND_scales).
        """
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


def choose_kernel(config: OptimConfig, *, stochastic: bool, device: torch.device) -> str:
    """torch or triton: what updates by AdamW.

    stochastic: parameters are bf16 and rounded stochastically. device: that they are on.
    """
    if config.kernel != "auto":
        return config.kernel
    return "triton" if _only_by_kernel(config, stochastic) else AUTO_KERNEL.get(device.type, "torch")


def _only_by_kernel(config: OptimConfig, stochastic: bool) -> bool:
    """Whether torch has no such update."""
    return stochastic or config.state_dtype != "fp32"


def choose_norm_kernel(config: OptimConfig, device: torch.device) -> str:
    """torch or triton: what sums the squares of gradients on device."""
    return AUTO_KERNEL.get(device.type, "torch") if config.kernel == "auto" else config.kernel


def build_optimizer(
    parameters: Mapping[str, Tensor],
    config: OptimConfig,
    *,
    seed: int = 0,
    fused: Mapping[str, Parts] = NOTHING_FUSED,
    copies: Mapping[str, Tensor] = NO_COPIES,
    first: Collection[str] = (),
    lr_factors: Mapping[str, float] = NOTHING_SCALED,
) -> Optimizer:
    """The optimizer that config names, over master parameters by name (order and names the same on all ranks).

    muon: hidden matrices by Muon, all else by AdamW with the same lr and weight decay. seed: of the stochastic rounding
    of bf16 parameters. fused: what fused parameters are made of, by name; a part is updated as it would be alone.
    copies: by name, local memory that new values go to in another dtype too, by rules that can do so in the same pass
    (`Optimizer.written`). first: names of those that AdamW updates before others. lr_factors: by name, what multiplies
    the learning rate of the step; adamw alone. Raises ValueError for settings that do not go together, no parameters,
    or a layout that muon, or moments in 8 bits, cannot divide.
    """
    stochastic = any(p.dtype == torch.bfloat16 for p in parameters.values())
    if found := problems(config) + precision_problems(config, master="bf16" if stochastic else "fp32"):
        raise ValueError("; ".join(found))
    decay = {name: decay_of(name, p, config) for name, p in parameters.items()}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))  # of none, Optimizer complains
    norm_kernel = choose_norm_kernel(config, device)

    def adamw(some: Mapping[str, Tensor]) -> UpdateRule:
        if choose_kernel(config, stochastic=stochastic, device=device) == "torch":
            return AdamW(some, decay, config)
        return KernelAdamW(some, decay, config, copies=copies, seed=seed, fused=fused)

    if config.name == "adamw":
        kinds: dict[tuple[bool, float], dict[str, Tensor]] = {}
        for name, p in parameters.items():
            kinds.setdefault((name not in first, lr_factors.get(name, 1.0)), {})[name] = p
        rules = [adamw(kinds[kind]) for kind in sorted(kinds)]
        return Optimizer(parameters, rules, norm_kernel=norm_kernel, lr_factors=[factor for _, factor in sorted(kinds)])
    hidden = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p)}
    others = {name: p for name, p in parameters.items() if name not in hidden}
    return Optimizer(parameters, [Muon(hidden, decay, config, fused=fused), adamw(others)], norm_kernel=norm_kernel)


def describe(optimizer: Optimizer, config: OptimConfig) -> dict[str, str]:
    """What really updates the parameters and takes the norm of their gradients, and why, for run.json."""
    parameters = optimizer.parameters.values()
    first = next(iter(parameters))

    def implementation(kernel: str, why: str) -> str:
        name = kernel if kernel == "torch" or runs_triton(first) else "reference of the triton kernel"
        return f"{name}, auto: {why}" if config.kernel == "auto" else name

    stochastic = any(p.dtype == torch.bfloat16 for p in parameters)
    place = f"on {first.device.type}"
    why = "not in torch" if _only_by_kernel(config, stochastic) else place
    update = [implementation(choose_kernel(config, stochastic=stochastic, device=first.device), why)]
    if config.state_dtype == "int8":
        share = sum(p.numel() for p in parameters if is_quantized(p)) / sum(p.numel() for p in parameters)
        update.append(f"int8 moments of {share:.1%} of the weights, fp32 of the others")
    elif config.state_dtype != "fp32":
        update.append(f"{config.state_dtype} moments")
    if stochastic:
        update.append("stochastic rounding")
    return {
        "optimizer": f"{config.name} ({', '.join(update)})",
        "gradient_norm": implementation(optimizer.norm_kernel, place),
    }


def problems(config: OptimConfig) -> list[str]:
    """Every reason why these settings cannot work, one line each."""
    found: list[str] = []
    if config.name not in OPTIMIZERS:
        found.append(Problem(f"optim.name={config.name} is not an optimizer", values("optim.name", OPTIMIZERS)))

    def outside(field: str, bounds: str) -> Problem:
        what = f"optim.{field}={getattr(config, field)} must be {bounds}"
        return Problem(what, values(f"optim.{field}", [getattr(OptimConfig(), field)]))

    for field in ("lr", "weight_decay"):
        value = getattr(config, field)
        if not (math.isfinite(value) and value >= 0):
            found.append(outside(field, "a number of at least 0"))
    found += [
        outside(field, "at least 0 and below 1")
        for field in ("beta1", "beta2", "momentum")
        if not 0 <= getattr(config, field) < 1
    ]
    if not (math.isfinite(config.eps) and config.eps > 0):
        found.append(outside("eps", "positive"))
    if config.newton_schulz_steps < 1:
        found.append(outside("newton_schulz_steps", "at least 1"))
    return found + _kernel_problems(config)


def _kernel_problems(config: OptimConfig) -> list[str]:
    """What is wrong with optim.kernel and optim.state_dtype."""
    found: list[str] = []
    kernel, dtype = config.kernel, config.state_dtype
    if kernel not in OPTIMIZER_KERNELS:
        found.append(Problem(f"optim.kernel={kernel} is unknown", values("optim.kernel", OPTIMIZER_KERNELS)))
    if dtype not in STATE_DTYPES:
        return [*found, Problem(f"optim.state_dtype={dtype} is unknown", values("optim.state_dtype", STATE_DTYPES))]
    if dtype == "fp32":
        return found
    if config.name == "muon":
        found.append(
            Problem(
                f"optim.state_dtype={dtype} is for optim.name=adamw; the momentum of muon has the dtype of "
                "precision.master",
                values("optim.state_dtype", ["fp32"]),
                values("optim.name", ["adamw"]),
            )
        )
    if kernel == "torch":
        found.append(
            Problem(
                f"optim.state_dtype={dtype} is not in optim.kernel=torch, whose moments have the dtype of the weights",
                values("optim.kernel", ["auto", "triton"]),
                values("optim.state_dtype", ["fp32"]),
            )
        )
    for beta in ("beta1", "beta2"):
        value = getattr(config, beta)
        if dtype == "bf16" and 1 - value < SMALLEST_BF16_STEP:
            found.append(
                Problem(
                    f"optim.state_dtype=bf16 with optim.{beta}={value}: a moment that shrinks by a factor of {value} "
                    "is rounded back to what it was (bf16 has 8 bits) and never forgets",
                    values(f"optim.{beta}", [LARGEST_BF16_BETA]),
                    values("optim.state_dtype", ["int8", "fp32"]),
                )
            )
    return found


def precision_problems(config: OptimConfig, *, master: str) -> list[str]:
    """Why these settings cannot be used with precision.master, one line each."""
    if master != "bf16":
        return []
    found: list[str] = []
    fp32 = values("precision.master", ["fp32"])
    if config.name == "muon":
        found.append(
            Problem(
                "precision.master=bf16 is for optim.name=adamw: muon rounds to nearest, which loses updates below "
                "1/256 of a weight",
                fp32,
                values("optim.name", ["adamw"]),
            )
        )
    if config.kernel == "torch":
        found.append(
            Problem(
                "precision.master=bf16 is rounded stochastically, and optim.kernel=torch rounds to nearest",
                values("optim.kernel", ["auto", "triton"]),
                fp32,
            )
        )
    return found
