"""Environments that answer a model: what they may do wrong, what rewards see of them; batches that teach nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.pool import RankPool
from tests.trainer.rl.rolling import metrics_of, rolling
from trainer.config import TrainConfig
from trainer.rl.config import RewardConfig, RLConfig
from trainer.rl.rewards import REWARDS, Answer, Rewards
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

HERE = "tests.trainer.rl.test_environment"
ENDS = frozenset(range(0, 300, 5))  # a random model ends few turns: any of these ids does


class Game:
    """Counts turns, and says so twice."""

    def start(self, prompt: str, row: dict[str, Any]) -> None:
        self.turns = 0

    def reply(self, text: str) -> Any:
        self.turns += 1
        return " one" if self.turns < 3 else None


class Late(Game):
    def reply(self, text: str) -> Any:
        if super().reply(text) and self.turns == 2:
            raise LookupError("no such tool")
        return " one"


class Early(Game):
    def start(self, prompt: str, row: dict[str, Any]) -> None:
        raise LookupError("no such game")


class Numbers(Game):
    def reply(self, text: str) -> Any:
        return 3


def turns(answer: Answer) -> float:
    """What the environment knows."""
    assert answer.environment.turns == len(answer.turns[::2]) - (answer.finish_reason == "length")
    return np.float32(answer.environment.turns)  # type: ignore[return-value]


class OnFirst(Game):
    """Fails on the second rank, which is not asked."""

    def start(self, prompt: str, row: dict[str, Any]) -> None:
        super().start(prompt, row)
        assert dist.get_rank() == 0

    def reply(self, text: str) -> Any:
        assert dist.get_rank() == 0
        return super().reply(text)


def _run(config: TrainConfig, ends: frozenset[int] = ENDS) -> None:
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        trainer.recipe._engine.eos_ids = ends  # type: ignore[attr-defined]
        trainer.run()
    finally:
        trainer.close()


def playing(folder: Path, environment: str, **changes: Any) -> TrainConfig:
    sizes = {"train__steps": 1, "train__seq_len": 60, "model__max_seq_len": 60, "rl__max_tokens": 40}
    rewards = [RewardConfig(f"{HERE}:turns"), RewardConfig("finished", 0.5)]
    return rolling(folder, rl__environment=f"{HERE}:{environment}", rl__rewards=rewards, **(sizes | changes))


def events_of(config: TrainConfig) -> dict[str, str]:
    lines = (Path(config.run.dir) / "events.jsonl").read_text().splitlines()
    return {event["kind"]: event["text"] for event in map(json.loads, lines)}


@pytest.mark.parametrize("layout", [{}, {"parallel__pp": 2}, {"parallel__cp": 2}], ids=["one", "pp", "cp"])
def test_rewards_see_the_environment_as_it_was_left(ranks: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    """A new object, or that of another completion; one that would have to travel to another rank."""
    config = playing(tmp_path, "Game", **layout)
    ranks.run(2 if layout else 1, _run, config)
    (line,) = metrics_of(config)
    assert line["reward_turns"] > 1
    assert line["reward_failures"] == 0
    assert line["reward"] == pytest.approx(line["reward_turns"] + 0.5 * line["reward_finished"])


def test_one_rank_of_tp_asks_the_environment_for_all(ranks: RankPool, tmp_path: Path) -> None:
    """A tool that times out on one rank only: the others go on with a completion that it has ended, and wait for it."""
    lines = []
    for world_size, name in (1, "Game"), (2, "OnFirst"):
        config = playing(tmp_path / name, name, parallel__tp=world_size)
        ranks.run(world_size, _run, config)
        lines += metrics_of(config)
    assert lines[0]["reward_turns"] == lines[1]["reward_turns"] > 1
    assert lines[1]["reward_failures"] == 0


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ("Late", "the environment raised LookupError: no such tool, after the completion"),
        ("Early", "the environment raised LookupError when it started: no such game, after the completion ''"),
        ("Numbers", "the environment replied 3, neither text nor None, after the completion"),
    ],
)
def test_an_environment_that_fails_ends_the_run_or_its_completion(
    ranks: RankPool, tmp_path: Path, environment: str, says: str
) -> None:
    """A traceback out of the middle of a batch; failures that are trained on with the reward of nothing."""
    config = playing(tmp_path / "skip", environment, rl__bad_reward="skip", train__eval_interval=1)
    ranks.run(1, _run, config)
    (line,) = metrics_of(config)
    assert line["reward_failures"] > 0
    assert says in events_of(config)["reward_failed"]
    nothing = line["valid_tokens"] == 0
    assert nothing or environment != "Early"
    assert nothing == ("nothing_learned" in events_of(config))
    with pytest.raises(AssertionError, match="RewardError: the environment"):
        ranks.run(1, _run, playing(tmp_path / "error", environment))


def test_a_batch_that_teaches_nothing_is_an_event(ranks: RankPool, tmp_path: Path) -> None:
    """A run of steps without a gradient that looks like one that has converged."""
    config = rolling(tmp_path, rl__truncated="mask", rl__max_tokens=1, train__steps=1)
    ranks.run(1, _run, config, frozenset())
    assert metrics_of(config)[0]["valid_tokens"] == 0
    assert events_of(config)["nothing_learned"].endswith("were cut off and recipe.rl.truncated=mask")
    config = rolling(tmp_path / "constant", rl__sampling_rounds=2, rl__rewards=[RewardConfig(f"{HERE}:zero")])
    config.train.steps = 1
    ranks.run(1, _run, config)
    assert events_of(config)["nothing_learned"].endswith("the rewards of no prompt's completions differ")


def zero(answer: Answer) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (RewardConfig("exact", arguments={"colum": "x"}), "got an unexpected keyword argument 'colum'; it is exact("),
        (RewardConfig(f"{HERE}:weighed"), "missing a required argument: 'by'; it is weighed(answer"),
    ],
)
def test_arguments_that_do_not_fit_are_found_before_the_run(tmp_path: Path, reward: RewardConfig, says: str) -> None:
    """With recipe.rl.bad_reward=skip every completion would be left out."""
    (line,) = find_problems(rolling(tmp_path, rl__rewards=[RewardConfig("finished"), reward]), world_size=1)
    assert line.startswith(f"recipe.rl.rewards[1].function={reward.function} cannot be called with an answer and")
    assert says in line
    Rewards(RLConfig(rewards=[RewardConfig(f"{HERE}:weighed", arguments={"by": 2.0})]))


def weighed(answer: Answer, by: float) -> float:
    return by


def test_the_example_of_the_documentation_does_what_it_says() -> None:
    """An interface that has moved on."""
    text = (Path(__file__).parents[3] / "docs" / "REWARDS.md").read_text()
    found: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    tool = found["Calculator"]()
    tool.start("", {})
    assert tool.reply("so <calc>12*3</calc>") == "\n<|im_start|>tool\n36<|im_end|>\n<|im_start|>assistant\n"
    assert tool.reply("36") is None
    answer = Answer("", "so", [1, 2, 3], "stop", {}, environment=tool)
    assert found["few_calls"](answer) == -1.0
    assert [found["short"](answer, tokens=n) for n in (3, 2)] == [1.0, 0.0]
    assert all(f"| `{name}` |" in text for name in REWARDS)
