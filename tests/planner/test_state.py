"""Bytes of state against those that the real trainer holds, on gloo ranks, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.config import DataConfig
from kernels.fp8 import ScalingRecipe
from launch.compose import compose_one
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.fp8 import Fp8Linears, linears_in_fp8
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.registry import build_model
from parallel.data import state_bytes
from parallel.dims import ParallelConfig
from parallel.precision import PrecisionConfig
from parallel.regions import local_tensor
from planner.buffers import buffer_bytes
from planner.job import Job
from planner.shapes import parameters_of
from planner.state import STEP_BYTES, Coordinates, rank_states, state_of_rank
from tests.parity.adapting import adapter_config, token_data
from tests.parity.harness import tiny_config
from tests.parity.test_preferences import rewarding, tiny_llama
from tests.pool import RankPool
from trainer.config import OptimConfig, TrainConfig
from trainer.frozen import FrozenModel
from trainer.predicted import job_of
from trainer.recipes.distill import Distillation
from trainer.trainer import Trainer
from trainer.validate import finalize

ODD = ModelConfig(
    vocab_size=301,
    hidden_size=36,
    head_dim=10,
    intermediate_size=52,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)
BLOCKS = replace(
    ODD, hidden_size=256, head_dim=None, intermediate_size=512, num_layers=2
)  # whole blocks of 8-bit moments
TIED = replace(ODD, tie_embeddings=True)
GPT2 = replace(
    ODD, family="gpt2", norm="layernorm", activation="gelu_tanh", gated_mlp=False, positions="learned", qkv_bias=True,
    attention_bias=True, mlp_bias=True, tie_embeddings=True, num_kv_heads=4,
)  # fmt: skip
MOE = replace(ODD, family="qwen3_moe", qk_norm=True, moe=MoEConfig(num_experts=6, top_k=2, intermediate_size=20))
LATENT = replace(
    ODD, family="deepseek_v2", num_kv_heads=None, head_dim=None,
    mla=MLAConfig(kv_rank=12, q_rank=20, nope_dim=8, rope_dim=4, value_dim=6),
)  # fmt: skip
BF16 = PrecisionConfig(compute="bf16", master="fp32", reduce="fp32")
NARROW = PrecisionConfig(compute="bf16", master="fp32", reduce="bf16")
ONLY_BF16 = PrecisionConfig(compute="bf16", master="bf16", reduce="bf16")
MIXED = PrecisionConfig(compute="bf16", master="bf16", reduce="fp32")
SP = {"tp": 2, "sequence_parallel": True}

CASES: dict[str, tuple[int, ModelConfig, dict[str, Any], PrecisionConfig, dict[str, Any]]] = {
    "plain": (1, ODD, {"zero_stage": 0}, PrecisionConfig(), {}),
    "ddp": (2, ODD, {"zero_stage": 0}, BF16, {}),
    "zero1": (4, ODD, {"zero_stage": 1}, BF16, {}),
    "zero2": (4, ODD, {"zero_stage": 2}, BF16, {}),
    "zero3": (4, ODD, {"zero_stage": 3}, BF16, {}),
    "zero1 reduced in bf16": (4, ODD, {"zero_stage": 1}, NARROW, {}),
    "zero2 reduced in bf16": (4, ODD, {"zero_stage": 2}, NARROW, {}),
    "zero3 reduced in bf16": (4, ODD, {"zero_stage": 3}, NARROW, {}),
    "zero2 in bf16 alone": (4, ODD, {"zero_stage": 2}, ONLY_BF16, {}),
    "zero1 in bf16, reduced in fp32": (2, ODD, {"zero_stage": 1}, MIXED, {}),
    "zero3 in bf16 alone": (2, ODD, {"zero_stage": 3}, ONLY_BF16, {}),
    "hsdp": (4, ODD, {"zero_stage": 3, "dp_replicate": 2}, BF16, {}),
    "replicas of zero2": (4, TIED, {"zero_stage": 2, "dp_replicate": 2}, BF16, {}),
    "tp": (2, ODD, {"zero_stage": 1, **SP}, BF16, {}),
    "tp, shared key heads": (4, ODD, {"zero_stage": 1, "tp": 4}, BF16, {}),
    "tp x zero3": (4, ODD, {"zero_stage": 3, **SP}, BF16, {}),
    "tp x zero3, gpt2": (4, GPT2, {"zero_stage": 3, "tp": 2}, BF16, {}),
    "tp x zero2, latent": (4, LATENT, {"zero_stage": 2, "tp": 2}, BF16, {}),
    "cp x zero2": (4, ODD, {"zero_stage": 2, "cp": 2}, BF16, {}),
    "pp x zero1, tied": (4, TIED, {"zero_stage": 1, "pp": 2}, BF16, {}),
    "pp x zero3": (4, ODD, {"zero_stage": 3, "pp": 2}, BF16, {}),
    "interleaved x zero2": (4, ODD, {"zero_stage": 2, "pp": 2, "pp_schedule": "interleaved_1f1b"}, BF16, {}),
    "zbv": (2, TIED, {"zero_stage": 1, "pp": 2, "pp_schedule": "zbv"}, BF16, {}),
    "experts": (4, MOE, {"zero_stage": 1}, BF16, {}),
    "ep x zero1": (4, MOE, {"zero_stage": 1, "ep": 2}, BF16, {}),
    "ep x zero2": (4, MOE, {"zero_stage": 2, "ep": 2}, BF16, {}),
    "ep x zero3": (4, MOE, {"zero_stage": 3, "ep": 2}, BF16, {}),
    "ep x tp": (4, MOE, {"zero_stage": 2, "ep": 2, "tp": 2}, BF16, {}),
    "muon": (2, ODD, {"zero_stage": 1}, BF16, {"name": "muon"}),
    "muon x zero3": (4, MOE, {"zero_stage": 3}, BF16, {"name": "muon"}),
    "bf16 moments": (4, ODD, {"zero_stage": 2}, ONLY_BF16, {"state_dtype": "bf16", "beta2": 0.95}),
    "int8 moments": (2, BLOCKS, {"zero_stage": 1}, BF16, {"state_dtype": "int8"}),
    "int8 moments, bf16 weights, zero3": (4, BLOCKS, {"zero_stage": 3}, ONLY_BF16, {"state_dtype": "int8"}),
}


ALWAYS = ("ddp", "zero1", "zero3 reduced in bf16", "tp, shared key heads", "tp x zero3", "pp x zero1, tied",
          "ep x zero2", "muon x zero3", "int8 moments, bf16 weights, zero3")  # fmt: skip
"""Of these, which run in every suite, the others with --thorough."""
PARAMETERS = [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.thorough]) for n in CASES]


def _config(folder: Path, name: str) -> TrainConfig:
    _, model, parallel, precision, optim = CASES[name]
    data = DataConfig(source="tokens", path=str(folder / "tokens.npy"), shuffle=False, num_workers=0)
    config = tiny_config(folder / name.replace(" ", "_"), data, train__steps=1, schedule__warmup_steps=0)
    config.model, config.precision = replace(model), precision
    config.parallel = ParallelConfig(bucket_mb=0.02, **parallel)
    config.optim = OptimConfig(**optim)
    return config


def _measure(config: TrainConfig) -> tuple[Coordinates, dict[str, int]]:
    """What this rank holds when gradients are complete."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    state, found = trainer.state, {}

    def measure(**kwargs: Any) -> None:
        found.update(state_bytes(state.data_parallel, state.optimizer.state_tensors()))

    state.optimizer.step = measure  # type: ignore[method-assign]
    try:
        trainer.run()
    finally:
        trainer.close()
    at = [trainer.mesh.state[axis].get_local_rank() for axis in ("pp", "shard", "tp")]
    return Coordinates(*at), found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    np.save(folder / "tokens.npy", np.arange(2000, dtype=np.int32) % 300)
    return folder


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_has_the_bytes_that_are_predicted(ranks: RankPool, folder: Path, name: str) -> None:
    """A formula that forgets padding, a widened gradient, a parameter that every rank holds whole."""
    world_size = CASES[name][0]
    config = _config(folder, name)
    job = job_of(finalize(config, world_size=world_size), world_size=world_size)
    predicted = []
    for at, measured in (results := ranks.run(world_size, _measure, config)):
        state = state_of_rank(job, parameters_of(job.model, job.stages_of(at.pp), tp=job.dims.tp), at)
        kinds = {"parameters": state.parameters, "gradients": state.gradients, "master": state.master}
        predicted.append((at, kinds | {"optimizer": state.optimizer}))
        assert torch.tensor(list(measured.values())).sum() > 0
        if job.optimizer == "adamw" and job.state_dtype == "fp32":
            assert state.optimizer == 2 * 4 * state.num_owned + STEP_BYTES
    assert predicted == results


def test_the_page_says_in_how_many_layouts() -> None:
    """A number that was true once."""
    page = " ".join((Path(__file__).resolve().parents[2] / "docs" / "PLANNER.md").read_text().split())
    assert f"to the byte, in {len(CASES)} layouts" in page
    assert f"to the byte as well, in {len(ADAPTERS)} layouts of adapters" in page


def test_buffers_are_those_of_the_model_and_of_delayed_scaling() -> None:
    """Biases of routers that are forgotten, or counted on stages without experts; scales of a stage's layers alone."""
    overrides = ["model=deepseek_v3", "model.num_layers=5", "precision=fp8", "parallel.pp=2", "parallel.zero_stage=1",
                 "precision.fp8_recipe=tensorwise_delayed", "train.global_batch_size=4"]  # fmt: skip
    final = finalize(compose_one([*overrides, "data.validation_fraction=0"]), world_size=2)
    job = job_of(final, world_size=2)
    with torch.device("meta"):
        whole = build_model(job.model)
        names = linears_in_fp8(whole.blocks, skip=final.precision.fp8_skip)
        history = final.precision.fp8_amax_history
        fp8 = Fp8Linears(ScalingRecipe("tensorwise_delayed"), names=names, history_length=history)
        scales = sum(tensor.nbytes for tensor in fp8.state_tensors().values())
        for pp in range(2):
            model = build_model(job.model, stages=job.stages_of(pp))
            assert buffer_bytes(job, pp) == sum(buffer.nbytes for buffer in model.buffers()) + scales
    assert buffer_bytes(job, 1) > buffer_bytes(job, 0) >= scales > 0  # layers without experts come first


def test_distinct_ranks_are_all_ranks(folder: Path) -> None:
    """Ranks that hold less, being last, reported as if they were the others; or replicas forgotten."""
    config = _config(folder, "replicas of zero2")
    config.parallel = replace(config.parallel, pp=2, tp=2)
    config.train.global_batch_size = 8
    job = job_of(finalize(config, world_size=16), world_size=16)
    states = rank_states(job)
    assert sum(state.count for state in states) == 16
    assert len({state.example.pp for state in states}) == 2


def _measure_beside(config: TrainConfig) -> tuple[Coordinates, dict[str, int], int]:
    """`_measure`, and bytes of the model beside the trained one."""
    found = []

    def measured(self: FrozenModel, *args: Any, **options: Any) -> list[torch.Tensor]:
        result = original(self, *args, **options)
        storages = {local_tensor(p).untyped_storage() for p in self.model.parameters()}
        found.append(sum(storage.nbytes() for storage in storages))
        return result

    original = FrozenModel.per_token
    with mock.patch.object(FrozenModel, "per_token", measured):
        at, state = _measure(config)
    return at, state, found[-1] if found else 0


LORA = AdapterConfig(name="lora", rank=3, alpha=6.0)
QLORA = replace(LORA, rank=8, quantize="nf4")
ADAPTERS: dict[str, tuple[int, str, AdapterConfig, dict[str, Any], PrecisionConfig]] = {
    "one rank": (1, "llama", LORA, {"zero_stage": 0}, PrecisionConfig()),
    "zero2": (2, "llama", LORA, {"zero_stage": 2}, BF16),
    "zero3 of some layers": (2, "llama", replace(LORA, targets=["q", "v", "down"]), {"zero_stage": 3}, BF16),
    "tp, dora": (2, "llama", replace(LORA, dora=True), {"zero_stage": 1, **SP}, BF16),
    "tp, shared key heads": (4, "llama", LORA, {"zero_stage": 1, "tp": 4}, BF16),
    "tp x zero3, shared": (4, "llama", replace(LORA, dora=True), {"zero_stage": 3, "tp": 2}, BF16),
    "pp x zero1": (2, "llama", LORA, {"zero_stage": 1, "pp": 2}, BF16),
    "experts": (2, "mixtral", LORA, {"zero_stage": 2}, BF16),
    "ep x tp": (4, "mixtral", LORA, {"zero_stage": 1, "ep": 2, "tp": 2}, BF16),
    "nf4": (1, "llama_of_blocks", QLORA, {"zero_stage": 0}, BF16),
    "nf4 in fp32": (1, "llama_of_blocks", QLORA, {"zero_stage": 0}, PrecisionConfig()),
    "nf4, zero3": (4, "llama_of_blocks", QLORA, {"zero_stage": 3}, BF16),
    "nf4, tp x zero2": (4, "llama_of_blocks", QLORA, {"zero_stage": 2, "tp": 2}, BF16),
    "nf4, tp, shared key heads": (4, "llama_of_blocks", QLORA, {"zero_stage": 1, "tp": 4}, BF16),
    "nf4 experts": (1, "mixtral_of_blocks", QLORA, {"zero_stage": 0}, PrecisionConfig()),
    "nf4 experts, zero3": (2, "mixtral_of_blocks", QLORA, {"zero_stage": 3}, BF16),
    "nf4 experts, ep x tp x zero3": (8, "mixtral_of_blocks", QLORA, {"zero_stage": 3, "ep": 2, "tp": 2}, BF16),
    "nf4, some adapted": (2, "llama_of_blocks", replace(QLORA, targets=["k", "gate"]), {"zero_stage": 3}, BF16),
}
ALWAYS_ADAPTED = ("zero2", "tp, shared key heads", "zero3 of some layers", "ep x tp", "nf4, zero3",
                  "nf4, tp, shared key heads")  # fmt: skip
ADAPTED = [pytest.param(n, marks=[] if n in ALWAYS_ADAPTED else [pytest.mark.thorough]) for n in ADAPTERS]


@pytest.mark.parametrize("name", ADAPTED)
def test_state_of_adapters_has_the_bytes_that_are_predicted(ranks: RankPool, folder: Path, name: str) -> None:
    """Frozen weights with gradients or masters; codes of NF4 that are cut as if they were rows."""
    world_size, family, adapter, parallel, precision = ADAPTERS[name]
    config = adapter_config(folder, token_data(folder), family, train__steps=1)
    config.run.dir = str(folder / f"adapted_{name.replace(' ', '_')}")
    config.adapter, config.precision = adapter, precision
    config.parallel = ParallelConfig(bucket_mb=0.02, **parallel)
    job = job_of(finalize(config, world_size=world_size), world_size=world_size)
    assert predicted_of(job, ranks.run(world_size, _measure, config))
    full = job_of(finalize(replace(config, adapter=AdapterConfig()), world_size=world_size), world_size=world_size)
    assert sum(s.bytes.total * s.count for s in rank_states(job)) < 0.5 * sum(
        s.bytes.total * s.count for s in rank_states(full)
    )  # negative control: what a plan of the whole model's training would say


def predicted_of(job: Job, measured: list[tuple[Coordinates, dict[str, int]]]) -> bool:
    """Whether these are the bytes that are predicted; says where they differ."""
    found = []
    for at, _ in measured:
        state = state_of_rank(job, job.parameters(at.pp), at)
        kinds = {"parameters": state.parameters, "gradients": state.gradients, "master": state.master}
        found.append((at, kinds | {"optimizer": state.optimizer}))
    assert found == measured
    return True


RECIPES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"zero_stage": 1}),
    "tp x zero3": (4, {"zero_stage": 3, "tp": 2}),
    "pp x zero1": (4, {"zero_stage": 1, "pp": 2}),
}


@pytest.mark.parametrize("name", [n if n == "zero1" else pytest.param(n, marks=pytest.mark.thorough) for n in RECIPES])
def test_a_teacher_has_the_bytes_that_are_predicted(ranks: RankPool, folder: Path, name: str) -> None:
    """A teacher that is planned whole on every rank, in the master's dtype, or not at all."""
    world_size, parallel = RECIPES[name]
    config = adapter_config(folder, token_data(folder), train__steps=1)
    config.run.dir = str(folder / f"taught_{name.replace(' ', '_')}")
    config.adapter, config.precision = AdapterConfig(), BF16
    config.parallel = ParallelConfig(bucket_mb=0.02, **parallel)
    adapter_config(folder, token_data(folder), "llama_of_blocks")  # makes the folder
    config.recipe.name, config.recipe.teacher_path = "distill", str(folder / "llama_of_blocks")
    final = finalize(config, world_size=world_size)
    job = job_of(final, world_size=world_size, beside=Distillation().frozen_beside(final))
    results = ranks.run(world_size, _measure_beside, config)
    assert predicted_of(job, [(at, state) for at, state, _ in results])
    assert job.beside is not None
    of_teacher = [state_of_rank(job.beside, job.beside.parameters(at.pp), at).parameters for at, _, _ in results]
    assert of_teacher == [beside for _, _, beside in results]
    assert sorted({s.bytes.beside for s in rank_states(job)}) == sorted(set(of_teacher))
    assert min(of_teacher) > 0


def test_the_head_of_a_reward_model_is_planned_whole_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    """One row, cut over tp as if it were a vocabulary."""
    tiny_llama(tmp_path / "policy", 0)
    config = rewarding(tmp_path, "rewarded", train__steps=1)
    config.precision, config.parallel = BF16, ParallelConfig(bucket_mb=0.02, zero_stage=1, tp=2)
    job = job_of(finalize(config, world_size=2), world_size=2)
    assert predicted_of(job, ranks.run(2, _measure, config))
