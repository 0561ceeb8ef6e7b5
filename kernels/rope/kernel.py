"""Rotary position embedding in Triton: one launch for all heads of queries and keys, each read where it lies.

A row is a head of a token. Backward is the same kernel with the negative angle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Block:
    """Pairs of numbers of one program, and its warps."""

    pairs: int
    num_warps: int


BLOCKS = Tuned(
    (Block(2048, 4), Block(1024, 4), Block(2048, 8), Block(4096, 8), Block(1024, 2)),
    lambda num_tokens, num_heads, half: Block(2048, 4),
)


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    cos_ptr,
    sin_ptr,
    table_stride,
    block,
    num_tokens,
    seq_len,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
):
    """Rows of one tensor from block * ROWS on. TURN: 1 by the angle, -1 back, 0 not at all."""
    rows = (block * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    tokens = rows // H
    inside = (tokens < num_tokens) & (cols < HALF)
    batch = (tokens // seq_len).to(tl.int64)
    position = (tokens % seq_len).to(tl.int64)
    head = (rows % H).to(tl.int64)
    x_ptr += batch * x_stride_b + position * x_stride_t + head * x_stride_h + cols
    y_ptr += batch * y_stride_b + position * y_stride_t + head * y_stride_h + cols
    first = tl.load(x_ptr, mask=inside, other=0.0)
    second = tl.load(x_ptr + HALF, mask=inside, other=0.0)
    if TURN != 0:
        table = batch * table_stride + position * HALF + cols
        cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
        if TURN == -1:
            sin = -sin
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(y_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr, first, mask=inside)
    tl.store(y_ptr + HALF, second, mask=inside)


@triton.jit
def _rope_turn_heads(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    q_out_stride_b,
    q_out_stride_t,
    q_out_stride_h,
    k_out_stride_b,
    k_out_stride_t,
    k_out_stride_h,
    v_out_stride_b,
    v_out_stride_t,
    v_out_stride_h,
    cos_ptr,
    sin_ptr,
    table_stride,
    num_tokens,
    seq_len,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
):
    block = tl.program_id(0)
    q_blocks = tl.cdiv(num_tokens * H, ROWS)
    kv_blocks = tl.cdiv(num_tokens * H_KV, ROWS)
    if block < q_blocks:
        _turn(
            q_ptr, q_out_ptr, q_stride_b, q_stride_t, q_stride_h, q_out_stride_b, q_out_stride_t, q_out_stride_h,
            cos_ptr, sin_ptr, table_stride, block, num_tokens, seq_len, H, HALF, BLOCK, ROWS, TURN,
        )  # fmt: skip
    elif k_ptr is not None:  # known at compile time, as what is behind it needs: None has no type
        if block < q_blocks + kv_blocks:
            _turn(
                k_ptr, k_out_ptr, k_stride_b, k_stride_t, k_stride_h, k_out_stride_b, k_out_stride_t, k_out_stride_h,
                cos_ptr, sin_ptr, table_stride, block - q_blocks, num_tokens, seq_len, H_KV, HALF, BLOCK, ROWS, TURN,
            )  # fmt: skip
        elif v_ptr is not None:
            _turn(
                v_ptr, v_out_ptr, v_stride_b, v_stride_t, v_stride_h, v_out_stride_b, v_out_stride_t, v_out_stride_h,
                cos_ptr, sin_ptr, table_stride, block - q_blocks - kv_blocks, num_tokens, seq_len, H_KV, HALF, BLOCK,
                ROWS, 0,
            )  # fmt: skip


def heads_side_by_side(x: Tensor) -> Tensor:
    """x, copied unless the numbers of a head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def turn(pairs: Sequence[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """Writes the second of each pair [B, T, heads, K] from the first: of queries, then keys, then values, which are
    copied only; keys and values may be left out. Both of a pair may be one tensor. Tables [B or 1, T, 1, K/2]."""
    q = pairs[0][0]
    if not q.numel():
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    seq_len, half = q.shape[1], q.shape[3] // 2
    num_tokens = q.shape[0] * seq_len
    heads = [x.shape[2] for x, _ in pairs]
    block = BLOCKS(num_tokens, sum(heads), half)
    width = triton.next_power_of_2(half)
    rows = max(1, block.pairs // width)
    pairs = [(heads_side_by_side(x), y) for x, y in pairs]
    missing = [(None, None)] * (3 - len(pairs))
    sources, targets = zip(*pairs, *missing, strict=True)
    strides = [0 if x is None else x.stride(dim) for x in (*sources, *targets) for dim in range(3)]
    _rope_turn_heads[(sum(triton.cdiv(num_tokens * h, rows) for h in heads),)](
        *sources,
        *targets,
        *strides,
        cos,
        sin,
        0 if cos.shape[0] == 1 else seq_len * half,
        num_tokens,
        seq_len,
        H=heads[0],
        H_KV=heads[1] if len(heads) > 1 else 0,
        HALF=half,
        BLOCK=width,
        ROWS=rows,
        TURN=-1 if inverse else 1,
        num_warps=block.num_warps,
    )


def like(x: Tensor) -> Tensor:
    """Contiguous memory for a result."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
