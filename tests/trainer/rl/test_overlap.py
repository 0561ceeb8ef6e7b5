"""recipe.rl.overlap: rollouts in a thread beside the updates, with the bits of a run that makes them in its turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.parity.harness import Outcome, run_here, run_on
from tests.pool import RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import EVEN, adapting, even, rolling
from tests.trainer.rl.test_grpo import without_times
from trainer import trainer as trainer_module
from trainer.checkpoint import read_extra
from trainer.config import TrainConfig
from trainer.rl.config import RewardConfig
from trainer.rl.overlap import Beside, WeightCopy
from trainer.rl.rewards import Answer
from trainer.step import train_step
from trainer.trainer import Preempted, Trainer
from trainer.validate import finalize, find_problems
from trainer.watchdog import HUNG_EXIT_CODE, ROLLOUTS, Phase, standing

HERE = "tests.trainer.rl.test_overlap"
ROOT = Path(__file__).resolve().parents[3]
LAG = {"rl__rollout_lag": 1, "train__steps": 5, "schedule__name": "constant", "optim__lr": 1e-2}
BESIDE = {"rl__overlap": True}


def sometimes(answer: Answer) -> float:
    if answer.token_ids[0] % 5 == 0:
        raise LookupError("no such thing")
    return float(len(answer.token_ids))


GROUPS = LAG | {
    "rl__rewards": [RewardConfig(f"{HERE}:sometimes", 0.1), RewardConfig(EVEN)],
    "rl__bad_reward": "skip",
    "train__eval_interval": 2,
    "train__eval_batches": 1,
}
INFORMING = LAG | {
    "rl__sampling_rounds": 4,
    "rl__rewards": [RewardConfig("tests.trainer.rl.test_grpo:first")],
    "parallel__zero_stage": 1,
}
VALUES = LAG | {"rl__minibatches": 2, "train__steps": 7, "ppo__kl_target": 1e-4, "parallel__zero_stage": 2}


def events_of(config: TrainConfig) -> list[tuple[str, str]]:
    lines = (Path(config.run.dir) / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(one["kind"], one["text"]) for one in found if one["kind"] in ("reward_failed", "nothing_learned")]


def same_bits(one: Outcome, other: Outcome) -> bool:
    return without_times(one) == without_times(other) and all(
        torch.equal(weight, other.weights[name]) for name, weight in one.weights.items()
    )


@pytest.mark.parametrize(
    ("size", "made", "changes"),
    [
        (1, rolling, GROUPS),
        pytest.param(2, rolling, GROUPS | {"parallel__cp": 2}, marks=pytest.mark.thorough),
        pytest.param(2, rolling, INFORMING, marks=pytest.mark.thorough),
        pytest.param(2, proximal, VALUES, marks=pytest.mark.thorough),
    ],
)
def test_a_run_has_the_bits_that_it_has_without_also_when_it_is_resumed(
    ranks: RankPool, tmp_path: Path, size: int, made: Callable[..., TrainConfig], changes: dict[str, Any]
) -> None:
    """Rollouts by weights that are being written, a batch of prompts left out or twice, greedy answers by old weights;
    a resumed run that samples again what was under way."""
    changes = changes | {"checkpoint__interval": 3, "checkpoint__keep_last": 0}
    plain_config, config = made(tmp_path / "plain", **changes), made(tmp_path / "beside", **changes | BESIDE)
    plain, found = run_on(ranks, size, plain_config), run_on(ranks, size, config)
    assert same_bits(found, plain)
    assert events_of(config) == events_of(plain_config)
    assert all("rollout_wait_seconds" in line for line in found.metrics if "reward" in line)
    assert all("rollout_wait_seconds" not in line for line in plain.metrics)
    checkpoints = [Path(one.run.dir) / "checkpoints" / "step_3" for one in (plain_config, config)]
    ours, theirs = (read_extra(path) for path in checkpoints)
    assert ours["data"]["samples_consumed"] == theirs["data"]["samples_consumed"]
    assert ours["recipe"]["rollouts"] == theirs["recipe"]["rollouts"]
    assert ours["recipe"]["ahead"]["rollouts"] == theirs["recipe"]["ahead"]["rollouts"]
    # Left while a batch is under way, a step behind the checkpoint.
    cut = made(tmp_path / "cut", **changes | BESIDE | {"train__steps": 4})
    run_on(ranks, size, cut)
    cut.train.steps = changes["train__steps"]
    assert same_bits(run_on(ranks, size, cut), plain)


class _Late(Beside[Any]):
    """Begins when it is waited for: as late as a thread may be."""

    _work: Any = None

    @property
    def busy(self) -> bool:
        return self._work is not None

    def start(self, work: Any) -> None:
        self._work = work

    def wait(self) -> Any:
        work, self._work = self._work, None
        super().start(work)
        return super().wait()


class _Moving(WeightCopy):
    """Not a copy: the weights that are trained."""

    def __init__(self, source: Any, config: TrainConfig) -> None:
        self.model = source

    def take(self) -> None:
        pass


def _run_late(config: TrainConfig, *, moving: bool) -> Outcome | None:
    with ExitStack() as stack:
        stack.enter_context(mock.patch("trainer.recipes.grpo.Beside", _Late))
        if moving:
            stack.enter_context(mock.patch("trainer.recipes.grpo.WeightCopy", _Moving))
        return run_here(config)


def test_the_copy_is_of_the_weights_before_the_update_however_late_the_thread_is(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Negative control: without a copy, by the weights that are trained, the same run has other bits."""
    changes = LAG | {"train__steps": 4}
    plain = run_on(ranks, 1, rolling(tmp_path / "plain", **changes))
    late, moving = (
        ranks.run(1, _run_late, rolling(tmp_path / str(moving), **changes | BESIDE), moving=moving)[0]
        for moving in (False, True)
    )
    assert same_bits(late, plain)
    assert not same_bits(moving, plain)
    assert without_times(moving)[:2] == without_times(plain)[:2]  # the first two batches are made in their turn


UPDATED = threading.Event()


def held(answer: Answer) -> float:
    """In the thread of rollouts: once an update has been made since they began."""
    if threading.current_thread().name == ROLLOUTS:
        assert UPDATED.wait(20), "no update beside these rollouts"
    return even(answer)


def _update(*args: Any, **kwargs: Any) -> Any:
    result = train_step(*args, **kwargs)
    UPDATED.set()
    return result


class _Counting(Beside[Any]):
    started = 0

    def start(self, work: Any) -> None:
        UPDATED.clear()
        _Counting.started += 1
        super().start(work)


def _run_held(config: TrainConfig) -> tuple[Outcome | None, int]:
    _Counting.started = 0
    beside = mock.patch("trainer.recipes.grpo.Beside", _Counting)
    with beside, mock.patch.object(trainer_module, "train_step", _update):
        return run_here(config), _Counting.started


@pytest.mark.parametrize("size", [1, 2])
def test_updates_are_made_while_rollouts_are(ranks: RankPool, tmp_path: Path, size: int) -> None:
    """A thread that is waited for before the update, which would save nothing: its rewards wait for that update."""
    changes = LAG | BESIDE | {"train__steps": 4, "rl__reward_threads": 1}
    rewards = {"rl__rewards": [RewardConfig(f"{HERE}:held")]}
    outcome, started = ranks.run(size, _run_held, rolling(tmp_path, **changes | rewards))[0]
    assert started == 3  # the first batch made ahead is made with nothing beside it, the last one is not learned from
    assert len(outcome.losses) == 4


def in_thread(answer: Answer) -> float:
    if threading.current_thread().name == ROLLOUTS:
        raise LookupError("no such thing")
    return even(answer)


def _failure(config: TrainConfig, *, sampler_of_rank: int | None) -> tuple[str, list[str]]:
    """What a run ends with, and the threads that are left."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    sampler: Any = trainer.recipe._collector._sampler  # type: ignore[attr-defined]
    rollouts = sampler.rollouts

    def failing(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == ROLLOUTS and trainer.rank == sampler_of_rank:
            raise FloatingPointError("the model gives NaN")
        return rollouts(*args, **kwargs)

    sampler.rollouts = failing
    try:
        trainer.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}", _threads()
    finally:
        trainer.close()
    return "", _threads()


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == ROLLOUTS]


def test_what_goes_wrong_in_the_thread_ends_the_run_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """A failure that nobody hears of, a rank that waits for one that has ended, another text than without a thread."""
    changes = LAG | BESIDE | {"rl__reward_threads": 1}
    rewards = {"rl__rewards": [RewardConfig(f"{HERE}:in_thread")]}
    found = ranks.run(2, _failure, rolling(tmp_path / "reward", **changes | rewards), sampler_of_rank=None)
    for text, threads in found:
        assert text.startswith("RewardError: the reward function in_thread raised LookupError: no such thing")
        assert threads == []
    (first, _), (second, _) = ranks.run(2, _failure, rolling(tmp_path / "nan", **changes), sampler_of_rank=1)
    assert second == "FloatingPointError: the model gives NaN"
    assert first == "RolloutError: rollouts failed on rank 1: FloatingPointError: the model gives NaN"


def slow(answer: Answer) -> float:
    """In the thread: all of them together longer than a test may take."""
    if threading.current_thread().name == ROLLOUTS:
        time.sleep(2)
    return even(answer)


def _interrupted(config: TrainConfig, *, by: str) -> tuple[str, float, list[str]]:
    """A run that its second step, the first beside which rollouts are made, ends; how, in what time, what is left."""
    trainer = Trainer(finalize(config, world_size=1))
    began = [0.0]

    def update(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.step == 1:
            began[0] = time.monotonic()
            if by == "failure":
                raise OSError("no space left")
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, *args, **kwargs)

    how = ""
    with mock.patch.object(trainer_module, "train_step", update):
        try:
            trainer.run()
        except (OSError, Preempted) as error:
            how = type(error).__name__
        finally:
            trainer.close()
    return how, time.monotonic() - began[0], _threads()


def test_a_run_that_fails_leaves_its_rollouts(ranks: RankPool, tmp_path: Path) -> None:
    """A process that stays until all rewards of a batch that nobody wants are there."""
    changes = LAG | BESIDE | {"rl__reward_threads": 1, "rl__rewards": [RewardConfig(f"{HERE}:slow")]}
    how, seconds, threads = ranks.run(1, _interrupted, rolling(tmp_path, **changes), by="failure")[0]
    assert how == "OSError"
    assert seconds < 15  # not 32
    assert threads == []


def test_a_run_that_is_told_to_stop_saves_its_rollouts(ranks: RankPool, tmp_path: Path) -> None:
    """A batch that was under way and is made again, by newer weights, or twice."""
    plain = run_on(ranks, 1, rolling(tmp_path / "plain", **LAG))
    config = rolling(tmp_path / "stopped", **LAG | BESIDE)
    how, _, threads = ranks.run(1, _interrupted, config, by="signal")[0]
    assert (how, threads) == ("Preempted", [])
    assert same_bits(run_on(ranks, 1, config), plain)


def test_a_thread_that_hangs_is_named_in_the_report() -> None:
    """A report of a main thread that waits, from which one cannot tell for what; or that blames a collective."""
    told = threading.Event()
    beside: Beside[None] = Beside(torch.device("cpu"))
    beside.start(lambda check: _hang(told))
    while ROLLOUTS not in [thread.name for thread in threading.enumerate()]:
        time.sleep(0.01)
    time.sleep(0.1)
    found = standing(0, Phase("data", 3, 1.0, time.monotonic()))
    told.set()
    beside.wait()
    assert f"beside {ROLLOUTS} at tests/trainer/rl/test_overlap.py" in found.at
    assert "_hang" in found.at
    assert found.collective is None
    assert any(name.startswith(f"{ROLLOUTS} ") for name in found.stacks)


def _hang(told: threading.Event) -> None:
    told.wait()


HANGING = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from launch.errors import exit_code_of
from tests.trainer.rl.test_overlap import hanging_run
sys.exit(exit_code_of(hanging_run, sys.argv[2:]))
"""


def endless(answer: Answer) -> float:
    if threading.current_thread().name == ROLLOUTS:
        threading.Event().wait()
    return even(answer)


def hanging_run(arguments: list[str]) -> None:
    rewards = {"rl__rewards": [RewardConfig(f"{HERE}:endless")], "rl__reward_threads": 1}
    config = rolling(Path(arguments[0]), **LAG | BESIDE | rewards | {"train__timeout_seconds": 5.0})
    trainer = Trainer(finalize(config, world_size=1))
    trainer.run()


@pytest.mark.thorough
def test_a_reward_that_never_returns_ends_the_run_with_a_report(tmp_path: Path) -> None:
    """A run that waits for its rollouts for ever."""
    command = [sys.executable, "-c", HANGING, str(ROOT), str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == HUNG_EXIT_CODE, found.stderr
    assert f"beside {ROLLOUTS} at tests/trainer/rl/test_overlap.py" in found.stderr


def _shared_with_copy(config: TrainConfig) -> tuple[int, int, int]:
    """Parameters of the copy that are the trainer's own, that are copies, and that are trained."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
        ours = dict(trainer.state.model.named_parameters())
        copy = dict(trainer.recipe._sampled_by.named_parameters())  # type: ignore[attr-defined]
        assert ours.keys() == copy.keys()
        shared = sum(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in copy.items())
        return shared, len(copy) - shared, sum(p.requires_grad for p in ours.values())
    finally:
        trainer.close()


@pytest.mark.some(1)
@pytest.mark.thorough
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_of_adapters_the_copy_has_what_is_trained_alone(ranks: RankPool, tmp_path: Path, quantize: str) -> None:
    """A second copy of a frozen model; adapters that the rollouts do not have."""
    changes = LAG | {"train__steps": 4}
    plain = run_on(ranks, 1, adapting(rolling(tmp_path / "plain", **changes), tmp_path / "plain", quantize=quantize))
    config = adapting(rolling(tmp_path / "beside", **changes | BESIDE), tmp_path / "beside", quantize=quantize)
    assert same_bits(run_on(ranks, 1, config), plain)
    again = adapting(rolling(tmp_path / "again", **changes | BESIDE), tmp_path / "again", quantize=quantize)
    shared, copied, trained = ranks.run(1, _shared_with_copy, again)[0]
    assert copied == trained > 0
    assert shared > 0


@pytest.mark.thorough
def test_in_deterministic_mode_trainer_and_sampler_agree_to_the_bit(ranks: RankPool, tmp_path: Path) -> None:
    """Old log-probabilities by other arithmetic, or other weights, than those that drew the tokens."""
    changes = {"train__batch_invariant": True, "precision__compute": "bf16", "train__global_batch_size": 8}
    for line in run_on(ranks, 1, rolling(tmp_path, **LAG | BESIDE | changes)).metrics:
        assert line["sampler_max_delta"] == line["sampler_kl"] == 0.0
        assert line["importance_weight"] == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rl__overlap": True}, "recipe.rl.overlap=true with recipe.rl.rollout_lag=0: an update waits for the"),
        (LAG | BESIDE | {"parallel__tp": 2}, "recipe.rl.overlap=true with parallel.tp=2: each token that is sampled"),
        (LAG | BESIDE | {"parallel__zero_stage": 3}, "recipe.rl.overlap=true with parallel.zero_stage=3: no rank has"),
        (LAG | BESIDE | {"parallel__pp": 2}, "recipe.rl.overlap=true with parallel.pp=2: no rank has whole weights"),
        (BESIDE | {"recipe__name": "pretrain"}, "recipe.rl is set and has no effect with recipe.name=pretrain"),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(rolling(tmp_path, **changes), world_size=2)
    assert any(says in line for line in lines), lines
