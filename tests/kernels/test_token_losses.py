"""Losses and entropies of single tokens, and the gradient of each, against all logits in memory and against op.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import interpreted
from kernels.linear_cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    linear_token_losses,
    linear_token_losses_and_entropies,
)
from tests.pool import RankError, RankPool

ROWS, TOKENS, D, V = 3, 7, 5, 23  # words are uneven on 2 ranks and on 4


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, and a gradient for each loss and entropy [2, ROWS, TOKENS]."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, TOKENS, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (ROWS, TOKENS), generator=generator)
    labels[0, 2:4], labels[1] = -100, -100
    return hidden, weight, labels, torch.randn(2, ROWS, TOKENS, generator=generator)


def by_autograd(temperature: float, entropy: bool) -> list[Tensor]:
    """Losses, entropies and both gradients in fp64, by torch from all logits."""
    hidden, weight, labels, grads = inputs(torch.float64)
    log_p = F.log_softmax(hidden @ weight.T / temperature, -1)
    valid = labels != -100
    losses = torch.where(valid, -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0], 0.0)
    entropies = torch.where(valid, -(log_p.exp() * log_p).sum(-1), 0.0)
    (losses * grads[0] + entropies * grads[1] * entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [losses.detach(), entropies.detach(), hidden.grad, weight.grad]


def deviation(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


def of_ours(
    dtype: torch.dtype, chunk_tokens: int, temperature: float, entropy: bool, sharded: bool = False
) -> list[float]:
    """Deviations of losses, d_hidden and d_weight, and of entropies where asked for."""
    hidden, weight, labels, grads = inputs(dtype)
    rank, size, shard = 0, 1, None
    if sharded:
        rank, size = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        weight = weight.detach().chunk(size)[rank].clone().requires_grad_()
        shard = VocabularyShard(dist.group.WORLD, rank * -(-V // size))
    options = {"shard": shard, "chunk_tokens": chunk_tokens, "temperature": temperature}
    wanted = by_autograd(temperature, entropy)
    found = []
    if entropy:
        losses, entropies = linear_token_losses_and_entropies(hidden, weight, labels, **options)
        found.append(deviation(entropies.detach(), wanted[1]))
        (losses * grads[0] + entropies * grads[1]).sum().backward()
    else:
        losses = linear_token_losses(hidden, weight, labels, **options)
        (losses * grads[0]).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    d_hidden = hidden.grad.double()
    if sharded:
        dist.all_reduce(d_hidden)
    d_weight = wanted[3].chunk(size)[rank]
    return [
        *found,
        deviation(losses.detach(), wanted[0]),
        deviation(d_hidden, wanted[2]),
        deviation(weight.grad, d_weight),
    ]


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
)


@DTYPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(4, 0.7), (4096, 1.0)])
def test_losses_and_gradients_are_those_of_all_logits(
    dtype: torch.dtype, tolerance: float, entropy: bool, chunk_tokens: int, temperature: float
) -> None:
    """A token's gradient given to its neighbour, a chunk's to another, a temperature forgotten in backward."""
    assert max(of_ours(dtype, chunk_tokens, temperature, entropy)) <= tolerance


@pytest.mark.interpreter
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_compute_the_same(dtype: torch.dtype, entropy: bool) -> None:
    """A kernel that reads one factor for all rows."""
    with interpreted():
        assert max(of_ours(dtype, 4, 1.0, entropy)) <= (3e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("entropy", [False, True])
def test_words_over_ranks_change_nothing(ranks: RankPool, world_size: int, entropy: bool) -> None:
    """A maximum, a sum or a mean of some words only."""
    for deviations in ranks.run(world_size, of_ours, torch.float64, 4, 0.7, entropy, True):
        assert max(deviations) <= 1e-12


def test_they_add_up_to_the_sum_and_its_gradient() -> None:
    """Two definitions of a token's loss."""
    hidden, weight, labels, _ = inputs(torch.float32)
    total = linear_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(total, (hidden, weight))
    each = linear_token_losses(hidden, weight, labels)
    found = torch.autograd.grad(each.sum(), (hidden, weight))
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(found, wanted)
    assert not linear_token_losses(hidden.detach(), weight.detach(), labels).requires_grad


def test_small_gradients_survive_fp16() -> None:
    """d_logits of 1e-9 in fp16: zero, or noise, where nothing keeps them in range."""
    hidden, weight, labels, grads = inputs(torch.float16)
    losses = linear_token_losses(hidden, weight, labels)
    large = torch.autograd.grad(losses, (hidden, weight), grads[0] * 2.0**-4, retain_graph=True)
    small = torch.autograd.grad(losses, (hidden, weight), grads[0] * 2.0**-11)
    for a, b in zip(large, small, strict=True):
        assert deviation(b * 2.0**7, a.double()) < 1e-2


def test_uniform_logits_have_the_loss_and_entropy_ln_v() -> None:
    losses, entropies = linear_token_losses_and_entropies(torch.zeros(2, D), torch.ones(V, D), torch.tensor([3, V - 1]))
    expected = torch.full((2,), float(V)).log()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(entropies, expected)


def _with_an_impossible_label() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    labels[0, 0] = V
    assert dist.group.WORLD is not None
    linear_token_losses(hidden, weight.chunk(2)[dist.get_rank()], labels, shard=VocabularyShard(dist.group.WORLD, 0))


def test_what_cannot_be_computed_is_refused(ranks: RankPool) -> None:
    """A label that every rank takes for another's word; a temperature of 0."""
    with pytest.raises(RankError, match="a label is not in the vocabulary"):
        ranks.run(2, _with_an_impossible_label)
    hidden, weight, labels, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        linear_token_losses(hidden, weight, labels, temperature=0)
    with pytest.raises(TypeError, match="labels have dtype"):
        linear_token_losses(hidden, weight, labels.int())
