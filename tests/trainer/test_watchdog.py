"""A rank that makes no progress: who notices, who is named, and that every process ends."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.pool import RankPool
from trainer import watchdog
from trainer.watchdog import HUNG_EXIT_CODE, Phase, Standing, Watchdog, standing, waited_for

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of the watchdogs of this test, which end their threads instead of the process."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    return codes


def wait_until(condition: object, patience: float = 10.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_hangs_ends_all_of_them_with_one_report(
    tmp_path: Path, exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks that wait for the collective's own timeout, stacks of one rank only, a report without step or rank."""
    dogs = [Watchdog(tmp_path, rank=rank, world_size=2, start="first", timeout=1.0) for rank in range(2)]
    for dog in dogs:
        dog.start()
    began = time.monotonic()
    dogs[1].begin("data", step=7, seconds=1.0)
    dogs[0].begin("step", step=7, seconds=1000.0)  # has hours left, and is told by the other one
    wait_until(lambda: len(exits) == 2)
    assert time.monotonic() - began < 5
    assert exits == [HUNG_EXIT_CODE] * 2
    report = json.loads((tmp_path / "hangs" / "first-step_7" / "report.json").read_text())
    assert [(r["rank"], r["step"], r["phase"]) for r in report["ranks"]] == [(0, 7, "step"), (1, 7, "data")]
    for rank in report["ranks"]:
        main = next(lines for name, lines in rank["stacks"].items() if name.startswith("MainThread"))
        assert any("wait_until" in line for line in main)
        assert rank["at"].startswith("tests/trainer/test_watchdog.py")
    assert "stacks of all ranks" in capsys.readouterr().err


def test_progress_keeps_a_run_alive_and_a_closed_watchdog_watches_nothing(tmp_path: Path, exits: list[int]) -> None:
    """A run of many short steps that is ended because of their sum; a watchdog that outlives the loop."""
    dog = Watchdog(tmp_path, rank=0, world_size=1, start="first", timeout=0.5)
    dog.start()
    for step in range(8):
        dog.begin("step", step=step, seconds=0.5)
        time.sleep(0.1)
    dog.close()
    time.sleep(0.6)
    assert exits == []
    assert not (tmp_path / "hangs").exists()


def test_the_ranks_that_others_wait_for_are_named() -> None:
    """A report that blames who waits."""

    def at(rank: int, step: int, collective: str | None, answered: bool = True) -> Standing:
        return Standing(rank=rank, step=step, collective=collective, answered=answered)

    assert [s.rank for s in waited_for([at(0, 5, "all_reduce"), at(1, 5, None), at(2, 5, "all_reduce")])] == [1]
    assert [s.rank for s in waited_for([at(0, 5, "all_reduce"), at(1, 5, None, answered=False)])] == [1]
    assert [s.rank for s in waited_for([at(0, 5, "all_reduce"), at(1, 4, "all_gather")])] == [1]
    assert [s.rank for s in waited_for([at(0, 5, "all_reduce"), at(1, 5, "all_gather")])] == [0, 1]
    assert "does not answer" in watchdog.summary([at(0, 5, "all_reduce"), at(1, -1, None, answered=False)])


def seen_while_waiting() -> tuple[str | None, str | None, str]:
    """On ranks: what a thread sees of rank 0, which waits for rank 1; what is pending afterwards; where rank 0 was."""
    seen: list[Standing] = []
    tensor = torch.ones(3)
    dist.barrier()
    if dist.get_rank() == 0:

        def look() -> None:
            time.sleep(0.2)
            seen.append(standing(0, Phase("step", 1, 1.0, 0.0)))

        thread = threading.Thread(target=look)
        thread.start()
    else:
        time.sleep(0.6)
    dist.all_reduce(tensor)
    if dist.get_rank() == 0:
        thread.join()
    dist.barrier()
    after = standing(0, Phase("results", 1, 1.0, 0.0)).collective
    return (seen[0].collective, after, seen[0].at) if seen else (None, after, "")


def test_the_collective_that_a_rank_waits_in_is_named(ranks: RankPool) -> None:
    """A report from which one cannot tell where in the program the run stands."""
    (waiting, after, at), (_, other, _) = ranks.run(2, seen_while_waiting)
    assert waiting is not None
    assert "gloo:all_reduce [3]" in waiting
    assert at.startswith("tests/")
    assert after is None
    assert other is None


HOLDS_THE_LOCK = """
import ctypes, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from trainer.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[2]), rank=0, world_size=1, start="x", timeout=1.0)
dog.start()
dog.begin("step", step=3, seconds=1.0)
time.sleep(0.3)
ctypes.PyDLL(None).sleep(60)  # keeps Python's lock
"""


@pytest.mark.thorough
def test_a_rank_that_cannot_run_python_ends_too(tmp_path: Path) -> None:
    """A watchdog that waits for the lock which the hung call holds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(ROOT), str(tmp_path)],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - began < 45
    assert "Timeout (" in done.stderr
    assert "<string>" in done.stderr  # the stack


def test_a_phase_that_is_watched_alone_is_watched_to_its_end(tmp_path: Path, exits: list[int]) -> None:
    """A load that hangs for ever; a watchdog that stays behind when the load has failed, and ends what comes next."""
    dog = Watchdog(tmp_path, rank=0, world_size=1, start="first", timeout=0.5)
    with pytest.raises(OSError, match="lost"), dog.watching("loading", step=0, seconds=0.5):
        raise OSError("lost")
    time.sleep(0.6)
    assert exits == []
    with dog.watching("loading", step=0, seconds=0.5):
        wait_until(lambda: exits)
    assert exits == [HUNG_EXIT_CODE]
    report = json.loads((tmp_path / "hangs" / "first-step_0" / "report.json").read_text())
    assert [r["phase"] for r in report["ranks"]] == ["loading"]


HANGS = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from launch.compose import compose_one
from trainer.trainer import Trainer
from trainer.validate import finalize
where = sys.argv[3]
if where == "loading":
    Trainer._load = lambda self: time.sleep(60)
small = ["vocab_size=300", "hidden_size=32", "intermediate_size=48", "num_layers=1", "num_heads=2", "num_kv_heads=2"]
settings = ["data=tokens", f"data.path={sys.argv[2]}/tokens.npy", "data.num_workers=0", "train.device=cpu"]
settings += [f"model.{one}" for one in [*small, "max_seq_len=16"]]
settings += ["train.seq_len=16", "train.global_batch_size=1", "train.steps=1", "train.timeout_seconds=1"]
settings += ["resilience.loading_seconds=1", "resilience.checkpoint_seconds=1", f"run.dir={sys.argv[2]}/run"]
trainer = Trainer(finalize(compose_one(settings), world_size=1))
trainer.train_data.close = lambda: time.sleep(60)
trainer.close()
"""


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["loading", "closing"])
def test_a_start_or_an_end_that_hangs_ends(where: str, tmp_path: Path) -> None:
    """A run that is only watched while it trains: one that reads weights, or ends, holds its nodes for a week."""
    np.save(tmp_path / "tokens.npy", np.zeros(2000, np.uint16))
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(ROOT), str(tmp_path), where],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == HUNG_EXIT_CODE, done.stderr
    assert f"at step 0, {where}, has made no progress" in done.stderr
