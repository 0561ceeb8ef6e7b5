"""Block tables of running sequences, kept on the device.

A table has as many entries as the longest sequence has blocks, and a step adds at most a few: only these are sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from inference.sequence import Sequence


@dataclass
class _Row:
    number: int
    blocks: list[int]  # the very list of its sequence, which gets another one when its blocks are taken away
    num_sent: int  # of these


class BlockTables:
    """A row of `tables` [R + 1, M] int32 for each of up to R sequences of a step; the last one is nobody's, all 0."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.tables = torch.zeros(num_rows + 1, width, dtype=torch.int32, device=device)
        self.adapters = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)  # of the rows' sequences
        self._adapters = [0] * num_rows  # the same here
        self.nobody = num_rows
        self._free = list(range(num_rows))
        self._rows: OrderedDict[Sequence, _Row] = OrderedDict()  # the one that waited longest for a step first

    def rows(self, sequences: Seq[Sequence]) -> list[int]:
        """Rows of the sequences of a step, with all of their blocks. A sequence that is in every step keeps its row."""
        for sequence in sequences:
            if sequence in self._rows:
                self._rows.move_to_end(sequence)
        places: list[int] = []
        values: list[int] = []
        found = [self._row(sequence, places, values) for sequence in sequences]
        _put(self.tables, places, values)
        others = {
            row: sequence.adapter
            for row, sequence in zip(found, sequences, strict=True)
            if self._adapters[row] != sequence.adapter
        }
        _put(self.adapters, list(others), list(others.values()))
        for row, adapter in others.items():
            self._adapters[row] = adapter
        return found

    def _row(self, sequence: Sequence, places: list[int], values: list[int]) -> int:
        row = self._rows.get(sequence)
        if row is None:
            number = self._free.pop() if self._free else self._rows.popitem(last=False)[1].number
            row = self._rows[sequence] = _Row(number, sequence.blocks, 0)
        if row.blocks is not sequence.blocks:
            row.blocks, row.num_sent = sequence.blocks, 0
        if row.num_sent < len(row.blocks):
            first = row.number * self.tables.shape[1]
            places += range(first + row.num_sent, first + len(row.blocks))
            values += row.blocks[row.num_sent :]
            row.num_sent = len(row.blocks)
        return row.number


def _put(tensor: torch.Tensor, places: list[int], values: list[int]) -> None:
    """Write some elements of an int32 tensor, without waiting for it."""
    if not places:
        return
    both = torch.tensor([places, values], dtype=torch.int64)
    sent = both.pin_memory().to(tensor.device, non_blocking=True) if tensor.is_cuda else both
    tensor.view(-1).index_put_((sent[0],), sent[1].to(torch.int32))
