"""Buckets: parameters that travel together, and where each rank's part of them lies.

A parameter sharded over N ranks has a slot of N equal parts in its bucket, in rank order, and the whole slot is
contiguous: [N, length]. Rows are split as DTensor's Shard(0) and torch.chunk split them, ceil(d0 / N) each, the last
ranks fewer or none. So a slot is the parameter, as it lies in memory, and what fills up the last parts: where the rows
divide evenly a gradient is the input of a reduce-scatter, and a parameter the output of an all-gather, as they are. A
rank's part of a slot is the local tensor of a DTensor and checkpoints need no special case. N = 1 is the unsharded
bucket.

Stacked matrices [E, O, I] of experts are cut by the rows of each matrix, as Shard(1) does, where E is not a multiple of
N and O is: 8 experts over 64 ranks would be 8 shards, padded to 64. Their slot is [N, E, O / N, I].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket."""

    name: str
    shape: torch.Size
    num_ranks: int  # N
    dim: int  # that is cut, whose indices are rows: 0, or 1 for stacked matrices
    rows_per_rank: int  # ceil(rows / N)
    start: int  # of this parameter's part among those of one rank
    length: int  # elements of a part, padded to rows_per_rank

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[self.dim]

    @property
    def is_parameter(self) -> bool:
        """Whether the slot's elements are the parameter's, in its order and without padding."""
        return self.dim == 0 and self.num_rows == self.num_ranks * self.rows_per_rank

    def of_whole(self, buffer: torch.Tensor) -> torch.Tensor:
        """This slot [N, length] of a buffer [N * S] of all slots, one after the other."""
        first, size = self.num_ranks * self.start, self.num_ranks * self.length
        return buffer[first : first + size].view(self.num_ranks, self.length)

    def of_shard(self, shard: torch.Tensor) -> torch.Tensor:
        """A rank's part [length] of a buffer [S] of its parts of all slots."""
        return shard[self.start : self.start + self.length]

    def local_rows(self, rank: int) -> tuple[int, int]:
        """First and last + 1 row of the parameter that `rank` holds."""
        first = min(rank * self.rows_per_rank, self.num_rows)
        return first, min(first + self.rows_per_rank, self.num_rows)

    def local_part(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a whole parameter that `rank` holds, a view; contiguous unless matrices of a stack are cut."""
        first, last = self.local_rows(rank)
        return full.narrow(self.dim, first, last - first)

    def local_view(self, part: torch.Tensor, rank: int) -> torch.Tensor:
        """The local tensor [rows, ...] inside rank's part [length] of the slot."""
        first, last = self.local_rows(rank)
        shape = (*self.shape[: self.dim], last - first, *self.shape[self.dim + 1 :])
        return part[: math.prod(shape)].view(shape)

    def pair(self, parts: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the slot [N, length] and of a whole parameter that have the same elements at the same places."""
        if self.dim == 1:  # evenly cut
            matrices = self.shape[0]
            return parts.unflatten(1, (matrices, -1)), full.reshape(matrices, self.num_ranks, -1).transpose(0, 1)
        return parts.view(-1)[: self.shape.numel()], full.reshape(-1)


@dataclass(frozen=True)
class BucketLayout:
    """The slots of one bucket and what all of a rank's parts have together, S elements."""

    slots: tuple[Slot, ...]
    shard_length: int
    num_ranks: int


def cut_dim(shape: torch.Size, num_ranks: int) -> int:
    """The dim of a parameter that is cut over num_ranks: 1 for stacked matrices of which the ranks get no equal number
    but, of each matrix, equal numbers of rows; else 0.
    """
    return int(len(shape) == 3 and shape[0] % num_ranks > 0 and shape[1] % num_ranks == 0)


def plan_buckets(shapes: dict[str, torch.Size], *, num_ranks: int, max_elements: float) -> list[BucketLayout]:
    """Pack parameters, in the order given, into buckets of at most max_elements (one parameter may exceed it alone)."""
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    offset = 0

    def close() -> None:
        nonlocal slots, offset
        if slots:
            buckets.append(BucketLayout(slots=tuple(slots), shard_length=offset, num_ranks=num_ranks))
        slots, offset = [], 0

    for name, shape in shapes.items():
        if not shape.numel():
            raise ValueError(f"parameter {name} has shape {tuple(shape)}: only non-empty tensors can be trained")
        if not shape:
            raise ValueError(f"parameter {name} is a scalar, which cannot be sharded on dim 0; give it shape [1]")
        dim = cut_dim(shape, num_ranks)
        rows_per_rank = -(-shape[dim] // num_ranks)
        length = rows_per_rank * (shape.numel() // shape[dim])
        if offset and (offset + length) * num_ranks > max_elements:
            close()
        slots.append(Slot(name, shape, num_ranks, dim, rows_per_rank, offset, length))
        offset += length
    close()
    return buckets
