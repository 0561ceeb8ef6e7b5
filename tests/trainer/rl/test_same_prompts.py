"""Ranks that share out the prompts they have in common: what each does, and what happens when one of them fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from models.decoder import Decoder
from tests.pool import RankPool
from tests.trainer.rl.rolling import rolling
from trainer.config import TrainConfig
from trainer.rl.rollouts import Sampled, Sampler
from trainer.rl.same_prompts import SamePrompts
from trainer.trainer import Trainer
from trainer.validate import finalize


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_everything_is_done_once_and_in_its_order(count: int) -> None:
    every, found = list(range(count)), []
    for rank in range(4):
        one = SamePrompts.__new__(SamePrompts)
        one.rank, one.size = rank, 4
        found += one.mine(every)
        assert len(one.mine(every)) <= -(-count // 4)
    assert found == every


def failures(config: TrainConfig, *, fails: str) -> str:
    """What ends a run on this rank: "nan" weights, or rank 1 when it samples for the second time."""
    sample, calls = Sampler.rollouts, 0

    def rollouts(self: Sampler, *args: Any, **kwargs: Any) -> Sampled:
        nonlocal calls
        calls += 1
        if fails == "second" and calls == 2 and dist.get_rank() == 1:
            raise LookupError("gone")
        return sample(self, *args, **kwargs)

    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    if fails == "nan":
        assert isinstance(trainer.state.model, Decoder)
        with torch.no_grad():
            for parameter in trainer.state.model.parameters():
                parameter.fill_(torch.nan)
    try:
        with mock.patch.object(Sampler, "rollouts", rollouts):
            trainer.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.close()
    return "nothing"


AHEAD = {"rl__rollout_lag": 1, "rl__overlap": True, "train__steps": 3}


@pytest.mark.parametrize("changes", [{}, AHEAD], ids=["in turn", "ahead"])
def test_a_rank_that_fails_does_not_leave_the_others_waiting(
    ranks: RankPool, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = ranks.run(2, failures, rolling(tmp_path, parallel__cp=2, **changes), fails="second")
    assert found[1] == "LookupError: gone"
    assert found[0].startswith("RolloutError: rollouts failed on rank 1")
    assert found[0].endswith("LookupError: gone")


def test_nan_where_only_some_ranks_have_a_prompt_ends_all(ranks: RankPool, tmp_path: Path) -> None:
    """Ranks without a completion to sample, which see no NaN and wait for those of the others."""
    config = rolling(tmp_path, parallel__pp=2, parallel__cp=2, train__global_batch_size=2, rl__group_size=2)
    for said in ranks.run(4, failures, config, fails="nan"):
        assert said.startswith("FloatingPointError: "), said
        assert "the model gives NaN" in said
