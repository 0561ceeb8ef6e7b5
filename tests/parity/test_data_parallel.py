"""Every data-parallel layout against one process, through the real trainer: twenty steps in fp32.

The tolerances are those of fp32, not of this code: sums in another order change a loss by about 1e-7; what that does to
weights after twenty steps of Adam is measured here, by changing nothing but the micro-batches of one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"data__mask_documents": True, "model__dropout": 0.0},
    "dropout": {"model__dropout": 0.1, "data__mask_documents": True},
    "tied": {"model__tie_embeddings": True, "optim__name": "muon"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


class _OneProcess:
    """Runs of one process, made once per variant: the whole batch at once, and its deviation from smaller splits."""

    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path) -> None:
        self.ranks, self.corpus, self.folder = ranks, corpus, folder
        self.made: dict[str, tuple[TrainConfig, Outcome, float]] = {}

    def of(self, variant: str) -> tuple[TrainConfig, Outcome, float]:
        if variant not in self.made:
            whole = tiny_config(
                self.folder / f"{variant}-whole", self.corpus, train__micro_batch_size=8, **VARIANTS[variant]
            )
            reference = run_on(self.ranks, 1, whole)
            splits = [
                run_on(self.ranks, 1, changed(whole, self.folder / f"{variant}-{m}", train__micro_batch_size=m))
                for m in (1, 2, 4)
            ]
            for split in splits:
                assert loss_deviation(split, reference) <= 1e-6
                assert gradient_deviation(split, reference) <= 1e-5
            sensitivity = max(weight_deviation(split, reference) for split in splits)
            self.made[variant] = (whole, reference, sensitivity)
        return self.made[variant]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _OneProcess:
    return _OneProcess(ranks, corpus, tmp_path_factory.mktemp("one-process"))


def _assert_same_model(outcome: Outcome, reference: Outcome, sensitivity: float) -> None:
    assert len(outcome.losses) == 20
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert weight_deviation(outcome, reference) <= 2 * sensitivity


# (variant, ranks, zero_stage, dp_replicate, micro_batch_size): every stage on every number of ranks, every split, HSDP
LAYOUTS = [
    *(("plain", world, stage, 1, 1) for world in (1, 2, 4) for stage in (0, 1, 2, 3)),
    ("plain", 4, 1, 2, 1),
    ("plain", 4, 2, 2, 2),
    ("plain", 4, 3, 2, 1),
    ("plain", 2, 1, 1, 4),
    ("plain", 2, 3, 1, 2),
    ("masked", 4, 0, 1, 2),
    ("masked", 2, 1, 1, 1),
    ("masked", 4, 2, 1, 1),
    ("masked", 4, 3, 2, 1),
    ("dropout", 2, 0, 1, 2),
    ("dropout", 4, 1, 1, 1),
    ("dropout", 2, 2, 1, 2),
    ("dropout", 4, 3, 1, 2),
    ("dropout", 4, 2, 2, 1),
    ("tied", 2, 0, 1, 1),
    ("tied", 4, 1, 1, 1),
    ("tied", 4, 1, 2, 2),
    ("tied", 4, 3, 2, 1),
    # Micro-batches of 3, 3 and 2 sequences, and of 3 and 1.
    ("masked", 1, 0, 1, 3),
    ("plain", 2, 1, 1, 3),
    ("dropout", 2, 3, 1, 3),
]


@pytest.mark.parametrize(("variant", "world_size", "stage", "dp_replicate", "micro_batch_size"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool,
    one_process: _OneProcess,
    tmp_path: Path,
    variant: str,
    world_size: int,
    stage: int,
    dp_replicate: int,
    micro_batch_size: int,
) -> None:
    """Any lost, doubled or averaged gradient, any sample read twice, any dropout mask that knows its rank."""
    whole, reference, sensitivity = one_process.of(variant)
    config = changed(
        whole,
        tmp_path / "run",
        parallel__zero_stage=stage,
        parallel__dp_replicate=dp_replicate,
        train__micro_batch_size=micro_batch_size,
    )
    _assert_same_model(run_on(ranks, world_size, config), reference, sensitivity)


@pytest.mark.parametrize(
    ("world_size", "stage", "changes"),
    [
        (2, 3, {"model__activation_checkpoint": "full"}),
        (2, 1, {"model__activation_checkpoint": "selective"}),
        (2, 2, {"model__activation_checkpoint": "offload"}),
        (2, 3, {"parallel__cpu_offload": True}),
        (1, 0, {"train__compile": True, "train__compile_backend": "aot_eager", "train__micro_batch_size": 3}),
        (2, 3, {"train__compile": True, "train__compile_backend": "aot_eager"}),
        (2, 1, {
            "train__compile": True, "train__compile_backend": "aot_eager", "model__activation_checkpoint": "selective",
        }),
        (2, 3, {
            "train__compile": True, "train__compile_backend": "aot_eager", "model__activation_checkpoint": "full",
        }),
    ],
)  # fmt: skip
def test_what_is_applied_from_outside_changes_nothing(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, world_size: int, stage: int, changes: dict[str, Any]
) -> None:
    """Recomputation that draws another dropout mask, an offload that returns late, a graph that drops a gradient."""
    whole, reference, sensitivity = one_process.of("dropout")
    changes = {"parallel__zero_stage": stage, "train__micro_batch_size": 2} | changes
    config = changed(whole, tmp_path / "run", **changes)
    _assert_same_model(run_on(ranks, world_size, config, timeout=240), reference, sensitivity)


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (4, 3)])
def test_two_runs_of_one_configuration_are_bitwise_equal(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, world_size: int, stage: int
) -> None:
    """A reduction whose order depends on timing, a set that is iterated, an uninitialised buffer."""
    whole, _, _ = one_process.of("dropout")
    first, second = (
        run_on(
            ranks,
            world_size,
            changed(whole, tmp_path / name, parallel__zero_stage=stage, train__micro_batch_size=1, train__steps=8),
        )
        for name in ("first", "second")
    )
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)


@pytest.mark.parametrize("changes", [{"train__seed": 8}, {"optim__beta2": 0.951}, {"data__mask_documents": False}])
def test_the_comparison_notices_a_small_change(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Negative control: another seed, a slightly different optimizer, another mask must not pass for the same."""
    whole, reference, sensitivity = one_process.of("masked")
    outcome = run_on(ranks, 2, changed(whole, tmp_path / "run", train__micro_batch_size=1, **changes))
    with pytest.raises(AssertionError):
        _assert_same_model(outcome, reference, sensitivity)
