"""From live tensors to a copy in host memory that training cannot change any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from parallel.regions import Located, Piece, local_region, local_tensor
from trainer.agreement import CheckpointError

_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element size


@dataclass(frozen=True)
class Shard:
    """The part of one tensor that this rank holds; filled by local_shards."""

    name: str
    shape: torch.Size  # of the whole tensor
    offsets: torch.Size  # index in the whole tensor of this part's first element
    data: torch.Tensor  # this part


@torch.no_grad()
def local_shards(tensors: Mapping[str, Located]) -> list[Shard]:
    """This rank's part of every tensor, by name. A plain tensor is one replica of the whole.

    Ranks that hold the same part all return it; planning the save picks one of them. An empty part of a tensor that is
    not empty is left out. Raises CheckpointError for a DTensor that is a partial sum: its value exists on no rank.
    """
    shards = []
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, DTensor | Piece):
            shards.append(Shard(name, tensor.shape, torch.Size([0] * tensor.dim()), tensor))
            continue
        whole = tensor.inside if isinstance(tensor, Piece) else tensor
        if any(placement.is_partial() for placement in whole.placements):
            raise CheckpointError(f"tensor {name} is a partial sum ({whole.placements}); reduce it before saving")
        if whole.device_mesh.get_coordinate() is None:
            continue
        local = local_tensor(tensor)
        if tensor.numel() == 0 or local.numel() > 0:
            offsets = torch.Size([part.start for part in local_region(tensor)])
            shards.append(Shard(name, tensor.shape, offsets, local))
    return shards


class HostArena:
    """One block of host memory that holds a copy of this rank's shards; page-locked for a CUDA device.

    It is kept between saves, because page-locking is slow. One block registered with the driver is used rather than a
    pinned tensor per shard: torch's pinned allocator rounds each up to a power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block: torch.Tensor | None = None  # [bytes] uint8

    def stage(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards with data copied into the arena; the copy is complete on return.

        On CUDA both ends synchronise the device: whatever streams write the tensors are done before the copy, and
        whatever the caller does next cannot overtake it. The cost is one device-to-host copy of the local state.
        """
        sizes = [-(-shard.data.nbytes // _ALIGNMENT) * _ALIGNMENT for shard in shards]
        self._reserve(sum(sizes))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        staged, begin = [], 0
        for shard, size in zip(shards, sizes, strict=True):
            copy = self._view(begin, shard.data)
            copy.copy_(shard.data.detach(), non_blocking=True)
            staged.append(replace(shard, data=copy))
            begin += size
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return staged

    def release(self) -> None:
        """Give the memory back. Staged shards must not be used after it."""
        if self._block is not None and self._device.type == "cuda":
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())))
        self._block = None

    def _reserve(self, size: int) -> None:
        if self._block is not None and self._block.numel() >= size:
            return
        self.release()
        self._block = torch.empty(max(size, _ALIGNMENT), dtype=torch.uint8)
        if self._device.type == "cuda":
            torch.cuda.check_error(
                int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), self._block.numel(), 0))
            )

    def _view(self, begin: int, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor on the arena's bytes with a storage of exactly its size.

        A slice of the block would share the block's storage, and torch.save writes (or first clones) whole storages.
        """
        assert self._block is not None
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        flat = torch.frombuffer(self._block.numpy(), dtype=like.dtype, count=like.numel(), offset=begin)
        return flat.view(like.shape)
