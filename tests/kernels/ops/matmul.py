"""Cases of the teaching matrix product and of the linear layer with GELU."""

from __future__ import annotations

import torch

from kernels.matmul import linear_gelu, matmul
from kernels.matmul.op import _linear_gelu, _matmul
from kernels.matmul.reference import linear_gelu_reference, matmul_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _matrices(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    M, K, N = shape
    return normal((M, K), dtype, generator), normal((K, N), dtype, generator, scale=K**-0.5)


def _layer(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    M, K, N = shape
    return (
        normal((M, K), dtype, generator),
        normal((N, K), dtype, generator, scale=K**-0.5),
        normal((N,), dtype, generator),
        normal((M, N), dtype, generator),
    )


CASES = [
    Case(
        name="matmul",
        op=matmul,
        reference=matmul_reference,
        inputs=_matrices,
        shapes=[(5, 123, 37), (200, 65, 70), (1, 1, 1), (3, 5, 0)],
        differentiable=(0, 1),
        checks=lambda inputs: [(_matmul, inputs)],
        tuned="kernels.matmul.kernel:TILES",
        tuned_dtype=torch.bfloat16,  # whose stages fit into shared memory; those of fp32 are twice as large
        batch_dim=None,
        extremes=(0.0, 1e2, -1e2),
    ),
    Case(
        name="linear_gelu",
        op=linear_gelu,
        reference=linear_gelu_reference,
        inputs=_layer,
        shapes=[(5, 123, 37), (70, 33, 130), (1, 1, 1)],
        differentiable=(0, 1, 2, 3),
        checks=lambda inputs: [(_linear_gelu, (*inputs, True))],
        tuned="kernels.matmul.kernel:TILES",
        tuned_dtype=torch.bfloat16,  # whose stages fit into shared memory; those of fp32 are twice as large
        batch_dim=None,
        extremes=(0.0, 3.0, -1.0),
    ),
]
