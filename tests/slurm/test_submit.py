"""Submitting, with a program in the place of sbatch that notes what it is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from launch.compose import TRAIN, compose_one, name_of_point, run_program
from launch.slurm import submit
from launch.slurm.submit import Submission, SubmitError, parse, submit_run
from trainer.config import ConfigError, TrainConfig


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the arguments of sbatch, one on a line; the working directory is empty."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/told\necho "$LATTICE_SLURM_LOGS" >> {tmp_path}/told\necho 77\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "told"


def test_a_run_is_submitted_with_its_spare_nodes_and_logs_beside_it(told: Path) -> None:
    """Would catch: a spare node that trains; sbatch options behind the script, where it does not read them."""
    submission, overrides, dry_run = parse(
        ["--nodes=2", "--spare-nodes=1", "--gpus-per-node=h100:4", "--time=8:00:00", "-C", "+exp=zero3_13b"]
    )
    assert (submission.world_size, overrides, dry_run) == (8, ["+exp=zero3_13b"], False)
    assert submit_run(submission, overrides) == "77"
    logs = told.parent / "runs" / "zero3_13b" / "slurm"
    assert logs.is_dir()  # sbatch would not make it
    *options, _ = arguments = told.read_text().splitlines()
    assert arguments[-1] == str(logs)
    script = options.index(str(submit.SCRIPT))
    before = {"--nodes=3", "--no-kill", "--gpus-per-node=h100:4", "--time=8:00:00", f"--output={logs}/%j.out", "-C"}
    assert before <= set(options[:script])
    assert options[script + 1 :] == ["--spare-nodes=1", "+exp=zero3_13b"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes=2", "+exp=zero3_13b", "parallel.tp=3"], "parallel.tp=3 does not divide the 2 processes"),
        (["--nodes=2", "optim.lt=1"], "optim.lt"),
        (["--nodes=0"], "nodes=0 must be 1 or more; use 1"),
        (["--spare-nodes=1"], "spare_nodes=1 needs two nodes that train, nodes=1 has one: .* use nodes=2"),
        (["--nodes"], "--nodes needs a number"),
        (["--gpus-per-node=all"], "gpus_per_node=all is no number of GPUs; use such as 8 or h100:8"),
        (["--multirun", "optim.lr=1,2"], "--multirun hydra/launcher=slurm"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_queued(told: Path, arguments: list[str], problem: str) -> None:
    """Would catch: an error that is seen when the job starts, two days later."""
    with pytest.raises(ConfigError, match=problem):
        submit.main(arguments)
    assert not told.exists()


def test_what_sbatch_refuses_is_said(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a submission that nobody accepted."""
    (told.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(SubmitError, match="invalid partition"):
        submit_run(Submission(), [])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SubmitError, match="login node"):
        submit_run(Submission(), [])


def sweep(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def job(config: TrainConfig) -> None:
        raise AssertionError("a point was run here")

    run_program(TRAIN, ["--multirun", "hydra/launcher=slurm", *arguments], job)


def test_a_sweep_is_an_array_of_its_points(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: points that share a folder, or another one than the same sweep without SLURM has."""
    options = ["nodes=2", "ranks_per_node=2", "time=1:00:00", "max_parallel=3"]
    swept = ["+exp=stdlib", "optim.lr=1e-3,3e-3", "schedule=constant,wsd", "run.dir=runs/s"]
    sweep(monkeypatch, *(f"hydra.launcher.{option}" for option in options), *swept)
    arguments = told.read_text().splitlines()
    assert {"--array=0-3%3", "--nodes=2", "--time=1:00:00", "--ranks-per-node=2"} <= set(arguments)
    (points,) = (a.partition("=")[2] for a in arguments if a.startswith("--points="))
    configs = [compose_one(json.loads(line)) for line in Path(points).read_text().splitlines()]
    found = [(c.optim.lr, c.schedule.name) for c in configs]
    assert found == [(1e-3, "constant"), (1e-3, "wsd"), (3e-3, "constant"), (3e-3, "wsd")]
    name = name_of_point(swept, ["+exp=stdlib", "optim.lr=0.001", "schedule=wsd"])
    assert name == "optim.lr=0.001,schedule=wsd"  # as without SLURM
    assert (configs[1].run.dir, configs[1].run.name) == (f"runs/s/{name}", f"stdlib-{name}")


def test_a_sweep_with_a_wrong_point_is_refused_as_a_whole(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: half of a sweep in the queue, and the other half to be found missing."""
    with pytest.raises(ConfigError, match=r"parallel\.tp=7 does not divide the 2 processes"):
        sweep(monkeypatch, "hydra.launcher.nodes=2", "+exp=stdlib", "parallel.tp=1,7")
    assert not told.exists()
