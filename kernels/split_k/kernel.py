"""Sums of the parts of a split contraction, in a fixed order, with the epilogue of a linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # that an H200 runs at a time, four on each of its 132 multiprocessors


def splits_for(tiles: int, steps: int, *, least: int = 4) -> int:
    """Parts of a contraction of `steps` blocks for `tiles` tiles of the result: a power of two that fills the GPU and
    leaves each part at least `least` steps. 1 where the tiles fill it alone."""
    most = max(min(PROGRAMS // max(tiles, 1), steps // least), 1)
    return 1 << (most.bit_length() - 1)


@triton.jit
def _split_k_add_parts(
    parts_ptr, scale_ptr, bias_ptr, y_ptr, M, N, splits,
    SIZE: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = n < N
    sums = tl.zeros((SIZE,), dtype=tl.float32)
    for split in range(splits):
        sums += tl.load(parts_ptr + (split * M + m) * N + n, mask=inside, other=0.0)
    if SCALE:
        sums *= tl.load(scale_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, sums, mask=inside)


def add_parts(parts: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = sum of fp32 parts [S, M, N] over S, times scale [N], plus bias [N]; rounded once."""
    splits, M, N = parts.shape
    size = 1024
    _split_k_add_parts[(triton.cdiv(N, size), M)](
        parts, y if scale is None else scale, y if bias is None else bias, y, M, N, splits,
        SIZE=size, SCALE=scale is not None, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip


def parts_for(splits: int, M: int, N: int, device: torch.device) -> Tensor:
    """Memory of the parts."""
    return torch.empty(splits, M, N, dtype=torch.float32, device=device)
