"""Cases of the permutation by expert, there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.moe_permute import permute, sort_by_expert, unpermute
from kernels.moe_permute.op import _permute, _sort_by_expert, _unpermute
from kernels.moe_permute.reference import permute_reference, sort_by_expert_reference, unpermute_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal

EXPERTS, MULTIPLE = 6, 4


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """shape: T, D, k. Some choices are of no expert, and expert 2 is nobody's."""
    tokens, features, k = shape
    experts = torch.randint(EXPERTS + 1, (tokens, k), generator=generator)
    experts[experts == 2] = 0
    return normal((tokens, features), dtype, generator), normal((tokens, k), torch.float32, generator), experts


def _op(x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    permutation = sort_by_expert(experts, EXPERTS, multiple=MULTIPLE)
    rows = permute(x, permutation)
    return rows, unpermute(rows, weights, permutation)


def _reference(x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    choice_of_row, row_of_choice, _ = sort_by_expert_reference(experts.flatten(), EXPERTS, MULTIPLE)
    rows = permute_reference(x, choice_of_row, experts.shape[1])
    return rows, unpermute_reference(rows, weights, row_of_choice)


def _checks(inputs: Inputs) -> list[tuple[object, Inputs]]:
    x, weights, experts = inputs
    choice_of_row, row_of_choice, _ = sort_by_expert_reference(experts.flatten(), EXPERTS, MULTIPLE)
    rows = permute_reference(x.detach(), choice_of_row, experts.shape[1]).requires_grad_()
    order = (choice_of_row, row_of_choice)
    return [
        (_sort_by_expert, (experts.flatten(), EXPERTS, MULTIPLE)),
        (_permute, (x, *order, experts.shape[1])),
        (_unpermute, (rows, weights, *order)),
    ]


CASES = [
    Case(
        name="moe_permute",
        op=_op,
        reference=_reference,
        inputs=_inputs,
        shapes=[(7, 37, 2), (5, 1200, 3), (1, 1, 1), (0, 5, 2)],
        differentiable=(0, 1),
        checks=_checks,
        tuned="kernels.moe_permute.kernel:BLOCKS",
        batch_dim=None,
        extremes=(0.0, 1e2, -1e2),
    )
]
