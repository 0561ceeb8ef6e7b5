"""The watchdog: a rank that stops making progress ends the run, with a report of where every rank stands.

A collective waits for its slowest member, so one rank that hangs (a disk, a lock, a driver) is all ranks waiting. The
main thread says what it begins and how long that may take; a thread of the same process looks at the clock. The first
rank whose time is up opens a folder

    run.dir/hangs/START-step_S/
        rank_R.json   where rank R stood: step, phase, the collective it waited in, the stack of each of its threads
        report.json   all of these together, and the ranks that the others were waiting for

whose appearance makes every other rank write its own file, too, and all processes end with HUNG_EXIT_CODE, so that the
launcher starts them again. It needs neither the backend nor the device: gloo waits inside a collective, NCCL on the
host that reads a result, and both stand in the same stacks. Which collective it is comes from torch's flight recorder,
which both backends fill.

A rank that cannot run Python (a call that holds the interpreter's lock) is ended by a timer in C (faulthandler), which
this thread winds up again and again; a process that is stopped, or a machine that is gone, writes nothing and is named
as the one that did not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trainer.run_info import write_atomically

HUNG_EXIT_CODE = os.EX_SOFTWARE
"""70, in sysexits.h."""
NOTICED_AFTER = 0.8
"""Of the time that a phase may take; the rest is for the stacks, and keeps us ahead of the collectives' own timeout."""
ROLLOUTS = "rollouts"
"""Name of a thread that is in no collective (trainer/rl/overlap.py), and that the main one may come to wait for."""
_ROOT = str(Path(__file__).resolve().parent.parent)
_STDERR = 2


def record_collectives() -> None:
    """Switch torch's flight recorder on. Before the first process group, which reads it."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


@dataclass(frozen=True)
class Phase:
    """What the main thread does since when; filled by Watchdog.begin."""

    name: str
    step: int
    seconds: float  # it may take
    since: float  # time.monotonic()


@dataclass
class Standing:
    """Where a rank stood; filled by the rank itself, except `answered`, false, by who reports."""

    rank: int
    answered: bool = True
    host: str = ""
    pid: int = 0
    step: int = -1
    phase: str = ""
    seconds: float = 0.0  # since its last progress
    collective: str | None = None  # the oldest one it had begun and not finished; None: it was in none
    at: str = ""  # the innermost line of this project's on the main thread, and on that of rollouts
    stacks: dict[str, list[str]] = field(default_factory=dict)  # by name of the thread


class Watchdog:
    """Between `start` and `close`, once or again, a phase of the main thread that takes too long ends the process."""

    def __init__(self, run_dir: Path, *, rank: int, world_size: int, start: str, timeout: float) -> None:
        """start: names this start of the run. timeout: seconds that most phases may take. Both as on every rank."""
        self._between_looks = min(max(timeout / 50, 0.05), 5.0)
        self._folder = run_dir / "hangs"
        self._rank, self._world_size, self._start = rank, world_size, start
        self._phase: Phase | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self, name: str, *, step: int, seconds: float) -> Iterator[None]:
        """Inside, which takes at most `seconds`, this is watched; afterwards nothing is, whatever came of it."""
        self.begin(name, step=step, seconds=seconds)
        self.start()
        try:
            yield
        finally:
            self.close()

    def begin(self, name: str, *, step: int, seconds: float) -> None:
        """The main thread has made progress, and begins something that takes at most `seconds`."""
        self._phase = Phase(name, step, seconds, time.monotonic())

    def close(self) -> None:
        """Nothing is watched any more. A second call does nothing."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(self._between_looks):
            phase = self._phase
            if phase is None:
                continue
            # Ends the process from C if this thread does not come back here: Python's lock is held, or a disk hangs.
            faulthandler.dump_traceback_later(phase.seconds + 1, exit=True, file=_STDERR)
            overdue = time.monotonic() - phase.since > NOTICED_AFTER * phase.seconds
            folders = list(self._folder.glob(f"{self._start}-step_*")) if self._folder.is_dir() else []
            if (overdue or folders) and phase is self._phase and not self._done.is_set():
                self._end(folders[0] if folders else self._folder / f"{self._start}-step_{phase.step}", phase)

    def _end(self, folder: Path, phase: Phase) -> None:
        """Report and end the process. A rank whose files cannot be written still ends, by the timer in C."""
        faulthandler.dump_traceback_later(10 * self._between_looks + 10, exit=True, file=_STDERR)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mine = standing(self._rank, phase)
            write_atomically(folder / f"rank_{self._rank}.json", json.dumps(asdict(mine), indent=1))
            self._report(folder, patience=3 * self._between_looks + 0.2)
        os._exit(HUNG_EXIT_CODE)

    def _report(self, folder: Path, patience: float) -> None:
        """One rank, whoever is first, waits for the others' files and puts them together; they wait for it to speak."""
        deadline = time.monotonic() + patience
        try:
            os.close(os.open(folder / "reporter", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            # A launcher ends all ranks when the first one exits.
            while time.monotonic() < deadline + patience and not (folder / "report.json").exists():
                time.sleep(0.02)
            return
        while time.monotonic() < deadline and len(list(folder.glob("rank_*.json"))) < self._world_size:
            time.sleep(0.02)
        standings = read_standings(folder, self._world_size)
        report = {
            "waited_for": [s.rank for s in waited_for(standings)],
            "summary": summary(standings),
            "ranks": [asdict(s) for s in standings],
        }
        print(f"{report['summary']}\nstacks of all ranks: {folder}", file=sys.stderr, flush=True)
        write_atomically(folder / "report.json", json.dumps(report, indent=1))


def standing(rank: int, phase: Phase) -> Standing:
    """Where this process stands now."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    at = _innermost(frames.get(threading.main_thread().ident or 0))
    for ident in [ident for ident in frames if names.get(ident) == ROLLOUTS]:
        at += f", beside {ROLLOUTS} at {_innermost(frames[ident])}"
    callers = {ident: frame for ident, frame in frames.items() if names.get(ident) != ROLLOUTS}
    return Standing(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        step=phase.step,
        phase=phase.name,
        seconds=time.monotonic() - phase.since,
        collective=pending_collective(inside=_is_inside_torch(callers)),
        at=at,
        stacks={
            f"{names.get(ident, 'thread')} {ident}": [line.rstrip() for line in traceback.format_stack(frame)]
            for ident, frame in frames.items()
        },
    )


def _innermost(frame: FrameType | None) -> str:
    """The innermost line of this project's on a thread."""
    ours = [one for one in traceback.extract_stack(frame) if _is_ours(one.filename)] if frame else []
    return f"{os.path.relpath(ours[-1].filename, _ROOT)}:{ours[-1].lineno} {ours[-1].name}" if ours else ""


def _is_inside_torch(frames: Mapping[int, FrameType]) -> bool:
    """Whether a thread's innermost line is one of torch's that calls collectives."""
    files = [frame.f_code.co_filename for frame in frames.values()]
    return any("/torch/distributed/" in file or file.endswith("/torch/_ops.py") for file in files)


def pending_collective(*, inside: bool) -> str | None:
    """The collective that this process waits in, by torch's flight recorder; None: in none.

    inside: a thread waits in torch; else collectives of gloo are over.
    """
    bindings: Any = getattr(torch._C, "_distributed_c10d", None)
    pending: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # of any backend; of NCCL, before 2.12
        dump = getattr(bindings, name, None)
        if dump is None:
            continue
        try:
            entries = json.loads(dump(True, False)).get("entries", [])
        except Exception:  # a private interface, of help only
            continue
        pending += [e for e in entries if not e.get("retired", True) and e.get("state") != "completed"]
    # gloo blocks who calls it, so what it waits in is what it called last; the recorder may hear late, or never, of the
    # end of what came before. Of NCCL's, which wait on the device, the first one keeps the rest waiting.
    blocking = [e for e in pending if e["profiling_name"].startswith("gloo:")][-1:] if inside else []
    waiting = [e for e in pending if not e["profiling_name"].startswith("gloo:")] or blocking
    if not waiting:
        return None
    oldest = min(waiting, key=lambda e: (e["time_created_ns"], e["record_id"]))
    group = " ".join(str(part) for part in oldest.get("process_group", []) if part)
    number = oldest.get("p2p_seq_id") if oldest.get("is_p2p") else oldest.get("collective_seq_id")
    sizes = ", ".join(str(size) for size in oldest.get("input_sizes", []))
    return f"{oldest['profiling_name']} {sizes} of group {group}, its number {number}"


def read_standings(folder: Path, world_size: int) -> list[Standing]:
    """Of every rank, in order; of one that wrote nothing, that it did not answer."""
    found = []
    for rank in range(world_size):
        try:
            found.append(Standing(**json.loads((folder / f"rank_{rank}.json").read_text())))
        except (OSError, ValueError, TypeError):
            found.append(Standing(rank=rank, answered=False))
    return found


def waited_for(standings: list[Standing]) -> list[Standing]:
    """The ranks that kept the others waiting: who did not answer; else who is in no collective; else who is behind."""
    silent = [s for s in standings if not s.answered]
    outside = [s for s in standings if s.answered and s.collective is None]
    if silent or 0 < len(outside) < len(standings):
        return silent or outside
    behind = min(s.step for s in standings)
    return [s for s in standings if s.step == behind]


def summary(standings: list[Standing]) -> str:
    """A line for the ranks waited for, and one for each collective that others wait in."""
    guilty = waited_for(standings)
    lines = []
    for s in guilty:
        if not s.answered:
            lines.append(f"hang: rank {s.rank} does not answer: its process is stopped, or its machine gone")
        else:
            inside = f"waits in {s.collective}" if s.collective else f"is in no collective, at {s.at}"
            lines.append(
                f"hang: rank {s.rank} ({s.host}, process {s.pid}) at step {s.step}, {s.phase}, has made no progress "
                f"for {s.seconds:.1f} s and {inside}"
            )
    waiting: dict[str, list[int]] = {}
    for s in standings:
        if s.answered and s not in guilty:
            waiting.setdefault(f"at step {s.step} in {s.collective}, called from {s.at}", []).append(s.rank)
    lines += [f"hang: waiting for it: rank {', '.join(map(str, ranks))} {where}" for where, ranks in waiting.items()]
    return "\n".join(lines)


def _is_ours(filename: str) -> bool:
    """Whether a file is of this project, and not of a virtual environment in its folder."""
    return filename.startswith(_ROOT) and "site-packages" not in Path(filename).parts
