"""Advantages and losses of tokens, against the papers' numbers and autograd in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.rl.advantages import group_advantages
from trainer.rl.losses import importance_weights, kl_divergence, mean_over_sequences, policy_losses

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def test_advantages_of_a_group_are_those_of_the_papers() -> None:
    """The biased standard deviation, or a baseline with the completion itself in it where it has to be left out."""
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert group_advantages(rewards, kind="standardized") == pytest.approx(
        [1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4
    )
    assert group_advantages(rewards, kind="centered") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, kind="leave_one_out") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], rel=1e-15)
    others = [sum(rewards[:i] + rewards[i + 1 :]) / 3 for i in range(4)]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert group_advantages(rewards, kind="leave_one_out") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kind", ["standardized", "centered", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.1, 0.7, -1 / 3])
def test_equal_rewards_teach_exactly_nothing(kind: str, reward: float) -> None:
    """The mean of three times 0.1 is not 0.1: over a floor of 1e-4 that would be an update."""
    assert group_advantages([reward] * 3, kind=kind) == [0.0] * 3
    assert group_advantages([reward], kind=kind) == [0.0]


def tokens(n: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    new = (old + torch.randn(n, generator=generator, dtype=torch.float64) * 0.4).requires_grad_()
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    return new, old, advantages, torch.tensor([0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("kind", ["clip", "sequence_clip", "cispo"])
def test_on_policy_every_loss_has_the_gradient_of_reinforce(kind: str) -> None:
    """Ratios of 1, nothing clipped, d loss / d log pi = -A."""
    _, old, _, sequences = tokens()
    advantages = torch.tensor([1.5] * 3 + [-0.5] * 4, dtype=torch.float64)  # of a sequence's tokens there is one
    new = old.clone().requires_grad_()
    found = policy_losses(new, old, advantages, kind=kind, **CLIP, sequences=sequences, num_sequences=2)
    found.loss.sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantages, rtol=1e-12, atol=0)
    assert torch.equal(found.ratio, torch.ones_like(old))
    assert found.below.sum() == found.above.sum() == 0


def test_a_token_is_clipped_only_where_its_advantage_pushes_on() -> None:
    """Clipping that also keeps a policy from coming back; bounds that are the same on both sides."""
    ratios = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.25, 1.25, 0.85], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    new = ratios.log().requires_grad_()
    found = policy_losses(new, torch.zeros_like(ratios), advantages, kind="clip", **CLIP)
    found.loss.sum().backward()
    torch.testing.assert_close(found.loss, torch.tensor([-0.5, 0.8, -1.28, 1.5, -1.25, 1.25, 0.85]).double())
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([-0.5, 0.0, 0.0, 1.5, -1.25, 1.25, 0.85]).double())
    assert found.below.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert found.above.tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_dual_clip_bounds_what_a_bad_token_may_cost() -> None:
    """A token that has become a thousand times as probable as it was, with a negative advantage."""
    new = torch.tensor([math.log(1000.0), math.log(2.0)], dtype=torch.float64, requires_grad=True)
    found = policy_losses(new, torch.zeros(2).double(), -torch.ones(2).double(), kind="clip", **CLIP, dual_clip=3.0)
    found.loss.sum().backward()
    torch.testing.assert_close(found.loss, torch.tensor([3.0, 2.0]).double())
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, pytest.approx(2.0)]


def test_a_sequence_has_one_ratio() -> None:
    """GSPO against its formula, written out for each sequence."""
    new, old, _, sequences = tokens()
    advantages = torch.tensor([1.5] * 3 + [-0.5] * 4, dtype=torch.float64)
    found = policy_losses(new, old, advantages, kind="sequence_clip", **CLIP, sequences=sequences, num_sequences=2)
    weights = torch.tensor([1 / 3] * 3 + [1 / 4] * 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found.loss * weights).sum(), new)
    twin = new.detach().clone().requires_grad_()
    objective = twin.new_zeros(())
    for number, advantage in ((0, 1.5), (1, -0.5)):
        s = (twin - old)[sequences == number].mean().exp()
        objective = objective + torch.minimum(s * advantage, s.clamp(0.8, 1.28) * advantage)
    (expected,) = torch.autograd.grad(-objective, twin)
    torch.testing.assert_close((found.loss * weights).sum(), -objective, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_cispo_keeps_the_gradient_of_tokens_that_are_clipped() -> None:
    """The gradient of clip would be 0 there; that of cispo has the clipped ratio as a weight."""
    new = torch.tensor([math.log(4.0), math.log(0.1)], dtype=torch.float64, requires_grad=True)
    found = policy_losses(new, torch.zeros(2).double(), torch.tensor([2.0, -2.0]).double(), kind="cispo", **CLIP)
    found.loss.sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([-1.28 * 2, 0.8 * 2]).double())
    assert (found.above.tolist(), found.below.tolist()) == ([1, 0], [0, 1])


def test_importance_weights_are_exactly_one_where_the_sampler_agrees() -> None:
    """A correction that changes losses of rollouts that need none; weights without a bound; a gradient through them."""
    new, _, _, _ = tokens()
    assert torch.equal(importance_weights(new, new.detach(), cap=2.0), torch.ones(7, dtype=torch.float64))
    found = importance_weights(new, new.detach() - 1, cap=2.0)
    assert torch.equal(found, torch.full((7,), 2.0, dtype=torch.float64))
    assert not found.requires_grad
    torch.testing.assert_close(
        importance_weights(new, new.detach() + 0.1, cap=2.0), torch.full((7,), math.exp(-0.1)).double()
    )


def test_estimators_of_the_divergence_have_the_textbook_values_and_gradients() -> None:
    """k3 with its sign turned is no estimate of KL(pi || ref) at all."""
    one = torch.tensor([0.1], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    for kind, value in (("k1", 0.1), ("k2", 0.005), ("k3", 0.0048374)):
        assert kl_divergence(one, zero, kind=kind).item() == pytest.approx(value, rel=1e-5)
        assert kl_divergence(zero, zero, kind=kind).item() == 0.0
    # Exact expectations over a vocabulary of 5: values of all, and gradients of k2 and k3 as losses.
    generator = torch.Generator().manual_seed(1)
    logits, other = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(0), other.log_softmax(0)
    forward = (log_p.exp() * (log_p - log_q)).sum()
    backward = (log_q.exp() * (log_q - log_p)).sum()
    p = log_p.exp().detach()
    for kind, expected in (("k1", zero.sum() * logits.sum()), ("k2", forward), ("k3", backward)):
        (found,) = torch.autograd.grad((p * kl_divergence(log_p, log_q, kind=kind)).sum(), logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    for kind in ("k1", "k3"):
        estimate = (p * kl_divergence(log_p, log_q, kind=kind)).sum()
        torch.testing.assert_close(estimate, forward, rtol=1e-12, atol=0)


def test_a_mean_over_sequences_is_each_sequences_own() -> None:
    values, sequences = torch.tensor([1.0, 2.0, 6.0, 10.0]), torch.tensor([1, 1, 0, 1])
    torch.testing.assert_close(mean_over_sequences(values, sequences, 3), torch.tensor([13 / 3, 13 / 3, 6.0, 13 / 3]))
