"""What Prometheus can ask of the server."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inference.engine import Delta, Engine
from inference.sequence import Completion

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """Counters and histograms of requests, beside what the engine counts itself, which is read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        registry = self.registry
        self.responses = Counter(
            "lattice_http_responses", "Answers by path and status", ["path", "status"], registry=registry
        )
        self.finished = Counter(
            "lattice_sequences_finished", "Sequences by how they ended", ["reason"], registry=registry
        )
        self.prompt_tokens = Counter("lattice_prompt_tokens", "Tokens of prompts that ended", registry=registry)
        self.cached_tokens = Counter(
            "lattice_cached_prompt_tokens", "Of these, tokens the prefix cache had", registry=registry
        )
        self.new_tokens = Counter("lattice_generated_tokens", "Tokens of continuations", registry=registry)
        self.first_token = Histogram(
            "lattice_time_to_first_token_seconds", "From queue to first token", buckets=SECONDS, registry=registry
        )
        self.per_token = Histogram(
            "lattice_time_per_output_token_seconds",
            "Of a sequence, behind its first token",
            buckets=SECONDS_PER_TOKEN,
            registry=registry,
        )
        self.whole = Histogram(
            "lattice_sequence_seconds", "From queue to last token", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Timing:
    """One sequence's times, for the histograms."""

    __slots__ = ("_first", "_metrics", "_queued")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._queued = time.monotonic()
        self._first: float | None = None

    def token(self, delta: Delta, now: float) -> None:
        """A delta arrived."""
        self._metrics.new_tokens.inc(len(delta.token_ids))
        if self._first is None:
            self._first = now
            self._metrics.first_token.observe(now - self._queued)
        end = delta.completion
        if end is None:
            return
        self._metrics.whole.observe(now - self._queued)
        if len(end.token_ids) > 1:
            self._metrics.per_token.observe((now - self._first) / (len(end.token_ids) - 1))

    def ended(self, completion: Completion, num_prompt: int) -> None:
        """It is over, one way or another."""
        self._metrics.finished.labels(completion.finish_reason or "error").inc()
        self._metrics.prompt_tokens.inc(num_prompt)
        self._metrics.cached_tokens.inc(completion.cached_tokens or 0)


class _OfEngine:
    """Numbers that the engine's thread may be changing: each is read on its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, blocks = self._engine.scheduler, self._engine.blocks
        yield GaugeMetricFamily("lattice_sequences_running", "In the batch", len(scheduler.running))
        yield GaugeMetricFamily("lattice_sequences_waiting", "Not begun", len(scheduler.waiting))
        yield GaugeMetricFamily("lattice_sequences_swapped", "On the host", len(scheduler.swapped))
        yield GaugeMetricFamily("lattice_cache_blocks", "Of the cache", blocks.num_blocks)
        yield GaugeMetricFamily("lattice_cache_blocks_used", "By sequences", blocks.num_blocks - blocks.num_free)
        preempted = CounterMetricFamily("lattice_preemptions", "Sequences that gave way", labels=["kind"])
        preempted.add_metric(["recompute"], self._engine.counts.recomputed)
        preempted.add_metric(["swap"], self._engine.counts.swapped)
        yield preempted
        if (drafts := self._engine.counts.speculation) is not None:
            yield GaugeMetricFamily("lattice_speculating", "1: steps have drafts; 0: switched off", drafts.speculating)
            yield CounterMetricFamily("lattice_drafted_tokens", "Proposed by the drafter", sum(drafts.drafted))
            yield CounterMetricFamily("lattice_accepted_draft_tokens", "Of these, that stood", sum(drafts.accepted))
