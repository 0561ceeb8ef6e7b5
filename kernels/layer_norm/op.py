"""LayerNorm as ops that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import reference_gradients, runs_triton
from kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference, statistics
from kernels.rms_norm.op import check_norm


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (1607.06450) over the last dim: x [..., D], D <= 16384, weight and bias [D] or None, to [..., D]
    contiguous.

    As torch.nn.functional.layer_norm: (x - mean) / sqrt(variance + eps) * weight + bias, computed in fp32 (fp64 for
    fp64 off the GPU) and rounded once to the dtype of x. Weight and bias may have another floating dtype; their
    gradients have that one. The same bits in every run, gradients included; a row's bits do not depend on the other
    rows. Raises TypeError for DTensors, integers and a bias of another dtype than the weight's, ValueError for shapes
    and for a bias without a weight.
    """
    _check(x, weight, bias)
    return _layer_norm(x, weight, bias, None, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(r, weight, bias, eps), r) with r = x + residual, both [..., D] of one dtype; r is rounded before it
    is normalised, as two separate steps would. Guarantees and errors as in `layer_norm`."""
    _check(x, weight, bias, residual=residual)
    return _layer_norm(x, weight, bias, residual, eps)[:2]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> None:
    check_norm(x, weight=weight, bias=bias, residual=residual)
    if bias is not None and weight is None:
        raise ValueError("bias without weight; give a weight of ones")
    if bias is not None and weight is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias has dtype {bias.dtype} and weight {weight.dtype}; use one dtype for both")


@torch.library.custom_op("lattice::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the stream (empty without a residual), mean, 1 / standard deviation."""
    if not runs_triton(x):
        stream = x if residual is None else add_layer_norm_reference(x, residual, weight, bias, eps)[1]
        mean, rstd = statistics(stream, eps)
        kept = x.new_empty(0) if residual is None else stream.contiguous()
        y = layer_norm_reference(stream, weight, bias, eps).contiguous()
        return y, kept, mean.contiguous(), rstd.contiguous()
    from kernels.rms_norm.kernel import norm_forward

    return norm_forward(x, weight, bias=bias, eps=eps, residual=residual, center=True)[:4]


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@torch.library.custom_op("lattice::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    d_y: Tensor,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    d_stream: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, to which d_stream is added, of weight and bias, empty where there is none. eps: of the
    reference, which keeps no rstd."""
    if not runs_triton(stream):
        wanted = [0] + [i for i, p in ((1, weight), (2, bias)) if p is not None]
        inputs = (stream, weight, bias, eps)
        d_x, *others = (g.contiguous() for g in reference_gradients(layer_norm_reference, inputs, (d_y,), wanted))
        d_weight, d_bias = (*others, *(rstd.new_empty(0) for _ in range(2 - len(others))))
        return d_x if d_stream is None else d_x + d_stream, d_weight, d_bias
    from kernels.rms_norm.kernel import norm_backward

    return norm_backward(d_y, stream, weight, mean, rstd, d_stream, has_bias=bias is not None)


@_layer_norm_backward.register_fake
def _(
    d_y: Tensor,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    d_stream: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight, d_bias = (rstd.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return stream.new_empty(stream.shape), d_weight, d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, ctx.eps = inputs
    _, stream, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else stream, weight, bias, mean, rstd)


def _gradients(ctx: Any, d_y: Tensor | None, d_stream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    stream, weight, bias, mean, rstd = ctx.saved_tensors
    d_stream = d_stream if ctx.has_residual else None
    if d_y is None:  # only the stream was used
        return d_stream, None, None, d_stream, None
    d_x, d_weight, d_bias = _layer_norm_backward(d_y, stream, weight, bias, mean, rstd, d_stream, ctx.eps)
    d_weight, d_bias = (None if p is None else g for p, g in ((weight, d_weight), (bias, d_bias)))
    return d_x, d_weight, d_bias, d_x if ctx.has_residual else None, None


_layer_norm.register_autograd(_gradients, setup_context=_save)
