"""train.cuda_graphs on CUDA: the bits of eager passes, on one GPU and beside collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from tests.gpu.test_trainer_cuda import _Outcomes
from tests.parity.harness import text_corpus, tiny_config
from trainer.config import TrainConfig

pytestmark = pytest.mark.gpu

ALWAYS: dict[str, Any] = {
    "train__device": "cuda",
    "train__deterministic": True,
    "train__steps": 8,
    "train__eval_interval": 3,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 1,
    "precision__compute": "bf16",
    "model__hidden_size": 64,
    "model__num_heads": 4,
    "model__num_kv_heads": 2,
    "model__intermediate_size": 128,
}
CASES: dict[str, dict[str, Any]] = {
    "eager": {},
    "fp32": {"precision__compute": "fp32"},
    "compiled": {"train__compile": True},
    "documents": {"data__mask_documents": True, "train__compile": True},
    "uneven": {"train__micro_batch_size": 3, "model__dropout": 0.1},
    "recomputed": {"model__activation_checkpoint": "full", "train__compile": True},
    "selective": {"model__activation_checkpoint": "selective"},
    "fp8": {"precision__compute": "fp8", "precision__fp8_recipe": "tensorwise_delayed", "train__compile": True},
    "fp16": {"precision__compute": "fp16"},
}
SEVERAL = {f"zero{stage}": {"parallel__zero_stage": stage, "train__compile": True} for stage in (0, 1)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("graphed"))


def _outcomes(num_gpus: int, corpus: DataConfig, cases: dict[str, dict[str, Any]], folder: Path) -> _Outcomes:
    configs: dict[str, TrainConfig] = {
        f"{name}-{way}": tiny_config(
            folder / f"{name}-{way}", corpus, **(ALWAYS | changes | {"train__cuda_graphs": way == "graphs"})
        )
        for name, changes in cases.items()
        for way in ("launches", "graphs")
    }
    return _Outcomes(num_gpus, configs, folder / "outcomes")


@pytest.fixture(scope="module")
def one_gpu(corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _Outcomes:
    return _outcomes(1, corpus, CASES, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_gpus(corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> _Outcomes:
    return _outcomes(2, corpus, SEVERAL, tmp_path_factory.mktemp("two"))


def _assert_same_bits(outcomes: _Outcomes, name: str) -> None:
    launches, graphs = outcomes[f"{name}-launches"], outcomes[f"{name}-graphs"]
    assert graphs.losses == launches.losses
    assert graphs.grad_norms == launches.grad_norms
    assert [n for n, weight in launches.weights.items() if not torch.equal(weight, graphs.weights[n])] == []


@pytest.mark.parametrize("name", CASES)
def test_a_graph_computes_what_its_launches_would(one_gpu: _Outcomes, name: str) -> None:
    """Memory of the graph that somebody else has; a number that was captured as a constant."""
    _assert_same_bits(one_gpu, name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", SEVERAL)
def test_nor_do_collectives_around_it_change_a_bit(two_gpus: _Outcomes, name: str) -> None:
    """Weights that a graph reads before they have come, or gradients that are sent before it has them."""
    _assert_same_bits(two_gpus, name)
