"""SwiGLU that quantizes what it makes, forward and backward, in Triton.

A program has a tile of the output, so that it writes both copies that products want, by rows and transposed; one scale
for all, which is known before, and the largest magnitude by an atomic maximum (kernels/fp8/quantize/kernel.py, from
which the casts are). Numbers are rounded to the dtype of the input before they are quantized, as if they had been
stored in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.fp8.formats import E4M3, LARGEST, padded
from kernels.fp8.quantize.kernel import (
    Tile,
    _inverse,
    _load_tile,
    _magnitude_bits,
    _store_tile,
    _store_transposed,
    _tile_of,
    to_fp8,
)
from kernels.swiglu.kernel import CODES, _activation

FORWARD = Tuned(
    (Tile(128, 64, 8), Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 128, 8)), lambda rows, width: Tile(128, 64, 8)
)
BACKWARD = Tuned(
    (Tile(64, 64, 8), Tile(128, 64, 8), Tile(64, 64, 4), Tile(128, 64, 16)), lambda rows, width: Tile(64, 64, 8)
)


@triton.jit
def _load_half(x_ptr, r, c, R, width, stride):
    """A tile of gate or up [R, width], rows `stride` apart."""
    inside = (r < R)[:, None] & (c < width)[None, :]
    return tl.load(x_ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_half(y_ptr, y, r, c, R, width, stride):
    inside = (r < R)[:, None] & (c < width)[None, :]
    tl.store(y_ptr + r.to(tl.int64)[:, None] * stride + c[None, :], y, mask=inside)


@triton.jit
def _largest_of(x):
    return tl.max(tl.max(_magnitude_bits(x), axis=1), axis=0)


@triton.jit
def _known_scale(scale_ptr, used_ptr, EMULATE: tl.constexpr):
    """The inverse; the first program writes the scale to memory of its own, aligned as cuBLASLt wants it."""
    scale = tl.load(scale_ptr)
    if tl.program_id(0) == 0:
        tl.store(used_ptr, scale)
    return _inverse(scale, EMULATE)


@triton.jit
def _glu_quantized_forward(
    gate_up_ptr, y_ptr, t_ptr, scale_ptr, used_ptr, amax_ptr, R, width, R_padded, stride, one,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, LARGEST: tl.constexpr,
    TRANSPOSE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    inverse = _known_scale(scale_ptr, used_ptr, EMULATE)
    row_tile, column_tile = _tile_of(width, COLUMNS)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    gate = _load_half(gate_up_ptr, r, c, R, width, stride)
    up = _load_half(gate_up_ptr + width, r, c, R, width, stride)
    activated, _ = _activation(gate, ACTIVATION)
    y = (activated * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    _store_tile(y_ptr, to_fp8(y * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, width)
    if TRANSPOSE:
        t = to_fp8(y * (inverse * one), y_ptr.dtype.element_ty, LARGEST, EMULATE)  # no cast may be used twice
        _store_transposed(t_ptr, t, r, c, R_padded, width)
    tl.atomic_max(amax_ptr, _largest_of(y), sem="relaxed")


@triton.jit
def _glu_quantized_backward(
    d_y_ptr, gate_up_ptr, d_ptr, t_ptr, scale_ptr, used_ptr, amax_ptr, R, width, R_padded, stride, one,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, LARGEST: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    inverse = _known_scale(scale_ptr, used_ptr, EMULATE)
    row_tile, column_tile = _tile_of(width, COLUMNS)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    d_y = _load_tile(d_y_ptr, r, c, R, width, "")
    gate = _load_half(gate_up_ptr, r, c, R, width, stride)
    up = _load_half(gate_up_ptr + width, r, c, R, width, stride)
    activated, slope = _activation(gate, ACTIVATION)
    d_gate = (d_y * up * slope).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    _store_half(d_ptr, to_fp8(d_gate * inverse, d_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, width, 2 * width)
    t = to_fp8(d_gate * (inverse * one), d_ptr.dtype.element_ty, LARGEST, EMULATE)
    _store_transposed(t_ptr, t, r, c, R_padded, width)
    d_up = (d_y * activated).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    up_ptr = d_ptr + width
    _store_half(up_ptr, to_fp8(d_up * inverse, d_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, width, 2 * width)
    t = to_fp8(d_up * (inverse * one), d_ptr.dtype.element_ty, LARGEST, EMULATE)
    _store_transposed(t_ptr, t, r, c + width, R_padded, 2 * width)
    tl.atomic_max(amax_ptr, tl.maximum(_largest_of(d_gate), _largest_of(d_up)), sem="relaxed")


def glu_quantized(
    gate_up: Tensor, scale: Tensor, activation: str, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(data, transposed, scale used, amax) of the output for gate_up [R, 2I], not empty."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    R, width = gate_up.shape[0], gate_up.shape[1] // 2
    data = gate_up.new_empty(R, width, dtype=E4M3)
    transposed = data.new_empty((width, padded(R)) if transpose else (0,))
    used, amax = torch.empty((), device=data.device), torch.zeros((), device=data.device)
    tile = FORWARD(R, width)
    _glu_quantized_forward[(triton.cdiv(padded(R), tile.rows) * triton.cdiv(width, tile.columns),)](
        gate_up, data, transposed, scale, used, amax.view(torch.int32), R, width, padded(R), gate_up.stride(0), 1.0,
        ROWS=tile.rows, COLUMNS=tile.columns, ACTIVATION=CODES[activation], LARGEST=LARGEST[E4M3],
        TRANSPOSE=transpose, EMULATE=not gate_up.is_cuda, num_warps=tile.num_warps,
    )  # fmt: skip
    return data, transposed, used, amax


def glu_backward_quantized(
    d_y: Tensor, gate_up: Tensor, scale: Tensor, dtype: torch.dtype, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(data, transposed, scale used, amax) of the gradient of gate_up [R, 2I], not empty."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    R, width = gate_up.shape[0], gate_up.shape[1] // 2
    data = gate_up.new_empty(R, 2 * width, dtype=dtype)
    transposed = data.new_empty(2 * width, padded(R))
    used, amax = torch.empty((), device=data.device), torch.zeros((), device=data.device)
    tile = BACKWARD(R, width)
    _glu_quantized_backward[(triton.cdiv(padded(R), tile.rows) * triton.cdiv(width, tile.columns),)](
        d_y.contiguous(), gate_up, data, transposed, scale, used, amax.view(torch.int32), R, width, padded(R),
        gate_up.stride(0), 1.0,
        ROWS=tile.rows, COLUMNS=tile.columns, ACTIVATION=CODES[activation], LARGEST=LARGEST[dtype],
        EMULATE=not gate_up.is_cuda, num_warps=tile.num_warps,
    )  # fmt: skip
    return data, transposed, used, amax
