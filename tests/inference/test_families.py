"""Every family, served: greedy tokens are those of transformers' generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from tests.inference.greedy import prompts_of, run_preempting
from tests.models.oracle import CASES, ours, pair, theirs

DYNAMIC = "llama_ntk"  # its frequencies change with the length: nothing of it can be cached beyond the trained one
MIXED = EngineConfig(block_size=4, num_blocks=9, host_blocks=9, max_sequences=3, max_batch_tokens=7, preemption="swap")


@pytest.mark.parametrize("case", [case for case in CASES if case != DYNAMIC])
def test_greedy_tokens_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    """A position, window, scale or router that a cache gets wrong; chunks, shared blocks and swapping included."""
    reference, model = pair(case, tmp_path)
    reference, model = reference.double(), model.double()
    prompts = prompts_of([1, 8, 13], shared=5)
    engine = Engine(model, MIXED)
    for prompt, completion in zip(
        prompts, run_preempting(engine, prompts, SamplingConfig(temperature=0, max_tokens=5)), strict=True
    ):
        inputs = torch.tensor([prompt])
        expected = reference.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
    assert engine.counts.swapped > 0


def test_a_model_whose_rotations_depend_on_the_length_is_refused_beyond_the_trained_one(tmp_path: Path) -> None:
    """Cached keys turned by other frequencies than the queries that meet them."""
    theirs(DYNAMIC).save_pretrained(tmp_path)
    model = ours(tmp_path).double()
    original = model.config.rope.original_max_seq_len
    with pytest.raises(ValueError, match=f"engine.max_seq_len={original + 1} is above .*ntk turns all keys anew"):
        Engine(model, EngineConfig(max_seq_len=original + 1))
    assert Engine(model).runner.max_seq_len == original
