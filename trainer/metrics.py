"""MetricLogger: one source of numbers, several sinks. docs/METRICS.md defines every field.

metrics.jsonl is the record of a run, and its failure ends the run. The others (TensorBoard, wandb, the console) are
views of it: one that fails is switched off with one warning and an event, and training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

from trainer.config import LoggingConfig
from trainer.console import ConsoleSink
from trainer.masking import mask_secrets, mask_text
from trainer.run_info import write_atomically
from trainer.sinks import WANDB_MODES, Record, Sink, TensorBoardSink, WandbSink

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 16
"""Read at a time, from the end of a file, to find its last line."""


class MetricLogger:
    """Writes each training step to metrics.jsonl and to every sink that is switched on; nothing on other ranks."""

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        *,
        is_main: bool,
        total_steps: int,
        run_name: str,
        config_dict: dict[str, Any],
        resume_step: int = 0,
    ) -> None:
        """run_dir: made if missing. config_dict: the resolved TrainConfig, shown by wandb with secrets masked.

        resume_step: steps already done, 0 for a fresh run; lines of metrics.jsonl after it are removed, as these steps
        are redone. Raises ValueError on a wrong setting, when a fresh run would continue another run's metrics.jsonl,
        or when that file is damaged; RuntimeError when a sink that is asked for cannot start.
        """
        _check(config)
        self._is_main = is_main
        self._last_step = resume_step
        self._sinks: list[Sink] = []
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        last_kept = _truncate(path, resume_step)
        self._metrics = _open_after_whole_line(path)
        self._events = _open_after_whole_line(run_dir / "events.jsonl")
        self._ranks = _open_after_whole_line(run_dir / "ranks.jsonl")
        if config.console:
            first_step = resume_step + 1
            self._sinks.append(ConsoleSink(total_steps=total_steps, interval=config.interval, first_step=first_step))
        if config.tensorboard:
            self._start(
                "tensorboard",
                resume_step,
                lambda: TensorBoardSink(run_dir, config=config_dict, resume_step=resume_step),
            )
        if config.wandb:
            options = {"project": config.wandb_project, "mode": config.wandb_mode, "run_name": run_name}
            self._start("wandb", resume_step, lambda: WandbSink(run_dir, config=config_dict, **options))
        if last_kept is not None and last_kept < resume_step:
            text = f"steps {last_kept + 1} to {resume_step} were done, but their lines in {path.name} were lost"
            self.event("metrics_gap", text, first=last_kept + 1, last=resume_step)

    def log(self, record: Record) -> None:
        """Record one training step. Needs `step`, greater than the last one; other fields as in docs/METRICS.md.

        NaN and infinity become null in metrics.jsonl, with `"nonfinite": true` added; other sinks get them as they are.
        Raises ValueError on a wrong step, TypeError on a value that is no number, OSError when metrics.jsonl cannot be
        written.
        """
        if not self._is_main:
            return
        clean = {name: _number(name, value) for name, value in record.items()}
        step = clean.get("step")
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"step={step} must be a whole number after the last one logged, {self._last_step}")
        self._last_step = step
        self._metrics.write(json.dumps(_json_line(clean)) + "\n")
        self._metrics.flush()
        for sink in list(self._sinks):
            self._guard(sink, sink.log, clean)

    def log_ranks(self, step: int, times: Mapping[str, list[float]]) -> None:
        """Seconds of each rank, in rank order, by name: a line in ranks.jsonl, which is only appended to."""
        if self._is_main:
            self._ranks.write(json.dumps({"step": step, **times}) + "\n")
            self._ranks.flush()
            for sink in list(self._sinks):
                self._guard(sink, sink.ranks, step, times)

    def picture(self, name: str, path: Path, *, step: int) -> None:
        """A PNG that has been written into the run's folder, for the sinks that show pictures."""
        for sink in list(self._sinks):
            self._guard(sink, sink.picture, name, path, step)

    def say(self, text: str) -> None:
        """On the console alone: what is being done, where that takes a while."""
        for sink in list(self._sinks):
            if isinstance(sink, ConsoleSink):
                self._guard(sink, sink.say, text)

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Something worth noticing: a line on the console and one in events.jsonl.

        kind: a word to search for (resume, checkpoint, skipped_step, preempted, ...); text: a sentence for people;
        fields: what JSON can hold, other values are written as their str(). Secrets are masked.
        """
        if not self._is_main:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "kind": kind, "text": text}
        line |= {name: _finite(value) if isinstance(value, float) else value for name, value in fields.items()}
        line = mask_secrets(line)
        self._events.write(json.dumps(line, default=str) + "\n")
        self._events.flush()
        step = fields.get("step")
        for sink in list(self._sinks):
            self._guard(sink, sink.event, line, step if isinstance(step, int) else self._last_step)

    def close(self) -> None:
        """Finish all sinks. A second call does nothing."""
        if not self._is_main or self._metrics.closed:
            return
        for sink in list(self._sinks):
            self._guard(sink, sink.close)
        self._sinks.clear()
        self._metrics.close()
        self._events.close()
        self._ranks.close()

    def _start(self, name: str, resume_step: int, make: Callable[[], Sink]) -> None:
        """Add an optional sink. A fresh run that cannot have it stops; a restart, perhaps at night, goes on without."""
        try:
            self._sinks.append(make())
        except Exception as error:
            if not resume_step:
                self.close()
                raise
            self._report_failure(name, error)

    def _guard(self, sink: Sink, action: Callable[..., None], *args: Any) -> None:
        """Run an action of an optional sink; switch the sink off when it fails."""
        if sink not in self._sinks:  # switched off a moment ago, while another one's failure was reported
            return
        try:
            action(*args)
        except Exception as error:
            self._sinks.remove(sink)
            self._report_failure(sink.name, error)

    def _report_failure(self, name: str, error: Exception) -> None:
        text = mask_text(f"{name} is switched off: {type(error).__name__}: {error}")
        logger.warning("%s; training goes on, metrics.jsonl has every step", text)
        self.event("sink_failed", text, sink=name)


def _check(config: LoggingConfig) -> None:
    if config.interval < 1:
        raise ValueError(
            f"logging.interval={config.interval} must be at least 1; to silence it set logging.console=false"
        )
    if config.wandb_mode not in WANDB_MODES:
        raise ValueError(f"logging.wandb_mode={config.wandb_mode!r} is not known; use {' or '.join(WANDB_MODES)}")


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"metric {name}={value!r} is a {type(value).__name__}; log a Python number (a tensor's `.item()`) or None"
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _json_line(record: Record) -> dict[str, float | int | bool | None]:
    """The record as JSON can hold it: JSON has no NaN, and readers reject Python's spelling of it."""
    finite = {name: _finite(value) for name, value in record.items()}
    nonfinite = any(finite[name] is None and value is not None for name, value in record.items())
    return {**finite, "nonfinite": True} if nonfinite else finite


def _truncate(path: Path, resume_step: int) -> int | None:
    """Make metrics.jsonl end at resume_step. Returns its last step, None without any.

    A torn last line (the process died while writing) is dropped. The file is replaced as a whole or not touched.
    Raises ValueError on a damaged line elsewhere, and when resume_step is 0 and there are steps.
    """
    if not path.exists():
        return None
    size = path.stat().st_size
    last_step, read_bytes, kept_bytes = 0, 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            read_bytes += len(line)
            step = _step_of(line)
            if step is None and read_bytes == size:
                break
            if step is None or step <= last_step:
                raise ValueError(
                    f"{path}, line {number}, is not the record of a later step; repair or move the file away"
                )
            if resume_step == 0:
                raise ValueError(
                    f"{path} already holds steps, and this run starts at step 1; set another run.dir, continue that "
                    "run with checkpoint.resume=auto, or move the file away"
                )
            if step > resume_step:
                break
            last_step, kept_bytes = step, read_bytes
    if kept_bytes < size:
        with open(path, "rb") as file:
            write_atomically(path, file.read(kept_bytes).decode())
    return last_step or None


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None when the line is torn or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _open_after_whole_line(path: Path) -> IO[str]:
    """Open for appending; a torn last line (the process died while writing) is cut off first."""
    if path.exists():
        os.truncate(path, _end_of_last_line(path))
    return open(path, "a", encoding="utf-8")


def _end_of_last_line(path: Path) -> int:
    """Bytes up to the last line break, and with it; 0 without one."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0
