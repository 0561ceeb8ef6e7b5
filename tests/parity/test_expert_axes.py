"""Mixtures of experts over ep, tp, cp and pp, alone and together, against one process, through the real trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from models.mtp_config import MTPConfig
from tests.parity.harness import (
    Outcome,
    References,
    assert_same_model,
    changed,
    gradient_deviation,
    loss_deviation,
    run_on,
    text_corpus,
    weight_deviation,
)
from tests.parity.on_expert_ranks import run_broken
from tests.pool import RankError, RankPool
from trainer.config import TrainConfig
from trainer.convert import export_checkpoint

STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model__family": "mixtral",
        "model__intermediate_size": 12,
        "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=12),
        "model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.01),
        "data__mask_documents": True,
    },
    "capacity": {
        "model__moe": MoEConfig(num_experts=8, top_k=2, intermediate_size=12, first_dense=1, normalize=False),
        "model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.01, capacity_factor=0.8),
        "model__dropout": 0.1,
    },
    "switch": {
        "model__moe": MoEConfig(num_experts=4, top_k=1, intermediate_size=12, router="switch", normalize=False),
        "model__routing": RoutingConfig(aux_weight=0.02, capacity_factor=1.0),
        "model__tie_embeddings": True,
    },
    "gshard": {
        "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=12, router="gshard"),
        "model__routing": RoutingConfig(aux_weight=0.02, capacity_factor=1.2),
        "optim__name": "muon",
    },
    "sigmoid": {
        "model__moe": MoEConfig(
            num_experts=8, top_k=3, intermediate_size=8, num_shared=2, router="sigmoid", scaling=1.7, num_groups=4,
            top_groups=2,
        ),
        "model__routing": RoutingConfig(aux_weight=0.001, bias_update_rate=0.01),
        "model__mlp_bias": True,
        "train__eval_interval": 2,
        "train__eval_batches": 1,
        "train__sample_tokens": 2,
    },
    "deepseek_v2": {  # latent attention, with queries that have no latent
        "model__family": "deepseek_v2",
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=None, nope_dim=5, rope_dim=6, value_dim=7),
        "model__moe": MoEConfig(
            num_experts=8, top_k=3, intermediate_size=8, num_shared=2, first_dense=1, normalize=False, scaling=1.7,
            num_groups=4, top_groups=2,
        ),
        "model__routing": RoutingConfig(aux_weight=0.02),
        "data__mask_documents": True,
    },
    "deepseek_v3": {  # and multi-token prediction; four layers, for pipelines with two stages on each rank
        "model__family": "deepseek_v3",
        "model__num_layers": 4,
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        "model__mtp": MTPConfig(depth=1),
        "model__moe": MoEConfig(
            num_experts=8, top_k=3, intermediate_size=8, num_shared=1, first_dense=1, router="sigmoid", scaling=1.7,
            num_groups=4, top_groups=2,
        ),
        "model__routing": RoutingConfig(aux_weight=0.001, bias_update_rate=0.01),
        "optim__name": "muon",
    },
    "few": {  # fewer experts than ranks
        "model__moe": MoEConfig(num_experts=2, top_k=1, intermediate_size=16, normalize=False),
        "model__routing": RoutingConfig(aux_weight=0.02),
    },
}  # fmt: skip

COMPILED: dict[str, Any] = {"train__compile": True, "train__compile_backend": "aot_eager"}

# (variant, ranks, ZeRO stage, other changes of `parallel`, changes outside of it)
LAYOUTS: list[tuple[str, int, int, dict[str, Any], dict[str, Any]]] = [
    # pipelines
    ("mixtral", 4, 2, {"pp": 2, "pp_schedule": "zero_bubble"}, {}),
    # tensor parallelism
    ("sigmoid", 4, 3, {"tp": 2, "sequence_parallel": True}, {}),
    ("few", 4, 1, {"tp": 2}, {}),
    # context parallelism
    ("capacity", 2, 0, {"cp": 2}, {}),
    ("gshard", 4, 1, {"cp": 2, "cp_method": "ulysses"}, {}),
    ("deepseek_v3", 4, 0, {"cp": 4, "cp_ulysses": 2}, {}),
    # expert parallelism
    ("gshard", 4, 1, {"ep": 2}, {}),
    ("capacity", 4, 2, {"ep": 2}, {"model__activation_checkpoint": "selective"}),
    ("switch", 4, 1, {"ep": 4}, {}),
    ("sigmoid", 4, 3, {"ep": 2, "dp_replicate": 2, "ep_buffer": 2.0}, {}),
    ("mixtral", 4, 3, {"ep": 4, "ep_buffer": 3.5}, COMPILED | {"model__activation_checkpoint": "selective"}),
    ("deepseek_v3", 4, 2, {"ep": 4, "ep_buffer": 4.0}, {}),
    ("few", 8, 2, {"ep": 2}, {}),
    ("few", 8, 3, {"ep": 2, "cpu_offload": True}, {}),
    # several
    ("switch", 8, 3, {"ep": 2, "tp": 2, "sequence_parallel": True}, {}),
    ("switch", 8, 1, {"ep": 4, "cp": 2, "pp": 2}, {}),
    ("gshard", 8, 3, {"ep": 2, "pp": 2, "tp": 2, "sequence_parallel": True}, {}),
    ("sigmoid", 4, 2, {"ep": 4, "cp": 2}, {}),
    ("sigmoid", 8, 3, {"ep": 2, "pp": 2, "tp": 2, "pp_schedule": "zero_bubble", "sequence_parallel": True}, {}),
    ("deepseek_v2", 4, 3, {"ep": 4, "cp": 2, "cp_method": "allgather"}, {}),
    ("deepseek_v2", 4, 1, {"ep": 2, "tp": 2, "sequence_parallel": True}, {}),
    ("deepseek_v2", 8, 2, {"ep": 2, "pp": 2, "tp": 2, "pp_schedule": "zero_bubble"}, {}),
    ("deepseek_v3", 4, 2, {"ep": 2, "tp": 2, "sequence_parallel": True}, {}),
    ("deepseek_v3", 4, 3, {"ep": 4, "cp": 2}, {}),
    ("deepseek_v3", 4, 1, {"ep": 2, "cp": 2, "cp_method": "ulysses"}, {}),
    ("deepseek_v3", 4, 2, {"ep": 2, "pp": 2, "pp_schedule": "zbv"}, {}),
    ("deepseek_v3", 8, 3, {"ep": 2, "pp": 2, "tp": 2, "pp_schedule": "dualpipev", "sequence_parallel": True}, {}),
    ("deepseek_v3", 8, 1, {"ep": 4, "cp": 2, "pp": 2, "pp_schedule": "interleaved_1f1b"}, {}),
    ("deepseek_v3", 8, 1, {"ep": 2, "cp": 2, "tp": 2, "pp": 2}, {}),
    ("capacity", 8, 3, {"ep": 2, "cp": 2, "tp": 2, "pp": 2}, {}),
    ("capacity", 8, 2, {"ep": 4, "cp": 2, "tp": 2, "cp_method": "ulysses", "ep_buffer": 4.0}, {}),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("expert-axes"))


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> References:
    base: dict[str, Any] = {
        "train__steps": STEPS,
        "train__micro_batch_size": 2,
        "model__hidden_size": 32,
        "model__num_heads": 8,
        "model__num_kv_heads": 4,
        "model__intermediate_size": 48,
        "schedule__name": "constant",  # does not depend on the number of steps
        "schedule__warmup_steps": 1,
    }
    variants = {name: base | changes for name, changes in VARIANTS.items()}
    folder = tmp_path_factory.mktemp("one-process")
    return References(ranks, corpus, folder, variants, splits=(1,), feature_parts=(2, 4))


def layout(config: TrainConfig, run_dir: Path, **parallel: Any) -> TrainConfig:
    """The same run with one sequence per micro-batch on another layout."""
    changes = {f"parallel__{name}": value for name, value in parallel.items()}
    return changed(config, run_dir, train__micro_batch_size=1, **changes)


def assert_same(outcome: Outcome, reference: Outcome, steps: int = STEPS) -> None:
    """Losses, first gradients, gradient norms, and every metric of routers and validation."""
    assert len(outcome.losses) == len(reference.losses) == steps
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert outcome.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    for ours, theirs in zip(outcome.metrics, reference.metrics, strict=True):
        names = {name for name in theirs if name.startswith(("moe_", "validation_"))}
        assert len(names) > 6
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize(("variant", "world_size", "zero_stage", "parallel", "changes"), LAYOUTS)
def test_experts_are_the_same_on_every_axis(
    ranks: RankPool,
    one_process: References,
    tmp_path: Path,
    variant: str,
    world_size: int,
    zero_stage: int,
    parallel: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    """A load or a queue of part of a sequence, a gradient of experts or routers summed too often or too seldom."""
    reference = one_process.of(variant)
    config = reference.config
    run = layout(config, tmp_path / "run", zero_stage=zero_stage, **parallel)
    outcome = run_on(ranks, world_size, changed(run, tmp_path / "run", **changes))
    assert_same(outcome, reference.outcome)
    # On one processor the capacity model over ep, cp and tp went 2.3 times as far as the orders that were tried.
    assert_same_model(outcome, reference, weights=3.0)


@pytest.mark.some(5, unless_thorough=True)
@pytest.mark.parametrize(
    ("fault", "variant", "parallel"),
    [
        ("experts_summed_over_ep", "mixtral", {"ep": 2}),
        ("rows_as_they_arrived", "mixtral", {"ep": 2}),
        ("row_of_a_buffer_overwritten", "mixtral", {"ep": 2, "ep_buffer": 2.0}),
        ("buffer_of_the_neighbour", "mixtral", {"ep": 2, "ep_buffer": 2.0}),
        ("router_gradient_of_one_tp_rank", "mixtral", {"tp": 2}),
        ("auxiliary_loss_on_every_tp_rank", "mixtral", {"tp": 2}),
        ("load_of_one_cp_rank", "mixtral", {"cp": 2}),
        ("queue_of_one_cp_rank", "switch", {"cp": 2}),
        ("no_auxiliary_loss_in_stages", "mixtral", {"pp": 2}),
    ],
)
def test_the_comparison_notices_each_axis_fault(
    ranks: RankPool, one_process: References, tmp_path: Path, fault: str, variant: str, parallel: dict[str, Any]
) -> None:
    """Negative control: what each axis adds, left out or done twice, must not pass for the same."""
    config, reference, _ = one_process.of(variant)
    outcome = ranks.run(2, run_broken, layout(config, tmp_path / "run", **parallel), fault)[0]
    assert outcome is not None
    with pytest.raises(AssertionError):
        assert_same(outcome, reference)


@pytest.mark.thorough
def test_a_checkpoint_moves_between_expert_layouts(ranks: RankPool, one_process: References, tmp_path: Path) -> None:
    """Experts, their moments or biases of routers that land on the wrong rank, or in the wrong rows."""
    config, _, _ = one_process.of("sigmoid")
    config = changed(config, tmp_path / "straight", train__steps=4)
    straight = run_on(ranks, 1, config)
    path = tmp_path / "run"
    moves: list[tuple[int, int, dict[str, Any]]] = [
        (1, 4, {"ep": 2, "tp": 2, "zero_stage": 1}),
        (2, 8, {"ep": 4, "cp": 2, "tp": 2, "zero_stage": 3}),
        (3, 4, {"ep": 2, "pp": 2, "zero_stage": 0}),
        (4, 2, {"zero_stage": 2}),
    ]
    for steps, world_size, parallel in moves:
        run = layout(changed(config, path, train__steps=steps, checkpoint__at_end=True), path, **parallel)
        outcome = run_on(ranks, world_size, run)
    assert loss_deviation(outcome, straight) <= 1e-6
    for ours, theirs in zip(outcome.metrics, straight.metrics, strict=True):
        names = [name for name in theirs if name.startswith("moe_")]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)


@pytest.mark.thorough
def test_hugging_face_weights_go_to_spread_experts_and_back(
    ranks: RankPool, one_process: References, tmp_path: Path
) -> None:
    """An expert's tensor written to, or read from, the wrong place of the stack."""
    config, reference, _ = one_process.of("mixtral")
    spread = {"ep": 2, "tp": 2, "zero_stage": 1}
    run = layout(config, tmp_path / "run", **spread)
    run.checkpoint.at_end = True
    outcome = run_on(ranks, 4, run)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    again = changed(config, tmp_path / "again", model__family="hf", model__path=str(tmp_path / "hf"), train__steps=1)
    alone = run_on(ranks, 1, again)
    assert_same(run_on(ranks, 4, layout(again, tmp_path / "there", **spread)), alone, steps=1)
    assert weight_deviation(outcome, reference) < 1e-3  # so what was exported is what was trained
    assert alone.losses[0] < reference.losses[0]


def test_choices_without_room_stop_the_run_before_an_update(
    ranks: RankPool, one_process: References, tmp_path: Path
) -> None:
    """A choice that is dropped because a buffer was full, and a model that is trained without it."""
    config, reference, _ = one_process.of("mixtral")
    run = layout(config, tmp_path / "run", ep=4, ep_buffer=1.0)
    message = r"TrainingDiverged: step 1: \d+ choices .* parallel.ep_buffer=1.0.*4 is always"
    with pytest.raises(RankError, match=message):
        run_on(ranks, 4, run)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["skipped_steps"] == 1
    assert line["moe_left_over"] > 0
    assert line["grad_norm"] != pytest.approx(reference.grad_norms[0], rel=1e-5)


def test_run_json_says_how_experts_are_spread(ranks: RankPool, one_process: References, tmp_path: Path) -> None:
    """A run whose record does not tell its layout."""
    config, _, _ = one_process.of("mixtral")
    run_on(ranks, 2, layout(changed(config, tmp_path / "run", train__steps=1), tmp_path / "run", ep=2))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 2}
    assert info["kernels"]["experts"] == "split, all_to_all(2) of rows"
    run_on(ranks, 2, layout(changed(config, tmp_path / "again", train__steps=1), tmp_path / "again", ep=2, ep_buffer=2))
    info = json.loads((tmp_path / "again" / "run.json").read_text())
    assert info["kernels"]["experts"] == "split, all_to_all(2) of buffers (2 shares)"
