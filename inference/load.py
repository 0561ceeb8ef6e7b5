"""Requests that arrive over time, and when their tokens came: what a service's users would see of an engine."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from inference.config import SamplingConfig
from inference.engine import Engine
from inference.roofline import tokens_read, weight_bytes
from inference.scheduler import Step

PERCENTILES = (50, 90, 95, 99)


@dataclass
class Request:
    """One to come. Filled by whoever makes a load."""

    prompt: list[int]
    max_tokens: int
    arrival: float = 0.0  # seconds after the beginning


@dataclass
class Timing:
    """What became of a request, in seconds after the beginning. Filled by `replay`."""

    arrival: float
    tokens: list[float] = field(default_factory=list)  # when each of the continuation came

    @property
    def ttft(self) -> float:
        """Seconds from its arrival to its first token: waiting for others is in it."""
        return self.tokens[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a token after the first; None: there is none."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def latency(self) -> float:
        return self.tokens[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; those that a step made together have none between them."""
        return [after - before for before, after in pairwise(self.tokens)]


@dataclass
class Decoding:
    """Steps that computed no prompt. Filled by `replay`."""

    steps: int = 0
    seconds: float = 0.0
    sequences: int = 0  # summed over steps, as the rest
    tokens: int = 0
    bytes_read: float = 0.0  # of weights and cache


@dataclass
class Replay:
    """Filled by `replay`."""

    timings: list[Timing]  # in the order of the requests
    seconds: float  # from the beginning to the last token
    decoding: Decoding


def arrival_times(count: int, *, kind: str, rate: float | None, seed: int) -> list[float]:
    """When requests come, in seconds; the first at 0. kind: at_once, fixed (every 1/rate s) or poisson (rate a second,
    independent of one another: gaps are exponential)."""
    if kind == "at_once":
        return [0.0] * count
    assert rate is not None
    if kind == "fixed":
        return [number / rate for number in range(count)]
    chance = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + chance.expovariate(rate))
    return times


def random_tokens(count: int, vocab_size: int, chance: random.Random) -> list[int]:
    """A prompt that no cache has."""
    return [chance.randrange(vocab_size) for _ in range(count)]


def replay(
    engine: Engine,
    requests: Seq[Request],
    sampling: SamplingConfig,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Replay:
    """Let requests arrive when they do, whether or not those before are done, and write down when tokens come.

    A continuation has as many tokens as its request says, unless `sampling` has stop strings or tokens, or a
    constraint. Raises RequestError for a request that cannot be served and FloatingPointError for NaN.
    """
    to_come = deque(sorted(range(len(requests)), key=lambda number: requests[number].arrival))
    timings = [Timing(request.arrival) for request in requests]
    under_way: dict[int, int] = {}  # the engine's number of a request, and ours
    meter = _Meter(engine)
    start = last = clock()
    while to_come or under_way:
        now = clock() - start
        while to_come and requests[to_come[0]].arrival <= now:
            number = to_come.popleft()
            settings = replace(sampling, max_tokens=requests[number].max_tokens, ignore_eos=True)
            under_way[engine.add(requests[number].prompt, settings)] = number
        if not under_way:
            sleep(requests[to_come[0]].arrival - now)
            last = clock()
            continue
        deltas = engine.step()
        now = clock()
        meter.stepped(now - last)
        last = now
        for delta in deltas:
            timings[under_way[delta.request]].tokens += [now - start] * len(delta.token_ids)
            if delta.completion is not None:
                del under_way[delta.request]
                if delta.completion.finish_reason == "nan":
                    raise FloatingPointError(delta.completion.error)
    return Replay(timings, last - start, meter.decoding)


class _Meter:
    """Adds up what decoding steps read. With overlap a call of `step` waits for the step before the one it launches."""

    def __init__(self, engine: Engine) -> None:
        self.decoding = Decoding()
        self._engine = engine
        self._before: Decoding | None = Decoding()
        self._weights: dict[int, float] = {}  # bytes by number of tokens: looking at all parameters takes a while
        self._per_token = engine.runner.cache_bytes_per_token

    def stepped(self, seconds: float) -> None:
        launched = self._of(self._engine.last_step)
        waited = self._before if self._engine.overlap else launched
        if waited is not None and waited.steps and launched is not None:
            total = self.decoding
            total.steps += 1
            total.seconds += seconds
            total.sequences += waited.sequences
            total.tokens += waited.tokens
            total.bytes_read += waited.bytes_read
        self._before = launched

    def _of(self, step: Step) -> Decoding | None:
        """What a step reads; None: it computes prompts. Drafted tokens are computed with the others; who drafts them
        reads weights of its own, which are not counted."""
        chunks, drafts = step.chunks, step.num_drafts or [0] * len(step.chunks)
        if any(chunk.first < chunk.sequence.num_prompt for chunk in chunks):
            return None
        model = self._engine.runner.model
        tokens = sum(chunk.num_tokens for chunk in chunks) + sum(drafts)
        if tokens not in self._weights:
            self._weights[tokens] = weight_bytes(model, tokens) if tokens else 0.0
        ends = [chunk.end + count for chunk, count in zip(chunks, drafts, strict=True)]
        cached = sum(tokens_read(model.config, end) for end in ends)
        read = self._weights[tokens] + cached * self._per_token
        return Decoding(int(bool(chunks)), 0.0, len(chunks), tokens, read)


def summary_of(values: Seq[float]) -> dict[str, float] | None:
    """Mean, percentiles (linear between neighbours) and maximum, by name; None: there are no values."""
    if not values:
        return None
    found = {"mean": float(np.mean(values))}
    found |= {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return found | {"max": float(max(values))}


def goodput(replayed: Replay, *, ttft: float | None, tpot: float | None) -> Mapping[str, float]:
    """Requests that meet both bounds (seconds; None: any): their share, and how many there are a second (DistServe,
    2401.09670)."""
    good = sum(
        (ttft is None or timing.ttft <= ttft) and (tpot is None or timing.tpot is None or timing.tpot <= tpot)
        for timing in replayed.timings
    )
    return {"met": good / len(replayed.timings), "requests_per_second": good / replayed.seconds}
