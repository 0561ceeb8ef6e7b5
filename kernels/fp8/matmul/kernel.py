"""Product of matrices quantized in blocks (2412.19437, 3.3.2), in Triton.

y[m, n] = sum over blocks k of 128 of a_scale[m, k] b_scale[n, k] sum in the block of a b. The tensor core adds fp8
products with about 14 bits; each block's sum is scaled and added in fp32, so that this error does not grow with K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Tuned
from kernels.fp8.formats import BLOCK


@dataclass(frozen=True)
class Tile:
    """Rows and columns of y of one program, its warps, and how many blocks of K are in flight."""

    rows: int
    columns: int  # divides 128: all columns of a tile share the scale of a 128x128 block
    num_warps: int
    num_stages: int
    group: int = 8  # rows of tiles that are walked together, so that they share columns in the L2 cache


def _choose(M: int, N: int, K: int, square: bool) -> Tile:
    """Of an H200, measured with 8192 rows and more. square: the scales of b are of 128x128."""
    if M <= 64:
        return Tile(64, 64, 4, 5)
    if not square:
        return Tile(128, 64, 4, 4)
    return Tile(128, 128, 8, 4) if M * N >= 1 << 21 and K <= N else Tile(64, 128, 4, 4)


# Two programs fit on a multiprocessor: one adds while the other multiplies.
TILES = Tuned(
    (Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(64, 128, 4, 4), Tile(128, 64, 4, 4), Tile(64, 64, 4, 5)), _choose
)


@triton.jit
def _fp8_block_matmul(
    a_desc, b_desc, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SQUARE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    row_tile = first + program % (GROUP * across) % height
    column_tile = program % (GROUP * across) // height
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    blocks = tl.cdiv(K, BLOCK)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(blocks):
        a = a_desc.load([row_tile * ROWS, k * BLOCK])  # zeros beyond the edges
        b = b_desc.load([column_tile * COLUMNS, k * BLOCK])
        a_scale = tl.load(a_scale_ptr + k * M + m, mask=m < M, other=0.0)
        if SQUARE:
            b_scale = tl.load(b_scale_ptr + column_tile * COLUMNS // BLOCK * blocks + k)
            sums += tl.dot(a, b.T) * (a_scale * b_scale)[:, None]
        else:
            b_scale = tl.load(b_scale_ptr + k * N + n, mask=n < N, other=0.0)
            sums += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], sums, mask=inside)


def matmul_blocks(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y [M, N] of contiguous a [M, K] and b [N, K], K a multiple of 16; a_scale [M, K/128] and b_scale [N, K/128] with
    stride 1 along M and N, or b_scale [N/128, K/128] contiguous."""
    (M, K), N = a.shape, b.shape[0]
    y = torch.empty(M, N, dtype=out_dtype, device=a.device)
    square = b_scale.shape[0] != N
    tile = TILES(M, N, K, square)
    _fp8_block_matmul[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        TensorDescriptor.from_tensor(a, [tile.rows, BLOCK]),
        TensorDescriptor.from_tensor(b, [tile.columns, BLOCK]),
        y, a_scale, b_scale, y if bias is None else bias, M, N, K,
        ROWS=tile.rows, COLUMNS=tile.columns, GROUP=tile.group, BLOCK=BLOCK, SQUARE=square,
        BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
