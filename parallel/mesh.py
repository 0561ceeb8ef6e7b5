"""From degrees to process groups: starting torch.distributed, and the DeviceMesh that all state lives on."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.dims import ParallelDims

DATA_AXES = ("dp_replicate", "dp_shard")
"""Mesh axes the global batch is split over, outermost first."""


def world_size_from_env() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_env() -> int:
    """This process's rank among them."""
    return int(os.environ.get("RANK", "0"))


def pick_device(requested: str) -> torch.device:
    """The device of this process: `auto`, `cuda` or `cpu`. Raises ValueError when there are too few devices."""
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no CUDA device; use train.device=cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_world_size} processes were started on this node, which has {torch.cuda.device_count()} CUDA "
            f"devices; use torchrun --nproc-per-node {torch.cuda.device_count()}, or train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def init_distributed(device: torch.device, timeout_seconds: float) -> bool:
    """Start the default process group, also for a single process. Returns whether this call started it.

    On CUDA the group has both backends: NCCL for tensors of the step, gloo for host objects and checkpoints.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch 2.13's own FSDP and checkpoint code calls collectives by names that 2.13 deprecates.
    warnings.filterwarnings("ignore", message=r".*is deprecated. Please use .*_single", category=FutureWarning)
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """DeviceMesh of all processes with axes DATA_AXES."""
    return init_device_mesh(device_type, (dims.dp_replicate, dims.dp_shard), mesh_dim_names=DATA_AXES)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks the global batch is split over, as one axis "dp"; made on the first call, which is collective."""
    return mesh[DATA_AXES]._flatten("dp")
