"""Traces of chosen steps on chosen ranks, for ui.perfetto.dev, chrome://tracing, Nsight and trainer/breakdown.py."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.config import ProfileConfig

STEP = "train_step"
"""Name of the annotation around the launch of each traced step."""
HISTORY = 200_000
"""Allocations that a memory snapshot goes back at most."""


class StepProfiler:
    """Records runs of consecutive steps among those that are chosen, each into folder/step_N, N its first step.

    rank_R.json.gz is the trace of a rank; rank_R.memory.pickle, with train.profile.memory on CUDA, its allocations for
    pytorch.org/memory_viz (made by torch; nothing here reads it). With train.profile.nvtx operations are NVTX ranges
    instead, for `nsys profile`, and nothing is written.
    """

    def __init__(self, config: ProfileConfig, *, folder: Path, rank: int, device: torch.device) -> None:
        """Raises ValueError where NVTX ranges are asked for without CUDA."""
        if config.nvtx and config.steps and device.type != "cuda":
            raise ValueError(f"train.profile.nvtx=true needs CUDA, and this runs on {device.type}; set it to false")
        self._config = config
        self._steps = frozenset(config.steps)
        self._traces = not config.ranks or rank in config.ranks
        self._folder, self._rank, self._device = folder, rank, device
        self._first = 0  # of the steps being traced; 0: none are
        self._profile: profile | None = None
        self._step = contextlib.ExitStack()

    def begin_step(self, step: int) -> None:
        """Call it before a step is launched."""
        if step not in self._steps:
            return
        if not self._first:
            self._first = step
            self._start()
        self._step.enter_context(record_function(STEP))
        if self._config.nvtx and self._traces:
            self._step.enter_context(torch.autograd.profiler.emit_nvtx())

    def end_step(self, step: int) -> Path | None:
        """Call it when the step has been launched; the folder, on every rank, if the next one is not traced."""
        self._step.close()
        if not self._first or step + 1 in self._steps:
            return None
        folder, self._first = self._folder / f"step_{self._first}", 0
        self._stop(folder)
        return folder

    def _start(self) -> None:
        self._synchronize()  # the trace holds whole steps, and nothing of the one before
        if not self._traces or self._config.nvtx:
            return
        cuda = self._device.type == "cuda"
        if self._config.memory and cuda:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        self._profile = profile(activities=activities, profile_memory=self._config.memory)
        self._profile.start()

    def _stop(self, folder: Path) -> None:
        self._synchronize()
        if self._profile is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.stop()
        self._profile.export_chrome_trace(str(folder / f"rank_{self._rank}.json.gz"))
        self._profile = None
        if self._config.memory and self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"rank_{self._rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
