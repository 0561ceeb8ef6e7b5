"""Norms and SwiGLU that write fp8: bytes and largest magnitudes are those of quantizing what they would have stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.fp8 import E4M3, E5M2, Quantized, quantize_rowwise, quantize_tensorwise, transpose_quantized
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_fp8
from kernels.rms_norm.kernel import COLUMNS
from kernels.rms_norm.quantized import _rms_norm_columns
from kernels.swiglu import swiglu_backward_quantized, swiglu_fused, swiglu_fused_backward, swiglu_quantized
from tests.kernels.test_norms import CUDA, DEVICE, EPS, draw

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
"""The interpreter computes wrongly in bf16."""


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def kernels_run(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param == "reference" and CUDA:
        pytest.skip("on a GPU the kernel is what runs")
    with interpreted() if request.param == "kernel" and not CUDA else nullcontext():
        yield request.param == "kernel"


def same_bytes(ours: Tensor | None, expected: Tensor | None) -> bool:
    assert ours is not None
    assert expected is not None
    return ours.dtype == expected.dtype and torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def assert_same(ours: Quantized, expected: Quantized) -> None:
    assert same_bytes(ours.data, expected.data)
    assert torch.equal(ours.scale, expected.scale)
    assert (ours.transposed is None) == (expected.transposed is None)
    if expected.transposed is not None:
        assert same_bytes(ours.transposed, expected.transposed)
        assert ours.transposed_scale is not None
        assert expected.transposed_scale is not None
        assert torch.equal(ours.transposed_scale, expected.transposed_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 48), (130, 80), (16, 1)])
@pytest.mark.parametrize("transpose", [False, True])
def test_swiglu_writes_the_bytes_of_quantizing_it(dtype: torch.dtype, rows: int, width: int, transpose: bool) -> None:
    """No rounding before the cast, or two; a tile beyond the edge; padding that is not zero; an amax of one tile."""
    gate_up = (2 * draw(rows, 2 * width)).to(dtype)
    scale = torch.tensor(3e-3, device=DEVICE)  # saturates beyond 1.34
    ours, amax = swiglu_quantized(gate_up, scale, transpose=transpose)
    expected, expected_amax = quantize_tensorwise(swiglu_fused(gate_up), scale, transpose=transpose)
    assert_same(ours, expected)
    assert torch.equal(amax, expected_amax)


@pytest.mark.parametrize("format_", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 48), (70, 80)])
def test_its_backward_writes_the_bytes_of_quantizing_the_gradient(
    format_: torch.dtype, dtype: torch.dtype, rows: int, width: int
) -> None:
    """Gate's gradient in the place of up's, in either copy; the largest of one half alone."""
    gate_up, d_y = (2 * draw(rows, 2 * width)).to(dtype), draw(rows, width, seed=1).to(dtype)
    scale = torch.tensor(2e-2, device=DEVICE)
    ours, amax = swiglu_backward_quantized(d_y, gate_up, scale, dtype=format_)
    plain = swiglu_fused_backward(d_y, gate_up)
    expected, expected_amax = quantize_tensorwise(plain, scale, dtype=format_, transpose=True)
    assert_same(ours, expected)
    assert torch.equal(amax, expected_amax)


def normed(dtype: torch.dtype, shape: tuple[int, ...], *, by_row: bool, added: bool, transpose: bool) -> None:
    """Checks rms_norm_fp8 of random numbers against the norm, stored and quantized."""
    x = (2 * draw(*shape)).to(dtype)
    residual = draw(*shape, seed=1).to(dtype) if added else None
    weight = draw(shape[-1], seed=2).to(dtype)
    scale = None if by_row else torch.tensor(3e-3, device=DEVICE)
    ours = rms_norm_fp8(x, weight, EPS, scale=scale, residual=residual, transpose=transpose)
    if residual is None:
        plain, stream = rms_norm(x, weight, EPS), x
    else:
        plain, stream = add_rms_norm(x, residual, weight, EPS)
    rows, expected_amax = plain.view(-1, shape[-1]), None
    if scale is None:
        expected = quantize_rowwise(rows, transpose=transpose)
    else:
        expected, expected_amax = quantize_tensorwise(rows, scale, transpose=transpose)
    assert torch.equal(ours.stream, stream)
    row_scale = ours.scale if scale is not None else ours.scale.view(-1, 1)
    made = Quantized(ours.y.view(-1, shape[-1]), row_scale, ours.transposed, ours.transposed_scale)
    if CUDA:  # norms of one output and another are two kernels, whose sums a GPU may add in different orders
        torch.testing.assert_close(made.scale, expected.scale, rtol=8e-3, atol=0.0)
        assert (made.data.view(torch.uint8) == expected.data.view(torch.uint8)).float().mean() > 0.99
        if expected.transposed is not None and made.transposed is not None:
            assert (made.transposed.view(torch.uint8) == expected.transposed.view(torch.uint8)).float().mean() > 0.99
        return
    assert_same(made, expected)
    assert (ours.amax is None) == (expected_amax is None)
    if ours.amax is not None and expected_amax is not None:
        assert torch.equal(ours.amax, expected_amax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_a_norm_writes_the_bytes_of_quantizing_it(dtype: torch.dtype, by_row: bool, added: bool) -> None:
    """No rounding before the cast; a scale of columns from some rows only, or of the unrounded norm; padding."""
    for shape, transpose in (((5, 48), True), ((2, 35, 80), True), ((3, 33), False)):
        normed(dtype, shape, by_row=by_row, added=added, transpose=transpose)


def test_largest_magnitudes_of_columns_are_found_by_every_configuration(kernels_run: bool) -> None:
    """Rows of a later tile forgotten by programs that loop."""
    for config in COLUMNS.configs if kernels_run else ():
        with COLUMNS.forced(config):
            normed(torch.float32, (150, 48), by_row=True, added=False, transpose=True)


def test_the_columns_op_is_proper() -> None:
    """A fake result of another shape or stride than the real one."""
    x, weight = draw(2, 9, 48), draw(48, seed=1)
    made = rms_norm_fp8(x, weight, EPS)
    torch.library.opcheck(_rms_norm_columns, (x, weight, made.rstd, draw(48).abs(), EPS))
    torch.library.opcheck(_rms_norm_columns, (x, None, made.rstd, draw(48).abs(), EPS))


def test_a_norm_of_nothing_and_of_zeros() -> None:
    """A division by a largest magnitude of zero; a launch without programs."""
    for by_row in (False, True):
        scale = None if by_row else torch.tensor(0.01, device=DEVICE)
        for rows in (0, 3):
            made = rms_norm_fp8(torch.zeros(rows, 32, device=DEVICE), None, EPS, scale=scale, transpose=True)
            assert made.transposed is not None
            assert made.transposed.shape == (32, 16 if rows else 0)
            assert not made.y.view(torch.uint8).any()
            if by_row and rows:
                assert made.transposed_scale is not None
                assert (made.transposed_scale == 1).all()
                assert (made.scale == 1).all()


def test_a_wrong_scale_or_an_unrounded_product_would_be_seen() -> None:
    """Negative control: the next scale up, and casts of products that were not rounded to half precision before."""
    gate_up, scale = (2 * draw(64, 160)).half(), torch.tensor(3e-3, device=DEVICE)
    ours, _ = swiglu_quantized(gate_up, scale)
    expected, _ = quantize_tensorwise(swiglu_fused(gate_up), scale * 1.01)
    assert not same_bytes(ours.data, expected.data)
    unrounded, _ = quantize_tensorwise(swiglu_fused(gate_up.float()), scale)
    assert not same_bytes(ours.data, unrounded.data)


def test_rows_with_strides_and_none_and_nan() -> None:
    """A part of a wider tensor read as if it were whole; a crash of an empty batch; a diverged run hidden."""
    scale = torch.tensor(0.01, device=DEVICE)
    wide = draw(6, 80)
    part, d_y = wide[:, :64], draw(6, 32, seed=1)
    for strided, whole in (
        (swiglu_quantized(part, scale), swiglu_quantized(part.contiguous(), scale)),
        (swiglu_backward_quantized(d_y, part, scale), swiglu_backward_quantized(d_y, part.contiguous(), scale)),
    ):
        assert_same(strided[0], whole[0])
    empty, amax = swiglu_quantized(part[:0], scale, transpose=True)
    assert empty.data.shape == (0, 32)
    assert float(amax) == 0.0
    part[2, 3] = float("nan")
    made, amax = swiglu_quantized(part, scale)
    assert made.data.float().isnan().sum() == 1
    assert amax.isnan()


@pytest.mark.parametrize("shape", [(5, 48), (130, 20), (0, 16)])
def test_transposed_bytes_are_padded_with_zeros(shape: tuple[int, int]) -> None:
    """Bytes of a neighbouring row where a product expects zeros."""
    data = draw(*shape).to(E4M3)
    ours = transpose_quantized(data)
    assert ours.shape[1] % 16 == 0
    assert same_bytes(ours[:, : shape[0]].contiguous(), data.t().contiguous())
    assert not ours.view(torch.uint8)[:, shape[0] :].any()


def test_what_is_refused() -> None:
    """Shapes that would be read beyond their ends."""
    gate_up, scale = draw(2, 8), torch.tensor(1.0, device=DEVICE)
    with pytest.raises(ValueError, match="pass \\[rows, 2I\\]"):
        swiglu_quantized(gate_up[0], scale)
    with pytest.raises(ValueError, match="scale has shape"):
        swiglu_quantized(gate_up, gate_up)
    with pytest.raises(ValueError, match="d_y has shape"):
        swiglu_backward_quantized(gate_up, gate_up, scale)
    with pytest.raises(TypeError, match="dtype is"):
        swiglu_backward_quantized(gate_up[:, :4], gate_up, scale, dtype=torch.float32)
    with pytest.raises(TypeError, match="data is"):
        transpose_quantized(gate_up)
