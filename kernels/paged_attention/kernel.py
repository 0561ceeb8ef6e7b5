"""Paged attention in Triton: prompts, chunks of them and single tokens in one launch.

A program has a block of queries of one sequence, with the query heads that share a key/value head as rows of the same
products, so keys and values are read once for all of them. It walks over the sequence's keys, tile after tile, through
the block table. Nothing of the launch depends on what lies on the device: sequence s has at most
query_starts[s + 1] // Q - query_starts[s] // Q + 1 blocks of Q queries, so its blocks may begin at number
query_starts[s] // Q + s, there are no more than N // Q + S, and a program finds its sequence by bisection; when
decoding, the number is the sequence.

Few sequences would leave most of a GPU idle, so their keys are split over several programs, whose results a second
kernel merges by their log-sum-exps (Flash-Decoding).

Letters as in op.py; scores are kept in units of log 2, so that a probability is one exp2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import Tuned, launches_overlap, num_multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_FEATURES = 32  # Hopper's warp-group products are wrong with 16 features of a value and 64 keys (docs/LOG.md)
MAX_SPLITS = 32
PROGRAMS_PER_SM = 4
"""That splitting keys aims at."""


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
        return Block(16, 64, 2, 3) if itemsize < 4 else Block(16, 32, 4, 2)
    return Block(64, 64, 4, 3)


ATTEND = Tuned(
    (
        Block(16, 64, 2, 3),
        Block(16, 64, 4, 3),
        Block(16, 32, 4, 2),
        Block(64, 64, 4, 3),
        Block(32, 32, 8, 2),
        Block(16, 16, 8, 2),
    ),
    _choose,  # (every sequence has one query, the larger of K and V padded to a power of two, bytes of a number)
)


def _invariant(features: int, itemsize: int) -> Block:
    """The one block for all queries: a query's instructions and their order do not depend on how many others there are.

    Tiles of keys that a query does not see change nothing in its sums, to the bit: they add 0 and multiply by 1.
    """
    if features > 256:
        return Block(32, 32, 8, 2) if itemsize < 4 else Block(16, 16, 8, 2)
    return Block(64, 64, 4, 3) if itemsize < 4 else Block(16, 32, 4, 2)


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
    splits: int | None,
    decodes: bool,
    batch_invariant: bool,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in op.paged_attention."""
    N, H, K = q.shape
    page_size, G, V = *k_pages.shape[1:3], v_pages.shape[3]
    sequences, group = lengths.shape[0], H // G
    if N == 0 or sequences == 0:
        return q.new_zeros(N, H, V)
    padded_k, padded_v = (max(MIN_FEATURES, triton.next_power_of_2(size)) for size in (K, V))
    features, itemsize = max(padded_k, padded_v), q.element_size()
    block = _invariant(features, itemsize) if batch_invariant else ATTEND(decodes, features, itemsize)
    splits = 1 if batch_invariant else splits
    heads = min(block.rows, triton.next_power_of_2(group))  # of a program, in rows side by side
    queries = block.rows // heads
    programs = (N if decodes else N // queries + sequences) * G * triton.cdiv(group, heads)
    splits = _choose_splits(programs, block_tables.shape[1] * page_size, q) if splits is None else splits
    output = q.new_empty(N, H, V)
    parts, lse = output, output
    if splits > 1:
        parts = q.new_empty(N, H, splits, V, dtype=torch.float32)
        lse = q.new_empty(N, H, splits, dtype=torch.float32)
    if not decodes:  # padding queries are in no program
        output.zero_() if splits == 1 else lse.fill_(float("-inf"))
    overlap = {"launch_pdl": True} if decodes and launches_overlap(q) else {}
    _paged_attention[(programs // (G * triton.cdiv(group, heads)), G * triton.cdiv(group, heads), splits)](
        q,
        k_pages,
        v_pages,
        parts,
        lse,
        block_tables.contiguous(),
        query_starts.contiguous(),
        lengths.contiguous(),
        None if slopes is None else slopes.contiguous(),
        None if sinks is None else sinks.contiguous(),
        k_scales,
        v_scales,
        *q.stride(),
        *k_pages.stride(),
        *v_pages.stride(),
        *((0, 0, 0) if k_scales is None else k_scales.stride()),
        *((0, 0, 0) if v_scales is None else v_scales.stride()),
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
        DECODES=decodes,
        SPLITS=splits,
        WINDOWED=window is not None,
        SLOPES=slopes is not None,
        SINKS=sinks is not None,
        QUANTIZED=k_scales is not None,
        OVERLAPS=bool(overlap),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        **overlap,
    )
    if splits > 1:
        _paged_attention_merge[(N * H,)](
            parts, lse, output, V=V, PADDED_V=padded_v, SPLITS=splits, OVERLAPS=bool(overlap), num_warps=1, **overlap
        )
    return output


def _choose_splits(programs: int, max_keys: int, q: Tensor) -> int:
    """Programs that share the keys of a sequence: a power of two, 1 where there are programs enough without."""
    wanted = PROGRAMS_PER_SM * num_multiprocessors(q.device) // programs
    splits = min(wanted, MAX_SPLITS, max_keys // 16)
    return 1 << (splits.bit_length() - 1) if splits > 1 else 1


@triton.jit(do_not_specialize=["sequences", "window", "table_width"])
def _paged_attention(
    q_ptr, k_ptr, v_ptr, output_ptr, lse_ptr, table_ptr, starts_ptr, lengths_ptr, slopes_ptr, sinks_ptr,
    k_scales_ptr, v_scales_ptr,
    stride_qn, stride_qh, stride_qk,
    stride_kp, stride_kt, stride_kg, stride_kk,
    stride_vp, stride_vt, stride_vg, stride_vv,
    stride_ksp, stride_kst, stride_ksg,
    stride_vsp, stride_vst, stride_vsg,
    table_width, sequences, scale, window, H,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DECODES: tl.constexpr,
    SPLITS: tl.constexpr, WINDOWED: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, QUANTIZED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    sequence, start, num_queries, first = _whose_block(starts_ptr, sequences, QUERIES, DECODES)
    if first < num_queries:
        before = tl.load(lengths_ptr + sequence) - num_queries  # tokens of the sequence that precede the queries
        query, kv_head, head, real = _rows(first, num_queries, H, GROUP, HEADS, QUERIES)
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
        top, total = _nothing_seen(sinks_ptr, head, real, SINKS, QUERIES * HEADS)

        table_ptr += tl.cast(sequence, tl.int64) * table_width
        end_key = before + tl.minimum(first + QUERIES, num_queries)  # what the block's last query sees
        first_tile, end_tile = _tiles(before + first, end_key, window, KEYS, SPLITS, WINDOWED)
        for tile in tl.range(first_tile, end_tile):
            key = tile * KEYS + tl.arange(0, KEYS)
            there = key < end_key
            page = tl.load(table_ptr + key // PAGE_SIZE, mask=there, other=0).to(tl.int64)
            place = key % PAGE_SIZE
            k_rows = k_ptr + page * stride_kp + place * stride_kt + kv_head * stride_kg
            at = page * stride_ksp + place * stride_kst + kv_head * stride_ksg
            scores = _scores(
                q, k_rows, k_scales_ptr, at, feature_k * stride_kk, inside_k, there, scale, QUANTIZED
            )  # fmt: skip
            scores = _masked(scores, key, position, slope, window, SLOPES, WINDOWED)
            p, shrink, top, total = _probabilities(scores, top, total)
            v_rows = v_ptr + page * stride_vp + place * stride_vt + kv_head * stride_vg
            at = page * stride_vsp + place * stride_vst + kv_head * stride_vsg
            output = _with_values(
                output, shrink, p, v_rows, v_scales_ptr, at, feature_v * stride_vv, inside_v, there, q.dtype, QUANTIZED
            )  # fmt: skip

        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        place = token * H + head
        if SPLITS > 1:
            place = place * SPLITS + tl.program_id(2)
            tl.store(lse_ptr + place, top + tl.log2(total), mask=real)
        tl.store(
            output_ptr + place[:, None] * V + feature_v[None, :],
            output.to(output_ptr.dtype.element_ty),
            mask=real[:, None] & inside_v[None, :],
        )


@triton.jit
def _rows(first, num_queries, H, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """Of a program's rows: queries, by number in their sequence, the key/value head of all, heads, and which exist."""
    row = tl.arange(0, QUERIES * HEADS)
    query = first + row // HEADS
    kv_head = tl.program_id(1) % (H // GROUP)
    in_group = tl.program_id(1) // (H // GROUP) * HEADS + row % HEADS
    return query, kv_head, kv_head * GROUP + in_group, (query < num_queries) & (in_group < GROUP)


@triton.jit
def _nothing_seen(sinks_ptr, head, real, SINKS: tl.constexpr, ROWS: tl.constexpr):
    """The largest score and the sum of exponentials of each row, before any key."""
    total = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    if SINKS:  # one more key, which every query sees and whose value is 0
        holds_it = tl.program_id(2) == 0
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        top, total = tl.where(holds_it, sink, top), tl.where(holds_it, total + 1.0, total)
    return top, total


@triton.jit
def _tiles(position, end_key, window, KEYS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr):
    """Tiles of keys of a program, first and end; position: of its first query."""
    first_tile = 0
    if WINDOWED:
        first_tile = tl.maximum(position + 1 - window, 0) // KEYS
    end_tile = tl.cdiv(end_key, KEYS)
    if SPLITS > 1:
        share = tl.cdiv(end_tile - first_tile, SPLITS)
        first_tile += tl.program_id(2) * share
        end_tile = tl.minimum(end_tile, first_tile + share)
    return first_tile, end_tile


@triton.jit
def _scores(q, rows, scales_ptr, at, offsets, inside, there, scale, QUANTIZED: tl.constexpr):
    """Products of queries with a tile of keys. rows: pointers to keys, offsets: of their features; at: of their
    scales."""
    k = tl.load(rows[None, :] + offsets[:, None], mask=inside[:, None] & there[None, :], other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if QUANTIZED:  # a product with codes, times the scale of each key: dequantised without a tile of its own
        scores *= tl.load(scales_ptr + at, mask=there, other=0.0)[None, :]
    return scores


@triton.jit
def _masked(scores, key, position, slope, window, SLOPES: tl.constexpr, WINDOWED: tl.constexpr):
    """Scores with ALiBi; -inf of keys that a query does not see."""
    if SLOPES:
        scores -= slope[:, None] * (position[:, None] - key[None, :]).to(tl.float32)
    seen = key[None, :] <= position[:, None]
    if WINDOWED:
        seen = seen & (key[None, :] > position[:, None] - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _probabilities(scores, top, total):
    """Exponentials of a tile's scores, what earlier sums have to be multiplied by, and the new top and total."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a query that has seen nothing yet
    p = tl.exp2(scores - zero[:, None])
    shrink = tl.exp2(top - zero)
    return p, shrink, new_top, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _with_values(
    output, shrink, p, rows, scales_ptr, at, offsets, inside, there, dtype: tl.constexpr, QUANTIZED: tl.constexpr
):  # fmt: skip
    """output times shrink, and what a tile's values add to it by p. Pointers as of `_scores`."""
    v = tl.load(rows[:, None] + offsets[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if QUANTIZED:
        v_scale = tl.load(scales_ptr + at, mask=there, other=0.0)
        if dtype == tl.float16:  # a probability times a scale may be too small for it
            v = v.to(tl.float32) * v_scale[:, None]
        else:
            p = p * v_scale[None, :]
    v = v.to(dtype)
    return tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")


@triton.jit
def _whose_block(starts_ptr, sequences, QUERIES: tl.constexpr, DECODES: tl.constexpr):
    """Of a program's block of queries: its sequence, where that begins, its number of queries, the block's first."""
    number = tl.program_id(0)
    if DECODES:
        return number, number, 1, 0
    low, high = 0, sequences  # the last sequence whose blocks begin at this number or before
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts_ptr + middle) // QUERIES + middle
        low = tl.where(begins <= number, middle, low)
        high = tl.where(begins <= number, high, middle)
    start = tl.load(starts_ptr + low)
    return low, start, tl.load(starts_ptr + low + 1) - start, (number - start // QUERIES - low) * QUERIES


@triton.jit
def _paged_attention_merge(
    parts_ptr,
    lse_ptr,
    output_ptr,
    V: tl.constexpr,
    PADDED_V: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One head of one token: parts weighted by their shares of the sum of exponentials. No part at all: 0."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64)
    split, feature = tl.arange(0, SPLITS), tl.arange(0, PADDED_V)
    lse = tl.load(lse_ptr + place * SPLITS + split)
    top = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    parts = tl.load(
        parts_ptr + (place * SPLITS + split[:, None]) * V + feature[None, :],
        mask=(feature < V)[None, :] & (weight > 0.0)[:, None],
        other=0.0,
    )
    output = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + place * V + feature, output.to(output_ptr.dtype.element_ty), mask=feature < V)
