"""Flat buckets: many parameters travel in one collective.

A bucket of P parameters sharded over N ranks is a buffer [N, S], row n holding rank n's rows of every parameter one
after the other. Rows are split as DTensor's Shard(0) and torch.chunk split them: ceil(d0 / N) each, the last ranks
fewer or none, so a shard of a bucket is the local tensor of a DTensor and checkpoints need no special case. N = 1 is
the unsharded bucket.

Stacked matrices [E, O, I] of experts are cut by the rows of each matrix, as Shard(1) does, where E is not a multiple of
N and O is: 8 experts over 64 ranks would be 8 shards, padded to 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket's buffer [N, S]: columns [start, stop), padded to equal rows per rank."""

    name: str
    shape: torch.Size
    dim: int  # that is cut, whose indices are rows: 0, or 1 for stacked matrices
    rows_per_rank: int  # ceil(rows / N)
    row_numel: int  # elements of one row, in one matrix of a stack
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[self.dim]

    def local_part(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a whole parameter that `rank` holds, a view; contiguous unless matrices of a stack are cut."""
        first, last = self.local_rows(rank)
        return full.narrow(self.dim, first, last - first)

    def local_rows(self, rank: int) -> tuple[int, int]:
        """First and last + 1 row of the parameter that `rank` holds."""
        first = min(rank * self.rows_per_rank, self.num_rows)
        return first, min(first + self.rows_per_rank, self.num_rows)

    def local_view(self, shard: torch.Tensor, rank: int) -> torch.Tensor:
        """This parameter's local tensor [rows, ...] inside rank's row `shard` [S] of the buffer."""
        first, last = self.local_rows(rank)
        shape = (*self.shape[: self.dim], last - first, *self.shape[self.dim + 1 :])
        return shard[self.start : self.start + math.prod(shape)].view(shape)

    def _pieces(self, buffer: torch.Tensor, full: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (view of buffer, view of the parameter) that together hold every element once."""
        if self.dim == 1:  # evenly cut
            num_ranks, matrices = buffer.shape[0], self.shape[0]
            parts = full.reshape(matrices, num_ranks, -1).transpose(0, 1)
            return [(buffer[:, self.start : self.stop].unflatten(1, (matrices, -1)), parts)]
        rows = full.reshape(self.num_rows, self.row_numel)
        whole_ranks, rest = divmod(self.num_rows, self.rows_per_rank)
        split = whole_ranks * self.rows_per_rank
        columns = buffer[:, self.start : self.stop]
        pieces = [(columns[:whole_ranks], rows[:split].view(whole_ranks, -1))] if whole_ranks else []
        if rest:
            pieces.append((columns[whole_ranks, : rest * self.row_numel], rows[split:].view(-1)))
        return pieces

    def copy_in(self, buffer: torch.Tensor, full: torch.Tensor, *, accumulate: bool) -> None:
        """Write (or add) a whole parameter-shaped tensor into the buffer [N, S], casting to its dtype."""
        for target, source in self._pieces(buffer, full):
            if accumulate:
                target.add_(source)
            else:
                target.copy_(source)

    def copy_out(self, buffer: torch.Tensor, full: torch.Tensor) -> None:
        """Read the whole parameter back from the buffer [N, S]."""
        for source, target in self._pieces(buffer, full):
            target.copy_(source)

    def clear(self, buffer: torch.Tensor) -> None:
        """Zero this parameter's columns."""
        buffer[:, self.start : self.stop].zero_()


@dataclass(frozen=True)
class BucketLayout:
    """The slots of one bucket and its row length S."""

    slots: tuple[Slot, ...]
    row_length: int
    num_ranks: int


def cut_dim(shape: torch.Size, num_ranks: int) -> int:
    """The dim of a parameter that is cut over num_ranks: 1 for stacked matrices of which the ranks get no equal number
    but, of each matrix, equal numbers of rows; else 0.
    """
    return int(len(shape) == 3 and shape[0] % num_ranks > 0 and shape[1] % num_ranks == 0)


def plan_buckets(shapes: dict[str, torch.Size], *, num_ranks: int, max_elements: int) -> list[BucketLayout]:
    """Pack parameters, in the order given, into buckets of at most max_elements (one parameter may exceed it alone)."""
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    offset = 0

    def close() -> None:
        nonlocal slots, offset
        if slots:
            buckets.append(BucketLayout(slots=tuple(slots), row_length=offset, num_ranks=num_ranks))
        slots, offset = [], 0

    for name, shape in shapes.items():
        if not shape.numel():
            raise ValueError(f"parameter {name} has shape {tuple(shape)}: only non-empty tensors can be trained")
        if not shape:
            raise ValueError(f"parameter {name} is a scalar, which cannot be sharded on dim 0; give it shape [1]")
        dim = cut_dim(shape, num_ranks)
        rows_per_rank = -(-shape[dim] // num_ranks)
        row_numel = shape[dim + 1 :].numel()
        length = rows_per_rank * row_numel * shape[:dim].numel()
        if offset and (offset + length) * num_ranks > max_elements:
            close()
        slots.append(Slot(name, shape, dim, rows_per_rank, row_numel, offset, offset + length))
        offset += length
    close()
    return buckets
