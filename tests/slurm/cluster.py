"""A real SLURM on this one machine: munged, slurmctld and several slurmd in a folder, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/sbin:/sbin"  # where Debian has daemons, which a user's PATH may lack
PATIENCE = 180.0


def why_not() -> str | None:
    """Why no cluster can be started here; None: it can."""
    missing = [program for program in PROGRAMS if _path(program) is None]
    if missing:
        return f"no {', '.join(missing)}; `apt-get install slurm-wlm munge` brings them"
    if os.geteuid() != 0:
        return "slurmd starts the jobs of other users, which takes root"
    return None


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SBIN}")


class Cluster:
    """`num_nodes` nodes n0, n1, ... of 4 CPUs. `folder` has to have a short path: sockets are in it."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{index}" for index in range(num_nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Returns when all nodes are idle."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        at = [f"--{kind}={self.folder}/munge.{kind}" for kind in ("socket", "pid-file", "log-file", "seed-file")]
        # --force: the folders above belong to someone else than munged would like.
        self._start("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *at])
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged listens")
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for node in self.nodes:
            self._start(node, ["slurmd", "-D", "-N", node])
        self.until(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle")

    def stop(self) -> None:
        """Ends every job and daemon."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.command("scancel", "--full", "--signal=KILL", f"--user={pwd.getpwuid(os.geteuid()).pw_name}")
            self.until(lambda: not self.command("squeue", "--noheader"), "all jobs have ended", patience=10)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        for process in self.processes():  # what a daemon left behind
            _kill(process)

    def command(self, *arguments: str) -> str:
        """What a SLURM command says. Raises CalledProcessError when it fails."""
        return subprocess.run(
            arguments,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        ).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, ExitCode, ..."""
        return dict(
            word.split("=", 1) for word in self.command("scontrol", "show", "job", job_id).split() if "=" in word
        )

    def states(self) -> dict[str, str]:
        """By node."""
        return dict(
            line.split() for line in self.command("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        )

    def until(self, condition: Callable[[], object], what: str, *, patience: float = PATIENCE) -> None:
        """Raises TimeoutError when `condition` does not become true."""
        end = time.monotonic() + patience
        while True:
            try:
                if condition():
                    return
            except subprocess.CalledProcessError as error:
                last = error.stderr
            else:
                last = ""
            if time.monotonic() > end:
                raise TimeoutError(f"not so after {patience:.0f} s: {what}. {last}")
            time.sleep(0.1)

    def start_again(self, job_id: str) -> None:
        """Let a requeued job begin; SLURM would wait two minutes."""
        self.until(lambda: self.job(job_id)["JobState"] == "PENDING", f"job {job_id} is requeued")
        time.sleep(2)  # nodes refuse a start in the second of the end before: "Job credential revoked", the job fails
        self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def kill_node(self, node: str, *, noticed: bool = True) -> None:
        """What a power failure does: everything on the node is gone at once, and nobody says so.

        noticed: do not wait for SlurmdTimeout; the controller is told.
        """
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        processes = list(self.processes(node))
        for process in {_parent(process) for process in processes}:
            if (Path("/proc") / str(process) / "comm").read_text().startswith("slurmstepd"):
                _kill(process)  # first: it would report the end of its tasks
        for process in processes:
            _kill(process)
        if noticed:
            self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def revive(self, node: str) -> None:
        """Start a node that was killed."""
        self._start(node, ["slurmd", "-D", "-N", node])
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.until(lambda: self.states()[node] == "idle", f"{node} is idle")

    def processes(self, node: str | None = None) -> Iterator[int]:
        """Those of jobs on a node, or of this cluster."""
        marks = [f"SLURM_CONF={self.folder}/slurm.conf".encode()]
        marks += [] if node is None else [f"SLURMD_NODENAME={node}".encode()]
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (folder / "environ").read_bytes().split(b"\0") + (folder / "cmdline").read_bytes().split(
                        b"\0"
                    )
                    if all(mark in words for mark in marks):
                        yield int(folder.name)

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self._daemons[name] = subprocess.Popen(
                [_path(command[0]) or command[0], *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _configuration(self) -> str:
        controller, *ports = _free_ports(1 + len(self.nodes))
        lines = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/munge.socket",
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": f"{self.folder}/spool.%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd.%n.pid",
            # No cgroups: a container seldom may make them.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "SlurmctldTimeout": 10,
            "SlurmdTimeout": 10,
            "KillWait": 3,
            "ReturnToService": 2,
            "JobRequeue": 1,
            "SlurmdParameters": "config_overrides",
        }
        nodes = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        return "\n".join([*(f"{name}={value}" for name, value in lines.items()), *nodes, partition, ""])


def _parent(process: int) -> int:
    return int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
