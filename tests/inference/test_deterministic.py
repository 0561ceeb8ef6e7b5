"""engine.deterministic: the same bits whatever the engine does, and those of the trainer's forward."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from data.batch import IGNORE_INDEX
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.sequence import Completion
from models.config import ModelConfig
from models.decoder import Decoder
from models.invariant import make_batch_invariant
from tests.inference.greedy import prompts_of, run_preempting
from tests.inference.test_features import combination
from tests.models.small import random_decoder
from tests.models.test_invariant import MODELS
from trainer.loss import token_losses

PROMPTS = prompts_of([1, 3, 8, 12, 23, 17], shared=5)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=6, ignore_eos=True, top_logprobs=2, prompt_logprobs=True)
Bits = list[list[float | None]]


def served(config: ModelConfig, device: str = "cpu", *, invariant: bool = True) -> Decoder:
    model = random_decoder(config).to(device, torch.bfloat16)
    if invariant:
        make_batch_invariant(model)
    return model


def bits(completions: list[Completion]) -> Bits:
    return [(completion.prompt_logprobs or [])[1:] + completion.logprobs for completion in completions]


def together(model: Decoder) -> list[Completion]:
    config = EngineConfig(block_size=16, deterministic=model.batch_invariant)
    return Engine(model, config).generate(PROMPTS, GREEDY)


def trained(model: Decoder, completions: list[Completion]) -> Bits:
    """By the trainer's forward and its loss, of a batch of all, padded."""
    device = next(model.parameters()).device
    rows = [prompt + completion.token_ids for prompt, completion in zip(PROMPTS, completions, strict=True)]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64, device=device)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row) - 1] = torch.tensor(row[1:])

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_losses(hidden, weight, labels, batch_invariant=model.batch_invariant)

    with torch.no_grad():
        losses = model(tokens, head=head).tolist()
    return [[-loss for loss in losses[i][: len(row) - 1]] for i, row in enumerate(rows)]


def assert_bits(model: Decoder, seed: int) -> None:
    """The same of a batch, of one that is preempted under any settings, of each prompt alone, and of the trainer."""
    expected = together(model)
    assert trained(model, expected) == bits(expected)
    config = combination(seed)
    config.deterministic = True
    assert bits(run_preempting(Engine(model, config), PROMPTS, GREEDY, seed=seed, late=2)) == bits(expected)
    alone = Engine(model, EngineConfig(block_size=1, max_sequences=1, max_batch_tokens=3, deterministic=True))
    assert bits([alone.generate([prompt], GREEDY)[0] for prompt in PROMPTS]) == bits(expected)


@cache
def model_of(name: str) -> Decoder:
    return served(MODELS[name])


@pytest.mark.some(6)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_have_the_same_bits_however_they_are_computed(name: str, seed: int) -> None:
    """A product, a norm, a tile of keys or a softmax that depends on the batch, on a chunk's edge, on a page, on what
    was cached, or on what was preempted."""
    assert_bits(model_of(name), seed + 2 * list(MODELS).index(name))


def test_an_ordinary_model_has_other_bits_in_a_trainer() -> None:
    """Negative control."""
    model = served(MODELS["llama"], invariant=False)
    completions = together(model)
    assert trained(model, completions) != bits(completions)


def test_a_cached_prefix_gives_the_bits_of_a_computed_one() -> None:
    """Keys of a chunk that are not those of a whole prompt."""
    model = model_of("llama")
    sampling = SamplingConfig(temperature=0.0, max_tokens=6, ignore_eos=True)
    engine = Engine(model, EngineConfig(block_size=4, deterministic=True))
    first = engine.generate(PROMPTS, sampling)
    cached = engine.counts.cached_tokens
    second = engine.generate(PROMPTS, sampling)
    assert engine.counts.cached_tokens > cached
    assert bits(first) == bits(second)


def test_drawn_tokens_do_not_depend_on_the_batch() -> None:
    """Rollouts that nobody can repeat."""
    model = model_of("llama")
    sampling = SamplingConfig(temperature=1.5, seed=3, max_tokens=6, top_p=0.9, repetition_penalty=1.1, top_logprobs=3)
    whole = Engine(model, EngineConfig(deterministic=True)).generate(PROMPTS, sampling)
    for prompt, completion in zip(PROMPTS, whole, strict=True):
        (alone,) = Engine(model, EngineConfig(deterministic=True, max_sequences=1)).generate([prompt], sampling)
        assert alone == completion
