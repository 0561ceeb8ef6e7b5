"""Rows beyond 2^31 elements of memory, of which next to none is touched: kernels of rows in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.cross_entropy import cross_entropy
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.softmax import softmax
from kernels.swiglu import swiglu_fused

APART = 2**30
ROWS, WIDTH = 3, 64
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: cross_entropy(x, torch.arange(ROWS)),
    "layer_norm": lambda x: layer_norm(x, torch.ones(WIDTH, dtype=x.dtype), None, 1e-5),
    "rms_norm": lambda x: rms_norm(x, None, 1e-5),
    "softmax": softmax,
    "swiglu": swiglu_fused,
}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """Room for such rows, beside each other in columns, and as much before them, where offsets that wrap around lead:
    8 GiB of addresses."""
    copy = torch.UntypedStorage.copy_

    def copy_from(self: Any, source: Any, *others: Any) -> Any:
        """Not onto itself, as the interpreter does with all that it was given."""
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *others)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_from)
    try:
        yield torch.empty(2 * (ROWS - 1) * APART + 2 * WIDTH, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not promise memory that is not used")


def rows_in(memory: Tensor, column: int, like: Tensor) -> Tensor:
    rows = memory.as_strided(like.shape, (APART, 1), (ROWS - 1) * APART + column)
    rows.copy_(like)
    return rows


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPS)
def test_rows_beyond_32_bits_are_found(name: str, memory: Tensor) -> None:
    """An offset of 2^31 elements that is negative in 32 bits: another row's numbers, or memory that is not there."""
    x = torch.randn(ROWS, WIDTH).half()
    with interpreted():
        near = x.clone().requires_grad_()
        y = OPS[name](near)
        d_y = torch.randn(y.shape).to(y.dtype)
        (d_x,) = torch.autograd.grad(y, near, d_y)
        far = rows_in(memory, 0, x).requires_grad_()
        far_d_y = rows_in(memory, WIDTH, d_y) if d_y.ndim > 1 else d_y
        found = OPS[name](far)
        assert torch.equal(found, y)
        assert torch.equal(torch.autograd.grad(found, far, far_d_y)[0], d_x)
