"""Where the local shard of a DTensor lies in the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank holds of a tensor whose elements lie inside of a larger DTensor; filled by parallel/fused.py."""

    data: Tensor  # this rank's elements, in the memory of the larger one
    shape: torch.Size  # of the tensor
    region: tuple[slice, ...]  # of it, that is here
    inside: DTensor  # the larger one

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def is_meta(self) -> bool:
        return self.data.is_meta

    def numel(self) -> int:
        """Of the tensor."""
        return self.shape.numel()


Located = Tensor | Piece
"""What state is read from and written to: a tensor that is whole here, the shard of a DTensor, or a piece of one."""


def local_tensor(tensor: Located) -> Tensor:
    """What this rank holds: the shard of a DTensor, in the same memory, or the tensor itself."""
    if isinstance(tensor, Piece):
        return tensor.data
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_region(tensor: Located) -> tuple[slice, ...]:
    """The part of the whole tensor, one slice per dim, that this rank holds; all of it for a plain tensor.

    A dim may be sharded by several axes, evenly or not. torch cuts in mesh order, except that a _StridedShard marks an
    axis that cuts what the others have left: data parallelism inside a tensor-parallel shard. Either way a rank's part
    is contiguous. (torch's own arithmetic takes an uneven _StridedShard for a cut of the whole into equal strides,
    which is not how fully_shard cuts.) Raises ValueError for a partial sum.
    """
    if isinstance(tensor, Piece):
        return tensor.region
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"placements {tensor.placements} are a partial sum: no rank holds a part of the whole")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return tuple(slice(0, 0) for _ in tensor.shape)
    cuts = sorted(enumerate(tensor.placements), key=lambda cut: isinstance(cut[1], _StridedShard))
    region = []
    for dim, size in enumerate(tensor.shape):
        first, last = 0, size
        for axis, placement in cuts:
            if cuts_dim(placement, dim):
                step = -(-(last - first) // tensor.device_mesh.size(axis))
                first = min(first + coordinate[axis] * step, last)
                last = min(first + step, last)
        region.append(slice(first, last))
    return tuple(region)


def largest_piece(tensor: Tensor, dim: int) -> int:
    """Indices of a dim that the rank with most of them holds; the same answer on all ranks."""
    piece = tensor.shape[dim]
    if not isinstance(tensor, DTensor):
        return piece
    for axis, placement in enumerate(tensor.placements):
        if cuts_dim(placement, dim):
            piece = -(-piece // tensor.device_mesh.size(axis))  # in whatever order
    return piece


def cuts_dim(placement: Placement, dim: int) -> bool:
    return isinstance(placement, (Shard, _StridedShard)) and placement.dim == dim
