"""Cases of the fused attention: plain causal, and everything at once. Shapes are (B, T, H, G, K, V)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention.fused import _attention, _attention_backward, attention
from kernels.attention.mask import run_mask
from kernels.attention.reference import masked_attention, visible
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal

WINDOW = 11


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    B, T, H, G, K, V = shape
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    return tuple(normal(s, dtype, generator) for s in shapes)


def _masked_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    B, T, H, *_ = shape
    documents = torch.randint(0, 4, (B, T), generator=generator, dtype=torch.int32).sort(dim=1).values
    return *_inputs(shape, dtype, generator), normal((H,), dtype, generator), documents


def _causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, run_mask(q.shape[1], k.shape[1], q.device))


def _causal_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return masked_attention(q, k, v, visible(q.shape[1], q.device))


def _masked(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    of_both = {"query_documents": documents, "key_documents": documents}
    mask = run_mask(q.shape[1], k.shape[1], q.device, window=WINDOW, **of_both)
    return attention(q, k, v, mask, sinks=sinks)


def _masked_reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    return masked_attention(q, k, v, visible(q.shape[1], q.device, window=WINDOW, documents=documents), sinks=sinks)


def _checks(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    q, k, v, sinks, documents = inputs
    mask = run_mask(q.shape[1], k.shape[1], q.device, query_documents=documents, key_documents=documents)
    assert mask.ranges is not None
    rest = (*mask.ranges, True, None, 0, 0.3, False)
    arguments = (q, k, v, None, sinks, *rest)
    output, lse = (x.detach() for x in _attention(*arguments))
    return [
        (_attention, arguments),
        (_attention_backward, detached(output, lse, q, k, v, None, sinks, output, lse, *rest)),
    ]


# With all keys alike, gradients are differences of equal numbers; test_fused_attention.py has large scores.
EXTREMES = (0.0, 1.0, -1.0)

CASES = [
    Case(
        name="attention",
        op=_causal,
        reference=_causal_reference,
        inputs=_inputs,
        shapes=[(2, 19, 2, 1, 10, 6), (1, 67, 2, 2, 16, 20), (2, 0, 2, 1, 8, 8)],
        differentiable=(0, 1, 2),
        batched=(0, 1, 2),
        extremes=EXTREMES,
    ),
    Case(
        name="attention_masked",
        op=_masked,
        reference=_masked_reference,
        inputs=_masked_inputs,
        shapes=[(2, 19, 4, 2, 10, 6), (1, 67, 2, 1, 5, 16)],
        differentiable=(0, 1, 2, 3),
        checks=_checks,
        batched=(0, 1, 2, 4),
        extremes=EXTREMES,
    ),
]
