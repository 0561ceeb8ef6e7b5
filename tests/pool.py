"""A persistent pool of forked gloo ranks: a multi-rank test costs milliseconds, not a launch.

A nursery process is forked before anything else runs (torch imported, no autograd or OpenMP thread started, because a
process that has such threads cannot be forked safely). It forks the ranks of each world size on first use and again
after a rank died. Functions travel by name, so a test passes a module-level function.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import glob
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist

from parallel.gloo import give_gloo_groups_one_thread

LONGEST_WAIT = timedelta(hours=1)
"""Of a collective. Not what finds a rank that hangs: `RankPool.run` does, and a rank may wait for one that compiles."""
STARVED = 10
"""How many times as long as its patience `RankPool.run` waits at most for ranks that wait for a CPU or compute."""
MAX_THREADS = 54
"""Of a rank; two per process group, and those of torch."""
LAST_WORDS = 10_000
"""Bytes that are shown of what faulthandler wrote when a rank died."""


class RankError(AssertionError):
    """A function failed on a rank; the message holds that rank's traceback, also where a signal ended it."""


def _rank_main(rank: int, world_size: int, listener: socket.socket, pipe: Connection, last_words: int) -> None:
    torch.set_num_threads(1)
    faulthandler.enable(file=last_words)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    # Not a FileStore: its file locks took a third of the CPU when eight ranks make process groups.
    # The listening socket is inherited, so no port is chosen before it is bound.
    port = listener.getsockname()[1]
    fd = listener.detach()
    if rank:
        os.close(fd)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=rank == 0,
        master_listen_fd=None if rank else fd,
        wait_for_workers=False,
    )
    give_gloo_groups_one_thread()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=LONGEST_WAIT)
    while True:
        try:
            fn, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        torch._dynamo.reset()  # as before each test (conftest.py)
        try:
            reply = (True, fn(*args, **kwargs))
        except BaseException:
            reply = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        try:
            payload = pickle.dumps(reply)
        except Exception:  # whatever an object's own __reduce__ raises: the test is told, and this rank lives on
            payload = pickle.dumps((False, f"rank {rank}: the result cannot be pickled\n{traceback.format_exc()}"))
        sys.stdout.flush()
        pipe.send_bytes(payload)


def _num_threads(pid: int) -> int:
    """Threads of a process; 0 when it has died."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return 0


def _busy_seconds(pids: list[int]) -> dict[str, float]:
    """For how long each thread has run or waited for a CPU; of nothing where the kernel does not count."""
    busy = {}
    for path in (path for pid in pids for path in glob.glob(f"/proc/{pid}/task/*/schedstat")):
        with contextlib.suppress(OSError), open(path) as file:  # a thread that has ended
            running, waiting, _ = map(int, file.read().split())
            busy[path] = (running + waiting) / 1e9
    return busy


def _wait_for_answers(pipes: list[Connection], pids: list[int], patience: float) -> list[Any]:
    """Those that are ready, or none when for `patience` seconds in all no thread of any rank had anything to do.

    On a loaded machine ranks get a CPU now and then, and take many times as long as alone without being stuck.
    """
    asleep, begun = 0.0, time.monotonic()
    before: dict[str, float] = {}  # so that the first turn, in which most answers come, reads nothing
    while asleep < patience and time.monotonic() - begun < STARVED * patience:
        since = time.monotonic()
        if ready := wait(pipes, timeout=min(5.0, patience - asleep)):
            return ready
        now = _busy_seconds(pids)
        busy = max((now[thread] - before.get(thread, 0.0) for thread in now), default=0.0)
        asleep += max(time.monotonic() - since - busy, 0.0)
        before = now
    return []


def _end_with_parent() -> None:
    """Also while stopped, which an end of the pipe would not wake up."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _fork(target: Callable[..., None], *args: Any) -> int:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            target(*args)
        finally:
            os._exit(1)
    return pid


def _rank_body(
    rank: int,
    world_size: int,
    listener: socket.socket,
    pipe: Connection,
    last_words: int,
    control: socket.socket,
    siblings: tuple[Connection, ...],
) -> None:
    _end_with_parent()
    control.close()
    for sibling in siblings:  # a rank that keeps its siblings' pipes open would hide their death
        sibling.close()
    _rank_main(rank, world_size, listener, pipe, last_words)


def _nursery_main(control: socket.socket) -> None:
    """Fork a group of ranks for each request, a world size; answer with pids, pass their pipes and last words along."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # what was imported lives on: a full collection in a rank, half a second, need not look at it
    while True:
        request = control.recv(4096)
        if not request:
            os._exit(0)
        world_size = pickle.loads(request)
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        pids, ours = [], []
        last_words = [os.memfd_create(f"rank {rank}") for rank in range(world_size)]
        for rank in range(world_size):
            parent_end, child_end = mp.Pipe()
            private = (child_end, last_words[rank], control, (*ours, parent_end))
            pids.append(_fork(_rank_body, rank, world_size, listener, *private))
            child_end.close()
            ours.append(parent_end)
        listener.close()
        socket.send_fds(control, [pickle.dumps(pids)], [*(pipe.fileno() for pipe in ours), *last_words])
        for pipe in ours:
            pipe.close()
        for file in last_words:
            os.close(file)


class _Group(NamedTuple):
    """The ranks of a world size."""

    pids: list[int]
    pipes: list[Connection]
    last_words: list[int]  # descriptors of files, into which faulthandler writes


class RankPool:
    """Runs functions on n gloo ranks that stay alive between calls.

    Between calls they are stopped: gloo wakes the threads of each process group a hundred times a second, and those of
    ranks that wait for a test took up to two thirds of two cores.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def body() -> None:
            ours.close()
            _nursery_main(theirs)

        self._nursery = _fork(body)
        theirs.close()
        self._control = ours
        self._groups: dict[int, _Group] = {}

    def _group(self, world_size: int) -> _Group:
        if world_size not in self._groups:
            self._control.send(pickle.dumps(world_size))
            message, fds, _, _ = socket.recv_fds(self._control, 4096, 2 * world_size)
            pipes = [Connection(fd) for fd in fds[:world_size]]
            self._groups[world_size] = _Group(pickle.loads(message), pipes, list(fds[world_size:]))
        return self._groups[world_size]

    def _signal(self, world_size: int, number: signal.Signals) -> None:
        for pid in self._groups[world_size].pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _discard_crowded(self) -> None:
        """Make ranks anew that hold many process groups, each with threads that wake up while the ranks run."""
        for world_size, group in list(self._groups.items()):
            if _num_threads(group.pids[0]) > MAX_THREADS:
                self._discard(world_size)

    def _discard(self, world_size: int) -> None:
        self._signal(world_size, signal.SIGKILL)
        group = self._groups.pop(world_size)
        for pipe in group.pipes:
            pipe.close()
        for file in group.last_words:
            os.close(file)

    def run(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
    ) -> list[Any]:
        """fn(*args, **kwargs) on every rank of a gloo group of world_size; the results in rank order.

        timeout: seconds without an answer, not counting those in which ranks computed or waited for a CPU. Raises
        RankError with the tracebacks of the ranks that failed, or died, or hung (the group is then made anew).
        """
        self._discard_crowded()
        pids, pipes, last_words = self._group(world_size)
        self._signal(world_size, signal.SIGCONT)
        message = pickle.dumps((fn, args, kwargs))
        for pipe in pipes:
            pipe.send_bytes(message)
        replies: dict[int, tuple[bool, Any]] = {}
        dead: list[str] = []
        while len(replies) < world_size and not dead:
            pending = {pipes[rank]: rank for rank in range(world_size) if rank not in replies}
            # Once one rank has failed, the others may be waiting for it in a collective: do not wait long for them.
            patience = 5.0 if any(not ok for ok, _ in replies.values()) else timeout
            ready = _wait_for_answers(list(pending), pids, patience)
            if not ready:
                dead.append(f"ranks {sorted(pending.values())} gave no answer within {patience} s")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    replies[rank] = pickle.loads(pipes[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    words = os.pread(last_words[rank], LAST_WORDS, 0).decode(errors="replace")
                    dead += [*words.splitlines(), f"rank {rank} died"]
        failures = [value for ok, value in replies.values() if not ok]
        if dead:
            self._discard(world_size)
        else:
            self._signal(world_size, signal.SIGSTOP)
        if dead or failures:
            raise RankError("\n".join(failures + dead))
        return [replies[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End all ranks and the nursery."""
        for world_size in list(self._groups):
            self._discard(world_size)
        self._control.shutdown(socket.SHUT_RDWR)  # processes forked since, another pool's, hold the socket too
        self._control.close()
        os.waitpid(self._nursery, 0)
