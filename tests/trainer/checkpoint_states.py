"""States and layouts that the checkpoint tests save and load."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointConfig

LAYOUTS = ((1, "plain"), (1, "shard"), (2, "plain"), (2, "shard"), (2, "hsdp"), (4, "shard"), (4, "hsdp"))
"""(ranks, kind): plain tensors on every rank, one mesh axis of shards, or replicas of shards."""


def full_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole tensors: weights with AdamW state, uneven and scarce rows, scalars, an empty one, several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in {"weight": (5, 3), "scarce": (2, 4), "bias": (7,), "wide": (4, 9)}.items():
        for part in ("model", "exp_avg", "exp_avg_sq"):
            state[f"{part}.{name}"] = torch.randn(shape, generator=generator)
    state["model.bias"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    state["model.half"] = torch.randn(6, 5, generator=generator).bfloat16()
    state["optimizer.step"] = torch.tensor(17.0 + seed)
    state["optimizer.skipped"] = torch.tensor(2**40 + seed)
    state["model.empty"] = torch.empty(0, 3)
    state["model.mask"] = torch.rand(9, generator=generator) > 0.5
    return state


def laid_out(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state in a layout on all ranks of the process group. Floating weights are leaves that require gradients."""
    result = {}
    mesh = None if kind == "plain" else _mesh(kind)
    for name, full in state.items():
        tensor = full.clone()
        if mesh is not None and full.dim():
            tensor = distribute_tensor(tensor, mesh, _placements(kind, name), src_data_rank=None)
        is_weight = name.startswith("model.") and full.is_floating_point()
        result[name] = nn.Parameter(tensor) if is_weight else tensor
    return result


def _mesh(kind: str) -> DeviceMesh:
    if kind == "shard":
        return init_device_mesh("cpu", (dist.get_world_size(),))
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2))


def _placements(kind: str, name: str) -> list[Placement]:
    shard = Shard(1) if name.endswith(".wide") else Shard(0)
    return [shard] if kind == "shard" else [Replicate(), shard]


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality of dtype, shape and every bit, so that NaN equals itself and 0 is not -0."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return bytes(_bytes(tensor)) == bytes(_bytes(other))


def _bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def manager(directory: Path, **config: int | bool) -> CheckpointManager:
    return CheckpointManager(directory, CheckpointConfig(**config), device=torch.device("cpu"))  # type: ignore[arg-type]


def save_states(directory: Path, kind: str, steps: dict[int, int], **config: int | bool) -> None:
    """On ranks: save full_state(seed) as step, for each step: seed in order, with extra {"seed": seed}."""
    checkpoints = manager(directory, **config)
    for step, seed in steps.items():
        checkpoints.save(step, laid_out(kind, full_state(seed)), {"seed": seed})
    checkpoints.close()
