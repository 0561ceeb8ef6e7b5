"""ModelParallel: the process groups that live inside a model's layers, handed down through constructors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ModelParallel:
    """Each axis a one-dimensional mesh, or None for size 1, where the layer is the plain one."""

    tp: DeviceMesh | None = None  # tensor parallelism: shards of every weight matrix
    sequence_parallel: bool = False  # norms and residual stream on shards of the sequence over tp
    sp_chunks: int = 1  # of each rank's slice of a sequence, which travel one by one (parallel/sequence_chunks.py)
    cp_ring: DeviceMesh | None = None  # context parallelism: shards of the sequence, whose keys travel
    cp_ulysses: DeviceMesh | None = None  # shards of those, exchanged for shards of the heads
    cp: DeviceMesh | None = None  # both together: the ranks that hold a sequence
    cp_method: str = "ring"  # how keys travel over cp_ring: ring or allgather; ulysses where all of cp is cp_ulysses
    experts: DeviceMesh | None = None  # where experts lie: [ep], or [ep, tp]; None: on tp, as all else
    ep_buffer: float = 0.0  # ParallelConfig.ep_buffer; 0: sizes that the host reads
    tokens_alike: bool = False  # the ranks of experts are ranks of tp, with the same tokens: none travels (serving)

    @property
    def cp_size(self) -> int:
        """Number of ranks a sequence is split over."""
        return math.prod(mesh.size() for mesh in (self.cp_ring, self.cp_ulysses) if mesh is not None)


NO_GROUPS = ModelParallel()
"""Every axis of size 1: a model that one process computes alone."""
