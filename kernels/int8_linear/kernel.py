"""Linear layer with a weight of 8-bit integers, in Triton. Integers up to 127 are exact in bf16, so the tensor core
multiplies them as they are; the scale of an output feature multiplies the sum.

The tile of the result is transposed, y^T = W x^T: output features are the tensor core's long side, of at least 64, and
the few rows of a decode step its short one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.split_k.kernel import add_parts, parts_for, splits_for


@dataclass(frozen=True)
class Tile:
    """Rows of x, output features and the step along K of one program; parts of K; warps; steps in flight."""

    rows: int
    features: int
    step: int
    splits: int
    num_warps: int
    num_stages: int
    group: int = 8  # tiles of features that are walked together, so that they share rows of x in the L2 cache


def _choose(M: int, N: int, K: int, bytes_: int) -> Tile:
    if M > 64 and bytes_ > 2:  # of x's dtype; fp32 is not for the tensor core
        return Tile(64, 64, 64, 1, 4, 2)
    if M > 64:
        return Tile(128, 128, 64, 1, 8, 4)
    rows = 16 if M <= 16 else 32 if M <= 32 else 64
    splits = splits_for(triton.cdiv(N, 64), triton.cdiv(K, 128))
    return Tile(rows, 64, 128, splits, 4, 5) if bytes_ <= 2 else Tile(rows, 64, 64, splits, 4, 2)


TILES = Tuned(
    (
        Tile(16, 64, 128, 1, 4, 5),
        Tile(16, 64, 128, 4, 4, 4),
        Tile(16, 128, 128, 2, 4, 4),
        Tile(64, 64, 64, 1, 4, 5),
        Tile(64, 64, 64, 1, 4, 2),
        Tile(128, 128, 64, 1, 8, 4),
    ),
    _choose,
)


@triton.jit
def tile_of(M, N, ROWS: tl.constexpr, FEATURES: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows, tile of features) of a program: GROUP tiles of features, row tile by row tile."""
    program = tl.program_id(0)
    row_tiles, feature_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, FEATURES)
    first = program // (GROUP * row_tiles) * GROUP
    width = min(feature_tiles - first, GROUP)
    return program % (GROUP * row_tiles) // width, first + program % (GROUP * row_tiles) % width


@triton.jit
def store_result(
    sums, y_ptr, parts_ptr, scale_ptr, bias_ptr, m, n, M, N, split,
    SPLITS: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """sums [features, rows] as y [M, N], or as one part of it."""
    inside = (n < N)[:, None] & (m < M)[None, :]
    if SPLITS == 1:
        if SCALE:
            sums *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if BIAS:
            sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], sums, mask=inside)
    else:
        tl.store(parts_ptr + (split.to(tl.int64) * M + m)[None, :] * N + n[:, None], sums, mask=inside)


@triton.jit
def _int8_matmul(
    x_ptr, data_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, M, N, K, steps,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """`steps` steps along K from that of the program's part on."""
    row_tile, feature_tile = tile_of(M, N, ROWS, FEATURES, GROUP)
    split = tl.program_id(1)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = feature_tile * FEATURES + tl.arange(0, FEATURES)
    k = split * steps * STEP + tl.arange(0, STEP)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K + k[:, None]
    data_ptrs = data_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    sums = tl.zeros((FEATURES, ROWS), dtype=tl.float32)
    for _ in range(steps):
        data = tl.load(data_ptrs, mask=(n < N)[:, None] & (k < K)[None, :], other=0, eviction_policy="evict_first")
        x = tl.load(x_ptrs, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        sums = tl.dot(data.to(x.dtype), x, sums, input_precision="ieee")
        k += STEP
        x_ptrs += STEP
        data_ptrs += STEP
    store_result(sums, y_ptr, parts_ptr, scale_ptr, bias_ptr, m, n, M, N, split, SPLITS, True, BIAS)


def int8_linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] of contiguous x [M, K] and data [N, K]; none of them empty."""
    (M, K), N = x.shape, data.shape[0]
    tile = TILES(M, N, K, x.element_size())
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = parts_for(tile.splits, M, N, x.device) if tile.splits > 1 else None
    steps = triton.cdiv(triton.cdiv(K, tile.step), tile.splits)
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.features), tile.splits)
    _int8_matmul[grid](
        x, data, scale, y if bias is None else bias, y, y if parts is None else parts, M, N, K, steps,
        ROWS=tile.rows, FEATURES=tile.features, STEP=tile.step, SPLITS=tile.splits, GROUP=tile.group,
        BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts is not None:
        add_parts(parts, scale, bias, y)
    return y
