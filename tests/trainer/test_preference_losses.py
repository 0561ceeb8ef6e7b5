"""Losses of preferences and divergences against the values of their papers, and against TRL's functions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.preference_losses import LOSSES, log_odds, preference_losses, reward_losses

LENGTHS = torch.tensor([[4.0, 7.0], [1.0, 2.0], [9.0, 3.0]], dtype=torch.float64)
POLICY = -LENGTHS * torch.tensor([[1.3, 0.4], [0.2, 2.0], [0.7, 0.9]], dtype=torch.float64)
FROZEN = -LENGTHS * torch.tensor([[1.1, 0.6], [0.3, 1.0], [0.8, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("sigmoid", {}, math.log(2)),
        ("sigmoid", {"label_smoothing": 0.2}, math.log(2)),
        ("robust", {"label_smoothing": 0.2}, math.log(2)),
        ("hinge", {}, 1.0),
        ("ipo", {}, 1 / (4 * 0.3**2)),
    ],
)
def test_at_the_reference_a_loss_has_its_known_value(kind: str, settings: dict[str, Any], wanted: float) -> None:
    found = preference_losses(kind, POLICY, POLICY, LENGTHS, beta=0.3, **settings)
    torch.testing.assert_close(found, torch.full((3,), wanted, dtype=torch.float64))


def test_at_the_reference_the_gradient_is_half_of_beta() -> None:
    """A sign, or the answers the wrong way round."""
    policy = POLICY.clone().requires_grad_()
    preference_losses("sigmoid", policy, POLICY, LENGTHS, beta=0.3).sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.15, 0.15]], dtype=torch.float64).expand(3, 2))


def test_simpo_between_equal_answers_is_the_softplus_of_gamma() -> None:
    equal = -LENGTHS * 0.7
    found = preference_losses("simpo", equal, None, LENGTHS, beta=2.0, gamma=0.5)
    torch.testing.assert_close(found, torch.full((3,), math.log(1 + math.exp(0.5)), dtype=torch.float64))


def test_rewards_that_are_tied_cost_ln_2_and_only_differences_count() -> None:
    rewards = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])
    zero = torch.zeros(2)
    torch.testing.assert_close(reward_losses(rewards, zero), torch.full((2,), math.log(2)))
    uneven = torch.tensor([[1.0, 0.5], [-2.0, 3.0]])
    torch.testing.assert_close(reward_losses(uneven, zero), reward_losses(uneven + 5.0, zero))
    assert (reward_losses(uneven, zero, centering=0.1) < reward_losses(uneven + 5.0, zero, centering=0.1)).all()
    torch.testing.assert_close(reward_losses(uneven, zero + 0.5)[0], reward_losses(rewards, zero)[0])


def test_log_odds_stay_finite_where_an_answer_is_certain() -> None:
    """log (1 - p) of p = 1: a loss, or a gradient, that is not a number."""
    log_p = torch.tensor([0.0, -1e-12, -0.5, -50.0], dtype=torch.float64, requires_grad=True)
    found = log_odds(log_p)
    assert torch.isfinite(found).all()
    p = log_p[2:].detach().exp()
    torch.testing.assert_close(found[2:].detach(), (p / (1 - p)).log())
    found.sum().backward()
    assert torch.isfinite(log_p.grad).all()


def _of_trl(kind: str, policy: Tensor) -> Tensor:
    """simpo and orpo by TRL's own functions, of averages, as it calls them."""
    averages = policy / LENGTHS
    where = SimpleNamespace(device=torch.device("cpu"))
    if kind == "simpo":
        trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
        own = SimpleNamespace(
            alpha=0.0, loss_type="simpo", simpo_gamma=0.4, beta=1.5, label_smoothing=0.0, accelerator=where
        )
        return trainer.cpo_loss(own, *averages.unbind(-1))[0]
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    own = SimpleNamespace(beta=1.5, accelerator=where)
    return -trainer.odds_ratio_loss(own, *averages.unbind(-1))[0] / own.beta


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_losses_without_a_reference_are_those_of_trl(kind: str) -> None:
    gradients = []
    for of in (_of_trl, lambda _, p: preference_losses(kind, p, None, LENGTHS, beta=1.5, gamma=0.4)):
        policy = POLICY.clone().requires_grad_()
        losses = of(kind, policy)
        losses.sum().backward()
        gradients.append((losses.detach().double(), policy.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)  # TRL's orpo is in fp32


def test_smoothed_labels_are_those_of_trl_away_from_the_reference() -> None:
    """At D = 0 cDPO is ln 2 whatever is smoothed, or which way. TRL has it as a loss without a reference, of what is
    given: here of d."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    where = SimpleNamespace(device=torch.device("cpu"))
    own = SimpleNamespace(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.2, accelerator=where)
    gradients = []
    for of in (
        lambda p: trainer.cpo_loss(own, *(p - FROZEN).unbind(-1))[0],
        lambda p: preference_losses("sigmoid", p, FROZEN, LENGTHS, beta=0.3, label_smoothing=0.2),
        lambda p: preference_losses("sigmoid", p, FROZEN, LENGTHS, beta=0.3),  # the control
    ):
        policy = POLICY.clone().requires_grad_()
        losses = of(policy)
        losses.sum().backward()
        gradients.append((losses.detach().double(), policy.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(gradients[1][0], gradients[2][0], rtol=1e-2)


def test_every_loss_falls_as_the_chosen_answer_becomes_likelier() -> None:
    for kind in LOSSES:
        policy = FROZEN.clone().requires_grad_()
        reference = None if kind in ("simpo", "orpo") else FROZEN
        preference_losses(kind, policy, reference, LENGTHS, beta=0.1).sum().backward()
        assert policy.grad is not None
        assert (policy.grad[:, 0] < 0).all(), kind
        assert (policy.grad[:, 1] > 0).all(), kind
