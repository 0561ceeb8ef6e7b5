"""The value model of PPO: a decoder of its own with the head of a reward model, trained beside the policy.

At a label's position its head says what the completion is worth before that token is drawn. It is a TrainState like
the policy's, on the same mesh, by the same optimizer settings, over the same micro-batches (trainer/step.py, `beside`).
Where the policy has adapters it has some of the same settings beside a base of its own, and its head is trained whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from models.config import ModelConfig
from models.decoder import Decoder, Head
from models.hf import load_hf_weights
from models.init import initialize, start_score
from trainer.adapters import start_adapters
from trainer.config import TrainConfig
from trainer.frozen import resolve_beside
from trainer.loss import count_valid, token_scores
from trainer.rl.losses import value_losses
from trainer.step import TrainState


class ValueObjective:
    """trainer.loss.Objective of values, over the labels of rollouts as trainer/rl/packing.py lays them out."""

    names: Sequence[str] = ("clipped", "mean")

    def __init__(self, *, clip: float, device: torch.device) -> None:
        self._clip = clip
        self.weights = torch.tensor([1.0, 0.0, 0.0], device=device)

    def counts(self, batch: Batch) -> Tensor:
        return count_valid(batch.labels).expand(len(self.weights))

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            values, valid = token_scores(hidden, weight), batch.labels != IGNORE_INDEX
            found = value_losses(values, batch.columns["value"], batch.columns["return"], clip=self._clip)
            return torch.stack([(each * valid).sum() for each in (found.loss, found.clipped, values.detach())]).float()

        return head

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


def value_config(config: TrainConfig) -> TrainConfig:
    """The run's configuration with the value model for its model; config is resolved. Raises ValueError for a folder
    without one.

    adapter.path is for the policy's model: values have it where they begin with the same folder.
    """
    own = config.recipe.ppo.value_path is not None
    adapter = replace(config.adapter, path=None) if own else config.adapter
    return replace(config, model=_value_model(config), adapter=adapter)


def _value_model(config: TrainConfig) -> ModelConfig:
    """The value model's shape, run as the policy is."""
    path, model = config.recipe.ppo.value_path, config.model
    if path is None:
        return replace(model, score=True, tie_embeddings=False)
    found = resolve_beside(str(Path(path).expanduser()), config, score=True)
    return replace(
        found,
        activation_checkpoint=model.activation_checkpoint,
        activation_checkpoint_save=model.activation_checkpoint_save,
    )


def start_values(state: TrainState, config: TrainConfig) -> None:
    """Fill what is trained of a new run's value model: of its folder, or drawn. Raises ValueError for a wrong folder.

    config: of `value_config`.
    """
    if config.adapter.name != "none":
        start_adapters(state, config)
        return
    weights, model, seed = state.weights(), state.model, config.train.seed
    assert isinstance(model, Decoder)
    if model.config.path is None:
        initialize(weights, model.initializers(), seed)
        return
    start_score(weights, model.initializers(), seed)  # where the folder has a head, it is read over this
    load_hf_weights(model.config.path, weights, model.config)
