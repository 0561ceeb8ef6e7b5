"""AdamW over the parameters of a model, in the forms of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.adamw import AdamWUpdate, ElementIndex, QuantizedMoment

NUM_PARAMETERS = 1 << 29
MATRIX = (4096, 14336)
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}


def shapes(flat: bool) -> list[tuple[int, ...]]:
    """One buffer, or matrices with a norm's vector after each, as a model's parameters come."""
    if flat:
        return [(NUM_PARAMETERS,)]
    number = NUM_PARAMETERS // (MATRIX[0] * MATRIX[1] + MATRIX[0])
    return [MATRIX, (MATRIX[0],)] * number


def tensors(flat: bool, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(shape, device=device) * scale).to(dtype) for shape in shapes(flat)]


def ours(
    device: torch.device, flat: bool, dtype: torch.dtype, moment: torch.dtype, copies: bool
) -> tuple[Callable[[], Any], list[Tensor], list[Tensor]]:
    """An update, its parameters and gradients."""
    parameters, gradients = tensors(flat, device, dtype), tensors(flat, device, dtype, 1e-3)
    states: list[list[Any]] = [
        [
            QuantizedMoment.zeros(p.numel(), signed=signed, device=device)
            if moment == torch.int8
            else torch.zeros_like(p, dtype=moment)
            for p in parameters
        ]
        for signed in (True, False)
    ]
    update = AdamWUpdate(
        parameters,
        *states,
        decay=[0.1] * len(parameters),
        copies=[p.bfloat16() for p in parameters] if copies else None,
        rounding=[ElementIndex(str(i)) for i in range(len(parameters))] if dtype == torch.bfloat16 else None,
    )
    step, grad_scale, skip = (torch.tensor(x, device=device) for x in (3.0, 0.5, 0.0))
    return (
        partial(update.update, gradients, **SETTINGS, step=step, grad_scale=grad_scale, skip=skip),
        parameters,
        gradients,
    )


def fused(parameters: list[Tensor], gradients: list[Tensor]) -> Callable[[], Any]:
    """torch's fused kernel with the clipping coefficient folded in, over the same parameters and gradients."""
    states = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    device = parameters[0].device
    step, grad_scale, skip = (torch.tensor(x, device=device) for x in (3.0, 2.0, 0.0))
    lists = (parameters, gradients, *states, [], [step] * len(parameters))
    (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
    options = {"weight_decay": 0.1, "amsgrad": False, "maximize": False, "grad_scale": grad_scale, "found_inf": skip}
    return partial(torch._fused_adamw_, *lists, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **options)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    fp32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    for name, flat, dtype, moment, copies, bytes_each in (
        ("fp32, flat", True, fp32, fp32, False, 28.0),
        ("fp32", False, fp32, fp32, False, 28.0),
        ("fp32 and bf16 copy", False, fp32, fp32, True, 30.0),
        ("fp32, 8-bit moments", False, fp32, int8, False, 16.0 + 4 * 4 / 256),
        ("bf16 stochastic, bf16 moments", False, bf16, bf16, False, 14.0),
        ("bf16 stochastic, 8-bit moments", False, bf16, int8, False, 10.0 + 4 * 4 / 256),
    ):
        update, parameters, gradients = ours(device, flat, dtype, moment, copies)
        candidates = {"lattice": update}
        if moment == dtype and not copies:
            candidates["eager"] = fused(parameters, gradients)
        size = sum(p.numel() for p in parameters)
        table = f"kernels.adamw.kernel:{'BLOCKS_8_BIT' if moment == int8 else 'BLOCKS'}"
        shape, moved = f"{size} {name}", int(size * bytes_each)
        yield Problem("adamw", "forward", shape, str(dtype)[6:], moved, candidates, tuned=table)
