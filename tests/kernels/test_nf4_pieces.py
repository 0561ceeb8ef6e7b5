"""Pieces of NF4 matrices: the bits of bitsandbytes' whole ones, however they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.nf4 import NF4, dequantize_nf4, quantize_nf4
from kernels.nf4.pieces import Piece, Rows

bnb = pytest.importorskip("bitsandbytes.functional")
OUT, IN = 96, 384


def matrix(seed: int, rows: int = OUT, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)).mul(0.05 + seed).to(dtype)


def theirs(weight: Tensor) -> tuple[NF4, Tensor]:
    """bitsandbytes' matrix, and its values."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    found = NF4(packed.flatten(), state.absmax, state.state2.absmax, state.offset)
    return found, bnb.dequantize_4bit(packed, state).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_has_the_bits_of_the_whole_matrix(dtype: torch.dtype) -> None:
    """Magnitudes quantized over a part of a matrix: another model for every number of ranks."""
    weights = [matrix(0, dtype=dtype), matrix(1, rows=64, dtype=dtype)]
    quantized, (first, second) = zip(*map(theirs, weights), strict=True)
    pieces = [
        (Piece((Rows(0, OUT, OUT),), 0, IN, IN), first),
        (Piece((Rows(33, 30, OUT),), 0, IN, IN), first[33:63]),
        (Piece((Rows(0, OUT, OUT),), 128, 192, IN), first[:, 128:320]),
        (Piece((Rows(48, 48, OUT), Rows(32, 32, 64)), 0, IN, IN), torch.cat([first[48:], second[32:]])),
    ]
    for piece, wanted in pieces:
        stored = piece.pack(quantized[: len(piece.rows)])
        assert stored.dtype == torch.uint8
        assert len(stored) == piece.num_bytes
        assert torch.equal(piece.dequantize(stored.view(dtype), dtype), wanted)
    alone = Piece((Rows(0, 30, 30),), 0, IN, IN)  # negative control: a part quantized by itself
    assert not torch.equal(alone.dequantize(alone.quantize([weights[0][33:63]]), dtype), first[33:63])
    whole = pieces[0][0]
    expected = dequantize_nf4(quantize_nf4(weights[0]), (OUT, IN), dtype)
    assert torch.equal(whole.dequantize(whole.quantize(weights[:1]), dtype), expected)


def test_a_value_costs_what_double_quantization_promises() -> None:
    """Magnitudes kept in fp32: half a bit more."""
    piece = Piece((Rows(0, 4096, 4096),), 0, 4096, 4096)
    assert 8 * piece.num_bytes / 4096**2 == pytest.approx(4 + 0.127, abs=1e-3)


def test_a_cut_through_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole blocks of 64"):
        Piece((Rows(0, OUT, OUT),), 0, 96, IN)
