"""Settings that a run would not read: refused, because a setting without effect is one that somebody believes in.

Only where it is not the default, which nobody asked for. What belongs to a part of the run that is switched off as a
whole (validation, sampling, profiling, a logger, compiling, loss scaling) may stay set: the switch says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

from data.config import ConversationsConfig, PromptsConfig, has_conversations
from models.adapter_config import AdapterConfig
from parallel.problem import Problem, shown, values
from trainer.config import TrainConfig


@dataclass(frozen=True)
class _Use:
    """When some fields are read."""

    names: tuple[str, ...]
    unread: Callable[[TrainConfig], bool]
    because: str  # field of which the value makes them unread


_USES = (
    _Use(("parallel.cp_method",), lambda c: c.parallel.cp == 1, "parallel.cp"),
    _Use(
        ("optim.momentum", "optim.nesterov", "optim.newton_schulz_steps"),
        lambda c: c.optim.name == "adamw",
        "optim.name",
    ),
    _Use(
        tuple(
            f"precision.fp8_{name}" for name in ("recipe", "gradient", "amax_history", "skip", "fused", "all_gather")
        ),
        lambda c: c.precision.compute in ("fp32", "bf16", "fp16"),
        "precision.compute",
    ),
    _Use(("train.loss_kernel",), lambda c: c.recipe.name not in ("pretrain", "sft"), "recipe.name"),
    _Use(("schedule.final_fraction",), lambda c: c.schedule.name == "constant", "schedule.name"),
    _Use(
        ("model.activation_checkpoint_save",),
        lambda c: c.model.activation_checkpoint not in ("selective", "budget"),
        "model.activation_checkpoint",
    ),
    _Use(
        ("model.speculator.num_heads", "model.speculator.num_layers", "model.speculator.decay"),
        lambda c: c.model.speculator.kind != "medusa",
        "model.speculator.kind",
    ),
    _Use(("model.speculator.token_weight",), lambda c: c.model.speculator.kind != "eagle", "model.speculator.kind"),
    _Use(
        tuple(f"data.conversations.{field.name}" for field in fields(ConversationsConfig)),
        lambda c: not has_conversations(c.data),
        "data.source",
    ),
    _Use(
        tuple(f"adapter.{field.name}" for field in fields(AdapterConfig) if field.name != "name"),
        lambda c: c.adapter.name == "none",
        "adapter.name",
    ),
    _Use(
        tuple(f"data.prompts.{field.name}" for field in fields(PromptsConfig)),
        lambda c: c.data.source != "prompts",
        "data.source",
    ),
    _Use(("data.prompts.completion",), lambda c: c.recipe.name != "distill", "recipe.name"),
    _Use(("model.mtp.loss_weight",), lambda c: c.model.mtp.depth == 0, "model.mtp.depth"),
)


def unused_problems(config: TrainConfig) -> list[Problem]:
    """Every field that is set and not read, one line each."""
    defaults, found = TrainConfig(), []
    for use in _USES:
        for name in use.names if use.unread(config) else ():
            value, default = _value(config, name), _value(defaults, name)
            if value != default:
                because = f"{use.because}={shown(_value(config, use.because))}"
                what = f"{name}={shown(value)} has no effect with {because}"
                found.append(Problem(what, values(name, [default if default.__hash__ else tuple(default)])))
    return found


def _value(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
