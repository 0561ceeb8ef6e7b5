"""The int8 linear layer as an op that compiled graphs keep whole. For inference: it has no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors, runs_triton
from kernels.int8_linear.reference import int8_linear_reference


def int8_linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] (data * scale[:, None])^T + bias [N] to [..., N] in x's dtype; data int8 [N, K], scale fp32 [N].

    Sums in fp32, rounded once; the same bits in every call. Up to 64 rows, a decode step, it is bound by reading the
    weight, half of that in bf16. Not differentiable. Raises TypeError for DTensors and dtypes, ValueError for shapes.
    """
    refuse_dtensors(x=x, data=data, scale=scale, bias=bias)
    if not x.is_floating_point() or data.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}, data {data.dtype}, scale {scale.dtype}; use floating, int8, float32")
    if data.ndim != 2 or not x.ndim or x.shape[-1] != data.shape[1] or scale.shape != data.shape[:1]:
        raise ValueError(
            f"x has shape {list(x.shape)}, data {list(data.shape)}, scale {list(scale.shape)}; "
            "pass [..., K], [N, K] and [N]"
        )
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [N] = [{data.shape[0]}]")
    y = _int8_linear(x.reshape(-1, x.shape[-1]), data, scale, bias)
    return y.view(*x.shape[:-1], data.shape[0])


@torch.library.custom_op("lattice::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not runs_triton(x) or not x.numel() or not data.numel():
        return int8_linear_reference(x, data, scale, bias).contiguous()
    from kernels.int8_linear.kernel import int8_linear

    bias = None if bias is None else bias.contiguous()
    return int8_linear(x.contiguous(), data.contiguous(), scale.contiguous(), bias)


@_int8_linear.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], data.shape[0])


@register_flop_formula(torch.ops.lattice.int8_linear)
def _flops(x: torch.Size, data: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode; the arguments are shapes."""
    return 2 * x[0] * data[0] * data[1]
