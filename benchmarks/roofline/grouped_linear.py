"""The experts' matrix products, in few large groups and in many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.roofline.problem import Problem
from kernels.grouped_linear import grouped_linear, input_gradient, weight_gradient


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
        del x, weight, grad, candidates, inputs
