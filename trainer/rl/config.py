"""RLConfig: how completions are sampled, rewarded, and learned from; and what can be wrong with one by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from inference.config import EngineConfig
from parallel.dims import ParallelConfig
from parallel.problem import Problem, values

ADVANTAGES = ("standardized", "centered", "leave_one_out")
LOSSES = ("clip", "sequence_clip", "cispo")
NORMALIZATIONS = ("sequence", "token", "constant")
BAD_REWARDS = ("error", "skip")
TRUNCATED = ("train", "mask")
KL_ESTIMATORS = ("k1", "k2", "k3")
WEIGHTS = ("auto", "in_place", "gather", "stream")


def weight_modes(parallel: ParallelConfig) -> list[str]:
    """Those of WEIGHTS by which an engine can have a layout's weights (trainer/rl/weights.py); auto is the first."""
    if parallel.pp > 1 or parallel.ep > 1:
        return ["gather"]
    if parallel.zero_stage < 3:
        return ["in_place"]
    return ["gather"] if parallel.sequence_parallel else ["gather", "stream"]


MODEL = "model"
"""recipe.rl.rewards[].function of a reward model (trainer/rl/reward_models.py)."""


@dataclass
class RewardConfig:
    """One of `recipe.rl.rewards`."""

    function: str = "math"  # one of trainer.rl.rewards.REWARDS, package.module:function, or MODEL
    weight: float = 1.0  # a completion's reward is the weighted sum over all of them
    arguments: dict[str, Any] = field(default_factory=dict)  # keyword arguments of every call
    path: str | None = None  # function=model: Hugging Face folder of a reward model with the policy's tokenizer
    offload: bool = False  # function=model: its weights stay in host memory


@dataclass
class RLConfig:
    """`recipe.rl`. The defaults are those of GRPO (2402.03300) without a reference model."""

    group_size: int = 8  # completions of a prompt; train.global_batch_size counts completions
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    # A reward function that raises, or gives no finite number, or an environment that raises: end the run, or leave the
    # completion out (and count it).
    bad_reward: str = "error"  # one of BAD_REWARDS
    reward_threads: int = 4  # reward functions that run at a time on a rank; sandboxed code is a process of its own

    # standardized: (r - mean) / (std + 1e-4), GRPO; centered: r - mean, Dr. GRPO; leave_one_out: G/(G-1) of it, RLOO
    advantage: str = "standardized"  # one of ADVANTAGES
    # clip: PPO's, of each token's ratio; sequence_clip: of the sequence's, GSPO; cispo: the ratio weighs log pi alone
    loss: str = "clip"  # one of LOSSES
    clip_low: float = 0.2  # ratios below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high are clipped
    dual_clip: float = 0.0  # clip: with a negative advantage A, an objective of at least this times A; 0: none
    # A token's weight: sequence: 1/|o| of its completion, then the mean over completions (GRPO); token: the mean over
    # all tokens (DAPO); constant: 1/max_tokens, then the mean over completions (Dr. GRPO)
    normalization: str = "sequence"  # one of NORMALIZATIONS
    truncated: str = "train"  # completions that max_tokens or train.seq_len cut off: one of TRUNCATED
    # Groups whose completions all have one reward teach nothing: they are replaced by those of further prompts, in at
    # most so many rounds of a whole batch of prompts (DAPO, 2503.14476). 1: they stay.
    sampling_rounds: int = 1
    temperature: float = 1.0  # that logits are divided by: of the policy that is sampled, and so of the one that learns
    # Updates that a batch of rollouts is cut into. With several in all, ratios are against log-probabilities that the
    # trainer computes before the first one.
    minibatches: int = 1
    epochs: int = 1  # times that it is gone through
    # 1: rollouts are made a batch ahead, by the weights before the updates of the batch before them, and ratios are
    # against those weights
    rollout_lag: int = 0  # 0 or 1
    # With rollout_lag=1: they are sampled, and rewarded by functions, while the updates of the batch before them are
    # made, by a copy of the weights of then. The same numbers to the bit (trainer/rl/overlap.py)
    overlap: bool = False
    # Truncated importance sampling: a token's loss times min(pi_trainer / pi_sampler, this), for what the engine's
    # arithmetic differs from the trainer's. 0: none.
    importance_cap: float = 2.0
    # Times an estimate of KL(policy || reference), added to the loss with the weights of its tokens; 0: no reference is
    # loaded. It is the model that the run begins with, or the one in recipe.reference_path.
    kl_weight: float = 0.0
    kl_estimator: str = "k3"  # one of KL_ESTIMATORS; what their gradients are: trainer/rl/losses.py
    entropy_weight: float = 0.0  # times the mean entropy of the next token, added to what is maximised

    max_tokens: int | None = None  # of a completion, over all its turns; None: what train.seq_len leaves room for
    environment: str | None = None  # package.module:Class for several turns (trainer/rl/environment.py); None: one turn
    max_turns: int = 8  # of the model, with an environment

    # How the engine has the weights. in_place: the trainer's own, as they lie (tp, ZeRO 0 to 2). gather: what other
    # ranks have (ZeRO-3, pp, ep), for as long as rollouts take. stream: ZeRO-3's, block by block, in every step of it
    weights: str = "auto"  # one of WEIGHTS; auto: in_place, or gather with ZeRO-3, pp or ep
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def updates(self) -> int:
        """Updates that are made with a batch of rollouts."""
        return self.minibatches * self.epochs

    @property
    def keeps_old(self) -> bool:
        """Whether weights change between rollouts and an update by them, so that ratios need what was before."""
        return self.updates > 1 or self.rollout_lag > 0


def rl_problems(config: RLConfig, *, smallest_group: int = 2) -> list[str]:
    """Every value that is wrong in itself, one line each."""
    found: list[str] = []
    for name, legal in (
        ("bad_reward", BAD_REWARDS),
        ("advantage", ADVANTAGES),
        ("loss", LOSSES),
        ("normalization", NORMALIZATIONS),
        ("truncated", TRUNCATED),
        ("weights", WEIGHTS),
        ("kl_estimator", KL_ESTIMATORS),
    ):
        if (value := getattr(config, name)) not in legal:
            found.append(Problem(f"recipe.rl.{name}={value} is unknown", values(f"recipe.rl.{name}", legal)))
    least = {
        "group_size": smallest_group,
        "reward_threads": 1,
        "sampling_rounds": 1,
        "minibatches": 1,
        "epochs": 1,
        "max_turns": 1,
    }
    if config.max_tokens is not None:
        least["max_tokens"] = 1
    for name, minimum in least.items():
        if (value := getattr(config, name)) < minimum:
            why = f"recipe.rl.{name}={value} must be at least {minimum}"
            found.append(Problem(why, values(f"recipe.rl.{name}", [minimum])))
    if config.rollout_lag not in (0, 1):
        why = f"recipe.rl.rollout_lag={config.rollout_lag} is neither 0 nor 1 batch"
        found.append(Problem(why, values("recipe.rl.rollout_lag", [1, 0])))
    if config.overlap and not config.rollout_lag:
        why = "recipe.rl.overlap=true with recipe.rl.rollout_lag=0: an update waits for the rollouts it learns from"
        found.append(Problem(why, values("recipe.rl.rollout_lag", [1]), values("recipe.rl.overlap", [False])))
    if not 0 < config.temperature < math.inf:
        why = (
            f"recipe.rl.temperature={config.temperature} must be positive and finite: greedy completions teach nothing"
        )
        found.append(Problem(why, values("recipe.rl.temperature", [1.0])))
    if not 0 <= config.clip_low <= 1:
        found.append(f"recipe.rl.clip_low={config.clip_low} must be 0 to 1; 0.2 is usual, and 1 clips nothing")
    for name in ("clip_high", "importance_cap", "entropy_weight", "kl_weight"):
        if not 0 <= (value := getattr(config, name)) < math.inf:
            found.append(f"recipe.rl.{name}={value} must be at least 0 and finite")
    if config.dual_clip and not 1 < config.dual_clip < math.inf:
        found.append(f"recipe.rl.dual_clip={config.dual_clip} must be above 1, or 0 for none; 3 is usual")
    if config.dual_clip and config.loss != "clip":
        found.append(
            f"recipe.rl.dual_clip={config.dual_clip} has no effect with recipe.rl.loss={config.loss}; use dual_clip=0"
        )
    if config.kl_weight and config.kl_estimator == "k1":
        why = f"recipe.rl.kl_estimator=k1 with recipe.rl.kl_weight={config.kl_weight}: as a loss its mean gradient is 0"
        found.append(Problem(why, values("recipe.rl.kl_estimator", ["k3", "k2"])))
    if not config.rewards:
        found.append("recipe.rl.rewards is empty: nothing says which completions are good; name at least one function")
    for number, reward in enumerate(config.rewards):
        if not math.isfinite(reward.weight) or reward.weight == 0:
            found.append(f"recipe.rl.rewards[{number}].weight={reward.weight} must be finite and not 0")
        found += _reward_problems(f"recipe.rl.rewards[{number}]", reward)
    return found


def _reward_problems(name: str, reward: RewardConfig) -> list[str]:
    if reward.function == MODEL and reward.path is None:
        return [f"{name}.path is missing: function=model needs the Hugging Face folder of a reward model"]
    default = RewardConfig()
    unread = ("arguments",) if reward.function == MODEL else ("path", "offload")
    return [
        f"{name}.{field}={value} has no effect with function={reward.function}; leave it out"
        for field in unread
        if (value := getattr(reward, field)) != getattr(default, field)
    ]
