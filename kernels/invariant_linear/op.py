"""The invariant linear layer as an op that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors
from kernels.invariant_linear.reference import invariant_linear_reference
from kernels.rows import has_kernel


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] weight [N, K]^T + bias [N] to [..., N], of one floating dtype, contiguous.

    A row of the result is a function of its row of x alone, to the bit: of no other row, not of how many there are, and
    not of its place among them. Sums in fp32 (fp64 for fp64), rounded once on CUDA. Off CUDA, and in fp64, a product
    per row, which is slow. Gradients are ordinary products. Raises TypeError for DTensors and two dtypes, ValueError
    for shapes.
    """
    refuse_dtensors(x=x, weight=weight, bias=bias)
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(f"dtypes of x, weight and bias are {sorted(map(str, dtypes))}; use one floating dtype for all")
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}; pass [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; beside weight {list(weight.shape)} use [N]")
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("lattice::invariant_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not has_kernel(x) or not x.numel() or not weight.numel():
        return invariant_linear_reference(x, weight, bias).contiguous()
    from kernels.invariant_linear.kernel import linear

    x = x if x.stride(1) == 1 else x.contiguous()
    return linear(x, weight.contiguous(), None if bias is None else bias.contiguous())


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        d_y @ weight if wants_x else None,
        d_y.t() @ x if wants_weight else None,
        d_y.sum(dim=0) if wants_bias and ctx.has_bias else None,
    )


_linear.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.lattice.invariant_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode; the arguments are shapes."""
    return 2 * x[0] * x[1] * weight[0]
