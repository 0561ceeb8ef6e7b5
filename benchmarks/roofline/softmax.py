"""Softmax of scores and of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions
from kernels.softmax import softmax

TABLES = ("kernels.softmax.kernel:FORWARD", "kernels.softmax.kernel:BACKWARD")


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((32768, 32768), (65536, 4096), (32768, 16384), (8192, 131072), (1 << 20, 128)):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        functions = {
            "lattice": softmax,
            "eager": partial(torch.softmax, dim=-1),
            "compile": torch.compile(partial(torch.softmax, dim=-1), dynamic=False),
            **liger("softmax:LigerSoftmaxFunction"),
        }
        size = x.numel() * x.element_size()
        yield from both_directions(
            "softmax", f"{rows}x{width}", functions, (x,), bytes=(2 * size, 3 * size), tuned=TABLES
        )
