"""The drill: planned faults happen to a real launch, and the run comes out as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import drill
from launch.drill import INTERVAL, RANKS, ROOM, SPACING, differences, launch, lines_of, overrides, plan, workers
from trainer.injection import KINDS, PLAN, planned_faults

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_has_every_kind_once_before_one_comes_again() -> None:
    """Nightly faults of half of the kinds; two faults in one step, of which one hides the other."""
    faults = plan(100, seed=3, kinds=list(KINDS))
    assert faults == plan(100, seed=3, kinds=list(KINDS))
    assert faults != plan(100, seed=4, kinds=list(KINDS))
    assert {fault["kind"] for fault in faults[: len(KINDS)]} == set(KINDS)
    steps = [fault["step"] for fault in faults]
    assert steps == sorted(set(steps))
    assert steps[-1] <= 1 + 100 * (SPACING + 1)
    assert {fault["rank"] for fault in faults} == set(range(RANKS))


def test_a_fault_that_is_noticed_late_has_the_run_to_itself_until_then() -> None:
    """Drills in which no straggler is ever looked for, as the next fault always ends the start before."""
    for seed in range(50):
        faults = plan(20, seed=seed, kinds=list(KINDS))
        for fault, following in pairwise(faults):
            assert following["step"] - fault["step"] >= ROOM.get(fault["kind"], 1)
        assert {"slow", "full_disk"} == set(ROOM)


def test_no_plan_damages_the_only_checkpoint() -> None:
    """A drill that ends in `every checkpoint is damaged`, as it did with seed 7."""
    for seed in range(50):
        first = next(f for f in plan(20, seed=seed, kinds=list(KINDS)) if f["kind"] == "damaged_checkpoint")
        assert first["step"] > 2 * INTERVAL + 1
    (alone,) = plan(1, seed=0, kinds=["damaged_checkpoint"])
    assert alone["kind"] == "damaged_checkpoint"  # there is nothing else to choose


def test_a_run_without_a_plan_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that does something by itself."""
    monkeypatch.delenv(PLAN, raising=False)
    assert planned_faults() is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kinds", "sigkill,flood"], "--kinds flood is unknown; use some of sigkill, sigterm"),
        (["--faults", "0"], "--faults 0 must be at least 1"),
        (["--dir", "."], "exists; choose another"),
    ],
)
def test_a_wrong_command_is_explained(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A drill of nothing that passes."""
    with pytest.raises(SystemExit) as refused:
        drill.main(["--dir", str(tmp_path / "new"), *arguments])
    assert refused.value.code == 2
    assert says.replace("sigkill, sigterm", "sigkill,sigterm") in capsys.readouterr().err


def test_progress_that_a_fault_may_not_cost_is_missed(tmp_path: Path) -> None:
    """A judge that finds nothing, or blames a full disk for the checkpoint that another fault damaged."""
    faults = [{"number": n, "kind": kind, "step": 8 + n, "rank": 0} for n, kind in enumerate(["full_disk", "nan"])]
    starts = [drill.Start(began=100.0, ended=110.0, last_step=8), drill.Start(began=111.0, ended=120.0, last_step=20)]
    events = [(102.0, "start", 0), (104.0, "checkpoint", 3), (106.0, "checkpoint", 6), (112.0, "resume", 3)]
    (tmp_path / "events.jsonl").write_text(
        "".join(
            json.dumps({"time": datetime.fromtimestamp(at, UTC).isoformat(), "kind": kind, "step": step}) + "\n"
            for at, kind, step in events
        )
    )
    for number in range(2):
        (tmp_path / f"fired_{number}").write_text("107.0")

    def judged(others: list[dict[str, Any]]) -> drill.Result:
        return drill.judge(faults[0], others, starts, tmp_path, tmp_path / "plan.json", 10.0)

    result = judged(faults)
    assert (result.lost_steps, result.resumed_from, result.seconds_to_end) == (5, 3, 3.0)
    assert result.problems == ["step_6 was saved, and the run went on from step 3"]
    assert judged([faults[0], faults[1] | {"kind": "damaged_checkpoint"}]).problems == []
    starts[0].ended = 130.0
    assert any("s passed before the run ended" in problem for problem in judged(faults).problems)


def test_a_preemption_that_saves_nothing_and_a_straggler_nobody_looked_for_are_broken_promises(tmp_path: Path) -> None:
    """A handler of SIGTERM that only ends, passed since checkpoints before it were kept; a fault that is not judged."""
    faults = [{"number": n, "kind": kind, "step": 7, "rank": 0} for n, kind in enumerate(["sigterm", "slow"])]
    starts = [drill.Start(began=100.0, ended=110.0, last_step=7), drill.Start(began=111.0, ended=120.0, last_step=20)]
    (tmp_path / "fired_0").write_text("107.0")

    def resumed_from(step: int) -> None:
        lines = [(104.0, "checkpoint", 6), (112.0, "resume", step)]
        (tmp_path / "events.jsonl").write_text(
            "".join(
                json.dumps({"time": datetime.fromtimestamp(at, UTC).isoformat(), "kind": kind, "step": step}) + "\n"
                for at, kind, step in lines
            )
        )

    def judged(number: int) -> list[str]:
        return drill.judge(faults[number], faults, starts, tmp_path, tmp_path / "plan.json", 10.0).problems

    resumed_from(6)
    assert judged(0) == ["step 7 was done, and the run went on from 6"]
    resumed_from(7)
    assert judged(0) == []
    (tmp_path / "fired_1").write_text("105.0")
    resumed_from(6)
    assert judged(0) == judged(1) == []  # another fault may have ended that start
    (tmp_path / "fired_0").unlink()
    assert judged(1) == ["its start ended at step 7, too soon to tell whether a straggler is named"]


@pytest.mark.thorough
def test_ten_random_faults_leave_the_run_as_it_would_have_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/FAULTS.md promises."""
    code = drill.main(["--faults", "10", "--seed", "5", "--dir", str(tmp_path / "drill")])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, json.dumps(found, indent=1)
    assert found["passed"]
    assert found["starts"] >= 8
    assert all(fault["happened"] for fault in found["faults"])
    assert 0 < found["goodput"] < 1
    # Negative control: the comparison that found no difference finds one.
    run, whole = tmp_path / "drill" / "run", tmp_path / "drill" / "whole"
    lines = lines_of(run / "metrics.jsonl")
    lines[-1]["loss"] += 1e-7
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(run, whole, found["steps"]) == ["metrics.jsonl"]


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    """A promise whose test was moved away, or never was."""
    rows = [line for line in (ROOT / "docs" / "FAULTS.md").read_text().splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(tests/[\w/]+\.py)`", row.rpartition(" | ")[2]) for row in rows]
    assert len(rows) >= 14
    assert all(named)
    assert [path for paths in named for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.thorough
def test_with_copies_in_memory_a_fault_costs_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Restarts that go back to the checkpoint although the host has all of a later step in memory."""
    (tmp_path / "memory").mkdir()
    peers = ["resilience.peer_interval=1", f"resilience.peer_dir={tmp_path / 'memory'}", "checkpoint.interval=0"]
    # A minute: nothing hangs here, and a machine that is busy elsewhere is no reason for another start.
    patient = ["--timeout", "60"]
    code = drill.main(["--faults", "1", "--kinds", "dead_worker", "--dir", str(tmp_path / "drill"), *patient, *peers])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, json.dumps(found, indent=1)
    assert found["starts"] == 2, (tmp_path / "drill" / "run.log").read_text()[-8000:]
    assert all(fault["resumed_from"] > 0 and fault["lost_steps"] <= 1 for fault in found["faults"])


# ---- fewer ranks after a loss


def agent(port: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """A host of one rank, of a launch of one or two hosts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--rdzv-id", "elastic", "--local-addr", "127.0.0.1", "--rdzv-conf"]
    command += ["last_call_timeout=2,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=3"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        return subprocess.Popen(
            [*command, drill.TRAIN, *arguments],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def kill(host: subprocess.Popen) -> None:
    for pid in [*workers(host.pid), host.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    host.wait()


@pytest.mark.thorough
def test_a_launch_that_loses_a_host_goes_on_with_a_smaller_dp(tmp_path: Path) -> None:
    """A run that waits for the lost host until someone comes, or does other steps than it would have done."""
    steps = 24
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, size=steps * 64 + 65, dtype=np.uint16))
    quick = ["data.num_workers=0", "resilience.rerun_interval=0"]
    settings = overrides(tmp_path, steps=steps, timeout=20, more=quick)
    run = tmp_path / "run"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    hosts = [agent(port, [*settings, f"run.dir={run}"], tmp_path / f"host_{i}.log") for i in range(2)]
    # The host whose agent keeps the rendezvous survives: who binds the port is not ours to say.
    try:
        deadline = time.monotonic() + 120
        while drill.last_step(run) < 5:
            assert time.monotonic() < deadline, (tmp_path / "host_0.log").read_text()
            time.sleep(0.05)
        listens = {host.pid: _listens(host.pid, port) for host in hosts}
        keeper, lost = sorted(hosts, key=lambda host: not listens[host.pid])
        kill(lost)
        assert keeper.wait(timeout=360) == 0, (tmp_path / f"host_{hosts.index(keeper)}.log").read_text()[-3000:]
    finally:
        for host in hosts:
            kill(host)
    starts: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 1]
    assert starts[1]["resume_step"] >= 3
    alone = [*settings, f"run.dir={tmp_path / 'whole'}"]
    launch(alone, tmp_path / "whole.log", restarts=0, plan_file=None)
    ours, whole = (lines_of(folder / "metrics.jsonl") for folder in (run, tmp_path / "whole"))
    assert [line["step"] for line in ours] == list(range(1, steps + 1))
    # Another number of ranks sums in another order; what is summed is the same.
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def _listens(pid: int, port: int) -> bool:
    """Whether a process has this TCP port open for listening."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    links = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.add(os.readlink(entry))
    return bool(inodes & links)
