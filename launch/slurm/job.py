"""What the batch script runs, on the first node of the job: starts all ranks, and decides what follows their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from launch.slurm.hosts import address_of, expand, free_port, ports
from launch.slurm.node import END, GRACE_SECONDS, SIGNALS, beat, name_of_job, read_reports
from launch.slurm.outcome import (
    CONFIG_EXIT_CODE,
    MAX_HANGS,
    PREEMPTED_EXIT_CODE,
    Action,
    Hangs,
    Outcome,
    exit_code,
    judge,
    lost,
    next_action,
)

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.5
REPORT_SECONDS = 90.0
"""From the end of a step until all its reports are seen: NFS may show a folder's new files a minute late."""
NODES_SECONDS = 10.0
"""Between questions to the controller about the job's nodes: one small query of one process per job."""
VERDICT_SECONDS = 900.0
"""How long SLURM may take to notice that a node is gone: SlurmdTimeout, 300 s by default, and some."""
NUMBERS = ("spare-nodes", "ranks-per-node", "max-restarts")


class UsageError(Exception):
    """The command line or the allocation cannot be used."""


@dataclass
class Job:
    """A job as SLURM describes it, and what its command line asks for. Filled by `job_from`."""

    job_id: int
    name: str  # what SLURM's commands call it (`name_of_job`)
    restarts: int  # how often SLURM has requeued it
    nodes: list[str]  # of the allocation; the first is this one
    spare_nodes: int
    ranks_per_node: int
    max_restarts: int  # after crashes, within this allocation
    logs: Path
    overrides: list[str]
    gone: set[str] = field(default_factory=set)  # nodes not to be used again

    @property
    def num_needed(self) -> int:
        return len(self.nodes) - self.spare_nodes


def job_from(arguments: list[str], environment: Mapping[str, str]) -> Job:
    """Raises UsageError."""
    options: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif equals and (name == "points" or (name in NUMBERS and value.isdecimal())):
            options[name] = value
        else:
            raise UsageError(
                f"{argument} is no option of the batch script; there are --points=FILE, "
                + ", ".join(f"--{number}=N" for number in NUMBERS)
                + ", then overrides such as optim.lr=1e-4 (a sweep: docs/SLURM.md)"
            )
    if "points" in options:
        overrides += _point(Path(options["points"]), environment.get("SLURM_ARRAY_TASK_ID"))
    nodes = expand(environment["SLURM_JOB_NODELIST"])
    spare_nodes = int(options.get("spare-nodes", 0))
    if 0 < spare_nodes == len(nodes) - 1:
        raise UsageError(
            f"--spare-nodes={spare_nodes} leaves 1 of --nodes={len(nodes)} to train, and the end of the first node is "
            "the end of this script; train on 2 or more, or without spare nodes, where SLURM requeues the job"
        )
    if spare_nodes >= len(nodes):
        raise UsageError(
            f"--spare-nodes={spare_nodes} leaves none of --nodes={len(nodes)} to train; ask for more nodes"
        )
    ranks_per_node = int(options.get("ranks-per-node", environment.get("SLURM_GPUS_ON_NODE", 1)))
    if ranks_per_node < 1:
        raise UsageError("--ranks-per-node=0 leaves nobody to train; use 1 or more")
    return Job(
        job_id=int(environment["SLURM_JOB_ID"]),
        name=name_of_job(environment),
        restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
        nodes=nodes,
        spare_nodes=spare_nodes,
        ranks_per_node=ranks_per_node,
        max_restarts=int(options.get("max-restarts", 0)),
        logs=_logs(environment),
        overrides=overrides,
    )


def _logs(environment: Mapping[str, str]) -> Path:
    """Folder of this job's logs, in that of the run (launch/slurm/submit.py) or where it was submitted."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    folder = environment.get("LATTICE_SLURM_LOGS")
    return Path(f"lattice-{job}" if folder is None else f"{folder}/{job}").absolute()


def _point(file: Path, task: str | None) -> list[str]:
    """Overrides of one task of an array: a JSON list per line of the file."""
    if task is None:
        raise UsageError(f"--points={file} is for a job array; submit with sbatch --array")
    lines = file.read_text().splitlines()
    if not int(task) < len(lines):
        raise UsageError(f"task {task} of the array is not among the {len(lines)} points of {file}")
    return list(json.loads(lines[int(task)]))


class Supervisor:
    """Starts ranks until the job is done, cannot go on, or goes back to the queue."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.signalled = False
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """From `--signal=B:...`, which reaches the batch script alone. To SIGTERM srun itself answers by killing."""
        self.signalled = True
        _ask("scancel", "--signal=USR1", self.job.name)

    def run(self) -> int:
        """The exit code of the batch script."""
        crashes = 0
        for start in range(sys.maxsize):
            nodes = self._usable()[: self.job.num_needed]
            if len(nodes) < self.job.num_needed:  # one went while nothing ran; fewer ranks would be another layout
                _say(f"{len(nodes)} nodes are left and {self.job.num_needed} needed; requeue")
                self._requeue()
                return PREEMPTED_EXIT_CODE
            codes = self._start(nodes, start)
            outcome = judge(codes, down=self._down())
            if outcome is Outcome.HUNG and not self._retries_hang():
                outcome = Outcome.CRASHED
            if outcome is Outcome.NODE_LOST:
                self.job.gone |= lost(codes, down=self._down())
            usable = self._usable()
            action = next_action(
                outcome,
                num_usable=len(usable),
                num_needed=self.job.num_needed,
                crashes_left=self.job.max_restarts - crashes,
            )
            crashes += outcome is Outcome.CRASHED
            if outcome is Outcome.NODE_LOST and action is Action.REQUEUE and not self._confirmed():
                _say(f"no report from {', '.join(sorted(self.job.gone))}, which SLURM calls well; see the output above")
                action = Action.STOP
            _say(f"{outcome.value} ({_summary(codes)}); {action.value}")
            if action is Action.REQUEUE:
                self._requeue()
            if action is not Action.RESTART:
                return exit_code(outcome, codes)
        raise AssertionError

    def _start(self, nodes: list[str], start: int) -> dict[str, int | None]:
        """Run the ranks once; the exit code of each node, None for one that did not report."""
        job = self.job
        logs = job.logs / f"start{job.restarts}.{start}"
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port(ports(job.job_id, job.restarts + start))
        rendezvous = f"{address_of(nodes[0], _ask('scontrol', 'show', 'node', nodes[0]))}:{port}"
        _say(f"{len(nodes)} x {job.ranks_per_node} ranks on {','.join(nodes)}, rendezvous {rendezvous}, logs in {logs}")
        options = {
            "nodes": ",".join(nodes),
            "ranks-per-node": job.ranks_per_node,
            "rendezvous": rendezvous,
            "logs": logs,
        }
        program = [
            sys.executable,
            str(ROOT / "launch" / "slurm" / "node.py"),
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        step = subprocess.Popen([*srun(nodes), *program, "--", *job.overrides])
        self._wait(step, nodes, logs)
        return self._reports(nodes, logs)

    def _reports(self, nodes: list[str], logs: Path) -> dict[str, int | None]:
        """Of a step that has ended. Reports are waited for where some are there, and not of nodes that are down."""
        end = time.monotonic() + REPORT_SECONDS
        asked = -NODES_SECONDS
        while True:
            codes = read_reports(logs, nodes)
            missing = {node for node, code in codes.items() if code is None}
            if not missing or len(missing) == len(nodes) or time.monotonic() > end:
                return codes
            if time.monotonic() > asked + NODES_SECONDS:
                asked = time.monotonic()
                if missing <= self._down():
                    return codes
            beat(logs)
            time.sleep(POLL_SECONDS)

    def _wait(self, step: subprocess.Popen[bytes], nodes: list[str], logs: Path) -> None:
        """Until the step has ended; ends it when a node is gone, or has failed and the others do not end."""
        asked = time.monotonic()
        end_at = ended = None
        down: set[str] = set()
        while step.poll() is None:
            now = time.monotonic()
            codes = read_reports(logs, nodes)
            beat(logs)
            if now > asked + NODES_SECONDS:
                asked, down = now, self._down() & set(nodes)
            if end_at is None and any(codes.values()):
                end_at = now + GRACE_SECONDS
            if ended is None and (down or (end_at is not None and now >= end_at)):
                ended = now
                _say(f"{', '.join(sorted(down)) + ' is down' if down else 'ranks have failed'}; all others are ended")
                _ask("scancel", f"--signal={END.name}", self.job.name)
            # A node that is well reports now. srun would wait for one that is gone.
            if ended is not None:
                reported = all(code is not None for node, code in codes.items() if node not in down)
                if now > ended + 2 * GRACE_SECONDS:
                    step.kill()
                elif reported or now > ended + GRACE_SECONDS:
                    step.terminate()
            time.sleep(POLL_SECONDS)

    def _retries_hang(self) -> bool:
        """Count one more hang; whether the run starts again. The count is a file: it outlives a requeue."""
        path = self.job.logs / "hangs.json"
        step = newest_checkpoint(self.job.overrides)
        hangs = read_hangs(path).after(step)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(hangs)))
        part.rename(path)
        where = "an unknown step" if step is None else f"step {step}"
        _say(f"hang {hangs.count} since the checkpoint of {where}; up to {MAX_HANGS} are retried")
        return hangs.retried

    def _usable(self) -> list[str]:
        down = self._down()
        return [node for node in self.job.nodes if node not in down and node not in self.job.gone]

    def _down(self) -> set[str]:
        """Nodes of the job that SLURM has given up."""
        states = _ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(self.job.nodes)}", "--format=%N %T")
        return down_nodes(states)

    def _confirmed(self) -> bool:
        """Whether SLURM comes to see that a node is gone. Unless the job is submitted with --no-kill, SLURM then ends
        this script and requeues the job itself."""
        end = time.monotonic() + VERDICT_SECONDS
        while not (found := bool(self._down() & self.job.gone)) and time.monotonic() < end and not self.signalled:
            time.sleep(NODES_SECONDS)
        return found or self.signalled

    def _requeue(self) -> None:
        """Unless SLURM or the user has already decided: `scontrol requeue` would bring back a cancelled job."""
        state = _ask("squeue", "--noheader", f"--jobs={self.job.name}", "--format=%T").strip()
        if state and state != "RUNNING":
            _say(f"the job is {state}: not requeued")
            return
        done = subprocess.run(["scontrol", "requeue", self.job.name], capture_output=True, text=True)
        if done.returncode != 0:
            _say(f"cannot be requeued, submit it again to continue: {done.stderr.strip()}")


def read_hangs(path: Path) -> Hangs:
    """Of this job so far. A file that cannot be read counts as the last retry: never for ever."""
    try:
        return Hangs(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Hangs()
    except (ValueError, TypeError):
        return Hangs(count=MAX_HANGS)


def newest_checkpoint(overrides: list[str]) -> int | None:
    """The step from which the run of a command line would go on; 0: from its start; None: cannot be told.

    In a process of its own, as only Hydra knows run.dir.
    """
    program = [sys.executable, str(ROOT / "launch" / "slurm" / "progress.py"), *overrides]
    done = subprocess.run(program, capture_output=True, text=True)
    said = done.stdout.strip()
    return int(said) if done.returncode == 0 and said.isdecimal() else None


def srun(nodes: list[str]) -> list[str]:
    """The step: one process per node, which sees all of its GPUs and CPUs."""
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}",
        "--cpu-bind=none",  # ranks share the node's cores; bound to one, they and their loaders would take turns
        "--overlap",  # do not wait until the remains of a step before, on a node that is gone, are accounted for
        "--no-kill",  # ranks that are left say what they saw; whether they go on is decided here
        "--kill-on-bad-exit=0",
        "--export=ALL",
    ]


def down_nodes(states: str) -> set[str]:
    """Of lines `NODE STATE` by sinfo. A * (no answer, which may pass) alone is not down; a draining node goes on."""
    pairs = [line.split() for line in states.splitlines() if line.strip()]
    return {node for node, state in pairs if state.rstrip("*~#!%$@^-").lower() in ("down", "fail", "error", "unknown")}


def _ask(*command: str) -> str:
    """What a SLURM command says; nothing if it fails, such as while the controller restarts."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def _summary(codes: Mapping[str, int | None]) -> str:
    return ", ".join(
        f"{node} {'gave no report' if code is None else f'exit code {code}'}" for node, code in codes.items()
    )


def _say(text: str) -> None:
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    try:
        job = job_from(arguments, os.environ)
    except UsageError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return CONFIG_EXIT_CODE
    return Supervisor(job).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
