"""Two runs never share a run directory."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data.config import DataConfig
from tests.parity.harness import text_corpus, tiny_config
from tests.pool import RankPool
from tests.trainer.starts import contents, start_on
from trainer.run_lock import LOCK, RunLock


def _hold(run_dir: Path, pipe: Connection) -> None:
    lock = RunLock(run_dir)
    pipe.send(lock.take(create=True))
    child = os.fork()  # a loader's worker, which outlives us
    if child == 0:
        mp.connection.wait([pipe], 30)
        os._exit(0)
    pipe.send(child)
    pipe.recv()
    os._exit(9)


class _Holder:
    """Another process that holds the lock, until `end` kills it."""

    def __init__(self, run_dir: Path) -> None:
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("fork").Process(target=_hold, args=(run_dir, theirs))
        self.process.start()
        assert self.pipe.recv() is None
        self.worker = self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def test_a_second_start_is_refused_until_the_first_process_is_gone(
    ranks: RankPool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A job that was queued twice: the second resumes, cuts the first one's metrics and deletes what it is saving."""
    corpus: DataConfig = text_corpus(tmp_path_factory.mktemp("corpus"))
    config = tiny_config(tmp_path / "run", corpus, train__steps=4, checkpoint__at_end=True)
    run_dir = tmp_path / "run"
    assert start_on(ranks, 2, config).last_step == 4
    config.train.steps = 5
    (run_dir / "checkpoints" / ".step_9.tmp").mkdir()  # what the other one is saving
    holder = _Holder(run_dir)
    try:
        before = contents(run_dir)
        start = start_on(ranks, 2, config)
        assert start.error == "ConfigError"
        assert start.message.startswith(f"run.dir={run_dir} is in use by process {holder.process.pid} on ")
        assert contents(run_dir) == before
    finally:
        holder.end()
    os.kill(holder.worker, 0)  # a forked worker is still there, and does not hold the lock
    start = start_on(ranks, 2, config)
    os.kill(holder.worker, signal.SIGKILL)
    assert (start.error, start.last_step) == (None, 5), start.message


def test_of_two_fresh_starts_the_one_that_enters_second_keeps_out(tmp_path: Path) -> None:
    """Both look into an empty folder, both find it free."""
    late = RunLock(tmp_path)
    assert late.take(create=False) is None
    holder = _Holder(tmp_path)
    try:
        assert "is in use by process" in str(late.take(create=True))
    finally:
        holder.end()
    assert late.take(create=True) is None
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    late.release()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No run at all where locks are not to be had."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert RunLock(tmp_path).take(create=True) is None
    assert "nothing keeps a second run out" in caplog.text
