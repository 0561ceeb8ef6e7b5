"""The transposed copy of an RMSNorm in fp8, with a scale for each column, in Triton: the second pass of a norm that has
found 1 / rms of the rows and the largest magnitudes of the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.fp8.formats import E4M3, LARGEST, padded
from kernels.fp8.quantize.kernel import Tile, _scale_of, _store_transposed, _tile_of, to_fp8
from kernels.rms_norm.kernel import rows_of

TILE = Tuned((Tile(128, 64, 4), Tile(64, 128, 4), Tile(128, 128, 8)), lambda rows, columns: Tile(128, 64, 4))


@triton.jit
def _norm_fp8_transpose(
    x_ptr, weight_ptr, rstd_ptr, amax_ptr, t_ptr, scale_ptr, R, C, R_padded, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of(C, COLUMNS)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    y = x * tl.load(rstd_ptr + r, mask=r < R, other=0.0)[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y = tl.where((r < R)[:, None], y.to(x_ptr.dtype.element_ty).to(tl.float32), 0.0)  # padding: no minus zeros
    amax = tl.load(amax_ptr + c, mask=c < C, other=0.0)
    scale, inverse = _scale_of(amax, LARGEST, False, EMULATE)
    tl.store(scale_ptr + c, scale, mask=(c < C) & (row_tile == 0))
    t = to_fp8(y * inverse[None, :], t_ptr.dtype.element_ty, LARGEST, EMULATE)
    _store_transposed(t_ptr, t, r, c, R_padded, C)


def norm_columns(stream: Tensor, weight: Tensor | None, rstd: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """(transposed [D, rows padded to 16], scale [D, 1]) for stream [..., D], not empty."""
    x = rows_of(stream)
    R, C = x.shape
    transposed = torch.empty(C, padded(R), dtype=E4M3, device=x.device)
    scale = torch.empty(C, 1, device=x.device)
    tile = TILE(R, C)
    _norm_fp8_transpose[(triton.cdiv(padded(R), tile.rows) * triton.cdiv(C, tile.columns),)](
        x, None if weight is None else weight.contiguous(), rstd.contiguous(), amax, transposed, scale,
        R, C, padded(R), x.stride(0),
        ROWS=tile.rows, COLUMNS=tile.columns, LARGEST=LARGEST[E4M3], EMULATE=not x.is_cuda, num_warps=tile.num_warps,
    )  # fmt: skip
    return transposed, scale
