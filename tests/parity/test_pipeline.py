"""Every pipeline schedule against one process, through the real trainer, in fp32."""

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
    weight_deviation,
)
from tests.pool import RankPool
from trainer.config import TrainConfig

STEPS = 4
MODEL: dict[str, Any] = {"model__num_layers": 9, "train__global_batch_size": 12, "train__steps": STEPS}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"data__mask_documents": True},
    "dropout": {"model__dropout": 0.1, "data__mask_documents": True},
    "tied": {"model__tie_embeddings": True, "model__positions": "learned"},
    "tied_muon": {"model__tie_embeddings": True, "optim__name": "muon"},
    "biased": {"model__qkv_bias": True, "model__mlp_bias": True, "data__mask_documents": True},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


class _OneProcess:
    """Runs of one process, made once per variant, and what another split into micro-batches does to its weights."""

    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path) -> None:
        self.ranks, self.corpus, self.folder = ranks, corpus, folder
        self.made: dict[str, tuple[TrainConfig, Outcome, float]] = {}

    def of(self, variant: str) -> tuple[TrainConfig, Outcome, float]:
        if variant not in self.made:
            changes = MODEL | {"train__micro_batch_size": 12} | VARIANTS[variant]
            whole = tiny_config(self.folder / f"{variant}-whole", self.corpus, **changes)
            reference = run_on(self.ranks, 1, whole)
            splits = [
                run_on(self.ranks, 1, changed(whole, self.folder / f"{variant}-{m}", train__micro_batch_size=m))
                for m in (1, 4)
            ]
            self.made[variant] = (whole, reference, max(weight_deviation(split, reference) for split in splits))
        return self.made[variant]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _OneProcess:
    return _OneProcess(ranks, corpus, tmp_path_factory.mktemp("one-process"))


def _assert_same_model(outcome: Outcome, reference: Outcome, sensitivity: float) -> None:
    assert len(outcome.losses) == STEPS
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert weight_deviation(outcome, reference) <= 2 * sensitivity
    assert outcome.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


# (variant, ranks, pp, schedule, zero_stage, micro_batch_size): with 12 sequences, 1 to 12 micro-batches
LAYOUTS = [
    ("plain", 2, 2, "gpipe", 0, 4),
    ("plain", 4, 4, "gpipe", 1, 2),
    ("masked", 4, 2, "gpipe", 1, 2),
    ("plain", 2, 2, "1f1b", 0, 1),
    ("plain", 4, 4, "1f1b", 0, 4),
    ("plain", 2, 2, "1f1b", 0, 12),
    ("dropout", 4, 2, "1f1b", 1, 2),
    ("tied", 4, 2, "1f1b", 1, 2),
    ("tied", 4, 4, "1f1b", 0, 1),
    ("tied_muon", 4, 2, "1f1b", 1, 1),
    ("biased", 4, 2, "1f1b", 0, 2),
    ("plain", 2, 2, "interleaved_1f1b", 1, 4),
    ("tied", 4, 4, "interleaved_1f1b", 0, 2),
    ("dropout", 4, 2, "interleaved_1f1b", 1, 2),
    ("plain", 2, 2, "zero_bubble", 0, 4),
    ("biased", 4, 4, "zero_bubble", 1, 1),
    ("tied", 4, 2, "zero_bubble", 1, 2),
    ("dropout", 2, 2, "zbv", 0, 4),
    ("tied", 4, 4, "zbv", 0, 2),
    ("tied", 4, 2, "zbv", 1, 2),
    ("plain", 2, 2, "dualpipev", 1, 4),
    ("tied", 4, 2, "dualpipev", 1, 1),
    ("biased", 4, 4, "dualpipev", 0, 1),
]


@pytest.mark.parametrize(("variant", "world_size", "pp", "schedule", "stage", "micro_batch_size"), LAYOUTS)
def test_every_schedule_trains_the_same_model(
    ranks: RankPool,
    one_process: _OneProcess,
    tmp_path: Path,
    variant: str,
    world_size: int,
    pp: int,
    schedule: str,
    stage: int,
    micro_batch_size: int,
) -> None:
    """A gradient lost, doubled or mixed up between stages or micro-batches; a tied table that drifts apart."""
    whole, reference, sensitivity = one_process.of(variant)
    config = changed(
        whole,
        tmp_path / "run",
        parallel__zero_stage=stage,
        parallel__pp=pp,
        parallel__pp_schedule=schedule,
        train__micro_batch_size=micro_batch_size,
    )
    _assert_same_model(run_on(ranks, world_size, config), reference, sensitivity)
