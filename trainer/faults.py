"""The faults of a run, told as events: what ended it, and what its next start finds of the one before."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trainer.agreement import CheckpointError
from trainer.checkpoint import committed_steps
from trainer.corruption import StateCorrupted
from trainer.metrics import MetricLogger
from trainer.records import TrainingDiverged

ENDS = ("corruption", "diverged", "checkpoint_failed", "crashed")
"""Kinds of events that are the last of a start."""
FAULTS = ("hang", *ENDS, "checkpoint_damaged", "straggler", "metrics_gap")
_TOLD = "told"
"""In the folder of a hang that has its event."""
_MAX_CHARACTERS = 500


@dataclass(frozen=True)
class Hang:
    """What a hang has left in run.dir/hangs; filled by `hangs_of`."""

    folder: str  # its name
    step: int
    at: str  # UTC, when it was reported
    text: str
    waited_for: list[int]  # ranks; empty where no report was written
    told: bool  # whether it has its event


def tell_end(metrics: MetricLogger, error: BaseException, *, step: int) -> None:
    """The error that ends the run, as an event. Where that cannot be written, the process still says it."""
    said = next(iter(str(error).splitlines()), "")[:_MAX_CHARACTERS]
    with contextlib.suppress(OSError, ValueError):  # a disk that is full; a file that is closed
        if isinstance(error, StateCorrupted):
            metrics.event("corruption", said, step=step)
        elif isinstance(error, TrainingDiverged):
            metrics.event("diverged", said, step=step)
        elif isinstance(error, CheckpointError):
            metrics.event("checkpoint_failed", said, step=step)
        elif isinstance(error, Exception):
            metrics.event("crashed", f"{type(error).__name__}: {said}", step=step)


def tell_start(metrics: MetricLogger, run_dir: Path, *, step: int) -> None:
    """On rank 0, which starts from `step`: hangs that ended earlier starts, each once, and checkpoints passed over.

    A start takes the newest checkpoint that is good, so that newer ones are damaged.
    """
    for hang in hangs_of(run_dir):
        if not hang.told:
            metrics.event("hang", hang.text, step=hang.step, at=hang.at, waited_for=hang.waited_for, folder=hang.folder)
            with contextlib.suppress(OSError):
                (run_dir / "hangs" / hang.folder / _TOLD).touch()
    for damaged in committed_steps(run_dir / "checkpoints"):
        if damaged > step:
            text = f"the checkpoint of step {damaged} is damaged, and the run goes on from step {step}"
            metrics.event("checkpoint_damaged", text, step=damaged)


def hangs_of(run_dir: Path) -> list[Hang]:
    """In the order in which they happened."""
    found = []
    for folder in (run_dir / "hangs").glob("*-step_*"):
        step = re.search(r"-step_(\d+)$", folder.name)
        if step is None or not folder.is_dir():
            continue
        report, text, ranks = folder / "report.json", "a hang without a report of its ranks", []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(report.read_text())
            text, ranks = str(content["summary"]), [int(rank) for rank in content["waited_for"]]
        at = (report if report.exists() else folder).stat().st_mtime
        time = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        found.append(Hang(folder.name, int(step[1]), time, text, ranks, (folder / _TOLD).exists()))
    return sorted(found, key=lambda hang: hang.at)
