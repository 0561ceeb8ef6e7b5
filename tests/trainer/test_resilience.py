"""Preemption: one rank's signal, everyone's decision, and a restart that continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.pool import RankPool
from trainer.resilience import PREEMPTED_EXIT_CODE, PreemptionGuard, launcher_problems

ROOT = Path(__file__).parents[2]


def steps_until_preempted(signals: dict[tuple[int, int], signal.Signals], last: int) -> int | None:
    """Run up to `last` steps; rank r sends itself signals[r, s] during step s. The step after which the guard stops."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    guard = PreemptionGuard()
    stopped = None
    for step in range(1, last + 1):
        if (dist.get_rank(), step) in signals:
            os.kill(os.getpid(), signals[dist.get_rank(), step])
        if guard.requested(step):
            stopped = step
            break
    guard.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    return stopped


@pytest.mark.parametrize(
    ("size", "signals", "stopped"),
    [
        (2, {(1, 3): signal.SIGTERM}, 3),
        (2, {(0, 2): signal.SIGUSR1}, 2),
        (4, {(3, 4): signal.SIGTERM, (1, 5): signal.SIGTERM}, 4),
        (1, {(0, 1): signal.SIGUSR1}, 1),
        (2, {}, None),
    ],
)
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(
    ranks: RankPool, size: int, signals: dict[tuple[int, int], signal.Signals], stopped: int | None
) -> None:
    """Would catch: ranks that stop at different steps, so that the last checkpoint waits for ever."""
    assert ranks.run(size, steps_until_preempted, signals, 6) == [stopped] * size


PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from trainer.checkpoint import CheckpointManager, resolve_resume
from trainer.config import CheckpointConfig
from trainer.resilience import PREEMPTED_EXIT_CODE, PreemptionGuard, launcher_problems

assert launcher_problems(os.environ) == []
run = Path(sys.argv[1])
dist.init_process_group("gloo")
checkpoints = CheckpointManager(run / "checkpoints", CheckpointConfig(), device=torch.device("cpu"))
guard = PreemptionGuard()
state = {"total": torch.zeros(())}
start, found = 0, resolve_resume("auto", run / "checkpoints")
if found is not None:
    start = checkpoints.load(found, state)["step"]
for step in range(start + 1, 7):
    state["total"] += step
    if dist.get_rank() == 1 and step == 3 and start == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    if guard.requested(step):
        checkpoints.save(step, state, {"step": step}, blocking=True)
        checkpoints.close()
        sys.exit(PREEMPTED_EXIT_CODE)
checkpoints.close()
guard.close()
if dist.get_rank() == 0:
    (run / "result.json").write_text(json.dumps({"start": start, "total": state["total"].item()}))
dist.destroy_process_group()
"""


@pytest.mark.thorough
def test_a_preempted_run_is_restarted_by_torchrun_and_continues(tmp_path: Path) -> None:
    """Would catch: an exit code torchrun takes for success, or a restart that begins anew."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, "--max-restarts", "1", "--monitor-interval", "0.1", str(program), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # launcher_problems says why
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "SIGTERM received: the run saves and stops after step 3" in finished.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == {"start": 3, "total": 21.0}


@pytest.mark.parametrize(
    ("restarts", "agent_store", "refused"),
    [("3", "True", True), ("3", "False", False), ("0", "True", False), (None, None, False)],
)
def test_a_launch_that_could_not_restart_is_refused_with_the_fix(
    restarts: str | None, agent_store: str | None, refused: bool
) -> None:
    """Would catch: a preempted run that hangs at its restart, days after it was launched."""
    variables = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": agent_store}
    problems = launcher_problems({name: value for name, value in variables.items() if value is not None})
    assert len(problems) == refused
    assert all("--max-restarts=3" in p and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in p for p in problems)


def test_the_exit_code_of_a_preempted_run_is_neither_success_nor_an_error_of_ours() -> None:
    """Would catch: a launcher that cannot tell preemption (restart) from a configuration error (do not)."""
    assert PREEMPTED_EXIT_CODE not in (0, 1, 2)
    assert 0 < PREEMPTED_EXIT_CODE < 128  # above are the shell's codes for signals
