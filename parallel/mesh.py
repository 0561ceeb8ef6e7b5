"""From degrees to process groups: starting torch.distributed, and the meshes that batches and state live on."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.collectives import all_to_all_rows
from parallel.dims import ParallelConfig, ParallelDims
from parallel.gloo import give_gloo_groups_one_thread
from parallel.groups import ModelParallel

BATCH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
CONTEXT_AXES = ("cp_ring", "cp_ulysses")
STATE_AXES = ("pp", "dp_replicate", "shard", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "expert_shard", "ep", "tp")


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
    if world_size_from_env() > 1 and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "WORLD_SIZE is set but LOCAL_RANK is not, so every process of a node would take the same GPU; start with "
            "torchrun, or export LOCAL_RANK (under srun: LOCAL_RANK=$SLURM_LOCALID)"
        )
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
    give_gloo_groups_one_thread()
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


@dataclass(frozen=True)
class Meshes:
    """The process groups of a layout, as views of the same ranks; tensor parallelism is innermost.

    state [pp, dp_replicate, shard, tp]: where parameters and optimizer state live. `shard` is dp_shard x cp: context
    ranks hold the same weights, so state is sharded over them too.
    batch [pp, dp_replicate, dp_shard, cp, tp]: how a global batch is divided. Sequences are split over dp_replicate and
    dp_shard, the tokens of a sequence over cp.
    experts [pp, dp_replicate, expert_shard, ep, tp]: where the state of experts lives instead, with expert parallelism.
    `shard` is expert_shard x ep: its ranks hold different experts over ep, and shards of the same over expert_shard.
    """

    state: DeviceMesh
    batch: DeviceMesh
    samples: DeviceMesh  # dp_replicate x dp_shard: ranks with different sequences
    tokens: DeviceMesh  # dp_replicate x dp_shard x cp: ranks with different tokens, over which the loss is summed
    alike: DeviceMesh | None  # pp x cp: ranks with the same sequences, or parts of them; None for one rank
    context: DeviceMesh | None  # cp as [cp_ring, cp_ulysses]; None for cp of size 1
    experts: DeviceMesh | None  # None for ep of size 1
    expert_tokens: DeviceMesh | None  # dp_replicate x expert_shard: ranks with the same experts; None likewise

    @property
    def sizes(self) -> dict[str, int]:
        """Degree of each axis of the batch view, and of ep, which divides dp_shard x cp; for run.json."""
        sizes = dict(zip(self.batch.mesh_dim_names or (), self.batch.shape, strict=True))
        return sizes if self.experts is None else sizes | {"ep": self.experts["ep"].size()}


_BUILT: dict[tuple[dist.ProcessGroup | None, ParallelDims, str], Meshes] = {}
"""Meshes made so far on each default group. Process groups hold threads and connections until their process ends; the
runs of a sweep, and tests, share them."""


def build_mesh(dims: ParallelDims, device_type: str) -> Meshes:
    """Meshes over all processes; made on the first call with these arguments, which is collective."""
    key = (dist.group.WORLD, dims, device_type)
    if key not in _BUILT:
        _BUILT[key] = _build_mesh(dims, device_type)
    return _BUILT[key]


def _build_mesh(dims: ParallelDims, device_type: str) -> Meshes:
    batch_shape = (dims.pp, dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp)
    state_shape = (dims.pp, dims.dp_replicate, dims.dp_shard * dims.cp, dims.tp)
    batch = init_device_mesh(device_type, batch_shape, mesh_dim_names=BATCH_AXES)
    experts = None
    if dims.ep > 1:
        expert_shape = (dims.pp, dims.dp_replicate, dims.expert_shard, dims.ep, dims.tp)
        experts = init_device_mesh(device_type, expert_shape, mesh_dim_names=EXPERT_AXES)
        _connect(experts["ep"])
    return Meshes(
        state=init_device_mesh(device_type, state_shape, mesh_dim_names=STATE_AXES),
        batch=batch,
        samples=batch["dp_replicate", "dp_shard"]._flatten("samples"),
        tokens=batch["dp_replicate", "dp_shard", "cp"]._flatten("tokens"),
        alike=_alike(batch),
        context=batch["cp"]._unflatten(0, (dims.cp_ring, dims.cp_ulysses), CONTEXT_AXES) if dims.cp > 1 else None,
        experts=experts,
        expert_tokens=None if experts is None else experts["dp_replicate", "expert_shard"]._flatten("expert_tokens"),
    )


def _alike(batch: DeviceMesh) -> DeviceMesh | None:
    """pp x cp; one of them, where the other has one rank, has a group already."""
    axes = tuple(axis for axis in ("pp", "cp") if batch[axis].size() > 1)
    if len(axes) < 2:
        return batch[axes[0]] if axes else None
    return batch[axes]._flatten("alike")


def _connect(axis: DeviceMesh) -> None:
    """Make the connections of all-to-all before any layer runs.

    With NCCL the first one waits on the host for all ranks of the axis; inside a pipeline another rank's host may be
    held up behind a message that in turn waits for this one.
    """
    all_to_all_rows(torch.zeros(axis.size(), 1, device=axis.device_type), group=axis.get_group())


def groups_in_layers(mesh: Meshes, config: ParallelConfig) -> ModelParallel:
    """The axes that layers communicate over; None for those of one rank."""

    def several(view: DeviceMesh | None, axis: str) -> DeviceMesh | None:
        return view[axis] if view is not None and view[axis].size() > 1 else None

    experts = mesh.experts
    if experts is not None:
        experts = experts["ep"] if experts["tp"].size() == 1 else experts["ep", "tp"]
    return ModelParallel(
        tp=several(mesh.state, "tp"),
        experts=experts,
        ep_buffer=config.ep_buffer or 0.0,
        sequence_parallel=config.sequence_parallel,
        sp_chunks=config.sp_chunks,
        cp_ring=several(mesh.context, "cp_ring"),
        cp_ulysses=several(mesh.context, "cp_ulysses"),
        cp=several(mesh.batch, "cp"),
        cp_method=config.cp_method,
    )
