"""Products of quantized matrices in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8.quantize.reference import dequantize


def matmul_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """a [M, K] b [N, K]^T + bias [N] in fp32, of the dequantized numbers; rounded once to [M, N] of out_dtype."""
    y = dequantize(a, a_scale) @ dequantize(b, b_scale).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)
