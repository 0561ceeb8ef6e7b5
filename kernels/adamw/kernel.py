"""AdamW in Triton: a program per chunk of a tensor, tiles of [rows, 32, 8] elements.

Eight neighbours share one draw of Philox, a row of 256 one scale of an 8-bit moment. Everything is computed in fp32.
Tiles that lie inside their tensor, and whose memory is aligned, are read and written 16 bytes at a time; the rest
element by element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.multi_tensor import CHUNK


@dataclass(frozen=True)
class Block:
    """Elements of a tile, at least 256, and warps."""

    size: int
    num_warps: int


BLOCKS = Tuned(
    (Block(1024, 4), Block(2048, 4), Block(2048, 8), Block(4096, 16)),
    lambda eight_bit: Block(2048, 8),
)

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
}


@triton.jit
def _address(addresses_ptr, row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(addresses_ptr + row * 8 + COLUMN).to(tl.pointer_type(TYPE))


@triton.jit
def _load(pointer, first, offsets, inside, WHOLE: tl.constexpr):
    if WHOLE:
        # The hint belongs to an addition made here: on an argument of this function it would be lost.
        return tl.load(tl.multiple_of(pointer + first, 16) + offsets)
    else:
        return tl.load(pointer + first + offsets, mask=inside, other=0)


@triton.jit
def _store(pointer, first, offsets, x, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(tl.multiple_of(pointer + first, 16) + offsets, x)
    else:
        tl.store(pointer + first + offsets, x, mask=inside)


@triton.jit
def _decode(q, DECADES: tl.constexpr):
    """Values of codes without a sign, fp32 [...]."""
    decade = ((q.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    value = tl.exp2((decade - DECADES) * 3.321928094887362) * (0.9 * (q + 1.0) * tl.exp2(-decade) - 0.8)
    return tl.where(q > 0.0, value, 0.0)


@triton.jit
def _encode(relative, DECADES: tl.constexpr, KEEP_POSITIVE: tl.constexpr):
    """Nearest codes, as whole numbers in fp32, of magnitudes relative to their block's largest.

    An approximate logarithm may find the neighbouring decade of a number at a power of ten; both give the same code.
    """
    logarithm = tl.log2(tl.maximum(relative, 1e-30)) * 0.3010299956639812
    exponent = tl.minimum(tl.maximum(tl.ceil(logarithm), -DECADES), 0.0)
    scaled = relative * tl.exp2(exponent * -3.321928094887362)
    steps = tl.exp2(exponent + DECADES)  # 2^i in decade i
    step = tl.where(exponent == -DECADES, scaled, (scaled - 0.1) * (steps * 1.1111111111111112))
    q = tl.minimum(steps - 1.0 + tl.floor(step + 0.5), 2.0 * (1 << DECADES) - 1.0)
    if KEEP_POSITIVE:
        q = tl.where(relative > 0.0, tl.maximum(q, 1.0), q)
    return q


@triton.jit
def _relative(x):
    """(magnitudes relative to the largest of their row, largest of each row [rows, 1, 1]); 0 for rows of nothing."""
    largest = tl.max(tl.max(tl.abs(x), axis=2, keep_dims=True), axis=1, keep_dims=True)
    largest = tl.where(largest > 1e-37, largest, 0.0)
    inverse = tl.where(largest > 0.0, 1.0 / tl.where(largest > 0.0, largest, 1.0), 0.0)
    return tl.abs(x) * inverse, largest


@triton.jit
def _round_stochastically(x, first, constants_ptr, step, ROWS: tl.constexpr, RUN: tl.constexpr):
    """fp32 x with its lower 16 bits 0; reference.py says which random bits an element gets.

    RUN: neighbours in memory are neighbours in the parameter, eight of them at a multiple of 8, and share a draw.
    """
    key, origin = tl.load(constants_ptr + 1), tl.load(constants_ptr + 2)
    groups = tl.arange(0, ROWS)[:, None, None] * 32 + tl.arange(0, 32)[None, :, None]
    within = tl.arange(0, 8)[None, None, :]
    if RUN:
        counter = ((origin + first) >> 3) + groups
        lane = within
    else:
        n1, n2 = tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
        s0, s1 = tl.load(constants_ptr + 5), tl.load(constants_ptr + 6)
        i = first + groups * 8 + within
        outer = i // n2
        e = origin + outer // n1 * s0 + outer % n1 * s1 + i % n2
        counter = e >> 3
        lane = (e & 7).to(tl.int32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, tl.zeros_like(low) + step.to(tl.uint32), tl.zeros_like(low))
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    random = (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bits, bits + random) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _tile(
    addresses_ptr,
    constants_ptr,
    row,
    first,
    size,
    decay,
    step,
    grad_scale,
    step_size,
    root,
    rest1,
    rest2,
    eps,
    ROWS: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update elements first to first + 256 ROWS of one tensor."""
    offsets = (
        tl.arange(0, ROWS)[:, None, None] * 256 + tl.arange(0, 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    )
    inside = first + offsets < size
    p_ptr = _address(addresses_ptr, row, 1, PARAMETER)
    p = _load(p_ptr, first, offsets, inside, WHOLE).to(tl.float32)
    g = _load(_address(addresses_ptr, row, 2, GRADIENT), first, offsets, inside, WHOLE).to(tl.float32) * grad_scale
    if MOMENT == tl.int8:  # noqa: SIM300
        m_ptr = _address(addresses_ptr, row, 3, tl.int8)
        v_ptr = _address(addresses_ptr, row, 4, tl.uint8)
        blocks = first // 256 + tl.arange(0, ROWS)[:, None, None]
        has_block = blocks * 256 < size
        m_scale_ptr = _address(addresses_ptr, row, 5, tl.float32) + blocks
        v_scale_ptr = _address(addresses_ptr, row, 6, tl.float32) + blocks
        q = _load(m_ptr, first, offsets, inside, WHOLE).to(tl.float32)
        m = _decode(tl.abs(q), 6) * tl.load(m_scale_ptr, mask=has_block, other=0.0)
        m = tl.where(q < 0.0, -m, m)
        q = _load(v_ptr, first, offsets, inside, WHOLE).to(tl.float32)
        v = _decode(q, 7) * tl.load(v_scale_ptr, mask=has_block, other=0.0)
    else:
        m_ptr = _address(addresses_ptr, row, 3, MOMENT)
        v_ptr = _address(addresses_ptr, row, 4, MOMENT)
        m = _load(m_ptr, first, offsets, inside, WHOLE).to(tl.float32)
        v = _load(v_ptr, first, offsets, inside, WHOLE).to(tl.float32)

    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    p = p * decay - step_size * (m / (tl.sqrt(v) * root + eps))

    if MOMENT == tl.int8:  # noqa: SIM300
        relative, largest = _relative(m)
        q = _encode(relative, 6, False)
        _store(m_ptr, first, offsets, tl.where(m < 0.0, -q, q).to(tl.int8), inside, WHOLE)
        tl.store(m_scale_ptr, largest, mask=has_block)
        relative, largest = _relative(v)
        _store(v_ptr, first, offsets, _encode(relative, 7, True).to(tl.uint8), inside, WHOLE)
        tl.store(v_scale_ptr, largest, mask=has_block)
    else:
        _store(m_ptr, first, offsets, m.to(MOMENT), inside, WHOLE)
        _store(v_ptr, first, offsets, v.to(MOMENT), inside, WHOLE)
    if STOCHASTIC:
        p = _round_stochastically(p, first, constants_ptr + row * 7, step, ROWS, RUN)
    _store(p_ptr, first, offsets, p.to(PARAMETER), inside, WHOLE)
    if COPY is not None:
        _store(_address(addresses_ptr, row, 7, COPY), first, offsets, p.to(COPY), inside, WHOLE)


@triton.jit
def _update(
    chunks_ptr,  # [chunks, 2] int32
    addresses_ptr,  # [tensors, 8] int64: aligned, parameter, gradient, first and second moment, their scales, copy
    constants_ptr,  # [tensors, 7] int64: size, key, first, n1, n2, s0, s1
    decays_ptr,
    step_ptr,
    grad_scale_ptr,
    skip_ptr,
    lr_ptr,
    log_beta1,
    log_beta2,
    rest1,
    rest2,
    eps,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RUN: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
):
    if tl.load(skip_ptr) != 0.0:  # NaN as well
        return
    row = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    aligned = tl.load(addresses_ptr + row * 8) != 0
    size = tl.load(constants_ptr + row * 7)
    step = tl.load(step_ptr)
    grad_scale = tl.load(grad_scale_ptr)
    lr = tl.load(lr_ptr).to(tl.float32) if LR_ON_DEVICE else lr_ptr
    # In fp32, 1 - 0.999 would keep five digits.
    step_size = lr / (1.0 - tl.exp(step.to(tl.float64) * log_beta1)).to(tl.float32)
    root = (1.0 / tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * log_beta2))).to(tl.float32)
    decay = 1.0 - lr * tl.load(decays_ptr + row)
    step = step.to(tl.int32)
    BLOCK: tl.constexpr = ROWS * 256
    for first in tl.range(start, tl.minimum(start + CHUNK, size), BLOCK):
        if aligned & (first + BLOCK <= size):
            _tile(
                addresses_ptr, constants_ptr, row, first, size, decay, step, grad_scale, step_size, root,
                rest1, rest2, eps, ROWS, PARAMETER, GRADIENT, MOMENT, COPY, STOCHASTIC, RUN, True,
            )  # fmt: skip
        else:
            _tile(
                addresses_ptr, constants_ptr, row, first, size, decay, step, grad_scale, step_size, root,
                rest1, rest2, eps, ROWS, PARAMETER, GRADIENT, MOMENT, COPY, STOCHASTIC, RUN, False,
            )  # fmt: skip


@dataclass(frozen=True)
class Types:
    """What a launch is compiled for; tensors that differ in it need another launch."""

    parameter: torch.dtype
    gradient: torch.dtype
    moment: torch.dtype  # int8: both moments in 8 bits
    copy: torch.dtype | None
    stochastic: bool
    run: bool


def launch(
    types: Types,
    tables: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
) -> None:
    """One launch over all chunks; tables: chunks, addresses, constants, decays, as `_update` wants them."""
    if not (num_chunks := tables[0].shape[0]):
        return
    block = BLOCKS(types.moment == torch.int8)
    _update[(num_chunks,)](
        *tables,
        step,
        grad_scale,
        skip,
        lr if isinstance(lr, Tensor) else float(lr),  # an int would be compiled in
        *(math.log(beta) if beta else -math.inf for beta in betas),
        *(1 - beta for beta in betas),
        float(eps),
        CHUNK=CHUNK,
        ROWS=block.size // 256,
        PARAMETER=TYPES[types.parameter],
        GRADIENT=TYPES[types.gradient],
        MOMENT=TYPES[types.moment],
        COPY=None if types.copy is None else TYPES[types.copy],
        STOCHASTIC=types.stochastic,
        RUN=types.run,
        LR_ON_DEVICE=isinstance(lr, Tensor),
        num_warps=block.num_warps,
    )
