"""What a step of policy gradients minimises: every loss by every normalisation, against the formulas in fp64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.groups import NO_GROUPS
from trainer.rl.config import LOSSES, NORMALIZATIONS, RLConfig
from trainer.rl.objective import PolicyObjective
from trainer.rl.packing import rollout_batches
from trainer.rl.rollouts import Rollout

WORDS, WIDTH, CONSTANT = 50, 16, 20
AWAY = 0.1  # of the reference from the sampler, in nats
SETTINGS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "kl_weight": 0.3, "entropy_weight": 0.1}
PACKED = ((1, 14), (2, 40), (9, 64))  # rows of a micro-batch, and tokens of a row


@pytest.fixture(scope="module")
def model() -> tuple[Tensor, Tensor]:
    """Of bigrams: (hidden state of each word, head)."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64)
    return states, torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64) * 0.5


@pytest.fixture(scope="module")
def rollouts(model: tuple[Tensor, Tensor]) -> list[Rollout]:
    """Of one or two turns; sampler, older policy and policy each say something else of their tokens."""
    drawn, found = random.Random(0), []

    def words(least: int, most: int) -> list[int]:
        return [drawn.randrange(WORDS) for _ in range(drawn.randint(least, most))]

    for number, sample in itertools.product(range(5), range(3)):
        tokens, spans = words(1, 4), []
        for turn in range(drawn.randint(1, 2)):
            tokens += words(2, 2) if turn else []  # of an environment
            begin = len(tokens)
            tokens += words(1, 5)
            spans.append((begin, len(tokens)))
        rollout = Rollout(number, sample, tokens, spans, [], "stop", reward=0.0, advantage=drawn.gauss(0, 1))
        true = said(rollout, *model)[0].tolist()
        rollout.logprobs, rollout.old = ([value + drawn.gauss(0, 0.3) for value in true] for _ in range(2))
        found.append(rollout)
    return found


def said(rollout: Rollout, states: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the generated tokens, and entropies where they were drawn."""
    logprobs = (states[torch.tensor(rollout.tokens[:-1])] @ head.T).log_softmax(-1)
    places = torch.tensor([place for begin, end in rollout.spans for place in range(begin, end)])
    rows = logprobs[places - 1]
    return rows.gather(1, torch.tensor(rollout.tokens)[places, None])[:, 0], -(rows.exp() * rows).sum(1)


def written_out(config: RLConfig, rollouts: list[Rollout], states: Tensor, head: Tensor) -> Tensor:
    """The objective, completion by completion."""
    generated = sum(rollout.num_generated for rollout in rollouts)
    total = head.new_zeros(())
    for rollout in rollouts:
        logprobs, entropies = said(rollout, states, head)
        # In fp32, as batches hold them.
        old, sampler = (torch.tensor(values).double() for values in (rollout.old, rollout.logprobs))
        advantage = torch.tensor(rollout.advantage).double()
        ratio = (logprobs - old).exp()
        if config.loss == "sequence_clip":
            ratio = (logprobs - old).mean().exp().expand_as(logprobs)
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.loss == "cispo":
            gain = clipped.detach() * advantage * logprobs
        else:
            gain = torch.minimum(ratio * advantage, clipped * advantage)
        if config.dual_clip and advantage < 0:
            gain = torch.maximum(gain, config.dual_clip * advantage)
        corrected = gain
        if config.importance_cap:
            corrected = (old - sampler).exp().clamp(max=config.importance_cap) * gain
        away = (sampler.float() - AWAY).double() - logprobs
        tokens = -corrected + config.kl_weight * (away.exp() - 1 - away)
        total = (
            total
            + {
                "sequence": tokens.mean() / len(rollouts),
                "token": tokens.sum() / generated,
                "constant": tokens.sum() / CONSTANT / len(rollouts),
            }[config.normalization]
        )
        total = total - config.entropy_weight * entropies.sum() / generated
    return total


def summed(config: RLConfig, rollouts: list[Rollout], states: Tensor, head: Tensor, rows: int, length: int) -> Tensor:
    """The same as a step computes it: sums of micro-batches by the counts of all."""
    objective = PolicyObjective(
        config, device="cpu", vocabulary=None, batch_invariant=False, groups=NO_GROUPS, token_groups=[]
    )
    packed = rollout_batches(
        rollouts, seq_len=length, micro_batch_size=rows, normalization=config.normalization, constant=CONSTANT
    )
    batches = []
    for batch in (one.batch for one in packed):
        learned = batch.columns["weight"] != 0
        batches.append(batch.with_columns(reference=torch.where(learned, batch.columns["sampler"] - AWAY, 0.0)))
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    sums = torch.stack([objective.head(batch)(states[batch.tokens], head) for batch in batches]).sum(0)
    return (sums * (objective.weights.double() / counts)).sum()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_its_formula_however_it_is_packed(
    model: tuple[Tensor, Tensor], rollouts: list[Rollout], loss: str, normalization: str
) -> None:
    """A ratio of another completion's tokens, a weight by what stands beside it, a term that is divided by the wrong
    count; ratios that no run of one update has."""
    states, head = model[0], model[1].clone().requires_grad_()
    variants: list[dict[str, Any]] = [{}, {"importance_cap": 0.0}, *([{"dual_clip": 1.3}] if loss == "clip" else [])]
    gradients = []
    for changes in variants:
        config = RLConfig(loss=loss, normalization=normalization, **SETTINGS | changes)
        (wanted,) = torch.autograd.grad(written_out(config, rollouts, states, head), head)
        gradients.append(wanted)
        for rows, length in PACKED:
            (found,) = torch.autograd.grad(summed(config, rollouts, states, head, rows, length), head)
            # Weights, such as 1/3, are fp32 in a batch.
            assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max(), (changes, rows, length)
    # The controls: each setting is felt.
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() > 1e-3 * other.abs().max()


def test_losses_and_normalizations_differ(model: tuple[Tensor, Tensor], rollouts: list[Rollout]) -> None:
    """The control of the one above: formulas that are all the same."""
    states, head = model[0], model[1].clone().requires_grad_()
    found = []
    for loss, normalization in itertools.product(LOSSES, NORMALIZATIONS):
        config = RLConfig(loss=loss, normalization=normalization, **SETTINGS)
        found.append(torch.autograd.grad(written_out(config, rollouts, states, head), head)[0])
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3 * one.abs().max()
