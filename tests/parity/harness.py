"""Runs the real trainer on pool ranks and brings back what must not depend on the layout."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.config import DataConfig, TokenizerConfig
from models.config import ModelConfig
from parallel.dims import ParallelConfig
from parallel.regions import local_region
from tests.pool import RankPool
from trainer.config import (
    CheckpointConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.trainer import Trainer
from trainer.validate import finalize


@dataclass
class Outcome:
    """What a run produced. Filled by `run_here` on rank 0 (None elsewhere)."""

    losses: list[float]
    grad_norms: list[float]
    first_gradients: dict[str, torch.Tensor]  # whole tensors, of the first step, before clipping
    weights: dict[str, torch.Tensor]  # whole tensors, after the last step
    metrics: list[dict[str, Any]]


def tiny_config(run_dir: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    """A small model with odd sizes and grouped-query attention; `changes` are dotted keys, such as train__steps=3."""
    config = TrainConfig(
        train=LoopConfig(
            steps=20, seq_len=24, global_batch_size=8, micro_batch_size=1, seed=7, device="cpu", grad_clip=1.0
        ),
        model=ModelConfig(
            vocab_size=300,
            hidden_size=36,
            intermediate_size=50,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            max_seq_len=64,
        ),
        data=copy.deepcopy(data),
        parallel=ParallelConfig(zero_stage=0, bucket_mb=0.02),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(name="cosine", warmup_steps=3),
        checkpoint=CheckpointConfig(at_end=False, asynchronous=False),
        logging=LoggingConfig(console=False),
        run=RunConfig(dir=str(run_dir)),
    )
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name), key
        setattr(getattr(config, group), name, value)
    return config


def text_corpus(folder: Path) -> DataConfig:
    """Forty documents of very different lengths, and a tokenizer of 300 entries trained on them."""
    generator = torch.Generator().manual_seed(3)
    words = ["tensor", "rank", "shard", "mesh", "loss", "step", "token", "layer", "scale", "batch"]
    source = folder / "corpus"
    source.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        length = int(torch.randint(3, 160, (1,), generator=generator))
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        (source / f"{i:02d}.txt").write_text(" ".join(words[p] for p in picks))
    return DataConfig(
        source="text",
        path=str(source),
        tokenizer=TokenizerConfig(vocab_size=300),
        cache_dir=str(folder / "cache"),
        num_workers=0,
        validation_fraction=0.1,
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the full tensor behind any sharding. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu().clone()
    # Not full_tensor: torch's own puts uneven shards of shards together in the wrong order.
    result = torch.zeros(tensor.shape, dtype=tensor.dtype)
    result[local_region(tensor)] = tensor.detach().to_local()
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            dist.all_reduce(result, group=tensor.device_mesh.get_group(axis))
    return result


def run_here(config: TrainConfig) -> Outcome | None:
    """Train on this rank's process group; rank 0's Outcome."""
    import json

    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    gradients: dict[str, torch.Tensor] = {}
    update = trainer.state.optimizer.step

    def capture_then_update(**kwargs: Any) -> None:
        if not gradients:
            masters = trainer.state.data_parallel.masters
            gradients.update({name: whole(m.grad) for name, m in masters.items() if m.grad is not None})
        update(**kwargs)

    trainer.state.optimizer.step = capture_then_update  # type: ignore[method-assign]
    try:
        trainer.run()
        weights = {name: whole(m) for name, m in trainer.state.data_parallel.masters.items()}
        gradients, weights = (union_over_ranks(tensors) for tensors in (gradients, weights))
    finally:
        trainer.close()
    if dist.get_rank() != 0:
        return None
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        first_gradients=gradients,
        weights=weights,
        metrics=lines,
    )


def union_over_ranks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of every pipeline stage by name. Those that several ranks hold must agree, bit for bit. Collective."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, tensors)
    union: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(union.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return union


def run_on(ranks: RankPool, world_size: int, config: TrainConfig, **kwargs: Any) -> Outcome:
    """Train on world_size pool ranks."""
    outcome = ranks.run(world_size, run_here, config, **kwargs)[0]
    assert outcome is not None
    return outcome


def weight_deviation(a: Outcome, b: Outcome) -> float:
    """Largest difference of any weight, relative to the maximum of its tensor."""
    return max(((a.weights[n] - w).abs().max() / w.abs().max()).item() for n, w in b.weights.items())


def gradient_deviation(a: Outcome, b: Outcome) -> float:
    """Largest difference of any first-step gradient, relative to the maximum of its tensor."""
    assert a.first_gradients.keys() == b.first_gradients.keys()
    return max(((a.first_gradients[n] - g).abs().max() / g.abs().max()).item() for n, g in b.first_gradients.items())


def loss_deviation(a: Outcome, b: Outcome) -> float:
    """Largest relative difference of any step's loss."""
    assert len(a.losses) == len(b.losses)
    return max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))


def changed(config: TrainConfig, run_dir: Path, **changes: Any) -> TrainConfig:
    """A copy with other values and a run directory of its own."""
    copied = copy.deepcopy(config)
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(copied, group), name), key
        setattr(getattr(copied, group), name, value)
    return replace(copied, run=RunConfig(dir=str(run_dir)))
