"""Linear layer with a weight of 4-bit integers, in Triton.

At four bits a weight, instructions are what is scarce: an H200 reads 34 weights per clock and multiprocessor and has
128 lanes. So a word of 16 bits becomes four numbers by bits alone. A code q in the low bits of 0x4300 is 128 + q in
bf16, in those of 0x6400 it is 1024 + q in fp16; subtracting 128 or 1024 plus the zero point, exactly, leaves q - zero.
Two words that a thread of the tensor core owns lie side by side, so this is 1.4 instructions per weight. Scales
multiply a group's sums where rows are few (decode), and else the weights, rounded to x's dtype (prefill). As in
int8_linear, the tile of the result is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.int8_linear.kernel import store_result, tile_of
from kernels.split_k.kernel import add_parts, parts_for, splits_for


@dataclass(frozen=True)
class Tile:
    """Rows of x and output features of one program; parts of K; warps; groups in flight."""

    rows: int
    features: int
    splits: int
    num_warps: int
    num_stages: int
    group: int = 8  # tiles of features that are walked together, so that they share rows of x in the L2 cache


def _choose(M: int, N: int, groups: int, bytes_: int) -> Tile:
    if M > 64 and bytes_ > 2:  # of x's dtype; fp32 is not for the tensor core
        return Tile(32, 64, 1, 4, 2)
    if M > 64:
        return Tile(128, 128, 1, 8, 3)
    rows = 16 if M <= 16 else 32 if M <= 32 or bytes_ > 2 else 64
    return Tile(rows, 64, splits_for(triton.cdiv(N, 64), groups), 4, 5 if bytes_ <= 2 else 2)


TILES = Tuned(
    (
        Tile(16, 64, 1, 4, 5),
        Tile(16, 64, 2, 4, 6),
        Tile(16, 128, 2, 4, 4),
        Tile(64, 64, 1, 4, 4),
        Tile(32, 64, 1, 4, 2),
        Tile(128, 128, 1, 8, 3),
    ),
    _choose,
)


@triton.jit
def _unpack(words, zero, dtype: tl.constexpr, BITS: tl.constexpr):
    """The four quarters of a group, words int16 [features, G/4] less zero [features, 1], exactly. BITS: by PTX, two
    words at a time, with (mask and word) or magic, which is lop3's 0xEA."""
    if BITS:
        BIAS: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        biased = tl.broadcast_to((zero + BIAS).to(dtype), words.shape)
        if dtype == tl.bfloat16:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                """{
                .reg .b32 moved;
                lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
                shr.b32 moved, $4, 4;
                lop3.b32 $1, moved, 0x000F000F, 0x43004300, 0xEA;
                shr.b32 moved, $4, 8;
                lop3.b32 $2, moved, 0x000F000F, 0x43004300, 0xEA;
                shr.b32 moved, $4, 12;
                lop3.b32 $3, moved, 0x000F000F, 0x43004300, 0xEA;
                sub.rn.bf16x2 $0, $0, $5;
                sub.rn.bf16x2 $1, $1, $5;
                sub.rn.bf16x2 $2, $2, $5;
                sub.rn.bf16x2 $3, $3, $5;
                }""",
                "=&r,=&r,=&r,=&r,r,r", [words, biased],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                """{
                .reg .b32 moved;
                lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
                shr.b32 moved, $4, 4;
                lop3.b32 $1, moved, 0x000F000F, 0x64006400, 0xEA;
                shr.b32 moved, $4, 8;
                lop3.b32 $2, moved, 0x000F000F, 0x64006400, 0xEA;
                shr.b32 moved, $4, 12;
                lop3.b32 $3, moved, 0x000F000F, 0x64006400, 0xEA;
                sub.rn.f16x2 $0, $0, $5;
                sub.rn.f16x2 $1, $1, $5;
                sub.rn.f16x2 $2, $2, $5;
                sub.rn.f16x2 $3, $3, $5;
                }""",
                "=&r,=&r,=&r,=&r,r,r", [words, biased],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        q0 = ((words & 15).to(tl.float32) - zero).to(dtype)
        q1 = (((words >> 4) & 15).to(tl.float32) - zero).to(dtype)
        q2 = (((words >> 8) & 15).to(tl.float32) - zero).to(dtype)
        q3 = (((words >> 12) & 15).to(tl.float32) - zero).to(dtype)
    return q0, q1, q2, q3


@triton.jit
def _int4_matmul(
    x_ptr, words_ptr, pairs_ptr, bias_ptr, y_ptr, parts_ptr, M, N, K, groups, groups_per_part,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, QUARTER: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    SCALE_SUMS: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A step is a group of 4 * QUARTER weights. Its scale and zero point come as one word of 32 bits, the least that is
    copied ahead of its use."""
    row_tile, feature_tile = tile_of(M, N, ROWS, FEATURES, GROUP)
    split = tl.program_id(1)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = feature_tile * FEATURES + tl.arange(0, FEATURES)
    j = tl.arange(0, QUARTER)
    first = split * groups_per_part
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K + first * 4 * QUARTER + j[:, None]
    words_ptrs = words_ptr + n.to(tl.int64)[:, None] * (K // 4) + first * QUARTER + j[None, :]
    features, rows = n < N, (m < M)[None, :]
    sums = tl.zeros((FEATURES, ROWS), dtype=tl.float32)
    for g in range(first, min(first + groups_per_part, groups)):
        words = tl.load(words_ptrs, mask=features[:, None], other=0, eviction_policy="evict_first")
        pair = tl.load(pairs_ptr + g * N + n, mask=features, other=0)[:, None]
        scale = (pair << 16).to(tl.float32, bitcast=True)  # bf16 is the upper half of fp32
        zero = (pair & -65536).to(tl.float32, bitcast=True)
        x0 = tl.load(x_ptrs, mask=rows, other=0.0)
        x1 = tl.load(x_ptrs + QUARTER, mask=rows, other=0.0)
        x2 = tl.load(x_ptrs + 2 * QUARTER, mask=rows, other=0.0)
        x3 = tl.load(x_ptrs + 3 * QUARTER, mask=rows, other=0.0)
        q0, q1, q2, q3 = _unpack(words, zero, x_ptr.dtype.element_ty, BITS)
        if SCALE_SUMS:
            part = tl.dot(q0, x0, input_precision="ieee")
            part = tl.dot(q1, x1, part, input_precision="ieee")
            part = tl.dot(q2, x2, part, input_precision="ieee")
            part = tl.dot(q3, x3, part, input_precision="ieee")
            sums += part * scale
        else:
            scale = scale.to(x0.dtype)
            sums = tl.dot((q0 * scale).to(x0.dtype), x0, sums, input_precision="ieee")
            sums = tl.dot((q1 * scale).to(x0.dtype), x1, sums, input_precision="ieee")
            sums = tl.dot((q2 * scale).to(x0.dtype), x2, sums, input_precision="ieee")
            sums = tl.dot((q3 * scale).to(x0.dtype), x3, sums, input_precision="ieee")
        x_ptrs += 4 * QUARTER
        words_ptrs += QUARTER
    store_result(sums, y_ptr, parts_ptr, y_ptr, bias_ptr, m, n, M, N, split, SPLITS, False, BIAS)


def int4_linear(x: Tensor, packed: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] of contiguous x [M, K], packed [N, K/2], scale_zero [K/G, N, 2]; none of them empty."""
    (M, K), N, groups = x.shape, packed.shape[0], scale_zero.shape[0]
    tile = TILES(M, N, groups, x.element_size())
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = parts_for(tile.splits, M, N, x.device) if tile.splits > 1 else None
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.features), tile.splits)
    _int4_matmul[grid](
        x, packed.view(torch.int16), scale_zero.view(torch.int32), y if bias is None else bias, y,
        y if parts is None else parts, M, N, K, groups, triton.cdiv(groups, tile.splits),
        ROWS=tile.rows, FEATURES=tile.features, QUARTER=K // groups // 4, SPLITS=tile.splits, GROUP=tile.group,
        SCALE_SUMS=tile.rows <= 64, BITS=x.is_cuda and x.dtype in (torch.bfloat16, torch.float16),
        BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts is not None:
        add_parts(parts, None, bias, y)
    return y
