"""Softmax in Triton. A row that fits stays in registers; a wider one is read twice, the second time from the cache.

Computes in fp32 and rounds once. A row is one program's, so its bits depend on its numbers and the width alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.rms_norm.kernel import Tiles, rows_of


@dataclass(frozen=True)
class Chunks:
    """A program walks over its row, this many elements at a time."""

    size: int
    num_warps: int
    stages: int = 1  # chunks in flight


FORWARD: Tuned[Tiles | Chunks] = Tuned(
    (
        Tiles(4096, 16, 0),
        Tiles(4096, 32, 0),
        Tiles(4096, 32, 1, 2),
        Tiles(2048, 8, 0),
        Chunks(8192, 16, 2),
        Chunks(8192, 16),
        Chunks(4096, 8, 3),
        Chunks(16384, 16),
    ),
    # Wider than 16384 one program fills a multiprocessor: the next row is fetched while one is computed.
    lambda num_rows, width: (
        Tiles(4096, 16, 0) if width <= 16384 else Tiles(4096, 32, 1, 2) if width <= 32768 else Chunks(8192, 16, 2)
    ),
)
BACKWARD: Tuned[Tiles | Chunks] = Tuned(
    (
        Tiles(4096, 16, 0),
        Tiles(4096, 32, 0),
        Tiles(4096, 16, 1, 2),
        Tiles(2048, 8, 0),
        Chunks(8192, 16, 2),
        Chunks(8192, 16),
        Chunks(4096, 8, 3),
    ),
    lambda num_rows, width: (
        Tiles(4096, 16, 0) if width <= 8192 else Tiles(4096, 16, 1, 2) if width <= 16384 else Chunks(8192, 16, 2)
    ),
)


@triton.jit
def _softmax_forward_rows(
    x_ptr, y_ptr, num_rows, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        # 64-bit: scores pass 2^31 elements.
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (cols < WIDTH) if ROWS == 1 else (rows < num_rows) & (cols < WIDTH)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
        y = y * (1.0 / tl.sum(y, axis=1, keep_dims=True))
        tl.store(y_ptr + rows * WIDTH + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_backward_rows(
    d_y_ptr,
    y_ptr,
    d_x_ptr,
    num_rows,
    d_y_stride,
    y_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (cols < WIDTH) if ROWS == 1 else (rows < num_rows) & (cols < WIDTH)
        y = tl.load(y_ptr + rows * y_stride + cols, mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + rows * d_y_stride + cols, mask=inside, other=0.0).to(tl.float32)
        d_x = y * (d_y - tl.sum(y * d_y, axis=1, keep_dims=True))
        tl.store(d_x_ptr + rows * WIDTH + cols, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_forward_chunks(x_ptr, y_ptr, width, x_stride, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride
    y_ptr += tl.program_id(0).to(tl.int64) * width
    largest = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        x = tl.load(x_ptr + start + cols, mask=start + cols < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far: no -inf - -inf
        sums = sums * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = above
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    factor = 1.0 / tl.sum(sums, axis=0)
    last = (tl.cdiv(width, BLOCK) - 1) * BLOCK
    for done in tl.range(0, width, BLOCK, num_stages=STAGES):
        start = last - done  # backwards: the end of the row is what the cache holds for sure
        x = tl.load(x_ptr + start + cols, mask=start + cols < width, other=0.0).to(tl.float32)
        y = tl.exp(x - shift) * factor
        tl.store(y_ptr + start + cols, y.to(y_ptr.dtype.element_ty), mask=start + cols < width)


@triton.jit
def _softmax_backward_chunks(
    d_y_ptr, y_ptr, d_x_ptr, width, d_y_stride, y_stride, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    d_y_ptr += tl.program_id(0).to(tl.int64) * d_y_stride
    y_ptr += tl.program_id(0).to(tl.int64) * y_stride
    d_x_ptr += tl.program_id(0).to(tl.int64) * width
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        y = tl.load(y_ptr + start + cols, mask=start + cols < width, other=0.0).to(tl.float32)
        sums += y * tl.load(d_y_ptr + start + cols, mask=start + cols < width, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0)
    last = (tl.cdiv(width, BLOCK) - 1) * BLOCK
    for done in tl.range(0, width, BLOCK, num_stages=STAGES):
        start = last - done
        y = tl.load(y_ptr + start + cols, mask=start + cols < width, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + start + cols, mask=start + cols < width, other=0.0).to(tl.float32)
        d_x = y * (d_y - total)
        tl.store(d_x_ptr + start + cols, d_x.to(d_x_ptr.dtype.element_ty), mask=start + cols < width)


def softmax_forward(x: Tensor) -> Tensor:
    """y of x [..., width]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    x = rows_of(x)
    num_rows, width = x.shape
    config = FORWARD(num_rows, width)
    if isinstance(config, Chunks):
        _softmax_forward_chunks[(num_rows,)](
            x, y, width, x.stride(0), BLOCK=config.size, STAGES=config.stages, num_warps=config.num_warps
        )
        return y
    _softmax_forward_rows[(config.num_programs(num_rows, width, x.device),)](
        x,
        y,
        num_rows,
        x.stride(0),
        WIDTH=width,
        BLOCK=config.block(width),
        ROWS=config.rows(width),
        STAGES=config.fetched(width, x),
        num_warps=config.num_warps(width),
    )
    return y


def softmax_backward(d_y: Tensor, y: Tensor) -> Tensor:
    """d_x of y [..., width] and its gradient."""
    d_x = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return d_x
    d_y, y = rows_of(d_y), rows_of(y)
    num_rows, width = y.shape
    config = BACKWARD(num_rows, width)
    if isinstance(config, Chunks):
        _softmax_backward_chunks[(num_rows,)](
            d_y,
            y,
            d_x,
            width,
            d_y.stride(0),
            y.stride(0),
            BLOCK=config.size,
            STAGES=config.stages,
            num_warps=config.num_warps,
        )
        return d_x
    _softmax_backward_rows[(config.num_programs(num_rows, width, y.device),)](
        d_y,
        y,
        d_x,
        num_rows,
        d_y.stride(0),
        y.stride(0),
        WIDTH=width,
        BLOCK=config.block(width),
        ROWS=config.rows(width),
        STAGES=config.fetched(width, d_y, y),
        num_warps=config.num_warps(width),
    )
    return d_x
