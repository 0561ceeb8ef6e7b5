"""Softmax: what the generic tests do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from kernels.backend import interpreted
from kernels.softmax import softmax
from kernels.softmax.kernel import FORWARD, Chunks, Tiles

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    with nullcontext() if CUDA else interpreted():
        yield


@pytest.mark.parametrize("config", [Tiles(64, 1, 0), Chunks(64, 1)], ids=["rows", "chunks"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # of numpy, which interprets
def test_infinities_are_those_of_torch(config: Tiles | Chunks) -> None:
    """A row that begins with a chunk of -inf, as masks make it, and turns to NaN as a whole."""
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, :130] = float("-inf")
    x[1, 60:] = float("-inf")
    x[2] = float("-inf")
    x[3, 100] = float("inf")
    x[4, 7] = float("nan")
    with FORWARD.forced(config):
        torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)


def test_large_numbers_do_not_overflow() -> None:
    """exp of what was not shifted by the maximum; a maximum that a later chunk raises."""
    x = torch.linspace(-3e4, 3e4, 500).expand(2, 500).to(DEVICE)
    for config in (Tiles(64, 1, 0), Chunks(64, 1)):
        with FORWARD.forced(config):
            torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


def test_what_is_refused() -> None:
    """Numbers that a float kernel would misread."""
    with pytest.raises(TypeError, match="int64"):
        softmax(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no dim"):
        softmax(torch.tensor(1.0))
