"""SwiGLU as an op that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.swiglu.reference import swiglu_reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise: two tensors [...] of one floating dtype to [...] of that dtype, contiguous.

    Computed in fp32 (fp64 for fp64 off the GPU) and rounded once; the same bits in every call, and for an element
    whatever lies beside it. Raises TypeError for DTensors and for two dtypes, ValueError for two shapes.
    """
    refuse_dtensors(gate=gate, up=up)
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise TypeError(f"gate has dtype {gate.dtype} and up {up.dtype}; use one floating dtype for both")
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {list(gate.shape)} and up {list(up.shape)}; they must be the same")
    return _swiglu(gate, up)


@torch.library.custom_op("lattice::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if not runs_triton(gate):
        return swiglu_reference(gate, up).contiguous()
    from kernels.swiglu.kernel import swiglu_forward

    return swiglu_forward(gate.contiguous(), up.contiguous())


@torch.library.custom_op("lattice::swiglu_backward", mutates_args=())
def _swiglu_backward(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_triton(gate):
        d_gate, d_up = reference_gradients(swiglu_reference, (gate, up), (d_y,), (0, 1))
        return d_gate.contiguous(), d_up.contiguous()
    from kernels.swiglu.kernel import swiglu_backward

    return swiglu_backward(d_y.contiguous(), gate.contiguous(), up.contiguous())


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(d_y, *ctx.saved_tensors)


_swiglu.register_autograd(_gradients, setup_context=_save)
