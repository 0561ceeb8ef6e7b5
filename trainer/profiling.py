"""Traces of a few steps, for ui.perfetto.dev, chrome://tracing and benchmarks/breakdown.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "train_step"
"""Name of the annotation around the launch of each traced step."""


class StepProfiler:
    """Records `num_steps` steps after the first `after` ones of this start, into folder/rank_R.json.gz."""

    def __init__(self, *, after: int, num_steps: int, folder: Path, rank: int, device: torch.device) -> None:
        """num_steps: 0 for no trace."""
        self._before = after
        self._left = num_steps
        self._path = folder / f"rank_{rank}.json.gz"
        self._device = device
        self._profile: profile | None = None
        self._annotation: record_function | None = None

    def begin_step(self) -> None:
        """Call it before a step is launched."""
        if self._left and not self._before:
            if self._profile is None:
                self._profile = self._start()
            self._annotation = record_function(STEP)
            self._annotation.__enter__()

    def end_step(self) -> Path | None:
        """Call it when the step has been launched; the file, if this was the last one to be traced."""
        if self._annotation is None:
            self._before = max(0, self._before - 1)
            return None
        assert self._profile is not None
        self._annotation.__exit__(None, None, None)
        self._annotation = None
        self._left -= 1
        if self._left:
            return None
        self._synchronize()
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        return self._path

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        self._synchronize()  # the trace holds whole steps, and nothing of the one before
        started = profile(activities=activities)
        started.start()
        return started

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
