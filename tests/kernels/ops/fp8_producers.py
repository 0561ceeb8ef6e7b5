"""Cases of norms and SwiGLU that write fp8: compared as what they dequantize to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import E4M3, E5M2, Quantized
from kernels.fp8.quantize.reference import quantize_rowwise_reference, quantize_tensorwise_reference
from kernels.rms_norm import NormFp8, rms_norm_fp8
from kernels.rms_norm.quantized import _rms_norm_fp8
from kernels.rms_norm.reference import rms_norm_reference
from kernels.swiglu import swiglu_backward_quantized, swiglu_quantized
from kernels.swiglu.quantized import _glu_backward_quantized, _glu_quantized
from kernels.swiglu.reference import glu_fused_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal
from tests.kernels.ops.fp8 import _values

EPS = 1e-5
# Rounded to half precision on the way, a number in a hundred falls on the other side of an edge: a step of E5M2 is a
# fourth, of E4M3 an eighth of the number at most.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 0.26, torch.bfloat16: 0.26}


def _scale(x: Tensor) -> Tensor:
    return torch.tensor(0.02, device=x.device)


def _case(name: str, op: Callable[..., Any], reference: Callable[..., Any], **other: Any) -> Case:
    return Case(
        name=name,
        op=op,
        reference=reference,
        differentiable=(),
        extreme_arguments=(0, 1) if other["inputs"] is _gradient else (0,),
        batch_dim=None,
        tolerance=TOLERANCE,
        **other,
    )


def _gate_up(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return (normal((shape[0], 2 * shape[1]), dtype, generator),)


def _gradient(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), *_gate_up(shape, dtype, generator)


def _forward(gate_up: Tensor) -> tuple[Tensor, ...]:
    made, amax = swiglu_quantized(gate_up, _scale(gate_up), transpose=True)
    return *_values(made), amax


def _forward_reference(gate_up: Tensor) -> tuple[Tensor, ...]:
    y = glu_fused_reference(gate_up, "silu")
    made = quantize_tensorwise_reference(y, _scale(y), E4M3, True)
    return *_values(made), y.float().abs().amax() if y.numel() else y.new_zeros((), dtype=torch.float32)


def _backward(d_y: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    made, amax = swiglu_backward_quantized(d_y, gate_up, _scale(d_y), dtype=E5M2)
    return *_values(made), amax


def _backward_reference(d_y: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    d = torch.cat((d_y * up * (share + gate * share * (1 - share)), d_y * gate * share), dim=-1)
    made = quantize_tensorwise_reference(d, _scale(d), E5M2, True)
    return *_values(made), d.float().abs().amax() if d.numel() else d.new_zeros((), dtype=torch.float32)


def _x_and_weight(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), normal(shape[-1:], dtype, generator)


def _norm_values(made: NormFp8) -> tuple[Tensor, ...]:
    return _values(Quantized(made.y, made.scale, made.transposed, made.transposed_scale))


def _norm_by_tensor(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _norm_values(rms_norm_fp8(x, weight, EPS, scale=_scale(x), transpose=True))


def _norm_by_row(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _norm_values(rms_norm_fp8(x, weight, EPS, transpose=True))


def _norm_by_tensor_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _values(quantize_tensorwise_reference(rms_norm_reference(x, weight, EPS), _scale(x), E4M3, True))


def _norm_by_row_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _values(quantize_rowwise_reference(rms_norm_reference(x, weight, EPS), E4M3, False, True))


CASES = [
    _case(
        "swiglu_quantized",
        _forward,
        _forward_reference,
        inputs=_gate_up,
        shapes=[(5, 48), (130, 20), (0, 16)],
        checks=lambda inputs: [(_glu_quantized, (*inputs, _scale(inputs[0]), "silu", True))],
        tuned="kernels.swiglu.quantized_kernel:FORWARD",
    ),
    _case(
        "swiglu_backward_quantized",
        _backward,
        _backward_reference,
        inputs=_gradient,
        shapes=[(5, 48), (70, 20), (0, 16)],
        checks=lambda inputs: [(_glu_backward_quantized, detached(*inputs, _scale(inputs[0]), E5M2, "silu"))],
        tuned="kernels.swiglu.quantized_kernel:BACKWARD",
    ),
    _case(
        "rms_norm_fp8_by_tensor",
        _norm_by_tensor,
        _norm_by_tensor_reference,
        inputs=_x_and_weight,
        shapes=[(5, 48), (35, 128), (0, 16)],
        checks=lambda inputs: [(_rms_norm_fp8, (*inputs, None, _scale(inputs[0]), EPS, False))],
        tuned="kernels.fp8.quantize.kernel:BYTES",
    ),
    _case(
        "rms_norm_fp8_by_row",
        _norm_by_row,
        _norm_by_row_reference,
        inputs=_x_and_weight,
        shapes=[(5, 48), (35, 128), (0, 16)],
        checks=lambda inputs: [(_rms_norm_fp8, (*inputs, None, None, EPS, True))],
        tuned="kernels.rms_norm.columns_kernel:TILE",
    ),
]
