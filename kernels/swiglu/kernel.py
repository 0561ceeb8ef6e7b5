"""SwiGLU in Triton. Computes in fp32 and rounds once; backward computes silu anew instead of keeping it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Block:
    """Elements of one program, and its warps."""

    size: int
    num_warps: int


BLOCKS = Tuned(
    (Block(1024, 4), Block(2048, 8), Block(4096, 8)),
    lambda num_elements: Block(1024, 4) if num_elements < 1 << 22 else Block(4096, 8),
)


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    # 64-bit: an MLP's activations pass 2^31 elements at 74k tokens.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _backward(d_y_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    d_y = tl.load(d_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(d_gate_ptr + offsets, d_y * up * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)
    tl.store(d_up_ptr + offsets, d_y * silu, mask=inside)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y of contiguous gate and up."""
    y = torch.empty_like(gate)
    if n := gate.numel():
        block = BLOCKS(n)
        _forward[(triton.cdiv(n, block.size),)](gate, up, y, n, BLOCK=block.size, num_warps=block.num_warps)
    return y


def swiglu_backward(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d_gate and d_up; all contiguous."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if n := gate.numel():
        block = BLOCKS(n)
        grid = (triton.cdiv(n, block.size),)
        _backward[grid](d_y, gate, up, d_gate, d_up, n, BLOCK=block.size, num_warps=block.num_warps)
    return d_gate, d_up
