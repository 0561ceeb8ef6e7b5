"""ModelParallel: the process groups that live inside a model's layers, handed down through constructors."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ModelParallel:
    """Each axis a one-dimensional mesh, or None for size 1, where the layer is the plain one."""

    tp: DeviceMesh | None = None  # tensor parallelism: shards of every weight matrix
    sequence_parallel: bool = False  # norms and residual stream on shards of the sequence over tp
    cp: DeviceMesh | None = None  # context parallelism: shards of the sequence
    ep: DeviceMesh | None = None  # expert parallelism


NO_GROUPS = ModelParallel()
"""Every axis of size 1."""
