"""A line on stderr that says how far something long is."""

from __future__ import annotations

import sys
import time

SILENT_SECONDS = 2.0
"""What takes less shows nothing."""
BETWEEN_LINES, BETWEEN_REDRAWS = 10.0, 1.0
"""Seconds, in a log and on a terminal, where one line is written again and again."""


class Progress:
    """Of one piece of work; other ranks than the one that speaks get `silent`."""

    def __init__(self, what: str, *, silent: bool = False) -> None:
        """what: is done, to what: `tokenising corpus.txt`."""
        self._what, self._silent = what, silent
        self._start = self._shown = time.monotonic()
        self._how_far = ""

    def update(self, how_far: str) -> None:
        """Show it if it is time. how_far: `3 of 7 files`."""
        self._how_far = how_far
        now = time.monotonic()
        if now - self._shown > (BETWEEN_REDRAWS if sys.stderr.isatty() else BETWEEN_LINES):
            self._shown = now
            self._print(now, end="\r" if sys.stderr.isatty() else "\n")

    def tensors(self, done: int, total: int) -> None:
        """`update`, of tensors."""
        self.update(f"{done} of {total} tensors")

    def finish(self) -> None:
        """Show where it ended."""
        now = time.monotonic()
        if now - self._start > SILENT_SECONDS:
            self._print(now, end="\n")

    def _print(self, now: float, *, end: str) -> None:
        if not self._silent:
            print(f"{self._what}: {self._how_far}, {now - self._start:.0f} s", end=end, file=sys.stderr, flush=True)
