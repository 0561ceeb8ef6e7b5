"""Cases of linear layers with weights of 8-bit and 4-bit integers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.int4_linear import dequantize_int4, int4_linear, quantize_int4
from kernels.int4_linear.op import _int4_linear
from kernels.int8_linear import dequantize_int8, int8_linear, quantize_int8
from kernels.int8_linear.op import _int8_linear
from tests.kernels.ops.case import Case, Inputs, Shape, normal

QUANTIZE: dict[str, Any] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "int4_64": partial(quantize_int4, group_size=64),
}
DEQUANTIZE: dict[str, Any] = {"int8": dequantize_int8, "int4": dequantize_int4, "int4_64": dequantize_int4}
OPS: dict[str, Any] = {"int8": int8_linear, "int4": int4_linear, "int4_64": int4_linear}


def _inputs(kind: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The quantized weight as bytes, so that tests that change dtypes leave it alone."""
    M, K, N = shape
    weight = normal((N, K), torch.float32, generator, scale=K**-0.5)
    data, scale = QUANTIZE[kind](weight)
    return normal((M, K), dtype, generator), data, scale.view(torch.int16), normal((N,), dtype, generator)


def _op(kind: str, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return OPS[kind](x, *_weight(kind, data, scale), bias)


def _weight(kind: str, data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return data, scale.clone(memory_format=torch.contiguous_format).view(
        torch.float32 if kind == "int8" else torch.bfloat16
    )


def _oracle(kind: str, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The weight dequantized, and torch's product in fp32 or fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = DEQUANTIZE[kind](*_weight(kind, data, scale)).to(wide)
    return torch.nn.functional.linear(x.to(wide), weight, bias.to(wide)).to(x.dtype)


def _checks(kind: str, inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    x, data, scale, bias = inputs
    return [(_int8_linear if kind == "int8" else _int4_linear, (x, *_weight(kind, data, scale), bias))]


def _case(kind: str, shapes: list[Shape]) -> Case:
    return Case(
        name=f"{kind}_linear",
        op=partial(_op, kind),
        reference=partial(_oracle, kind),
        inputs=partial(_inputs, kind),
        shapes=shapes,
        differentiable=(),
        extreme_arguments=(0, 3),
        checks=partial(_checks, kind),
        tuned=f"kernels.{kind.split('_')[0]}_linear.kernel:TILES",
        batch_dim=None,
    )


CASES = [
    _case("int8", [(5, 123, 37), (70, 72, 130), (1, 1024, 16), (0, 16, 16)]),
    _case("int4", [(5, 256, 37), (70, 128, 130), (1, 1152, 16), (0, 128, 16)]),
    _case("int4_64", [(3, 192, 40)]),
]
