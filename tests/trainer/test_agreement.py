"""Processes that were started differently do not train together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.config import DataConfig
from tests.parity.harness import text_corpus, tiny_config
from tests.pool import RankPool
from tests.trainer.starts import Start, contents, start_here
from trainer.config import TrainConfig


@dataclass
class Change:
    """What one rank is told differently."""

    rank: int
    group: str
    field: str
    value: Any


def start_with(config: TrainConfig, change: Change) -> Start:
    mine = copy.deepcopy(config)
    if dist.get_rank() == change.rank:
        setattr(getattr(mine, change.group), change.field, change.value)
    return start_here(mine)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Change(1, "train", "seed", 8), "rank 1 was started differently: train.seed 8 (rank 0: 7)"),
        (Change(1, "parallel", "zero_stage", 3), "parallel.zero_stage 3 (rank 0: 0)"),
        (Change(1, "optim", "lr", 1e-4), "optim.lr 0.0001 (rank 0: 0.003)"),
    ],
)
def test_another_command_line_on_one_rank_is_refused_on_all(
    change: Change, says: str, ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """Half of every batch trained with another seed or rate; or a hang, where the layouts differ."""
    starts = ranks.run(2, start_with, tiny_config(tmp_path / "run", corpus), change, timeout=60)
    assert {start.error for start in starts} == {"ConfigError"}
    assert len({start.message for start in starts}) == 1
    assert says in starts[0].message
    assert not contents(tmp_path / "run")


def test_other_text_on_one_node_is_refused_on_all(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """A corpus that was copied to one node only in part, or another Python's library: two tokenizers, one model."""
    other = text_corpus(tmp_path)
    (Path(str(other.path)) / "00.txt").write_text("what the other node does not have")
    starts = ranks.run(
        2, start_with, tiny_config(tmp_path / "run", corpus), Change(1, "data", "path", other.path), timeout=60
    )
    assert {start.error for start in starts} == {"ConfigError"}
    assert "rank 1 was started differently: data.content[0]" in starts[0].message
    assert not contents(tmp_path / "run")


def test_the_same_text_at_another_place_is_fine(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Negative control: nodes may keep their copies where they like."""
    other = text_corpus(tmp_path)
    config = tiny_config(tmp_path / "run", corpus, train__steps=4)
    starts = ranks.run(2, start_with, config, Change(1, "data", "path", other.path), timeout=60)
    assert [(start.error, start.last_step) for start in starts] == [(None, 4)] * 2, starts[0].message
