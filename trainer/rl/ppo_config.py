"""PPOConfig: values, advantages by them, and what holds the policy near its reference; what can be wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.problem import Problem, values


@dataclass
class PPOConfig:
    """`recipe.ppo`: what PPO has beside `recipe.rl`."""

    gamma: float = 1.0  # what a reward one token later is worth
    gae_lambda: float = 0.95  # 1: returns less values; 0: one step of differences of values
    whiten: bool = True  # advantages to mean 0 and standard deviation 1, over all tokens of a batch of rollouts
    value_clip: float = 0.2  # how far a value may go from the one before the updates, as seen by its loss; 0: any
    # Hugging Face folder that the value model begins with, of a reward model or a language model, which has no head
    # for it; None: as the policy begins. With adapters this is their base, and None the folder in model.path
    value_path: str | None = None
    value_lr_factor: float = 1.0  # times the learning rate of the policy
    # Subtracted from a token's reward, times log pi - log pi_ref; 0: no reference is loaded. It is the model that the
    # run begins with, or the one in recipe.reference_path.
    kl_coefficient: float = 0.05
    # Nats of a completion that the coefficient is steered to, from batch to batch (1909.08593, 2.2); None: it is fixed
    kl_target: float | None = None
    kl_gain: float = 0.1  # by how much, with an error of 1 (errors are clipped to 0.2)


def ppo_problems(config: PPOConfig) -> list[str]:
    """Every value that is wrong in itself, one line each."""
    found: list[str] = []
    default = PPOConfig()

    def outside(name: str, bounds: str) -> None:
        what = f"recipe.ppo.{name}={getattr(config, name)} must be {bounds}"
        found.append(Problem(what, values(f"recipe.ppo.{name}", [getattr(default, name)])))

    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(config, name) <= 1:
            outside(name, "0 to 1")
    for name in ("value_clip", "kl_coefficient"):
        if not 0 <= getattr(config, name) < math.inf:
            outside(name, "at least 0 and finite")
    for name in ("value_lr_factor", "kl_gain"):
        if not 0 < getattr(config, name) < math.inf:
            outside(name, "positive and finite")
    if config.kl_target is not None and not 0 < config.kl_target < math.inf:
        outside("kl_target", "positive and finite, or null for a fixed coefficient")
    if config.kl_target is not None and not config.kl_coefficient:
        why = f"recipe.ppo.kl_target={config.kl_target} has no effect with recipe.ppo.kl_coefficient=0, which stays 0"
        found.append(Problem(why, values("recipe.ppo.kl_target", [None])))
    if config.kl_target is None and config.kl_gain != default.kl_gain:
        why = f"recipe.ppo.kl_gain={config.kl_gain} has no effect with recipe.ppo.kl_target=null"
        found.append(Problem(why, values("recipe.ppo.kl_gain", [default.kl_gain])))
    return found
