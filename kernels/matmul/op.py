"""The teaching matrix product, and a linear layer with GELU and residual, as ops that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors, runs_triton
from kernels.matmul.reference import gelu_gradient, linear_gelu_parts, matmul_reference


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N] to [M, N], of one floating dtype and any strides.

    Sums in fp32, rounded once; fp32 inputs in full precision, not TF32. The same bits in every call. Its gradients are
    products of the same kernel. Raises TypeError for DTensors and two dtypes, ValueError for shapes.
    """
    refuse_dtensors(a=a, b=b)
    _require_one_dtype(a=a, b=b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a has shape {list(a.shape)} and b {list(b.shape)}; pass [M, K] and [K, N]")
    return _matmul(a, b)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """gelu(x [..., K] weight [N, K]^T + bias [N]) + residual [..., N] to [..., N], of one floating dtype.

    GELU is the exact one (1606.08415). One kernel, rounded once at the end: no activation is written but what GELU is
    applied to, and that only if there will be a backward, whose products are torch's. Raises TypeError for DTensors
    and two dtypes, ValueError for shapes.
    """
    refuse_dtensors(x=x, weight=weight, bias=bias, residual=residual)
    _require_one_dtype(x=x, weight=weight, bias=bias, residual=residual)
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}; pass [..., K] and [N, K]")
    shape = (*x.shape[:-1], weight.shape[0])
    if (bias is not None and bias.shape != shape[-1:]) or (residual is not None and residual.shape != shape):
        found = [None if t is None else list(t.shape) for t in (bias, residual)]
        raise ValueError(f"bias and residual have shapes {found}; they must be {list(shape[-1:])} and {list(shape)}")
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, shape[-1])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _linear_gelu(rows, weight, bias, added, save)[0].view(shape)


def _require_one_dtype(**tensors: Tensor | None) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1 or not next(iter(dtypes.values())).is_floating_point:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"dtypes are {found}; use one floating dtype for all")


@torch.library.custom_op("lattice::matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if not runs_triton(a) or not a.numel() or not b.numel():
        return matmul_reference(a, b).contiguous()
    from kernels.matmul.kernel import matmul

    return matmul(a, b)


@_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _save_matmul(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    wants_a, wants_b = ctx.needs_input_grad
    return _matmul(d_y, b.t()) if wants_a else None, _matmul(a.t(), d_y) if wants_b else None


_matmul.register_autograd(_matmul_gradients, setup_context=_save_matmul)


@torch.library.custom_op("lattice::linear_gelu", mutates_args=())
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """y [M, N], and what GELU was applied to, [M, N] if `save`, else [0]."""
    if not runs_triton(x) or not x.numel() or not weight.numel():
        y, h = linear_gelu_parts(x, weight, bias, residual)
        return y, h if save else h.new_empty(0)
    from kernels.matmul.kernel import linear_gelu

    bias = None if bias is None else bias.contiguous()
    return linear_gelu(x, weight, bias, None if residual is None else residual.contiguous(), save)


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, h = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
    if d_y is None:
        return None, None, None, None, None
    d_h = gelu_gradient(d_y, h) if wants_x or wants_weight or wants_bias else None
    return (
        d_h @ weight if d_h is not None and wants_x else None,
        d_h.t() @ x if d_h is not None and wants_weight else None,
        d_h.sum(dim=0) if d_h is not None and wants_bias else None,
        d_y if wants_residual else None,
        None,
    )


_linear_gelu.register_autograd(_linear_gradients, setup_context=_save_linear)


@register_flop_formula(torch.ops.lattice.matmul)
def _matmul_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode; the arguments are shapes."""
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.lattice.linear_gelu)
def _linear_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]
