"""Permutation by expert as ops that compiled graphs keep whole.

T tokens, k choices each, N = T k, E experts, M rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.moe_permute.reference import (
    num_rows,
    permute_reference,
    sort_by_expert_reference,
    unpermute_reference,
)


@dataclass(frozen=True)
class Permutation:
    """Where choices go. Filled by `sort_by_expert`."""

    choice_of_row: Tensor  # [M] int32: number of the choice, t k + j for choice j of token t; -1: none, a row of zeros
    row_of_choice: Tensor  # [N] int32; -1: the choice is of no expert and has no row
    ends: Tensor  # [E] int32: rows of expert e, with those that pad them, end before ends[e]
    k: int


def sort_by_expert(experts: Tensor, num_experts: int, *, multiple: int = 1) -> Permutation:
    """The permutation that sorts choices by expert, those of one expert in the order of their tokens.

    experts [T, k] int64; a number outside [0, num_experts) is no expert. Each expert's rows are padded to a multiple of
    `multiple` rows. M is a constant, N + E (multiple - 1) rounded up: the host waits for nothing, and rows from the
    last end on belong to no expert. Raises TypeError and ValueError for wrong dtypes and shapes.
    """
    refuse_dtensors(experts=experts)
    if experts.dtype != torch.int64 or experts.ndim != 2:
        raise TypeError(f"experts have dtype {experts.dtype} and shape {list(experts.shape)}; use torch.int64, [T, k]")
    if multiple < 1 or num_experts < 1:
        raise ValueError(f"multiple={multiple} and num_experts={num_experts} must be at least 1")
    if num_rows(experts.numel(), num_experts, multiple) >= 2**31:
        raise ValueError(f"{experts.numel()} choices need more than 2^31 rows; use smaller micro-batches")
    choice_of_row, row_of_choice, ends = _sort_by_expert(experts.flatten(), num_experts, multiple)
    return Permutation(choice_of_row, row_of_choice, ends, k=experts.shape[1])


def permute(x: Tensor, permutation: Permutation) -> Tensor:
    """Rows [M, D] sorted by expert, each of them its token of x [T, D]; 0 where there is none.

    Backward adds the rows of a token in the order of its choices, in fp32.
    """
    refuse_dtensors(x=x)
    num_choices = permutation.row_of_choice.shape[0]
    if x.ndim != 2 or x.shape[0] * permutation.k != num_choices:
        raise ValueError(f"x has shape {list(x.shape)}; {num_choices} choices, {permutation.k} each, want [T, D]")
    return _permute(x, permutation.choice_of_row, permutation.row_of_choice, permutation.k)


def unpermute(rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    """Sum over a token's choices of weight times row: rows [M, D], weights [T, k] to [T, D] of the dtype of rows.

    In fp32, in the order of the choices, rounded once; a choice without a row counts as 0, and its weight has no
    gradient. The gradient of rows without a choice is 0.
    """
    refuse_dtensors(rows=rows, weights=weights)
    shape = (permutation.row_of_choice.shape[0] // permutation.k, permutation.k)
    if rows.ndim != 2 or rows.shape[0] != permutation.choice_of_row.shape[0] or weights.shape != shape:
        raise ValueError(
            f"rows have shape {list(rows.shape)} and weights {list(weights.shape)}; they are "
            f"[{permutation.choice_of_row.shape[0]}, D] and {list(shape)}"
        )
    return _unpermute(rows, weights, permutation.choice_of_row, permutation.row_of_choice)


@torch.library.custom_op("lattice::moe_sort_by_expert", mutates_args=())
def _sort_by_expert(experts: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(experts):
        return sort_by_expert_reference(experts, num_experts, multiple)
    from kernels.moe_permute.kernel import sort_by_expert

    return sort_by_expert(experts.contiguous(), num_experts, multiple)


@torch.library.custom_op("lattice::moe_permute", mutates_args=())
def _permute(x: Tensor, choice_of_row: Tensor, row_of_choice: Tensor, k: int) -> Tensor:
    if not runs_triton(x):
        return permute_reference(x, choice_of_row, k)
    from kernels.moe_permute.kernel import gather

    return gather(x.contiguous(), choice_of_row, k)


@torch.library.custom_op("lattice::moe_permute_backward", mutates_args=())
def _permute_backward(d_rows: Tensor, row_of_choice: Tensor, k: int) -> Tensor:
    if not runs_triton(d_rows):
        ones = d_rows.new_ones(row_of_choice.shape[0] // k, k)
        return unpermute_reference(d_rows, ones, row_of_choice)
    from kernels.moe_permute.kernel import combine

    return combine(d_rows.contiguous(), None, row_of_choice, k)


@torch.library.custom_op("lattice::moe_unpermute", mutates_args=())
def _unpermute(rows: Tensor, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    if not runs_triton(rows):
        return unpermute_reference(rows, weights, row_of_choice)
    from kernels.moe_permute.kernel import combine

    return combine(rows.contiguous(), weights.contiguous(), row_of_choice, weights.shape[1])


@torch.library.custom_op("lattice::moe_unpermute_backward", mutates_args=())
def _unpermute_backward(
    d_y: Tensor, rows: Tensor, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor
) -> tuple[Tensor, Tensor]:
    if not runs_triton(rows):
        inputs = (rows, weights, row_of_choice)
        d_rows, d_weights = reference_gradients(unpermute_reference, inputs, (d_y,), (0, 1))
        return d_rows.contiguous(), d_weights.contiguous()
    from kernels.moe_permute.kernel import combine_backward

    return combine_backward(d_y.contiguous(), rows.contiguous(), weights.contiguous(), choice_of_row, row_of_choice)


@_sort_by_expert.register_fake
def _(experts: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (num_rows(experts.shape[0], num_experts, multiple), experts.shape[0], num_experts)
    choice_of_row, row_of_choice, ends = (experts.new_empty(size, dtype=torch.int32) for size in sizes)
    return choice_of_row, row_of_choice, ends


@_permute.register_fake
def _(x: Tensor, choice_of_row: Tensor, row_of_choice: Tensor, k: int) -> Tensor:
    return x.new_empty(choice_of_row.shape[0], x.shape[1])


@_permute_backward.register_fake
def _(d_rows: Tensor, row_of_choice: Tensor, k: int) -> Tensor:
    return d_rows.new_empty(row_of_choice.shape[0] // k, d_rows.shape[1])


@_unpermute.register_fake
def _(rows: Tensor, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


@_unpermute_backward.register_fake
def _(
    d_y: Tensor, rows: Tensor, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_permute(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.k = inputs[3]


def _permute_gradient(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
    return _permute_backward(d_rows, *ctx.saved_tensors, ctx.k), None, None, None


def _save_unpermute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_unpermute_backward(d_y, *ctx.saved_tensors), None, None


_permute.register_autograd(_permute_gradient, setup_context=_save_permute)
_unpermute.register_autograd(_unpermute_gradients, setup_context=_save_unpermute)
