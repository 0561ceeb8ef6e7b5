"""Kahneman-Tversky optimisation (2402.01306): answers that are good or bad by themselves, in any proportion.

    loss = sum over answers of w (1 - s(+- beta (d - z))) / number of answers in the global batch
    z = max(0, sum of d over the answers to other prompts / their number in the global batch)

d is log pi - log pi_ref of an answer (trainer/preference_losses.py). z has no gradient, and is one number for all of a
step: a forward of the policy over all micro-batches comes before the step itself, so that nothing depends on how
answers are shared out. Those to other prompts (data/unpaired.py) lie in the step's own sequences, and learn nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from kernels.linear_cross_entropy import VocabularyShard
from models.decoder import Decoder, Head
from parallel.groups import ModelParallel
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, values
from trainer.config import RecipeConfig, TrainConfig
from trainer.frozen import Beside
from trainer.loss import Objective, token_losses, vocabulary_shard
from trainer.pairs import Pairs, count_pairs
from trainer.preference_losses import unpaired_losses
from trainer.recipes.dpo import Preferences
from trainer.reference import load_reference, reference_beside, reference_problems
from trainer.step import TrainState


class UnpairedObjective:
    """trainer.loss.Objective of answers; the batch has the columns `reference` and, at `pair`, `baseline`."""

    names: Sequence[str] = ("reward_chosen", "reward_rejected", "kl")

    def __init__(
        self,
        recipe: RecipeConfig,
        *,
        groups: ModelParallel,
        vocabulary: VocabularyShard | None,
        batch_invariant: bool,
        device: torch.device,
    ) -> None:
        self.recipe, self.groups = recipe, groups
        self.vocabulary, self.batch_invariant = vocabulary, batch_invariant
        self.weights = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)

    def counts(self, batch: Batch) -> Tensor:
        good = ((batch.columns["pair"] >= 0) & (batch.columns["margin"] > 0)).sum()
        all_of_them = count_pairs(batch)
        return torch.stack([all_of_them, good, all_of_them - good, all_of_them])

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            losses = token_losses(
                hidden, weight, batch.labels, vocabulary=self.vocabulary, batch_invariant=self.batch_invariant
            )
            return self.sums(batch, -losses)

        return head

    def sums(self, batch: Batch, logprobs: Tensor) -> Tensor:
        """[4] fp32 of the log-probabilities of labels [B, T]."""
        recipe, pairs = self.recipe, Pairs.of(batch, self.groups)
        gains = pairs.answers(logprobs - batch.columns["reference"])[..., 0]
        good, baseline, counted = pairs.margins(), pairs.at_ends("baseline"), pairs.counted()
        weights = (recipe.desirable_weight, recipe.undesirable_weight)
        losses = unpaired_losses(gains, good, baseline, beta=recipe.beta, weights=weights)
        rewards = recipe.beta * gains.detach()
        found = torch.stack([losses, rewards * (good > 0), rewards * (good < 0), baseline])
        return (found * counted).sum((1, 2)).float()

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


class KahnemanTverskyOptimization(Preferences):
    name = "kto"
    source = "unpaired_preferences"
    reads = ("beta", "desirable_weight", "undesirable_weight", "reference", "reference_path", "reference_offload")

    def problems(self, config: TrainConfig) -> list[str]:
        recipe, found = config.recipe, super().problems(config)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0.0 < (value := getattr(recipe, name)) < math.inf:
                default = getattr(RecipeConfig(), name)
                found.append(Problem(f"recipe.{name}={value} must be positive", values(f"recipe.{name}", [default])))
        return found + reference_problems(config)

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        groups = groups_in_layers(mesh, config.parallel)
        return UnpairedObjective(
            config.recipe,
            groups=groups,
            vocabulary=vocabulary_shard(config.model.vocab_size, groups),
            batch_invariant=config.train.batch_invariant,
            device=device,
        )

    def frozen_beside(self, config: TrainConfig) -> Beside | None:
        return reference_beside(config)

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        self.state = state
        self.reference = load_reference(config, state, mesh)

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        self.state.begin_forwards()
        frozen = self.reference.token_logprobs(microbatches)
        assert isinstance(self.state.model, Decoder)
        policy = self.state.passes.token_logprobs(self.state.model, microbatches)
        total = torch.zeros(2, dtype=torch.float64, device=self.state.device)  # of d over other answers; how many
        for batch, ours, theirs in zip(microbatches, policy, frozen, strict=True):
            other = batch.columns["completion"] % 2 == 1
            other &= batch.columns["completion"] >= 0
            total[0] += torch.where(other, ours - theirs, 0.0).sum(dtype=torch.float64)
            total[1] += count_pairs(batch)
        dist.all_reduce(total, group=self.state.token_group)
        baseline = (total[0] / total[1].clamp(min=1.0)).clamp(min=0.0).float()
        return [
            batch.with_columns(reference=theirs, baseline=torch.where(batch.columns["pair"] >= 0, baseline, 0.0))
            for batch, theirs in zip(microbatches, frozen, strict=True)
        ]
