"""RMSNorm as ops that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.rms_norm.reference import (
    add_rms_norm_reference,
    inverse_rms,
    rms_norm_reference,
)

MAX_WIDTH = 16384  # a row is held in the registers of one program


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm (1910.07467) over the last dim: x [..., D], D <= 16384, weight [D] or None, to [..., D] contiguous.

    As torch.nn.functional.rms_norm: x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (fp64 for fp64 off the GPU)
    and rounded once to the dtype of x. The weight may have another floating dtype; its gradient has that one. The same
    bits in every run, gradients included; a row's bits do not depend on the other rows. Raises TypeError for DTensors
    and integers, ValueError for shapes.
    """
    check_norm(x, weight=weight)
    return _rms_norm(x, weight, None, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(r, weight, eps), r) with r = x + residual, both [..., D] of one dtype: a block's output enters the
    stream and the next branch begins. r is rounded before it is normalised, as two separate steps would.

    Guarantees and errors as in `rms_norm`.
    """
    check_norm(x, weight=weight, residual=residual)
    return _rms_norm(x, weight, residual, eps)[:2]


def rms_norm_backward(
    d_y: Tensor, stream: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, *, d_stream: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of stream and weight, for those of y and, of other uses, of the stream: all [..., D]. With a residual
    the first is the gradient of x and of the residual."""
    d_x, d_weight = _rms_norm_backward(d_y, stream, weight, rstd, d_stream, eps)
    return d_x, None if weight is None else d_weight


def check_norm(x: Tensor, **others: Tensor | None) -> None:
    """others: weight and bias [D], residual like x, or None."""
    refuse_dtensors(x=x, **others)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; use a floating one")
    if not x.ndim or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {list(x.shape)}; its last dim must be from 1 to {MAX_WIDTH}")
    for name, tensor in others.items():
        expected = x.shape if name == "residual" else x.shape[-1:]
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; for x {list(x.shape)} use {list(expected)}")
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; use a floating one")
        if name == "residual" and tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"residual has dtype {tensor.dtype} and x {x.dtype}; use one dtype for both")


def check_scale(scale: Tensor | None) -> None:
    """Of delayed scaling."""
    refuse_dtensors(scale=scale)
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(f"scale has shape {list(scale.shape)} and dtype {scale.dtype}; use one element of fp32")


@torch.library.custom_op("lattice::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the stream (empty without a residual), 1 / rms."""
    if not runs_triton(x):
        stream = x if residual is None else add_rms_norm_reference(x, residual, weight, eps)[1]
        y = rms_norm_reference(stream, weight, eps).contiguous()
        return y, x.new_empty(0) if residual is None else stream.contiguous(), inverse_rms(stream, eps).contiguous()
    from kernels.rms_norm.kernel import norm_forward

    y, stream, _, rstd, _ = norm_forward(x, weight, eps=eps, residual=residual)
    return y, stream, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), stream, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lattice::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_y: Tensor, stream: Tensor, weight: Tensor | None, rstd: Tensor, d_stream: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """d_stream: added to the gradient of the stream. eps: of the reference, which keeps no rstd."""
    if not runs_triton(stream):
        wanted = (0,) if weight is None else (0, 1)
        d_x, *d_weight = reference_gradients(rms_norm_reference, (stream, weight, eps), (d_y,), wanted)
        d_x = d_x if d_stream is None else d_x + d_stream
        return d_x.contiguous(), d_weight[0].contiguous() if d_weight else rstd.new_empty(0)
    from kernels.rms_norm.kernel import norm_backward

    return norm_backward(d_y, stream, weight, None, rstd, d_stream)[:2]


@_rms_norm_backward.register_fake
def _(
    d_y: Tensor, stream: Tensor, weight: Tensor | None, rstd: Tensor, d_stream: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), rstd.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])


def _gradients(ctx: Any, d_y: Tensor | None, d_stream: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    stream, weight, rstd = ctx.saved_tensors
    d_stream = d_stream if ctx.has_residual else None
    if d_y is None:  # only the stream was used
        return d_stream, None, d_stream, None
    d_x, d_weight = _rms_norm_backward(d_y, stream, weight, rstd, d_stream, ctx.eps)
    return d_x, None if weight is None else d_weight, d_x if ctx.has_residual else None, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
