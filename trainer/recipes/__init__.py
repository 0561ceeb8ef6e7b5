"""Recipes: what a run trains on and for. One file each; layouts, checkpoints and metrics are the trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from parallel.problem import Problem, shown, values
from trainer.config import RecipeConfig, TrainConfig
from trainer.recipes.distill import Distillation
from trainer.recipes.dpo import DirectPreferenceOptimization
from trainer.recipes.grpo import GroupPolicyOptimization
from trainer.recipes.kto import KahnemanTverskyOptimization
from trainer.recipes.ppo import ProximalPolicyOptimization
from trainer.recipes.pretrain import Pretrain
from trainer.recipes.recipe import Recipe
from trainer.recipes.reward import RewardModel
from trainer.recipes.sft import SupervisedFineTuning

RECIPES: Mapping[str, type[Recipe]] = {
    "pretrain": Pretrain,
    "sft": SupervisedFineTuning,
    "dpo": DirectPreferenceOptimization,
    "kto": KahnemanTverskyOptimization,
    "reward": RewardModel,
    "distill": Distillation,
    "grpo": GroupPolicyOptimization,
    "ppo": ProximalPolicyOptimization,
}


def problems(config: TrainConfig) -> list[str]:
    """Every reason why the chosen recipe cannot run on this configuration."""
    name = config.recipe.name
    if name not in RECIPES:
        return [Problem(f"recipe.name={name} is unknown", values("recipe.name", list(RECIPES)))]
    found = RECIPES[name]().problems(config)
    for field in fields(config.recipe):
        value, default = getattr(config.recipe, field.name), getattr(RecipeConfig(), field.name)
        if field.name not in ("name", *RECIPES[name].reads) and value != default:
            if is_dataclass(value):
                found.append(f"recipe.{field.name} is set and has no effect with recipe.name={name}; leave it out")
                continue
            why = f"recipe.{field.name}={shown(value)} has no effect with recipe.name={name}"
            found.append(Problem(why, values(f"recipe.{field.name}", [default])))
    if config.model.score and name != "reward":
        why = f"model.score=true with recipe.name={name}: the head of a reward model says no words"
        found.append(Problem(why, values("model.score", [False]), values("recipe.name", ["reward"])))
    return found
