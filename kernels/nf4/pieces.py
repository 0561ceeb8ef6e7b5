"""Pieces of NF4 matrices: some rows and columns of one, or rows of several, with the bits that the whole ones have.

With double quantization the magnitude of a block depends on the whole matrix: 256 of them, in the order of its memory,
share a scale, and all an offset. So a rank that has a part of a matrix keeps the codes of its own blocks and the scales
of all, which are 0.002 bits a value, and knows where its blocks lie. A block of 64 values lies in one row; matrices
whose rows, or what a rank has of them, are no whole blocks are refused.

One flat tensor holds a piece, so that what moves and shards parameters needs to know nothing of the format:

    values of all rows | codes of their blocks' magnitudes | scales of each matrix | offsets | padding to 16 bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import runs_triton
from kernels.nf4.op import quantize_nf4
from kernels.nf4.reference import BLOCK, GROUP, NF4, levels, magnitude_levels

ALIGNMENT = 16
"""Bytes that a piece is a multiple of."""


class Rows(NamedTuple):
    """Rows of one matrix that a piece has."""

    first: int
    num: int
    of: int  # rows of the whole matrix


@dataclass(frozen=True)
class Piece:
    """Where the blocks of a piece lie: columns first_column to first_column + columns - 1 of `rows` of each matrix."""

    rows: tuple[Rows, ...]
    first_column: int
    columns: int
    of_columns: int  # of the whole matrices

    def __post_init__(self) -> None:
        if self.first_column % BLOCK or self.columns % BLOCK or self.of_columns % BLOCK:
            raise ValueError(
                f"columns {self.first_column} to {self.first_column + self.columns} of {self.of_columns} are no whole "
                f"blocks of {BLOCK}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return sum(rows.num for rows in self.rows), self.columns

    @property
    def _sizes(self) -> list[int]:
        """Bytes of values, codes, and scales of each matrix."""
        values = self.shape[0] * self.columns
        groups = [-(-rows.of * self.of_columns // BLOCK // GROUP) for rows in self.rows]
        return [values // 2, values // BLOCK, *(4 * number for number in groups)]

    @property
    def num_bytes(self) -> int:
        exact = sum(self._sizes) + 4 * len(self.rows)
        return -(-exact // ALIGNMENT) * ALIGNMENT

    def pack(self, matrices: Sequence[NF4]) -> Tensor:
        """The piece, uint8 [num_bytes], of whole matrices [of, of_columns] quantized by `quantize_nf4`."""
        columns = slice(self.first_column, self.first_column + self.columns)
        values, codes, scales = [], [], []
        for rows, matrix in zip(self.rows, matrices, strict=True):
            some = slice(rows.first, rows.first + rows.num)
            packed = matrix.packed.view(rows.of, -1)[some, columns.start // 2 : columns.stop // 2]
            magnitudes = matrix.magnitudes.view(rows.of, -1)[some, columns.start // BLOCK : columns.stop // BLOCK]
            values.append(packed.flatten())
            codes.append(magnitudes.flatten())
            # As bytes: a region may start where no fp32 number could.
            scales.append(matrix.scales.contiguous().view(torch.uint8))
        offsets = torch.stack([matrix.offset for matrix in matrices]).view(torch.uint8)
        packed = torch.cat([*values, *codes, *scales, offsets])
        return torch.nn.functional.pad(packed, (0, self.num_bytes - len(packed)))

    def quantize(self, matrices: Sequence[Tensor]) -> Tensor:
        """`pack` of whole matrices of a floating dtype."""
        return self.pack([quantize_nf4(matrix) for matrix in matrices])

    def dequantize(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., rows, columns] of dtype from what `pack` made, uint8 [..., num_bytes] or the same bytes of another
        dtype: of one piece, or of a stack of pieces of different matrices with the same place in each."""
        places = [number for rows in self.rows for number in rows]
        shape = [self.first_column, self.columns, self.of_columns]
        stacked = stored.view(torch.uint8)
        found = _dequantize_pieces(stacked.reshape(-1, self.num_bytes), places, shape, dtype)
        return found.view(*stacked.shape[:-1], *self.shape)


@torch.library.custom_op("lattice::nf4_dequantize_pieces", mutates_args=())
def _dequantize_pieces(stored: Tensor, rows: list[int], columns: list[int], dtype: torch.dtype) -> Tensor:
    # One op: a compiler would fuse the product and the sum of a magnitude, and round once where the format does twice.
    piece = Piece(tuple(Rows(*rows[i : i + 3]) for i in range(0, len(rows), 3)), *columns)
    end = sum(piece._sizes)
    parts = stored[:, :end].split(piece._sizes, dim=1)
    offsets = _as_fp32(stored[:, end : end + 4 * len(piece.rows)])
    packed, codes, device = parts[0].flatten(), parts[1], stored.device
    per_row = piece.columns // BLOCK
    numbers = magnitude_levels(device)[codes.int()]
    column = torch.arange(per_row, device=device) + piece.first_column // BLOCK
    largest, begin = [], 0
    for number, (part, scales) in enumerate(zip(piece.rows, parts[2:], strict=True)):
        row = torch.arange(part.first, part.first + part.num, device=device)
        group = ((row * (piece.of_columns // BLOCK))[:, None] + column).flatten() // GROUP
        scale, offset = _as_fp32(scales)[:, group], offsets[:, number, None]
        largest.append(numbers[:, begin : begin + len(group)] * scale + offset)
        begin += len(group)
    magnitudes = torch.cat(largest, dim=1).flatten()
    if runs_triton(stored) and len(packed):
        from kernels.nf4.kernel import dequantize_blocks

        return dequantize_blocks(packed.contiguous(), magnitudes, dtype)
    values = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    return (levels(device)[values.int()] * magnitudes.repeat_interleave(BLOCK)).to(dtype)


def _as_fp32(stored: Tensor) -> Tensor:
    """[S, 4 n] uint8 as [S, n]; a copy, because a view as fp32 has to be aligned."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float32)


@_dequantize_pieces.register_fake
def _(stored: Tensor, rows: list[int], columns: list[int], dtype: torch.dtype) -> Tensor:
    return stored.new_empty(stored.shape[0] * sum(rows[1::3]) * columns[1], dtype=dtype)
