"""A run that was stopped and continued against one that was not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from tests.parity.harness import changed, text_corpus, tiny_config
from tests.parity.interrupted import Part, run_part_on
from tests.pool import RankPool
from trainer.config import TrainConfig

STEPS, STOP = 12, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("resume"))


def resumable(run_dir: Path, corpus: DataConfig, **changes: Any) -> TrainConfig:
    """Twelve steps with dropout on masked documents, saved after every fifth."""
    defaults: dict[str, Any] = {
        "train__steps": STEPS,
        "checkpoint__interval": STOP,
        "model__dropout": 0.1,
        "data__mask_documents": True,
    }
    return tiny_config(run_dir, corpus, **(defaults | changes))


def assert_each_step_once(part: Part) -> None:
    assert part.of("step") == list(range(1, STEPS + 1))


def assert_same_bits(part: Part, reference: Part) -> None:
    """The numbers of every step and everything that a checkpoint would hold, bit for bit."""
    assert_each_step_once(part)
    for name in ("loss", "grad_norm", "lr", "tokens", "valid_tokens", "skipped_steps"):
        assert part.of(name) == reference.of(name), name
    assert part.state_at_end.keys() == reference.state_at_end.keys()
    different = [n for n, t in reference.state_at_end.items() if not torch.equal(part.state_at_end[n], t)]
    assert different == []


FP16 = {
    "precision__compute": "fp16",
    "precision__loss_scale": 2.0**24,  # overflows at first: the scale is on its way down when the run stops
    "precision__loss_scale_growth_interval": 3,
    "optim__lr": 1e-3,
}
SAME_LAYOUT = [
    (2, 0, {}),
    (2, 1, {}),
    (2, 2, {}),
    (2, 3, {}),
    (4, 2, {"parallel__dp_replicate": 2}),
    (2, 2, {"precision__compute": "bf16"}),
    (2, 3, {"precision__compute": "bf16"}),
    (2, 0, {"precision__compute": "bf16", "precision__reduce": "bf16", "precision__master": "bf16"}),
    (2, 1, FP16),
    (2, 3, FP16),
    (2, 1, {"optim__name": "muon"}),
    (2, 3, {"optim__name": "muon"}),
    (2, 3, {"parallel__cpu_offload": True}),
    (2, 1, {"data__num_workers": 1, "checkpoint__asynchronous": True}),
]


@pytest.mark.some(3)
@pytest.mark.parametrize(("world_size", "stage", "changes"), SAME_LAYOUT)
def test_a_run_that_crashed_continues_bitwise_on_the_same_layout(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, world_size: int, stage: int, changes: dict[str, Any]
) -> None:
    """State that is not in the checkpoint (a moment, the step count, a loss scale, the dropout key, samples that were
    prefetched), or steps after the checkpoint that stay in metrics.jsonl."""
    config = resumable(tmp_path / "whole", corpus, parallel__zero_stage=stage, **changes)
    reference = run_part_on(ranks, world_size, config)
    stopped = changed(config, tmp_path / "stopped")
    crashed = run_part_on(ranks, world_size, stopped, crash_before=8)
    assert (crashed.ended, len(crashed.lines)) == ("crashed", 7)  # two of them will be done again
    continued = run_part_on(ranks, world_size, stopped)
    assert continued.resumed_from == "step_5"
    assert_same_bits(continued, reference)
    assert {step: continued.rows[step] for step in range(6, 13)} == {s: reference.rows[s] for s in range(6, 13)}
    if changes is FP16:
        assert crashed.lines[4]["skipped_steps"] > 0
        assert len(set(reference.of("loss_scale"))) > 3


def test_the_comparison_notices_a_resume_that_forgets_something(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """Negative control: continuing with another dropout seed or another beta must not pass for the same run."""
    config = resumable(tmp_path / "whole", corpus)
    reference = run_part_on(ranks, 1, config)
    for name, changes in {"beta": {"optim__beta2": 0.9501}, "dropout": {"model__dropout": 0.11}}.items():
        stopped = changed(config, tmp_path / name)
        run_part_on(ranks, 1, stopped, crash_before=8)
        continued = run_part_on(ranks, 1, changed(stopped, tmp_path / name, **changes))
        with pytest.raises(AssertionError):
            assert_same_bits(continued, reference)


@pytest.mark.thorough
def test_two_crashes_in_a_row_and_one_before_the_first_checkpoint(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """A second restart that begins where the first did, metrics of redone steps that appear twice, a crash without a
    checkpoint that makes the launcher's restart fail."""
    config = resumable(tmp_path / "whole", corpus, parallel__zero_stage=1, checkpoint__interval=3)
    reference = run_part_on(ranks, 2, config)
    stopped = changed(config, tmp_path / "stopped")
    resumed_from = []
    for crash_before in (3, 6, 6, 11):
        crashed = run_part_on(ranks, 2, stopped, crash_before=crash_before)
        assert crashed.ended == "crashed"
        assert crashed.of("step") == list(range(1, crash_before))
        resumed_from.append(crashed.resumed_from)
    continued = run_part_on(ranks, 2, stopped)
    assert [*resumed_from, continued.resumed_from] == [None, None, "step_3", "step_3", "step_9"]
    assert_same_bits(continued, reference)
    kept = (tmp_path / "stopped" / "metrics.attempt1.jsonl").read_text().splitlines()
    assert len(kept) == 2  # of the start that crashed without a checkpoint


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize(("world_size", "stage", "signalled"), [(2, 1, 1), (2, 3, 0), (4, 0, 2)])
def test_a_preempted_run_saves_and_continues_bitwise(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, world_size: int, stage: int, signalled: int
) -> None:
    """A signal to one rank that the others do not hear of, a state that is saved before its step is complete."""
    config = resumable(tmp_path / "whole", corpus, parallel__zero_stage=stage, checkpoint__asynchronous=True)
    reference = run_part_on(ranks, world_size, config)
    stopped = changed(config, tmp_path / "stopped")
    preempted = run_part_on(ranks, world_size, stopped, signals={signalled: 7})
    assert preempted.ended == "preempted"
    assert preempted.of("step") == list(range(1, 8))
    continued = run_part_on(ranks, world_size, stopped)
    assert continued.resumed_from == "step_7"
    assert_same_bits(continued, reference)


def _layout(world_size: int, stage: int, replicas: int = 1, micro: int = 1) -> tuple[int, dict[str, int]]:
    return world_size, {
        "parallel__zero_stage": stage,
        "parallel__dp_replicate": replicas,
        "train__micro_batch_size": micro,
    }


MOVES = [
    (_layout(1, 0), _layout(4, 3)),
    (_layout(4, 3), _layout(1, 0)),
    (_layout(4, 3), _layout(4, 1)),
    (_layout(2, 1), _layout(4, 2)),
    (_layout(2, 0), _layout(4, 3, replicas=2)),
    (_layout(4, 1, replicas=2), _layout(2, 3)),
    (_layout(4, 3, replicas=2), _layout(1, 1, micro=8)),
    (_layout(2, 3, micro=1), _layout(2, 3, micro=4)),
]


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """One process, twelve steps, for each optimizer."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        name: run_part_on(ranks, 1, resumable(folder / name, corpus, optim__name=name)) for name in ("adamw", "muon")
    }


@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [(o, *m) for o, m in itertools.product(("adamw", "muon"), MOVES) if o == "adamw" or m in MOVES[3:6:2]],
)
def test_a_run_continues_on_another_layout(
    ranks: RankPool,
    corpus: DataConfig,
    uninterrupted: dict[str, Part],
    tmp_path: Path,
    optimizer: str,
    before: tuple[int, dict[str, int]],
    after: tuple[int, dict[str, int]],
) -> None:
    """A shard that is read into the wrong place, padding that becomes weights, a cursor that counts per rank."""
    reference = uninterrupted[optimizer]
    config = resumable(tmp_path / "run", corpus, optim__name=optimizer)
    stopped = run_part_on(ranks, before[0], changed(config, tmp_path / "run", **before[1]), crash_before=6)
    continued = run_part_on(ranks, after[0], changed(config, tmp_path / "run", **after[1]))
    assert continued.resumed_from == "step_5"
    # What was saved is what is loaded, bit for bit, whoever holds which part of it.
    assert stopped.state_at_end.keys() == continued.state_at_start.keys()
    for name, tensor in stopped.state_at_end.items():
        assert torch.equal(continued.state_at_start[name], tensor), name
    assert stopped.rows | continued.rows == reference.rows
    assert_each_step_once(continued)
    for name in ("loss", "grad_norm"):
        assert continued.of(name) == pytest.approx(reference.of(name), rel=1e-5)
    assert continued.of("tokens") == reference.of("tokens")
