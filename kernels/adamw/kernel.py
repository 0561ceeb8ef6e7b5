"""AdamW in Triton: a program per part of a chunk of a tensor, tiles of [groups, 4] or [groups, 8] elements.

What a thread holds of an array lies side by side, 16 bytes of parameters, and a warp holds whole blocks of 256, which
share a scale of an 8-bit moment. Eight neighbours share one draw of Philox. Everything is computed in fp32. Tiles that
lie inside their tensor, and whose memory is aligned, are read and written 16 bytes at a time; the rest element by
element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw.quantized import levels
from kernels.backend import Tuned
from kernels.multi_tensor import CHUNK


@dataclass(frozen=True)
class Block:
    """How a chunk is worked on."""

    size: int  # elements of a tile, at least 256
    num_warps: int
    tiles: int  # of a program, one after the other; with 1, neighbouring programs work on neighbouring tiles
    registers: int | None = None  # of a thread at most
    stages: int = 1  # tiles in flight: above 1 the next is fetched while one is computed


BLOCKS = Tuned(
    (
        Block(2048, 8, 1),
        Block(2048, 8, 2),
        Block(2048, 8, 8),
        Block(2048, 8, 1, registers=64),
        Block(2048, 8, 8, registers=64, stages=2),
        Block(1024, 8, 1, registers=64),
        Block(1024, 4, 1),
        Block(4096, 8, 1),
        Block(4096, 16, 1, registers=64),
    ),
    lambda run: Block(1024, 4, 1),
)
BLOCKS_8_BIT = Tuned(
    (
        Block(2048, 8, 1),
        Block(2048, 8, 2, registers=80),
        Block(2048, 8, 1, registers=80),
        Block(1024, 4, 1, registers=80),
    ),
    lambda run: Block(1024, 4, 1, registers=80 if run else None),
)

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
}


_INVERSE_FACTORIALS = tl.constexpr(tuple(1.0 / math.factorial(k) for k in range(8, 1, -1)))
_POWERS_OF_TEN = tl.constexpr(tuple(10.0**k for k in range(8)))


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
def _less_than_one(log_beta, step):
    """1 - beta^step in fp32, with the digits that beta^step near 1 has no room for."""
    x = log_beta * step
    series = 1.0 / 362880
    for k in tl.static_range(7):
        series = series * x + _INVERSE_FACTORIALS[k]
    return tl.where(x > -0.5, -x * (series * x + 1.0), 1.0 - tl.exp(x))


@triton.jit
def _decode(codes, levels_ptr, scale):
    """Values of codes times the scales of their blocks, fp32. Looked up: to compute them takes a fifth longer."""
    return tl.load(levels_ptr + (codes.to(tl.int32) & 255)) * scale


@triton.jit
def _saturated(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _encode(relative, DECADES: tl.constexpr, KEEP_POSITIVE: tl.constexpr):
    """Codes before they are rounded to whole numbers, of magnitudes relative to their block's largest.

    Decade i is passed by 2^i codes at even steps, so the code is a sum over decades of 2^i times how much of each has
    been passed. Only the last term of the sum that is not 0 can be broken: nothing is lost to rounding before it.
    """
    q = _saturated(relative * (3e38 if KEEP_POSITIVE else _POWERS_OF_TEN[DECADES]))
    for i in tl.static_range(1, DECADES + 1):
        # From 0.1 to 1 of the decade, in ninths of its tenth.
        q += (1 << i) * _saturated(relative * (_POWERS_OF_TEN[DECADES - i] / 0.9) - 0.1111111111111111)
    return q


@triton.jit
def _to_codes(q, TYPE: tl.constexpr):
    """q to the nearest whole number, ties to even: added to 1.5 * 2^23 it is in the lowest bits, also if negative."""
    return (q + 12582912.0).to(tl.int32, bitcast=True).to(TYPE)


@triton.jit
def _relative(x, ROWS: tl.constexpr):
    """(magnitudes relative to the largest of their block of 256, largest of each block [groups]); 0 for blocks of
    nothing. x [groups, VECTOR] as `_tile` numbers groups."""
    x = tl.abs(x)
    halves = tl.reshape(tl.max(x, axis=1), (x.shape[0] // (32 * ROWS), ROWS, 32))
    largest = tl.max(tl.max(halves, axis=0, keep_dims=True), axis=2, keep_dims=True)
    largest = tl.where(largest > 1e-37, largest, 0.0)
    inverse = tl.where(largest > 0.0, 1.0 / tl.where(largest > 0.0, largest, 1.0), 0.0)
    inverse = tl.reshape(tl.broadcast_to(inverse, halves.shape), (x.shape[0],))
    return x * inverse[:, None], tl.reshape(tl.broadcast_to(largest, halves.shape), (x.shape[0],))


@triton.jit
def _round_stochastically(x, first, positions, constants_ptr, step, RUN: tl.constexpr):
    """fp32 x with its lower 16 bits 0; reference.py says which random bits an element gets.

    RUN: neighbours in memory are neighbours in the parameter, eight of them at a multiple of 8, and share a draw.
    """
    key, origin = tl.load(constants_ptr + 1), tl.load(constants_ptr + 2)
    if RUN:
        tl.static_assert(x.shape[1] == 8)
        counter = (((origin + first) >> 3) + (positions >> 3))[:, None]
        lane = tl.arange(0, 8)[None, :]
    else:
        n1, n2 = tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
        s0, s1 = tl.load(constants_ptr + 5), tl.load(constants_ptr + 6)
        i = first + positions[:, None] + tl.arange(0, x.shape[1])[None, :]
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
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    copy_ptr,
    levels_ptr,
    constants_ptr,
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
    VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update elements first to first + 256 ROWS of one tensor."""
    EIGHT_BIT: tl.constexpr = m_scale_ptr is not None
    # [groups, VECTOR]: Triton gives neighbouring groups to neighbouring threads, and the groups from 32 ROWS on to the
    # same threads again. Numbered so, a warp holds all of a row of 256. (Of three dimensions it took different ones
    # first in different versions: with 3.6 a warp read pieces of 64 bytes.)
    groups = tl.arange(0, ROWS * 256 // VECTOR)
    rows = groups // 32 % ROWS
    positions = rows * 256 + groups // (32 * ROWS) * 128 + groups % 32 * VECTOR
    offsets = positions[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = offsets < tl.minimum(size - first, ROWS * 256).to(tl.int32)
    p = _load(p_ptr, first, offsets, inside, WHOLE).to(tl.float32)
    g = _load(g_ptr, first, offsets, inside, WHOLE).to(tl.float32) * grad_scale
    m = _load(m_ptr, first, offsets, inside, WHOLE)
    v = _load(v_ptr, first, offsets, inside, WHOLE)
    if EIGHT_BIT:
        blocks = first // 256 + rows
        has_block = blocks * 256 < size
        writes_scale = has_block & (groups % 32 == 0) & (groups < 32 * ROWS)
        scale = tl.load(m_scale_ptr + blocks, mask=has_block, other=0.0)[:, None]
        m = _decode(m, levels_ptr, scale)
        scale = tl.load(v_scale_ptr + blocks, mask=has_block, other=0.0)[:, None]
        v = _decode(v, levels_ptr + 256, scale)
    else:
        m = m.to(tl.float32)
        v = v.to(tl.float32)

    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    p = p * decay - step_size * (m / (tl.sqrt(v) * root + eps))
    if STOCHASTIC:
        p = _round_stochastically(p, first, positions, constants_ptr, step, RUN)

    if EIGHT_BIT:
        relative, largest = _relative(m, ROWS)
        tl.store(m_scale_ptr + blocks, largest, mask=writes_scale)
        q = _encode(relative, 6, False)
        m = _to_codes(tl.where(m < 0.0, -q, q), tl.int8)
        relative, largest = _relative(v, ROWS)
        tl.store(v_scale_ptr + blocks, largest, mask=writes_scale)
        v = _to_codes(_encode(relative, 7, True), tl.uint8)
    else:
        m = m.to(m_ptr.dtype.element_ty)
        v = v.to(v_ptr.dtype.element_ty)
    _store(m_ptr, first, offsets, m, inside, WHOLE)
    _store(v_ptr, first, offsets, v, inside, WHOLE)
    _store(p_ptr, first, offsets, p.to(p_ptr.dtype.element_ty), inside, WHOLE)
    if copy_ptr is not None:
        _store(copy_ptr, first, offsets, p.to(copy_ptr.dtype.element_ty), inside, WHOLE)


@triton.jit
def _adamw_update(
    chunks_ptr,  # [chunks, 2] int32
    addresses_ptr,  # [tensors, 8] int64: aligned, parameter, gradient, first and second moment, their scales, copy
    constants_ptr,  # [tensors, 7] int64: size, key, first, n1, n2, s0, s1
    decays_ptr,
    levels_ptr,  # [512] fp32, or None: values of codes 0 to 127 and -128 to -1, values of codes without a sign
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
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RUN: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk, part = tl.program_id(0) // (CHUNK // PART), tl.program_id(0) % (CHUNK // PART)
    skip = tl.load(skip_ptr)
    row = tl.load(chunks_ptr + 2 * chunk).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK + part * PART
    lr = tl.load(lr_ptr).to(tl.float32) if LR_ON_DEVICE else lr_ptr
    size = tl.load(constants_ptr + row * 7)
    if (skip != 0.0) | (start >= size):  # skip may be NaN
        return
    step = tl.load(step_ptr)
    grad_scale = tl.load(grad_scale_ptr)
    aligned = tl.load(addresses_ptr + row * 8)  # 1 or 0
    decay = 1.0 - lr * tl.load(decays_ptr + row)
    p_ptr = _address(addresses_ptr, row, 1, PARAMETER)
    g_ptr = _address(addresses_ptr, row, 2, GRADIENT)
    m_ptr = _address(addresses_ptr, row, 3, MOMENT)
    v_ptr = _address(addresses_ptr, row, 4, tl.uint8 if MOMENT == tl.int8 else MOMENT)  # noqa: SIM300
    m_scale_ptr = _address(addresses_ptr, row, 5, tl.float32) if MOMENT == tl.int8 else None  # noqa: SIM300
    v_scale_ptr = _address(addresses_ptr, row, 6, tl.float32) if MOMENT == tl.int8 else None  # noqa: SIM300
    copy_ptr = _address(addresses_ptr, row, 7, COPY) if COPY is not None else None
    step_size = lr / _less_than_one(log_beta1, step)
    root = 1.0 / tl.sqrt(_less_than_one(log_beta2, step))
    step = step.to(tl.int32)
    BLOCK: tl.constexpr = ROWS * 256
    VECTOR: tl.constexpr = 4 if PARAMETER == tl.float32 else 8  # noqa: SIM300
    constants_ptr += row * 7
    end = tl.minimum(start + PART, size)
    whole = start + (end - start) // BLOCK * BLOCK * aligned
    for first in tl.range(start, whole, BLOCK, num_stages=STAGES):
        _tile(
            p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, copy_ptr, levels_ptr, constants_ptr,
            first, size, decay, step, grad_scale, step_size, root, rest1, rest2, eps,
            ROWS, VECTOR, STOCHASTIC, RUN, True,
        )  # fmt: skip
    # Fewer elements at a time than above: addresses of single elements take more registers.
    TAIL: tl.constexpr = ROWS // 2 if ROWS > 1 else 1
    for first in tl.range(whole, end, TAIL * 256, disable_licm=True):
        _tile(
            p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, copy_ptr, levels_ptr, constants_ptr,
            first, size, decay, step, grad_scale, step_size, root, rest1, rest2, eps,
            TAIL, VECTOR, STOCHASTIC, RUN, False,
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


@lru_cache
def code_values(device: torch.device) -> Tensor:
    """[512] fp32: values of codes of a first moment, by the bits of the code, then of a second moment."""
    signed = levels(signed=True)
    return torch.cat([signed, signed.new_zeros(1), -signed[1:].flip(0), levels(signed=False)]).to(device, torch.float32)


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
    """One launch over all chunks; tables: chunks, addresses, constants, decays, as `_adamw_update` wants them."""
    if not (num_chunks := tables[0].shape[0]):
        return
    eight_bit = types.moment == torch.int8
    block = (BLOCKS_8_BIT if eight_bit else BLOCKS)(types.run)
    part = min(block.size * block.tiles, CHUNK)
    _adamw_update[(num_chunks * (CHUNK // part),)](
        *tables,
        code_values(tables[0].device) if eight_bit else None,
        step,
        grad_scale,
        skip,
        lr if isinstance(lr, Tensor) else float(lr),  # an int would be compiled in
        *(math.log(beta) if beta else -math.inf for beta in betas),
        *(1 - beta for beta in betas),
        float(eps),
        CHUNK=CHUNK,
        PART=part,
        ROWS=block.size // 256,
        PARAMETER=TYPES[types.parameter],
        GRADIENT=TYPES[types.gradient],
        MOMENT=TYPES[types.moment],
        COPY=None if types.copy is None else TYPES[types.copy],
        STOCHASTIC=types.stochastic,
        RUN=types.run,
        LR_ON_DEVICE=isinstance(lr, Tensor),
        STAGES=block.stages,
        num_warps=block.num_warps,
        maxnreg=block.registers,
    )
