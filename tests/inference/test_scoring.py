"""Likelihoods of texts against the whole model, token by token."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch

from inference.config import EngineConfig
from inference.engine import Engine
from inference.scoring import Likelihood, exp_or_inf, likelihood, score, sliding_windows
from tests.inference.greedy import prompts_of
from tests.models.small import random_decoder, tiny

MODEL = random_decoder(tiny()).double()
(TEXT,) = prompts_of([53])


def engine(**settings: object) -> Engine:
    settings = {"block_size": 4, "max_seq_len": 17, "max_batch_tokens": 64, "max_sequences": 8} | settings
    return Engine(MODEL, EngineConfig(**settings))  # type: ignore[arg-type]


def closed(tokens: list[int], *, window: int, stride: int) -> float:
    """What is defined: each token given as many of those before it as its window has."""
    total = 0.0
    for place in range(1, len(tokens)):
        ends_before = [b for b in range(0, len(tokens), stride) if b < place < b + window]
        if not ends_before:
            continue  # the first of a window that does not overlap
        context = tokens[ends_before[0] : place]
        with torch.no_grad():
            total -= float(MODEL(torch.tensor([context]))[0, -1].log_softmax(-1)[tokens[place]])
    return total


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 1), (16, 16), (7, 5), (2, 1)])
def test_a_likelihood_is_that_of_its_definition_however_it_is_batched(window: int, stride: int) -> None:
    """Tokens scored twice, or without their context; a mean of windows' means; padding that counts."""
    expected = closed(TEXT, window=window, stride=stride)
    for settings in ({}, {"max_sequences": 1}, {"max_batch_tokens": 9, "max_sequences": 3}, {"block_size": 16}):
        found = likelihood(engine(**settings), TEXT, window=window, stride=stride)
        assert found.nll == pytest.approx(expected, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(expected / len(found.scored)))
    assert found.bits_per_byte(100) == pytest.approx(expected / math.log(2) / 100)
    other = closed([*TEXT[:-1], (TEXT[-1] + 1) % 61], window=window, stride=stride)
    assert abs(other - expected) > 1e-3  # negative control: one token of 53


def test_windows_score_every_token_once_behind_enough_context() -> None:
    """The end of a text left out; a window without anything new; less context than was promised."""
    for length, window, stride in product((1, 2, 7, 8, 9, 30), (2, 5, 8), (1, 2, 5, 8)):
        if stride > window:
            continue
        cuts = list(sliding_windows(length, window=window, stride=stride))
        scored = Counter(place for cut in cuts for place in range(cut.scored, cut.end))
        missing = set(range(0, length, window)) if stride == window else {0}
        assert scored == Counter(set(range(length)) - missing)
        for cut in cuts:
            assert 0 <= cut.begin < cut.scored
            assert cut.end - cut.begin <= window
            assert cut.begin == 0 or cut.scored - cut.begin >= max(1, window - stride)
        assert cuts[-1].end == length


def test_what_cannot_be_scored_is_said() -> None:
    """A first token with a probability; NaN as a perplexity; an overflow in place of infinity."""
    with pytest.raises(ValueError, match="the first token of a sequence has no context"):
        score(engine(), [[1, 2, 3]], [3])
    broken = random_decoder(tiny(tie_embeddings=False)).double()
    with torch.no_grad():
        broken.embedding.weight[5] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="NaN"):
        score(Engine(broken, EngineConfig(block_size=4)), [[1, 5, 2]], [2])
    assert Likelihood(1e6, [1]).perplexity == math.inf
    assert exp_or_inf(1.0) == math.e
