"""NF4 on 2^30 values, and on a weight of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.nf4 import dequantize_nf4, quantize_nf4
from kernels.nf4.reference import BLOCK, GROUP, levels, magnitude_levels

TUNED = "kernels.nf4.kernel:TILES"
SHAPES = ((32768, 32768), (14336, 4096))


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        n, q = x.numel(), quantize_nf4(x)
        size = sum(t.numel() * t.element_size() for t in q) + 2 * n
        compiled = torch.compile(_plain, dynamic=False)
        read = {
            "lattice": partial(dequantize_nf4, q, x.shape),
            "compile": partial(compiled, *q, levels(device), magnitude_levels(device)),
            **_bitsandbytes(x),
        }
        yield Problem("nf4_dequantize", "forward", f"{rows}x{columns}", "bf16", size, read, tuned=TUNED)
        yield Problem(
            "nf4_quantize",
            "forward",
            f"{rows}x{columns}",
            "bf16",
            size,
            {"lattice": partial(quantize_nf4, x)},
            tuned=TUNED,
        )


def _plain(
    packed: Tensor, magnitudes: Tensor, scales: Tensor, offset: Tensor, levels: Tensor, magnitude_levels: Tensor
) -> Tensor:
    """For a multiple of 64 * 256 values."""
    largest = magnitude_levels[magnitudes.int()].view(-1, GROUP) * scales[:, None] + offset
    values = levels[torch.stack([packed >> 4, packed & 15], dim=1).int()]
    return (values.view(-1, BLOCK) * largest.view(-1, 1)).bfloat16()


def _bitsandbytes(x: Tensor) -> dict[str, partial[Tensor]]:
    """Its dequantize_4bit, where it is installed."""
    try:
        bnb: ModuleType = __import__("bitsandbytes.functional", fromlist=["functional"])
    except ImportError:
        return {}
    packed, state = bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    return {"bitsandbytes": partial(bnb.dequantize_4bit, packed, state)}
