"""The swizzle of the teaching matrix product, and the linear layer's optional parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.backend import interpreted
from kernels.matmul import kernel as kernels_matmul
from kernels.matmul import linear_gelu, matmul

CUDA = torch.cuda.is_available()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda" if CUDA else "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_the_swizzle_visits_every_tile_once(group: int) -> None:
    """Tiles left out or computed twice where the last group of rows is lower than the others."""
    tile = kernels_matmul.Tile(16, 16, 16, 4, 2, group)
    for rows, columns in ((5, 3), (1, 4), (7, 1)):
        a, b = randn(16 * rows - 3, 20), randn(20, 16 * columns - 5, seed=1)
        with interpreted(), kernels_matmul.TILES.forced(tile):
            torch.testing.assert_close(matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_bias_and_residual_are_optional(biased: bool, added: bool) -> None:
    """A pointer read that stands for nothing; a gradient returned for what is not there."""
    shapes = [(2, 9, 24), (40, 24), (40,), (2, 9, 40)]
    inputs: list[Any] = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    inputs[2], inputs[3] = inputs[2] if biased else None, inputs[3] if added else None
    leaves = [x for x in inputs if x is not None]
    with nullcontext() if CUDA else interpreted():
        y = linear_gelu(*inputs)
        found = torch.autograd.grad(y, leaves, randn(2, 9, 40, seed=7))
    truth = F.gelu(F.linear(*inputs[:3])) + (inputs[3] if added else 0.0)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(found, torch.autograd.grad(truth, leaves, randn(2, 9, 40, seed=7)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_inference_writes_no_second_matrix() -> None:
    """Memory for a backward that will not come."""
    kept: list[Tensor] = []
    x, weight, residual = randn(4, 8), randn(16, 8), randn(4, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = linear_gelu(x, weight, None, residual)
    assert y.requires_grad
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_flops_are_counted() -> None:
    """MFU of zero; three products of a layer, one of them in the forward."""
    a, b = randn(4, 8).requires_grad_(), randn(8, 16).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        matmul(a, b).sum().backward()
        linear_gelu(a, b.t()).sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matmul(torch.ones(2, 3), torch.ones(2, 3)), r"pass \[M, K\] and \[K, N\]"),
        (lambda: matmul(torch.ones(2, 3), torch.ones(3, 2).half()), "one floating dtype"),
        (lambda: linear_gelu(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"must be \[4\] and \[2, 4\]"),
        (lambda: linear_gelu(torch.ones(2, 3), torch.ones(3, 4)), r"\[N, K\]"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], message: str) -> None:
    """Memory of another tensor read by a kernel."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()
