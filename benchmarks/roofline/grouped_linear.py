"""The experts' matrix products, in few large groups and in many small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.grouped_linear import grouped_linear, input_gradient, pair_input_gradient, weight_gradient


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next. Groups differ in size."""
    ways = {"lattice": "triton", "eager": "grouped_mm"}
    for rows, groups, features, width in ((65536, 8, 4096, 14336), (262144, 128, 2048, 1536), (65536, 128, 2048, 768)):
        x = torch.randn(rows, features, device=device, dtype=torch.bfloat16)
        weight = (torch.randn(groups, width, features, device=device) * features**-0.5).bfloat16()
        grad = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        share = torch.rand(groups, device=device) + 0.5
        ends = (share.cumsum(0) / share.sum() * rows).round().to(torch.int32)
        ends[-1] = rows
        shape = f"{rows}x{features}x{width}, {groups} groups"
        flops = 2 * rows * features * width
        size = 2 * (x.numel() + weight.numel() + grad.numel())
        for direction, function, inputs in (
            ("forward", grouped_linear, (x, weight, ends)),
            ("input gradient", input_gradient, (grad, weight, ends)),
            ("weight gradient", weight_gradient, (grad, x, ends)),
        ):
            candidates = {name: partial(function, *inputs, implementation=way) for name, way in ways.items()}
            yield Problem("grouped_linear", direction, shape, "bf16", size, candidates, flops)
        del x, candidates, inputs
        yield _of_pair(weight, grad, ends, f"{shape}, two weights", 2 * flops)
        del weight, grad


def _of_pair(weight: Tensor, grad: Tensor, ends: Tensor, shape: str, flops: int) -> Problem:
    """The gradient of what gate and up of experts read: two products, which are added."""
    other = torch.randn_like(grad), torch.randn_like(weight) * weight.shape[2] ** -0.5

    def apart(way: str) -> Tensor:
        return input_gradient(grad, weight, ends, way) + input_gradient(*other, ends, way)

    candidates: dict[str, Callable[[], Tensor]] = {
        "lattice": partial(pair_input_gradient, grad, weight, *other, ends, "triton"),
        "apart": partial(apart, "triton"),
        "eager": partial(apart, "grouped_mm"),
    }
    size = 2 * (2 * (grad.numel() + weight.numel()) + grad.shape[0] * weight.shape[2])
    return Problem("grouped_linear", "input gradient", shape, "bf16", size, candidates, flops)
