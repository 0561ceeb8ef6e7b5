"""Reward models: one number for an answer, higher for the one that was chosen (Bradley-Terry).

    loss = sum over pairs of - log s(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2, / number of pairs

r is the output of the model's head (model.score) at the last token of an answer; the margin is the row's, c is
recipe.centering. What transformers loads from an exported one is its AutoModelForSequenceClassification with one label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.batch import Batch
from models.decoder import Head
from parallel.groups import ModelParallel
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.loss import Objective, token_scores
from trainer.pairs import Pairs, count_pairs
from trainer.preference_losses import reward_losses
from trainer.recipes.dpo import PAIR_NAMES, Preferences, reports


class RewardObjective:
    """trainer.loss.Objective of rewards."""

    names: Sequence[str] = PAIR_NAMES

    def __init__(self, *, centering: float, groups: ModelParallel, device: torch.device) -> None:
        self.centering, self.groups = centering, groups
        self.weights = torch.tensor([1.0, *[0.0] * len(self.names)], device=device)

    def counts(self, batch: Batch) -> Tensor:
        return count_pairs(batch).expand(len(self.weights))

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            pairs = Pairs.of(batch, self.groups)
            rewards = pairs.answers(token_scores(hidden, weight), column="last_input")
            losses = reward_losses(rewards, pairs.margins(), centering=self.centering)
            return (torch.stack([losses, *reports(rewards.detach())]) * pairs.counted()).sum((1, 2)).float()

        return head

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


class RewardModel(Preferences):
    name = "reward"
    loss_kernel = "rewards in fp32"
    reads = ("centering",)

    def problems(self, config: TrainConfig) -> list[str]:
        found = super().problems(config)
        if not config.model.score:
            why = "model.score=false with recipe.name=reward: a reward needs a head of its own"
            found.append(Problem(why, values("model.score", [True])))
        if not 0.0 <= config.recipe.centering < math.inf:
            why = f"recipe.centering={config.recipe.centering} must not be negative"
            found.append(Problem(why, values("recipe.centering", [0.0, 0.01])))
        if config.train.sample_tokens:
            why = f"train.sample_tokens={config.train.sample_tokens} with recipe.name=reward, which writes no text"
            found.append(Problem(why, values("train.sample_tokens", [0])))
        if config.train.batch_invariant:
            why = "train.batch_invariant=true with recipe.name=reward, of which nothing is served that this would match"
            found.append(Problem(why, values("train.batch_invariant", [False])))
        return found

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        groups = groups_in_layers(mesh, config.parallel)
        return RewardObjective(centering=config.recipe.centering, groups=groups, device=device)
