"""A matrix product in Triton, to read first. torch's (cuBLAS) is faster; what one's own kernel buys is an epilogue.

y [M, N] = a [M, K] b [K, N]. Each program computes one tile ROWS x COLUMNS of y and walks along K:

               K                      N
         +-----------+          +---+-------+
         |           |        K |   | b     |
       M +===========+          |   | tile  |
         | a tile -> |          |   |  |    |
         +===========+          |   |  v    |
         +-----------+          +---+-------+

What makes it fast, in the order of what it brings:

1. Reuse. A step loads (ROWS + COLUMNS) * STEP numbers and does 2 * ROWS * COLUMNS * STEP operations with them. At
   128 x 256 in bf16 that is 85 operations per byte: the L2 cache of an H200 delivers about 7 TB/s, enough for 600
   TFLOP/s; at 64 x 64 it would be 32 and 220.
2. Tensor cores. tl.dot becomes wgmma: 4 warps multiply 64 rows at once, operands in shared memory, sums in fp32 in
   registers. 128 x 256 sums over 8 warps are 128 registers of each thread, half of what it may have.
3. Asynchronous copies. With num_stages tiles in flight (tl.load becomes cp.async), the next tiles arrive while these
   are multiplied. A stage of 128 x 64 and 64 x 256 in bf16 is 48 KiB; an SM has 227.
4. The L2 swizzle. Programs run about in the order of their numbers, 132 at a time on an H200. Numbered row by row, 132
   tiles of y need all of b. Numbered in groups of GROUP tile rows, column by column within a group, they cover a block
   of 8 x 16 tiles and need 8 rows of tiles of a and 16 columns of b, which the L2 cache then serves many times:

         0  2  4  6         GROUP = 2: tiles in the order of
         1  3  5  7         their programs' numbers
         8 10 12 14
         9 11 13 15

5. Edges. Masks make any shape right; where K and N are multiples of 16 bytes, loads are of 16 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Tile:
    """Of y, the step along K, warps, steps in flight, and tile rows of a group."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int
    group: int = 8


def _choose(M: int, N: int, K: int, bytes_: int) -> Tile:
    if bytes_ > 2:  # fp32 in full precision is not for the tensor core: registers are the limit
        return Tile(64, 64, 16, 4, 3)
    if M * N >= 132 * 128 * 256:  # a tile for every multiprocessor
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 128, 64, 8, 4) if M > 64 else Tile(64, 64, 64, 4, 5)


TILES = Tuned(
    (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 5),
        Tile(64, 64, 16, 4, 3),
    ),
    _choose,
)


@triton.jit
def swizzled(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(tile row, tile column) of this program: point 4 above."""
    program = tl.program_id(0)
    tile_rows, tile_columns = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    group = program // (GROUP * tile_columns)
    first = group * GROUP
    height = min(tile_rows - first, GROUP)  # the last group may be lower
    within = program % (GROUP * tile_columns)
    return first + within % height, within // height


@triton.jit
def gelu(x):
    """x Phi(x) with the normal distribution's Phi (1606.08415), exactly."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tiled_matmul(
    a_ptr, b_ptr, y_ptr, M, N, K, a_row, a_k, b_k, b_column,
    bias_ptr, residual_ptr, h_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """a_row, a_k, b_k, b_column: strides, so that a transposed matrix needs no copy. y, residual, h contiguous."""
    tile_row, tile_column = swizzled(M, N, ROWS, COLUMNS, GROUP)
    m = tile_row * ROWS + tl.arange(0, ROWS)
    n = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    # 64-bit: matrices may have more than 2^31 elements.
    a_ptrs = a_ptr + m.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_k
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * b_k + n.to(tl.int64)[None, :] * b_column
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, STEP):
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(start + k < K)[:, None] & (n < N)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        a_ptrs += STEP * a_k
        b_ptrs += STEP * b_k
    # The epilogue: what would each read and write y once more as a kernel of its own is done on registers.
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(h_ptr + place, sums, mask=inside)
    if GELU:
        sums = gelu(sums)
    if RESIDUAL:
        sums += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, sums, mask=inside)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """y [M, N] of a [M, K] and b [K, N] of any strides; none of them empty."""
    y = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    _launch(a, b, y)
    return y


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """y [M, N] = gelu(h) + residual of h = x [M, K] weight [N, K]^T + bias, and h if `save`, else an empty tensor."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if save else y.new_empty(0)
    _launch(x, weight.t(), y, bias=bias, residual=residual, h=h if save else None, activation=True)
    return y, h


def _launch(
    a: Tensor,
    b: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    h: Tensor | None = None,
    activation: bool = False,
) -> None:
    """Tensors that are None are not read or written."""
    (M, K), N = a.shape, b.shape[1]
    tile = TILES(M, N, K, a.element_size())
    _tiled_matmul[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        a, b, y, M, N, K, *a.stride(), *b.stride(),
        y if bias is None else bias, y if residual is None else residual, y if h is None else h,
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, GROUP=tile.group,
        BIAS=bias is not None, GELU=activation, RESIDUAL=residual is not None, SAVE=h is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
