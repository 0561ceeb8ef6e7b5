"""The rule of the dynamic loss scale, against one written with plain numbers. Its use in a step: test_trainer.py."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.precision import PrecisionConfig, problems
from trainer.loss_scale import LARGEST, SMALLEST, LossScale


def after(scale: LossScale, skips: list[bool]) -> list[float]:
    """The scale after each of these steps."""
    seen = []
    for skipped in skips:
        scale.update(torch.tensor(float(skipped)))
        seen.append(scale.scale.item())
    return seen


def fp16(first: float = 1024.0, interval: int = 3) -> LossScale:
    config = PrecisionConfig(compute="fp16", loss_scale=first, loss_scale_growth_interval=interval)
    assert problems(config) == []
    return LossScale(config, torch.device("cpu"))


def expected(first: float, interval: int, skips: list[bool]) -> list[float]:
    """Micikevicius et al., section 3.2, in words: halve at an overflow, double after `interval` steps without one."""
    scale, without_overflow, seen = first, 0, []
    for skipped in skips:
        if skipped:
            scale, without_overflow = max(scale / 2, SMALLEST), 0
        else:
            without_overflow += 1
            if without_overflow == interval:
                scale, without_overflow = min(scale * 2, LARGEST), 0
        seen.append(scale)
    return seen


@settings(deadline=None, max_examples=60)
@given(skips=st.lists(st.booleans(), max_size=60), interval=st.integers(1, 6))
def test_the_scale_follows_the_rule_for_any_sequence_of_overflows(skips: list[bool], interval: int) -> None:
    """A count of good steps that an overflow does not reset, or that goes on after the scale has grown."""
    assert after(fp16(interval=interval), skips) == expected(1024.0, interval, skips)


def test_the_scale_stays_within_bounds_and_comes_back() -> None:
    """A scale that underflows to zero, or grows to infinity on gradients of zero: from neither is there a way back."""
    scale = fp16(first=4.0, interval=1)
    assert after(scale, [True] * 40)[-1] == SMALLEST
    assert after(scale, [False] * 60)[-1] == LARGEST
    assert after(scale, [True])[-1] == LARGEST / 2


def test_the_state_continues_in_the_middle_of_an_interval() -> None:
    """A restart that forgets how many good steps there were, and so is not the run it continues."""
    skips = [False, False, True, False, False, False, False, False]
    whole = after(fp16(), skips)
    first, second = fp16(), fp16(first=2.0)
    before = after(first, skips[:5])
    for name, tensor in second.state_tensors().items():
        tensor.copy_(first.state_tensors()[name])
    assert before + after(second, skips[5:]) == whole


def test_other_precisions_are_not_scaled() -> None:
    """bf16 runs whose scale shrinks at each skipped step until gradients underflow."""
    for compute in ("fp32", "bf16"):
        scale = LossScale(PrecisionConfig(compute=compute), torch.device("cpu"))
        assert not scale.dynamic
        assert after(scale, [True, False, True]) == [1.0, 1.0, 1.0]


def test_a_first_scale_out_of_bounds_is_refused() -> None:
    """A scale that is changed silently by the first update."""
    for value in (0.0, -1.0, 2.0**25, float("nan"), float("inf")):
        (problem,) = problems(PrecisionConfig(compute="fp16", loss_scale=value))
        assert problem.startswith(f"precision.loss_scale={value} must be positive")
