"""Tensor and sequence parallelism against one process, through the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.pool import RankPool
from trainer.config import TrainConfig

LLAMA: dict[str, Any] = {
    "model__num_heads": 4, "model__num_kv_heads": 2, "model__head_dim": 6, "model__intermediate_size": 52,
    "model__vocab_size": 303, "train__steps": 3, "data__mask_documents": True,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


class _OneProcess:
    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path) -> None:
        self.ranks, self.corpus, self.folder = ranks, corpus, folder
        self.made: dict[str, tuple[TrainConfig, Outcome]] = {}

    def of(self, variant: str) -> tuple[TrainConfig, Outcome]:
        if variant not in self.made:
            config = tiny_config(self.folder / variant, self.corpus, train__micro_batch_size=2, **VARIANTS[variant])
            self.made[variant] = (config, run_on(self.ranks, 1, config))
        return self.made[variant]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _OneProcess:
    return _OneProcess(ranks, corpus, tmp_path_factory.mktemp("one-process"))


LAYOUTS = [
    ("llama", 2, {"parallel__tp": 2, "parallel__zero_stage": 0}),
    ("llama", 2, {"parallel__tp": 2, "parallel__zero_stage": 0, "parallel__sequence_parallel": True}),
    ("llama", 4, {"parallel__tp": 4, "parallel__zero_stage": 0, "parallel__sequence_parallel": True}),
    ("llama", 4, {"parallel__tp": 2, "parallel__zero_stage": 1, "parallel__sequence_parallel": True}),
    ("llama", 4, {"parallel__tp": 2, "parallel__zero_stage": 2, "parallel__sequence_parallel": True}),
    ("llama", 4, {"parallel__tp": 2, "parallel__zero_stage": 3, "parallel__sequence_parallel": True}),
]


@pytest.mark.parametrize(("variant", "world_size", "changes"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, variant: str, world_size: int, changes: dict[str, Any]
) -> None:
    config, reference = one_process.of(variant)
    outcome = run_on(ranks, world_size, changed(config, tmp_path / "run", **changes))
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
