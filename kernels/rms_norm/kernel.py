"""RMSNorm and LayerNorm in Triton: a row stays in registers between its sum and its result.

Sums and products are fp32. The gradient of the weight is summed in two stages: every program over the rows it takes,
which only the shape and the number of multiprocessors determine, then over programs in their order. No atomics, so
that every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned, num_multiprocessors
from kernels.fp8.quantize.kernel import _inverse, _largest, _magnitude_bits, _scale_of, to_fp8

PLAIN = tl.constexpr(0)  # y in the dtype of x
TENSORWISE = tl.constexpr(1)  # y, rounded to the dtype of x, times 1 / scale in fp8, and max |y|
ROWWISE = tl.constexpr(2)  # the same with a scale of each row, max |row| / 448
FP8_MAX = tl.constexpr(448.0)
SHARED_BYTES = 200 * 1024  # for tiles in flight, of 227 KiB on Hopper


@dataclass(frozen=True)
class Tiles:
    """How rows are dealt out."""

    elements: int  # of a tile, which is as many rows as that allows, at least one
    per_thread: int  # elements of a tile
    programs: int  # on each multiprocessor, looping over tiles; 0: a program for every tile
    stages: int = 1  # tiles in flight: above 1 the next is fetched while one is computed
    again: bool = False  # after a row's sum it is read again, from the L1 cache, and not kept in registers

    def block(self, width: int) -> int:
        return triton.next_power_of_2(width)

    def rows(self, width: int) -> int:
        return max(1, self.elements // self.block(width))

    def num_warps(self, width: int) -> int:
        return min(32, max(1, self.rows(width) * self.block(width) // (32 * self.per_thread)))

    def num_programs(self, num_rows: int, width: int, device: torch.device) -> int:
        tiles = triton.cdiv(num_rows, self.rows(width))
        return min(tiles, self.programs * num_multiprocessors(device)) if self.programs else tiles

    def fetched(self, width: int, *tensors: Tensor | None) -> int:
        """Stages: fewer where the tiles of these tensors that are in flight would not fit in shared memory."""
        size = self.rows(width) * self.block(width) * sum(x.element_size() for x in tensors if x is not None)
        return max(1, min(self.stages, 1 + SHARED_BYTES // size))


FORWARD = Tuned(
    (
        Tiles(4096, 16, 0),
        Tiles(4096, 32, 0),
        Tiles(8192, 32, 0),
        Tiles(2048, 16, 0),
        Tiles(4096, 16, 1, 2),
        Tiles(4096, 16, 4, 2),
        Tiles(4096, 16, 5),
        Tiles(8192, 32, 2, 3),
        Tiles(4096, 16, 0, again=True),
        Tiles(4096, 32, 0, again=True),
        Tiles(2048, 8, 0, again=True),
    ),
    lambda width, center, added, fp8: _forward_tiles(width, center, added, fp8),
)
# Programs that loop: each ends with an atomic maximum for every column.
COLUMNS = Tuned(
    (Tiles(4096, 16, 4), Tiles(4096, 32, 4), Tiles(4096, 16, 4, again=True), Tiles(2048, 8, 2)),
    lambda width: Tiles(4096, 16, 4),
)
BACKWARD = Tuned(
    (
        Tiles(4096, 16, 3, 2),
        Tiles(4096, 16, 2, 2),
        Tiles(2048, 16, 4, 2),
        Tiles(4096, 16, 1, 2),
        Tiles(4096, 16, 3),
        Tiles(4096, 16, 2, 3),
        Tiles(2048, 16, 4),
        Tiles(4096, 8, 2, 2),
        Tiles(4096, 16, 1, again=True),
        Tiles(4096, 16, 2, again=True),
        Tiles(4096, 32, 1, again=True),
    ),
    lambda width, center, added: _backward_tiles(width, center, added),
)


def _forward_tiles(width: int, center: bool, added: bool, fp8: bool) -> Tiles:
    """Of an H200. Not by the number of rows: a row's bits would depend on the others."""
    if center:
        return Tiles(4096, 32, 0, again=True) if width <= 8192 else Tiles(8192, 32, 2, 3)
    if fp8:
        if width <= 2048:
            return Tiles(4096, 32, 0)
        return Tiles(4096, 32, 0, again=True) if width <= 8192 else Tiles(8192, 32, 2, 3)
    if added:
        return Tiles(2048, 8, 0, again=True) if width <= 8192 else Tiles(4096, 16, 0, again=True)
    return Tiles(4096, 16, 0, again=True) if width <= 8192 else Tiles(4096, 32, 0, again=True)


def _backward_tiles(width: int, center: bool, added: bool) -> Tiles:
    """Of an H200. x, dy, the weight and its gradient, and that of a bias, are in registers together: of a LayerNorm
    too many for rows wider than 8192."""
    if width > 8192 and center:
        return Tiles(4096, 32, 1, again=True)
    if width > 8192:
        return Tiles(4096, 16, 3) if added else Tiles(4096, 16, 1, again=True)
    return Tiles(4096, 16, 2, 3)


@triton.jit
def _vector(pointer, cols, D: tl.constexpr, POLICY: tl.constexpr):
    """fp32 of weight or bias. POLICY differs between two reads of the same, which the compiler would make one."""
    return tl.load(pointer + cols, mask=cols < D, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _rows(pointer, rows, cols, inside, stride, POLICY: tl.constexpr):
    """fp32 of a tile; POLICY as above."""
    return tl.load(pointer + rows * stride + cols, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _sum_of_two(x_ptr, y_ptr, rows, cols, inside, x_stride, y_stride, POLICY: tl.constexpr):
    """x, or x + y as it is stored: what the backward will see."""
    x = _rows(x_ptr, rows, cols, inside, x_stride, POLICY)
    if y_ptr is not None:
        x = (x + _rows(y_ptr, rows, cols, inside, y_stride, POLICY)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _statistics(x, rows, inside, num_rows, mean_ptr, rstd_ptr, eps, D: tl.constexpr, CENTER: tl.constexpr):
    """mean (0 unless CENTER) and 1 / rms of each row of x, which are stored, and x - mean."""
    mean = tl.zeros([x.shape[0], 1], tl.float32)
    if CENTER:
        # Rounded as IEEE says: a row of equal numbers has exactly that mean, or 1 / sqrt(eps) blows the rest up.
        mean = tl.div_rn(tl.sum(x, axis=1, keep_dims=True), tl.full([x.shape[0], 1], D, tl.float32))
        x = tl.where(inside, x - mean, 0.0)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    return mean, rstd, x


@triton.jit
def _quantized(y, inverse, scale_ptr, rows, num_rows, BY_ROW: tl.constexpr, OUT: tl.constexpr, EMULATE: tl.constexpr):
    """y * inverse in fp8, or each row by its own scale, which is stored; bits of |y|, and the largest of each row."""
    bits = _magnitude_bits(y)
    amax = tl.max(bits, axis=1, keep_dims=True)
    if BY_ROW:
        row_scale, inverse = _scale_of(amax.to(tl.float32, bitcast=True), FP8_MAX, False, EMULATE)
        tl.store(scale_ptr + rows, row_scale, mask=rows < num_rows)
    return to_fp8(y * inverse, OUT, FP8_MAX, EMULATE), bits, amax


@triton.jit
def _norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    y_ptr,
    stream_ptr,
    mean_ptr,
    rstd_ptr,
    extra_ptr,
    used_ptr,
    column_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTER: tl.constexpr,
    OUTPUT: tl.constexpr,
    STAGES: tl.constexpr,
    AGAIN: tl.constexpr,
    EMULATE: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    if not AGAIN and weight_ptr is not None:
        weight = _vector(weight_ptr, cols, D, "")
    if not AGAIN and bias_ptr is not None:
        bias = _vector(bias_ptr, cols, D, "")
    KEEP: tl.constexpr = "evict_last" if AGAIN else ""
    inverse = 1.0
    largest = tl.zeros([ROWS, 1], tl.int32)
    if OUTPUT == TENSORWISE:
        scale = tl.load(scale_ptr)
        inverse = _inverse(scale, EMULATE)
        if tl.program_id(0) == 0:
            tl.store(used_ptr, scale)  # in memory of its own, aligned as cuBLASLt wants it
    if column_ptr is not None:
        largest_of_columns = tl.zeros([ROWS, BLOCK], tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        # 64-bit: the activations of a step pass 2^31 elements.
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (cols < D) if ROWS == 1 else (rows < num_rows) & (cols < D)
        x = _sum_of_two(x_ptr, residual_ptr, rows, cols, inside, x_stride, residual_stride, KEEP)
        if residual_ptr is not None:
            tl.store(stream_ptr + rows * D + cols, x.to(stream_ptr.dtype.element_ty), mask=inside)
        mean, rstd, x = _statistics(x, rows, inside, num_rows, mean_ptr, rstd_ptr, eps, D, CENTER)
        if AGAIN:
            if weight_ptr is not None:
                weight = _vector(weight_ptr, cols, D, "evict_last")
            if bias_ptr is not None:
                bias = _vector(bias_ptr, cols, D, "evict_last")
            x = _sum_of_two(x_ptr, residual_ptr, rows, cols, inside, x_stride, residual_stride, "evict_first")
            if CENTER:
                x -= mean
        y = x * rstd
        if weight_ptr is not None:
            y *= weight
        if bias_ptr is not None:
            y += bias
        if OUTPUT == PLAIN:
            y = y.to(y_ptr.dtype.element_ty)
        else:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
            y, bits, amax = _quantized(
                y, inverse, extra_ptr, rows, num_rows, OUTPUT == ROWWISE, y_ptr.dtype.element_ty, EMULATE
            )
            largest = tl.maximum(largest, amax)
            if column_ptr is not None:
                largest_of_columns = tl.maximum(largest_of_columns, bits)
        tl.store(y_ptr + rows * D + cols, y, mask=inside)
    if OUTPUT == TENSORWISE:
        tl.store(extra_ptr + tl.program_id(0), _largest(tl.max(largest, axis=1), 0))
    if column_ptr is not None:
        found = tl.max(largest_of_columns, axis=0, keep_dims=True)
        tl.atomic_max(column_ptr + cols, found, mask=cols < D, sem="relaxed")


@triton.jit
def _norm_backward(
    d_y_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    d_stream_ptr,
    d_x_ptr,
    partial_ptr,
    num_rows,
    d_y_stride,
    x_stride,
    d_stream_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    AGAIN: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    KEEP: tl.constexpr = "evict_last" if AGAIN else ""
    if not AGAIN and weight_ptr is not None:
        weight = _vector(weight_ptr, cols, D, "")
    if weight_ptr is not None:
        d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_BIAS:
            d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (cols < D) if ROWS == 1 else (rows < num_rows) & (cols < D)
        x = _rows(x_ptr, rows, cols, inside, x_stride, KEEP)
        d_y = _rows(d_y_ptr, rows, cols, inside, d_y_stride, KEEP)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0) if CENTER else 0.0
        normed = (x - mean) * rstd
        if AGAIN and weight_ptr is not None:
            weight = _vector(weight_ptr, cols, D, "evict_last")
        d_normed = d_y * weight if weight_ptr is not None else d_y
        along = tl.sum(d_normed * normed, axis=1, keep_dims=True) / D
        if CENTER:
            shift = tl.sum(d_normed, axis=1, keep_dims=True) / D
        if AGAIN:
            x = _rows(x_ptr, rows, cols, inside, x_stride, "evict_first")
            d_y = _rows(d_y_ptr, rows, cols, inside, d_y_stride, "evict_first")
            normed = (x - mean) * rstd
            d_normed = d_y * _vector(weight_ptr, cols, D, "") if weight_ptr is not None else d_y
        if weight_ptr is not None:
            d_weight += d_y * normed
            if HAS_BIAS:
                d_bias += d_y
        d_x = d_normed - normed * along
        if CENTER:
            d_x -= shift
        d_x *= rstd
        if d_stream_ptr is not None:
            d_x += tl.load(d_stream_ptr + rows * d_stream_stride + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + rows * D + cols, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        partial_ptr += tl.program_id(0) * D
        sums = tl.sum(d_weight, axis=0, keep_dims=True)
        tl.store(partial_ptr + cols, sums, mask=cols < D)
        if HAS_BIAS:
            sums = tl.sum(d_bias, axis=0, keep_dims=True)
            tl.store(partial_ptr + tl.num_programs(0) * D + cols, sums, mask=cols < D)


@triton.jit
def _norm_sum_partials(partial_ptr, d_weight_ptr, d_bias_ptr, num_partials, D, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    partial_ptr += tl.program_id(1) * num_partials * D
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_partials, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partial_ptr + rows * D + cols, mask=(rows < num_partials) & (cols < D), other=0.0)
    total = tl.sum(sums, axis=0, keep_dims=True)
    if tl.program_id(1) == 0:
        tl.store(d_weight_ptr + cols, total.to(d_weight_ptr.dtype.element_ty), mask=cols < D)
    else:
        tl.store(d_bias_ptr + cols, total.to(d_bias_ptr.dtype.element_ty), mask=cols < D)


def rows_of(x: Tensor) -> Tensor:
    """[rows, D] of [..., D], a view where the strides allow it; elements of a row lie side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    center: bool = False,
    fp8: bool = False,
    scale: Tensor | None = None,
    used: Tensor | None = None,
    column_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the stream x + residual (empty without one), mean (empty unless center), 1 / rms, and of fp8 max |y| or row
    scales (else empty). Written to: used, with a copy of the scale, and column_amax [D], zeros before."""
    nothing = x.new_empty(0, dtype=torch.float32)
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    stream = x.new_empty(x.shape if residual is not None else 0)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if center else nothing
    num_rows, width = rstd.numel(), x.shape[-1]
    tiles = FORWARD(width, center, residual is not None, fp8) if column_amax is None else COLUMNS(width)
    programs = tiles.num_programs(num_rows, width, x.device)
    output, extra = PLAIN.value, nothing
    if fp8:
        output = ROWWISE.value if scale is None else TENSORWISE.value
        extra = nothing.new_empty((*x.shape[:-1], 1) if scale is None else programs)
    if num_rows:
        x_rows = rows_of(x)
        residual_rows = None if residual is None else rows_of(residual)
        _norm_forward[(programs,)](
            x_rows,
            residual_rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            scale,
            y,
            None if residual is None else stream,
            mean if center else None,
            rstd,
            extra if fp8 else None,
            used,
            None if column_amax is None else column_amax.view(torch.int32),
            num_rows,
            x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            eps,
            D=width,
            BLOCK=tiles.block(width),
            ROWS=tiles.rows(width),
            CENTER=center,
            OUTPUT=output,
            STAGES=tiles.fetched(width, x, residual),
            AGAIN=tiles.again,
            EMULATE=not x.is_cuda,
            num_warps=tiles.num_warps(width),
        )
    if fp8 and scale is not None:
        extra = extra.amax() if num_rows else nothing.new_zeros(())
    return y, stream, mean, rstd, extra


def norm_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    d_stream: Tensor | None,
    *,
    has_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last two empty where there is none. mean: of a LayerNorm. d_stream: what
    is added to the gradient of x."""
    width, num_rows, nothing = x.shape[-1], rstd.numel(), rstd.new_empty(0)
    d_x = x.new_empty(x.shape)
    d_weight = nothing if weight is None else weight.new_empty(width)
    d_bias = weight.new_empty(width) if weight is not None and has_bias else nothing
    if not num_rows:
        return d_x, d_weight.zero_(), d_bias.zero_()
    tiles = BACKWARD(width, mean is not None, d_stream is not None)
    programs = tiles.num_programs(num_rows, width, x.device)
    kinds = 0 if weight is None else 1 + has_bias
    partial = torch.empty(kinds, programs, width, dtype=torch.float32, device=x.device)
    d_y_rows, x_rows = rows_of(d_y), rows_of(x)
    d_stream_rows = None if d_stream is None else rows_of(d_stream)
    _norm_backward[(programs,)](
        d_y_rows,
        x_rows,
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        d_stream_rows,
        d_x,
        partial if kinds else None,
        num_rows,
        d_y_rows.stride(0),
        x_rows.stride(0),
        0 if d_stream_rows is None else d_stream_rows.stride(0),
        D=width,
        BLOCK=tiles.block(width),
        ROWS=tiles.rows(width),
        CENTER=mean is not None,
        HAS_BIAS=has_bias,
        STAGES=tiles.fetched(width, d_y, x, d_stream),
        AGAIN=tiles.again,
        num_warps=tiles.num_warps(width),
    )
    if kinds:
        grid = (triton.cdiv(width, 32), kinds)
        _norm_sum_partials[grid](
            partial, d_weight, d_bias if has_bias else d_weight, programs, width, BLOCK=32, ROWS=128, num_warps=8
        )
    return d_x, d_weight, d_bias
