"""Training programs launched by those that compare them: a command, a log, a time limit, and why it failed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
_REASON = re.compile(r"Error\b|^(configuration )?error: ")


def torchrun(gpus: int, program: str, *arguments: object) -> list[str]:
    """The command that runs a program of this repository on so many GPUs of this machine."""
    launcher = [*_TORCHRUN, "--standalone", "--nproc-per-node", str(gpus)]
    return [*launcher, str(ROOT / program), *map(str, arguments)]


def shown(command: Sequence[str], folder: Path) -> str:
    """The command as a record keeps it: without the paths of one machine. `folder` is the temporary one of the runs."""
    line = shlex.join(command).replace(shlex.join(_TORCHRUN), "torchrun")
    return line.replace(f"{ROOT}/", "").replace(str(folder), "RUNS")


def launch(
    command: Sequence[str], log: Path, *, limit: float, environment: Mapping[str, str] | None = None
) -> str | None:
    """Run a command and all that it starts to its end, its output into `log`: None, or one line of why it failed.

    After `limit` seconds it is ended.
    """
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=ROOT,
            env=None if environment is None else {**os.environ, **environment},
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"longer than the limit of {limit:g} seconds"
        finally:
            _end(process)
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # torchrun's own report comes last; the reason is a line before it.
    reasons = [line.strip() for line in lines if _REASON.search(line) and "ChildFailedError" not in line]
    return " | ".join((reasons or lines)[-3:])[:1000] or f"exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun starts its workers in sessions of their own and ends them when it is asked to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
