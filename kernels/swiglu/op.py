"""Gated linear units as ops that compiled graphs keep whole; SwiGLU is one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.swiglu.reference import glu_fused_reference, glu_reference, halves


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (2002.05202), elementwise: two tensors [..., I] of one floating dtype to [..., I], contiguous.

    Their rows may have strides; only elements of a row must lie side by side, or they are copied. Computed in fp32
    (fp64 for fp64 off the GPU) and rounded once; the same bits in every call, and for an element whatever lies beside
    it. Raises TypeError for DTensors and for two dtypes, ValueError for two shapes.
    """
    check_pair(gate, up)
    return _glu(gate, up, "silu")


def swiglu_fused(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of one tensor [..., 2I], gate beside up, as one projection yields them, to [..., I].

    Nothing is copied: both halves are read in place and their gradients written into one tensor. Otherwise as
    `swiglu`; ValueError for an odd width.
    """
    check_fused(gate_up)
    return _glu_fused(gate_up, "silu")


def swiglu_fused_backward(d_y: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up [..., 2I] for that of y [..., I]: for the autograd function of a layer that multiplies y in
    fp8."""
    return _glu_fused_backward(d_y, gate_up, "silu")


def check_pair(gate: Tensor, up: Tensor) -> None:
    """Of two inputs."""
    refuse_dtensors(gate=gate, up=up)
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise TypeError(f"gate has dtype {gate.dtype} and up {up.dtype}; use one floating dtype for both")
    if gate.shape != up.shape or not gate.ndim:
        raise ValueError(f"gate has shape {list(gate.shape)} and up {list(up.shape)}; they must be the same, [..., I]")


def check_fused(gate_up: Tensor) -> None:
    """Of one input."""
    refuse_dtensors(gate_up=gate_up)
    if not gate_up.is_floating_point():
        raise TypeError(f"gate_up has dtype {gate_up.dtype}; use a floating one")
    if not gate_up.ndim or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; its last dim must be even, gate beside up")


def _half(gate_up: Tensor) -> list[int]:
    return [*gate_up.shape[:-1], gate_up.shape[-1] // 2]


@torch.library.custom_op("lattice::glu", mutates_args=())
def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not runs_triton(gate):
        return glu_reference(gate, up, activation).contiguous()
    from kernels.swiglu.kernel import glu_forward

    return glu_forward(gate, up, activation)


@_glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lattice::glu_backward", mutates_args=())
def _glu_backward(d_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if not runs_triton(gate):
        d_gate, d_up = reference_gradients(glu_reference, (gate, up, activation), (d_y,), (0, 1))
        return d_gate.contiguous(), d_up.contiguous()
    from kernels.swiglu.kernel import glu_backward

    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    glu_backward(d_y, gate, up, d_gate, d_up, activation)
    return d_gate, d_up


@_glu_backward.register_fake
def _(d_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.custom_op("lattice::glu_fused", mutates_args=())
def _glu_fused(gate_up: Tensor, activation: str) -> Tensor:
    if not runs_triton(gate_up):
        return glu_fused_reference(gate_up, activation).contiguous()
    from kernels.swiglu.kernel import glu_forward

    return glu_forward(*halves(gate_up), activation)


@_glu_fused.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty(_half(gate_up))


@torch.library.custom_op("lattice::glu_fused_backward", mutates_args=())
def _glu_fused_backward(d_y: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    if not runs_triton(gate_up):
        return reference_gradients(glu_fused_reference, (gate_up, activation), (d_y,), (0,))[0].contiguous()
    from kernels.swiglu.kernel import glu_backward

    d_gate_up = gate_up.new_empty(gate_up.shape)
    glu_backward(d_y, *halves(gate_up), *halves(d_gate_up), activation)
    return d_gate_up


@_glu_fused_backward.register_fake
def _(d_y: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_glu_backward(d_y, *ctx.saved_tensors, ctx.activation), None


def _gradient_fused(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return _glu_fused_backward(d_y, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_gradients, setup_context=_save)
_glu_fused.register_autograd(_gradient_fused, setup_context=_save)
