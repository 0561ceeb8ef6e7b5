"""Faults of a run are in its story: what ended it, and what a start finds of the one before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from launch.run_report.page import page
from launch.run_report.record import read_runs
from tests.parity.harness import text_corpus, tiny_config
from tests.pool import RankPool
from tests.trainer.starts import start_on
from trainer.agreement import CheckpointError
from trainer.config import LoggingConfig
from trainer.corruption import StateCorrupted
from trainer.faults import FAULTS, tell_end, tell_start
from trainer.metrics import MetricLogger
from trainer.records import TrainingDiverged


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def logger(run_dir: Path, *, resume_step: int = 0) -> MetricLogger:
    return MetricLogger(
        run_dir,
        LoggingConfig(console=False),
        is_main=True,
        total_steps=9,
        run_name="test",
        config_dict={},
        resume_step=resume_step,
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StateCorrupted("rank 1 differs"), "corruption"),
        (TrainingDiverged("loss nan"), "diverged"),
        (CheckpointError("no space left"), "checkpoint_failed"),
        (RuntimeError("connection closed"), "crashed"),
    ],
)
def test_what_ends_a_run_is_its_last_event(error: Exception, kind: str, tmp_path: Path) -> None:
    """A run whose record just stops, so that nobody can tell a bad disk from bad bits a week later."""
    metrics = logger(tmp_path)
    tell_end(metrics, error, step=7)
    metrics.close()
    (event,) = events(tmp_path)
    assert (event["kind"], event["step"], str(error) in event["text"]) == (kind, 7, True)
    (run,) = read_runs_of(tmp_path)
    assert f"ended: {kind.replace('_', ' ')}" in page([run])
    tell_end(metrics, error, step=7)  # closed: what cannot be written does not hide the error


def read_runs_of(folder: Path) -> list[Any]:
    (folder / "metrics.jsonl").touch()
    return read_runs([folder])


def hang(run_dir: Path, name: str, *, at: float, report: bool = True) -> None:
    folder = run_dir / "hangs" / name
    folder.mkdir(parents=True)
    if report:
        (folder / "report.json").write_text(json.dumps({"summary": f"rank 1 of {name}", "waited_for": [1]}))
    os.utime(folder / "report.json" if report else folder, (at, at))


def test_a_hang_is_told_once_by_the_next_start_and_shown_before_there_is_one(tmp_path: Path) -> None:
    """Hangs that nobody counts, or the same one at every start; a page of a run that hung, without the hang."""
    hang(tmp_path, "later-step_8", at=2e9, report=False)
    hang(tmp_path, "first-step_5", at=1e9)
    (run,) = read_runs_of(tmp_path)
    text = page([run])
    assert "hung; start it again" in text
    assert text.index("rank 1 of first-step_5") < text.index("a hang without a report")
    for step in (3, 4):  # of two starts
        metrics = logger(tmp_path)
        tell_start(metrics, tmp_path, step=step)
        metrics.event("resume", "goes on", step=step)
        metrics.close()
    told = events(tmp_path)
    assert [event["kind"] for event in told] == ["hang", "hang", "resume", "resume"]
    assert [(e["step"], e["waited_for"]) for e in told[:2]] == [(5, [1]), (8, [])]
    assert told[0]["at"].startswith("2001-09-09")
    (run,) = read_runs_of(tmp_path)
    assert run.hangs == []
    text = page([run])
    assert "hung; start it again" not in text
    assert "Faults of" in text
    assert "2001-09-09" in text


def test_a_page_without_faults_has_no_place_for_them(tmp_path: Path) -> None:
    """An empty heading, or every event as a fault."""
    metrics = logger(tmp_path)
    metrics.event("start", "begins", step=0)
    metrics.close()
    assert "Faults of" not in page(read_runs_of(tmp_path))
    assert not {"start", "resume", "checkpoint", "preempted"} & set(FAULTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("faults"))


def test_a_run_tells_what_stopped_it_and_which_checkpoint_it_passed_over(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """Events that no trainer writes."""
    settings: dict[str, Any] = {"train__steps": 4, "checkpoint__interval": 2, "train__nonfinite": "stop"}
    run_dir = tmp_path / "run"
    assert start_on(ranks, 1, tiny_config(run_dir, corpus, **settings)).error is None
    damaged = next(path for path in (run_dir / "checkpoints" / "step_4").iterdir() if path.suffix == ".distcp")
    damaged.write_bytes(b"")
    diverges = tiny_config(run_dir, corpus, **(settings | {"train__steps": 6, "optim__lr": 1e30}))
    assert start_on(ranks, 1, diverges).error is not None
    told = [(event["kind"], event["step"]) for event in events(run_dir) if event["kind"] in FAULTS]
    assert told[0] == ("checkpoint_damaged", 4)
    assert told[-1][0] == "diverged"
