"""SwiGLU on the shapes of Llama-3-8B's MLP: of two tensors, of one projection's output, and with fp8 as output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions, forward_only
from kernels.rms_norm.reference import quantize_reference
from kernels.swiglu import swiglu, swiglu_fp8, swiglu_fused
from kernels.swiglu.reference import swiglu_fused_reference, swiglu_reference

TABLE = ("kernels.swiglu.kernel:BLOCKS", "kernels.swiglu.kernel:BLOCKS")


def _fp8(gate_up: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor]:
    y = swiglu_fp8(gate_up, scale=scale[0] if scale else None)
    return y.y, y.scale if y.amax is None else y.amax


def _fp8_reference(gate_up: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_reference(swiglu_fused_reference(gate_up), scale[0] if scale else None)


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
        scale = torch.full((), 0.02, device=device)
        functions = {"lattice": _fp8, "eager": _fp8_reference, "compile": torch.compile(_fp8_reference, dynamic=False)}
        for name, inputs in ((f"fp8 by tensor {shape}", (gate_up, scale)), (f"fp8 by row {shape}", (gate_up,))):
            yield forward_only("swiglu", name, functions, inputs, bytes=size * 5 // 2, tuned=TABLE[0])
