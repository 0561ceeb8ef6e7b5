"""The addition of a low-rank product in Triton: one product of tensor cores for each tile of y, which is read and
written once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Tile:
    """Rows and columns of y of one program, and its warps."""

    rows: int
    columns: int
    num_warps: int


TILES = Tuned(
    (Tile(64, 128, 4), Tile(32, 256, 4), Tile(64, 256, 8), Tile(128, 128, 8), Tile(16, 64, 4)),
    lambda rows, columns: Tile(64, 128, 4),
)


@triton.jit
def _low_rank_matmul_add(
    y_ptr, u_ptr, v_ptr, scale, num_rows, num_columns, rank, u_row, u_rank, v_rank, v_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows: y is walked through in the order of memory.
    across = tl.cdiv(num_columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, RANK)
    in_rows, in_columns, in_rank = row < num_rows, column < num_columns, inner < rank
    inside = in_rows[:, None] & in_columns[None, :]
    at = y_ptr + row[:, None] * num_columns + column[None, :]
    y = tl.load(at, mask=inside, other=0.0)
    u_at = u_ptr + row[:, None] * u_row + inner[None, :] * u_rank
    v_at = v_ptr + inner[:, None] * v_rank + column[None, :] * v_column
    u = tl.load(u_at, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
    v = tl.load(v_at, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
    product = tl.dot(u, v, input_precision="ieee")
    tl.store(at, y.to(tl.float32) + product * scale, mask=inside)


def add_product(y: Tensor, u: Tensor, v: Tensor, scale: float) -> None:
    """y [N, O] contiguous, u [N, R] and v [R, O] of any strides; R from 1 to MAX_RANK, nothing empty."""
    (num_rows, num_columns), rank = y.shape, u.shape[1]
    tile = TILES(num_rows, num_columns)
    _low_rank_matmul_add[(triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns),)](
        y, u, v, scale, num_rows, num_columns, rank, *u.stride(), *v.stride(),
        ROWS=tile.rows, COLUMNS=tile.columns, RANK=max(16, triton.next_power_of_2(rank)), num_warps=tile.num_warps,
    )  # fmt: skip
