"""SwiGLU between two products in fp8, as ops that compiled graphs keep whole: it writes what the next product reads.

Forward the input of the layer behind it, backward the gradient of the layer before it, each with the transposed copy
that a weight gradient multiplies. One scale for all of a tensor, known before (delayed scaling): one that followed from
the largest magnitude would be known after the pass that writes. The numbers, and the largest magnitude, are those that
quantize_tensorwise makes of `swiglu_fused` and of its gradient, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.fp8.formats import E4M3, Quantized, padded, require_fp8
from kernels.fp8.quantize.reference import amax_reference, quantize_tensorwise_reference
from kernels.rms_norm.op import check_scale
from kernels.swiglu.op import check_fused
from kernels.swiglu.reference import glu_fused_reference


def swiglu_quantized(gate_up: Tensor, scale: Tensor, *, transpose: bool = False) -> tuple[Quantized, Tensor]:
    """silu(gate) * up of gate_up [M, 2I], gate beside up, in E4M3 by a scale, fp32 []: data [M, I], with `transpose`
    also [I, M padded to 16], and the largest magnitude, fp32 [].

    Computed in fp32 and rounded to the dtype of gate_up before it is quantized; saturates, NaN stays NaN. The same bits
    in every call. Not differentiable: `swiglu_backward_quantized` is for the layer before it. Raises TypeError for
    DTensors and dtypes, ValueError for shapes.
    """
    _check(gate_up, scale)
    data, transposed, used, amax = _glu_quantized(gate_up.detach(), scale.detach(), "silu", transpose)
    return Quantized(data, used, *((transposed, used) if transpose else ())), amax


def swiglu_backward_quantized(
    d_y: Tensor, gate_up: Tensor, scale: Tensor, *, dtype: torch.dtype = E4M3
) -> tuple[Quantized, Tensor]:
    """The gradient of gate_up [M, 2I] for that of the output d_y [M, I], in a format of fp8 by a scale, fp32 []: data
    [M, 2I], transposed [2I, M padded to 16], and the largest magnitude. Otherwise as `swiglu_quantized`."""
    _check(gate_up, scale)
    refuse_dtensors(d_y=d_y)
    require_fp8(dtype)
    if d_y.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"d_y has shape {list(d_y.shape)}; for gate_up {list(gate_up.shape)} pass half its width")
    data, transposed, used, amax = _glu_backward_quantized(
        d_y.detach(), gate_up.detach(), scale.detach(), dtype, "silu"
    )
    return Quantized(data, used, transposed, used), amax


def _check(gate_up: Tensor, scale: Tensor) -> None:
    check_fused(gate_up)
    check_scale(scale)
    if gate_up.ndim != 2 or scale.ndim:
        raise ValueError(
            f"gate_up has shape {list(gate_up.shape)} and scale {list(scale.shape)}; pass [rows, 2I] and one of no "
            "dimensions"
        )


def _made(y: Tensor, scale: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = quantize_tensorwise_reference(y, scale, dtype, transpose)
    transposed = made.data.new_empty(0) if made.transposed is None else made.transposed
    return made.data, transposed, scale.clone(), amax_reference(y)


@torch.library.custom_op("lattice::glu_quantized", mutates_args=())
def _glu_quantized(
    gate_up: Tensor, scale: Tensor, activation: str, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, transposed (empty without), the scale in memory of its own, amax."""
    if not runs_triton(gate_up) or not gate_up.numel():
        return _made(glu_fused_reference(gate_up, activation), scale, E4M3, transpose)
    from kernels.swiglu.quantized_kernel import glu_quantized

    return glu_quantized(gate_up, scale, activation, transpose)


@_glu_quantized.register_fake
def _(gate_up: Tensor, scale: Tensor, activation: str, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    used, amax = (gate_up.new_empty((), dtype=torch.float32) for _ in range(2))
    shape = (width, padded(rows)) if transpose else (0,)
    return gate_up.new_empty(rows, width, dtype=E4M3), gate_up.new_empty(shape, dtype=E4M3), used, amax


@torch.library.custom_op("lattice::glu_backward_quantized", mutates_args=())
def _glu_backward_quantized(
    d_y: Tensor, gate_up: Tensor, scale: Tensor, dtype: torch.dtype, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, transposed, the scale in memory of its own, amax."""
    if not runs_triton(gate_up) or not gate_up.numel():
        (d_gate_up,) = reference_gradients(glu_fused_reference, (gate_up, activation), (d_y,), (0,))
        return _made(d_gate_up, scale, dtype, True)
    from kernels.swiglu.quantized_kernel import glu_backward_quantized

    return glu_backward_quantized(d_y, gate_up, scale, dtype, activation)


@_glu_backward_quantized.register_fake
def _(
    d_y: Tensor, gate_up: Tensor, scale: Tensor, dtype: torch.dtype, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape
    used, amax = (gate_up.new_empty((), dtype=torch.float32) for _ in range(2))
    return gate_up.new_empty(rows, width, dtype=dtype), gate_up.new_empty(width, padded(rows), dtype=dtype), used, amax
