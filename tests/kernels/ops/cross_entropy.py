"""Cases of cross entropy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy, cross_entropy_in_place
from kernels.cross_entropy.op import _cross_entropy, _cross_entropy_backward, _forward_in_place
from kernels.cross_entropy.reference import cross_entropy_reference
from tests.kernels.ops.case import Case, Inputs, Shape, detached, normal

SHAPES = [(3, 5, 123), (6, 1031), (1, 1), (2, 5000), (0, 7)]
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-2}


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return normal(shape, dtype, generator, scale=3.0), labels


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Of a copy, which the generic tests do not miss."""
    return cross_entropy_in_place(logits.clone(memory_format=torch.contiguous_format), labels, **SMOOTHED)


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    logits, labels = inputs[0].flatten(0, -2).detach().requires_grad_(), inputs[1].flatten()
    settings = (-100, 0.1, 1e-2)
    losses, lse = _cross_entropy(*detached(logits), labels, *settings)
    scale = torch.ones((), device=logits.device)
    return [
        (_cross_entropy, (logits, labels, *settings)),
        (_cross_entropy_backward, (losses, *detached(logits), labels, lse, *settings)),
        (_forward_in_place, (logits.detach().clone(), labels, scale, *settings)),
    ]


CASES = [
    Case(
        name="cross_entropy",
        op=cross_entropy,
        reference=cross_entropy_reference,
        inputs=_inputs,
        shapes=SHAPES,
        differentiable=(0,),
        checks=_checks,
        tuned="kernels.cross_entropy.kernel:TILES",
        batched=(0, 1),
    ),
    Case(
        name="cross_entropy_in_place",
        op=_in_place,
        reference=partial(cross_entropy_reference, **SMOOTHED),
        inputs=_inputs,
        shapes=SHAPES,
        differentiable=(0,),
        batched=(0, 1),
    ),
]
