"""SwiGLU on the shapes of Llama-3-8B's MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.roofline.problem import Problem
from kernels.swiglu import swiglu
from kernels.swiglu.reference import swiglu_reference


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((8192, 14336), (8192, 16384), (32768, 8192)):
        gate, up = (torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        d_y = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        compiled = torch.compile(swiglu_reference, dynamic=False)
        functions = {"lattice": swiglu, "eager": swiglu_reference, "compile": compiled}
        outputs = {name: function(gate, up) for name, function in functions.items()}
        size = gate.numel() * 2
        yield Problem(
            op="swiglu",
            direction="forward",
            shape=f"{rows}x{width}",
            dtype="bf16",
            bytes=3 * size,
            flops=0,
            candidates={name: lambda function=f: function(gate.detach(), up.detach()) for name, f in functions.items()},
        )
        yield Problem(
            op="swiglu",
            direction="backward",
            shape=f"{rows}x{width}",
            dtype="bf16",
            bytes=5 * size,
            flops=0,
            candidates={
                name: lambda y=y: torch.autograd.grad(y, (gate, up), d_y, retain_graph=True)
                for name, y in outputs.items()
            },
        )
