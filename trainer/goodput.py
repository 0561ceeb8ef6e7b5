"""Goodput: the share of a run's time, from its first start on, that went into steps that count."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path


class Goodput:
    """useful seconds / seconds since the first start.

    Useful are the `step_seconds` of the steps behind the current weights, each counted once: what was done again after
    a restart, starting, saving, validating, and waiting to be started again are not.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, is_main: bool = True) -> None:
        """is_main: on other ranks it counts from this start on, as nobody writes down what they say.

        Reads what earlier starts left in run_dir: run.json for when the first was, metrics.jsonl for their steps."""
        self._began = time.time()
        self._useful = 0.0
        if not is_main:
            return
        try:
            starts = json.loads((run_dir / "run.json").read_text())["starts"]
            self._began = min(datetime.fromisoformat(start["time"]).timestamp() for start in starts)
        except (OSError, ValueError, KeyError, TypeError):
            return  # this start is the first of this folder
        for line in _lines(run_dir / "metrics.jsonl"):
            if line.get("step", 0) <= resume_step:
                self._useful += line.get("step_seconds") or 0.0

    def after(self, step_seconds: float) -> float:
        """The goodput once a step of this length is done."""
        self._useful += step_seconds
        return self._useful / max(time.time() - self._began, self._useful)


def _lines(path: Path) -> list[dict]:
    """Of metrics.jsonl; a torn last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
