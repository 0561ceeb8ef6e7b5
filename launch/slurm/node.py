"""The ranks of one node, started by srun once per node: their environment, logs, signals and exit code.

Not torchrun: it exits 1 whatever its ranks return, so that a configuration error looks like a crash, and gives ranks
30 seconds after a signal, in which a large checkpoint is not saved.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from launch.slurm.outcome import CONFIG_EXIT_CODE, PREEMPTED_EXIT_CODE, code_of_node

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 30.0
"""For the other ranks of a node, from the end of the first that failed. What they wait for will not come; what they
have to say about it takes seconds."""
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END = signal.SIGUSR2
"""Ends ranks, which do not handle it, at once, and lets this process report. SIGTERM would have them save."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def name_of_job(environment: Mapping[str, str]) -> str:
    """What SLURM's commands call this job.

    One task of every array has the array's own number, by which they mean all of its tasks. The others go by theirs: a
    job that was submitted from a task has that task's SLURM_ARRAY variables, and is none.
    """
    job = environment["SLURM_JOB_ID"]
    return f"{job}_{environment['SLURM_ARRAY_TASK_ID']}" if environment.get("SLURM_ARRAY_JOB_ID") == job else job


def environment_of_rank(
    environment: Mapping[str, str],
    *,
    node_index: int,
    local_rank: int,
    num_nodes: int,
    ranks_per_node: int,
    rendezvous: str,
) -> dict[str, str]:
    """What torchrun would set for a rank. rendezvous: HOST:PORT, where rank 0 listens."""
    address, _, port = rendezvous.rpartition(":")
    ours = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(num_nodes * ranks_per_node),
        "RANK": str(node_index * ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node_index),
    }
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if "GLOO_SOCKET_IFNAME" not in environment and (name := interface_towards(address)) is not None:
        # gloo would take the address of the host's own name, which on many systems is 127.0.1.1.
        defaults["GLOO_SOCKET_IFNAME"] = name
    return {**defaults, **environment, **ours}


def interface_towards(host: str) -> str | None:
    """The network interface from which this machine reaches a host; None if that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: finds the route, sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:
                    continue  # has no address
                if socket.inet_ntoa(answer[20:24]) == own or (own.startswith("127.") and name == "lo"):
                    return name
    except OSError:
        pass
    return None


class Ranks:
    """Processes of launch/train.py, and the signals for them."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by global rank
        self.signalled = False
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        signal.signal(END, self._end)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        # SLURM signals every process of a step; someone who signals this one alone means the ranks. Twice does no harm.
        self.signalled = True
        for process in list(self.processes.values()):
            process.send_signal(number)

    def _end(self, number: int, frame: FrameType | None) -> None:
        for process in list(self.processes.values()):
            process.kill()

    def wait(self) -> dict[int, int]:
        """Exit codes in the order of their ends, when all have ended; negative for a signal."""
        codes: dict[int, int] = {}
        deadline = None
        while len(codes) < len(self.processes):
            for rank, process in self.processes.items():
                if rank not in codes and (code := process.poll()) is not None:
                    codes[rank] = code
            # A preempted rank ends after the save, which all ranks make together: no others are waited for in vain.
            if deadline is None and set(codes.values()) - {0, PREEMPTED_EXIT_CODE}:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                for process in self.processes.values():
                    process.kill()
            time.sleep(POLL_SECONDS)
        return codes


def run(options: argparse.Namespace, node: str) -> int:
    """Start the node's ranks and wait for them; the node's exit code, also left as a file for the batch script."""
    nodes = options.nodes.split(",")
    index = nodes.index(node)
    logs = Path(options.logs)
    ranks = Ranks()
    with ExitStack() as stack:
        for local_rank in range(options.ranks_per_node):
            environment = environment_of_rank(
                os.environ,
                node_index=index,
                local_rank=local_rank,
                num_nodes=len(nodes),
                ranks_per_node=options.ranks_per_node,
                rendezvous=options.rendezvous,
            )
            rank = int(environment["RANK"])
            # Rank 0 speaks to the job's own output, the others into files.
            log = None if rank == 0 else stack.enter_context(open(log_of(logs, rank), "wb"))
            command = [sys.executable, str(ROOT / "launch" / "train.py"), *options.overrides]
            ranks.processes[rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if ranks.signalled:  # between two starts
            signal.raise_signal(signal.SIGUSR1)
        codes = ranks.wait()
    code = code_of_node(list(codes.values()), signalled=ranks.signalled)
    if code not in (0, PREEMPTED_EXIT_CODE) or set(codes.values()) - {0, PREEMPTED_EXIT_CODE}:
        _tell(node, codes, logs)
    write_report(logs, node, code)
    if code not in (0, CONFIG_EXIT_CODE) and index > 0 and not heart_beats(logs):
        print(f"{node}: the first node is gone; the job is requeued", file=sys.stderr)
        subprocess.run(["scontrol", "requeue", name_of_job(os.environ)], stdin=subprocess.DEVNULL)
    return code


def beat(logs: Path) -> None:
    """The batch script says that it is there."""
    (logs / "alive").write_text(f"{time.monotonic()}\n")


def heart_beats(logs: Path) -> bool:
    """Whether the batch script is still there.

    A job with --no-kill goes on when its first node is gone, without the script that would end it or start it again
    (seen with SLURM 22.05): an allocation that does nothing until its time limit. Somebody else has to requeue it.
    """
    end = time.monotonic() + GRACE_SECONDS
    before = _read(logs / "alive")
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        if _read(logs / "alive") != before:
            return True
    return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def log_of(logs: Path, rank: int) -> Path:
    """Output of a rank but 0."""
    return logs / f"rank{rank}.log"


def write_report(logs: Path, node: str, code: int) -> None:
    """Atomically: the batch script may read it at any time."""
    part = logs / f"{node}.part"
    part.write_text(f"{code}\n")
    part.rename(logs / f"{node}.code")


def read_report(logs: Path, node: str) -> int | None:
    """A node's exit code; None if it has not reported."""
    return read_reports(logs, [node])[node]


def read_reports(logs: Path, nodes: Sequence[str]) -> dict[str, int | None]:
    """`read_report` of several nodes.

    The folder is listed, and no file opened that is not in it: NFS would remember for a minute that there was none.
    """
    there = set(os.listdir(logs))
    return {node: int((logs / f"{node}.code").read_text()) if f"{node}.code" in there else None for node in nodes}


def _tell(node: str, codes: Mapping[int, int], logs: Path) -> None:
    """Name ranks that failed, with the end of what the first of them said."""
    failed = {rank: code for rank, code in codes.items() if code not in (0, PREEMPTED_EXIT_CODE)}
    print(f"{node}: exit codes by rank: {failed}", file=sys.stderr)
    for rank in failed:
        if rank != 0 and (said := log_of(logs, rank).read_text(errors="replace").splitlines()[-20:]):
            print(f"the end of {log_of(logs, rank)}:", *said, sep="\n  ", file=sys.stderr)
            return


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", required=True, help="comma-separated, in the order of their ranks")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--rendezvous", required=True, help="HOST:PORT")
    parser.add_argument("--logs", required=True)
    parser.add_argument("overrides", nargs="*")
    return run(parser.parse_args(arguments), os.environ["SLURMD_NODENAME"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
