"""The comparison itself: what it must not overlook."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity.harness import (
    Outcome,
    gradient_deviation,
    largest,
    loss_deviation,
    norm_deviation,
    relative_difference,
    weight_deviation,
)


def outcome() -> Outcome:
    tensors = {"first": torch.ones(3), "nothing": torch.zeros(2), "last": torch.ones(3)}
    return Outcome([2.0, 1.0], [1.0, 0.5], tensors, dict(tensors), [])


@pytest.mark.parametrize("wrong", [math.nan, 1.5, math.inf])
def test_a_wrong_number_is_seen_wherever_it_is(wrong: float) -> None:
    """NaN, which max() loses unless it comes first; a tensor that is 0 in the reference and nowhere else."""
    good = outcome()
    changed: list[tuple[Any, dict[str, Any]]] = [(loss_deviation, {"losses": [2.0, wrong]})]
    changed += [(norm_deviation, {"grad_norms": [1.0, wrong]})]
    for name in good.weights:
        tensors = good.weights | {name: torch.tensor([*good.weights[name][:-1].tolist(), wrong])}
        changed += [(weight_deviation, {"weights": tensors}), (gradient_deviation, {"first_gradients": tensors})]
    for deviation, change in changed:
        assert deviation(good, good) == 0
        assert not deviation(replace(good, **change), good) <= 0.1, (deviation, change)


def test_largest_of_numbers_is_theirs() -> None:
    assert largest([0.5, 2.0, 1.0]) == 2.0
    assert math.isnan(largest([math.nan, 1.0]))
    assert math.isnan(largest([1.0, math.nan]))
    assert relative_difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
