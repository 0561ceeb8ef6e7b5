"""Routers and experts against definitions written out with loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.layers.moe import Experts, MoE
from models.layers.router import REPORT, Router, balance_loss, capacity_of, queue_position
from models.moe_config import MoEConfig, RoutingConfig
from tests.models.small import tiny

B, T, E = 3, 11, 5


def config_of(moe: dict[str, Any] | None = None, **routing: float) -> ModelConfig:
    experts = replace(MoEConfig(num_experts=E, top_k=2, intermediate_size=7), **(moe or {}))
    return tiny(moe=experts, routing=RoutingConfig(**routing))


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(B, T, 24, generator=torch.Generator().manual_seed(seed))


def random_(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def test_a_queue_takes_first_choices_first_and_then_goes_by_token() -> None:
    """Second choices of early tokens that push out first choices of late ones; a queue shared by sequences."""
    experts = torch.randint(0, E + 1, (B, T, 2), generator=torch.Generator().manual_seed(2))
    found = queue_position(experts, E)
    for b in range(B):
        length = dict.fromkeys(range(E + 1), 0)
        for choice in range(2):
            for t in range(T):
                expert = int(experts[b, t, choice])
                assert found[b, t, choice] == length[expert]
                length[expert] += 1


def test_an_expert_takes_at_most_its_capacity_of_each_sequence_in_training_only() -> None:
    """A capacity of the micro-batch, and a validation that drops tokens because of later ones."""
    router = random_(Router(config_of(capacity_factor=0.7), 0, 0))
    capacity = capacity_of(T, E, 2, 0.7)
    assert capacity == 4  # 0.7 * 2 * 11 / 5 = 3.08
    experts = router(hidden(), None).experts
    counts = torch.stack([torch.bincount(row.flatten(), minlength=E + 1) for row in experts])
    assert counts[:, :E].max() == capacity
    assert counts[:, E].sum() > 0
    one_by_one = torch.cat([router(row[None], None).experts for row in hidden()])
    assert torch.equal(one_by_one, experts)
    assert router.eval()(hidden(), None).experts.max() < E


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_losses_of_a_sequence_are_those_of_the_formulas(kind: str) -> None:
    """A mean over the wrong tokens; a loss that is not 1 under perfect balance."""
    router = random_(Router(config_of({"router": kind}, aux_weight=0.3, z_weight=0.2), 0, 0))
    x = hidden()
    routing = router(x, None)
    logits = x @ router.weight.T
    scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    expected = torch.zeros(())
    for b in range(B):
        for e in range(E):
            f = E / (2 * T) * (routing.experts[b] == e).sum()
            expected = expected + 0.3 * f * (scores[b, :, e] / scores[b].sum(-1)).mean()
        expected = expected + 0.2 * logits[b].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(routing.loss, expected)
    grads = [torch.autograd.grad(loss, router.weight)[0] for loss in (routing.loss, expected)]
    torch.testing.assert_close(*grads)
    even = torch.full((1, T, E), 1 / E)
    torch.testing.assert_close(balance_loss(even, torch.full((1, E), 2 * T / E), 2, T), torch.ones(1))


def test_the_bias_moves_choices_but_not_weights_and_stays_fp32() -> None:
    """A bias that leaks into the weights (and gets a gradient), or that bf16 rounds to a standstill."""
    router = random_(Router(config_of({"router": "sigmoid", "normalize": False}), 0, 0)).to(torch.bfloat16)
    assert router.bias.dtype == torch.float32
    router.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0, -9.0]))
    routing = router(hidden(), None)
    assert (routing.experts == 1).any(-1).all()
    assert not (routing.experts == 4).any()
    assert routing.weights.max() < 1


def test_groups_confine_the_choice() -> None:
    """Experts outside the best groups that are chosen all the same."""
    config = config_of({"num_experts": 6, "num_groups": 3, "top_groups": 1})
    experts = random_(Router(config, 0, 0))(hidden(), None).experts
    assert torch.equal(experts[..., 0] // 2, experts[..., 1] // 2)


def test_gshard_draws_the_second_choice_by_its_weight_and_by_sample() -> None:
    """A draw that depends on where a sample lies in the batch, or that never happens."""
    config = config_of({"router": "gshard"})
    router = random_(Router(config, 0, 3))
    samples = torch.tensor([4, 9, 2])
    routing = router(hidden(), samples)
    assert (routing.experts[..., 0] < E).all()
    dropped = routing.experts[..., 1] == E
    assert 0 < dropped.sum() < dropped.numel()
    assert routing.weights[..., 1][dropped].mean() < routing.weights[..., 1][~dropped].mean()
    flipped = router(hidden().flip(0), samples.flip(0))
    assert torch.equal(flipped.experts.flip(0), routing.experts)
    with pytest.raises(ValueError, match="sample number"):
        router(hidden(), None)


def test_experts_compute_what_a_loop_over_tokens_does() -> None:
    """A permutation applied twice, a weight given to the other choice, a dropped choice that still counts."""
    config = config_of()
    experts = random_(Experts(config)).double()
    generator = torch.Generator().manual_seed(5)
    x = hidden().flatten(0, 1).double().requires_grad_()
    chosen = torch.stack([torch.randperm(E + 1, generator=generator)[:2] for _ in range(B * T)])
    weights = torch.rand(B * T, 2, generator=generator, dtype=torch.float64).requires_grad_()
    rows = []
    for n in range(B * T):
        row = torch.zeros(24, dtype=torch.float64)
        for choice in range(2):
            e = int(chosen[n, choice])
            if e < E:
                gate, up, down = (getattr(experts, name).weight[e] for name in ("gate", "up", "down"))
                row = row + weights[n, choice] * (down @ (torch.nn.functional.silu(gate @ x[n]) * (up @ x[n])))
        rows.append(row)
    expected, (actual, left_over) = torch.stack(rows), experts(x, chosen, weights)
    assert left_over == 0
    torch.testing.assert_close(actual, expected)
    inputs = [x, weights, *experts.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)  # to 1e-7


def test_the_scale_of_the_auxiliary_loss_is_a_gradient_and_changes_no_value() -> None:
    """An auxiliary loss that is added to the activations, or whose scale is applied twice or not at all."""
    moe = random_(MoE(config_of(aux_weight=0.5), 0, 0))
    x = hidden()
    plain, _ = moe(x, samples=None, aux_scale=None)
    scaled, report = moe(x, samples=None, aux_scale=torch.tensor(0.25))
    assert torch.equal(plain, scaled)
    grads = [torch.autograd.grad(y.sum(), moe.router.weight)[0] for y in (plain, scaled)]
    (alone,) = torch.autograd.grad(moe.router(x, None).loss, moe.router.weight)
    torch.testing.assert_close(grads[1] - grads[0], 0.25 * alone)
    assert report.shape == (E + len(REPORT),)
    assert report[:E].sum() == B * T * 2
