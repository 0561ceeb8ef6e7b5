"""Permutation by expert in Triton.

The order is a counting sort: the choices of a block are counted by expert, a running sum over (expert, block) says
where a block's choices of an expert start, and their order within the block is theirs. So it is stable, without atomic
additions, and no size is known to the host. Rows are then only gathered: a program per row or per token.

T tokens, k choices each, N = T k, E experts, M rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.moe_permute.reference import num_rows


@dataclass(frozen=True)
class Block:
    """Features of a row that are read at a time, at most, and warps."""

    columns: int
    num_warps: int


BLOCKS = Tuned(
    (Block(1024, 4), Block(2048, 4), Block(2048, 8), Block(4096, 8)),
    lambda num_features: Block(2048, 4) if num_features > 1024 else Block(1024, 4),
)
SORTED_AT_ONCE = 8192
"""Elements of the tile [choices, experts] that a program counts in."""
CLEARED_AT_ONCE = 64
"""Rows that a program looks at for those without a choice."""


@triton.jit
def _membership(experts_ptr, num_choices, num_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """(numbers [BLOCK] of this program's choices, [BLOCK, EXPERTS] int32: 1 where choice n is of expert e)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + n, mask=n < num_choices, other=-1)
    e = tl.arange(0, EXPERTS)
    return n, ((expert[:, None] == e[None, :]) & (e < num_experts)[None, :]).to(tl.int32)


@triton.jit
def _moe_count(
    experts_ptr, counts_ptr, num_choices, num_experts, num_blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """counts [E, blocks]."""
    _, member = _membership(experts_ptr, num_choices, num_experts, BLOCK, EXPERTS)
    e = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + e * num_blocks + tl.program_id(0), tl.sum(member, axis=0), mask=e < num_experts)


@triton.jit
def _moe_place(
    experts_ptr,
    counts_ptr,
    running_ptr,  # inclusive running sum of counts
    choice_of_row_ptr,
    row_of_choice_ptr,
    ends_ptr,
    num_choices,
    num_experts,
    num_blocks,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    n, member = _membership(experts_ptr, num_choices, num_experts, BLOCK, EXPERTS)
    e = tl.arange(0, EXPERTS)
    exists = e < num_experts
    # Of all choices: those of the experts before, and of this one as well.
    before = tl.load(running_ptr + e * num_blocks - 1, mask=exists & (e > 0), other=0)
    after = tl.load(running_ptr + (e + 1) * num_blocks - 1, mask=exists, other=0)
    padded = tl.where(exists, (after - before + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE, 0)
    ends = tl.cumsum(padded, axis=0)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + e, ends, mask=exists)
    here = e * num_blocks + tl.program_id(0)
    earlier = tl.load(running_ptr + here, mask=exists, other=0) - tl.load(counts_ptr + here, mask=exists, other=0)
    start = ends - padded + earlier - before
    rank = tl.cumsum(member, axis=0) - member
    row = tl.sum(member * (rank + start[None, :]), axis=1)
    chosen = tl.sum(member, axis=1) > 0
    tl.store(row_of_choice_ptr + n, tl.where(chosen, row, -1), mask=n < num_choices)
    tl.store(choice_of_row_ptr + row, n, mask=chosen)


@triton.jit
def _moe_gather(x_ptr, choice_of_row_ptr, rows_ptr, num_features, K: tl.constexpr, BLOCK: tl.constexpr):
    """Row r is the token of its choice, or 0."""
    r = tl.program_id(0).to(tl.int64)
    choice = tl.load(choice_of_row_ptr + r)
    token = (choice // K).to(tl.int64)
    for start in tl.range(0, num_features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < num_features
        x = tl.load(x_ptr + token * num_features + d, mask=inside & (choice >= 0), other=0.0)
        tl.store(rows_ptr + r * num_features + d, x, mask=inside)


@triton.jit
def _moe_combine(
    rows_ptr,
    weights_ptr,
    row_of_choice_ptr,
    y_ptr,
    num_features,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over a token's choices, in their order and in fp32."""
    token = tl.program_id(0).to(tl.int64)
    for start in tl.range(0, num_features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < num_features
        total = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(K):
            r = tl.load(row_of_choice_ptr + token * K + j).to(tl.int64)
            row = tl.load(rows_ptr + r * num_features + d, mask=inside & (r >= 0), other=0.0).to(tl.float32)
            if WEIGHTED:
                row *= tl.load(weights_ptr + token * K + j).to(tl.float32)
            total += row
        tl.store(y_ptr + token * num_features + d, total, mask=inside)


@triton.jit
def _moe_combine_backward(
    d_y_ptr,
    rows_ptr,
    weights_ptr,
    choice_of_row_ptr,
    row_of_choice_ptr,
    d_rows_ptr,
    d_weights_ptr,
    num_tokens,
    num_rows,
    num_features,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CLEARED: tl.constexpr,
):
    """The first programs have a token each, and with it the rows of its choices; the others clear rows of no choice."""
    if tl.program_id(0) < num_tokens:
        token = tl.program_id(0).to(tl.int64)
        for j in range(K):
            r = tl.load(row_of_choice_ptr + token * K + j).to(tl.int64)
            weight = tl.load(weights_ptr + token * K + j).to(tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            for start in tl.range(0, num_features, BLOCK):
                d = start + tl.arange(0, BLOCK)
                inside = (d < num_features) & (r >= 0)
                d_y = tl.load(d_y_ptr + token * num_features + d, mask=inside, other=0.0).to(tl.float32)
                row = tl.load(rows_ptr + r * num_features + d, mask=inside, other=0.0).to(tl.float32)
                tl.store(d_rows_ptr + r * num_features + d, d_y * weight, mask=inside)
                total += d_y * row
            tl.store(d_weights_ptr + token * K + j, tl.sum(total))
    else:
        first = (tl.program_id(0) - num_tokens).to(tl.int64) * CLEARED
        several = first + tl.arange(0, CLEARED)
        if tl.min(tl.load(choice_of_row_ptr + several, mask=several < num_rows, other=0)) < 0:
            for i in range(CLEARED):
                r = first + i
                if tl.load(choice_of_row_ptr + r, mask=r < num_rows, other=0) < 0:
                    for start in tl.range(0, num_features, BLOCK):
                        d = start + tl.arange(0, BLOCK)
                        zeros = tl.zeros((BLOCK,), tl.float32)
                        tl.store(d_rows_ptr + r * num_features + d, zeros, mask=d < num_features)


def sort_by_expert(experts: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """(choice_of_row [M], row_of_choice [N], ends [E]) int32 of experts [N]."""
    num_choices, device = experts.shape[0], experts.device
    width = triton.next_power_of_2(num_experts)
    block = max(16, SORTED_AT_ONCE // width)
    num_blocks = max(1, triton.cdiv(num_choices, block))
    counts = torch.empty(num_experts * num_blocks, dtype=torch.int32, device=device)
    choice_of_row = torch.full((num_rows(num_choices, num_experts, multiple),), -1, dtype=torch.int32, device=device)
    row_of_choice = torch.empty(num_choices, dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    sizes = (num_choices, num_experts, num_blocks)
    _moe_count[(num_blocks,)](experts, counts, *sizes, BLOCK=block, EXPERTS=width)
    running = counts.cumsum(0, dtype=torch.int32)
    _moe_place[(num_blocks,)](
        experts,
        counts,
        running,
        choice_of_row,
        row_of_choice,
        ends,
        *sizes,
        MULTIPLE=multiple,
        BLOCK=block,
        EXPERTS=width,
    )
    return choice_of_row, row_of_choice, ends


def _settings(num_features: int) -> dict[str, int]:
    block = BLOCKS(num_features)
    columns = min(block.columns, max(16, triton.next_power_of_2(num_features)))
    return {"BLOCK": columns, "num_warps": block.num_warps}


def gather(x: Tensor, choice_of_row: Tensor, k: int) -> Tensor:
    """rows [M, D] of x [T, D]."""
    rows = x.new_empty(choice_of_row.shape[0], x.shape[1])
    if rows.numel():
        _moe_gather[(rows.shape[0],)](x, choice_of_row, rows, x.shape[1], K=k, **_settings(x.shape[1]))
    return rows


def combine(rows: Tensor, weights: Tensor | None, row_of_choice: Tensor, k: int) -> Tensor:
    """Sums [T, D] of rows [M, D], with weights [T, k] or without."""
    y = rows.new_empty(row_of_choice.shape[0] // k, rows.shape[1])
    if y.numel():
        _moe_combine[(y.shape[0],)](
            rows,
            rows if weights is None else weights,
            row_of_choice,
            y,
            rows.shape[1],
            K=k,
            WEIGHTED=weights is not None,
            **_settings(rows.shape[1]),
        )
    return y


def combine_backward(
    d_y: Tensor, rows: Tensor, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_rows [M, D], d_weights [T, k])."""
    d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
    if grid := weights.shape[0] + triton.cdiv(rows.shape[0], CLEARED_AT_ONCE):
        _moe_combine_backward[(grid,)](
            d_y,
            rows,
            weights,
            choice_of_row,
            row_of_choice,
            d_rows,
            d_weights,
            weights.shape[0],
            rows.shape[0],
            rows.shape[1],
            K=weights.shape[1],
            CLEARED=CLEARED_AT_ONCE,
            **_settings(rows.shape[1]),
        )
    return d_rows, d_weights
