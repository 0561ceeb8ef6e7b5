"""What the batch script makes of its command line and of what SLURM tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.job import UsageError, down_nodes, job_from, srun

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-4]"}


def test_a_job_is_what_slurm_and_its_command_line_say() -> None:
    """Would catch: ranks on the spare node, or options that Hydra gets to read."""
    job = job_from(
        ["--spare-nodes=1", "--max-restarts=2", "+exp=zero3_13b", "optim.lr=1e-4"],
        {**SLURM, "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "3"},
    )
    assert job.nodes == ["n1", "n2", "n3", "n4"]
    assert (job.num_needed, job.ranks_per_node, job.max_restarts, job.restarts) == (3, 8, 2, 3)
    assert job.overrides == ["+exp=zero3_13b", "optim.lr=1e-4"]
    assert job.logs == Path("lattice-41").absolute()
    assert job_from(["--ranks-per-node=2"], SLURM).ranks_per_node == 2


def test_a_task_of_an_array_takes_its_point(tmp_path: Path) -> None:
    """Would catch: every task the same point; logs of all tasks in one folder."""
    points = tmp_path / "points.jsonl"
    points.write_text("".join(json.dumps([f"optim.lr={lr}", 'run.dir="a,b"']) + "\n" for lr in (1, 2)))
    task = {**SLURM, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "LATTICE_SLURM_LOGS": "/runs/slurm"}
    job = job_from([f"--points={points}"], task)
    assert job.overrides == ["optim.lr=2", 'run.dir="a,b"']
    assert job.logs == Path("/runs/slurm/40_1")
    with pytest.raises(UsageError, match="job array"):
        job_from([f"--points={points}"], SLURM)
    with pytest.raises(UsageError, match="not among the 2 points"):
        job_from([f"--points={points}"], task | {"SLURM_ARRAY_TASK_ID": "2"})


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("--spare-nodes=4", "--spare-nodes=4 leaves none of --nodes=4"),
        ("--spare-nodes=3", "--spare-nodes=3 leaves 1 of --nodes=4"),
        ("--ranks-per-node=0", "--ranks-per-node=0 leaves nobody"),
        ("--ranks-per-node=x", "--ranks-per-node=x is no option"),
        ("--multirun", "--multirun is no option of the batch script; .* docs/SLURM.md"),
    ],
)
def test_a_command_line_that_is_wrong_is_refused(argument: str, what: str) -> None:
    """Would catch: an option that was mistyped and is passed over, hours before that is seen."""
    with pytest.raises(UsageError, match=what):
        job_from([argument], SLURM)


@pytest.mark.parametrize(
    ("state", "down"),
    [("down", True), ("down*", True), ("fail", True), ("unknown", True)]
    + [(state, False) for state in ("allocated", "mixed", "allocated*", "draining", "completing", "idle", "failing")],
)
def test_only_a_node_that_slurm_gave_up_is_down(state: str, down: bool) -> None:
    """Would catch: a run that is ended because a node was slow to answer once, or is to be drained later."""
    assert down_nodes(f"n0 idle\nn1 {state}\n") == ({"n1"} if down else set())


def test_a_step_runs_once_per_node_and_is_judged_here() -> None:
    """Would catch: srun that kills ranks which are saving, when the first of them is done."""
    command = srun(["n1", "n3"])
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n3", "--kill-on-bad-exit=0", "--no-kill"} <= set(command)


def test_the_batch_side_starts_without_torch() -> None:
    """Would catch: a supervisor of a hundred megabytes on the first node, and seconds more until ranks start."""
    program = "import sys, launch.slurm.job; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LATTICE_ROOT": "/nowhere"}, "no launch/slurm/job.py in /nowhere"),
        ({"LATTICE_ROOT": str(ROOT), "LATTICE_PYTHON": "/nowhere/python"}, "no Python in /nowhere/python"),
        (
            {"LATTICE_ROOT": str(ROOT), "LATTICE_PYTHON": sys.executable, **SLURM},
            "--nodes-spare=1 is no option of the batch script",
        ),
    ],
)
def test_the_batch_script_says_what_is_missing(environment: dict[str, str], said: str) -> None:
    """Would catch: `No such file or directory` from a folder of slurmd's, and exit codes that are requeued."""
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--nodes-spare=1"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"configuration error: {said}" in done.stderr
