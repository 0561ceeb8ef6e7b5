"""Attention in Triton, forward (Flash Attention 2, 2307.08691, algorithm 1), and what backward shares with it.

A program makes the output of a block of queries of one head, tile after tile of keys. Tiles that no query sees are
never looked at; tiles that all see take no mask arithmetic; only those in between do. Scores are kept in units of
log 2, so that a probability is one exp2.

B batch, T queries, S keys, H query heads, G key/value heads, K features of query and key, V of value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.mask import Mask
from kernels.backend import Tuned

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROWS_OF_MERGE = 32


@dataclass(frozen=True)
class Block:
    """Queries and keys of one product, warps of a program, tiles on their way at a time, and how they are fetched.

    With the copy engine (TMA) a tile takes no registers on its way. Tensors whose rows do not lie as it needs them are
    fetched without it, to the same bits.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    tma: bool = False


def _choose_forward(features: int, itemsize: int) -> Block:
    if itemsize == 4:  # fp32 does not run on tensor cores: small products, for their registers
        return Block(32, 32, 4, 2) if features <= 64 else Block(16, 16, 4, 2)
    if features <= 128:  # several programs per multiprocessor: one multiplies while others take exponentials
        return Block(64, 64, 4, 3, tma=True)
    return Block(128, 64, 8, 2, tma=True)


FORWARD = Tuned(
    (
        Block(128, 128, 8, 2, tma=True),
        Block(128, 128, 8, 3, tma=True),
        Block(128, 64, 8, 3, tma=True),
        Block(128, 64, 8, 2, tma=True),
        Block(64, 64, 4, 3, tma=True),
        Block(128, 128, 8, 2),
        Block(128, 64, 8, 3),
        Block(32, 32, 4, 2),
        Block(16, 16, 4, 2),
    ),
    _choose_forward,  # (the larger of K and V padded to a power of two, bytes of a number)
)


@triton.jit
def load_rows(
    ptr, first, stride, num_rows, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """[ROWS, PADDED] of a matrix [num_rows, SIZE], from row `first`; 0 beyond SIZE, and beyond num_rows if MASKED."""
    row = tl.arange(0, ROWS)
    feature = tl.arange(0, PADDED)
    # 64-bit only once per tile: within one, offsets are small.
    pointers = ptr + first.to(tl.int64) * stride + (row[:, None] * stride + feature[None, :])
    if SIZE != PADDED:
        inside = feature[None, :] < SIZE
        if MASKED:
            inside = inside & (first + row < num_rows)[:, None]
        x = tl.load(pointers, mask=inside, other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=(first + row < num_rows)[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def load_tile(
    source,
    b,
    head,
    first,
    stride_b,
    stride_h,
    stride_t,
    num_rows,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """load_rows of one head of a tensor [batch, num_rows, heads, SIZE]: a pointer, or with TMA a descriptor."""
    if TMA:
        x = source.load([b, first, head, 0]).reshape(ROWS, PADDED)
    else:
        source += b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        x = load_rows(source, first, stride_t, num_rows, ROWS, SIZE, PADDED, MASKED)
    return x


@triton.jit
def store_rows(ptr, x, first, stride, num_rows, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of load_rows, rounded to what the matrix holds."""
    row = tl.arange(0, ROWS)
    feature = tl.arange(0, PADDED)
    pointers = ptr + first.to(tl.int64) * stride + (row[:, None] * stride + feature[None, :])
    inside = (first + row < num_rows)[:, None]
    if SIZE != PADDED:
        inside = inside & (feature[None, :] < SIZE)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def keys_of(
    query,
    first_ptr,
    end_ptr,
    T,
    S,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    RANGES: tl.constexpr,
):
    """The first key that a query sees, and the one behind the last: of one query or a block of them."""
    if RANGES:
        first = tl.load(first_ptr + query, mask=query < T, other=0)
        end = tl.load(end_ptr + query, mask=query < T, other=0)
    else:
        first = query * 0
        end = query * 0 + S
        if CAUSAL:
            end = tl.minimum(end, tl.maximum(query + offset + 1, 0))
        if WINDOWED:
            first = tl.maximum(first, query + offset + 1 - window)
    return first, end


@triton.jit
def tiles_of(first_of_first, end_of_first, first_of_last, end_of_last, TILE: tl.constexpr):
    """Tiles to visit for a block of rows, from the ranges of its first and last row (both ends ascend in between).

    Returns: first tile, first that all rows see whole, first behind those, and the end.
    """
    end = tl.cdiv(end_of_last, TILE)
    whole = tl.minimum(tl.cdiv(first_of_last, TILE), end)
    end_whole = tl.maximum(end_of_first // TILE, whole)
    return first_of_first // TILE, whole, end_whole, end


@triton.jit
def _attend(
    output,
    total,
    top,
    q,
    k_source,
    v_source,
    b,
    g,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    S,
    query,
    first_key,
    end_key,
    scale,
    slope,
    offset,
    begin,
    pause,
    resume,
    num_tiles,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    KEYS: tl.constexpr,
    SLOPES: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Online softmax over num_tiles tiles of keys: begin .. pause, and if MASKED, resume and on."""
    column = tl.arange(0, KEYS)
    for i in tl.range(0, num_tiles):
        tile = begin + i
        if MASKED:
            tile = tl.where(tile < pause, tile, tile - pause + resume)
        start = tile * KEYS
        k = load_tile(k_source, b, g, start, stride_kb, stride_kh, stride_kt, S, KEYS, K, PADDED_K, MASKED, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        key = start + column
        if SLOPES:
            scores = scores * scale - slope * (query[:, None] + offset - key[None, :]).to(tl.float32)
        if MASKED:
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.max(scores, axis=1)
        if not SLOPES:
            highest = highest * scale
        new_top = tl.maximum(top, highest)
        zero = new_top
        if MASKED:  # a query that has seen nothing yet: -inf - (-inf) is no number
            zero = tl.where(new_top == float("-inf"), 0.0, new_top)
        if SLOPES:
            p = tl.exp2(scores - zero[:, None])
        else:
            p = tl.exp2(scores * scale - zero[:, None])
        shrink = tl.exp2(top - zero)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_tile(v_source, b, g, start, stride_vb, stride_vh, stride_vt, S, KEYS, V, PADDED_V, MASKED, TMA)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
        top = new_top
    return output, total, top


@triton.jit(do_not_specialize=["offset", "window"])
def _attention_forward(
    q_ptr,
    k_source,
    v_source,
    output_ptr,
    lse_ptr,
    sinks_ptr,
    slopes_ptr,
    first_ptr,
    end_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_rb,
    B,
    T,
    S,
    offset,
    window,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    RANGES: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    TMA: tl.constexpr,
):
    # Last queries first: under a causal mask theirs is the most work, and the light blocks even out the end. Heads of
    # one group run side by side and find their keys in the cache.
    row = tl.program_id(0) % (B * H)
    block = tl.cdiv(T, QUERIES) - 1 - tl.program_id(0) // (B * H)
    b, h = row // H, row % H
    begin = block * QUERIES
    last = tl.minimum(begin + QUERIES, T) - 1
    query = begin + tl.arange(0, QUERIES)

    first_ptr += b.to(tl.int64) * stride_rb
    end_ptr += b.to(tl.int64) * stride_rb

    a0, a1 = keys_of(begin, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)
    z0, z1 = keys_of(last, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)
    first_tile, whole, end_whole, end_tile = tiles_of(a0, a1, z0, z1, KEYS)
    first_key, end_key = keys_of(query, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)

    q = load_tile(q_ptr, b, h, begin, stride_qb, stride_qh, stride_qt, T, QUERIES, K, PADDED_K, True, False)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
    output = tl.zeros([QUERIES, PADDED_V], dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    top = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    # fmt: off
    output, total, top = _attend(
        output, total, top, q, k_source, v_source, b, h // GROUP, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
        stride_vh, S, query, first_key, end_key, scale, slope, offset, whole, end_whole, 0, end_whole - whole, K, V,
        PADDED_K, PADDED_V, KEYS, SLOPES, False, TMA,
    )
    output, total, top = _attend(
        output, total, top, q, k_source, v_source, b, h // GROUP, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
        stride_vh, S, query, first_key, end_key, scale, slope, offset, first_tile, whole, end_whole,
        whole - first_tile + end_tile - end_whole, K, V, PADDED_K, PADDED_V, KEYS, SLOPES, True, TMA,
    )
    # fmt: on
    if SINKS:  # one more key, which every query sees and whose value is 0
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        output = output * shrink[:, None]
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + row.to(tl.int64) * T + query, lse, mask=query < T)
    output = output / total[:, None]
    output_ptr += b.to(tl.int64) * T * H * V + h * V
    store_rows(output_ptr, output, begin, H * V, T, QUERIES, V, PADDED_V)


@triton.jit
def _attention_merge(
    output_ptr,
    lse_ptr,
    block_output_ptr,
    block_lse_ptr,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_bb,
    stride_bt,
    stride_bh,
    T,
    H: tl.constexpr,
    V: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    row = tl.program_id(1)
    b, h = row // H, row % H
    query = begin + tl.arange(0, ROWS)
    inside = query < T
    lse_ptr += b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + query
    lse = tl.load(lse_ptr, mask=inside, other=0.0) * LOG2_E
    block_lse = tl.load(block_lse_ptr + row.to(tl.int64) * T + query, mask=inside, other=0.0) * LOG2_E
    top = tl.maximum(lse, block_lse)
    zero = tl.where(top == float("-inf"), 0.0, top)
    weight, block_weight = tl.exp2(lse - zero), tl.exp2(block_lse - zero)
    total = weight + block_weight
    tl.store(lse_ptr, (zero + tl.log2(total)) * LN_2, mask=inside)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    output = load_tile(output_ptr, b, h, begin, stride_ob, stride_oh, stride_ot, T, ROWS, V, PADDED_V, True, False)
    other = load_tile(block_output_ptr, b, h, begin, stride_bb, stride_bh, stride_bt, T, ROWS, V, PADDED_V, True, False)
    output = output * (weight * share)[:, None] + other * (block_weight * share)[:, None]
    output_ptr += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    store_rows(output_ptr, output, begin, stride_ot, T, ROWS, V, PADDED_V)


def attention_merge(output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None:
    """In place of output [B, T, H, V] and lse [B, H, T]: of both sets of keys. fp32; lse with queries side by side."""
    B, T, H, V = output.shape
    if not output.numel():
        return
    _attention_merge[(triton.cdiv(T, ROWS_OF_MERGE), B * H)](
        output,
        lse,
        block_output,
        block_lse,
        *output.stride()[:3],
        *lse.stride()[:2],
        *block_output.stride()[:3],
        T,
        H=H,
        V=V,
        PADDED_V=padded(V),
        ROWS=ROWS_OF_MERGE,
        num_warps=4,
    )


def padded(size: int) -> int:
    """Of features: what a tensor core multiplies."""
    return max(16, triton.next_power_of_2(size))


def described(
    block: Block, rows: int, *tensors: tuple[Tensor, int]
) -> tuple[tuple[Tensor, ...] | tuple[TensorDescriptor, ...], bool]:
    """Tensors [batch, tokens, heads, features], each with its padded features, as load_tile takes them in tiles of
    `rows` tokens, and whether as descriptors: where the block wants them and all the tensors can have them."""
    plain = tuple(x for x, _ in tensors)
    if not block.tma or not all(_has_descriptor(x) for x in plain):
        return plain, False
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, features]) for x, features in tensors
    ), True


def _has_descriptor(x: Tensor) -> bool:
    """Whether the copy engine takes it: rows of 16 bytes, and a device that has one (Hopper and newer)."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return aligned and x.data_ptr() % 16 == 0


def mask_arguments(mask: Mask) -> dict[str, int | bool]:
    """Of a mask, what forward and backward take alike."""
    ranges = mask.ranges is not None
    return {
        "offset": mask.offset or 0,
        "window": mask.window or 0,
        "CAUSAL": mask.causal and not ranges,
        "WINDOWED": mask.window is not None and not ranges,
        "RANGES": ranges,
    }


def batch_stride(x: Tensor) -> int:
    """Of ranges [B or 1, T], in elements."""
    return x.stride(0) if x.shape[0] > 1 else 0


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] of `dtype` and log-sum-exp [B, H, T] of q, k, v of one dtype, whose features lie side by
    side."""
    B, T, H, K = q.shape
    S, V = k.shape[1], v.shape[3]
    output = torch.empty(B, T, H, V, dtype=dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if not output.numel():
        return output, lse
    first, end = (lse, lse) if mask.ranges is None else (mask.ranges.first_key, mask.ranges.end_key)
    block = FORWARD(max(padded(K), padded(V)), q.element_size())
    (k_source, v_source), tma = described(block, block.keys, (k, padded(K)), (v, padded(V)))
    _attention_forward[(triton.cdiv(T, block.queries) * B * H,)](
        q,
        k_source,
        v_source,
        output,
        lse,
        lse if sinks is None else sinks.contiguous(),
        lse if slopes is None else slopes.contiguous(),
        first,
        end,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        batch_stride(first),
        B,
        T,
        S,
        scale=scale * LOG2_E.value,
        H=H,
        GROUP=H // k.shape[2],
        K=K,
        V=V,
        PADDED_K=padded(K),
        PADDED_V=padded(V),
        QUERIES=block.queries,
        KEYS=block.keys,
        SINKS=sinks is not None,
        SLOPES=slopes is not None,
        TMA=tma,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **mask_arguments(mask),
    )
    return output, lse
