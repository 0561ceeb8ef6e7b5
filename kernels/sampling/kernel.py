"""Sampling in Triton: logits are read once, and for a row that is drawn one block of them a second time.

A first launch finds the largest logit and the sums of exponentials of each block of the vocabulary; a second one, one
program for each row, merges these, finds the block in which a row's share of the whole ends, and the token within it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.philox.reference import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, stream_id
from kernels.sampling.reference import STREAMS

BLOCKS = Tuned((4096, 1024, 8192), lambda vocab_size: 4096)
"""Words of a program."""

MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(x) for x in MULTIPLIERS)
INCREMENT_0, INCREMENT_1 = (tl.constexpr(x) for x in KEY_INCREMENTS)
NUM_ROUNDS = tl.constexpr(ROUNDS)
HIGH, LOW = (tuple(tl.constexpr(stream_id(s) >> shift & 0xFFFFFFFF) for shift in (0, 32)) for s in STREAMS)
HIGH_0, HIGH_1, LOW_0, LOW_1 = *HIGH, *LOW


def sample(logits: Tensor, temperature: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and result as in op.sample_tokens."""
    R, V = logits.shape
    block = BLOCKS(V)
    blocks = triton.cdiv(V, block)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tops, sums, warm_sums = (logits.new_empty(R, blocks, dtype=torch.float32) for _ in range(3))
    places = logits.new_empty(R, blocks, dtype=torch.int32)
    tokens = logits.new_empty(R, dtype=torch.int64)
    logprobs = logits.new_empty(R, dtype=torch.float32)
    if R == 0:
        return tokens, logprobs
    draws = temperature is not None
    temperature, index = (x if x is None else x.contiguous() for x in (temperature, index))
    _sampling_blocks[(blocks, R)](
        logits, temperature, tops, sums, warm_sums, places, logits.stride(0), V, DRAWS=draws, BLOCK=block, num_warps=8
    )
    _sampling_rows[(R,)](
        logits,
        temperature,
        index,
        tops,
        sums,
        warm_sums,
        places,
        tokens,
        logprobs,
        logits.stride(0),
        V,
        blocks,
        DRAWS=draws,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=8,
    )
    return tokens, logprobs


@triton.jit
def _sampling_blocks(
    logits_ptr,
    temperature_ptr,
    tops_ptr,
    sums_ptr,
    warm_sums_ptr,
    places_ptr,
    stride,
    V,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + word, mask=word < V, other=float("-inf")).to(tl.float32)
    top = tl.max(logits, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    place = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(tops_ptr + place, top)
    tl.store(sums_ptr + place, tl.sum(tl.exp(logits - base), axis=0))
    tl.store(places_ptr + place, tl.min(tl.where(logits == top, word, V), axis=0))
    if DRAWS:
        temperature = tl.load(temperature_ptr + row)
        temperature = tl.where(temperature > 0.0, temperature, 1.0)
        tl.store(warm_sums_ptr + place, tl.sum(tl.exp((logits - base) / temperature), axis=0))


@triton.jit
def _sampling_rows(
    logits_ptr,
    temperature_ptr,
    index_ptr,
    tops_ptr,
    sums_ptr,
    warm_sums_ptr,
    places_ptr,
    tokens_ptr,
    logprobs_ptr,
    stride,
    V,
    num_blocks,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    there = block < num_blocks
    places = row * num_blocks + block
    tops = tl.load(tops_ptr + places, mask=there, other=float("-inf"))
    top = tl.max(tops, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(sums_ptr + places, mask=there, other=0.0) * tl.exp(tops - base), axis=0)
    token = tl.min(tl.where(tops == top, tl.load(places_ptr + places, mask=there, other=V), V), axis=0)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row)
        warm = tl.where(temperature > 0.0, temperature, 1.0)
        sums = tl.load(warm_sums_ptr + places, mask=there, other=0.0).to(tl.float64)
        sums = sums * tl.exp((tops - base) / warm).to(tl.float64)
        cumulative = tl.cumsum(sums, axis=0)
        number = tl.load(index_ptr + row)
        share = (_uniform(number, HIGH_0, HIGH_1) + _uniform(number, LOW_0, LOW_1) * 5.9604644775390625e-08) * tl.sum(
            sums, axis=0
        )
        # The first block whose end lies beyond the share; the last that has anything, should rounding leave none.
        last = tl.max(tl.where(sums > 0.0, block, 0), axis=0)
        mine = tl.minimum(tl.min(tl.where(cumulative > share, block, BLOCKS), axis=0), last)
        before = tl.sum(tl.where(block < mine, sums, 0.0), axis=0)
        word = mine * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + word, mask=word < V, other=float("-inf")).to(tl.float32)
        p = tl.exp((logits - base) / warm).to(tl.float64)
        found = tl.min(tl.where(before + tl.cumsum(p, axis=0) > share, word, V), axis=0)
        found = tl.minimum(found, tl.max(tl.where(p > 0.0, word, 0), axis=0))
        token = tl.where(temperature > 0.0, found, token)
    token = tl.minimum(token, V - 1)  # a row of NaN finds none
    logit = tl.load(logits_ptr + row * stride + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logit - base - tl.log(total))


@triton.jit
def _uniform(index, STREAM_0: tl.constexpr, STREAM_1: tl.constexpr):
    """kernels.philox.uniform(0, stream, index), fp64."""
    c0, c1 = (index & 0xFFFFFFFF).to(tl.uint32), ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = tl.full([], STREAM_0, tl.uint32), tl.full([], STREAM_1, tl.uint32)
    k0, k1 = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)
    m0, m1 = tl.full([], MULTIPLIER_0, tl.uint32), tl.full([], MULTIPLIER_1, tl.uint32)
    i0, i1 = tl.full([], INCREMENT_0, tl.uint32), tl.full([], INCREMENT_1, tl.uint32)
    for _ in tl.static_range(NUM_ROUNDS):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + i0, k1 + i1
    return (c0 >> 8).to(tl.float64) * 5.9604644775390625e-08
