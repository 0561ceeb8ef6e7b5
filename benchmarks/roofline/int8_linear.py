"""Linear layers with a weight of 8-bit integers: decode steps and a prefill, on shapes of Llama-3-70B and 8B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.int8_linear import dequantize_int8, int8_linear, quantize_int8

SHAPES = ((8192, 28672), (28672, 8192), (4096, 4096))  # (K, N)


def _dequantized(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, dequantize_int8(data, scale).to(x.dtype))


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next. bf16 is torch's product with the
    weight as it was."""
    for K, N in SHAPES:
        weight = torch.randn(N, K, device=device, dtype=torch.bfloat16)
        quantized = quantize_int8(weight)
        for M in (1, 16, 64, 4096):
            x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
            candidates = {
                "lattice": partial(int8_linear, x, *quantized),
                "bf16": partial(F.linear, x, weight),
                "compile": partial(torch.compile(_dequantized, dynamic=False), x, *quantized),
            }
            size = sum(t.numel() * t.element_size() for t in (x, *quantized)) + 2 * M * N
            yield Problem(
                "int8_linear", "forward", f"{M}x{K}x{N}", "bf16", size, candidates, 2 * M * N * K,
                tuned="kernels.int8_linear.kernel:TILES",
            )  # fmt: skip
