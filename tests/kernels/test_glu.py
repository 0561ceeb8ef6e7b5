"""SwiGLU and GeGLU: what the generic tests do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import interpreted
from kernels.geglu import geglu
from kernels.swiglu import swiglu, swiglu_fused, swiglu_fused_backward
from tests.kernels.test_norms import CUDA, DEVICE, draw


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    with nullcontext() if CUDA else interpreted():
        yield


def test_halves_of_a_projection_give_the_bits_of_separate_tensors() -> None:
    """A stride forgotten in one of five tensors; a gradient written over its other half."""
    gate_up, d_y = draw(3, 5, 2 * 77), draw(3, 5, 77, seed=1)
    gate, up = (half.contiguous().requires_grad_() for half in gate_up.chunk(2, dim=-1))
    expected = swiglu(gate, up)
    d_gate, d_up = torch.autograd.grad(expected, (gate, up), d_y)
    assert torch.equal(swiglu_fused(gate_up), expected)
    assert torch.equal(swiglu(*gate_up.chunk(2, dim=-1)), expected)
    assert torch.equal(swiglu_fused_backward(d_y, gate_up), torch.cat((d_gate, d_up), dim=-1))


def test_geglu_is_that_of_torch_far_out_too() -> None:
    """The other approximation, which differs by 1e-3, or a tail that does not vanish."""
    gate, up = torch.linspace(-30, 30, 400, device=DEVICE), torch.ones(400, device=DEVICE)
    for approximate in ("tanh", "none"):
        expected = F.gelu(gate.double(), approximate=approximate).float()
        torch.testing.assert_close(geglu(gate, up, approximate), expected, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    """Halves of an odd width, and names that would pick some activation."""
    with pytest.raises(ValueError, match="must be even"):
        swiglu_fused(draw(2, 7))
    with pytest.raises(ValueError, match="approximate='erf'"):
        geglu(draw(2), draw(2), "erf")
