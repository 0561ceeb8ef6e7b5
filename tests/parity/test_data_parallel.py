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
    References,
    assert_same_model,
    changed,
    run_on,
    text_corpus,
)
from tests.pool import RankPool

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"data__mask_documents": True, "model__dropout": 0.0},
    "dropout": {"model__dropout": 0.1, "data__mask_documents": True},
    "tied": {"model__tie_embeddings": True, "optim__name": "muon"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def references(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> References:
    variants = {name: {"train__micro_batch_size": 8} | changes for name, changes in VARIANTS.items()}
    return References(ranks, corpus, tmp_path_factory.mktemp("one-process"), variants, splits=(1, 2, 4))


# (variant, ranks, zero_stage, dp_replicate, micro_batch_size): every stage on every number of ranks, every split, HSDP
LAYOUTS = [
    *(("plain", world, stage, 1, 1) for world in (1, 2, 4) for stage in (0, 1, 2, 3)),
    ("plain", 4, 1, 2, 1),
    ("plain", 4, 2, 2, 2),
    ("plain", 4, 3, 2, 1),
    ("plain", 2, 1, 1, 4),
    ("plain", 2, 3, 1, 2),
    ("masked", 2, 1, 1, 1),
    ("masked", 4, 3, 2, 1),
    ("dropout", 2, 0, 1, 2),
    ("dropout", 4, 1, 1, 1),
    ("dropout", 4, 3, 1, 2),
    ("dropout", 4, 2, 2, 1),
    ("tied", 4, 1, 2, 2),
    ("tied", 4, 3, 2, 1),
    # Micro-batches of 3, 3 and 2 sequences, and of 3 and 1.
    ("masked", 1, 0, 1, 3),
    ("plain", 2, 1, 1, 3),
    ("dropout", 2, 3, 1, 3),
]


@pytest.mark.some(3)
@pytest.mark.parametrize(("variant", "world_size", "stage", "dp_replicate", "micro_batch_size"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    variant: str,
    world_size: int,
    stage: int,
    dp_replicate: int,
    micro_batch_size: int,
) -> None:
    """Any lost, doubled or averaged gradient, any sample read twice, any dropout mask that knows its rank."""
    reference = references.of(variant)
    config = changed(
        reference.config,
        tmp_path / "run",
        parallel__zero_stage=stage,
        parallel__dp_replicate=dp_replicate,
        train__micro_batch_size=micro_batch_size,
    )
    assert_same_model(run_on(ranks, world_size, config), reference)


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize(
    ("world_size", "stage", "changes"),
    [
        (2, 3, {"model__activation_checkpoint": "full"}),
        (2, 1, {"model__activation_checkpoint": "selective"}),
        (2, 2, {"model__activation_checkpoint": "offload"}),
        (2, 3, {"parallel__cpu_offload": True}),
        (1, 0, {"train__compile": True, "train__compile_backend": "aot_eager", "train__micro_batch_size": 3}),
        (2, 3, {
            "train__compile": True, "train__compile_backend": "aot_eager", "model__activation_checkpoint": "full",
        }),
    ],
)  # fmt: skip
def test_what_is_applied_from_outside_changes_nothing(
    ranks: RankPool, references: References, tmp_path: Path, world_size: int, stage: int, changes: dict[str, Any]
) -> None:
    """Recomputation that draws another dropout mask, an offload that returns late, a graph that drops a gradient."""
    reference = references.of("dropout")
    changes = {"parallel__zero_stage": stage, "train__micro_batch_size": 2} | changes
    config = changed(reference.config, tmp_path / "run", **changes)
    assert_same_model(run_on(ranks, world_size, config, timeout=240), reference)


@pytest.mark.some(1)
@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (4, 2), (4, 3)])
def test_two_runs_of_one_configuration_are_bitwise_equal(
    ranks: RankPool, references: References, tmp_path: Path, world_size: int, stage: int
) -> None:
    """A reduction whose order depends on timing, a set that is iterated, an uninitialised buffer."""
    reference = references.of("dropout")
    first, second = (
        run_on(
            ranks,
            world_size,
            changed(
                reference.config, tmp_path / name, parallel__zero_stage=stage, train__micro_batch_size=1, train__steps=8
            ),
        )
        for name in ("first", "second")
    )
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)


@pytest.mark.parametrize("changes", [{"train__seed": 8}, {"optim__beta2": 0.951}, {"data__mask_documents": False}])
def test_the_comparison_notices_a_small_change(
    ranks: RankPool, references: References, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Negative control: another seed, a slightly different optimizer, another mask must not pass for the same."""
    reference = references.of("masked")
    outcome = run_on(ranks, 2, changed(reference.config, tmp_path / "run", train__micro_batch_size=1, **changes))
    with pytest.raises(AssertionError):
        assert_same_model(outcome, reference)
