"""The addition of a low-rank product, as adapters of rank 16 make it on the layers of Llama-3-8B, of 8192 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.roofline.problem import Problem, forward_only
from kernels.low_rank import add_low_rank_

ROWS, RANK = 8192, 16


def _by_torch(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return y.addmm_(u, v, alpha=0.5)[:1].clone()


def _ours(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return add_low_rank_(y, u, v, scale=0.5)[:1].clone()


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next.

    Both add to y over and over, so what is compared is a copy of a row, which both pay for.
    """
    for columns, adapters in ((4096, 1), (6144, 3), (28672, 2)):  # o and down; q, k and v; gate and up
        rank = RANK * adapters
        sizes = ((ROWS, columns), (ROWS, rank), (rank, columns))
        y, u, v = (torch.randn(*size, device=device, dtype=torch.bfloat16) * 0.01 for size in sizes)
        moved = 2 * (2 * y.numel() + u.numel() + v.numel())
        shape, functions = f"{ROWS}x{columns}, rank {rank}", {"lattice": _ours, "eager": _by_torch}
        tuned = "kernels.low_rank.kernel:TILES"
        yield forward_only("low_rank", shape, functions, (y, u, v), bytes=moved, tuned=tuned)
