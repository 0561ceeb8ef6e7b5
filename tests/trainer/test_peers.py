"""Copies of the state in memory: a restart goes on from them, a step behind, and never from wrong ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.config import DataConfig
from tests.parity.harness import changed, text_corpus, tiny_config
from tests.parity.interrupted import Part, run_part_on
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.peers import PeerCheckpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("peers"))


def copied(folder: Path, corpus: DataConfig, **changes: Any) -> TrainConfig:
    """Eight steps, a checkpoint after the third, and copies in memory after each."""
    (folder / "memory").mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {"train__steps": 8, "checkpoint__interval": 3, "model__dropout": 0.1}
    defaults |= {"resilience__peer_interval": 1, "resilience__peer_dir": str(folder / "memory")}
    return tiny_config(folder / "run", corpus, **(defaults | changes))


def assert_same_bits(part: Part, reference: Part) -> None:
    assert part.of("step") == reference.of("step")
    assert part.of("loss") == reference.of("loss")
    assert [n for n, t in reference.state_at_end.items() if not torch.equal(part.state_at_end[n], t)] == []


def files(config: TrainConfig) -> list[Path]:
    return sorted(Path(config.resilience.peer_dir).glob("lattice-*/rank_*"))


def test_a_run_that_crashed_loses_no_step_that_was_copied(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """A restart from the checkpoint although memory has more; state that copies lack; copies that outlive the run."""
    config = copied(tmp_path / "a", corpus, parallel__zero_stage=1, precision__compute="bf16")
    reference = run_part_on(ranks, 2, changed(config, tmp_path / "whole", resilience__peer_interval=0))
    crashed = run_part_on(ranks, 2, config, crash_before=6)
    assert crashed.ended == "crashed"
    assert len(files(config)) == 4  # of two ranks, in turn
    continued = run_part_on(ranks, 2, config)
    assert continued.resumed_from == "memory (step 5)"
    assert_same_bits(continued, reference)
    assert files(config) == []


def test_a_crash_before_the_first_checkpoint_continues_from_memory_too(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """metrics.jsonl moved away as that of another attempt."""
    config = copied(tmp_path / "a", corpus, parallel__zero_stage=3)
    reference = run_part_on(ranks, 2, changed(config, tmp_path / "whole", resilience__peer_interval=0))
    run_part_on(ranks, 2, config, crash_before=3)
    continued = run_part_on(ranks, 2, config)
    assert continued.resumed_from == "memory (step 2)"
    assert_same_bits(continued, reference)


@pytest.mark.thorough
def test_copies_that_are_torn_or_of_another_layout_or_run_are_not_used(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """A state made of parts of different steps; parts loaded where they do not belong; the copies of a deleted run."""
    config = copied(tmp_path / "a", corpus, parallel__zero_stage=1)
    run_part_on(ranks, 2, config, crash_before=6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newest = max(files(config), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    assert run_part_on(ranks, 2, config, crash_before=6).resumed_from == "memory (step 4)"
    assert run_part_on(ranks, 4, config, crash_before=6).resumed_from == "step_3"
    other = changed(config, tmp_path / "a" / "run", parallel__zero_stage=0)
    run_part_on(ranks, 2, config, crash_before=6)
    assert run_part_on(ranks, 2, other, crash_before=5).resumed_from == "step_3"
    shutil.rmtree(tmp_path / "a" / "run")
    assert files(config) != []
    assert run_part_on(ranks, 2, config, crash_before=3).resumed_from is None


def on_two_hosts(folder: Path, step: int | None) -> tuple[int | None, float, Any]:
    """On ranks, each on a host of its own: save at `step`, or load what is newest; (step, value, extra)."""
    memory = folder / f"host_{dist.get_rank()}"
    memory.mkdir(exist_ok=True)
    peers = PeerCheckpoints(folder / "run", memory, device=CPU, ranks_per_host=1)
    tensors = {"w": torch.full((3, 5), float(dist.get_rank()))}
    try:
        if step is not None:
            peers.start()
            peers.save(step, tensors, {"step": step})
            tensors["w"].zero_()  # what was saved is a copy
            peers.wait()
            return step, 0.0, None
        newest = peers.newest()
        extra = None if newest is None else peers.load(newest, tensors)
        return newest, tensors["w"].mean().item(), extra
    finally:
        peers.close()


def test_a_host_that_is_replaced_gets_its_part_from_a_peer(ranks: RankPool, tmp_path: Path) -> None:
    """Copies that are all on the host that is lost; a part given to the wrong rank."""
    (tmp_path / "run").mkdir()
    ranks.run(2, on_two_hosts, tmp_path, 7)
    shutil.rmtree(tmp_path / "host_1")
    assert ranks.run(2, on_two_hosts, tmp_path, None) == [(7, 0.0, {"step": 7}), (7, 1.0, {"step": 7})]
    shutil.rmtree(tmp_path / "host_1")
    shutil.rmtree(tmp_path / "host_0")
    assert [found[0] for found in ranks.run(2, on_two_hosts, tmp_path, None)] == [None, None]


def after_a_restart(folder: Path, saved: list[int], dies: bool) -> int | None:
    """On ranks of one host: load what is newest, then save these steps; with dies, rank 1 is gone before the last."""
    (folder / "memory").mkdir(exist_ok=True)
    peers = PeerCheckpoints(folder / "run", folder / "memory", device=CPU, ranks_per_host=2)
    tensors = {"w": torch.zeros(3)}
    try:
        if (newest := peers.newest()) is not None:
            peers.load(newest, tensors)
        peers.start()
        for step in saved:
            if not (dies and step == saved[-1] and dist.get_rank() == 1):
                peers.save(step, tensors, {})
                peers.wait()
        return newest
    finally:
        peers.close()


def test_the_first_copy_after_a_restart_leaves_the_one_it_was_loaded_from(ranks: RankPool, tmp_path: Path) -> None:
    """A rank that dies while another has already replaced the newest copy: all go back to the one before that."""
    (tmp_path / "run").mkdir()
    ranks.run(2, after_a_restart, tmp_path, [1, 2, 3, 4, 5], False)
    assert ranks.run(2, after_a_restart, tmp_path, [6], True) == [5, 5]
    assert ranks.run(2, after_a_restart, tmp_path, [6, 7], True) == [5, 5]
    assert ranks.run(2, after_a_restart, tmp_path, [], False) == [6, 6]
