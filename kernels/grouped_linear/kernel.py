"""Grouped matrix products in Triton, with sizes of groups that only the device knows.

Rows are cut into tiles of one group each. How many there are is not known to the host, but N / BLOCK_M + G suffice: the
grid has that many, a program finds its group among all ends at once, and those left over clear the rows of no group.
Tiles come by tensor
descriptors (TMA): one that reaches beyond its group reads rows of the next, which are not written; of the weights, seen
as [G M, K], rows of the next group, which are not written either, or are multiplied with the zeros that lie beyond the
edge of the rows' features.

N rows, G groups, K features in, M features out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Tile:
    """[m, n] outputs of a program, k terms at a time (half of them in fp32); tiles of `band` rows of tiles are computed
    together, for the L2 cache."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    band: int = 8


def _choose(itemsize: int, rows_per_group: int) -> Tile:
    large = itemsize == 2 and rows_per_group >= 256
    return Tile(128, 256, 64, 8, 3) if large else Tile(64, 128, 64, 4, 4)


TILES = Tuned(
    (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 8, 4)),
    _choose,
)

INVARIANT = Tile(64, 128, 64, 4, 4)
"""For any number of rows, so that a row's bits do not depend on it."""


@triton.jit
def _group_of_tile(ends_ptr, tile, num_groups, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows) of a tile of rows; tiles left over are of a group `num_groups`, after
    whose rows come those of no group."""
    g = tl.arange(0, GROUPS)
    exists = g < num_groups
    ends = tl.load(ends_ptr + g, mask=exists, other=0)
    starts = tl.load(ends_ptr + g - 1, mask=exists & (g > 0), other=0)
    tiles = tl.where(exists, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(tiles, axis=0)
    group = tl.sum((exists & (last <= tile)).to(tl.int32), axis=0)
    mine = g == group
    left_over = group == num_groups
    before = tl.where(left_over, tl.sum(tiles, axis=0), tl.sum(tl.where(mine, last - tiles, 0), axis=0))
    start = tl.where(left_over, tl.max(ends, axis=0), tl.sum(tl.where(mine, starts, 0), axis=0))
    return group, start + (tile - before) * BLOCK_M, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def _grouped_matmul(
    rows_desc,  # [N, terms]
    weight_desc,  # [G M, K]
    more_rows_desc,  # the same of a second product, with PAIR
    more_weight_desc,
    y_ptr,  # [N, width]
    ends_ptr,
    num_rows,
    num_groups,
    num_terms,  # that are summed over
    width,
    group_rows,  # M
    TRANSPOSED: tl.constexpr,
    PAIR: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TRANSPOSED: rows [., K] weight^T to [., M]. Otherwise: rows [., M] weight to [., K], and with PAIR the sum of two
    such products."""
    tiles_n = tl.cdiv(width, BLOCK_N)
    tiles_m = tl.cdiv(num_rows, BLOCK_M) + num_groups
    program = tl.program_id(0)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    tile = band * BAND + program % (BAND * tiles_n) % height
    column = program % (BAND * tiles_n) // height * BLOCK_N
    group, first, end = _group_of_tile(ends_ptr, tile, num_groups, GROUPS, BLOCK_M)
    row, n = first + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    offsets = row.to(tl.int64)[:, None] * width + n[None, :]
    if group < num_groups:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for term in tl.range(0, num_terms, BLOCK_K):
            a = rows_desc.load([first, term])
            if TRANSPOSED:
                b = weight_desc.load([group * group_rows + column, term]).T
            else:
                b = weight_desc.load([group * group_rows + term, column])
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if PAIR:
            for term in tl.range(0, num_terms, BLOCK_K):
                a = more_rows_desc.load([first, term])
                b = more_weight_desc.load([group * group_rows + term, column])
                total = tl.dot(a, b, total, input_precision=PRECISION)
        inside = (row < end)[:, None] & (n < width)[None, :]
        tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        # Of G + 1 parts of N rows there are N / BLOCK_M + G tiles at most: all rows of no group are cleared here.
        inside = (row < num_rows)[:, None] & (n < width)[None, :]
        tl.store(y_ptr + offsets, tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_matmul_weight_gradient(
    grad_desc,  # [N, M]
    x_desc,  # [N, K]
    grad_ptr,
    x_ptr,
    d_weight_ptr,  # [G, M, K]
    ends_ptr,
    group_rows,  # M
    width,  # K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad^T x over the rows of a group: whole blocks of them by descriptor, the rest with a mask."""
    group = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(group_rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * tiles_n)
    m0, n0 = (band * BAND + within % height) * BLOCK_M, within // height * BLOCK_N
    end = tl.load(ends_ptr + group)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(start, whole, BLOCK_K):
        a = grad_desc.load([row, m0])
        b = x_desc.load([row, n0])
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    if whole < end:
        rows = whole + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None]
        rows = rows.to(tl.int64)[:, None]
        a = tl.load(grad_ptr + rows * group_rows + m[None, :], mask=inside & (m < group_rows)[None, :], other=0.0)
        b = tl.load(x_ptr + rows * width + n[None, :], mask=inside & (n < width)[None, :], other=0.0)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    offsets = (group.to(tl.int64) * group_rows + m)[:, None] * width + n[None, :]
    inside = (m < group_rows)[:, None] & (n < width)[None, :]
    tl.store(d_weight_ptr + offsets, total.to(d_weight_ptr.dtype.element_ty), mask=inside)


def _tile_for(x: Tensor, num_groups: int, tile: Tile | None = None) -> Tile:
    tile = TILES(x.element_size(), x.shape[0] // num_groups) if tile is None else tile
    return replace(tile, k=tile.k * 2 // x.element_size())


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, list(block))


def rows_times_weights(
    rows: Tensor,
    weight: Tensor,
    ends: Tensor,
    *,
    transposed: bool,
    more: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """rows [N, K] to [N, M], transposed, or [N, M] to [N, K], by their group's weight [M, K]; 0 where there is none.

    Contiguous, their features in multiples of 16 bytes; at least one row and one group. more: rows and weights of the
    same shapes, not transposed, whose product is added. tile: one that is wanted.
    """
    assert more is None or not transposed
    num_groups, group_rows, features = weight.shape
    width = group_rows if transposed else features
    tile = _tile_for(rows, num_groups, tile)
    y = rows.new_empty(rows.shape[0], width)
    tiles_m = triton.cdiv(rows.shape[0], tile.m) + num_groups
    block = (tile.n, tile.k) if transposed else (tile.k, tile.n)
    descriptors = [
        _descriptor(matrix, shape)
        for some_rows, some_weight in ((rows, weight), more or (rows, weight))
        for matrix, shape in ((some_rows, (tile.m, tile.k)), (some_weight.view(-1, features), block))
    ]
    _grouped_matmul[(tiles_m * triton.cdiv(width, tile.n),)](
        *descriptors,
        y,
        ends,
        rows.shape[0],
        num_groups,
        rows.shape[1],
        width,
        group_rows,
        TRANSPOSED=transposed,
        PAIR=more is not None,
        GROUPS=triton.next_power_of_2(num_groups),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BAND=tile.band,
        PRECISION="ieee",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """d_weight [G, M, K] of grad [N, M] and x [N, K]; contiguous, features in multiples of 16 bytes, N and G not 0."""
    num_groups, group_rows, width = ends.shape[0], grad.shape[1], x.shape[1]
    tile = _tile_for(x, num_groups)
    d_weight = grad.new_empty(num_groups, group_rows, width)
    _grouped_matmul_weight_gradient[(triton.cdiv(group_rows, tile.m) * triton.cdiv(width, tile.n), num_groups)](
        _descriptor(grad, (tile.k, tile.m)),
        _descriptor(x, (tile.k, tile.n)),
        grad,
        x,
        d_weight,
        ends,
        group_rows,
        width,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BAND=tile.band,
        PRECISION="ieee",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return d_weight
