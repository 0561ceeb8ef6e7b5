"""Proximal policy optimisation with a value model (1707.06347; 1909.08593 and 2203.02155 for language models).

Rollouts, rewards, ratios and their clipping are those of recipe=grpo. Advantages are a token's own, by the values of a
model beside the policy, which the same step trains (trainer/rl/value.py); a token's reward is minus
recipe.ppo.kl_coefficient times log pi - log pi_ref, and at the last one the completion's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.decoder import Decoder
from parallel.mesh import Meshes
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.frozen import FrozenModel, problems_beside
from trainer.recipes.grpo import GroupPolicyOptimization
from trainer.recipes.recipe import TrainedBeside
from trainer.rl.config import RLConfig, rl_problems
from trainer.rl.gae import explained_variance, generalized_advantages, moments, next_coefficient, whitened
from trainer.rl.packing import of_rollouts
from trainer.rl.ppo_config import ppo_problems
from trainer.rl.problems import data_problems, layout_problems
from trainer.rl.reward_models import check_tokenizer, scores_head
from trainer.rl.rollouts import Rollout
from trainer.rl.value import ValueObjective, start_values, value_config
from trainer.step import TrainState
from trainer.validate_adapter import adapter_problems_beside

VALUE = "value"
"""What the value model's tensors in checkpoints and its metrics begin with."""
VALUE_PATH = "recipe.ppo.value_path"
"""The field that says where the value model is; where it is null, that is the policy's folder."""


class ProximalPolicyOptimization(GroupPolicyOptimization):
    """recipe=ppo."""

    reads = ("rl", "ppo", "reference", "reference_path", "reference_offload")
    columns = ("value", "return")

    def __init__(self) -> None:
        super().__init__()
        # Of the KL divergence, where it adapts: as it is configured, and as it is now; None: as it is configured
        self._adapted: tuple[float, float] | None = None

    def problems(self, config: TrainConfig) -> list[str]:
        held_by = ("recipe.ppo.kl_coefficient", config.recipe.ppo.kl_coefficient)
        return [
            *rl_problems(config.recipe.rl, smallest_group=1),
            *ppo_problems(config.recipe.ppo),
            *data_problems(config, held_by),
            *layout_problems(config),
            *_own_problems(config),
        ]

    def needs_reference(self, config: TrainConfig) -> bool:
        return config.recipe.ppo.kl_coefficient > 0

    def trained_beside(self, config: TrainConfig, device: torch.device) -> dict[str, TrainedBeside]:
        settings = config.recipe.ppo
        objective = ValueObjective(clip=settings.value_clip, device=device)
        return {VALUE: TrainedBeside(value_config(config), VALUE_PATH, objective, settings.value_lr_factor)}

    def start_beside(self, config: TrainConfig, state: TrainState, *, imported: bool) -> None:
        if imported and config.recipe.ppo.value_path is None:
            raise ValueError(
                "recipe.ppo.value_path is missing: the policy begins with an imported checkpoint, which a value model "
                "cannot be read from; give the Hugging Face folder it was imported from, or that of a reward model"
            )
        if config.recipe.ppo.value_path is not None:
            assert self._tokenizer is not None
            check_tokenizer(config.recipe.ppo.value_path, self._tokenizer)
        start_values(state.beside[VALUE], value_config(config))

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        super().start(config, state, mesh)
        value = state.beside[VALUE].model
        assert isinstance(value, Decoder)
        self._valued_by = self._copy_of(value) if config.recipe.rl.overlap else value

    # ---- a batch of rollouts

    def _complete(self, batches: list[list[Rollout]]) -> dict[str, float]:
        settings = self._config.recipe.ppo
        coefficient = self._coefficient()
        divergences: list[float] = []  # of completions
        for batch in batches:
            divergences += self._estimate(batch, coefficient)
        rollouts = [rollout for batch in batches for rollout in batch]
        gather = self._collector.all_gather
        of_divergences = moments(divergences, gather)
        divergence = of_divergences.mean
        of_returns = moments([each for rollout in rollouts for each in rollout.returns], gather)
        errors = moments([r - v for one in rollouts for r, v in zip(one.returns, one.values, strict=True)], gather)
        of_advantages = moments([each for rollout in rollouts for each in rollout.advantages], gather)
        if settings.whiten:
            for rollout in rollouts:
                rollout.advantages = whitened(rollout.advantages, of_advantages)
        if settings.kl_target is not None and of_divergences.size:
            adapted = next_coefficient(coefficient, divergence, target=settings.kl_target, gain=settings.kl_gain)
            self._adapted = settings.kl_coefficient, adapted
        return {
            "explained_variance": explained_variance(of_returns, errors),
            "return_mean": of_returns.mean,
            "advantage_mean": of_advantages.mean,
            "advantage_std": of_advantages.variance**0.5,
        } | ({"reference_kl": divergence, "kl_coefficient": coefficient} if coefficient else {})

    def _coefficient(self) -> float:
        """Of the next batch. One that has adapted counts only for the configuration that it began with."""
        settings = self._config.recipe.ppo
        if settings.kl_target is None or self._adapted is None or self._adapted[0] != settings.kl_coefficient:
            return settings.kl_coefficient
        return self._adapted[1]

    def _estimate(self, batch: list[Rollout], coefficient: float) -> list[float]:
        """Give rollouts values, returns and advantages; the divergence of each from the reference, in nats."""
        rl, settings, value = self._config.recipe.rl, self._config.recipe.ppo, self._state.beside[VALUE]
        packed = self._packed(batch)
        parts = self._parts_of(packed)
        # Read without a backward that would free what is gathered: as one that is frozen.
        found = self._whole(FrozenModel(self._valued_by, value.passes).per_token(parts, scores_head), parts)
        penalties = [torch.zeros_like(each) for each in found]
        if rl.keeps_old or coefficient:
            logprobs = self._whole(self._policy_logprobs(parts), parts)
            if rl.keeps_old:
                self._set_old(packed, logprobs)
            if coefficient:
                reference = self._whole(self._reference_logprobs(parts), parts)
                penalties = [ours.double() - theirs.double() for ours, theirs in zip(logprobs, reference, strict=True)]
        divergences = []
        for one, of_values, of_penalties in zip(packed, found, penalties, strict=True):
            pairs = zip(of_rollouts(one, of_values), of_rollouts(one, of_penalties), strict=True)
            for (rollout, estimates), (_, away) in pairs:
                assert rollout.reward is not None  # those without one are left out
                rewards = [-coefficient * each for each in away]
                rewards[-1] += rollout.reward
                rollout.values = estimates
                rollout.advantages, rollout.returns = generalized_advantages(
                    rewards, estimates, gamma=settings.gamma, gae_lambda=settings.gae_lambda
                )
                divergences.append(sum(away))
        return divergences

    # ---- a run that goes on

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kl_coefficient": self._adapted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        adapted = state.get("kl_coefficient")
        self._adapted = None if adapted is None else (adapted[0], adapted[1])


def _own_problems(config: TrainConfig) -> list[str]:
    found: list[str] = []
    rl, default = config.recipe.rl, RLConfig()
    for field, why in (
        ("kl_weight", "the divergence is in the rewards: recipe.ppo.kl_coefficient"),
        ("kl_estimator", "the divergence in the rewards is log pi - log pi_ref"),
        ("advantage", "advantages are by values, not by other completions of the prompt"),
        ("sampling_rounds", "a completion teaches whatever others of its prompt are worth"),
        ("loss", "advantages are a token's own, and so are its ratio and its gradient"),
    ):
        if (value := getattr(rl, field)) != getattr(default, field):
            what = f"recipe.rl.{field}={value} has no effect with recipe.name=ppo: {why}"
            found.append(Problem(what, values(f"recipe.rl.{field}", [getattr(default, field)])))
    if config.model.activation_checkpoint == "budget":
        why = "model.activation_checkpoint=budget does not work with recipe.name=ppo: it is measured of one model"
        found.append(Problem(why, values("model.activation_checkpoint", ["none", "selective", "full"])))
    path = config.recipe.ppo.value_path
    found += problems_beside(VALUE_PATH, path, config, score=True)
    return found + adapter_problems_beside(VALUE_PATH, path, config)
