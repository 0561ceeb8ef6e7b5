"""When drafting is switched off and on again, and what is said of it."""

from __future__ import annotations

import logging

import pytest

from inference.config import EngineConfig
from inference.speculation.config import SpeculationConfig
from inference.speculation.counts import DraftCounts
from inference.speculation.policy import ENOUGH, Policy, StepTimes
from inference.speculation.runner import SpeculativeRunner
from tests.inference.greedy import GREEDY
from tests.inference.speculating import Scripted, speculating
from tests.inference.test_features import expected, served
from tests.inference.test_speculation import PROMPTS, texts

COSTS = {1: 10.0, 64: 10.0, 1024: 80.0}
"""A device that is waiting for weights up to 64 tokens, and then computes."""


def policy(**settings: object) -> Policy:
    return Policy(SpeculationConfig(method="ngram", num_tokens=3, **settings))  # type: ignore[arg-type]


def steps(policy: Policy, sequences: int, *, stood: float, number: int = 1, seconds: tuple[float, float] | None = None):  # type: ignore[no-untyped-def]
    """Steps of so many sequences with 3 drafts each where drafts are made; whether each had them."""
    found = []
    for _ in range(number):
        policy.consider(sequences)
        active = policy.active
        found.append(active)
        policy.observe(
            sequences=sequences,
            computed=sequences * (4 if active else 1),
            given=round(sequences * (1 + stood)) if active else sequences,
            prompts=0,
            active=active,
            seconds=None if seconds is None else seconds[active],
        )
    return found


def test_a_configured_cost_says_at_which_batch_size_it_stops_paying(caplog: pytest.LogCaptureFixture) -> None:
    """2 tokens a step: twice as fast while a step takes what it takes, slower once 4 times the tokens cost 2 times the
    time. Said each time."""
    watched = policy(step_ms=COSTS, hysteresis=0.2)
    with caplog.at_level(logging.INFO):
        assert all(steps(watched, 8, stood=1.0, number=20))
        assert watched.counts.speed_up == pytest.approx(2.0)
        assert not steps(watched, 200, stood=1.0, number=3)[-1]
    assert watched.counts.switched == 1
    assert "switched off: it makes 200 sequences 0." in watched.counts.why
    assert watched.counts.why in caplog.text
    # 60 sequences: 240 tokens, 22.8 ms: 0.88; 45: 180 tokens, 18.5 ms: 1.08, not enough to begin again; 16: 2.0
    assert not any(steps(watched, 60, stood=1.0, number=20))
    assert not any(steps(watched, 45, stood=1.0, number=20))
    assert all(steps(watched, 16, stood=1.0, number=5))
    assert all(steps(watched, 45, stood=1.0, number=20))  # but enough to go on
    assert watched.counts.switched == 2


def test_drafts_that_do_not_stand_are_tried_again_now_and_then() -> None:
    """Off for ever, because what is off is not measured; or tried where even perfect drafts would not pay."""
    watched = policy(step_ms=COSTS, draft_ms=2.0, probe_interval=10)
    steps(watched, 8, stood=0.1, number=20)
    assert not watched.counts.speculating
    tried = steps(watched, 8, stood=0.1, number=200)
    assert 0 < sum(tried) < 40
    assert not watched.counts.speculating
    assert all(steps(watched, 8, stood=2.5, number=400)[-20:])
    steps(watched, 900, stood=2.5, number=5)
    assert not any(steps(watched, 900, stood=2.5, number=100))


def test_times_of_both_ways_are_measured() -> None:
    """A decision by a guess."""
    watched = policy(probe_interval=50)
    found = steps(watched, 8, stood=0.5, number=10, seconds=(0.010, 0.030))
    assert found.count(True) >= ENOUGH
    assert found.count(False) >= ENOUGH
    assert not watched.counts.speculating
    assert watched.gain(8) == pytest.approx(0.5)
    assert not watched.active
    # Drafts stand now; the tries find it out.
    assert steps(watched, 8, stood=3.0, number=150, seconds=(0.010, 0.012))[-1]
    watched = policy()
    assert steps(watched, 8, stood=2.0, number=30, seconds=(0.010, 0.012))[-20:] == [True] * 20


def test_a_largest_batch_is_a_switch_of_its_own() -> None:
    """max_batch that needs the cost model, or flickers at the limit."""
    watched = policy(max_batch=10, switch_off=False, hysteresis=0.2)
    assert [steps(watched, n, stood=1.0)[0] for n in (10, 11, 10, 9, 8, 10)] == [True, False, False, False, True, True]
    assert "11 sequences are more than speculation.max_batch=10" not in watched.counts.why  # the last one is said
    assert watched.counts.switched == 2


def test_times_between_measured_ones_lie_on_lines() -> None:
    """A step of many tokens believed to take the time of a small one."""
    times = StepTimes()
    for tokens, seconds in ((4, 1.0), (12, 2.0)):
        for outlier in (0.0, 100.0, 0.0):
            times.add(tokens, seconds + outlier)
    assert [times.of(tokens) for tokens in (4, 8, 12, 15)] == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert times.of(64) is None
    assert StepTimes().of(1) is None


def test_counts_say_which_place_stood_how_often() -> None:
    """An acceptance whose meaning nobody knows."""
    counts = DraftCounts()
    for drafted, accepted in ((3, 3), (3, 1), (2, 0), (1, 1)):
        counts.add(drafted, accepted)
    assert (counts.drafted, counts.tried, counts.accepted) == ([4, 3, 2], [4, 2, 1], [3, 1, 1])
    assert counts.acceptance == [0.75, 0.5, 1.0]
    assert counts.mean_length == 1 + 5 / 4


def test_an_engine_that_switches_gives_the_same_tokens_and_says_what_it_did() -> None:
    """A switch in the middle of requests, with steps launched early as soon as it is off."""
    config = EngineConfig(block_size=4, max_sequences=8, max_batch_tokens=64, overlap=True)
    engine = speculating(
        served("llama"),
        config,
        drafter=Scripted(texts("llama"), right=0.8),
        switch_off=True,
        probe_interval=2,
        step_ms={1: 1.0, 2: 1.0, 30: 60.0},
    )
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == expected("llama")
    assert isinstance(engine.runner, SpeculativeRunner)
    counts = engine.runner.policy.counts
    assert counts.switched > 0
    assert counts.steps_with > 0
    assert counts.steps_without > 0
    assert counts.why
