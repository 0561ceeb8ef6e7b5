"""The share of time that counts, over restarts, and who keeps the others waiting."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trainer.goodput import Goodput
from trainer.stragglers import stragglers


def test_goodput_counts_each_step_once_and_all_time_since_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time between starts that is forgotten, steps done twice that count twice."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    alone = Goodput(tmp_path, resume_step=0)
    monkeypatch.setattr(time, "time", lambda: 1010.0)
    assert alone.after(4.0) == pytest.approx(0.4)
    assert alone.after(4.0) == pytest.approx(0.8)
    started = datetime.fromtimestamp(1000.0, UTC).isoformat(timespec="seconds")
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"time": started}, {"time": started}]}))
    lines = [{"step": step, "step_seconds": 2.0} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "st')
    monkeypatch.setattr(time, "time", lambda: 1040.0)
    again = Goodput(tmp_path, resume_step=3)  # step 4 is done again
    assert again.after(2.0) == pytest.approx(8 / 40)


def test_ranks_that_others_wait_for_are_named_and_no_others() -> None:
    """A rank named for being a hair slower, or the fast ones named beside a slow one; of two, neither named."""

    def named(late: list[float], probes: list[float]) -> list[tuple[int, str]]:
        return [(s.rank, s.measure) for s in stragglers(late, probes, step_seconds=1.0, share=0.1)]

    assert named([0.01, 0.02, 0.01, 0.01], [0.0] * 4) == []
    assert named([0.01, 0.02, 0.31, 0.01], [0.0] * 4) == [(2, "late")]
    assert [s.rank for s in stragglers([0.009, 0.0], [0.0] * 2, step_seconds=0.02, share=0.1)] == []
    assert named([0.5, 0.01], [0.0, 0.0]) == [(0, "late")]
    assert named([0.0] * 4, [0.010, 0.010, 0.011, 0.020]) == [(3, "probe")]
    (slow,) = stragglers([0.5, 0.01], [0.0, 0.0], step_seconds=1.0, share=0.1)
    assert str(slow) == "rank 0 begins its steps 500 ms late; the median rank 10 ms"
