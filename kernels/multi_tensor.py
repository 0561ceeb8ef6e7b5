"""One launch over many tensors: which program works on which part, and where the tensors lie.

A kernel over a list of tensors has a program per chunk of CHUNK elements. Which tensor and which of its chunks that is
depends on sizes alone, and is written down once (`chunk_table`); addresses change when gradients are allocated anew,
and are copied to the device only then (`AddressTable`). A flat buffer is a list of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 14
"""Elements of one program. A power of two that every block size divides."""
ALIGNMENT = 16
"""Bytes of the widest access: tensors that start at a multiple of it are read and written 16 bytes at a time."""


def on_device(rows: Sequence[Sequence[int]] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, copied without waiting for the device."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def chunk_table(sizes: Sequence[int], device: torch.device) -> Tensor:
    """[chunks, 2] int32: number of the tensor, number of the chunk within it; in this order, none for empty tensors."""
    rows = [torch.empty(0, 2, dtype=torch.int32)]
    for number, size in enumerate(sizes):
        within = torch.arange(-(-size // CHUNK), dtype=torch.int32)
        rows.append(torch.stack([torch.full_like(within, number), within], dim=1))
    table = torch.cat(rows)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


class AddressTable:
    """Addresses of several lists of tensors, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[tuple[int, ...]] = []
        self._table = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, *lists: Sequence[Tensor | None]) -> Tensor:
        """[tensors, 1 + lists] int64: 1 if the row's addresses are aligned, else 0; address in each list, 0 for None.

        Copied anew only if one has changed. The tensors must stay alive until the kernel has been launched.
        """
        rows = [tuple(0 if t is None else t.data_ptr() for t in row) for row in zip(*lists, strict=True)]
        if rows != self._rows:
            flagged = [(int(all(address % ALIGNMENT == 0 for address in row)), *row) for row in rows]
            self._table, self._rows = on_device(flagged, torch.int64, self._device), rows
        return self._table
