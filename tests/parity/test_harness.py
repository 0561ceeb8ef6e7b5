"""The comparison itself: what it must not overlook."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from tests.parity.compare import Deviation
from tests.parity.harness import (
    Outcome,
    Reference,
    assert_same_model,
    gradient_deviation,
    largest,
    loss_deviation,
    norm_deviation,
    relative_difference,
    tiny_config,
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


def _moved(tensors: dict[str, torch.Tensor], name: str, by: float) -> dict[str, torch.Tensor]:
    """One element of one tensor moved by this part of the tensor's maximum."""
    tensor = tensors[name].clone()
    tensor[1] += by * tensor.abs().max()
    return tensors | {name: tensor}


SENSITIVITY = 1e-4
WRONG: dict[str, Callable[[Outcome, float], Outcome]] = {
    "the first loss": lambda o, by: replace(o, losses=[o.losses[0] * (1 + by), *o.losses[1:]]),
    "the last loss": lambda o, by: replace(o, losses=[*o.losses[:-1], o.losses[-1] * (1 - by)]),
    "the last gradient norm": lambda o, by: replace(o, grad_norms=[*o.grad_norms[:-1], o.grad_norms[-1] * (1 + by)]),
    "a gradient": lambda o, by: replace(o, first_gradients=_moved(o.first_gradients, "last", by)),
    "another gradient": lambda o, by: replace(o, first_gradients=_moved(o.first_gradients, "first", -by)),
    "a weight": lambda o, by: replace(o, weights=_moved(o.weights, "last", by)),
}
LIMITS = {"loss": 1e-6, "gradient": 1e-5, "weight": 2 * SENSITIVITY}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_just_over_its_limit_is_a_problem(what: str) -> None:
    """Control of the comparisons that parity tests make: one wrong element of one tensor, one loss off by 2e-6."""
    data = DataConfig(source="text", path=__file__)
    reference = Reference(tiny_config(Path("unused"), data), outcome(), SENSITIVITY)
    limit = next(LIMITS[kind] for kind in ("loss", "gradient", "weight") if kind in what)
    within, beyond = (WRONG[what](outcome(), factor * limit) for factor in (0.5, 2.0))
    assert_same_model(within, reference)
    assert not Deviation.of(within, reference).problems()
    assert len(Deviation.of(beyond, reference).problems()) == 1
    with pytest.raises(AssertionError):
        assert_same_model(beyond, reference)


def test_a_tensor_that_is_missing_or_too_many_is_noticed() -> None:
    """A layout that loses a parameter, which then compares to nothing."""
    good = outcome()
    fewer = {"first": good.weights["first"]}
    for field, deviation in (("weights", weight_deviation), ("first_gradients", gradient_deviation)):
        for one, other in ((good, replace(good, **{field: fewer})), (replace(good, **{field: fewer}), good)):
            with pytest.raises(AssertionError):
                deviation(one, other)
