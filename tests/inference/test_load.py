"""Loads and their timing against values worked out by hand, on a clock that only steps move."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Delta, Engine
from inference.load import Replay, Request, Timing, arrival_times, goodput, random_tokens, replay, summary_of
from inference.roofline import copy_bandwidth, tokens_read, weight_bytes
from models.moe_config import MoEConfig
from tests.models.small import random_decoder, tiny

GREEDY = SamplingConfig(temperature=0.0)


class Clock:
    """A step takes a second."""

    def __init__(self, engine: Engine) -> None:
        self.now, self.slept = 100.0, []
        self._step = engine.step
        engine.step = self.step  # type: ignore[method-assign]

    def step(self) -> list[Delta]:
        self.now += 1.0
        return self._step()

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


def played(requests: list[Request], **settings: object) -> tuple[Replay, Clock]:
    settings = {"block_size": 4, "max_batch_tokens": 64, "max_sequences": 8} | settings
    engine = Engine(random_decoder(tiny()), EngineConfig(**settings))  # type: ignore[arg-type]
    clock = Clock(engine)
    return replay(engine, requests, GREEDY, clock=lambda: clock.now, sleep=clock.sleep), clock


def test_times_count_from_the_arrival_that_was_planned() -> None:
    """Coordinated omission: a request that comes during a step counts from when it was served; idle time in decoding.

    Steps end at 1, 2, ...; the second request comes at 0.5 and waits for the first step, the third finds nobody.
    """
    requests = [Request([1, 2, 3], 3, 0.0), Request([4, 5], 2, 0.5), Request([6], 1, 9.0)]
    found, clock = played(requests)
    assert [timing.tokens for timing in found.timings] == [[1.0, 2.0, 3.0], [2.0, 3.0], [10.0]]
    assert [timing.ttft for timing in found.timings] == [1.0, 1.5, 1.0]
    assert [timing.tpot for timing in found.timings] == [1.0, 1.0, None]
    assert [timing.latency for timing in found.timings] == [3.0, 2.5, 1.0]
    assert [timing.gaps for timing in found.timings] == [[1.0, 1.0], [1.0], []]
    assert found.seconds == 10.0
    assert clock.slept == [6.0]
    assert (found.decoding.steps, found.decoding.seconds, found.decoding.sequences) == (1, 1.0, 2)
    assert dict(goodput(found, ttft=1.0, tpot=None)) == {"met": 2 / 3, "requests_per_second": 0.2}
    assert dict(goodput(found, ttft=None, tpot=0.5)) == {"met": 1 / 3, "requests_per_second": 0.1}


@pytest.mark.parametrize("overlap", [False, True])
def test_bytes_of_decoding_are_those_of_weights_and_attended_tokens(overlap: bool) -> None:
    """Steps with prompts counted as decoding; the cache counted by pages, or without the newest token.

    Two sequences of 3 and 2 tokens decode 4 times: they attend to 4 and 3 tokens, then one more each time.
    """
    found, _ = played([Request([1, 2, 3], 5), Request([4, 5], 5)], overlap=overlap)
    model = random_decoder(tiny())
    config = model.config
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    attended = sum(4 + 3 + 2 * n for n in range(4))
    assert (found.decoding.steps, found.decoding.sequences, found.decoding.tokens) == (4, 8, 8)
    assert found.decoding.seconds == 4.0
    assert found.decoding.bytes_read == 4 * weight_bytes(model) + attended * per_token


def test_weights_that_a_step_reads() -> None:
    """Tables that are looked up; a head that is tied to one; experts that nobody chose; layers only training has."""
    untied, tied = (random_decoder(tiny(tie_embeddings=tie)) for tie in (False, True))
    everything = sum(parameter.nbytes for parameter in untied.parameters())
    assert weight_bytes(untied) == everything - untied.embedding.weight.nbytes  # type: ignore[union-attr]
    assert weight_bytes(tied) == sum(parameter.nbytes for parameter in tied.parameters()) == weight_bytes(untied)

    mixture = random_decoder(tiny(family="mixtral", moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8)))
    experts = sum(p.nbytes for name, p in mixture.named_parameters() if ".experts." in name)
    rest = weight_bytes(mixture, 10**6) - experts
    assert experts > 0
    assert weight_bytes(mixture) == pytest.approx(rest + experts / 2)
    assert weight_bytes(mixture, 2) == pytest.approx(rest + experts * 3 / 4)


def test_a_window_bounds_what_is_read() -> None:
    """The whole cache counted where layers look at its end."""
    assert tokens_read(tiny(), 100) == 100
    assert tokens_read(tiny(sliding_window=8), 100) == 8
    layers = tiny().num_layers
    assert tokens_read(tiny(sliding_window=8, sliding_window_layers=[0]), 100) == (8 + 100 * (layers - 1)) / layers


def test_arrivals() -> None:
    """A rate that is another one; gaps that all are alike; a load that cannot be made again."""
    assert arrival_times(3, kind="at_once", rate=None, seed=0) == [0.0, 0.0, 0.0]
    assert arrival_times(3, kind="fixed", rate=4.0, seed=0) == [0.0, 0.25, 0.5]
    times = arrival_times(20_001, kind="poisson", rate=4.0, seed=0)
    assert times[0] == 0.0
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)  # an exponential distribution's is its mean
    assert times == arrival_times(20_001, kind="poisson", rate=4.0, seed=0)
    assert times != arrival_times(20_001, kind="poisson", rate=4.0, seed=1)
    assert set(random_tokens(400, 5, random.Random(0))) == {0, 1, 2, 3, 4}


def test_percentiles_and_a_request_without_a_second_token() -> None:
    """Names that mean another percentile; a mean over requests that have no time per token."""
    found = summary_of([float(n) for n in range(101)])
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert summary_of([]) is None
    assert Timing(1.0, [2.0]).tpot is None


def test_nan_ends_a_load() -> None:
    """The speed of a model that gives no probabilities."""
    model = random_decoder(tiny())
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))  # type: ignore[union-attr]
    engine = Engine(model, EngineConfig(block_size=4))
    with pytest.raises(FloatingPointError, match="gives NaN"):
        replay(engine, [Request([1, 2], 3)], GREEDY)


def test_a_copy_has_a_bandwidth() -> None:
    """A share of nothing."""
    assert 1e7 < copy_bandwidth(torch.device("cpu"), 2**20) < 1e13
