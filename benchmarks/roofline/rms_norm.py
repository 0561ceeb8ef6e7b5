"""RMSNorm on the widths of Llama, alone, with the residual addition, and with fp8 as output; last before products in
fp8, where it writes both copies that they read (precision.fp8_fused), against a norm in bf16 that is quantized then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions, forward_only
from kernels.fp8 import Quantized, quantize_rowwise, quantize_tensorwise
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_fp8
from kernels.rms_norm.reference import add_rms_norm_reference, quantize_reference, rms_norm_reference

EPS = 1e-5
TABLES = ("kernels.rms_norm.kernel:FORWARD", "kernels.rms_norm.kernel:BACKWARD")


def _eager(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _eager_added(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stream = x + residual
    return _eager(stream, weight, EPS), stream


def _fp8(x: torch.Tensor, weight: torch.Tensor, *scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = rms_norm_fp8(x, weight, EPS, scale=scale[0] if scale else None)
    return y.y, y.scale if y.amax is None else y.amax


def _fp8_reference(x: torch.Tensor, weight: torch.Tensor, *scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_reference(rms_norm_reference(x, weight, EPS), scale[0] if scale else None)


def _bytes(made: Quantized, stream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    assert made.transposed is not None
    return made.data, made.transposed, stream


def _before_products(rows: int, width: int, device: torch.device) -> Iterator[Problem]:
    """`eager`: our kernels, of which one writes bf16 and the next quantizes it; `compile`: inductor's in the place of
    the first, as in a block without precision.fp8_fused."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, residual, weight = make(rows, width), make(rows, width), make(width)
    scale = torch.full((), 0.02, device=device)
    compiled = torch.compile(partial(add_rms_norm_reference, eps=EPS), dynamic=False)
    norms = {"eager": partial(add_rms_norm, eps=EPS), "compile": compiled}

    def ours(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, *s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = rms_norm_fp8(x, w, EPS, scale=s[0] if s else None, residual=r, transpose=True)
        return _bytes(Quantized(made.y, made.scale, made.transposed, made.transposed_scale), made.stream)

    def quantized(norm: Callable[..., Any], x: Any, r: Any, w: Any, *s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, stream = norm(x, r, w)
        made = quantize_tensorwise(y, s[0], transpose=True)[0] if s else quantize_rowwise(y, transpose=True)
        return _bytes(made, stream)

    functions = {"lattice": ours} | {name: partial(quantized, norm) for name, norm in norms.items()}
    for name, extra in (("by tensor", (scale,)), ("by row", ())):
        name = f"add, fp8 {name} and transposed {rows}x{width}"
        yield forward_only("rms_norm", name, functions, (x, residual, weight, *extra), bytes=8 * x.numel())


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((32768, 4096), (8192, 4096), (32768, 2048), (8192, 16384), (1 << 20, 128)):
        make = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
        x, residual, weight = make(rows, width), make(rows, width), make(width)
        size, shape = x.numel() * x.element_size(), f"{rows}x{width}"
        functions = {
            "lattice": partial(rms_norm, eps=EPS),
            "eager": partial(_eager, eps=EPS),
            "compile": torch.compile(partial(rms_norm_reference, eps=EPS), dynamic=False),
            **liger("rms_norm:LigerRMSNormFunction", EPS, 0.0, "llama", False),
        }
        yield from both_directions("rms_norm", shape, functions, (x, weight), bytes=(2 * size, 3 * size), tuned=TABLES)
        if width < 2048:
            continue
        functions = {
            "lattice": partial(add_rms_norm, eps=EPS),
            "eager": _eager_added,
            "compile": torch.compile(partial(add_rms_norm_reference, eps=EPS), dynamic=False),
            **liger("fused_add_rms_norm:LigerFusedAddRMSNormFunction", EPS, 0.0, "llama", False),
        }
        yield from both_directions(
            "rms_norm", f"add {shape}", functions, (x, residual, weight), bytes=(4 * size, 4 * size), tuned=TABLES
        )
        scale = torch.full((), 0.02, device=device)
        functions = {"lattice": _fp8, "eager": _fp8_reference, "compile": torch.compile(_fp8_reference, dynamic=False)}
        for name, inputs in ((f"fp8 by tensor {shape}", (x, weight, scale)), (f"fp8 by row {shape}", (x, weight))):
            yield forward_only("rms_norm", name, functions, inputs, bytes=size * 3 // 2, tuned=TABLES[0])
    yield from _before_products(16384, 4096, device)
