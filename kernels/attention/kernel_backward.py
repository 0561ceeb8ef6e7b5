"""Attention in Triton, backward (2307.08691, algorithm 2): one kernel for dQ, one for dK and dV, none with atomics.

With P = exp(scores - lse), dP = dO V^T and delta = rowsum(dO O) - dlse: dS = P (dP - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO. The kernel of dK and dV works on transposed scores K Q^T from the start: transposing an
accumulator for the second product gives wrong results on Hopper with some versions of Triton.

Letters as in kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.kernel import (
    LOG2_E,
    Block,
    batch_stride,
    described,
    keys_of,
    load_rows,
    load_tile,
    mask_arguments,
    padded,
    store_rows,
    tiles_of,
)
from kernels.attention.mask import Mask
from kernels.backend import Tuned

ROWS_OF_DELTA = 64
PROGRAMS_WANTED = 256
"""Of the dK/dV kernel, about two waves on a Hopper GPU: with fewer, query heads of a group are shared out."""


def _choose_queries(features: int, itemsize: int, masked: bool) -> Block:
    if itemsize == 4:
        return Block(32, 32, 4, 1) if features <= 64 else Block(16, 16, 4, 1)
    if features <= 128:
        return Block(64, 64, 4, 2, tma=True) if masked or features <= 64 else Block(128, 64, 8, 3, tma=True)
    return Block(64, 32, 8, 2, tma=True)


def _choose_keys(features: int, itemsize: int) -> Block:
    if itemsize == 4:
        return Block(32, 32, 4, 1) if features <= 64 else Block(16, 16, 4, 1)
    if features <= 128:
        return Block(64, 64, 4, 3 if features <= 64 else 2, tma=True)
    return Block(32, 64, 8, 2, tma=True)


BACKWARD_QUERIES = Tuned(
    (
        Block(128, 64, 8, 3, tma=True),
        Block(128, 64, 8, 2, tma=True),
        Block(128, 128, 8, 2, tma=True),
        Block(64, 64, 4, 2, tma=True),
        Block(64, 32, 8, 2, tma=True),
        Block(128, 64, 8, 2),
        Block(32, 32, 4, 1),
        Block(16, 16, 4, 1),
    ),
    _choose_queries,  # (the larger of K and V padded to a power of two, bytes of a number, window or documents)
)
BACKWARD_KEYS = Tuned(
    (
        Block(64, 128, 8, 2, tma=True),
        Block(64, 128, 8, 3, tma=True),
        Block(32, 128, 8, 3, tma=True),
        Block(64, 64, 4, 2, tma=True),
        Block(64, 64, 4, 3, tma=True),
        Block(32, 64, 8, 2, tma=True),
        Block(64, 128, 8, 2),
        Block(32, 32, 4, 1),
        Block(16, 16, 4, 1),
    ),
    _choose_keys,  # (the larger of K and V padded to a power of two, bytes of a number)
)


@triton.jit
def _attention_delta(
    output_ptr,
    d_output_ptr,
    d_lse_ptr,
    delta_ptr,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_db,
    stride_dt,
    stride_dh,
    T,
    H: tl.constexpr,
    V: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
    D_LSE: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    row = tl.program_id(1)
    b, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    query = begin + tl.arange(0, ROWS)
    output = load_rows(output_ptr + b * stride_ob + h * stride_oh, begin, stride_ot, T, ROWS, V, PADDED_V, True)
    d_output = load_rows(d_output_ptr + b * stride_db + h * stride_dh, begin, stride_dt, T, ROWS, V, PADDED_V, True)
    delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), axis=1)
    place = row.to(tl.int64) * T + query
    if D_LSE:
        delta -= tl.load(d_lse_ptr + place, mask=query < T, other=0.0)
    tl.store(delta_ptr + place, delta, mask=query < T)


@triton.jit
def _accumulate_queries(
    d_q,
    q,
    d_output,
    lse,
    delta,
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
    """d_q without its scale, over the tiles of keys that kernel._attend goes over."""
    column = tl.arange(0, KEYS)
    for i in tl.range(0, num_tiles):
        tile = begin + i
        if MASKED:
            tile = tl.where(tile < pause, tile, tile - pause + resume)
        start = tile * KEYS
        k = load_tile(k_source, b, g, start, stride_kb, stride_kh, stride_kt, S, KEYS, K, PADDED_K, MASKED, TMA)
        v = load_tile(v_source, b, g, start, stride_vb, stride_vh, stride_vt, S, KEYS, V, PADDED_V, MASKED, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        d_p = tl.dot(d_output, tl.trans(v), input_precision="ieee")
        key = start + column
        if SLOPES:
            scores = scores - slope * (query[:, None] + offset - key[None, :]).to(tl.float32)
        if MASKED:
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        d_scores = tl.exp2(scores - lse[:, None]) * (d_p - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision="ieee")
    return d_q


@triton.jit
def _finite(lse):
    """In units of log 2; 0 for -inf, of a query that saw no key: its masked scores then have probability 0, not NaN."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit(do_not_specialize=["offset", "window"])
def _attention_backward_queries(
    q_ptr,
    k_source,
    v_source,
    d_output_ptr,
    lse_ptr,
    delta_ptr,
    d_q_ptr,
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
    stride_db,
    stride_dt,
    stride_dh,
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
    SLOPES: tl.constexpr,
    TMA: tl.constexpr,
):
    # The order of programs is the forward's.
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
    d_output = load_tile(
        d_output_ptr, b, h, begin, stride_db, stride_dh, stride_dt, T, QUERIES, V, PADDED_V, True, False
    )
    place = row.to(tl.int64) * T + query
    lse = _finite(tl.load(lse_ptr + place, mask=query < T, other=0.0))
    delta = tl.load(delta_ptr + place, mask=query < T, other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
    scale_2 = scale * LOG2_E
    d_q = tl.zeros([QUERIES, PADDED_K], dtype=tl.float32)
    # fmt: off
    d_q = _accumulate_queries(
        d_q, q, d_output, lse, delta, k_source, v_source, b, h // GROUP, stride_kb, stride_kt, stride_kh, stride_vb,
        stride_vt, stride_vh, S, query, first_key, end_key, scale_2, slope, offset, whole, end_whole, 0,
        end_whole - whole, K, V, PADDED_K, PADDED_V, KEYS, SLOPES, False, TMA,
    )
    d_q = _accumulate_queries(
        d_q, q, d_output, lse, delta, k_source, v_source, b, h // GROUP, stride_kb, stride_kt, stride_kh, stride_vb,
        stride_vt, stride_vh, S, query, first_key, end_key, scale_2, slope, offset, first_tile, whole, end_whole,
        whole - first_tile + end_tile - end_whole, K, V, PADDED_K, PADDED_V, KEYS, SLOPES, True, TMA,
    )
    # fmt: on
    d_q_ptr += b.to(tl.int64) * T * H * K + h * K
    store_rows(d_q_ptr, d_q * scale, begin, H * K, T, QUERIES, K, PADDED_K)


@triton.jit
def _accumulate_keys(
    d_k,
    d_v,
    k,
    v,
    q_source,
    d_output_source,
    lse_ptr,
    delta_ptr,
    slopes_ptr,
    b,
    h,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_db,
    stride_dt,
    stride_dh,
    T,
    key,
    first_query,
    end_query,
    scale,
    offset,
    begin,
    pause,
    resume,
    num_tiles,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOPES: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """d_k without its scale, and d_v, over num_tiles tiles of queries of each of HEADS heads."""
    column = tl.arange(0, QUERIES)
    # One loop over heads and tiles: loads of the next head are under way while the last tile of one is computed.
    for i in tl.range(0, num_tiles * HEADS):
        head = i // num_tiles
        tile = begin + i - head * num_tiles
        if MASKED:
            tile = tl.where(tile < pause, tile, tile - pause + resume)
        start = tile * QUERIES
        query = start + column
        q = load_tile(
            q_source, b, h + head, start, stride_qb, stride_qh, stride_qt, T, QUERIES, K, PADDED_K, MASKED, TMA
        )
        place = head.to(tl.int64) * T + query
        if MASKED:
            lse = tl.load(lse_ptr + place, mask=query < T, other=0.0)
            delta = tl.load(delta_ptr + place, mask=query < T, other=0.0)
        else:
            lse = tl.load(lse_ptr + place)
            delta = tl.load(delta_ptr + place)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [KEYS, QUERIES]
        if SLOPES:
            slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E
            scores = scores - slope * (query[None, :] + offset - key[:, None]).to(tl.float32)
        if MASKED:
            seen = (query[None, :] >= first_query[:, None]) & (query[None, :] < end_query[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores - _finite(lse)[None, :])
        else:
            p = tl.exp2(scores - (lse * LOG2_E)[None, :])
        d_output = load_tile(
            d_output_source, b, h + head, start, stride_db, stride_dh, stride_dt, T, QUERIES, V, PADDED_V, MASKED, TMA
        )
        d_v = tl.dot(p.to(d_output.dtype), d_output, d_v, input_precision="ieee")
        d_p = tl.dot(v, tl.trans(d_output), input_precision="ieee")
        d_scores = p * (d_p - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit
def _queries_of(
    key,
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
    """kernel.keys_of the other way round: the first query that sees a key, and the one behind the last."""
    if RANGES:
        first = tl.load(first_ptr + key, mask=key < S, other=0)
        end = tl.load(end_ptr + key, mask=key < S, other=0)
    else:
        first = key * 0
        end = key * 0 + T
        if CAUSAL:
            first = tl.maximum(first, key - offset)
        if WINDOWED:
            end = tl.minimum(end, tl.maximum(key - offset + window, 0))
    return first, end


@triton.jit(do_not_specialize=["offset", "window"])
def _attention_backward_keys(
    q_source,
    k_ptr,
    v_ptr,
    d_output_source,
    lse_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
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
    stride_db,
    stride_dt,
    stride_dh,
    stride_rb,
    B,
    T,
    S,
    offset,
    window,
    scale,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
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
    SLOPES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Of a block of keys and HEADS query heads: one of the PARTS = H / HEADS parts of d_k and d_v."""
    # First keys first: under a causal mask theirs is the most work.
    row = tl.program_id(0) % (B * PARTS)
    begin = tl.program_id(0) // (B * PARTS) * KEYS
    b, part = row // PARTS, row % PARTS
    h = part * HEADS
    last = tl.minimum(begin + KEYS, S) - 1
    key = begin + tl.arange(0, KEYS)

    lse_ptr += (b * (PARTS * HEADS) + h).to(tl.int64) * T
    delta_ptr += (b * (PARTS * HEADS) + h).to(tl.int64) * T
    slopes_ptr += h
    first_ptr += b.to(tl.int64) * stride_rb
    end_ptr += b.to(tl.int64) * stride_rb

    a0, a1 = _queries_of(begin, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)
    z0, z1 = _queries_of(last, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)
    first_tile, whole, end_whole, end_tile = tiles_of(a0, a1, z0, z1, QUERIES)
    first_query, end_query = _queries_of(key, first_ptr, end_ptr, T, S, offset, window, CAUSAL, WINDOWED, RANGES)

    g = h // GROUP
    k = load_tile(k_ptr, b, g, begin, stride_kb, stride_kh, stride_kt, S, KEYS, K, PADDED_K, True, False)
    v = load_tile(v_ptr, b, g, begin, stride_vb, stride_vh, stride_vt, S, KEYS, V, PADDED_V, True, False)
    scale_2 = scale * LOG2_E
    d_k = tl.zeros([KEYS, PADDED_K], dtype=tl.float32)
    d_v = tl.zeros([KEYS, PADDED_V], dtype=tl.float32)
    # fmt: off
    d_k, d_v = _accumulate_keys(
        d_k, d_v, k, v, q_source, d_output_source, lse_ptr, delta_ptr, slopes_ptr, b, h, stride_qb, stride_qt,
        stride_qh, stride_db, stride_dt, stride_dh, T, key, first_query, end_query, scale_2, offset, whole, end_whole,
        0, end_whole - whole, HEADS, K, V, PADDED_K, PADDED_V, QUERIES, SLOPES, False, TMA,
    )
    d_k, d_v = _accumulate_keys(
        d_k, d_v, k, v, q_source, d_output_source, lse_ptr, delta_ptr, slopes_ptr, b, h, stride_qb, stride_qt,
        stride_qh, stride_db, stride_dt, stride_dh, T, key, first_query, end_query, scale_2, offset, first_tile, whole,
        end_whole, whole - first_tile + end_tile - end_whole, HEADS, K, V, PADDED_K, PADDED_V, QUERIES, SLOPES, True,
        TMA,
    )
    # fmt: on
    d_k_ptr += b.to(tl.int64) * S * PARTS * K + part * K
    store_rows(d_k_ptr, d_k * scale, begin, PARTS * K, S, KEYS, K, PADDED_K)
    d_v_ptr += b.to(tl.int64) * S * PARTS * V + part * V
    store_rows(d_v_ptr, d_v, begin, PARTS * V, S, KEYS, V, PADDED_V)


def attention_delta(d_output: Tensor, output: Tensor, d_lse: Tensor | None) -> Tensor:
    """fp32 [B, H, T]: over V, the sum of d_output [B, T, H, V] times output, minus d_lse [B, H, T]."""
    B, T, H, V = output.shape
    delta = torch.empty(B, H, T, dtype=torch.float32, device=output.device)
    if delta.numel():
        _attention_delta[(triton.cdiv(T, ROWS_OF_DELTA), B * H)](
            output,
            d_output,
            delta if d_lse is None else d_lse,
            delta,
            *output.stride()[:3],
            *d_output.stride()[:3],
            T,
            H=H,
            V=V,
            PADDED_V=padded(V),
            ROWS=ROWS_OF_DELTA,
            D_LSE=d_lse is not None,
            num_warps=4,
        )
    return delta


def heads_of_a_program(num_blocks: int, num_kv_heads: int, group: int) -> int:
    """Query heads that one program of dK and dV goes through: all of a group, or fewer where that fills no GPU."""
    parts = [n for n in range(1, group + 1) if group % n == 0]
    return group // next((n for n in parts if n * num_blocks * num_kv_heads >= PROGRAMS_WANTED), group)


def attention_backward(
    d_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    slopes: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q, d_k and d_v, contiguous, of `dtypes`.

    d_output, q, k, v have one dtype and features side by side; lse and delta are contiguous fp32 [B, H, T], of these
    keys, or of more of which these are some.
    """
    if not (q.numel() and k.numel() and v.numel()):
        d_q, d_k, d_v = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) for x, dtype in zip((q, k, v), dtypes, strict=True)
        )
        return d_q, d_k, d_v
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    shared = {
        "B": B,
        "T": T,
        "S": S,
        "scale": scale,
        "GROUP": H // G,
        "K": K,
        "V": V,
        "PADDED_K": padded(K),
        "PADDED_V": padded(V),
        "SLOPES": slopes is not None,
        **mask_arguments(mask),
    }
    slopes = lse if slopes is None else slopes.contiguous()
    inputs = _Inputs(d_output, q, k, v, mask, lse, delta, slopes, shared)
    return _launch_queries(inputs, dtypes[0]), *_launch_keys(inputs, dtypes[1:])


class _Inputs(NamedTuple):
    """Of both kernels. Filled by `attention_backward`."""

    d_output: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    lse: Tensor
    delta: Tensor
    slopes: Tensor  # lse, which nobody reads, where there are none
    shared: dict[str, Any]  # arguments by name

    @property
    def strides(self) -> list[int]:
        return [stride for x in (self.q, self.k, self.v, self.d_output) for stride in x.stride()[:3]]


def _launch_queries(inputs: _Inputs, dtype: torch.dtype) -> Tensor:
    """d_q."""
    d_output, q, k, v, mask, lse, delta, slopes, shared = inputs
    d_q = torch.empty(q.shape, dtype=dtype, device=q.device)
    features = max(shared["PADDED_K"], shared["PADDED_V"])
    first, end = (lse, lse) if mask.ranges is None else (mask.ranges.first_key, mask.ranges.end_key)
    masked = mask.ranges is not None or mask.window is not None
    block = BACKWARD_QUERIES(features, q.element_size(), masked)
    (k_source, v_source), tma = described(block, block.keys, (k, shared["PADDED_K"]), (v, shared["PADDED_V"]))
    B, T, H, _ = q.shape
    _attention_backward_queries[(triton.cdiv(T, block.queries) * B * H,)](
        q,
        k_source,
        v_source,
        d_output,
        lse,
        delta,
        d_q,
        slopes,
        first,
        end,
        *inputs.strides,
        batch_stride(first),
        H=H,
        TMA=tma,
        QUERIES=block.queries,
        KEYS=block.keys,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **shared,
    )
    return d_q


def _launch_keys(inputs: _Inputs, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor]:
    """d_k and d_v."""
    d_output, q, k, v, mask, lse, delta, slopes, shared = inputs
    (B, S, G, K), H, V = k.shape, q.shape[2], v.shape[3]
    features = max(shared["PADDED_K"], shared["PADDED_V"])
    first, end = (lse, lse) if mask.ranges is None else (mask.ranges.first_query, mask.ranges.end_query)
    block = BACKWARD_KEYS(features, q.element_size())
    num_blocks = triton.cdiv(S, block.keys)
    heads = heads_of_a_program(num_blocks * B, G, H // G)
    parts = H // heads
    # Parts of one group are added up behind the kernel, always in the same order.
    d_k, d_v = (
        torch.empty(B, S, parts, size, dtype=dtype if parts == G else torch.float32, device=k.device)
        for size, dtype in ((K, dtypes[0]), (V, dtypes[1]))
    )
    sides = (q, shared["PADDED_K"]), (d_output, shared["PADDED_V"])
    (q_source, d_output_source), tma = described(block, block.queries, *sides)
    _attention_backward_keys[(num_blocks * B * parts,)](
        q_source,
        k,
        v,
        d_output_source,
        lse,
        delta,
        d_k,
        d_v,
        slopes,
        first,
        end,
        *inputs.strides,
        batch_stride(first),
        PARTS=parts,
        HEADS=heads,
        TMA=tma,
        QUERIES=block.queries,
        KEYS=block.keys,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **shared,
    )
    if parts != G:
        d_k, d_v = (x.unflatten(2, (G, -1)).sum(dim=3).to(d) for x, d in zip((d_k, d_v), dtypes, strict=True))
    return d_k, d_v
