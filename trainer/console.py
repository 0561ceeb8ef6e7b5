"""Progress for people: one live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainer.sinks import Event, Record

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

MIN_SECONDS_BETWEEN_LINES = 1.0
"""Plain lines come at most this often: a log of a fast small model stays readable."""
MIN_SECONDS_BETWEEN_REDRAWS = 0.1
RATE_WINDOW = 100
"""The time left is estimated from this many last steps."""


class ConsoleSink:
    """Shows step records on a stream. On a terminal one line is redrawn in place; a validation leaves its line."""

    name = "console"

    def __init__(
        self,
        *,
        total_steps: int,
        interval: int,
        first_step: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """interval: steps between plain lines. first_step: of this start, above 1 after a resume. stream: stdout."""
        self._stream = sys.stdout if stream is None else stream
        self._total_steps = total_steps
        self._interval = interval
        self._first_step = first_step
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW)
        self._last_shown = -float("inf")
        self._pending: Record | None = None  # the newest record, if no line has shown it
        self._validation_loss: float | None = None
        self._live: Live | None = _start_live(self._stream) if _is_terminal(self._stream) else None

    def log(self, record: Record) -> None:
        with self._errors_handled():
            step = int(record["step"] or 0)
            self._marks.append((step, self._clock()))
            self._pending = record
            if record.get("validation_loss") is not None:
                self._validation_loss = record["validation_loss"]
                self._print(record)
            elif self._live is not None:
                self._redraw(self._live, record)
            elif step in (self._first_step, self._total_steps) or self._line_is_due(step):
                self._print(record)

    def event(self, line: Event, step: int) -> None:
        self.say(str(line["text"]))

    def ranks(self, step: int, times: Mapping[str, Sequence[float]]) -> None:
        """A rank that keeps the others waiting is an event."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """It is in the run's folder."""

    def say(self, text: str) -> None:
        """Something for who is looking, and for no record."""
        with self._errors_handled():
            self._write(text)

    def close(self) -> None:
        """End the live line; the newest step stays as a plain one, so that a log always shows where a run ended."""
        with self._errors_handled():
            live, self._live = self._live, None
            if live is not None:
                live.stop()
            if self._pending is not None:
                self._print(self._pending)

    def _line_is_due(self, step: int) -> bool:
        return step % self._interval == 0 and self._clock() - self._last_shown >= MIN_SECONDS_BETWEEN_LINES

    def _print(self, record: Record) -> None:
        self._last_shown = self._clock()
        self._pending = None
        step = int(record["step"] or 0)
        width = len(str(self._total_steps))
        parts = [f"step {step:>{width}}/{self._total_steps}", *line_parts(record), f"ETA {self._time_left(step)}"]
        self._write("  ".join(parts))

    def _write(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            # One write a line: prefixes that torchrun adds, and lines of other ranks, then do not land inside it.
            self._stream.write(text + "\n")
            self._stream.flush()

    def _redraw(self, live: Live, record: Record) -> None:
        now = self._clock()
        step = int(record["step"] or 0)
        if now - self._last_shown < MIN_SECONDS_BETWEEN_REDRAWS and step not in (self._first_step, self._total_steps):
            return
        self._last_shown = now
        shown = {**record, "validation_loss": self._validation_loss}
        parts = [f"{step}/{self._total_steps}", f"ETA {self._time_left(step)}", *line_parts(shown)]
        live.update(live_line(parts, step / max(1, self._total_steps), live.console.width), refresh=True)

    def _time_left(self, step: int) -> str:
        """From the wall-clock rate of the last steps, so validations and checkpoints between them count."""
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return "?" if step < self._total_steps else "0s"
        return format_duration((last_time - first_time) / (last_step - first_step) * max(0, self._total_steps - step))

    @contextlib.contextmanager
    def _errors_handled(self) -> Iterator[None]:
        """On any error give the terminal back before the caller hears of it."""
        try:
            yield
        except BaseException as error:
            live, self._live = self._live, None
            if live is not None:
                with contextlib.suppress(Exception):
                    live.stop()
            if isinstance(error, OSError):
                _silence(self._stream)
            raise


def line_parts(record: Record) -> list[str]:
    """The fields of a step as short texts, the most wanted first; what a recipe added comes last."""
    parts = []
    for name, show in _FORMATS.items():
        value = record.get(name)
        if value is not None:
            parts.append(show(value))
    if seconds := record.get("step_seconds"):
        # Beside an update they take no time but what is waited for.
        rollout = record.get("rollout_wait_seconds", record.get("rollout_seconds")) or 0.0
        wait = (record.get("data_wait_seconds") or 0.0) - rollout  # sampling is work, and shown as such
        shares = {"rollout": rollout / seconds, "data wait": wait / seconds}
        parts += [f"{name} {share:.0%}" for name, share in shares.items() if share > 0.05]
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']}")
    for name, value in record.items():
        if value is not None and name not in _FORMATS and name not in _NOT_SHOWN:
            parts.append(f"{name} {value:.4g}")
    return parts


def live_line(parts: list[str], fraction: float, width: int) -> Table:
    """A bar and as many of the parts, in order, as fit into width columns; the bar goes first when there is no room."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar_width = 20 if width >= 110 else 10 if width >= 50 else 0
    room = width - bar_width - (2 if bar_width else 0) - 1  # the last column stays free: some terminals wrap at it
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > room:
            break
        text = longer
    line = Table.grid(padding=(0, 2, 0, 0))
    cells = [Text(text or parts[0][:room], no_wrap=True)]
    line.add_row(*([ProgressBar(total=1.0, completed=fraction, width=bar_width)] if bar_width else []), *cells)
    return line


def format_count(number: float) -> str:
    """12345 -> 12.3k: three digits and a power of a thousand."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:  # 999.95k and above rounds to 1000k
            scaled = number / size
            return f"{scaled:.3g}{suffix}" if abs(scaled) < 999.5 else f"{scaled:.0f}{suffix}"
    return f"{number:.3g}" if abs(number) < 99.95 else f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """83 -> 1m23s; the two largest units of days, hours, minutes, seconds."""
    total = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            return f"{total // size}{unit}{total % size // smaller_size:02d}{smaller}"
    return f"{total}s"


# How a field looks on the console, the most wanted first.
_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "validation_loss": lambda x: f"val {x:.4f}",
    "tokens_per_second_per_gpu": lambda x: f"{format_count(x)} tok/s/gpu",
    "mfu": lambda x: f"mfu {x:.1%}",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "lr": lambda x: f"lr {x:.2e}",
    "peak_memory_gib": lambda x: f"{x:.1f} GiB",
    "loss_scale": lambda x: f"scale {format_count(x)}",
}
# Shown in another way (`line_parts`), or of interest in files only.
_NOT_SHOWN = {
    "valid_tokens",
    "step",
    "validation_perplexity",
    "tokens",
    "step_seconds",
    "data_wait_seconds",
    "skipped_steps",
    "reward_failures",  # an event says what failed
    "completion_tokens_max",
    "constant_groups",
    "groups_trained",
    "sampling_rounds",
    "rollout_seconds",
    "rollout_gather_seconds",
    "rollout_wait_seconds",
    "reward_seconds",
    "logprob_seconds",
    "clipped_below",
    "clipped_above",
    "ratio",
    "importance_weight",
    "validation_completions",
    "validation_reward_failures",
}


def _is_terminal(stream: TextIO) -> bool:
    """Decided here and not by rich, which takes FORCE_COLOR (set on CI machines) for a terminal."""
    with contextlib.suppress(Exception):
        return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    return False


def _start_live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    # No refresh thread: drawing happens in log(), so nothing holds a lock when data workers are forked.
    live = Live(console=Console(file=stream, force_terminal=True), auto_refresh=False, transient=True)
    live.start()
    live.console.show_cursor(True)  # a killed process cannot bring a hidden cursor back
    return live


def _silence(stream: TextIO) -> None:
    """Point the descriptor of a broken pipe or a full disk at /dev/null: what is left in the stream's buffer is flushed
    once more when the interpreter exits, and failing again would make the exit code 120."""
    with contextlib.suppress(Exception):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
