"""SwiGLU on the shapes of Llama-3-8B's MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.roofline.problem import Problem, both_directions
from kernels.swiglu import swiglu
from kernels.swiglu.reference import swiglu_reference


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((8192, 14336), (8192, 16384), (32768, 8192)):
        gate, up = (torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        compiled = torch.compile(swiglu_reference, dynamic=False)
        functions = {"lattice": swiglu, "eager": swiglu_reference, "compile": compiled}
        size = gate.numel() * gate.element_size()
        yield from both_directions("swiglu", f"{rows}x{width}", functions, (gate, up), bytes=(3 * size, 5 * size))
