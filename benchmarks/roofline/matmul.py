"""The teaching matrix product against cuBLAS, and the linear layer with GELU and residual against what is unfused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.roofline.problem import Problem, both_directions
from kernels.matmul import linear_gelu, matmul
from kernels.matmul.reference import linear_gelu_reference

TUNED = "kernels.matmul.kernel:TILES"
SQUARES = ((4096, 4096, 4096), (8192, 8192, 8192))
LAYERS = ((8192, 16384, 4096), (8192, 4096, 16384))


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for M, N, K in SQUARES:
        a, b = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((M, K), (K, N)))
        candidates = {"lattice": partial(matmul, a, b), "eager": partial(torch.mm, a, b)}
        size = 2 * (M * K + K * N + M * N)
        yield Problem("matmul", "forward", f"{M}x{N}x{K}", "bf16", size, candidates, 2 * M * N * K, tuned=TUNED)
    for M, N, K in LAYERS:
        shapes = ((M, K), (N, K), (N,), (M, N))
        inputs = [torch.randn(*s, device=device, dtype=torch.bfloat16).mul_(0.1).requires_grad_() for s in shapes]
        compiled = torch.compile(linear_gelu_reference, dynamic=False)
        functions = {"lattice": linear_gelu, "eager": linear_gelu_reference, "compile": compiled}
        # Forward writes y and what GELU was applied to; backward reads that, d_y, x and the weight, writes gradients.
        moved = (2 * (M * K + N * K + 3 * M * N), 2 * (2 * M * K + 2 * N * K + 2 * M * N))
        flops = (2 * M * N * K, 4 * M * N * K)
        yield from both_directions(
            "linear_gelu", f"{M}x{N}x{K}", functions, inputs, bytes=moved, flops=flops, tuned=(TUNED, None)
        )
