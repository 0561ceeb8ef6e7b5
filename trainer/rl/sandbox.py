"""Programs that a model wrote, run in a process of their own with limits.

The process is a fresh interpreter (isolated mode, empty environment, a folder of its own that is removed) whose limits
are set before a line of the program runs: CPU seconds, address space, size of a file, number of open files, no core
dump; and where the kernel lets it, without a network, and with at most 64 processes for whoever is not root. What it
prints goes nowhere. Another process judges it (trainer/rl/judge.py), and kills it and all that it has started, in
whatever session, when it has ended or its time is up. Nothing here waits for a file to be closed that a program may
have opened.

This keeps honest mistakes from harm: loops, bombs of memory, files and processes that are left behind. It is not a wall
against a program that attacks the machine, which takes a container or a virtual machine around the whole run: where the
kernel gives no namespaces, such as in most containers, a program may signal whatever its user may, the judge and the
trainer included. Limits of memory are those of each process, and files together may fill the disk.

Nor is passing proof. The tests run in the interpreter of the program, so one that is written to win can: by objects
that equal everything, by replacing what tests call, by speaking to its judge as trainer/rl/judge.py does. What it
cannot do is end early, or read its tests or the word for passed in memory while its own lines run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_JUDGE = str(Path(__file__).with_name("judge.py"))
_GRACE = 30.0
"""Seconds in which a judge starts, and kills what is left: interpreters start slowly where cores are few."""
_NAMESPACES = True
"""Whether namespaces are tried. A test turns it off: many kernels and containers refuse them."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program. Filled by `run_program`."""

    passed: bool  # it and its tests ran to their ends, and raised nothing
    error: str  # what it raised, or that it was killed; empty where it passed


def run_program(program: str, tests: str = "", *, seconds: float = 5.0, memory_mb: int = 512) -> Outcome:
    """Run Python source, then tests in the same module; passed where the last line of these was reached.

    seconds: for both; a start and an end that are slow add at most _GRACE. memory_mb: of address space, the
    interpreter's included. Raises OSError where no process can be started.
    """
    with (
        # What is left in it may be such that it cannot be removed.
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as of_tests,
        tempfile.TemporaryFile() as said,
    ):
        for file, text in ((source, program), (of_tests, tests)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        limits = [str(seconds), str(memory_mb), str(of_tests.fileno()), str(int(_NAMESPACES))]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _JUDGE, *limits],
            stdin=source,
            stdout=said,
            stderr=subprocess.DEVNULL,
            pass_fds=(of_tests.fileno(),),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        verdict = b""
        try:
            process.wait(timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            verdict = b"late"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # a judge that was killed has killed nobody
            process.wait()
        said.seek(0)
        return _outcome(verdict or said.read(4096), seconds)


def _outcome(verdict: bytes, seconds: float) -> Outcome:
    kind, _, why = verdict.partition(b" ")
    if kind == b"passed":
        return Outcome(True, "")
    if kind == b"late":
        return Outcome(False, f"it took longer than {seconds:g} s")
    return Outcome(False, why.decode(errors="replace").strip() or "it was killed, and its judge with it")
