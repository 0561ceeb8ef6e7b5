"""Cases of rotary position embedding."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.rope import rope, rope_qkv
from kernels.rope.op import _rope, _rope_qkv, _rope_qkv_backward
from kernels.rope.reference import rope_qkv_reference, rope_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal


def _tables(batch: int, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    angles = torch.rand(batch, shape[1], 1, shape[3] // 2, generator=generator) * 100
    return angles.cos(), angles.sin()


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """shape: of q; half as many heads of k, at least one; one table for all sequences."""
    k = normal((*shape[:2], max(1, shape[2] // 2), shape[3]), dtype, generator)
    return normal(shape, dtype, generator), k, *_tables(1, shape, generator)


def _inputs_packed(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Queries alone, with positions of their own in every sequence."""
    return normal(shape, dtype, generator), None, *_tables(shape[0], shape, generator)


def _inputs_qkv(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return normal(shape, dtype, generator), *_tables(shape[0], shape, generator)


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    return [(_rope, (*inputs, False)), (_rope, (*detached(*inputs), True))]


def _checks_qkv(inputs: Inputs) -> list[tuple[object, Inputs]]:
    qkv, cos, sin = inputs
    d_q, d_k, d_v = qkv.detach().clone().split((3, 1, 1), dim=2)
    return [(_rope_qkv, (qkv, cos, sin, 3, 1)), (_rope_qkv_backward, (d_q, d_k, d_v, cos, sin))]


CASES = [
    Case(
        name="rope",
        op=rope,
        reference=rope_reference,
        inputs=_inputs,
        shapes=[(2, 5, 3, 14), (3, 2, 4, 128), (1, 1, 1, 2), (0, 3, 2, 4)],
        differentiable=(0, 1),
        checks=_checks,
        tuned="kernels.rope.kernel:BLOCKS",
        batched=(0, 1),
    ),
    Case(
        name="rope_of_queries",
        op=lambda *inputs: rope(*inputs)[0],
        reference=lambda *inputs: rope_reference(*inputs)[0],
        inputs=_inputs_packed,
        shapes=[(2, 7, 3, 64)],
        differentiable=(0,),
        batched=(0, 2, 3),
    ),
    Case(
        name="rope_qkv",
        op=partial(rope_qkv, num_heads=3, num_kv_heads=1),
        reference=partial(rope_qkv_reference, num_heads=3, num_kv_heads=1),
        inputs=_inputs_qkv,
        shapes=[(2, 5, 5, 14), (1, 3, 5, 128)],
        differentiable=(0,),
        checks=_checks_qkv,
        tuned="kernels.rope.kernel:BLOCKS",
        batched=(0, 1, 2),
    ),
]
