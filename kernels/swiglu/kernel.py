"""Gated linear units in Triton: SwiGLU and both kinds of GeGLU.

They compute in fp32 and round once; backward computes the activation anew instead of keeping it. Gate and up are read
by rows, so that they may be the halves of one projection's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.fp8.formats import SMALLEST_SCALE
from kernels.rms_norm.kernel import FP8_MAX, PLAIN, ROWWISE, TENSORWISE, rows_of

SMALLEST = tl.constexpr(SMALLEST_SCALE)
SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)
CODES = {"silu": SILU.value, "gelu_tanh": GELU_TANH.value, "gelu": GELU.value}


@dataclass(frozen=True)
class Block:
    """Elements of one program, and its warps."""

    size: int
    num_warps: int


BLOCKS = Tuned(
    (Block(1024, 4), Block(2048, 8), Block(2048, 4), Block(4096, 8)),
    # A row of two halves is cut by itself, and widths are multiples of 1024 or 2048 more often than of 4096.
    lambda rows, width: Block(1024, 4) if rows * width < 1 << 22 else Block(4096 if width % 4096 == 0 else 2048, 8),
)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == GELU:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # the normal distribution function
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = tl.sigmoid(x)
        slope = share + x * share * (1.0 - share)
    return x * share, slope


@triton.jit
def _glu_forward(
    gate_ptr,
    up_ptr,
    scale_ptr,
    y_ptr,
    extra_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    # 64-bit: an MLP's activations pass 2^31 elements at 74k tokens.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activation(gate, ACTIVATION)
    y = activated * up
    if OUTPUT != PLAIN:
        amax = tl.max(tl.abs(y), axis=0)
        if OUTPUT == TENSORWISE:
            tl.store(extra_ptr + tl.program_id(0), amax)
            scale = tl.load(scale_ptr)
        else:
            scale = tl.where(amax == 0.0, 1.0, tl.maximum(amax / FP8_MAX, SMALLEST))
            tl.store(extra_ptr + row, scale)
        y = tl.clamp(y * (1.0 / scale), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward(
    d_y_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    width,
    d_y_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    d_y = tl.load(d_y_ptr + row * d_y_stride + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activation(gate, ACTIVATION)
    d_gate = (d_y * up * slope).to(d_gate_ptr.dtype.element_ty)
    tl.store(d_gate_ptr + row * d_gate_stride + cols, d_gate, mask=inside)
    tl.store(d_up_ptr + row * d_up_stride + cols, (d_y * activated).to(d_up_ptr.dtype.element_ty), mask=inside)


def _as_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[rows, width] of tensors of one shape; a single row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tuple(x.view(1, -1) for x in tensors)
    return tuple(rows_of(x) for x in tensors)


def _block(rows: int, width: int) -> Block:
    block = BLOCKS(rows, width)
    return Block(min(block.size, max(32, triton.next_power_of_2(width))), block.num_warps)


def glu_forward(
    gate: Tensor, up: Tensor, activation: str, *, fp8: bool = False, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y of gate and up [..., I], and of fp8 max |y| or, without a scale, the scale of each row (else empty)."""
    y = torch.empty(gate.shape, dtype=torch.float8_e4m3fn if fp8 else gate.dtype, device=gate.device)
    extra = gate.new_empty((*gate.shape[:-1], 1) if fp8 and scale is None else 0, dtype=torch.float32)
    if not gate.numel():
        return y, extra.new_zeros(()) if scale is not None else extra.fill_(1.0)
    if fp8 and scale is None:  # a row is one block
        gate_rows, up_rows = rows_of(gate), rows_of(up)
        rows, width = gate_rows.shape
        size = max(32, triton.next_power_of_2(width))
        block, output = Block(size, min(32, max(1, size // 512))), ROWWISE.value
    else:
        gate_rows, up_rows = _as_rows(gate, up)
        rows, width = gate_rows.shape
        block, output = _block(rows, width), TENSORWISE.value if fp8 else PLAIN.value
    programs = rows * triton.cdiv(width, block.size)
    if scale is not None:
        extra = extra.new_empty(programs)
    _glu_forward[(programs,)](
        gate_rows,
        up_rows,
        scale,
        y,
        extra if fp8 else None,
        width,
        gate_rows.stride(0),
        up_rows.stride(0),
        ACTIVATION=CODES[activation],
        OUTPUT=output,
        BLOCK=block.size,
        num_warps=block.num_warps,
    )
    return y, extra if scale is None else extra.amax()


def glu_backward(d_y: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, activation: str) -> None:
    """Writes d_gate and d_up [..., I], which may be the halves of one tensor."""
    if not gate.numel():
        return
    d_y, gate, up, d_gate, d_up = _as_rows(d_y, gate, up, d_gate, d_up)
    rows, width = gate.shape
    block = _block(rows, width)
    _glu_backward[(rows * triton.cdiv(width, block.size),)](
        d_y,
        gate,
        up,
        d_gate,
        d_up,
        width,
        d_y.stride(0),
        gate.stride(0),
        up.stride(0),
        d_gate.stride(0),
        d_up.stride(0),
        ACTIVATION=CODES[activation],
        BLOCK=block.size,
        num_warps=block.num_warps,
    )
