"""Weights of integers: the codes, what rounding costs, and the split contraction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.int4_linear import Int4Weight, dequantize_int4, int4_linear, quantize_int4
from kernels.int8_linear import dequantize_int8, int8_linear, quantize_int8


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_int8_rounds_to_the_nearest_of_its_codes() -> None:
    """Truncation, a scale of another row, a largest weight that is not 127."""
    w = weight(7, 100) * torch.logspace(-3, 3, 7)[:, None]
    data, scale = quantize_int8(w)
    assert (data.abs().amax(dim=1) == 127).all()
    # A little more than half a step where the scale itself was rounded.
    assert ((dequantize_int8(data, scale) - w).abs() <= 0.5001 * scale[:, None]).all()


def test_int4_rounds_to_the_nearest_of_its_codes_and_keeps_zero() -> None:
    """Codes out of order after packing, a scale of another group, a zero that becomes another number."""
    w = weight(5, 384) + torch.tensor([0.0, 3.0, -3.0, 0.0, 0.5])[:, None]
    w[3] = 0.0
    w[4, 128:256] = 0.7
    w[0, 5] = w[1, 200] = 0.0
    q = quantize_int4(w)
    scale = q.scale_zero[..., 0].float().t().repeat_interleave(128, dim=1)
    values = dequantize_int4(*q)
    # Half a step, and at the ends of the range what the rounding of the scale to bf16 (2^-9) moves over 15 steps, and
    # that of the zero point.
    assert ((values - w).abs() <= (1.0 + 15 * 2.0**-8) * scale).all()
    assert ((values - w).abs().mean(dim=1) <= 0.3 * scale.mean(dim=1)).all()
    assert (values[w == 0.0] == 0.0).all()


def test_int4_bytes_are_as_documented() -> None:
    """A format that readers and writers of other versions see differently."""
    w = torch.arange(128, dtype=torch.float32).remainder(16)[None]
    w[0, :4] = torch.tensor([0.0, 15.0, 7.0, 3.0])
    packed, scale_zero = quantize_int4(w)
    assert scale_zero.tolist() == [[[1.0, 0.0]]]
    code = w[0].int().tolist()
    for j in range(32):
        word = int(packed[0, 2 * j]) | int(packed[0, 2 * j + 1]) << 8
        assert [word >> 4 * i & 15 for i in range(4)] == [code[j + 32 * i] for i in range(4)]


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_parts_of_a_contraction_cover_it(splits: int) -> None:
    """Groups that no part or two parts sum, where their number is not a multiple of the parts."""
    if torch.cuda.is_available():
        pytest.skip("forces configurations in the interpreter")
    from kernels.int4_linear import kernel as int4
    from kernels.int8_linear import kernel as int8

    x, w = weight(3, 128 * 7), weight(20, 128 * 7)
    q8, q4 = quantize_int8(w), quantize_int4(w)
    with interpreted(), int8.TILES.forced(int8.Tile(16, 64, 64, splits, 4, 3)):
        torch.testing.assert_close(int8_linear(x, *q8), x @ dequantize_int8(*q8).t(), rtol=1e-5, atol=1e-4)
    with interpreted(), int4.TILES.forced(int4.Tile(16, 64, splits, 4, 3)):
        torch.testing.assert_close(int4_linear(x, *q4), x @ dequantize_int4(*q4).t(), rtol=1e-5, atol=1e-4)


def test_the_chosen_split_fills_the_gpu_and_no_more() -> None:
    """A decode step on a part of the multiprocessors; parts of a single step."""
    from kernels.split_k.kernel import PROGRAMS, splits_for

    for tiles in (1, 64, 128, 448, 2000):
        for steps in (1, 7, 64, 224):
            splits = splits_for(tiles, steps)
            assert splits == 1 or (tiles * splits <= PROGRAMS and steps >= 4 * splits)
    assert splits_for(128, 224) == 4
    assert splits_for(448, 64) == 1


def test_leading_dimensions_are_kept() -> None:
    """[batch, seq, K] flattened for good."""
    q8, q4 = quantize_int8(weight(6, 128)), quantize_int4(weight(6, 128))
    assert int8_linear(torch.ones(2, 3, 128), *q8).shape == (2, 3, 6)
    assert int4_linear(torch.ones(128), *q4).shape == (6,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_int4(torch.ones(2, 192)), r"use one of \[64\]"),
        (lambda: quantize_int4(torch.full((2, 128), torch.inf)), "inf or NaN"),
        (lambda: quantize_int8(torch.full((2, 8), torch.nan)), "inf or NaN"),
        (lambda: int8_linear(torch.ones(2, 9), *quantize_int8(torch.ones(2, 8))), r"pass \[\.\.\., K\]"),
        (lambda: int4_linear(torch.ones(2, 64), *quantize_int4(torch.ones(2, 128))), r"\[N, K/2\]"),
        (
            lambda: int4_linear(torch.ones(2, 128), *Int4Weight(*quantize_int4(torch.ones(2, 128)))[:1],
                                torch.ones(3, 2, 2).bfloat16()),
            r"\[K/G, N, 2\]",
        ),
        (lambda: int8_linear(torch.ones(2, 8), *quantize_int8(torch.ones(2, 8)), torch.ones(3)), "bias has shape"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], message: str) -> None:
    """Memory of another tensor read by a kernel."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()
