"""A case of NF4: a tensor quantized and dequantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.nf4 import dequantize_nf4, quantize_nf4
from kernels.nf4.op import _dequantize, _quantize
from kernels.nf4.pieces import Piece, Rows, _dequantize_pieces
from kernels.nf4.reference import BLOCK, dequantize_nf4_reference, quantize_nf4_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return (normal(shape, dtype, generator),)


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    q = quantize_nf4(x)
    return dequantize_nf4(q, x.shape, torch.float32), q.packed.float()


def _both_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    q = quantize_nf4_reference(x)
    return dequantize_nf4_reference(*q, x.numel(), torch.float32).view(x.shape), q.packed.float()


def _middle(shape: Shape) -> Piece:
    """All rows but the first, and all but the first block of columns."""
    rows, columns = shape
    return Piece((Rows(1, rows - 1, rows),), BLOCK, columns - BLOCK, columns)


def _pieces(x: Tensor) -> Tensor:
    """Of two matrices, as of a stack of experts."""
    piece = _middle(x.shape)
    stored = torch.stack([piece.pack([quantize_nf4(matrix)]) for matrix in (x, x.flip(0) / 3)])
    return piece.dequantize(stored, torch.float32)


def _pieces_reference(x: Tensor) -> Tensor:
    quantized = [quantize_nf4_reference(matrix) for matrix in (x, x.flip(0) / 3)]
    whole = [dequantize_nf4_reference(*q, x.numel(), torch.float32).view(x.shape) for q in quantized]
    return torch.stack([matrix[1:, BLOCK:] for matrix in whole])


def _pieces_call(x: Tensor) -> tuple[Any, ...]:
    rows, columns = x.shape
    stored = _middle(x.shape).pack([quantize_nf4_reference(x)])[None]
    return _dequantize_pieces, (stored, [1, rows - 1, rows], [BLOCK, columns - BLOCK, columns], torch.float32)


CASES = [
    Case(
        name="nf4_pieces",
        op=_pieces,
        reference=_pieces_reference,
        inputs=_inputs,
        shapes=[(5, 192), (2, 128), (40, 1024)],
        differentiable=(),
        extreme_arguments=(0,),
        checks=lambda inputs: [_pieces_call(*inputs)],
        tuned="kernels.nf4.kernel:TILES",
        batch_dim=None,
    ),
    Case(
        name="nf4",
        op=_both,
        reference=_both_reference,
        inputs=_inputs,
        shapes=[(5, 123), (64,), (3, 1), (300, 64), (0, 5)],
        differentiable=(),
        extreme_arguments=(0,),
        checks=lambda inputs: [
            (_quantize, inputs),
            (_dequantize, (*quantize_nf4_reference(*inputs), inputs[0].numel(), torch.float32)),
        ],
        tuned="kernels.nf4.kernel:TILES",
        batch_dim=None,
    ),
]
