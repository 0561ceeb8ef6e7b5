"""Gated linear units in Triton: SwiGLU and both kinds of GeGLU.

They compute in fp32 and round once; backward computes the activation anew instead of keeping it. Gate and up are read
by rows, so that they may be the halves of one projection's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.rms_norm.kernel import rows_of

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
    y_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
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
    tl.store(y_ptr + row * width + cols, (activated * up).to(y_ptr.dtype.element_ty), mask=inside)


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


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y of gate and up [..., I]."""
    y = gate.new_empty(gate.shape)
    if not gate.numel():
        return y
    gate_rows, up_rows = _as_rows(gate, up)
    rows, width = gate_rows.shape
    block = _block(rows, width)
    _glu_forward[(rows * triton.cdiv(width, block.size),)](
        gate_rows,
        up_rows,
        y,
        width,
        gate_rows.stride(0),
        up_rows.stride(0),
        ACTIVATION=CODES[activation],
        BLOCK=block.size,
        num_warps=block.num_warps,
    )
    return y


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
