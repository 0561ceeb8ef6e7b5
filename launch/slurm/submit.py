"""Submit a run: `python launch/slurm/submit.py --nodes=4 --gpus-per-node=8 --time=24:00:00 +exp=zero3_13b`.

The configuration is checked here, for as many ranks as the job will have: a mistake costs seconds, not a place in the
queue. Options of the batch script (--spare-nodes=N, --ranks-per-node=N, --max-restarts=N) and --dry-run are ours, all
others go to sbatch, as --name=value. Exit codes: 0 submitted, 2 configuration error, 1 sbatch refused.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from launch.compose import TRAIN, compose_one, name_of_point
from launch.errors import exit_code_of
from trainer.config import ConfigError, RunConfig
from trainer.validate import finalize

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"


class SubmitError(OSError):
    """sbatch is not there, or refused the job."""


@dataclass
class Submission:
    """What a job, or each task of an array, asks of the cluster. Filled from a command line or by Hydra."""

    nodes: int = 1  # that train, without spare ones
    spare_nodes: int = 0
    gpus_per_node: str | None = None  # as sbatch's option: 8 or h100:8; None: none, train on CPUs
    ranks_per_node: int | None = None  # None: one per GPU; without GPUs one
    max_restarts: int = 0
    sbatch: list[str] = field(default_factory=list)  # further options, as --name=value

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be {least} or more; use {least}"
            for name, value, least in (
                ("nodes", self.nodes, 1),
                ("spare_nodes", self.spare_nodes, 0),
                ("max_restarts", self.max_restarts, 0),
                ("ranks_per_node", 1 if self.ranks_per_node is None else self.ranks_per_node, 1),
            )
            if value < least
        ]
        if self.nodes == 1 and self.spare_nodes > 0:
            problems.append(
                f"spare_nodes={self.spare_nodes} needs two nodes that train, nodes=1 has one: its end is the end of "
                "the batch script; use nodes=2, or spare_nodes=0, where SLURM requeues the job"
            )
        if self.gpus_per_node is not None and not re.fullmatch(r"(.+:)?[1-9]\d*", str(self.gpus_per_node)):
            problems.append(f"gpus_per_node={self.gpus_per_node} is no number of GPUs; use such as 8 or h100:8")
        problems += [
            f"sbatch option {o!r} must begin with a dash; use --name=value" for o in self.sbatch if o[:1] != "-"
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def world_size(self) -> int:
        """Ranks of a job."""
        gpus = 1 if self.gpus_per_node is None else int(str(self.gpus_per_node).rpartition(":")[2])
        return self.nodes * (self.ranks_per_node or gpus)

    def command(self, arguments: Sequence[str], *, logs: Path, array: str | None = None, name: str) -> list[str]:
        """The sbatch command. arguments: for the batch script after its options. logs: folder for the jobs' output."""
        return [
            "sbatch",
            "--parsable",
            f"--job-name={name}",
            f"--nodes={self.nodes + self.spare_nodes}",
            *([] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]),
            # Otherwise SLURM ends the whole job with its first node, and the spare one goes back to the queue too.
            *(["--no-kill"] if self.spare_nodes else []),
            *([] if array is None else [f"--array={array}"]),
            f"--output={logs / ('%j.out' if array is None else '%A_%a.out')}",
            *self.sbatch,
            str(SCRIPT),
            *([f"--spare-nodes={self.spare_nodes}"] if self.spare_nodes else []),
            *([] if self.ranks_per_node is None else [f"--ranks-per-node={self.ranks_per_node}"]),
            *([f"--max-restarts={self.max_restarts}"] if self.max_restarts else []),
            *arguments,
        ]


def submit_run(submission: Submission, overrides: Sequence[str], *, dry_run: bool = False) -> str:
    """Check and submit one run; the job's id, or with dry_run the command. Raises ConfigError and SubmitError."""
    config = finalize(compose_one(list(overrides)), world_size=submission.world_size)
    logs = Path(config.run.dir).absolute() / "slurm"
    command = submission.command(overrides, logs=logs, name=config.run.name)
    return shlex.join(command) if dry_run else _submit(command, logs)


def submit_sweep(
    submission: Submission, sweep: Sequence[str], jobs: Sequence[Sequence[str]], *, max_parallel: int = 0
) -> tuple[str, Path]:
    """Check all points of a sweep and submit them as one job array; its id, and the folder of its logs.

    Nothing is submitted when one point is wrong. sweep: its command line, with all values. jobs: overrides of each
    point. max_parallel: tasks that may run at a time; 0: as many as fit.
    """
    points, base, problems = [], None, []
    for overrides in jobs:
        try:
            config = compose_one(list(overrides))
            base = replace(config.run)
            TRAIN.of_sweep(config, name_of_point(sweep, overrides))
            points.append(_with_places(overrides, config.run))
            finalize(config, world_size=submission.world_size)
        except ConfigError as error:
            problems += error.problems
    if problems or base is None:
        raise ConfigError(list(dict.fromkeys(problems)) or ["the sweep has no points"])
    logs = Path(base.dir).absolute() / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=logs, prefix="points-", suffix=".jsonl", delete=False) as file:
        file.writelines(json.dumps(list(point)) + "\n" for point in points)
    array = f"0-{len(points) - 1}" + (f"%{max_parallel}" if max_parallel else "")
    return _submit(submission.command([f"--points={file.name}"], logs=logs, array=array, name=base.name), logs), logs


def _with_places(overrides: Sequence[str], run: RunConfig) -> list[str]:
    """Overrides of a point, with the folder and name that the same sweep without SLURM would give it."""
    kept = [o for o in overrides if o.partition("=")[0].lstrip("+") not in ("run.dir", "run.name")]
    return [*kept, f"run.dir={_quoted(run.dir)}", f"run.name={_quoted(run.name)}"]


def _quoted(value: str) -> str:
    """As a string in an override, where commas and equals signs would mean something."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _submit(command: list[str], logs: Path) -> str:
    logs.mkdir(
        parents=True, exist_ok=True
    )  # sbatch takes a job whose output has no folder, and loses it without a word
    environment = {
        **os.environ,
        "LATTICE_ROOT": str(ROOT),
        "LATTICE_PYTHON": sys.executable,
        "LATTICE_SLURM_LOGS": str(logs),
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise SubmitError("sbatch is not installed here; submit from a login node of the cluster") from None
    if done.returncode != 0:
        raise SubmitError(f"sbatch refused the job: {done.stderr.strip()}\n  {shlex.join(command)}")
    return done.stdout.strip().partition(";")[0]  # behind it: the cluster, where there are several


def parse(arguments: Sequence[str]) -> tuple[Submission, list[str], bool]:
    """Submission, overrides and dry_run of a command line. Raises ConfigError."""
    ours = {"nodes": int, "spare-nodes": int, "gpus-per-node": str, "ranks-per-node": int, "max-restarts": int}
    values: dict[str, int | str] = {}
    sbatch, overrides, problems, dry_run = [], [], [], False
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--dry-run":
            dry_run = True
        elif argument in ("--multirun", "-m"):
            problems.append(f"{argument}: a sweep is submitted by launch/train.py --multirun hydra/launcher=slurm")
        elif not argument.startswith("-"):
            overrides.append(argument)
        elif name not in ours:
            sbatch.append(argument)
        elif not equals or (ours[name] is int and not value.isdecimal()):
            problems.append(f"{argument} needs a {'number' if ours[name] is int else 'value'}; use such as --{name}=2")
        else:
            values[name.replace("-", "_")] = ours[name](value)
    if problems:
        raise ConfigError(problems)
    return Submission(**values, sbatch=sbatch), overrides, dry_run  # type: ignore[arg-type]


def main(arguments: list[str]) -> None:
    """Submit what the command line asks for, and say where it will be seen."""
    submission, overrides, dry_run = parse(arguments)
    submitted = submit_run(submission, overrides, dry_run=dry_run)
    print(submitted if dry_run else f"submitted job {submitted}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
