"""The learning rate against closed formulas and transformers' schedules; settings that cannot run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from trainer.config import SCHEDULES, OptimConfig, ScheduleConfig
from trainer.schedule import learning_rate, problems

BASE = 3e-4


def rates(config: ScheduleConfig, total_steps: int, base_lr: float = BASE) -> list[float]:
    """Learning rates of steps 1 to total_steps."""
    return [
        learning_rate(config, base_lr=base_lr, step=step, total_steps=total_steps) for step in range(1, total_steps + 1)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_a_line_from_a_fraction_to_the_whole(name: str) -> None:
    """A first step at 0 is wasted; a warm-up that ends a step early or late never, or twice, gives the whole."""
    got = rates(ScheduleConfig(name=name, warmup_steps=4), 20)
    assert got[:4] == pytest.approx([BASE / 4, BASE / 2, BASE * 3 / 4, BASE], rel=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_whole(name: str) -> None:
    """A run without warm-up that starts below, or divides by zero."""
    assert rates(ScheduleConfig(name=name), 20)[0] == BASE
    assert rates(ScheduleConfig(name=name, warmup_steps=1), 20) == rates(ScheduleConfig(name=name), 20)


@pytest.mark.parametrize("final_fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_step_has_the_final_fraction(name: str, final_fraction: float) -> None:
    """An off-by-one at the end leaves the run above its floor, or takes it to 0 and wastes the last step."""
    got = rates(ScheduleConfig(name=name, warmup_steps=3, final_fraction=final_fraction), 50)
    assert got[-1] == pytest.approx(final_fraction * BASE, abs=1e-18)
    assert got[-2] == pytest.approx(BASE) if final_fraction == 1.0 else got[-2] > got[-1]


def test_constant_stays() -> None:
    """A constant that decays."""
    assert set(rates(ScheduleConfig(name="constant"), 30)) == {BASE}


def test_linear_and_cosine_follow_their_formulas() -> None:
    """A decay that counts from step 0 instead of the end of warm-up."""
    linear = rates(ScheduleConfig(name="linear", warmup_steps=10, final_fraction=0.2), 110)
    cosine = rates(ScheduleConfig(name="cosine", warmup_steps=10, final_fraction=0.2), 110)
    for step in range(10, 111):
        t = (step - 10) / 100
        assert linear[step - 1] == pytest.approx(BASE * (1 - 0.8 * t), rel=1e-12)
        assert cosine[step - 1] == pytest.approx(BASE * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * t))), rel=1e-12)
    assert cosine[59] == pytest.approx(BASE * 0.6)


@pytest.mark.parametrize("decay_steps", [None, 10, 40])
def test_wsd_is_flat_then_falls_as_one_minus_the_root(decay_steps: int | None) -> None:
    """A decay that starts early, or is linear."""
    length = decay_steps or 10  # a tenth of 100
    got = rates(ScheduleConfig(name="wsd", warmup_steps=5, decay_steps=decay_steps, final_fraction=0.0), 100)
    assert set(got[4 : 100 - length]) == {BASE}
    for n in range(1, length + 1):
        assert got[100 - length + n - 1] == pytest.approx(BASE * (1 - math.sqrt(n / length)), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_linear_and_cosine_to_zero_are_those_of_transformers_one_step_on(name: str) -> None:
    """An own reading of a well-known schedule. Theirs counts from 0 and so wastes step 1 on a rate of 0."""
    from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = get_linear_schedule_with_warmup if name == "linear" else get_cosine_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    schedule = make(optimizer, num_warmup_steps=7, num_training_steps=60)
    theirs = []
    for _ in range(60):
        optimizer.step()
        schedule.step()
        theirs.append(schedule.get_last_lr()[0])
    ours = rates(ScheduleConfig(name=name, warmup_steps=7, final_fraction=0.0), 60)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warmup=st.integers(0, 320),
    decay=st.none() | st.integers(-1, 320),
    final=st.floats(-0.1, 1.1),
)
def test_every_accepted_setting_rises_to_the_whole_then_never_rises_again(
    name: str, total: int, warmup: int, decay: int | None, final: float
) -> None:
    """Settings that pass the check and then divide by zero, go negative, or jump back up; or fail without a message."""
    config = ScheduleConfig(name=name, warmup_steps=warmup, decay_steps=decay, final_fraction=final)
    if found := problems(config, OptimConfig(), total):
        assert all(line.startswith("schedule.") for line in found)
        with pytest.raises(ValueError, match="schedule"):
            rates(config, total)
        return
    got = rates(config, total)
    peak = max(warmup, 1) - 1
    assert max(got) == got[peak] == BASE
    assert all(a < b for a, b in pairwise(got[: peak + 1]))
    assert all(a >= b for a, b in pairwise(got[peak:]))
    assert min(got[peak:]) >= max(0.0, BASE * (final - 1e-15))


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    """A step counted from 0 trains with the rate of another step."""
    with pytest.raises(ValueError, match=rf"step={step} .* 1 to train.steps=10"):
        learning_rate(ScheduleConfig(), base_lr=BASE, step=step, total_steps=10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig(name="step"), "schedule.name=step is not a schedule; use schedule.name=constant"),
        (ScheduleConfig(warmup_steps=101), "schedule.warmup_steps=101 does not fit into train.steps=100; use "),
        (ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps=-1 does not fit"),
        (ScheduleConfig(final_fraction=1.5), "schedule.final_fraction=1.5 must be between 0 and 1"),
        (ScheduleConfig(final_fraction=float("nan")), "schedule.final_fraction=nan must be between 0 and 1"),
        (ScheduleConfig(decay_steps=10), "schedule.decay_steps=10 has no effect with schedule.name=cosine"),
        (ScheduleConfig(name="wsd", decay_steps=0), "schedule.decay_steps=0 must be at least 1"),
        (
            ScheduleConfig(name="wsd", warmup_steps=60, decay_steps=50),
            "schedule.warmup_steps=60 and schedule.decay_steps=50 together are longer than train.steps=100",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_with_field_and_value(config: ScheduleConfig, message: str) -> None:
    """A warm-up longer than the run never reaches optim.lr, without any error."""
    (found,) = problems(config, OptimConfig(), 100)
    assert found.startswith(message)


def test_problems_of_schedule_and_optimizer_are_reported_together() -> None:
    """One error per start makes two starts of two mistakes."""
    found = problems(ScheduleConfig(name="?"), OptimConfig(lr=-1.0), 100)
    assert [line.split("=")[0] for line in found] == ["optim.lr", "schedule.name"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_settings_files_are_valid_and_named_after_the_schedule(name: str) -> None:
    """A typo in a YAML file that only the run that selects it would find."""
    path = Path(__file__).parents[2] / "configs" / "schedule" / f"{name}.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScheduleConfig), OmegaConf.load(path)))
    assert isinstance(config, ScheduleConfig)
    assert config.name == name
    assert problems(config, OptimConfig(), 100) == []
