"""The global norm: what the generic tests cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from kernels.backend import interpreted
from kernels.global_norm import global_norm, sum_of_squares
from kernels.multi_tensor import CHUNK

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _both(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "reference" and CUDA:
        pytest.skip("the kernel is what runs on CUDA")
    with interpreted() if request.param == "kernel" and not CUDA else nullcontext():
        yield


def test_it_is_the_norm_of_the_concatenation() -> None:
    """A chunk left out at the end of a tensor; a tensor whose memory is not aligned."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3 * CHUNK + 111, generator=generator).to(DEVICE)
    for sizes in ([3 * CHUNK + 111], [CHUNK, CHUNK, CHUNK + 111], [1, CHUNK - 1, 7, 2 * CHUNK + 104]):
        parts = flat.split(sizes)
        torch.testing.assert_close(global_norm(parts).double(), flat.double().norm(), rtol=1e-6, atol=0)
        assert sum_of_squares(parts).dtype == torch.float64


def test_tensors_may_be_allocated_anew() -> None:
    """Addresses kept from the step before."""
    for value in (1.0, 2.0, 3.0):
        kept = [torch.full((100,), value, device=DEVICE), torch.full((50,), value, device=DEVICE)]
        assert float(sum_of_squares(kept)) == 150 * value**2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_number_that_is_not_finite_shows(value: float) -> None:
    """A maximum or a mask that drops it: the step would not be skipped."""
    x = torch.ones(CHUNK + 5, device=DEVICE)
    x[-1] = value
    assert not bool(global_norm([x]).isfinite())


def test_the_sum_of_large_squares_does_not_overflow() -> None:
    """A second stage in fp32, where a loss scale makes the norm infinite and every step is skipped."""
    x = torch.full((CHUNK * 3,), 1e17, device=DEVICE)
    torch.testing.assert_close(sum_of_squares([x]).float(), torch.tensor(3.0 * CHUNK * 1e34, device=DEVICE))
    x = torch.full((3,), 1.5e19, device=DEVICE)
    assert bool(sum_of_squares([x[:1], x[1:2], x[2:]]).isfinite())


def test_what_cannot_work_is_refused() -> None:
    """An index error, or a sum of memory read as another dtype."""
    with pytest.raises(ValueError, match="no tensors"):
        sum_of_squares([])
    with pytest.raises(TypeError, match=r"tensors\[1\] has dtype torch\.int64"):
        sum_of_squares([torch.ones(2, device=DEVICE), torch.ones(2, dtype=torch.int64, device=DEVICE)])
