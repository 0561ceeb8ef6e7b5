"""recipe.rl.overlap on CUDA: a stream of its own beside the update's, with the bits of a run that has one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inference.config import EngineConfig
from tests.gpu.test_trainer_cuda import _Outcomes
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import rolling
from tests.trainer.rl.test_grpo import without_times
from trainer.config import TrainConfig

pytestmark = pytest.mark.gpu

ALWAYS: dict[str, Any] = {
    "train__device": "cuda",
    "train__deterministic": True,
    "train__steps": 8,
    "precision__compute": "bf16",
    "schedule__name": "constant",
    "optim__lr": 3e-3,
    "rl__rollout_lag": 1,
    "rl__max_tokens": 24,
    # Head sizes and rows that kernels like.
    "model__hidden_size": 64,
    "model__num_heads": 4,
    "model__num_kv_heads": 2,
    "model__intermediate_size": 128,
}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"train__eval_interval": 3, "train__eval_batches": 1},
    "fp32": {"precision__compute": "fp32"},
    "minibatches": {"rl__minibatches": 2, "rl__epochs": 2, "train__steps": 12},
    "invariant": {"train__batch_invariant": True},
    "graphs": {"rl__engine": EngineConfig(cuda_graphs=True)},
    "ppo": {"parallel__zero_stage": 1},
}
SEVERAL = {f"zero{stage}": {"parallel__zero_stage": stage, "checkpoint__interval": 3} for stage in (0, 1, 2)}


def _config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return (proximal if name == "ppo" else rolling)(folder, **ALWAYS | changes)


def _outcomes(num_gpus: int, cases: dict[str, dict[str, Any]], folder: Path) -> _Outcomes:
    configs = {
        f"{name}-{way}": _config(folder / f"{name}-{way}", name, **changes, rl__overlap=way == "beside")
        for name, changes in cases.items()
        for way in ("ahead", "beside")
    }
    return _Outcomes(num_gpus, configs, folder / "outcomes")


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> _Outcomes:
    return _outcomes(1, CASES, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> _Outcomes:
    return _outcomes(2, SEVERAL, tmp_path_factory.mktemp("two"))


def _assert_same_bits(outcomes: _Outcomes, name: str) -> None:
    ahead, beside = outcomes[f"{name}-ahead"], outcomes[f"{name}-beside"]
    assert without_times(beside) == without_times(ahead)
    assert all(torch.equal(weight, beside.weights[n]) for n, weight in ahead.weights.items())
    sampled = [line for line in beside.metrics if "reward" in line]
    # From the third batch on a thread makes them.
    assert all(line["rollout_wait_seconds"] < line["rollout_seconds"] for line in sampled[2:])


@pytest.mark.parametrize("name", CASES)
def test_a_stream_beside_the_update_changes_no_bit(one_gpu: _Outcomes, name: str) -> None:
    """A copy that is read before it is written, or written while it is read; memory of one stream in use on the other;
    a graph that is captured while another thread works."""
    _assert_same_bits(one_gpu, name)


def test_trainer_and_sampler_still_agree_to_the_bit(one_gpu: _Outcomes) -> None:
    for line in one_gpu["invariant-beside"].metrics:
        assert line["sampler_max_delta"] == line["sampler_kl"] == 0.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", SEVERAL)
def test_nor_does_one_beside_collectives(two_gpus: _Outcomes, name: str) -> None:
    """Weights that are copied before they have been gathered."""
    _assert_same_bits(two_gpus, name)
