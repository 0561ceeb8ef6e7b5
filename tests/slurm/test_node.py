"""The ranks of a node, with a program in the place of launch/train.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm.node import environment_of_rank, interface_towards, read_report

ROOT = Path(__file__).parents[2]
START = """
import sys
from pathlib import Path
from launch.slurm import node
node.ROOT, node.GRACE_SECONDS = Path(sys.argv[1]), 0.3
if "no script" not in sys.argv:
    node.heart_beats = lambda logs: True
sys.exit(node.main(sys.argv[2:]))
"""
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
signalled = []
signal.signal(signal.SIGUSR1, lambda number, frame: signalled.append(number))
print("rank", rank, "of", os.environ["WORLD_SIZE"], sys.argv[2:], flush=True)
what = sys.argv[2 + rank % 2]
if what.startswith("exit="):
    sys.exit(int(what[5:]))
(here / f"up{rank}").touch()
for _ in range(600):
    time.sleep(0.02)
    if signalled:
        sys.exit(75)
"""


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """The second node of two, of two ranks each: ranks 2 and 3 do what the overrides say."""
    (folder / "launch").mkdir()
    (folder / "launch" / "train.py").write_text(PROGRAM)
    options = ["--nodes=a,b", "--ranks-per-node=2", "--rendezvous=127.0.0.1:20000", f"--logs={folder}"]
    return subprocess.Popen(
        [sys.executable, "-c", START, str(folder), *options, "--", str(folder), *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "b"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["exit=0", "exit=0"], 0, ""),
        (["exit=2", "exit=2"], 2, "{2: 2, 3: 2}"),
        (["wait", "exit=3"], 3, "{3: 3, 2: -9}"),  # the other waits for a rank that has failed
    ],
)
def test_a_node_ends_with_its_ranks(overrides: list[str], code: int, said: str, tmp_path: Path) -> None:
    """Would catch: an exit code that is lost on its way, or a rank that waits for ever for one that failed."""
    node = start(tmp_path, *overrides)
    output = node.communicate(timeout=90)[1]
    assert (node.returncode, read_report(tmp_path, "b")) == (code, code)
    assert said in output
    assert f"rank 3 of 4 {overrides}" in (tmp_path / "rank3.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGUSR2, 137)])
def test_a_signal_for_the_node_reaches_its_ranks(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Would catch: ranks that are not told to save, or that stay when the node has been told to end them."""
    node = start(tmp_path, "wait", "wait")
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("up*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    node.send_signal(number)
    node.communicate(timeout=90)
    assert (node.returncode, read_report(tmp_path, "b")) == (code, code)


@pytest.mark.parametrize(
    ("what", "requeued"), [("exit=1", True), ("exit=75", True), ("exit=2", False), ("exit=0", False)]
)
def test_ranks_requeue_a_job_whose_script_is_gone(
    what: str, requeued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: with --no-kill, an allocation that does nothing until its time limit, since its first node died."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")  # whose other tasks are no affair of this one
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    start(tmp_path, what, what, "no script").communicate(timeout=90)
    assert (tmp_path / "told").exists() == requeued
    assert not requeued or (tmp_path / "told").read_text() == "requeue 41_3\n"


def test_a_node_that_has_not_reported_has_no_code(tmp_path: Path) -> None:
    """Would catch: a node that is gone, taken for one that is done."""
    assert read_report(tmp_path, "b") is None


def test_a_rank_finds_what_torchrun_would_tell_it() -> None:
    """Would catch: two ranks with one number; settings of the user's that are overwritten."""
    given = {"OMP_NUM_THREADS": "6", "RANK": "of something else", "GLOO_SOCKET_IFNAME": "ib0"}
    made = environment_of_rank(
        given, node_index=2, local_rank=1, num_nodes=3, ranks_per_node=8, rendezvous="fe80::1:20007"
    )
    assert made | {"PYTHONUNBUFFERED": "1"} == made
    del made["PYTHONUNBUFFERED"]
    assert made == {
        "MASTER_ADDR": "fe80::1",
        "MASTER_PORT": "20007",
        "WORLD_SIZE": "24",
        "RANK": "17",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "2",
        "OMP_NUM_THREADS": "6",
        "GLOO_SOCKET_IFNAME": "ib0",
    }


def test_the_interface_to_the_rendezvous_is_found() -> None:
    """Would catch: gloo on 127.0.1.1, the address many systems give their own name, where no other node finds it."""
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
