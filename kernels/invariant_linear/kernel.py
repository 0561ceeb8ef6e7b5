"""x W^T + b by tiles of one shape, whatever the number of rows.

A library picks its tiles, and whether to split the sum over K, by the number of rows; so a token's last bits depend on
how many tokens are multiplied with it. Here an element of y is a sum over K in ascending steps, by the same
instructions for one row or thousands, at any place in a tile: rows that a tile has too many are zeros, which nobody
reads. Nothing of the launch but the grid depends on the number of rows M.

y [M, N], x [M, K], W [N, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.matmul.kernel import Tile, swizzled


def _choose(itemsize: int) -> Tile:
    """By nothing that belongs to a batch. 64 rows are what a warp group multiplies at once; 64 columns, so that a
    single token's product with 4096 features out still occupies 64 multiprocessors."""
    return Tile(64, 64, 64, 4, 5) if itemsize == 2 else Tile(64, 64, 16, 4, 3)


TILES = Tuned((Tile(64, 64, 64, 4, 5), Tile(64, 64, 16, 4, 3), Tile(128, 128, 64, 8, 4)), _choose)


@triton.jit(do_not_specialize=["M"])
def _invariant_matmul(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Features of a row of x lie side by side; weight and y are contiguous."""
    tile_row, tile_column = swizzled(M, N, ROWS, COLUMNS, GROUP)
    m = tile_row * ROWS + tl.arange(0, ROWS)
    n = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_row + k[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(start + k < K)[:, None] & (n < N)[None, :], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_ptrs += STEP
        weight_ptrs += STEP
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + place, sums, mask=(m < M)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] of x [M, K] with features side by side, contiguous weight [N, K] and bias [N]; none of them empty."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tile = TILES(x.element_size())
    _invariant_matmul[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        x, weight, y if bias is None else bias, y, M, N, K, x.stride(0),
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, GROUP=tile.group, BIAS=bias is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
