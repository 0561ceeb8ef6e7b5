"""The grouped linear layer as one op, so that compiled graphs and activation checkpointing see no loop inside.

Implementations, all with the same result up to rounding:

    triton      CUDA, fp32 and half precision: kernel.py, group sizes read on the device
    grouped_mm  CUDA, bf16, only where it is asked for: torch._grouped_mm, one kernel, group sizes read on the device
    masked      CUDA, all else: every group's product over all rows, G times the arithmetic, but no host synchronisation
    split       CPU: a product per group, over slices
    invariant   where it is asked for: one of these by products (kernels/invariant_linear), or a tile, of one kind for
                any number of rows, so that a row's bits depend on it and its group's weight alone

N rows, G groups, K features in, M features out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import register_flop_formula

from kernels.invariant_linear import invariant_linear

ALIGNMENT = 16
"""Bytes that rows are a multiple of, for triton and torch._grouped_mm."""


IMPLEMENTATIONS = ("grouped_mm", "masked", "split", "invariant")


def choose_grouped_linear(device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
    """The implementation that runs for rows of these sizes: triton, masked or split.

    In bf16 triton has 1.07 to 1.83 times the speed of grouped_mm on H200, forward and backward, for 8 and for 128
    experts (benchmarks/results/kernels_h200.json); in fp32 and fp16 the other choice, masked, computes G times as much.
    """
    if device.type == "cpu":
        return "split"
    aligned = all(size * dtype.itemsize % ALIGNMENT == 0 for size in sizes)
    return "triton" if device.type == "cuda" and dtype != torch.float64 and aligned else "masked"


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, *, implementation: str | None = None) -> Tensor:
    """Row n of group g becomes x[n] weight[g]^T: x [N, K], weight [G, M, K] to [N, M], of one floating dtype.

    ends [G] int32, ascending, on x's device: group g is rows ends[g - 1] to ends[g]; a group may be empty. Rows from
    ends[G - 1] on belong to no group: their output and their gradient are 0. implementation: of the list above, for
    backward as well except for invariant; None: `choose_grouped_linear` chooses. Raises TypeError for a
    DTensor and for wrong dtypes, ValueError for shapes that do not fit, or not this implementation.
    """
    _check(x, weight, ends, implementation)
    return _grouped_linear(x, weight, ends, implementation)


def _check(x: Tensor, weight: Tensor, ends: Tensor, implementation: str | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("ends", ends)):
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} is a DTensor; kernels work on plain tensors, so pass its local shard")
    if x.dtype != weight.dtype or ends.dtype != torch.int32:
        raise TypeError(f"dtypes x {x.dtype}, weight {weight.dtype}, ends {ends.dtype}; use one for both, and int32")
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"shapes x {list(x.shape)}, weight {list(weight.shape)}, ends {list(ends.shape)} do not fit; "
            "they are [N, K], [G, M, K] and [G]"
        )
    if implementation == "triton":
        multiple = ALIGNMENT // x.element_size()
        if x.dtype == torch.float64 or weight.shape[1] % multiple or weight.shape[2] % multiple:
            raise ValueError(
                f"weight {list(weight.shape)} in {x.dtype}: implementation=triton wants fp32, bf16 or fp16, and "
                f"features in multiples of 16 bytes, here {multiple}"
            )
    elif implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation}; use one of {', '.join(IMPLEMENTATIONS)}, triton, or None")


@torch.library.custom_op("lattice::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    if not x.shape[0]:  # experts of a rank that nobody chose: not a size to ask a library for
        return x.new_zeros(0, weight.shape[1])
    invariant = implementation == "invariant"
    if implementation is None or invariant:
        implementation = choose_grouped_linear(x.device, x.dtype, *weight.shape[1:])
    if implementation == "triton":
        from kernels.grouped_linear.kernel import INVARIANT, rows_times_weights

        tile = INVARIANT if invariant else None
        return rows_times_weights(x.contiguous(), weight.contiguous(), ends.contiguous(), transposed=True, tile=tile)
    if implementation == "grouped_mm":
        y = torch._grouped_mm(x.contiguous(), weight.contiguous().transpose(1, 2), offs=ends)
        return torch.where(_grouped(x, ends), y, 0)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    product = invariant_linear if invariant else F.linear
    if implementation == "masked":
        for g, member in _members(x, ends):
            y += torch.where(member, product(x, weight[g]), 0)
    else:
        for g, rows in _slices(ends):
            y[rows] = product(x[rows], weight[g])
    return y


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("lattice::grouped_linear_input_gradient", mutates_args=())
def input_gradient(grad: Tensor, weight: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    """Gradient of x [N, K] from that of the output, grad [N, M]."""
    if not grad.shape[0]:
        return grad.new_zeros(0, weight.shape[2])
    implementation = implementation or choose_grouped_linear(grad.device, grad.dtype, *weight.shape[1:])
    if implementation == "triton":
        from kernels.grouped_linear.kernel import rows_times_weights

        return rows_times_weights(grad.contiguous(), weight.contiguous(), ends.contiguous(), transposed=False)
    if implementation == "grouped_mm":
        d_x = torch._grouped_mm(grad.contiguous(), weight.contiguous(), offs=ends)
        return torch.where(_grouped(grad, ends), d_x, 0)
    d_x = grad.new_zeros(grad.shape[0], weight.shape[2])
    if implementation == "masked":
        for g, member in _members(grad, ends):
            d_x += torch.where(member, grad, 0) @ weight[g]
    else:
        for g, rows in _slices(ends):
            torch.mm(grad[rows], weight[g], out=d_x[rows])
    return d_x


@input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op("lattice::grouped_linear_pair_input_gradient", mutates_args=())
def pair_input_gradient(
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor,
    second: Tensor,
    ends: Tensor,
    implementation: str | None = None,
) -> Tensor:
    """Gradient of x [N, K] from those of both outputs [N, M] of `grouped_linear_pair`."""
    chosen = implementation or choose_grouped_linear(first_grad.device, first_grad.dtype, *first.shape[1:])
    if chosen == "triton" and first_grad.shape[0]:
        from kernels.grouped_linear.kernel import rows_times_weights

        more = (second_grad.contiguous(), second.contiguous())
        rows, weight = first_grad.contiguous(), first.contiguous()
        return rows_times_weights(rows, weight, ends.contiguous(), transposed=False, more=more)
    d_x = input_gradient(first_grad, first, ends, implementation)
    return d_x.add_(input_gradient(second_grad, second, ends, implementation))


@pair_input_gradient.register_fake
def _(first_grad: Tensor, first: Tensor, *_: Any) -> Tensor:
    return first_grad.new_empty(first_grad.shape[0], first.shape[2])


@torch.library.custom_op("lattice::grouped_linear_weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    """Gradient of weight [G, M, K] from that of the output, grad [N, M], and the input x [N, K]."""
    implementation = implementation or choose_grouped_linear(x.device, x.dtype, grad.shape[1], x.shape[1])
    if implementation == "triton" and x.shape[0]:
        from kernels.grouped_linear import kernel

        return kernel.weight_gradient(grad.contiguous(), x.contiguous(), ends.contiguous())
    d_weight = grad.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    if not x.shape[0]:
        return d_weight
    if implementation == "grouped_mm":
        return torch._grouped_mm(grad.contiguous().t(), x.contiguous(), offs=ends)
    if implementation == "masked":
        for g, member in _members(x, ends):
            d_weight[g] = torch.where(member, grad, 0).T @ x
    else:
        for g, rows in _slices(ends):
            torch.mm(grad[rows].T, x[rows], out=d_weight[g])
    return d_weight


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor, implementation: str | None = None) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends, implementation = inputs
    ctx.implementation = None if implementation == "invariant" else implementation
    for_x, for_weight = ctx.needs_input_grad[:2]  # frozen weights are neither multiplied for nor is x kept for them
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, ends = ctx.saved_tensors
    d_x = None if weight is None else input_gradient(grad, weight, ends, ctx.implementation)
    d_weight = None if x is None else weight_gradient(grad, x, ends, ctx.implementation)
    return d_x, d_weight, None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


def grouped_linear_pair(
    x: Tensor, first: Tensor, second: Tensor, ends: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """`grouped_linear` of x with two weights [G, M, K], such as gate and up of experts.

    In backward the gradient of x is one sum of products, which is not added up in memory: one launch on CUDA, with the
    rounding of one. Raises as grouped_linear does.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"weights {list(first.shape)} {first.dtype} and {list(second.shape)} {second.dtype} are no pair; they are "
            "of one shape and dtype"
        )
    if not torch.is_grad_enabled() or not x.requires_grad:  # and of weights alone nothing is shared
        products = (grouped_linear(x, weight, ends, implementation=implementation) for weight in (first, second))
        return next(products), next(products)
    _check(x, first, ends, implementation)
    return _grouped_linear_pair(x, first, second, ends, implementation)


@torch.library.custom_op("lattice::grouped_linear_pair", mutates_args=())
def _grouped_linear_pair(
    x: Tensor, first: Tensor, second: Tensor, ends: Tensor, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    return _grouped_linear(x, first, ends, implementation), _grouped_linear(x, second, ends, implementation)


@_grouped_linear_pair.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], first.shape[1]), x.new_empty(x.shape[0], second.shape[1])


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, first, second, ends, implementation = inputs
    ctx.implementation = None if implementation == "invariant" else implementation
    for_x, for_first, for_second = ctx.needs_input_grad[:3]
    weights = (first, second) if for_x else (None, None)
    ctx.save_for_backward(x if for_first or for_second else None, *weights, ends)


def _backward_pair(ctx: Any, first_grad: Tensor, second_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, first, second, ends = ctx.saved_tensors
    how, (_, for_first, for_second, *_) = ctx.implementation, ctx.needs_input_grad
    d_x = None if first is None else pair_input_gradient(first_grad, first, second_grad, second, ends, how)
    d_first = weight_gradient(first_grad, x, ends, how) if for_first else None
    d_second = weight_gradient(second_grad, x, ends, how) if for_second else None
    return d_x, d_first, d_second, None, None


_grouped_linear_pair.register_autograd(_backward_pair, setup_context=_save_pair)


@register_flop_formula(torch.ops.lattice.grouped_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode, as if every row had a group; the arguments are shapes."""
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.lattice.grouped_linear_input_gradient)
def _input_gradient_flops(grad: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return _flops(grad, weight)


@register_flop_formula(torch.ops.lattice.grouped_linear_pair)
def _pair_flops(x: torch.Size, first: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _flops(x, first)


@register_flop_formula(torch.ops.lattice.grouped_linear_pair_input_gradient)
def _pair_input_gradient_flops(grad: torch.Size, first: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _flops(grad, first)


@register_flop_formula(torch.ops.lattice.grouped_linear_weight_gradient)
def _weight_gradient_flops(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _grouped(x: Tensor, ends: Tensor) -> Tensor:
    """[N, 1] bool: which rows belong to a group."""
    return (torch.arange(x.shape[0], device=x.device) < ends[-1])[:, None]


def _members(x: Tensor, ends: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(g, [N, 1] bool of the rows of group g), without a look at the sizes."""
    row = torch.arange(x.shape[0], device=x.device)
    for g in range(ends.shape[0]):
        start = ends[g - 1] if g else 0
        yield g, ((row >= start) & (row < ends[g]))[:, None]


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(g, rows) of the groups that have any. Reads ends on the host."""
    start = 0
    for g, end in enumerate(ends.tolist()):
        if end > start:
            yield g, slice(start, end)
        start = end
