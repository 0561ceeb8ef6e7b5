"""Runs a program as its child and says what became of it. A script, which trainer/rl/sandbox.py starts:

    judge.py SECONDS MEGABYTES TESTS NAMESPACES < PROGRAM

TESTS is the number of an open file. Written to stdout: passed, late, or failed with a line that says why. The process
imports nothing of this repository, and its children are dead when it ends: in a process namespace of its own, where
the kernel gives one, all of them die with it; elsewhere orphans become its children (PR_SET_CHILD_SUBREAPER), and it
kills generation after generation.

The program's interpreter has neither the tests nor the word that says it has passed while the program itself runs: it
asks for the tests when that is done, and for the word when they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import types
from typing import NoReturn

_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PROCESSES = 64
_MESSAGE = 4000  # bytes, below PIPE_BUF: what is written at once is read at once


def main() -> None:
    seconds, megabytes, tests = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with open(0, "rb", closefd=False) as file:
        program = file.read()
    flags = _unshare() if sys.argv[4] == "1" else 0
    if flags & _NEWPID:  # of which the first child is the first process, with which all others end
        if child := os.fork():
            os.waitpid(child, 0)
            os._exit(0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGALRM, _late)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = _judged(program, tests, seconds, megabytes, counted=bool(flags & _NEWUSER))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        verdict = b"late"
    os.write(1, verdict)
    if not flags & _NEWPID:  # /proc has the numbers of another namespace there, and the kernel kills all
        _kill_children()


def _late(*_: object) -> NoReturn:
    raise TimeoutError


def _unshare() -> int:
    """Leave the namespaces of processes and of the network, as far as the kernel lets; which flags it took."""
    for flags in (_NEWUSER | _NEWPID | _NEWNET, _NEWPID | _NEWNET, _NEWUSER | _NEWNET):
        if ctypes.CDLL(None).unshare(flags) == 0:
            return flags
    return 0


def _judged(program: bytes, tests: int, seconds: float, megabytes: int, *, counted: bool) -> bytes:
    """The verdict. counted: a limit on processes counts those of the program alone."""
    asked, ask = os.pipe()
    told, tell = os.pipe()
    child = _fork(limited=counted)
    if child == 0:
        try:
            for file in (asked, tell, tests):
                os.close(file)
            _limit(seconds, megabytes)
            _run(program, ask, told)
        finally:
            os._exit(1)
    os.close(ask)
    os.close(told)
    word = os.urandom(16).hex().encode()
    with open(tests, "rb") as of_tests:
        for given in (of_tests.read(), word):
            if (said := os.read(asked, _MESSAGE)) != b"?":
                return _failed(said, child)
            with open(tell, "wb", closefd=False) as pipe, contextlib.suppress(BrokenPipeError):
                pipe.write(len(given).to_bytes(8, "big") + given)
    said = os.read(asked, _MESSAGE)
    return b"passed" if said == word else _failed(said, child)


def _failed(said: bytes, child: int) -> bytes:
    if not said:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = b"it ended before its last line"
        if code < 0:
            said = f"it was killed by {signal.Signals(-code).name}".encode()
    return b"failed " + said


def _fork(*, limited: bool) -> int:
    """os.fork, of a child that may have few processes.

    Since Linux 5.14 a user namespace counts its own; before, and outside of one, the limit is on all that the user
    runs, the training itself included, of which there may be more already. Root is never limited.
    """
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    if not limited:
        return os.fork()
    highest = _PROCESSES if before[1] == resource.RLIM_INFINITY else min(_PROCESSES, before[1])
    resource.setrlimit(resource.RLIMIT_NPROC, (highest, before[1]))
    try:
        return os.fork()
    except BlockingIOError:
        resource.setrlimit(resource.RLIMIT_NPROC, before)
        return os.fork()


def _limit(seconds: float, megabytes: int) -> None:
    """In the child, before a line of the program runs."""
    cpu = max(1, round(seconds + 0.5))
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, resource.getrlimit(resource.RLIMIT_NPROC)[0]),
    ):
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    os.environ.clear()


def _run(program: bytes, ask: int, told: int) -> NoReturn:
    """The program, then its tests, in a module that is not this one."""
    # By names of this frame: one that replaces what is built in, or in os, must not end up as one that has passed.
    parse, run, write, leave, answers = compile, exec, os.write, os._exit, open(told, "rb")  # noqa: SIM115
    sys.argv = [""]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    space = vars(module)
    try:
        run(parse(program.decode("utf-8", "surrogatepass"), "<program>", "exec", dont_inherit=True), space)
        write(ask, b"?")
        tests = answers.read(int.from_bytes(answers.read(8), "big")).decode("utf-8", "surrogatepass")
        run(parse(tests, "<tests>", "exec", dont_inherit=True), space)
        write(ask, b"?")
        write(ask, answers.read(int.from_bytes(answers.read(8), "big")))
    except BaseException as error:
        write(ask, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:2000])
    leave(0)


def _kill_children() -> None:
    for _ in range(100):  # generations; a program that forks on and on may outrun this, and no namespace
        children = _children()
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        if not children:
            return


def _children() -> list[int]:
    """Of this process, those it has inherited included."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # The name of a program stands in brackets, and may have some in it.
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


if __name__ == "__main__":
    main()
