"""Softmax as an op that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.softmax.reference import softmax_backward_reference, softmax_reference


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dim: [..., width] to [..., width] of the same dtype, contiguous.

    As torch.softmax(x, -1): -inf has probability 0, a row of nothing else gives NaN. Computed in fp32 (fp64 for fp64
    off the GPU) and rounded once; the same bits in every run, and a row's bits do not depend on the other rows.
    Backward keeps the result, not x. Raises TypeError for DTensors and integers, ValueError without a dim.
    """
    refuse_dtensors(x=x)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; use a floating one")
    if not x.ndim:
        raise ValueError("x has no dim; use [..., width]")
    return _softmax(x)


@torch.library.custom_op("lattice::softmax", mutates_args=())
def _softmax(x: Tensor) -> Tensor:
    if not runs_triton(x):
        return softmax_reference(x).contiguous()
    from kernels.softmax.kernel import softmax_forward

    return softmax_forward(x)


@_softmax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lattice::softmax_backward", mutates_args=())
def _softmax_backward(d_y: Tensor, y: Tensor) -> Tensor:
    if not runs_triton(y):
        return softmax_backward_reference(d_y, y).contiguous()
    from kernels.softmax.kernel import softmax_backward

    return softmax_backward(d_y, y)


@_softmax_backward.register_fake
def _(d_y: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradient(ctx: Any, d_y: Tensor) -> Tensor:
    return _softmax_backward(d_y, *ctx.saved_tensors)


_softmax.register_autograd(_gradient, setup_context=_save)
