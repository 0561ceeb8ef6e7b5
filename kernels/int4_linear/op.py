"""The int4 linear layer as an op that compiled graphs keep whole. For inference: it has no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors, runs_triton
from kernels.int4_linear.reference import GROUP_SIZES, int4_linear_reference


def int4_linear(x: Tensor, packed: Tensor, scale_zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] weight^T + bias [N] to [..., N] in x's dtype, with the weight of quantize_int4.

    packed uint8 [N, K/2], scale_zero bf16 [K/G, N, 2], G of 64, 128 or 256. Sums in fp32, rounded once; the same bits
    in every call. Up to 64 rows, a decode step, weights are exact, and it is bound by reading them, about a quarter of
    bf16's; beyond that they are rounded to x's dtype. Not differentiable. Raises TypeError for DTensors and dtypes,
    ValueError for shapes.
    """
    refuse_dtensors(x=x, packed=packed, scale_zero=scale_zero, bias=bias)
    if not x.is_floating_point() or packed.dtype != torch.uint8 or scale_zero.dtype != torch.bfloat16:
        raise TypeError(
            f"x is {x.dtype}, packed {packed.dtype}, scale_zero {scale_zero.dtype}; use floating, uint8, bfloat16"
        )
    if packed.ndim != 2 or not x.ndim or x.shape[-1] != 2 * packed.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and packed {list(packed.shape)}; pass [..., K] and [N, K/2]")
    N, K = packed.shape[0], x.shape[-1]
    lengths = [scale_zero.shape[0] * size for size in GROUP_SIZES]
    if scale_zero.ndim != 3 or scale_zero.shape[1:] != (N, 2) or K not in lengths:
        raise ValueError(
            f"scale_zero has shape {list(scale_zero.shape)} for K = {K}, N = {N}; pass [K/G, N, 2] with G one of "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [N] = [{N}]")
    return _int4_linear(x.reshape(-1, K), packed, scale_zero, bias).view(*x.shape[:-1], N)


@torch.library.custom_op("lattice::int4_linear", mutates_args=())
def _int4_linear(x: Tensor, packed: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    if not runs_triton(x) or not x.numel() or not packed.numel():
        return int4_linear_reference(x, packed, scale_zero, bias).contiguous()
    from kernels.int4_linear.kernel import int4_linear

    bias = None if bias is None else bias.contiguous()
    return int4_linear(x.contiguous(), packed.contiguous(), scale_zero.contiguous(), bias)


@_int4_linear.register_fake
def _(x: Tensor, packed: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@register_flop_formula(torch.ops.lattice.int4_linear)
def _flops(x: torch.Size, packed: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode; the arguments are shapes."""
    return 2 * x[0] * x[1] * packed[0]
