"""Runs of recipe=ppo on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.trainer.rl.rolling import rolling
from trainer.config import TrainConfig
from trainer.rl.ppo_config import PPOConfig


def proximal(folder: Path, **changes: Any) -> TrainConfig:
    """16 prompts of one completion each a step. changes: as of `rolling`, and ppo__NAME of PPOConfig."""
    ppo = {name.removeprefix("ppo__"): changes.pop(name) for name in list(changes) if name.startswith("ppo__")}
    settings = {"recipe__name": "ppo", "rl__group_size": 1, "rl__normalization": "token"}
    return rolling(folder, **settings | {"recipe__ppo": PPOConfig(**({"kl_coefficient": 0.2} | ppo))} | changes)
