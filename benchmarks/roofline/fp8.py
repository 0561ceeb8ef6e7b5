"""fp8: quantization, products, and the linear layer, on shapes of Llama-3-8B and DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline.problem import Problem, both_directions
from kernels.fp8 import (
    E4M3,
    DelayedScaling,
    ScalingRecipe,
    fp8_linear,
    fp8_matmul,
    quantize_blocks,
    quantize_rowwise,
    quantize_tensorwise,
    scale_from_amax,
)
from kernels.fp8.quantize.reference import (
    amax_reference,
    quantize_blocks_reference,
    quantize_rowwise_reference,
    quantize_tensorwise_reference,
)

_KERNEL = "kernels.fp8.quantize.kernel"
TABLES = {
    "tensorwise": f"{_KERNEL}:FLAT",
    "dynamic": f"{_KERNEL}:FLAT",
    "1x128": f"{_KERNEL}:ROWS_OF_BLOCKS",
    "128x128": f"{_KERNEL}:SQUARES",
}
TRANSPOSED_TABLES = {
    **dict.fromkeys(("tensorwise", "dynamic", "rowwise"), f"{_KERNEL}:TILE"),
    **dict.fromkeys(("1x128", "128x128"), f"{_KERNEL}:SQUARES"),
}


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, columns in ((32768, 7168), (16384, 4096), (16384, 14336)):
        yield from _quantizations(rows, columns, device)
    for M, N, K in ((8192, 8192, 8192), (16384, 28672, 4096), (16384, 4096, 14336)):
        yield from _products(M, N, K, device)
    for M, N, K in ((16384, 28672, 4096), (16384, 4096, 14336), (16384, 6144, 4096)):
        yield from _linears(M, N, K, device)


def _dynamic(x: Tensor, transpose: bool) -> tuple[Tensor, ...]:
    scale = scale_from_amax(amax_reference(x), E4M3)
    return tuple(t for t in quantize_tensorwise_reference(x, scale, E4M3, transpose) if t is not None)


def _rowwise(x: Tensor, transpose: bool) -> tuple[Tensor, ...]:
    return tuple(t for t in quantize_rowwise_reference(x, E4M3, False, transpose) if t is not None)


def _blocks(x: Tensor, transpose: bool, square: bool) -> tuple[Tensor, ...]:
    return tuple(t for t in quantize_blocks_reference(x, E4M3, False, square, transpose) if t is not None)


def _quantizations(rows: int, columns: int, device: torch.device) -> Iterator[Problem]:
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    scale = torch.full((), 0.01, device=device)
    for transpose in (False, True):
        kinds = {
            "tensorwise": (lambda x, transpose: quantize_tensorwise(x, scale, transpose=transpose), None, 2),
            "dynamic": (lambda x, transpose: quantize_tensorwise(x, transpose=transpose), _dynamic, 4),
            "rowwise": (quantize_rowwise, _rowwise, 4 if transpose else 2),
            "1x128": (partial(quantize_blocks, square=False), partial(_blocks, square=False), 2),
            "128x128": (partial(quantize_blocks, square=True), partial(_blocks, square=True), 2),
        }
        for kind, (ours, plain, read) in kinds.items():
            candidates = {"lattice": partial(ours, x, transpose=transpose)}
            if plain is not None:
                compiled = torch.compile(plain, dynamic=False)
                candidates |= {"eager": partial(plain, x, transpose), "compile": partial(compiled, x, transpose)}
            name = f"{kind} {rows}x{columns}{' and transposed' if transpose else ''}"
            size = x.numel() * (read + (2 if transpose else 1))
            tables = TRANSPOSED_TABLES if transpose else TABLES
            yield Problem("fp8_quantize", "forward", name, "bf16", size, candidates, tuned=tables.get(kind))


def _products(M: int, N: int, K: int, device: torch.device) -> Iterator[Problem]:
    x, w = (torch.randn(rows, K, device=device, dtype=torch.bfloat16) for rows in (M, N))
    flops, size = 2 * M * N * K, M * K + N * K + 2 * M * N
    kinds = {
        "tensorwise": (quantize_tensorwise(x)[0], quantize_tensorwise(w)[0]),
        "rowwise": (quantize_rowwise(x), quantize_rowwise(w)),
        "1x128 and 128x128": (quantize_blocks(x, square=False), quantize_blocks(w, square=True)),
        "1x128 and 1x128": (quantize_blocks(x, square=False), quantize_blocks(w, square=False)),
    }
    for kind, (a, b) in kinds.items():
        product = partial(fp8_matmul, a.data, a.scale, b.data, b.scale, fast_accumulation=True)
        candidates = {"lattice": product, "bf16": partial(torch.mm, x, w.t())}
        tuned = "kernels.fp8.matmul.kernel:TILES" if "1x128" in kind else None
        yield Problem("fp8_matmul", "forward", f"{kind} {M}x{N}x{K}", "fp8", size, candidates, flops, "fp8", tuned)


def _linears(M: int, N: int, K: int, device: torch.device) -> Iterator[Problem]:
    """Bytes are those of bf16 tensors that must be read and written; what is quantized in between is our cost."""
    x, w = (torch.randn(rows, K, device=device, dtype=torch.bfloat16, requires_grad=True) for rows in (M, N))
    functions = {"eager": F.linear}
    for kind in ("tensorwise_delayed", "tensorwise_dynamic", "rowwise", "block128"):
        recipe = ScalingRecipe(kind)
        scaling = DelayedScaling(1, recipe=recipe, device=device).layers[0] if kind == "tensorwise_delayed" else None
        layer = partial(fp8_linear, recipe=recipe, scaling=scaling)
        functions["lattice" if kind == "tensorwise_dynamic" else f"lattice {kind}"] = layer
    size = 2 * (M * K + N * K + M * N)
    for problem in both_directions(
        "fp8_linear", f"{M}x{N}x{K}", functions, (x, w), bytes=(size, 2 * size - 2 * M * N),
        flops=(2 * M * N * K, 4 * M * N * K),
    ):  # fmt: skip
        yield replace(problem, matrix="fp8")
