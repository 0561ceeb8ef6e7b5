"""The learning rate as a function of the step, and of nothing else."""

from __future__ import annotations

import math

from parallel.problem import Problem, values
from trainer import optim as optimizers
from trainer.config import SCHEDULES, OptimConfig, ScheduleConfig


def learning_rate(config: ScheduleConfig, *, base_lr: float, step: int, total_steps: int) -> float:
    """Learning rate of a step, 1 <= step <= total_steps.

    Warm-up: base_lr * step / warmup_steps, so base_lr at step warmup_steps (without warm-up, at step 1). From there to
    final_fraction * base_lr at the last step: linear, or cosine (1608.03983, eq. 5), or wsd, which stays at base_lr
    until decay_steps before the end and then falls as 1 - sqrt (2405.18392). constant stays at base_lr. Raises
    ValueError for a step outside the run and for settings that `problems` finds fault with.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step={step} is not a step of the run; steps are 1 to train.steps={total_steps}")
    if found := _schedule_problems(config, total_steps):
        raise ValueError("; ".join(found))
    if step < config.warmup_steps:
        return base_lr * step / config.warmup_steps
    if config.name == "constant":
        return base_lr
    peak = max(config.warmup_steps, 1)  # the last step at base_lr; a run that ends there never decays
    if config.name == "wsd":
        peak = max(peak, total_steps - wsd_decay_steps(config, total_steps))
    if step <= peak:
        return base_lr
    progress = (step - peak) / (total_steps - peak)
    fall = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2, "wsd": math.sqrt(progress)}
    return base_lr * (1 - (1 - config.final_fraction) * fall[config.name])


def wsd_decay_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Length of the final decay of wsd in steps."""
    return config.decay_steps if config.decay_steps is not None else max(1, total_steps // 10)


def problems(config: ScheduleConfig, optim: OptimConfig, total_steps: int) -> list[str]:
    """Every reason why this schedule and optimizer cannot run for total_steps, one line each."""
    return optimizers.problems(optim) + _schedule_problems(config, total_steps)


def _schedule_problems(config: ScheduleConfig, total_steps: int) -> list[str]:
    found: list[str] = []
    name, warmup, decay = config.name, config.warmup_steps, config.decay_steps
    if name not in SCHEDULES:
        found.append(Problem(f"schedule.name={name} is not a schedule", values("schedule.name", SCHEDULES)))
    if not 0 <= config.final_fraction <= 1:
        found.append(
            Problem(
                f"schedule.final_fraction={config.final_fraction} must be between 0 and 1",
                values("schedule.final_fraction", [ScheduleConfig().final_fraction]),
            )
        )
    at_end = wsd_decay_steps(config, total_steps) if name == "wsd" else 0
    if not 0 <= warmup <= total_steps:
        found.append(
            Problem(
                f"schedule.warmup_steps={warmup} does not fit into train.steps={total_steps}",
                values("schedule.warmup_steps", {0, max(total_steps - at_end, 0)}, near=warmup),
                values("train.steps", [warmup + at_end]) if warmup > total_steps else None,
            )
        )
    if decay is not None and name != "wsd":
        found.append(
            Problem(
                f"schedule.decay_steps={decay} has no effect with schedule.name={name}",
                values("schedule.decay_steps", [None]),
                values("schedule.name", ["wsd"]),
            )
        )
    elif decay is not None and decay < 1:
        found.append(
            Problem(
                f"schedule.decay_steps={decay} must be at least 1, or null for a tenth of train.steps",
                values("schedule.decay_steps", [1, None]),
            )
        )
    elif warmup <= total_steps < warmup + at_end:
        found.append(
            Problem(
                f"schedule.warmup_steps={warmup} and schedule.decay_steps={at_end} together are longer than "
                f"train.steps={total_steps}",
                values("schedule.warmup_steps", [max(total_steps - at_end, 0)]),
                values("schedule.decay_steps", [max(total_steps - warmup, 1)]),
            )
        )
    return found
