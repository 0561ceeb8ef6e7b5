"""Tensor parallelism in the rest of a run: checkpoints, Hugging Face folders, validation, sampling, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from data.config import DataConfig
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.mtp_config import MTPConfig
from models.registry import build_model
from parallel.groups import ModelParallel
from tests.parity.harness import Outcome, changed, run_on, text_corpus, tiny_config
from tests.pool import RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.convert import export_checkpoint
from trainer.trainer import Trainer
from trainer.validate import finalize
from trainer.validate_tensor import parameter_shapes, tp_dim

# Biases, an uneven vocabulary, a key head for two ranks: every way in which a parameter is cut.
MODEL: dict[str, Any] = {
    "model__family": "qwen2",
    "model__num_heads": 4,
    "model__num_kv_heads": 2,
    "model__head_dim": 10,
    "model__hidden_size": 40,
    "model__intermediate_size": 52,
    "model__vocab_size": 301,
    "model__qkv_bias": True,
    "model__tie_embeddings": True,
    "train__steps": 4,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero3": (2, {"parallel__zero_stage": 3}),
    "tp2": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "tp4": (4, {"parallel__tp": 4}),
    "tp2-zero1": (4, {"parallel__tp": 2, "parallel__zero_stage": 1, "parallel__sequence_parallel": True}),
    "tp2-zero3": (4, {"parallel__tp": 2, "parallel__zero_stage": 3}),
}


@pytest.fixture(scope="module")
def config(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    data: DataConfig = text_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_config(tmp_path_factory.mktemp("unused"), data, train__micro_batch_size=1, **MODEL)


@pytest.fixture(scope="module")
def reference(ranks: RankPool, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Four steps of one process with a validation at the end and a checkpoint after two; its folder and outcome."""
    folder = tmp_path_factory.mktemp("reference")
    whole = changed(
        config, folder, checkpoint__interval=2, train__eval_interval=4, train__eval_batches=2, train__sample_tokens=8
    )
    return folder, run_on(ranks, 1, whole)


def _close(outcome: Outcome, reference: Outcome, *, steps: slice) -> None:
    assert outcome.losses == pytest.approx(reference.losses[steps], rel=1e-6)
    assert outcome.grad_norms == pytest.approx(reference.grad_norms[steps], rel=1e-5)
    for name, weight in reference.weights.items():
        assert (outcome.weights[name] - weight).abs().max() <= 2e-4 * weight.abs().max(), name


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["tp4", "tp2-zero1", "tp2-zero3"])
def test_a_run_moves_from_one_process_to_tensor_parallelism_and_back(
    ranks: RankPool, config: TrainConfig, reference: tuple[Path, Outcome], tmp_path: Path, layout: str
) -> None:
    """A shard read from or written to the wrong rows, moments left behind, a cursor that counts tp ranks."""
    folder, whole = reference
    world_size, settings = LAYOUTS[layout]
    there = changed(config, tmp_path / "there", checkpoint__resume=str(folder / "checkpoints/step_2"), **settings)
    there.checkpoint.interval = 3
    _close(run_on(ranks, world_size, there), whole, steps=slice(2, 4))
    world_size, settings = LAYOUTS["zero3"]
    back = changed(config, tmp_path / "back", checkpoint__resume=str(tmp_path / "there/checkpoints/step_3"), **settings)
    _close(run_on(ranks, world_size, back), whole, steps=slice(3, 4))


@pytest.mark.some(1)
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_of_shards_that_nothing_divides_train_the_same_model(
    ranks: RankPool, config: TrainConfig, tmp_path: Path, stage: int
) -> None:
    """Three ranks divide neither 40 features nor 151 words, so both axes cut dim 0: rows a few places off."""
    six = changed(config, tmp_path / "one", train__global_batch_size=6)
    settings = {"parallel__tp": 2, "parallel__zero_stage": stage}
    outcome = run_on(ranks, 6, changed(six, tmp_path / "run", **settings))
    _close(outcome, run_on(ranks, 1, six), steps=slice(None))


def _validation_and_sample(config: TrainConfig) -> tuple[float, str]:
    trainer = Trainer(finalize(config, world_size=torch.distributed.get_world_size()))
    try:
        result = trainer.run()
    finally:
        trainer.close()
    return result["validation_loss"], result["sample"]


@pytest.mark.some(1)
@pytest.mark.parametrize(("layout", "compiled"), [("tp2", False), ("tp2-zero3", False), ("tp4", False), ("tp2", True)])
def test_validation_and_sampling_are_those_of_one_process(
    ranks: RankPool, config: TrainConfig, reference: tuple[Path, Outcome], tmp_path: Path, layout: str, compiled: bool
) -> None:
    """Logits of some words only, or in the wrong order; a validation that sums over tp ranks; graphs that are right
    only where gradients are wanted."""
    changes: dict[str, Any] = {"train__eval_interval": 4, "train__eval_batches": 2, "train__sample_tokens": 8}
    expected = ranks.run(1, _validation_and_sample, changed(config, tmp_path / "one", **changes))[0]
    world_size, settings = LAYOUTS[layout]
    if compiled:
        changes |= {"train__compile": True, "train__compile_backend": "aot_eager"}
    for loss, sample in ranks.run(
        world_size, _validation_and_sample, changed(config, tmp_path / "run", **changes, **settings)
    ):
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert sample == expected[1]


def test_a_hugging_face_folder_goes_in_and_out(
    ranks: RankPool, config: TrainConfig, reference: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """A fused or transposed matrix whose region is not that of the shard."""
    folder, whole = reference
    ranks.run(1, export_checkpoint, folder / "checkpoints/step_4", tmp_path / "hf")
    for layout in ("tp4", "tp2-zero1", "tp2-zero3"):
        world_size, settings = LAYOUTS[layout]
        loaded = changed(
            config, tmp_path / layout, model__path=str(tmp_path / "hf"), model__family="hf", train__steps=1, **settings
        )
        loaded.optim.lr = 0.0
        loaded.schedule.warmup_steps = 0
        loaded.checkpoint.at_end = True
        outcome = run_on(ranks, world_size, loaded)
        assert all(torch.equal(outcome.weights[name], weight) for name, weight in whole.weights.items())
        ranks.run(2, export_checkpoint, tmp_path / layout / "checkpoints/step_1", tmp_path / f"{layout}-hf")
        name = "model.safetensors"
        assert (tmp_path / f"{layout}-hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.thorough
def test_bf16_trains_close_to_one_process(ranks: RankPool, config: TrainConfig, tmp_path: Path) -> None:
    """A product of two dtypes, a gradient summed in the wrong one."""
    bf16 = changed(config, tmp_path / "one", precision__compute="bf16")
    expected = run_on(ranks, 1, bf16)
    for layout in ("tp2", "tp2-zero1", "tp2-zero3"):
        world_size, settings = LAYOUTS[layout]
        outcome = run_on(ranks, world_size, changed(bf16, tmp_path / layout, **settings))
        assert outcome.losses == pytest.approx(expected.losses, rel=3e-3)


# ---- refusals


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (3, {"parallel__tp": 3}, "parallel.tp=3 does not divide model.num_heads=4"),
        (8, {"parallel__tp": 8}, "use parallel.tp=1, 2 or 4"),
        (4, {"parallel__tp": 4, "model__intermediate_size": 50}, "model.intermediate_size=50"),
        (
            4,
            {"parallel__tp": 4, "model__num_heads": 12, "model__num_kv_heads": 6},
            "parallel.tp=4 and model.num_kv_heads=6 do not divide one another",
        ),
        (4, {"parallel__tp": 4, "model__vocab_size": 5}, "model.vocab_size=5"),
        (
            2,
            {"parallel__tp": 2, "parallel__sequence_parallel": True, "train__seq_len": 25},
            "train.seq_len=25 does not divide by parallel.tp=2",
        ),
        (2, {"parallel__sequence_parallel": True}, "parallel.sequence_parallel=true"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    config: TrainConfig, tmp_path: Path, world_size: int, changes: dict[str, Any], expected: str
) -> None:
    """A layout that would fail, or train something else, after all ranks have started."""
    with pytest.raises(ConfigError) as caught:
        finalize(changed(config, tmp_path, **changes), world_size=world_size)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def _cut_dims(config: ModelConfig) -> dict[str, int | None]:
    """The dim of every matrix that a model on these ranks is built with cut over tp."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = build_model(replace(config, fused_projections=False), groups=ModelParallel(tp=mesh))
    found: dict[str, int | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert isinstance(parameter, DTensor)
            (place,) = parameter.placements
            found[name] = place.dim if isinstance(place, Shard) else None
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_validation_knows_what_tensor_parallelism_cuts(ranks: RankPool, tp: int) -> None:
    """Rows of 8-bit moments that are cut inside a block, and are refused only when the model is on the ranks."""
    moe = MoEConfig(num_experts=4, intermediate_size=8, num_shared=1, first_dense=1)
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 16}
    latent = MLAConfig(kv_rank=10, q_rank=9, nope_dim=4, rope_dim=4, value_dim=8)
    for config in (
        ModelConfig(**shape, num_kv_heads=2, moe=moe, positions="learned").resolve(),
        ModelConfig(**shape, mla=latent, mtp=MTPConfig(depth=1)).resolve(),
    ):
        shapes = parameter_shapes(config)
        expected = {name: tp_dim(name, size, config, tp) for name, size in shapes.items() if len(size) > 1}
        assert ranks.run(tp, _cut_dims, config) == [expected] * tp
