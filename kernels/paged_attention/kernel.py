"""Paged attention in Triton: prompts, chunks of them and single tokens in one launch.

A program has a block of queries of one sequence, with the query heads that share a key/value head as rows of the same
products, so keys and values are read once for all of them. It walks over the sequence's keys, tile after tile, through
the block table. Nothing of the launch depends on what lies on the device: sequence s has at most
query_starts[s + 1] // Q - query_starts[s] // Q + 1 blocks of Q queries, so its blocks may begin at number
query_starts[s] // Q + s, there are no more than N // Q + S, and a program finds its sequence by bisection.

Letters as in op.py; scores are kept in units of log 2, so that a probability is one exp2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_FEATURES_WRITTEN = 8192


@dataclass(frozen=True)
class Block:
    """Rows (queries times the heads of a group) and keys of one product, warps of a program, tiles on their way."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def _choose(decodes: bool, features: int, itemsize: int) -> Block:
    if features > 256:  # latent attention, whose keys have 576: more would not fit into shared memory or registers
        return Block(32, 32, 8, 2) if itemsize < 4 else Block(16, 16, 8, 2)
    if decodes or itemsize == 4:
        return Block(16, 64, 4, 3) if itemsize < 4 else Block(16, 32, 4, 2)
    return Block(64, 64, 4, 3)


ATTEND = Tuned(
    (Block(16, 64, 4, 3), Block(16, 32, 4, 2), Block(64, 64, 4, 3), Block(32, 32, 8, 2), Block(16, 16, 8, 2)),
    _choose,  # (every sequence has one query, the larger of K and V padded to a power of two, bytes of a number)
)


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Arguments and result as in op.paged_attention."""
    N, H, K = q.shape
    page_size, G, V = *k_pages.shape[1:3], v_pages.shape[3]
    sequences, group = lengths.shape[0], H // G
    output = torch.zeros(N, H, V, dtype=q.dtype, device=q.device)  # padding queries keep it
    padded_k, padded_v = (max(16, triton.next_power_of_2(size)) for size in (K, V))
    block = ATTEND(sequences == N, max(padded_k, padded_v), q.element_size())
    heads = min(block.rows, triton.next_power_of_2(group))  # of a program, in rows side by side
    queries = block.rows // heads
    if N == 0 or sequences == 0:
        return output
    _attend[(N // queries + sequences, G * triton.cdiv(group, heads))](
        q,
        k_pages,
        v_pages,
        output,
        block_tables.contiguous(),
        query_starts.contiguous(),
        lengths.contiguous(),
        None if slopes is None else slopes.contiguous(),
        None if sinks is None else sinks.contiguous(),
        *q.stride(),
        *k_pages.stride(),
        *v_pages.stride(),
        block_tables.shape[1],
        sequences,
        scale * LOG2_E.value,
        0 if window is None else window,
        H,
        GROUP=group,
        K=K,
        V=V,
        PADDED_K=padded_k,
        PADDED_V=padded_v,
        PAGE_SIZE=page_size,
        HEADS=heads,
        QUERIES=queries,
        KEYS=block.keys,
        WINDOWED=window is not None,
        SLOPES=slopes is not None,
        SINKS=sinks is not None,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )
    return output


@triton.jit(do_not_specialize=["sequences", "window", "table_width"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,
    table_ptr,
    starts_ptr,
    lengths_ptr,
    slopes_ptr,
    sinks_ptr,
    stride_qn,
    stride_qh,
    stride_qk,
    stride_kp,
    stride_kt,
    stride_kg,
    stride_kk,
    stride_vp,
    stride_vt,
    stride_vg,
    stride_vv,
    table_width,
    sequences,
    scale,
    window,
    H,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SLOPES: tl.constexpr,
    SINKS: tl.constexpr,
):
    number = tl.program_id(0)
    low, high = 0, sequences  # the last sequence whose blocks begin at this number or before
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts_ptr + middle) // QUERIES + middle
        low = tl.where(begins <= number, middle, low)
        high = tl.where(begins <= number, high, middle)
    start = tl.load(starts_ptr + low)
    num_queries = tl.load(starts_ptr + low + 1) - start
    first = (number - start // QUERIES - low) * QUERIES  # of the sequence's queries
    if first < num_queries:
        length = tl.load(lengths_ptr + low)
        before = length - num_queries  # tokens of the sequence that precede the queries

        row = tl.arange(0, QUERIES * HEADS)
        query = first + row // HEADS
        kv_head = tl.program_id(1) % (H // GROUP)
        in_group = tl.program_id(1) // (H // GROUP) * HEADS + row % HEADS
        head = kv_head * GROUP + in_group
        real = (query < num_queries) & (in_group < GROUP)
        position = before + query

        feature_k, feature_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
        inside_k, inside_v = feature_k < K, feature_v < V
        token = (start + query).to(tl.int64)
        q_rows = q_ptr + token * stride_qn + head * stride_qh
        q = tl.load(q_rows[:, None] + feature_k[None, :] * stride_qk, mask=real[:, None] & inside_k[None, :], other=0.0)
        slope = tl.zeros([QUERIES * HEADS], dtype=tl.float32)
        if SLOPES:
            slope = tl.load(slopes_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2_E

        output = tl.zeros([QUERIES * HEADS, PADDED_V], dtype=tl.float32)
        total = tl.zeros([QUERIES * HEADS], dtype=tl.float32)
        top = tl.full([QUERIES * HEADS], float("-inf"), dtype=tl.float32)
        if SINKS:  # one more key, which every query sees and whose value is 0
            top = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
            total = total + 1.0

        table_ptr += tl.cast(low, tl.int64) * table_width
        first_key = 0
        if WINDOWED:
            first_key = tl.maximum(before + first + 1 - window, 0)
        end_key = before + tl.minimum(first + QUERIES, num_queries)  # what the block's last query sees
        for tile in tl.range(first_key // KEYS, tl.cdiv(end_key, KEYS)):
            key = tile * KEYS + tl.arange(0, KEYS)
            there = key < end_key
            page = tl.load(table_ptr + key // PAGE_SIZE, mask=there, other=0).to(tl.int64)
            place = key % PAGE_SIZE
            k_rows = k_ptr + page * stride_kp + place * stride_kt + kv_head * stride_kg
            k = tl.load(
                k_rows[None, :] + feature_k[:, None] * stride_kk, mask=inside_k[:, None] & there[None, :], other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if SLOPES:
                scores -= slope[:, None] * (position[:, None] - key[None, :]).to(tl.float32)
            seen = key[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a query that has seen nothing yet
            p = tl.exp2(scores - zero[:, None])
            shrink = tl.exp2(top - zero)
            total = total * shrink + tl.sum(p, axis=1)
            v_rows = v_ptr + page * stride_vp + place * stride_vt + kv_head * stride_vg
            v = tl.load(
                v_rows[:, None] + feature_v[None, :] * stride_vv, mask=there[:, None] & inside_v[None, :], other=0.0
            )
            output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
            top = new_top

        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        rows = output_ptr + (token * H + head) * V
        tl.store(
            rows[:, None] + feature_v[None, :],
            output.to(output_ptr.dtype.element_ty),
            mask=real[:, None] & inside_v[None, :],
        )


def write(k_pages: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor | None, slots: Tensor) -> None:
    """Arguments as in op.write_pages."""
    slots = slots.contiguous()
    for pages, x in ((k_pages, k), (v_pages, v)):
        if pages is None or x is None or not x.numel():
            continue
        heads, features = x.shape[1:]
        block = min(triton.next_power_of_2(heads * features), MAX_FEATURES_WRITTEN)
        _write[(x.shape[0], triton.cdiv(heads * features, block))](
            pages,
            x,
            slots,
            *pages.stride(),
            *x.stride(),
            PAGE_SIZE=pages.shape[1],
            FEATURES=features,
            SIZE=heads * features,
            BLOCK=block,
            num_warps=4,
        )


@triton.jit
def _write(
    pages_ptr,
    x_ptr,
    slots_ptr,
    stride_pp,
    stride_pt,
    stride_pg,
    stride_pk,
    stride_xn,
    stride_xg,
    stride_xk,
    PAGE_SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of keys, or of values."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    if slot >= 0:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        head, feature = element // FEATURES, element % FEATURES
        inside = element < SIZE
        x_ptr += tl.program_id(0).to(tl.int64) * stride_xn
        x = tl.load(x_ptr + head * stride_xg + feature * stride_xk, mask=inside, other=0.0)
        pages_ptr += slot // PAGE_SIZE * stride_pp + slot % PAGE_SIZE * stride_pt
        tl.store(pages_ptr + head * stride_pg + feature * stride_pk, x.to(pages_ptr.dtype.element_ty), mask=inside)
