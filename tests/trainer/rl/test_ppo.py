"""recipe=ppo: what a run does, what it writes down, how it goes on, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from tests.data.conversing import chat_folder
from tests.parity.harness import run_on
from tests.pool import RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import EVEN
from tests.trainer.rl.test_grpo import without_times
from tests.trainer.rl.test_reward_models import reward_model
from trainer.checkpoint import read_extra, tensor_shapes
from trainer.config import ConfigError, TrainConfig
from trainer.convert import export_checkpoint
from trainer.rl.config import RewardConfig
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

SEVERAL = {
    "rl__minibatches": 2,
    "rl__epochs": 2,
    "ppo__kl_target": 1e-4,
    "ppo__value_clip": 1e-3,
    "train__steps": 6,
    "schedule__name": "constant",
}


@pytest.mark.some(1)
@pytest.mark.parametrize(("size", "lag"), [(1, 0), (2, 1)])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    ranks: RankPool, tmp_path: Path, size: int, lag: int
) -> None:
    """Values without their moments, a coefficient that begins anew, rollouts made ahead that are made again."""
    changes = SEVERAL | {"rl__rollout_lag": lag, "parallel__zero_stage": 3 * lag, "checkpoint__interval": 2 * lag}
    whole = run_on(ranks, size, proximal(tmp_path / "whole", **changes))
    config = proximal(tmp_path / "cut", **changes | {"train__steps": 3})
    config.checkpoint.at_end = True
    run_on(ranks, size, config)
    config.train.steps = 6
    assert without_times(run_on(ranks, size, config)) == without_times(whole)
    coefficients = [line["kl_coefficient"] for line in whole.metrics if "kl_coefficient" in line]
    # The first batch is by the reference itself, whose divergence is below every target.
    assert coefficients == [0.2, pytest.approx(0.2 * 0.98)]
    assert whole.metrics[-1]["value_clipped"] > 0


def test_a_checkpoint_has_the_value_model_and_exports_the_policy(ranks: RankPool, tmp_path: Path) -> None:
    """A folder of a language model with the head of values, or that cannot be written at all."""
    config = proximal(tmp_path, rl__rollout_lag=1, ppo__kl_target=2.0)
    config.checkpoint.at_end = True
    run_on(ranks, 1, config)
    path = Path(config.run.dir) / "checkpoints" / "step_2"
    names = tensor_shapes(path)
    assert names["value/model/head.weight"][0] == (1, 36)
    assert {"model/embedding.weight", "value/model/embedding.weight", "value/optim/step"} <= names.keys()
    recipe = read_extra(path)["recipe"]
    assert recipe["kl_coefficient"][1] != 0.2
    assert len(recipe["ahead"]["rollouts"][0][0]) == 16
    export_checkpoint(path, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_value_models_bits_are_watched_and_its_steps_can_be_done_again(ranks: RankPool, tmp_path: Path) -> None:
    """A snapshot of the policy alone, of which a step that is done twice updates values twice; a bit nobody sees."""
    watched = {"resilience__check_interval": 1, "resilience__rerun_interval": 1}
    plain = run_on(ranks, 2, proximal(tmp_path / "plain"))
    assert without_times(run_on(ranks, 2, proximal(tmp_path / "again", **watched))) == without_times(plain)
    with pytest.raises(AssertionError, match=r"StateCorrupted.*changed between two updates.*value/model/head"):
        ranks.run(2, damaged, proximal(tmp_path / "damaged", resilience__check_interval=1))


def damaged(config: TrainConfig) -> None:
    """A run of which one rank's value model changes on its own before the second step."""
    trainer = Trainer(finalize(config, world_size=2))
    recipe: Any = trainer.recipe
    collect = recipe.collect

    def collected(data: Any) -> Any:
        if trainer.state.step == 1 and trainer.rank == 1:
            with torch.no_grad():
                trainer.state.beside["value"].weights()["head.weight"][0, 0] += 1  # type: ignore[index]
        return collect(data)

    recipe.collect = collected
    try:
        trainer.run()
    finally:
        trainer.close()


def test_values_learn_what_rewards_are(ranks: RankPool, tmp_path: Path) -> None:
    """A value model that is never updated, or towards the wrong side; the second run is the control."""
    changes = {"train__steps": 12, "optim__lr": 1e-2, "schedule__name": "constant", "ppo__kl_coefficient": 0.0}
    learned, still = (
        run_on(ranks, 1, proximal(tmp_path / str(factor), ppo__value_lr_factor=factor, **changes)).metrics
        for factor in (1.0, 1e-6)
    )
    assert learned[-1]["value_loss"] < still[-1]["value_loss"] / 2
    assert abs(learned[-1]["value_mean"] - learned[-1]["return_mean"]) < 0.2
    assert "reference_kl" not in learned[0]


@pytest.mark.exhaustive
@pytest.mark.thorough
def test_the_penalty_holds_the_policy_near_the_reference(ranks: RankPool, tmp_path: Path) -> None:
    """A penalty that is added, or of another completion; a policy that learns nothing from rewards."""
    changes = {"train__steps": 11, "optim__lr": 1e-2, "schedule__name": "constant"}
    changes |= {"train__global_batch_size": 64, "train__micro_batch_size": 16}
    free, held = (
        run_on(ranks, 1, proximal(tmp_path / str(weight), ppo__kl_coefficient=weight, **changes)).metrics
        for weight in (1e-9, 1.0)
    )
    assert free[0]["reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert free[-1]["reward"] > free[0]["reward"] + 0.1
    assert abs(held[-1]["reference_kl"]) < free[-1]["reference_kl"] / 4


def test_a_value_model_begins_with_its_folder(ranks: RankPool, tmp_path: Path) -> None:
    """A reward model whose head is drawn anew, or a language model's that is read into it."""
    path = reward_model(tmp_path / "scored")
    first = run_on(ranks, 1, proximal(tmp_path / "a", ppo__value_path=path, train__steps=1)).metrics[0]
    rewards = [RewardConfig(EVEN), RewardConfig("model", 1e-9, path=path)]
    again = run_on(ranks, 2, proximal(tmp_path / "b", ppo__value_path=path, train__steps=1, rl__rewards=rewards))
    assert again.metrics[0]["value_mean"] == pytest.approx(first["value_mean"], rel=1e-5)
    drawn = run_on(ranks, 1, proximal(tmp_path / "c", train__steps=1)).metrics[0]
    assert abs(drawn["value_mean"] - first["value_mean"]) > 1e-3
    causal = reward_model(tmp_path / "causal", causal=True)
    found = run_on(ranks, 1, proximal(tmp_path / "d", ppo__value_path=causal, train__steps=1)).metrics[0]
    assert found["value_mean"] not in (drawn["value_mean"], first["value_mean"])


def test_a_policy_from_a_folder_has_values_from_it_too(ranks: RankPool, tmp_path: Path) -> None:
    path = reward_model(tmp_path / "tokenizer", causal=True)
    config = proximal(tmp_path, train__steps=1)
    config.model = ModelConfig(family="hf", path=path)
    assert chat_folder(tmp_path / "tokenizer").is_dir()
    same, other = ranks.run(1, embeddings, config)[0]
    assert same == other


def embeddings(config: TrainConfig) -> tuple[list[float], list[float]]:
    """The first row of the policy's table and of the value model's, before the first step."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        return tuple(
            s.weights()["embedding.weight"][0].tolist() for s in (trainer.state, trainer.state.beside["value"])
        )  # type: ignore[return-value,index]
    finally:
        trainer.close()


def test_rollouts_a_batch_ahead_are_by_the_weights_before_the_update(ranks: RankPool, tmp_path: Path) -> None:
    """The second step's completions are those of the first weights, and its ratios are against these."""
    changes = {"train__steps": 2, "optim__lr": 2e-2, "schedule__name": "constant"}
    ahead, now, still = (
        run_on(ranks, 1, proximal(tmp_path / name, **changes | more)).metrics
        for name, more in (
            ("ahead", {"rl__rollout_lag": 1}),
            ("now", {}),
            ("still", {"optim__lr": 0.0}),
        )
    )
    for name in ("reward", "completion_tokens", "return_mean", "explained_variance"):
        assert ahead[0][name] == now[0][name]
        assert ahead[1][name] == still[1][name]
    assert ahead[1]["return_mean"] != now[1]["return_mean"]  # negative control
    assert ahead[0]["grad_norm"] == pytest.approx(now[0]["grad_norm"], rel=1e-5)
    assert abs(ahead[1]["ratio"] - 1) > 1e-4 > abs(now[1]["ratio"] - 1)
    assert ahead[1]["sampler_max_delta"] < 1e-5  # both by the weights that drew the tokens


def test_rollouts_ahead_are_the_same_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    changes = {"rl__rollout_lag": 1, "train__steps": 3}
    one = run_on(ranks, 1, proximal(tmp_path / "one", **changes)).metrics
    two = run_on(ranks, 2, proximal(tmp_path / "two", parallel__zero_stage=3, **changes)).metrics
    for ours, theirs in zip(two, one, strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["value_loss"] == pytest.approx(theirs["value_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rl__kl_weight": 0.1}, "recipe.rl.kl_weight=0.1 has no effect with recipe.name=ppo: the divergence is in"),
        ({"rl__advantage": "centered"}, "recipe.rl.advantage=centered has no effect with recipe.name=ppo"),
        ({"rl__sampling_rounds": 2}, "recipe.rl.sampling_rounds=2 has no effect with recipe.name=ppo"),
        ({"rl__loss": "sequence_clip"}, "recipe.rl.loss=sequence_clip has no effect with recipe.name=ppo"),
        ({"rl__rollout_lag": 2}, "recipe.rl.rollout_lag=2 is neither 0 nor 1"),
        ({"rl__temperature": 0.0}, "recipe.rl.temperature=0.0 must be positive"),
        ({"ppo__gamma": 1.5}, "recipe.ppo.gamma=1.5 must be 0 to 1; use recipe.ppo.gamma=1.0"),
        ({"ppo__gae_lambda": -0.1}, "recipe.ppo.gae_lambda=-0.1 must be 0 to 1"),
        ({"ppo__value_lr_factor": 0.0}, "recipe.ppo.value_lr_factor=0.0 must be positive and finite"),
        ({"ppo__kl_target": -1.0}, "recipe.ppo.kl_target=-1.0 must be positive and finite"),
        ({"ppo__kl_target": 1.0, "ppo__kl_coefficient": 0.0}, "recipe.ppo.kl_target=1.0 has no effect"),
        ({"ppo__kl_gain": 0.5}, "recipe.ppo.kl_gain=0.5 has no effect with recipe.ppo.kl_target=null"),
        ({"ppo__value_path": "nowhere"}, "recipe.ppo.value_path=nowhere does not exist"),
        ({"recipe__reference_offload": True, "ppo__kl_coefficient": 0.0}, "has no effect with recipe.ppo.kl_coeff"),
        ({"model__activation_checkpoint": "budget"}, "model.activation_checkpoint=budget does not work with"),
        ({"recipe__name": "grpo"}, "recipe.ppo is set and has no effect with recipe.name=grpo; leave it out"),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(proximal(tmp_path, **changes), world_size=2)
    assert any(says in line for line in lines), lines


def test_a_run_of_grpo_is_no_beginning_of_one_of_ppo(ranks: RankPool, tmp_path: Path) -> None:
    """A checkpoint without a value model, of which the run would go on with one that was never trained."""
    config = proximal(tmp_path, train__steps=1)
    grpo = replace(config, recipe=replace(config.recipe, name="grpo", ppo=type(config.recipe.ppo)()))
    grpo.recipe.rl = replace(grpo.recipe.rl, group_size=4)
    grpo.checkpoint.at_end = True
    run_on(ranks, 1, grpo)
    with pytest.raises(AssertionError, match=r"does not hold this run's tensors.*value/"):
        run_on(ranks, 1, config)


def test_the_shipped_recipe_is_legal() -> None:
    from launch.compose import TRAIN, compose_for
    from trainer.rl.config import rl_problems
    from trainer.rl.ppo_config import ppo_problems

    config = compose_for(TRAIN, ["recipe=ppo"])
    assert (config.recipe.name, config.data.source) == ("ppo", "prompts")
    assert rl_problems(config.recipe.rl, smallest_group=1) == ppo_problems(config.recipe.ppo) == []
    for name in ("top_p", "top_k"):  # what is learned would not be what is sampled
        with pytest.raises(ConfigError, match=f"there is no key recipe.rl.{name}"):
            compose_for(TRAIN, ["recipe=ppo", f"recipe.rl.{name}=1"])
