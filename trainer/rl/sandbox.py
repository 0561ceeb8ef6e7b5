"""Programs that a model wrote, run in a process of their own with limits.

The process is a fresh interpreter (isolated mode, empty environment, a folder of its own that is removed) whose limits
are set before a line of the program runs: CPU seconds, address space, size of files, number of open files, no core
dump; where the kernel lets it, without a network. It gets a session of its own, all of which is killed when time is up.

This keeps honest mistakes from harm: loops, bombs of memory, files that are left behind. It is not a wall against a
program that attacks the machine, which takes a container or a virtual machine around the whole run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

# Passed says that all of the program has run: the parent wants to see its own random word, which the program is not
# told, so one that leaves early, with whatever exit code, has not passed.
_CHILD = r"""
import ctypes, os, resource, sys
word = sys.stdin.readline()
seconds, megabytes = (int(value) for value in sys.stdin.readline().split())
source = sys.stdin.read()
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET; refused: the network stays
except Exception:
    pass
os.environ.clear()
for kind, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20),
                    (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (value, value))
result = os.dup(1)
nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 1)
space = {"__name__": "__main__"}
def finish(write=os.write, done=result, word=word.encode()):
    write(done, word)
try:
    exec(compile(source, "<program>", "exec"), space)
except BaseException as error:
    message = f"{type(error).__name__}: {error}"
    os.write(2, message.encode("utf-8", "replace")[:2000])
    os._exit(1)
finish()
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a program. Filled by `run_program`."""

    passed: bool  # it ran to its end, and raised nothing
    error: str  # what it raised, or that it was killed; empty where it passed


def run_program(source: str, *, seconds: float = 5.0, memory_mb: int = 512) -> Outcome:
    """Run Python source; passed where its last line was reached. Waits at most `seconds`, and kills what is left then.

    memory_mb: of address space, the interpreter's included. Raises OSError where no process can be started.
    """
    word = secrets.token_hex(16)
    asked = f"{word}\n{max(1, round(seconds + 0.5))} {memory_mb}\n{source}"
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            said, error = process.communicate(asked.encode("utf-8", "surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"it took longer than {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its children with it
            process.kill()
            process.communicate()
    if said.decode(errors="replace").strip() == word:
        return Outcome(True, "")
    if process.returncode < 0:
        return Outcome(False, f"it was killed by {signal.Signals(-process.returncode).name}")
    return Outcome(False, error.decode(errors="replace").strip() or "it ended before its last line")
