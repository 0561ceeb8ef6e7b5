"""The trainer on CUDA: every stage, precision and option on one GPU, and every layout over NCCL on several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.config import DataConfig
from parallel.mesh import init_distributed, pick_device
from tests.parity.harness import changed, loss_deviation, run_here, run_on, text_corpus, tiny_config
from tests.pool import RankPool
from trainer.config import TrainConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("cuda"))


def _train_here(config_file: str, outcome_file: str) -> None:
    """Body of a subprocess: train, leave the Outcome of rank 0."""
    config = torch.load(config_file, weights_only=False)
    init_distributed(pick_device("cuda"), timeout_seconds=120)
    outcome = run_here(config)
    if outcome is not None:
        torch.save(outcome, outcome_file)
    dist.destroy_process_group()


def _on_gpus(num_gpus: int, config: TrainConfig, folder: Path) -> Any:
    """Train in fresh processes, one per GPU; rank 0's Outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    config_file, outcome_file = folder / "config.pt", folder / "outcome.pt"
    torch.save(config, config_file)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    done = subprocess.run(
        [*command, __file__, str(config_file), str(outcome_file)],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(outcome_file, weights_only=False)


@pytest.fixture(scope="module")
def reference(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Any]:
    """Twenty steps on the CPU in fp32, with masks and dropout."""
    config = tiny_config(
        tmp_path_factory.mktemp("cpu") / "run",
        corpus,
        data__mask_documents=True,
        model__dropout=0.1,
        model__attention="sdpa",
        train__micro_batch_size=2,
        # Head sizes and rows that the GPU kernels like as well as the CPU's.
        model__hidden_size=64,
        model__num_heads=4,
        model__num_kv_heads=2,
    )
    return config, run_on(ranks, 1, config)


ONE_GPU: dict[str, dict[str, Any]] = {
    "zero0": {"parallel__zero_stage": 0},
    "zero1": {"parallel__zero_stage": 1},
    "zero2": {"parallel__zero_stage": 2},
    "zero3": {"parallel__zero_stage": 3},
    "offload": {"parallel__zero_stage": 3, "parallel__cpu_offload": True},
    "muon": {"optim__name": "muon"},
    "checkpoint-full": {"model__activation_checkpoint": "full"},
    "checkpoint-selective": {"model__activation_checkpoint": "selective"},
    "checkpoint-offload": {"model__activation_checkpoint": "offload"},
    "compiled": {"train__compile": True},
    "compiled-zero3-selective": {
        "train__compile": True,
        "parallel__zero_stage": 3,
        "model__activation_checkpoint": "selective",
    },
    "flex": {"model__attention": "flex"},
    "flex-compiled": {"model__attention": "flex", "train__compile": True},
    "bf16-zero1": {"precision__compute": "bf16", "parallel__zero_stage": 1},
    "bf16-zero3": {"precision__compute": "bf16", "parallel__zero_stage": 3},
    "bf16-zero3-offload": {"precision__compute": "bf16", "parallel__zero_stage": 3, "parallel__cpu_offload": True},
    "bf16-reduce-bf16": {"precision__compute": "bf16", "precision__reduce": "bf16", "parallel__zero_stage": 1},
    "bf16-compiled": {"precision__compute": "bf16", "train__compile": True},
    "fp16": {"precision__compute": "fp16", "parallel__zero_stage": 1},
}


@pytest.mark.parametrize("name", ONE_GPU)
def test_one_gpu_trains_like_the_cpu(
    ranks: RankPool, reference: tuple[TrainConfig, Any], tmp_path: Path, name: str
) -> None:
    """Kernels, streams and dtypes differ; the model that is trained does not. fp32: 1e-4; 16 bits: 3% of the loss."""
    config, expected = reference
    options = ONE_GPU[name] | {"train__device": "cuda", "data__num_workers": 1}
    if options.get("optim__name") == "muon":
        muon = changed(config, tmp_path / "cpu", **(options | {"train__device": "cpu"}))
        expected = run_on(ranks, 1, muon)
    outcome = _on_gpus(1, changed(config, tmp_path / "run", **options), tmp_path)
    sixteen_bits = options.get("precision__compute") in ("bf16", "fp16")
    # Muon's iteration runs in bf16 on CUDA.
    tolerance = 3e-2 if sixteen_bits or "optim__name" in options else 1e-4
    assert loss_deviation(outcome, expected) <= tolerance
    assert all(line["skipped_steps"] == 0 for line in outcome.metrics) or name == "fp16"


LAYOUTS = [(stage, replicate) for stage in (0, 1, 2, 3) for replicate in (1, 2)]


@pytest.mark.parametrize(("stage", "replicate"), LAYOUTS)
def test_every_layout_over_nccl_trains_like_the_cpu(
    reference: tuple[TrainConfig, Any], tmp_path: Path, stage: int, replicate: int
) -> None:
    """A collective on the wrong stream, a buffer reused too early: what gloo cannot show."""
    num_gpus = 4 if torch.cuda.device_count() >= 4 else 2
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config, expected = reference
    options = {
        "train__device": "cuda",
        "train__micro_batch_size": 1,
        "parallel__zero_stage": stage,
        "parallel__dp_replicate": replicate,
    }
    outcome = _on_gpus(num_gpus, changed(config, tmp_path / "run", **options), tmp_path)
    assert loss_deviation(outcome, expected) <= 1e-4
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["world_size"] == num_gpus


COMPOSED: dict[str, dict[str, Any]] = {
    "tp4": {"parallel__tp": 4, "parallel__zero_stage": 1},
    "tp2-sp-zero3": {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__zero_stage": 3},
    "cp4-ring": {"parallel__cp": 4, "parallel__zero_stage": 3, "model__attention": "auto"},
    "cp2-ulysses-tp2": {"parallel__cp": 2, "parallel__cp_method": "ulysses", "parallel__tp": 2},
    "cp2-allgather-zero1": {
        "parallel__cp": 2, "parallel__cp_method": "allgather", "parallel__zero_stage": 1, "model__attention": "auto",
    },
    "pp2-1f1b-zero3": {"parallel__pp": 2, "parallel__zero_stage": 3},
    "pp2-zero_bubble": {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble", "parallel__zero_stage": 1},
    "pp2-gpipe-tp2-sp": {
        "parallel__pp": 2, "parallel__pp_schedule": "gpipe", "parallel__tp": 2, "parallel__sequence_parallel": True,
    },
    "pp2-cp2": {"parallel__pp": 2, "parallel__cp": 2, "parallel__zero_stage": 1, "model__attention": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_axes_together_over_nccl_train_like_the_cpu(
    reference: tuple[TrainConfig, Any], tmp_path: Path, name: str
) -> None:
    """A message on the wrong stream, a buffer freed while it travels: what gloo cannot show."""
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
    config, expected = reference
    options = {"train__device": "cuda", "train__micro_batch_size": 1} | COMPOSED[name]
    outcome = _on_gpus(4, changed(config, tmp_path / "run", **options), tmp_path)
    assert loss_deviation(outcome, expected) <= 1e-4


if __name__ == "__main__":
    _train_here(*sys.argv[1:])
