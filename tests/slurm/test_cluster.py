"""Jobs on a real SLURM: training over nodes, preemption, a node that dies, spare nodes, sweeps, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.compose import compose_one
from launch.slurm.hosts import expand
from tests.pool import RankPool
from tests.slurm.cluster import PATIENCE, Cluster, why_not
from tests.slurm.test_hosts import HOSTS
from tests.trainer.starts import start_on
from trainer.injection import PLAN

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
STEPS = 60

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.thorough,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM here: {why_not()}"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = Cluster(Path(folder), 3)
        cluster.environment |= {"LATTICE_ROOT": str(ROOT), "LATTICE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def small(cluster: Cluster) -> list[str]:
    """Overrides for a run of milliseconds per step."""
    tokens = cluster.folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 300, size=40000).astype(np.uint16))
    model = [
        "vocab_size=300",
        "hidden_size=32",
        "intermediate_size=48",
        "num_layers=2",
        "num_heads=4",
        "num_kv_heads=2",
    ]
    return [
        "data=tokens",
        f"data.path={tokens}",
        *(f"model.{setting}" for setting in [*model, "max_seq_len=32", "dropout=0.1"]),
        "train.device=cpu",
        "train.seq_len=24",
        "train.global_batch_size=4",
        f"train.steps={STEPS}",
        "checkpoint.interval=10",
    ]


def records(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl, without a line that is being written."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(run_dir: Path) -> list[tuple[float, float, float]]:
    """Step, loss and gradient norm of every step, all bits."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run_dir)]


@pytest.fixture(scope="module")
def uninterrupted(small: list[str], cluster: Cluster, ranks: RankPool) -> list[tuple[float, float, float]]:
    """The curve of two ranks that nothing happens to, without SLURM."""
    run_dir = cluster.folder / "uninterrupted"
    assert start_on(ranks, 2, compose_one([*small, f"run.dir={run_dir}"])).error is None
    assert len(curve(run_dir)) == STEPS
    return curve(run_dir)


def reached(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Wait until a job has logged a step."""

    def there() -> bool:
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), said(cluster, job)
        return any(record["step"] >= step for record in records(run_dir)[-1:])

    cluster.until(there, f"step {step} of job {job}")


def ended(cluster: Cluster, job: str, *, patience: float = PATIENCE) -> str:
    """Wait for a job; its state."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
    cluster.until(lambda: cluster.job(job)["JobState"] in final, f"job {job} has ended", patience=patience)
    return cluster.job(job)["JobState"]


def said(cluster: Cluster, job: str) -> str:
    return (cluster.folder / f"lattice-{job}.out").read_text()


def test_a_run_that_is_preempted_and_loses_a_node_has_the_losses_of_one_that_is_not(
    cluster: Cluster, small: list[str], uninterrupted: list[tuple[float, float, float]]
) -> None:
    """Would catch: a signal that does not reach the ranks or kills them; steps repeated or skipped by a restart."""
    run_dir = cluster.folder / "run"
    job = cluster.command("sbatch", "--parsable", "--nodes=2", str(SCRIPT), *small, f"run.dir={run_dir}")
    reached(cluster, job, run_dir, 3)
    cluster.command("scancel", "--signal=USR1", job)  # as `--signal=USR1@300` and preemption do
    cluster.start_again(job)
    saved = int(records(run_dir)[-1]["step"])
    assert f"saved at step {saved}" in said(cluster, job)
    assert cluster.job(job)["Restarts"] == "1"

    reached(cluster, job, run_dir, saved + 12)
    cluster.kill_node("n1")
    cluster.start_again(job)
    assert ended(cluster, job) == "COMPLETED", said(cluster, job)
    cluster.revive("n1")
    assert cluster.job(job)["Restarts"] == "2"
    assert expand(cluster.job(job)["NodeList"]) == ["n0", "n2"]
    assert f"step_{saved} at step {saved}" in said(cluster, job)
    assert curve(run_dir) == uninterrupted
    assert {path.name for path in (cluster.folder / f"lattice-{job}").iterdir()} == {"start0.0", "start1.0", "start2.0"}


def test_a_spare_node_takes_the_place_of_one_that_dies(
    cluster: Cluster, small: list[str], uninterrupted: list[tuple[float, float, float]]
) -> None:
    """Would catch: a job with a spare node that waits in the queue all the same, or trains on three nodes."""
    run_dir = cluster.folder / "spare"
    sbatch = ["sbatch", "--parsable", "--nodes=3", "--no-kill", str(SCRIPT), "--spare-nodes=1"]
    job = cluster.command(*sbatch, *small, f"run.dir={run_dir}")
    reached(cluster, job, run_dir, 12)
    cluster.kill_node("n1")
    assert ended(cluster, job) == "COMPLETED", said(cluster, job)
    cluster.revive("n1")
    assert cluster.job(job)["Restarts"] == "0"
    assert "2 x 1 ranks on n0,n2" in said(cluster, job)
    assert curve(run_dir) == uninterrupted


def test_a_run_that_hangs_goes_on_from_its_checkpoint_without_being_asked_to(
    cluster: Cluster, small: list[str], uninterrupted: list[tuple[float, float, float]]
) -> None:
    """Would catch: the watchdog's exit code lost between rank, node and batch script; progress of another folder."""
    run_dir = cluster.folder / "hung"
    plan = cluster.folder / "plan" / "plan.json"
    plan.parent.mkdir()
    plan.write_text(json.dumps({"faults": [{"number": 0, "kind": "hang", "step": 25, "rank": 1}]}))
    sbatch = ["sbatch", "--parsable", "--nodes=2", f"--export=ALL,{PLAN}={plan}", str(SCRIPT)]
    job = cluster.command(*sbatch, *small, f"run.dir={run_dir}", "train.timeout_seconds=15")
    assert ended(cluster, job, patience=3 * PATIENCE) == "COMPLETED", said(cluster, job)  # a timeout, and two starts
    assert cluster.job(job)["Restarts"] == "0"
    assert "hang 1 since the checkpoint of step 20; up to 3 are retried" in said(cluster, job)
    assert curve(run_dir) == uninterrupted
    assert len(list((run_dir / "hangs").glob("*/report.json"))) == 1


def test_a_sweep_trains_every_point_while_mistakes_and_cancelled_jobs_stay_out_of_the_queue(
    cluster: Cluster, small: list[str]
) -> None:
    """Would catch: tasks of an array with one point; a configuration error that is tried again; `scancel` undone."""
    plain = [*small, f"run.dir={cluster.folder}/plain", "train.steps=100000"]
    cancelled = cluster.command("sbatch", "--parsable", str(SCRIPT), *plain)
    wrong = cluster.command("sbatch", "--parsable", str(SCRIPT), *small, f"run.dir={cluster.folder}/x", "optim.lr=-1")
    sweep = cluster.folder / "sweep"
    swept = ["train.steps=3", "train.seed=1,2", f"run.dir={sweep}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--multirun", "hydra/launcher=slurm", *small, *swept],
        env=cluster.environment,
        cwd=cluster.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    array = done.stdout.partition("job array ")[2].partition(",")[0]
    for task in (0, 1):
        assert ended(cluster, f"{array}_{task}") == "COMPLETED", (sweep / "slurm" / f"{array}_{task}.out").read_text()
    one, other = curve(sweep / "train.seed=1"), curve(sweep / "train.seed=2")
    assert len(one) == len(other) == 3
    assert one != other
    assert ended(cluster, wrong) == "FAILED"
    assert (cluster.job(wrong)["ExitCode"], cluster.job(wrong)["Restarts"]) == ("2:0", "0")
    assert "configuration error: optim.lr=-1" in said(cluster, wrong)

    reached(cluster, cancelled, cluster.folder / "plain", 3)
    cluster.command("scancel", cancelled)
    assert ended(cluster, cancelled) == "CANCELLED"
    assert cluster.job(cancelled)["Restarts"] == "0"


def test_a_task_of_an_array_that_is_preempted_comes_back_and_leaves_the_others_alone(
    cluster: Cluster, small: list[str]
) -> None:
    """Would catch: the task that has the array's own number, taken for the array by the commands that requeue it."""
    points = cluster.folder / "array.jsonl"
    runs = [cluster.folder / f"point{task}" for task in range(2)]
    points.write_text("".join(json.dumps([*small, f"run.dir={run}"]) + "\n" for run in runs))
    command = ["sbatch", "--parsable", "--array=0-1", "--output=array-%a.out", str(SCRIPT), f"--points={points}"]
    array = cluster.command(*command)
    # Whichever task it is: the last one, as soon as it is taken out of the array.
    cluster.until(lambda: all(records(run) for run in runs), "both tasks train")
    numbers = {task: cluster.job(f"{array}_{task}")["JobId"] for task in (0, 1)}
    task = next(task for task, number in numbers.items() if number == array)
    cluster.command("scancel", "--signal=USR1", f"{array}_{task}")
    cluster.start_again(f"{array}_{task}")
    assert [ended(cluster, f"{array}_{t}") for t in (0, 1)] == ["COMPLETED"] * 2
    assert [cluster.job(f"{array}_{t}")["Restarts"] for t in (task, 1 - task)] == ["1", "0"]
    assert [len(curve(run)) for run in runs] == [STEPS, STEPS]


def test_names_of_nodes_are_slurms_own(cluster: Cluster) -> None:
    """Would catch: the table that test_hosts.py goes by, written after our own idea of it."""
    for hosts, names in HOSTS.items():
        assert cluster.command("scontrol", "show", "hostnames", hosts).split() == names


def test_the_cluster_leaves_nothing_behind() -> None:
    """Would catch: daemons, and jobs of theirs, that outlive the tests."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = Cluster(Path(folder), 1)
        try:
            cluster.start()
            cluster.command("sbatch", "--output=/dev/null", "--wrap=sleep 100")
            cluster.until(lambda: list(cluster.processes("n0")), "the job runs")
        finally:
            cluster.stop()
        assert list(cluster.processes()) == []
