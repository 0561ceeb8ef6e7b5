"""Speculative sampling has the distribution of the model: chi-square against it, and against rules that are wrong."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from inference.config import EngineConfig, SamplingConfig
from inference.sampling import SHIFT, OnHost, Settings
from inference.speculation import rejection
from inference.speculation.rejection import DRAFT_STREAMS, keep_or_draw, propose
from inference.speculation.runner import SpeculativeRunner
from kernels.sampling import draw
from models.decoder import Decoder
from tests.inference.speculating import speculating
from tests.inference.test_sampling import chi_square
from tests.models.small import random_decoder, tiny

N = 40_000
P = torch.tensor([0.3, 0.0, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64)
Q = torch.tensor([0.1, 0.05, 0.4, 0.0, 0.15, 0.05, 0.05, 0.1, 0.1], dtype=torch.float64)
INDEX = torch.arange(N) << SHIFT
LIMIT = 29.9
"""Chi-square of 7 degrees of freedom stays below it with 99.99%."""


def drafted(q: Tensor) -> Tensor:
    return draw(q.expand(N, -1), INDEX, DRAFT_STREAMS)


def test_what_is_kept_or_drawn_has_the_distribution_of_the_model() -> None:
    """A residual that is p, drafts that always stand, one random number for both; p and q unlike, alike and equal."""
    for q in (Q, P, 0.9 * P + 0.1 * Q, torch.full_like(P, 1 / 9)):
        drafts = drafted(q)
        found = keep_or_draw(3.0 * P.expand(N, -1), INDEX, drafts=drafts, q=q.expand(N, -1))
        counts = found.bincount(minlength=9).double()
        assert counts[1] == 0
        assert chi_square(counts, P) < LIMIT
        overlap = float(torch.minimum(P, q).sum())
        stood = float((found == drafts).double().mean())
        assert stood == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / N) ** 0.5)


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: what is left drawn from p, and every draft taken."""
    drafts = drafted(Q)
    stands = keep_or_draw(P.expand(N, -1), INDEX, drafts=drafts, q=Q.expand(N, -1)) == drafts
    wrong = torch.where(stands, drafts, draw(P.expand(N, -1), INDEX))
    for found in (wrong, drafts):
        assert chi_square(found.bincount(minlength=9).double(), P.clamp(min=1e-9)) > LIMIT


def test_rows_without_a_draft_are_drawn_as_ever() -> None:
    """The last token of a step, or one of a request that does not speculate, by another rule."""
    none = torch.full((N,), -1)
    found = keep_or_draw(P.expand(N, -1), INDEX, drafts=none, q=torch.zeros(N, 9, dtype=torch.float64))
    assert torch.equal(found, draw(P.expand(N, -1), INDEX))


def test_a_drafter_says_what_it_drew_from() -> None:
    """Filters or a temperature in the draw that are not in q: acceptance would be by another distribution."""
    logits = 2.0 * torch.randn(1, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(N, -1)
    settings = Settings(
        temperature=torch.full((N,), 0.7),
        top_k=torch.full((N,), 6),
        top_p=torch.full((N,), 0.9),
        min_p=torch.full((N,), 0.01),
        draw=INDEX,
        random=True,
        filtered=True,
        penalties=None,
        allowed=None,
        on_host=OnHost(plain=[False] * N, top_logprobs=[0] * N, tempered=[1.0] * N),
    )
    tokens, q = propose(logits, settings, sampled=True)
    assert q is not None
    assert chi_square(tokens.bincount(minlength=9).double(), q[0]) < LIMIT
    greedy, none = propose(logits, settings, sampled=False)
    assert none is None
    assert torch.equal(greedy, logits.argmax(-1))


V, LENGTH = 5, 3
SAMPLING = SamplingConfig(temperature=0.9, top_k=4, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=LENGTH)


@torch.no_grad()
def joint(model: Decoder, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of every continuation, by the whole model and arithmetic of our own."""
    found = {}
    for tokens in product(range(V), repeat=LENGTH):
        p = 1.0
        for place, token in enumerate(tokens):
            before = list(tokens[:place])
            logits = model(torch.tensor([prompt + before]))[0, -1].tolist()
            for t in range(V):
                if t in prompt + before:
                    logits[t] = logits[t] / 1.2 if logits[t] > 0 else logits[t] * 1.2
                logits[t] -= 0.3 * before.count(t)
            kept = sorted(range(V), key=lambda t: -logits[t])[:4]
            p *= float(torch.tensor([logits[t] / 0.9 if t in kept else -1e9 for t in range(V)]).softmax(-1)[token])
        found[tokens] = p
    return found


def misfit(engine_config: EngineConfig, requests: int) -> float:
    """How many standard deviations chi-square is above its mean, of the engine's continuations of one prompt."""
    model, draft = (random_decoder(tiny(vocab_size=V, num_layers=layers)).double() for layers in (2, 1))
    prompt = [1, 3, 2]
    engine = speculating(model, engine_config, draft_model=draft, drafts="sampled", num_tokens=2)
    found = Counter(tuple(c.token_ids) for c in engine.generate([prompt] * requests, SAMPLING))
    assert isinstance(engine.runner, SpeculativeRunner)
    acceptance = engine.runner.policy.counts.acceptance
    assert 0.2 < min(acceptance) <= max(acceptance) < 0.9
    cells = sorted(joint(model, prompt).items(), key=lambda cell: cell[1])
    expected = observed = chi = 0.0
    degrees = -1
    for tokens, p in cells:  # the rarest together, until they are enough
        expected, observed = expected + p * requests, observed + found[tokens]
        if expected >= 8 or tokens == cells[-1][0]:
            chi, degrees = chi + (observed - expected) ** 2 / expected, degrees + 1
            expected = observed = 0.0
    return (chi - degrees) / (2 * degrees) ** 0.5


CONFIG = EngineConfig(block_size=2, max_sequences=128, max_batch_tokens=1024, num_blocks=2048)


def test_continuations_of_an_engine_have_the_joint_distribution_of_the_model() -> None:
    """Drafts of later places verified as if they had the penalties of the first, or a random number that two places
    share: each token alone may look right."""
    assert misfit(CONFIG, 1500) < 4.0


def test_a_wrong_residual_in_the_engine_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""

    def wrong(p: Tensor, index: Tensor, *, drafts: Tensor, q: Tensor) -> Tensor:
        found = keep_or_draw(p, index, drafts=drafts, q=q)
        return torch.where(found == drafts, found, draw(p, index))

    monkeypatch.setattr("inference.speculation.runner.keep_or_draw", wrong)
    assert rejection.keep_or_draw is keep_or_draw
    assert misfit(CONFIG, 1500) > 6.0
