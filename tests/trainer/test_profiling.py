"""Traces of steps, written by a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.breakdown import STEP, trace_path
from tests.parity.harness import changed, run_on, text_corpus, tiny_config
from tests.pool import RankPool
from trainer import profiling


def test_a_run_traces_the_steps_it_is_asked_for(ranks: RankPool, tmp_path: Path) -> None:
    """A trace that begins with the compilation of the first steps, never ends, or holds only rank 0."""
    config = tiny_config(tmp_path / "base", text_corpus(tmp_path))
    changes = {"train__steps": 5, "logging__profile_after": 2, "logging__profile_steps": 2}
    run_on(ranks, 2, changed(config, tmp_path / "run", **changes))
    for rank in (0, 1):
        with gzip.open(trace_path(tmp_path / "run", rank), "rt") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
        assert names.count(profiling.STEP) == 2
    assert profiling.STEP == STEP
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "profile"] == [4]


def test_a_run_without_traces_leaves_none(ranks: RankPool, tmp_path: Path) -> None:
    """The default, and a run that ends before its first traced step."""
    config = tiny_config(tmp_path / "base", text_corpus(tmp_path))
    changes = {"train__steps": 3, "logging__profile_after": 3, "logging__profile_steps": 2}
    run_on(ranks, 1, changed(config, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "profile").exists()
