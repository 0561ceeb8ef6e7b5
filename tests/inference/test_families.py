"""Every family, served: greedy tokens are those of transformers' generate, whichever features are on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from models.decoder import Decoder
from tests.inference.greedy import combination, prompts_of, run_preempting
from tests.inference.speculating import Scripted, speculating
from tests.models.oracle import CASES, ours, pair, theirs

DYNAMIC = "llama_ntk"  # its frequencies change with the length: nothing of it can be cached beyond the trained one
SERVED = [case for case in CASES if case != DYNAMIC]
MIXED = EngineConfig(block_size=4, num_blocks=9, host_blocks=9, max_sequences=3, max_batch_tokens=7, preemption="swap")
PLAIN = EngineConfig(
    num_blocks=2, max_sequences=1, max_batch_tokens=32, chunked_prefill=False, prefix_cache=False, overlap=False
)
SAMPLING = SamplingConfig(temperature=0, max_tokens=5)


def continued(reference: nn.Module, prompt: list[int]) -> list[int]:
    """What transformers makes of a prompt."""
    inputs = torch.tensor([prompt])
    mask = torch.ones_like(inputs)
    found = reference.generate(  # type: ignore[operator]
        inputs, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    return found[0, len(prompt) :].tolist()


def engines(model: Decoder, texts: list[list[int]], seed: int) -> Iterator[tuple[str, Engine]]:
    """Features off, all of some, any of them, and any of them with drafts, some of which stand."""
    yield "plain", Engine(model, PLAIN)
    yield "mixed", Engine(model, MIXED)
    yield "any", Engine(model, combination(seed))
    settings = combination(100 + seed)
    settings = replace(settings, max_batch_tokens=settings.max_batch_tokens + 8)  # room for drafts
    yield "drafting", speculating(model, settings, drafter=Scripted(texts, right=0.7, seed=seed), num_tokens=3)


@pytest.mark.parametrize("case", SERVED)
def test_greedy_tokens_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    """A position, window, scale or router that a cache gets wrong; chunks, shared blocks, swapping and drafts that do
    not stand included, by themselves and in combinations that are others for every family."""
    reference, model = pair(case, tmp_path)
    reference, model = reference.double(), model.double()
    prompts, seed = prompts_of([1, 8, 13], shared=5), SERVED.index(case)
    expected = [continued(reference, prompt) for prompt in prompts]
    for name, engine in engines(model, [p + rest for p, rest in zip(prompts, expected, strict=True)], seed):
        if name == "plain":
            completions = engine.generate(prompts, SAMPLING)
        else:
            completions = run_preempting(engine, prompts, SAMPLING, seed=0 if name == "mixed" else seed)
        assert [completion.token_ids for completion in completions] == expected, (name, engine.config)
        if name == "mixed":
            assert engine.counts.swapped > 0
        if name == "drafting":
            assert engine.counts.speculation is not None
            assert sum(engine.counts.speculation.drafted) > 0


def test_a_model_whose_rotations_depend_on_the_length_is_refused_beyond_the_trained_one(tmp_path: Path) -> None:
    """Cached keys turned by other frequencies than the queries that meet them."""
    theirs(DYNAMIC).save_pretrained(tmp_path)
    model = ours(tmp_path).double()
    original = model.config.rope.original_max_seq_len
    with pytest.raises(ValueError, match=f"engine.max_seq_len={original + 1} is above .*ntk turns all keys anew"):
        Engine(model, EngineConfig(max_seq_len=original + 1))
    assert Engine(model).runner.max_seq_len == original
