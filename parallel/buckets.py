"""Flat buckets: many parameters travel in one collective.

A bucket of P parameters sharded over N ranks is a buffer [N, S], row n holding rank n's rows of every parameter one
after the other. Rows are split as DTensor's Shard(0) and torch.chunk split them: ceil(d0 / N) each, the last ranks
fewer or none, so a shard of a bucket is the local tensor of a DTensor and checkpoints need no special case. N = 1 is
the unsharded bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket's buffer [N, S]: columns [start, stop), padded to equal rows per rank."""

    name: str
    shape: torch.Size
    rows_per_rank: int  # ceil(d0 / N)
    row_numel: int  # elements of one row
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[0]

    def local_rows(self, rank: int) -> tuple[int, int]:
        """First and last + 1 row of the parameter that `rank` holds."""
        first = min(rank * self.rows_per_rank, self.num_rows)
        return first, min(first + self.rows_per_rank, self.num_rows)

    def local_view(self, shard: torch.Tensor, rank: int) -> torch.Tensor:
        """This parameter's local tensor [rows, ...] inside rank's row `shard` [S] of the buffer."""
        first, last = self.local_rows(rank)
        return shard[self.start : self.start + (last - first) * self.row_numel].view(last - first, *self.shape[1:])

    def _pieces(self, buffer: torch.Tensor, full: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (view of buffer, view of the parameter) that together hold every element once."""
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
        rows_per_rank = -(-shape[0] // num_ranks)
        row_numel = shape.numel() // shape[0]
        length = rows_per_rank * row_numel
        if offset and (offset + length) * num_ranks > max_elements:
            close()
        slots.append(Slot(name, shape, rows_per_rank, row_numel, offset, offset + length))
        offset += length
    close()
    return buckets
