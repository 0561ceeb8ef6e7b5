"""Traces of steps, written by a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.parity.harness import changed, run_on, text_corpus, tiny_config
from tests.pool import RankPool
from trainer import profiling
from trainer.breakdown import trace_path
from trainer.config import ProfileConfig


def test_a_run_traces_the_steps_it_is_asked_for(ranks: RankPool, tmp_path: Path) -> None:
    """Steps beside those chosen, a trace that never ends, or of all ranks."""
    config = tiny_config(tmp_path / "base", text_corpus(tmp_path))
    config.train.profile = ProfileConfig(steps=[2, 4, 5], ranks=[0], memory=True)
    run_on(ranks, 2, changed(config, tmp_path / "run", train__steps=6))
    for step, number in ((2, 1), (4, 2)):
        with gzip.open(trace_path(tmp_path / "run", 0, step=step), "rt") as file:
            events = json.load(file)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert names.count(profiling.STEP) == names.count("update") == number
        assert any(event["name"] == "[memory]" for event in events)
    assert not trace_path(tmp_path / "run", 1).exists()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    traced = [event for event in events if event["kind"] == "profile"]
    assert [(event["step"], event["steps"]) for event in traced] == [(2, 1), (5, 2)]
    assert "python" in traced[0]["text"]
    assert traced[0]["kinds_ms"]["matrix_products"] > 0


def test_a_run_without_traces_leaves_none(ranks: RankPool, tmp_path: Path) -> None:
    """The default, and a run that ends before its first traced step."""
    config = tiny_config(tmp_path / "base", text_corpus(tmp_path))
    config.train.profile = ProfileConfig(steps=[4])
    run_on(ranks, 1, changed(config, tmp_path / "run", train__steps=3))
    assert not (tmp_path / "run" / "profile").exists()


def test_ranges_for_nsight_need_a_gpu(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match=r"train\.profile\.nvtx"):
        profiling.StepProfiler(
            ProfileConfig(steps=[1], nvtx=True), folder=tmp_path, rank=0, device=torch.device("cpu")
        )  # fmt: skip
