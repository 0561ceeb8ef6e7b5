"""Products of a few rows with a large matrix in Triton: every weight is read once, and nothing else takes time.

A program has some rows of the weight and multiplies them in fp32 without tensor cores, which a few rows cannot fill.
What limits it is how soon bytes begin to flow: on Hopper a launch begins while the one before ends (programmatic
dependent launch), fetches its first tile of weights, and only then waits for x.

Behind a norm, one row of x is normalised once by each program and stays in its registers while rows of the weight pass
(`_skinny_normed_matmul`); else, and for more rows, tiles of features pass (`_skinny_matmul`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import Tuned, launches_overlap


@dataclass(frozen=True)
class Block:
    """Outputs of a program, features of a tile of its weights, warps."""

    outputs: int
    features: int
    num_warps: int


def _choose(outputs: int, features: int, rows: int) -> Block:
    if features > 8192:
        return Block(8, 1024, 4)
    return Block(2, 2048, 8) if features >= 2048 else Block(4, 1024, 4)


BLOCKS = Tuned((Block(2, 2048, 8), Block(4, 1024, 4), Block(8, 1024, 4), Block(8, 512, 4), Block(16, 256, 4)), _choose)


@dataclass(frozen=True)
class RowBlock:
    """Outputs of a program at a time, how often, warps."""

    outputs: int
    steps: int
    num_warps: int


def _choose_rows(gated: bool, crowded: bool) -> RowBlock:
    if crowded:
        return RowBlock(1, 4, 8)
    return RowBlock(1, 4, 4) if gated else RowBlock(2, 2, 4)


ROW_BLOCKS = Tuned(
    (RowBlock(1, 4, 4), RowBlock(2, 2, 4), RowBlock(1, 8, 4), RowBlock(1, 4, 8), RowBlock(2, 8, 8)), _choose_rows
)
MAX_FEATURES_HELD = 8192


def skinny(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    branch: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in op.skinny_linear; with a branch, of x + branch, which is written to stream."""
    M, features = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = x.new_empty(M, outputs)
    if not y.numel():
        if stream is not None and branch is not None:
            torch.add(x, branch, out=stream)
        return y
    branch = None if branch is None else branch.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    overlap = launches_overlap(x)
    launch = {"launch_pdl": True} if overlap else {}
    if M == 1 and norm_weight is not None and residual is None and features <= MAX_FEATURES_HELD:
        # Two rows of x besides gate and up of this step and the next: with 4 warps registers would spill.
        rows = ROW_BLOCKS(gated, branch is not None and gated and features > 4096)
        _skinny_normed_matmul[(triton.cdiv(outputs, rows.outputs * rows.steps),)](
            x.contiguous(),
            branch,
            stream,
            weight,
            norm_weight.contiguous(),
            y,
            weight.stride(0),
            outputs,
            eps,
            FEATURES=features,
            PADDED=triton.next_power_of_2(features),
            JOINS=branch is not None,
            GATED=gated,
            OUTPUTS=rows.outputs,
            STEPS=rows.steps,
            OVERLAPS=overlap,
            num_warps=rows.num_warps,
            **launch,
        )
        return y
    block = BLOCKS(outputs, features, M)
    _skinny_matmul[(triton.cdiv(outputs, block.outputs),)](
        x.contiguous(),
        branch,
        stream,
        weight,
        None if norm_weight is None else norm_weight.contiguous(),
        None if residual is None else residual.contiguous(),
        y,
        weight.stride(0),
        outputs,
        eps,
        FEATURES=features,
        ROWS=M,
        JOINS=branch is not None,
        NORMS=norm_weight is not None,
        ADDS=residual is not None,
        GATED=gated,
        OUTPUTS=block.outputs,
        TILE=min(block.features, triton.next_power_of_2(features)),
        OVERLAPS=overlap,
        num_warps=block.num_warps,
        **launch,
    )
    return y


@triton.jit
def _skinny_matmul(
    x_ptr,
    branch_ptr,
    stream_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    stride,
    num_outputs,
    eps,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    JOINS: tl.constexpr,
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    feature = tl.arange(0, TILE)
    rows = weight_ptr + output[:, None].to(tl.int64) * stride
    up_rows = rows + num_outputs.to(tl.int64) * stride
    real = output[:, None] < num_outputs
    inside = real & (feature < FEATURES)[None, :]
    w = tl.load(rows + feature[None, :], mask=inside, other=0.0)
    up = w
    if GATED:
        up = tl.load(up_rows + feature[None, :], mask=inside, other=0.0)
    if OVERLAPS:
        gdc_wait()
    # One sum of each row of x, held as rows of one tile: [ROWS] of [OUTPUTS].
    for row in tl.static_range(ROWS):
        first_x = _features(x_ptr, branch_ptr, stream_ptr, row, feature, FEATURES, JOINS)
        sums, up_sums, squares = _tile(first_x, norm_ptr, w, up, feature, FEATURES, NORMS, GATED)
        for first in tl.range(TILE, FEATURES, TILE, num_stages=1):
            here = first + feature
            inside = real & (here < FEATURES)[None, :]
            next_w = tl.load(rows + here[None, :], mask=inside, other=0.0)
            next_up = next_w
            if GATED:
                next_up = tl.load(up_rows + here[None, :], mask=inside, other=0.0)
            next_x = _features(x_ptr, branch_ptr, stream_ptr, row, here, FEATURES, JOINS)
            more, up_more, more_squares = _tile(next_x, norm_ptr, next_w, next_up, here, FEATURES, NORMS, GATED)
            sums, up_sums, squares = sums + more, up_sums + up_more, squares + more_squares
        y = tl.sum(sums, axis=1)
        up_y = tl.sum(up_sums, axis=1)
        if NORMS:
            inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / FEATURES + eps)
            y, up_y = y * inverse, up_y * inverse
        if GATED:
            y = y / (1.0 + tl.exp(-y)) * up_y
        place = row * num_outputs + output
        if ADDS:
            y += tl.load(residual_ptr + place, mask=output < num_outputs, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=output < num_outputs)
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def _features(x_ptr, branch_ptr, stream_ptr, row, feature, FEATURES: tl.constexpr, JOINS: tl.constexpr):
    """Of a row of x, or of x + branch: rounded, as it is kept, by the first program, which all others compute alike."""
    there = feature < FEATURES
    place = row * FEATURES + feature
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    if JOINS:
        x += tl.load(branch_ptr + place, mask=there, other=0.0).to(tl.float32)
        kept = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + place, kept, mask=there & (tl.program_id(0) == 0))
        x = kept.to(tl.float32)
    return x


@triton.jit
def _tile(x, norm_ptr, w, up, feature, FEATURES: tl.constexpr, NORMS: tl.constexpr, GATED: tl.constexpr):
    """Products of a tile, not yet summed, [OUTPUTS, TILE] by gate and by up, and squares of x, [TILE]."""
    squares = x * x
    if NORMS:
        x *= tl.load(norm_ptr + feature, mask=feature < FEATURES, other=0.0).to(tl.float32)
    products = w.to(tl.float32) * x[None, :]
    up_products = products
    if GATED:
        up_products = up.to(tl.float32) * x[None, :]
    return products, up_products, squares


@triton.jit
def _skinny_normed_matmul(
    x_ptr,
    branch_ptr,
    stream_ptr,
    weight_ptr,
    norm_ptr,
    y_ptr,
    stride,
    num_outputs,
    eps,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    JOINS: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Of one row of x."""
    feature = tl.arange(0, PADDED)
    there = feature < FEATURES
    first = tl.program_id(0) * (OUTPUTS * STEPS) + tl.arange(0, OUTPUTS)
    w, up = _rows_of(weight_ptr, first, feature, stride, num_outputs, FEATURES, GATED)
    norm = tl.load(norm_ptr + feature, mask=there, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
    x = _features(x_ptr, branch_ptr, stream_ptr, 0, feature, FEATURES, JOINS)
    x = x * norm / tl.sqrt_rn(tl.sum(x * x, axis=0) / FEATURES + eps)
    for step in tl.static_range(STEPS):
        output = first + step * OUTPUTS
        next_w, next_up = w, up
        if step + 1 < STEPS:  # on their way while these are multiplied
            next_w, next_up = _rows_of(weight_ptr, output + OUTPUTS, feature, stride, num_outputs, FEATURES, GATED)
        y = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
        if GATED:
            y = y / (1.0 + tl.exp(-y)) * tl.sum(up.to(tl.float32) * x[None, :], axis=1)
        tl.store(y_ptr + output, y.to(y_ptr.dtype.element_ty), mask=output < num_outputs)
        w, up = next_w, next_up
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def _rows_of(weight_ptr, output, feature, stride, num_outputs, FEATURES: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight by output, and with a gate those beside them."""
    inside = (output < num_outputs)[:, None] & (feature < FEATURES)[None, :]
    places = output[:, None].to(tl.int64) * stride + feature[None, :]
    w = tl.load(weight_ptr + places, mask=inside, other=0.0)
    up = w
    if GATED:
        up = tl.load(weight_ptr + num_outputs.to(tl.int64) * stride + places, mask=inside, other=0.0)
    return w, up
