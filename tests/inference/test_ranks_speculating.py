"""Speculation where the model is cut over tp: the tokens of one process, and ranks that decide alike."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout
from inference.ranks import Channel
from inference.sequence import Completion
from inference.speculation.config import SpeculationConfig, problems_over_ranks
from models.config import ModelConfig
from tests.inference import on_ranks
from tests.inference.greedy import prompts_of
from tests.inference.speculating import speculating
from tests.inference.test_ranks import SWAPPING, even
from tests.models.small import random_decoder
from tests.pool import RankPool

LAYOUT = ServingLayout(tp=2)
PROMPTS = [*prompts_of([1, 3, 9, 12, 17], shared=6), [5, 6, 5, 6, 5, 6, 5]]
SAMPLINGS = [
    SamplingConfig(temperature=0.0, max_tokens=25),  # it is aborted
    SamplingConfig(temperature=1.0, seed=3, max_tokens=7),
    SamplingConfig(temperature=0.7, top_p=0.8, max_tokens=9),
    SamplingConfig(temperature=0.9, top_k=9, repetition_penalty=1.2, max_tokens=8),
    SamplingConfig(temperature=0.0, max_tokens=10),
    SamplingConfig(temperature=0.0, max_tokens=10),
]


def served_with_drafts(
    config: ModelConfig, settings: EngineConfig, drafting: dict[str, Any], layout: ServingLayout | None
) -> dict[int, Completion] | int:
    """As on_ranks.led, with drafts; the drafts of ranks but the first are others. layout None: one process."""
    whole = random_decoder(config).double()
    draft = None
    channel = None if layout is None else Channel()
    if drafting["method"] == "draft":
        draft = random_decoder(config).double()
        with torch.no_grad():  # right now and then; on other ranks as if it rounded very much otherwise
            noise = torch.Generator().manual_seed(1 if channel is None else 1 + channel.rank)
            for parameter in draft.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    model = whole if layout is None else on_ranks.shards_of(whole, layout)
    engine = speculating(model, settings, draft_model=draft, **drafting)
    engine.channel = channel
    if channel is None or channel.leads:
        done = on_ranks.ask(engine, PROMPTS, SAMPLINGS)
        if channel is not None:
            channel.tell(None)
        return done
    steps = 0
    while (orders := channel.hear()) is not None:
        engine.follow(orders)
        steps += 1
    return steps


DRAFTING = {
    "ngram": {"method": "ngram", "ngram_max": 2, "num_tokens": 3},
    "draft": {"method": "draft", "num_tokens": 3},
    "sampled": {"method": "draft", "num_tokens": 3, "drafts": "sampled", "max_batch": 3},
}


@pytest.mark.parametrize("name", DRAFTING)
def test_drafts_over_ranks_give_the_tokens_of_one_process(ranks: RankPool, name: str) -> None:
    """Ranks that draft, or judge, each for itself: they go on behind other tokens, and the sums over tp are of
    nothing. Drafts that come to nothing would show nothing."""
    leader, follower = ranks.run(2, served_with_drafts, even(), SWAPPING, DRAFTING[name], LAYOUT)
    alone = served_with_drafts(even(), SWAPPING, DRAFTING[name], None)
    assert isinstance(alone, dict)
    assert {n: c.token_ids for n, c in leader.items()} == {n: c.token_ids for n, c in alone.items()}
    if name != "sampled":  # drafts that are not drawn change nothing
        plain = on_ranks.ask(Engine(random_decoder(even()).double(), SWAPPING), PROMPTS, SAMPLINGS)
        assert all(leader[n].token_ids == plain[n].token_ids for n in plain if n)  # 0 was dropped at some step
    assert sum(sum(c.speculation.accepted) for c in leader.values() if c.speculation is not None) > 2
    assert follower > 8


def test_what_ranks_would_decide_each_by_its_own_clock_is_refused() -> None:
    """Steps that are measured: one rank drafts, the other does not, and both wait for ever."""
    fine = SpeculationConfig(method="ngram", switch_off=False)
    assert problems_over_ranks(fine) == []
    assert problems_over_ranks(SpeculationConfig()) == []
    assert problems_over_ranks(SpeculationConfig(method="ngram", step_ms={1: 1.0, 64: 2.0})) == []
    (clock,) = problems_over_ranks(SpeculationConfig(method="ngram"))
    assert "speculation.switch_off=true measures steps by a clock" in clock
    (heads,) = problems_over_ranks(SpeculationConfig(**asdict(fine) | {"method": "mtp"}))
    assert "speculation.method=mtp goes on from hidden states" in heads
