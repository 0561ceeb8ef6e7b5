"""What the batch script makes of its command line and of what SLURM tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm import job as batch
from launch.slurm.job import Job, Supervisor, UsageError, down_nodes, job_from, newest_checkpoint, read_hangs, srun
from launch.slurm.outcome import MAX_HANGS, Hangs
from launch.slurm.progress import progress

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


def test_commands_for_the_task_that_has_its_arrays_number_mean_that_task_alone(
    hanging: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: ranks of a whole sweep ended because one point lost a node; a preempted point that stays away."""
    task = {**SLURM, "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3"}
    # As SLURM answers: for the array one line per task.
    (tmp_path / "bin" / "squeue").write_text(
        '#!/bin/sh\ncase $2 in --jobs=41) printf "PENDING\\nRUNNING\\n";; --jobs=41_3) echo RUNNING;; esac\n'
    )
    hanging.name = job_from([], task).name
    supervisor = Supervisor(hanging)
    supervisor._pass_on(10, None)
    supervisor._requeue()
    assert (tmp_path / "scancel").read_text() == "--signal=USR1 41_3\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 41_3\n"
    # Every other task has a number of its own; so has a job that a task has submitted, with the task's variables.
    assert job_from([], task | {"SLURM_ARRAY_JOB_ID": "40"}).name == "41"
    assert job_from([], SLURM).name == "41"


def test_ranks_are_ended_in_their_own_task_of_an_array(
    hanging: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: the same, by the signal that ends ranks which wait for one that failed."""
    monkeypatch.setattr(batch, "GRACE_SECONDS", 0.05)
    hanging.name = "41_3"
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\n{LOGS}{reported('n1', 1)}; {reported('n2', 1)}; sleep 5\n")
    assert Supervisor(hanging).run() == 1
    assert (tmp_path / "scancel").read_text() == "--signal=SIGUSR2 41_3\n"


@pytest.mark.parametrize("down", [False, True])
def test_a_report_that_is_seen_late_is_waited_for(
    down: bool, hanging: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a run that is done, taken for one that lost a node by a file system that shows new files late."""
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\n{LOGS}{reported('n1', 0)}\n(sleep 1; {reported('n2', 0)}) &\n")
    if down:  # by SLURM's word: nothing will come
        (tmp_path / "bin" / "sinfo").write_text("#!/bin/sh\necho n1 idle; echo n2 down\n")
    supervisor = Supervisor(hanging)
    monkeypatch.setattr(batch, "REPORT_SECONDS", 30.0)
    began = time.monotonic()
    assert supervisor._start(["n1", "n2"], 0) == {"n1": 0, "n2": None if down else 0}
    assert time.monotonic() - began < 15
    monkeypatch.setattr(batch, "REPORT_SECONDS", 0.0)
    assert down or supervisor._start(["n1", "n2"], 1) == {"n1": 0, "n2": None}


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


LOGS = 'for word in "$@"; do case $word in --logs=*) logs=${word#--logs=};; esac; done\n'
"""The beginning of an srun."""


def reported(node: str, code: int) -> str:
    """A command of an srun."""
    return f'echo {code} > "$logs/{node}.part"; mv "$logs/{node}.part" "$logs/{node}.code"'


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose ranks always hang, on a SLURM of shell scripts. tmp_path/starts has a line for each start."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = f"{LOGS}echo start >> {tmp_path}/starts\n{reported('n1', 70)}\n{reported('n2', 1)}; exit 70\n"
    scripts = {"srun": srun, "squeue": "echo RUNNING\n", "sinfo": "echo n1 idle; echo n2 idle\n"}
    told = {name: f'echo "$@" >> {tmp_path}/{name}\n' for name in ("scontrol", "scancel")}
    for name, text in {**scripts, **told}.items():
        (folder / name).write_text("#!/bin/sh\n" + text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(batch.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)
    return Job(41, "41", 0, ["n1", "n2"], 0, 1, 0, tmp_path / "logs", ["+exp=stdlib"])


def test_a_run_that_hangs_starts_again_and_not_for_ever(
    hanging: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a hang at night that ends the job, and one that comes again and holds its nodes for a week."""
    steps = iter([0, 10, 10, 20, 20, 20, 20])
    monkeypatch.setattr(batch, "newest_checkpoint", lambda overrides: next(steps))
    assert Supervisor(hanging).run() == 70
    assert (tmp_path / "starts").read_text().count("start") == 7
    assert next(steps, None) is None
    assert read_hangs(hanging.logs / "hangs.json") == Hangs(20, MAX_HANGS + 1)
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_hangs_are_counted_over_requeues_and_then_count_as_crashes(
    hanging: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a job whose every requeue brings new retries; --max-restarts that hangs do not see."""
    monkeypatch.setattr(batch, "newest_checkpoint", lambda overrides: None)
    hanging.logs.mkdir()
    (hanging.logs / "hangs.json").write_text(json.dumps({"step": 20, "count": MAX_HANGS - 1}))
    hanging.restarts, hanging.max_restarts = 1, 1
    assert Supervisor(hanging).run() == 70
    assert (tmp_path / "starts").read_text().count("start") == 3  # the last retry, and a restart that was asked for
    (hanging.logs / "hangs.json").write_text("torn")
    assert not read_hangs(hanging.logs / "hangs.json").after(None).retried


def test_progress_is_the_newest_checkpoint_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: a folder that is not the run's; a checkpoint half written that is taken for progress."""
    overrides = ["+exp=stdlib", f"run.dir={tmp_path}/run"]
    progress(overrides)
    assert capsys.readouterr().out == "0\n"
    for name in ("step_5", "step_20", ".step_30.tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(overrides) == 20


def test_progress_that_cannot_be_told_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an exception of the supervisor's, which leaves a job without one."""
    for said, code in (("", 2), ("20", 1), ("error", 0)):
        done = subprocess.CompletedProcess([], code, stdout=said)
        monkeypatch.setattr(batch.subprocess, "run", lambda *args, done=done, **options: done)
        assert newest_checkpoint([]) is None
