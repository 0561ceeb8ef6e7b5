"""Bits that change on their own are noticed, and a run whose bits do not change is left alone."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.config import DataConfig
from tests.parity.harness import changed, text_corpus, tiny_config
from tests.parity.interrupted import whole_state
from tests.pool import RankPool
from trainer import corruption
from trainer.config import TrainConfig
from trainer.corruption import StateCorrupted, _minority, check_replicas, digest
from trainer.injection import PLAN, flip_a_bit
from trainer.trainer import Trainer
from trainer.validate import finalize

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("corruption"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that misses high bits, the last element, or those behind the first chunk; one that depends on strides."""
    monkeypatch.setattr(corruption, "_CHUNK", 4)
    tensor = torch.arange(11).to(dtype)
    before = digest(tensor).item()
    words = tensor.view(torch.uint8)
    for byte in range(words.numel()):
        for bit in range(8):
            words[byte] ^= 1 << bit
            assert digest(tensor).item() != before, (byte, bit)
            words[byte] ^= 1 << bit
    assert digest(tensor).item() == before
    assert digest(torch.stack([tensor, tensor], 1)[:, 0]).item() == before
    assert digest(tensor.flip(0)).item() != before or dtype == torch.bool
    assert digest(tensor[:0]).item() == 0


def test_a_flipped_bit_is_one_bit() -> None:
    """Control of the fault itself: one that changes nothing would be noticed by nobody."""
    tensor = torch.randn(5, 3)
    before = tensor.clone()
    flip_a_bit(tensor, random.Random(1))
    changed_bits = (tensor.view(torch.int32) ^ before.view(torch.int32)).flatten().tolist()
    assert sum(bin(word & 0xFFFFFFFF).count("1") for word in changed_bits) == 1


def replicas_of(values: list[int]) -> str | None:
    """On ranks: what check_replicas says when each holds a part with this hash, and one part of its own."""
    rank = dist.get_rank()
    mine = {("w", (0,), (3,)): values[rank], ("shard", (rank,), (1,)): rank}
    try:
        check_replicas(mine, step=4, group=dist.group.WORLD)
    except StateCorrupted as error:
        return str(error)
    return None


def test_replicas_that_differ_stop_every_rank_with_one_message(ranks: RankPool) -> None:
    """Ranks that disagree on whether to go on; parts that only one rank holds compared with others'."""
    assert ranks.run(2, replicas_of, [5, 5]) == [None] * 2
    assert set(ranks.run(2, replicas_of, [5, 6])) == {"step 4: replicas of w have different bits; wrong on rank 0 or 1"}


def test_of_three_replicas_the_odd_one_is_wrong() -> None:
    """The many blamed for the one."""
    assert _minority({0: 5, 1: 6, 2: 5}) == [1]
    assert _minority({0: 5, 1: 6}) == [0, 1]
    assert _minority({0: 5, 1: 6, 2: 6, 3: 5}) == [0, 1, 2, 3]


@dataclass
class Watched:
    """A run with planned faults on one rank. Filled by `run_planned`."""

    corrupted: str | None = None
    last_step: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def run_planned(config: TrainConfig, plan: Path | None) -> Watched:
    """On ranks: train with the faults of a plan file."""
    if plan is not None:
        os.environ[PLAN] = str(plan)
    result = Watched()
    try:
        trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    finally:
        os.environ.pop(PLAN, None)
    try:
        trainer.run()
    except StateCorrupted as error:
        result.corrupted = str(error)
    result.last_step = trainer.state.step
    result.state = whole_state(trainer)
    trainer.close()
    return result


def plan_of(folder: Path, kind: str, *, step: int, rank: int, number: int = 0) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text(
        json.dumps({"faults": [{"number": number, "kind": kind, "step": step, "rank": rank}]})
    )
    return folder / "plan.json"


def watched(run_dir: Path, corpus: DataConfig, **changes: Any) -> TrainConfig:
    checks = {"resilience__check_interval": 1, "resilience__rerun_interval": 1}
    return tiny_config(run_dir, corpus, **({"train__steps": 4, "model__dropout": 0.1} | checks | changes))


LAYOUTS: list[Any] = [
    (2, {"parallel__zero_stage": 1, "precision__compute": "bf16"}),
    *(
        pytest.param(2, layout, marks=pytest.mark.thorough)
        for layout in (
            {"parallel__zero_stage": 0},
            {"parallel__zero_stage": 3},
            {"parallel__zero_stage": 1, "parallel__tp": 2},
        )
    ),
]


@pytest.mark.some(1)
@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_a_flipped_bit_stops_every_rank_before_it_is_saved(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    """Corruption that spreads into checkpoints; a rank that stops alone; checks that change what is computed, or cry
    wolf."""
    config = watched(tmp_path / "good", corpus, **layout)
    good = ranks.run(world_size, run_planned, config, None)
    assert [(r.corrupted, r.last_step) for r in good] == [(None, 4)] * world_size
    plain = changed(config, tmp_path / "plain", resilience__check_interval=0, resilience__rerun_interval=0)
    unwatched = ranks.run(world_size, run_planned, plain, None)[0].state
    assert all(torch.equal(good[0].state[name], tensor) for name, tensor in unwatched.items())
    for kind, says in {
        "flip_weight": "step 3: the state changed between two updates: rank 1: ",
        "flip_gradient": "step 3: computed twice, it gave different bits",
    }.items():
        plan = plan_of(tmp_path / f"plan-{kind}", kind, step=3, rank=1, number=7)
        found = ranks.run(world_size, run_planned, changed(config, tmp_path / kind, checkpoint__interval=1), plan)
        assert len({r.corrupted for r in found}) == 1
        assert found[0].corrupted is not None
        assert found[0].corrupted.startswith(says)
        saved = sorted(path.name for path in (tmp_path / kind / "checkpoints").glob("step_*"))
        assert saved == ["step_1", "step_2"]


def test_replicas_that_a_flipped_gradient_drove_apart_are_noticed_without_computing_twice(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """A flip after the sum over ranks: every replica is at rest, and they differ."""
    config = watched(tmp_path / "run", corpus, resilience__rerun_interval=0, parallel__zero_stage=0)
    plan = plan_of(tmp_path / "plan", "flip_gradient", step=3, rank=0)
    (first, second) = ranks.run(2, run_planned, config, plan)
    assert first.corrupted == second.corrupted
    assert first.corrupted is not None
    assert first.corrupted.startswith("step 3: replicas of ")


def test_without_checks_a_flipped_bit_goes_unnoticed(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Negative control: the run would have gone to its end."""
    unwatched = {"resilience__rerun_interval": 0, "resilience__check_interval": 0}
    config = watched(tmp_path / "run", corpus, parallel__zero_stage=0, **unwatched)
    plan = plan_of(tmp_path / "plan", "flip_weight", step=3, rank=1, number=3)
    assert [(r.corrupted, r.last_step) for r in ranks.run(2, run_planned, config, plan)] == [(None, 4)] * 2


def test_a_slow_rank_is_named_while_the_run_goes_on(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """An event that the logger refuses; the rank that waits named for the one it waits for."""
    config = tiny_config(tmp_path / "run", corpus, train__steps=4, resilience__straggler_interval=2)
    plan = plan_of(tmp_path / "plan", "slow", step=3, rank=1)
    assert [r.last_step for r in ranks.run(2, run_planned, config, plan)] == [4, 4]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    named = [(e["step"], e["rank"], e["measure"]) for e in events if e["kind"] == "straggler"]
    assert (4, 1, "late") in named
    assert (4, 0, "late") not in named
