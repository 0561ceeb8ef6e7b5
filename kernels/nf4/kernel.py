"""NF4 in Triton: a row of a program's tile is a block of 64 values. Levels are looked up in memory: 64 bytes that stay
in the L1 cache, at one load a value, less than the 15 comparisons that would replace it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.nf4.reference import BLOCK, GROUP, bounds, levels, magnitude_levels


@dataclass(frozen=True)
class Tile:
    """Blocks of 64 of one program, and its warps."""

    blocks: int
    num_warps: int


TILES = Tuned((Tile(32, 4), Tile(64, 4), Tile(64, 8), Tile(128, 8)), lambda num_values: Tile(64, 4))


@triton.jit
def _nf4_quantize(x_ptr, bounds_ptr, packed_ptr, largest_ptr, num_values, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    first = tl.load(x_ptr + 2 * byte, mask=2 * byte < num_values, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + 2 * byte + 1, mask=2 * byte + 1 < num_values, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    tl.store(largest_ptr + block, largest, mask=block * 2 * HALF < num_values)
    # Of fp32: as a bare number 1e-38, which is subnormal there, would be of fp64.
    divisor = tl.maximum(largest, tl.full(largest.shape, 1e-38, tl.float32))
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]
    first, second = first * inverse, second * inverse
    high = tl.zeros(first.shape, dtype=tl.int32)
    low = tl.zeros(first.shape, dtype=tl.int32)
    for i in tl.static_range(15):
        bound = tl.load(bounds_ptr + i)
        high += (first > bound).to(tl.int32)
        low += (second > bound).to(tl.int32)
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=2 * byte < num_values)


@triton.jit
def _nf4_dequantize(
    packed_ptr, magnitudes_ptr, scales_ptr, offset_ptr, levels_ptr, magnitude_levels_ptr, y_ptr, num_values,
    BLOCKS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 2 * HALF < num_values
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, mask=2 * byte < num_values, other=0).to(tl.int32)
    magnitude = tl.load(magnitudes_ptr + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + block // GROUP, mask=inside, other=0.0)
    largest = (tl.load(magnitude_levels_ptr + magnitude) * scale + tl.load(offset_ptr))[:, None]
    first = tl.load(levels_ptr + (packed >> 4)) * largest
    second = tl.load(levels_ptr + (packed & 15)) * largest
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    values = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (BLOCKS, 2 * HALF))
    value = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(y_ptr + value, values, mask=value < num_values)


def quantize_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, fp32 magnitudes) of contiguous x, which is not empty."""
    n, tile = x.numel(), TILES(x.numel())
    blocks = triton.cdiv(n, BLOCK)
    packed = torch.empty(triton.cdiv(n, 2), dtype=torch.uint8, device=x.device)
    largest = torch.empty(blocks, dtype=torch.float32, device=x.device)
    _nf4_quantize[(triton.cdiv(blocks, tile.blocks),)](
        x, bounds(x.device), packed, largest, n, BLOCKS=tile.blocks, HALF=BLOCK // 2, num_warps=tile.num_warps
    )
    return packed, largest


def dequantize(
    packed: Tensor, magnitudes: Tensor, scales: Tensor, offset: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    """[n] of dtype; all contiguous, n at least 1. Not with fused multiply-add, which would round once where the format
    rounds twice."""
    device, tile = packed.device, TILES(num_values)
    y = torch.empty(num_values, dtype=dtype, device=device)
    _nf4_dequantize[(triton.cdiv(len(magnitudes), tile.blocks),)](
        packed, magnitudes, scales, offset, levels(device), magnitude_levels(device), y, num_values,
        BLOCKS=tile.blocks, HALF=BLOCK // 2, GROUP=GROUP, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return y


@triton.jit
def _nf4_dequantize_blocks(
    packed_ptr, largest_ptr, levels_ptr, y_ptr, num_values, BLOCKS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, mask=2 * byte < num_values, other=0).to(tl.int32)
    largest = tl.load(largest_ptr + block, mask=block * 2 * HALF < num_values, other=0.0)[:, None]
    first = tl.load(levels_ptr + (packed >> 4)) * largest
    second = tl.load(levels_ptr + (packed & 15)) * largest
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    values = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (BLOCKS, 2 * HALF))
    value = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(y_ptr + value, values, mask=value < num_values)


def dequantize_blocks(packed: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] of dtype from packed [n/2] and fp32 magnitudes [n/64] of whole blocks; contiguous, n at least 1."""
    num_values, tile = 2 * len(packed), TILES(2 * len(packed))
    y = torch.empty(num_values, dtype=dtype, device=packed.device)
    _nf4_dequantize_blocks[(triton.cdiv(len(largest), tile.blocks),)](
        packed, largest, levels(packed.device), y, num_values,
        BLOCKS=tile.blocks, HALF=BLOCK // 2, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return y
