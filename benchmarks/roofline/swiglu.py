"""SwiGLU on the shapes of Llama-3-8B's MLP: of two tensors and of one projection's output; last between two products in
fp8, where it writes both copies that they read (precision.fp8_fused), against steps of which one writes bf16 and the
other quantizes that."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions, forward_only
from kernels.fp8 import Quantized, quantize_tensorwise
from kernels.swiglu import (
    swiglu,
    swiglu_backward_quantized,
    swiglu_fused,
    swiglu_fused_backward,
    swiglu_quantized,
)
from kernels.swiglu.reference import swiglu_fused_reference, swiglu_reference

TABLE = ("kernels.swiglu.kernel:BLOCKS", "kernels.swiglu.kernel:BLOCKS")


def _bytes(made: tuple[Quantized, Tensor]) -> tuple[Tensor, ...]:
    quantized, amax = made
    assert quantized.transposed is not None
    return quantized.data, quantized.transposed, amax


def _between_products(rows: int, width: int, device: torch.device) -> Iterator[Problem]:
    """Of delayed scaling: the scale is known. `eager`: our kernels, of which one writes bf16 and the next quantizes it;
    `compile`: inductor's in the place of the first, as in a block without precision.fp8_fused."""
    gate_up = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16)
    d_y, scale = torch.randn(rows, width, device=device, dtype=torch.bfloat16), torch.full((), 0.02, device=device)
    compiled = torch.compile(swiglu_fused_reference, dynamic=False)
    compiled_backward = torch.compile(_gradient, dynamic=False)
    forward = {
        "lattice": lambda x, s: _bytes(swiglu_quantized(x, s, transpose=True)),
        "eager": lambda x, s: _bytes(quantize_tensorwise(swiglu_fused(x), s, transpose=True)),
        "compile": lambda x, s: _bytes(quantize_tensorwise(compiled(x), s, transpose=True)),
    }
    backward = {
        "lattice": lambda d, x, s: _bytes(swiglu_backward_quantized(d, x, s)),
        "eager": lambda d, x, s: _bytes(quantize_tensorwise(swiglu_fused_backward(d, x), s, transpose=True)),
        "compile": lambda d, x, s: _bytes(quantize_tensorwise(compiled_backward(d, x), s, transpose=True)),
    }
    size, tables = rows * width, "kernels.swiglu.quantized_kernel"
    name = f"fp8 and transposed {rows}x{width}"
    yield forward_only("swiglu", name, forward, (gate_up, scale), bytes=6 * size, tuned=f"{tables}:FORWARD")
    name, inputs = f"gradient in {name}", (d_y, gate_up, scale)
    yield forward_only("swiglu", name, backward, inputs, bytes=10 * size, tuned=f"{tables}:BACKWARD")


def _gradient(d_y: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    share, d = torch.sigmoid(gate), d_y.float()
    return torch.cat((d * up * (share + gate * share * (1 - share)), d * gate * share), dim=-1).to(d_y.dtype)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((8192, 14336), (8192, 16384), (32768, 8192)):
        gate, up = (torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        size, shape = gate.numel() * gate.element_size(), f"{rows}x{width}"
        moved = (3 * size, 5 * size)
        functions = {
            "lattice": swiglu,
            "eager": swiglu_reference,
            "compile": torch.compile(swiglu_reference, dynamic=False),
            **liger("swiglu:LigerSiLUMulFunction"),
        }
        yield from both_directions("swiglu", shape, functions, (gate, up), bytes=moved, tuned=TABLE)
        gate_up = torch.cat((gate, up), dim=-1).detach().requires_grad_()
        functions = {
            "lattice": swiglu_fused,
            "eager": swiglu_fused_reference,
            "compile": torch.compile(swiglu_fused_reference, dynamic=False),
            **liger("swiglu:LigerFusedGateUpSiLUMulFunction"),
        }
        yield from both_directions("swiglu", f"fused {shape}", functions, (gate_up,), bytes=moved, tuned=TABLE)
    yield from _between_products(16384, 14336, device)
