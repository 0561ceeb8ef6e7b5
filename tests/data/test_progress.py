"""The line that says how far something long is."""

from __future__ import annotations

import pytest

from data import progress
from data.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: a line for each of a million documents, or none in an hour."""
    work = Progress("reading llama")
    for done in range(1, 26):
        clock.now += 1.0
        work.tensors(done, 25)
    work.finish()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "reading llama: 11 of 25 tensors, 11 s",
        "reading llama: 22 of 25 tensors, 22 s",
        "reading llama: 25 of 25 tensors, 25 s",
    ]


def test_what_is_short_or_of_another_rank_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: a line for each of a thousand tiny files; eight ranks that say the same."""
    for silent, seconds in ((False, 1.5), (True, 100.0)):
        work = Progress("reading llama", silent=silent)
        clock.now += seconds
        work.update("1 of 1")
        work.finish()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_one_line_is_written_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a screen full of lines, or a last one that the prompt overwrites."""

    class Terminal:
        written = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.written += text
            return len(text)

        def flush(self) -> None:
            pass

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    work = Progress("exporting")
    clock.now += 2.5
    work.update("1 of 2")
    clock.now += 0.5
    work.update("2 of 2")  # too soon to be shown
    work.finish()
    assert terminal.written == "exporting: 1 of 2, 2 s\rexporting: 2 of 2, 3 s\n"
