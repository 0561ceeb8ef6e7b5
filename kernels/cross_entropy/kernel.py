"""Cross entropy in Triton: a program per row of logits, with the softmax's sum found in one pass over it.

A program keeps a running maximum and sum per column of its tile, and joins them at the end of the row: within the loop
no value crosses threads. A row of 131072 words has 256 KiB, more than a multiprocessor holds; where the gradient
follows in the same launch, the second reading goes backwards through the row, so that it finds in the L2 cache what was
read last, and is over the same memory as the writing.

N rows, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned


@dataclass(frozen=True)
class Tile:
    """Of one row, [rows, columns] consecutive elements are read at a time; rows share their running maximum."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int  # tiles under way at once; 1: no copies through shared memory

    @property
    def constants(self) -> dict[str, int]:
        """As kernels take it."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "STAGES": self.num_stages, "num_warps": self.num_warps}


def _choose(num_words: int, gradient: bool) -> Tile:
    """gradient: it is written in the same launch."""
    if num_words <= 1024:
        return Tile(1, 1024, 4, 1)
    if gradient and num_words > 16384:
        return Tile(4, 4096, 16, 1)
    return Tile(2, 2048, 8, 1) if num_words <= 65536 else Tile(4, 2048, 8, 2)


TILES = Tuned(
    (Tile(1, 1024, 4, 1), Tile(2, 2048, 8, 1), Tile(4, 2048, 8, 2), Tile(4, 4096, 16, 1), Tile(2, 8192, 32, 2)),
    _choose,
)
SCALING_BLOCK = 4096


@triton.jit
def _row_statistics(
    row_ptr, num_words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PLAIN_SUM: tl.constexpr
):
    """(maximum, sum of exp(x - maximum), sum of x or 0) of a row."""
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Finite, so that a column of nothing but -inf has -inf - maximum = -inf, and not NaN.
    maximum = tl.full((COLUMNS,), -1e38, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    plain = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, num_words, ROWS * COLUMNS, num_stages=STAGES):
        word = start + within
        x = tl.load(row_ptr + word, mask=word < num_words, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        if PLAIN_SUM:
            plain += tl.sum(tl.where(word < num_words, x, 0.0), axis=0)
        higher = tl.maximum(maximum, tl.max(x, axis=0))
        terms = tl.exp2((x - higher[None, :]) * 1.4426950408889634)
        total = total * tl.exp2((maximum - higher) * 1.4426950408889634) + tl.sum(terms, axis=0)
        maximum = higher
    highest = tl.max(maximum)
    total = tl.sum(total * tl.exp2((maximum - highest) * 1.4426950408889634))
    return highest, total, tl.sum(plain)


@triton.jit
def _write_gradient(
    row_ptr,
    d_row_ptr,
    num_words,
    label,
    lse,
    weight,
    target,
    rest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """weight softmax(x) - target at the label - rest everywhere; from the row's end to its start."""
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tiles = tl.cdiv(num_words, ROWS * COLUMNS)
    for number in tl.range(0, tiles, num_stages=STAGES):
        word = (tiles - 1 - number) * (ROWS * COLUMNS) + within
        inside = word < num_words
        x = tl.load(row_ptr + word, mask=inside, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        softmax = tl.exp2((x - lse) * 1.4426950408889634)
        d = softmax * weight - tl.where(word == label, target + rest, rest)
        tl.store(d_row_ptr + word, d, mask=inside)


@triton.jit
def _write_zeros(d_row_ptr, num_words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    zeros = tl.zeros((ROWS, COLUMNS), tl.float32).to(d_row_ptr.dtype.element_ty)
    for start in tl.range(0, num_words, ROWS * COLUMNS):
        tl.store(d_row_ptr + start + within, zeros, mask=start + within < num_words)


@triton.jit
def _cross_entropy_forward(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    lse_ptr,
    scale_ptr,
    num_words,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Loss and log-sum-exp of a row; with GRADIENT, scale times the loss's gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            _write_zeros(row_ptr, num_words, ROWS, COLUMNS)
    else:
        # Before anything is written; a label that is no word has been reported, and must not be read.
        at_label = tl.load(row_ptr + label, mask=(label >= 0) & (label < num_words), other=0.0).to(tl.float32)
        highest, total, plain = _row_statistics(row_ptr, num_words, ROWS, COLUMNS, STAGES, SMOOTH)
        lse = highest + tl.log(total)
        loss = lse - at_label
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * (lse - plain / num_words)
        tl.store(losses_ptr + row, loss + z_loss * lse * lse)
        tl.store(lse_ptr + row, lse)
        if GRADIENT:
            scale = tl.load(scale_ptr)
            weight = scale * (1.0 + 2.0 * z_loss * lse)
            target, rest = scale * (1.0 - smoothing), scale * smoothing / num_words
            _write_gradient(
                row_ptr, row_ptr, num_words, label, lse, weight, target, rest, ROWS, COLUMNS, STAGES
            )  # fmt: skip


@triton.jit
def _cross_entropy_gradient(
    logits_ptr,
    d_logits_ptr,  # may be logits_ptr
    labels_ptr,
    lse_ptr,
    grad_ptr,
    num_words,
    stride,
    d_stride,
    first,
    ignore_index,
    smoothing,
    z_loss,
    grad_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of a row's loss times its grad, from its log-sum-exp. Words are numbered from `first`."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    d_row_ptr = d_logits_ptr + row * d_stride
    if label == ignore_index:
        _write_zeros(d_row_ptr, num_words, ROWS, COLUMNS)
    else:
        lse, grad = tl.load(lse_ptr + row), tl.load(grad_ptr + row * grad_stride)
        weight = grad * (1.0 + 2.0 * z_loss * lse)
        target, rest = grad * (1.0 - smoothing), grad * smoothing / num_words
        row_ptr = logits_ptr + row * stride
        _write_gradient(
            row_ptr, d_row_ptr, num_words, label - first, lse, weight, target, rest, ROWS, COLUMNS, STAGES
        )  # fmt: skip


@triton.jit
def _cross_entropy_shard_statistics(
    logits_ptr,
    labels_ptr,
    statistics_ptr,  # [4, N]
    num_rows,
    num_words,
    stride,
    first,
    ignore_index,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    place = label - first
    here = (label != ignore_index) & (place >= 0) & (place < num_words)
    at_label = tl.load(row_ptr + place, mask=here, other=0.0).to(tl.float32)
    highest, total, _ = _row_statistics(row_ptr, num_words, ROWS, COLUMNS, STAGES, False)
    tl.store(statistics_ptr + row, highest)
    tl.store(statistics_ptr + num_rows + row, total)
    tl.store(statistics_ptr + 2 * num_rows + row, at_label)
    tl.store(statistics_ptr + 3 * num_rows + row, here.to(tl.float32))


@triton.jit
def _cross_entropy_scale_rows(x_ptr, factor_ptr, num_words, stride, BLOCK: tl.constexpr):
    """Rows times their factors, in place. A factor of 1 costs no memory traffic."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor == 1.0:
        return
    for start in tl.range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + word, mask=word < num_words, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * stride + word, x * factor, mask=word < num_words)


def forward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(losses [N], lse [N]) in fp32 of logits [N, V]; with scale, a 0-d fp32, its gradient replaces the logits."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    if losses.numel():
        _cross_entropy_forward[(logits.shape[0],)](
            logits,
            labels,
            losses,
            lse,
            losses if scale is None else scale,
            logits.shape[1],
            logits.stride(0),
            ignore_index,
            smoothing,
            z_loss,
            SMOOTH=smoothing != 0.0,
            GRADIENT=scale is not None,
            **TILES(logits.shape[1], scale is not None).constants,
        )
    return losses, lse


def gradient(
    logits: Tensor,
    d_logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    ignore_index: int,
    first: int = 0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Fills d_logits [N, V], which may be the logits; lse [N] and grad, [N] or 0-d, in fp32."""
    if logits.shape[0]:
        _cross_entropy_gradient[(logits.shape[0],)](
            logits,
            d_logits,
            labels,
            lse,
            grad,
            logits.shape[1],
            logits.stride(0),
            d_logits.stride(0),
            first,
            ignore_index,
            smoothing,
            z_loss,
            grad.ndim,
            **TILES(logits.shape[1], False).constants,
        )


def shard_statistics(logits: Tensor, labels: Tensor, first: int, ignore_index: int) -> Tensor:
    """[4, N] fp32; see shards.py."""
    num_rows, num_words = logits.shape
    statistics = torch.empty(4, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _cross_entropy_shard_statistics[(num_rows,)](
            logits,
            labels,
            statistics,
            num_rows,
            num_words,
            logits.stride(0),
            first,
            ignore_index,
            **TILES(num_words, False).constants,
        )
    return statistics


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """x [N, V] times factors [N] fp32, in place."""
    if x.shape[0]:
        _cross_entropy_scale_rows[(x.shape[0],)](x, factors, x.shape[1], x.stride(0), BLOCK=SCALING_BLOCK, num_warps=8)
