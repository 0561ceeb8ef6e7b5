"""Mixtures of experts under every data-parallel layout against one process, through the real trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from models.layers import router
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_here,
    run_on,
    text_corpus,
    tiny_config,
    weight_deviation,
)
from tests.pool import RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

STEPS = 5
# Odd numbers on purpose: 5 experts on 2 and 4 ranks, 11 features inside one.
VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model__family": "mixtral",
        "model__moe": MoEConfig(num_experts=5, top_k=2, intermediate_size=11),
        "model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.01),
        "data__mask_documents": True,
    },
    "capacity": {
        "model__moe": MoEConfig(num_experts=5, top_k=2, intermediate_size=11, first_dense=1, normalize=False),
        "model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.01, capacity_factor=0.8),
        "model__dropout": 0.1,
    },
    "switch": {
        "model__moe": MoEConfig(num_experts=4, top_k=1, intermediate_size=11, router="switch", normalize=False),
        "model__routing": RoutingConfig(aux_weight=0.02, capacity_factor=1.0),
        "model__tie_embeddings": True,
    },
    "gshard": {
        "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=11, router="gshard"),
        "model__routing": RoutingConfig(aux_weight=0.02, capacity_factor=1.2),
    },
    "sigmoid": {
        "model__moe": MoEConfig(
            num_experts=6, top_k=3, intermediate_size=7, num_shared=2, router="sigmoid", scaling=1.7, num_groups=3,
            top_groups=2,
        ),
        "model__routing": RoutingConfig(aux_weight=0.001, bias_update_rate=0.01),
        "data__mask_documents": True,
    },
    "deepseek": {
        "model__family": "deepseek_v3",
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        "model__moe": MoEConfig(
            num_experts=5, top_k=2, intermediate_size=11, num_shared=1, first_dense=1, router="sigmoid"
        ),
        "model__routing": RoutingConfig(aux_weight=0.001, bias_update_rate=0.01),
        "data__mask_documents": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("experts"))


class _OneProcess:
    """Runs of one process, made once per variant, and how far a split into micro-batches moves their weights."""

    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path) -> None:
        self.ranks, self.corpus, self.folder = ranks, corpus, folder
        self.made: dict[str, tuple[TrainConfig, Outcome, float]] = {}

    def of(self, variant: str) -> tuple[TrainConfig, Outcome, float]:
        if variant not in self.made:
            whole = tiny_config(
                self.folder / variant, self.corpus, train__micro_batch_size=8, train__steps=STEPS, **VARIANTS[variant]
            )
            reference = run_on(self.ranks, 1, whole)
            splits = [
                run_on(self.ranks, 1, changed(whole, self.folder / f"{variant}-{m}", train__micro_batch_size=m))
                for m in (1, 2, 4)
            ]
            for split in splits:
                assert_same_losses(split, reference)
            self.made[variant] = (whole, reference, max(weight_deviation(split, reference) for split in splits))
        return self.made[variant]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _OneProcess:
    return _OneProcess(ranks, corpus, tmp_path_factory.mktemp("one-process"))


def assert_same_losses(outcome: Outcome, reference: Outcome) -> None:
    """Losses, first gradients, and every metric of the routers."""
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert_same_metrics(outcome, reference)


def assert_same_metrics(outcome: Outcome, reference: Outcome) -> None:
    """Losses and the routers' metrics of every step."""
    assert len(outcome.losses) == STEPS
    assert loss_deviation(outcome, reference) <= 1e-6
    for ours, theirs in zip(outcome.metrics, reference.metrics, strict=True):
        names = {name for name in theirs if name.startswith("moe_")}
        assert len(names) > 6
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)


def assert_same_model(outcome: Outcome, reference: Outcome, sensitivity: float) -> None:
    assert_same_losses(outcome, reference)
    assert weight_deviation(outcome, reference) <= 3 * sensitivity


# (variant, ranks, zero_stage, dp_replicate, micro_batch_size)
LAYOUTS = [
    *(("mixtral", world, stage, 1, 1) for world, stage in ((2, 0), (4, 1), (2, 2), (4, 3))),
    ("mixtral", 4, 3, 2, 2),
    ("capacity", 2, 0, 1, 4),
    ("capacity", 4, 1, 2, 1),
    ("capacity", 4, 3, 1, 2),
    ("switch", 4, 1, 1, 1),
    ("switch", 2, 3, 1, 2),
    ("gshard", 4, 0, 1, 2),
    ("gshard", 4, 3, 2, 1),
    ("sigmoid", 2, 0, 1, 1),
    ("sigmoid", 4, 1, 1, 2),
    ("sigmoid", 4, 2, 1, 1),
    ("sigmoid", 4, 3, 2, 1),
    ("deepseek", 4, 1, 1, 2),
    ("deepseek", 4, 3, 2, 1),
]


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize(("variant", "world_size", "stage", "dp_replicate", "micro_batch_size"), LAYOUTS)
def test_every_layout_trains_the_same_experts(
    ranks: RankPool,
    one_process: _OneProcess,
    tmp_path: Path,
    variant: str,
    world_size: int,
    stage: int,
    dp_replicate: int,
    micro_batch_size: int,
) -> None:
    """A capacity, a balance loss or a bias that is a rank's or a micro-batch's own."""
    whole, reference, sensitivity = one_process.of(variant)
    config = changed(
        whole,
        tmp_path / "run",
        parallel__zero_stage=stage,
        parallel__dp_replicate=dp_replicate,
        train__micro_batch_size=micro_batch_size,
    )
    assert_same_model(run_on(ranks, world_size, config), reference, sensitivity)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("variant", "stage", "changes"),
    [
        ("capacity", 3, {"model__activation_checkpoint": "full"}),
        ("sigmoid", 1, {"model__activation_checkpoint": "selective"}),
        ("mixtral", 2, {"model__activation_checkpoint": "offload"}),
        ("sigmoid", 3, {"train__compile": True, "train__compile_backend": "aot_eager"}),
        ("gshard", 1, {
            "train__compile": True, "train__compile_backend": "aot_eager", "model__activation_checkpoint": "full",
        }),
    ],
)  # fmt: skip
def test_what_is_applied_from_outside_changes_nothing(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, variant: str, stage: int, changes: dict[str, Any]
) -> None:
    """Loads counted twice because backward runs the router again, a balance loss lost in a graph."""
    whole, reference, sensitivity = one_process.of(variant)
    config = changed(whole, tmp_path / "run", parallel__zero_stage=stage, train__micro_batch_size=2, **changes)
    assert_same_model(run_on(ranks, 2, config, timeout=240), reference, sensitivity)


@pytest.mark.thorough
def test_a_run_goes_on_with_its_biases_on_another_layout(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path
) -> None:
    """Balancing biases that start again at zero, or that one rank alone has, after a restart."""
    whole, _, _ = one_process.of("sigmoid")
    short = {"train__micro_batch_size": 1, "train__steps": 3, "checkpoint__at_end": True}
    config = changed(whole, tmp_path / "run", parallel__zero_stage=3, **short)
    config.schedule.name = "constant"
    run_on(ranks, 2, config)
    again = run_on(ranks, 4, changed(config, tmp_path / "run", parallel__zero_stage=1, train__steps=STEPS))
    straight = changed(config, tmp_path / "straight", train__steps=STEPS, checkpoint__at_end=False)
    assert_same_metrics(again, run_on(ranks, 1, straight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__ep": 2}, "parallel.ep=2 does not divide model.moe.num_experts=5, .*; use parallel.ep=1$"),
        (
            {"parallel__ep": 2, "model__moe": MoEConfig()},
            "parallel.ep=2 .* model.moe.num_experts=0 .*; use parallel.ep=1$",
        ),
        (
            {"parallel__ep": 2, "parallel__ep_buffer": 0.0, "train__compile": True},
            "parallel.ep_buffer=0 with parallel.ep=2 .* one graph without it; use ",
        ),
        (
            {"parallel__ep": 2, "parallel__ep_buffer": 0.5},
            "parallel.ep_buffer=0.5 is neither 0 .*; use ",
        ),
        ({"parallel__ep_buffer": 1.5}, "parallel.ep_buffer=1.5 is room .* parallel.ep, which is 1; use "),
        ({"parallel__tp": 2}, "parallel.tp=2 does not divide model.moe.intermediate_size=11, .*; use parallel.tp=1$"),
    ],
)
def test_experts_that_cannot_be_shared_equally_are_refused(
    corpus: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A traceback from a rank that got fewer features or experts than the others."""
    config = tiny_config(tmp_path, corpus, **(VARIANTS["capacity"] | changes))
    with pytest.raises(ConfigError) as error:
        finalize(config, world_size=2)
    assert any(re.search(message, line) for line in str(error.value).splitlines())


def test_the_variants_drop_choices_and_move_biases(one_process: _OneProcess) -> None:
    """Negative control: a capacity that is never reached, and a bias that never moves, prove nothing."""
    for variant in ("capacity", "switch", "gshard"):
        assert all(0.01 < line["moe_drop_rate"] < 0.9 for line in one_process.of(variant)[1].metrics)
    _, reference, _ = one_process.of("mixtral")
    assert all(line["moe_drop_rate"] == 0 for line in reference.metrics)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__routing": RoutingConfig(aux_weight=0.0201, z_weight=0.01, capacity_factor=0.8)},
        {"model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.0101, capacity_factor=0.8)},
        {"model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.01, capacity_factor=0.9)},
    ],
)
def test_the_comparison_notices_a_small_change(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Negative control: an auxiliary loss scaled by 1.005, or another capacity, must not pass for the same."""
    whole, reference, _ = one_process.of("capacity")
    outcome = run_on(ranks, 2, changed(whole, tmp_path / "run", train__micro_batch_size=1, **changes))
    with pytest.raises(AssertionError):
        assert_same_losses(outcome, reference)


def run_with_loss_of_the_micro_batch(config: TrainConfig) -> Outcome | None:
    """A balance loss from the load of the whole micro-batch, as a rank-local definition has it."""
    plain = router.balance_loss

    def over_micro_batch(p: torch.Tensor, counts: torch.Tensor, top_k: int, seq_len: int) -> torch.Tensor:
        return plain(p, counts.mean(0, keepdim=True).expand_as(counts), top_k, seq_len)

    router.balance_loss = over_micro_batch
    try:
        return run_here(config)
    finally:
        router.balance_loss = plain


def test_a_balance_loss_per_micro_batch_would_be_seen(
    ranks: RankPool, one_process: _OneProcess, tmp_path: Path
) -> None:
    """Negative control: the definition of most other implementations, which depends on the layout."""
    whole, reference, _ = one_process.of("mixtral")
    config = changed(whole, tmp_path / "run", train__micro_batch_size=2)
    outcome = ranks.run(2, run_with_loss_of_the_micro_batch, config)[0]
    assert outcome is not None
    with pytest.raises(AssertionError):
        assert_same_losses(outcome, reference)
