"""Advantages by values, whitening, value losses and the KL coefficient: closed values, and TRL's formulas in fp64."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from trainer.rl.gae import (
    Moments,
    explained_variance,
    generalized_advantages,
    moments,
    next_coefficient,
    whitened,
)
from trainer.rl.losses import value_losses


def alone(value: Any) -> list[Any]:
    return [value]


def test_advantages_are_those_of_the_papers_example() -> None:
    """A value behind the end; a discount of the reward instead of what follows it."""
    found = generalized_advantages([0.0, 0.0, 1.0], [0.5] * 3, gamma=1.0, gae_lambda=0.95)
    assert found.advantages == pytest.approx([0.45125, 0.475, 0.5], rel=1e-15)
    assert found.returns == pytest.approx([0.95125, 0.975, 1.0], rel=1e-15)
    assert generalized_advantages([], [], gamma=1.0, gae_lambda=1.0).advantages == []


def test_the_ends_of_lambda_are_returns_less_values_and_differences_of_values() -> None:
    rewards, values, gamma = [0.3, -1.0, 2.0, 0.5], [0.1, 0.7, -0.4, 1.2], 0.9
    discounted = [sum(gamma ** (s - t) * rewards[s] for s in range(t, 4)) for t in range(4)]
    one = generalized_advantages(rewards, values, gamma=gamma, gae_lambda=1.0)
    assert one.returns == pytest.approx(discounted, rel=1e-14)
    zero = generalized_advantages(rewards, values, gamma=gamma, gae_lambda=0.0).advantages
    following = [*values[1:], 0.0]
    expected = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    assert zero == pytest.approx(expected, rel=1e-14)


def test_a_batch_of_completions_has_the_advantages_of_trls_loop() -> None:
    """Its loop over padded columns, whitening with a mask and all; completions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths, gamma, lam = [5, 1, 9, 3], 0.97, 0.9
    width = max(lengths)
    mask = torch.tensor([[t < n for t in range(width)] for n in lengths])
    rewards, values = (torch.randn(4, width, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    last, reversed_advantages = torch.zeros(4, dtype=torch.float64), []
    for t in reversed(range(width)):
        following = values[:, t + 1] if t < width - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + values
    mean = (advantages * mask).sum() / mask.sum()
    variance = ((advantages - mean).square() * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    white = (advantages - mean) * torch.rsqrt(variance + 1e-8)
    found = [
        generalized_advantages(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma=gamma, gae_lambda=lam)
        for i, n in enumerate(lengths)
    ]
    of_all = moments([a for each in found for a in each.advantages], alone)
    for i, n in enumerate(lengths):
        assert found[i].returns == pytest.approx(returns[i, :n].tolist(), rel=1e-12)
        assert whitened(found[i].advantages, of_all) == pytest.approx(white[i, :n].tolist(), rel=1e-10)
    assert of_all.size == sum(lengths)


def test_moments_of_ranks_are_those_of_all_numbers() -> None:
    """Means of means, of ranks that have different numbers of tokens; variances about a rank's own mean."""
    mine, theirs = [1.0, 2.0, 6.0], [10.0]
    whole = moments(mine + theirs, alone)
    sent = [(3, 9.0), (1, 10.0)], [sum((x - 4.75) ** 2 for x in mine), (10.0 - 4.75) ** 2]
    answers = iter(sent)
    assert moments(mine, lambda value: next(answers)) == pytest.approx(whole, rel=1e-14)
    assert (whole.mean, whole.variance) == pytest.approx((4.75, statistics.variance(mine + theirs)))
    assert moments([], alone) == Moments(0, 0.0, 0.0)
    assert whitened([3.0], moments([3.0], alone)) == [0.0]


def test_explained_variance_is_one_of_a_prophet_and_none_of_a_constant() -> None:
    returns = moments([1.0, 2.0, 4.0], alone)
    assert explained_variance(returns, moments([0.0, 0.0, 0.0], alone)) == 1.0
    assert explained_variance(returns, moments([0.5, 1.5, 3.5], alone)) == pytest.approx(0.0)
    assert explained_variance(moments([2.0, 2.0], alone), moments([1.0, 0.0], alone)) == 0.0


def test_a_values_loss_is_the_larger_of_clipped_and_not() -> None:
    """The smaller one, or a value clipped to the return: TRL's two lines, with the gradient by autograd."""
    generator = torch.Generator().manual_seed(2)
    old, returns = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    values = (old + 0.4 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    found = value_losses(values, old, returns, clip=0.2)
    clipped = torch.clamp(values, old - 0.2, old + 0.2)
    first, second = torch.square(values - returns), torch.square(clipped - returns)
    expected = 0.5 * torch.max(first, second)
    assert torch.allclose(found.loss, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.clipped.bool(), second > first)
    ours, theirs = (torch.autograd.grad(loss.sum(), values, retain_graph=True)[0] for loss in (found.loss, expected))
    assert torch.allclose(ours, theirs)
    assert (ours[found.clipped.bool()] == 0).all()
    assert 0 < found.clipped.mean() < 1
    free = value_losses(values, old, returns, clip=0.0)
    assert torch.equal(free.loss, first / 2)
    assert not free.clipped.any()


def test_values_that_moved_by_less_are_not_clipped() -> None:
    """In fp32, where some of them would be by rounding alone."""
    generator = torch.Generator().manual_seed(3)
    old, values = (0.1 * (2 * torch.rand(5000, generator=generator) - 1) for _ in range(2))
    returns = torch.randn(5000, generator=generator)
    assert not value_losses(values, old, returns, clip=0.2).clipped.any()
    by_rounding = (old + (values - old).clamp(-0.2, 0.2) - returns).square() > (values - returns).square()
    assert by_rounding.sum() > 10


def test_the_coefficient_follows_the_divergence() -> None:
    """1909.08593, section 2.2: the error is clipped at 0.2 on both sides."""
    kind: dict[str, float] = {"target": 6.0, "gain": 0.1}
    assert next_coefficient(0.5, 6.0, **kind) == 0.5
    assert next_coefficient(0.5, 6.6, **kind) == pytest.approx(0.5 * 1.01)
    assert next_coefficient(0.5, 60.0, **kind) == pytest.approx(0.5 * 1.02)
    assert next_coefficient(0.5, -1.0, **kind) == pytest.approx(0.5 * 0.98)
    assert next_coefficient(0.5, 60.0, target=None, gain=0.1) == 0.5
