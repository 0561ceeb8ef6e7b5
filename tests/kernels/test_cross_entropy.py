"""Cross entropy: what the generic tests cannot say of the loss in place, of shards, and inside the linear head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import interpreted
from kernels.cross_entropy import (
    combine_shards,
    cross_entropy,
    cross_entropy_in_place,
    loss_and_gradient_,
    shard_gradient_,
    shard_statistics,
)
from kernels.linear_cross_entropy import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
N, V = 7, 1031


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _both(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "reference" and CUDA:
        pytest.skip("the kernel is what runs on CUDA")
    with interpreted() if request.param == "kernel" and not CUDA else nullcontext():
        yield


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(N, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[2] = -100
    return logits.to(DEVICE), labels.to(DEVICE)


def by_torch(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum by torch in fp64."""
    x = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_losses_and_gradients_are_those_of_torch(smoothing: float) -> None:
    """A smoothing that counts the label twice."""
    logits, labels = problem()
    expected, gradient = by_torch(logits, labels, smoothing)
    logits.requires_grad_()
    losses = cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    (d_logits,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(d_logits.double(), gradient, rtol=1e-5, atol=1e-7)


def test_the_z_loss_is_the_square_of_the_log_of_the_sum() -> None:
    """A derivative without its factor 2."""
    logits, labels = problem()
    x = logits.double().requires_grad_()
    extra = 0.01 * (x.logsumexp(-1) ** 2 * (labels != -100)).sum()
    expected = by_torch(logits, labels)[1] + torch.autograd.grad(extra, x)[0]
    logits.requires_grad_()
    losses = cross_entropy(logits, labels, z_loss=0.01)
    torch.testing.assert_close(losses.sum().double(), by_torch(logits, labels)[0].sum() + extra, rtol=1e-6, atol=0)
    (d_logits,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(d_logits.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_in_place_the_gradient_takes_the_place_of_the_logits(factor: float) -> None:
    """A second tensor of that size; a gradient of the losses that is left out, or multiplied in twice."""
    logits, labels = problem()
    expected, gradient = by_torch(logits, labels)
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    losses = cross_entropy_in_place(x, labels, scale=torch.tensor(0.25, device=DEVICE))
    torch.testing.assert_close(losses.double(), 0.25 * expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(x.detach().double(), 0.25 * gradient, rtol=1e-5, atol=1e-7)
    loss = factor * losses.sum()
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), factor * 0.25 * gradient, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="can run once"):
        loss.backward()


def test_in_place_autograd_refuses_whoever_still_wants_the_logits() -> None:
    """A silently wrong gradient of another use of the logits."""
    logits, labels = problem()
    x = logits.clone().requires_grad_() * 1.0
    other = x.square().sum()
    loss = cross_entropy_in_place(x, labels).sum() + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits() -> None:
    """Evaluation that destroys what it is given."""
    logits, labels = problem()
    before = logits.clone()
    losses = cross_entropy_in_place(logits, labels)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), by_torch(logits, labels)[0], rtol=1e-6, atol=1e-5)


def test_words_that_are_ruled_out() -> None:
    """-inf - -inf, which is NaN: a column of a tile without a finite logit."""
    logits, labels = problem()
    logits[:, 100:] = -torch.inf
    labels = torch.where(labels == -100, labels, labels % 100)
    expected, gradient = by_torch(logits, labels)
    x = logits.clone()
    losses = loss_and_gradient_(x, labels, scale=torch.ones((), device=DEVICE))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(x.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(value: float) -> None:
    """A maximum that skips NaN, after which training goes on."""
    logits, labels = problem()
    logits[0, 5] = value
    losses = cross_entropy(logits, labels)
    assert not bool(losses[0].isfinite())
    assert bool(losses[1:].isfinite().all())


def test_shards_make_the_whole() -> None:
    """A maximum of one shard used for all; a label counted by two ranks or by none."""
    logits, labels = problem()
    expected, gradient = by_torch(logits, labels)
    cuts = [0, 400, 401, V]
    shards = [(first, logits[:, first:last].contiguous()) for first, last in pairwise(cuts)]
    statistics = torch.stack([shard_statistics(shard, labels, first=first) for first, shard in shards])
    lse, at_label, ranks = combine_shards(statistics)
    valid = labels != -100
    assert torch.equal(ranks, valid.to(ranks.dtype))
    losses = torch.where(valid, lse - at_label, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    for first, shard in shards:
        shard_gradient_(shard, labels, lse, first=first, scale=torch.tensor(2.0, device=DEVICE))
    whole = torch.cat([shard for _, shard in shards], dim=1)
    torch.testing.assert_close(whole.double(), 2 * gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_the_linear_head_with_the_kernel_is_the_one_without(dtype: torch.dtype, grad: bool) -> None:
    """A scale applied to the loss as well, or a chunk's logits used after they became a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
    weight = torch.randn(123, 16, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
    labels = torch.randint(123, (11,), generator=generator).to(DEVICE)
    labels[3] = -100
    results = []
    for triton in (False, True):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4, triton=triton)
        results.append((loss, *(torch.autograd.grad(3 * loss, (hidden, weight)) if grad else ())))
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def test_what_cannot_work_is_refused() -> None:
    """A label read from beyond its row."""
    logits, labels = problem()
    if not CUDA:  # there it ends the process's use of the device
        with pytest.raises((RuntimeError, IndexError)):
            cross_entropy(logits, torch.where(labels == -100, V, labels))
    with pytest.raises(ValueError, match="logits are not contiguous"):
        cross_entropy_in_place(logits.T.contiguous().T, labels)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        cross_entropy(logits, labels, label_smoothing=1.5)
    with pytest.raises(TypeError, match=r"labels torch\.int32"):
        cross_entropy(logits, labels.int())
