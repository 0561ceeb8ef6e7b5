"""The console: readable in a log file, one live line on a terminal, and never the reason a run ends."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.console import ConsoleSink, format_count, format_duration, line_parts, live_line

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_steps(*, total: int, interval: int, seconds: float, first: int = 1, until: int | None = None) -> list[str]:
    """The plain lines of a run whose steps take `seconds` each."""
    stream, clock = io.StringIO(), Clock()
    sink = ConsoleSink(total_steps=total, interval=interval, first_step=first, stream=stream, clock=clock)
    for step in range(first, (until or total) + 1):
        clock.now += seconds
        sink.log({"step": step, "loss": 1.0, "step_seconds": seconds})
    sink.close()
    return stream.getvalue().splitlines()


def steps_of(lines: list[str]) -> list[int]:
    return [int(re.match(r"step\s+(\d+)/", line)[1]) for line in lines]  # type: ignore[index]


def test_plain_lines_come_at_the_first_step_every_interval_and_the_last() -> None:
    """Catches a run whose log does not show where it ended."""
    assert steps_of(run_steps(total=25, interval=10, seconds=2.0)) == [1, 10, 20, 25]


def test_fast_steps_give_at_most_a_line_a_second() -> None:
    """Catches ten thousand lines in a CI log; 101 steps of 0.125 s last 12.6 s."""
    steps = steps_of(run_steps(total=101, interval=1, seconds=0.125))
    assert steps == [1, *range(9, 98, 8), 101]


def test_a_run_that_ends_early_still_shows_its_last_step_once() -> None:
    """Catches a preempted run whose log ends ten steps before it did."""
    assert steps_of(run_steps(total=100, interval=10, seconds=2.0, until=17)) == [1, 10, 17]
    assert steps_of(run_steps(total=100, interval=10, seconds=2.0, until=20)) == [1, 10, 20]


def test_a_resumed_run_shows_its_first_step() -> None:
    """Catches silence for a whole interval after a restart."""
    assert steps_of(run_steps(total=30, interval=10, seconds=2.0, first=12)) == [12, 20, 30]


def test_a_validation_is_always_shown() -> None:
    """Catches the rate limit hiding the number people wait for."""
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=9, interval=9, stream=stream, clock=Clock())
    for step in range(1, 6):
        sink.log({"step": step, "loss": 1.0, "validation_loss": 1.5 if step == 3 else None})
    assert steps_of(stream.getvalue().splitlines()) == [1, 3]
    assert "val 1.5000" in stream.getvalue()


def test_the_time_left_counts_what_happens_between_steps() -> None:
    """Catches an ETA from step times alone: here every step is followed by a validation nine times as long."""
    stream, clock = io.StringIO(), Clock()
    sink = ConsoleSink(total_steps=100, interval=1, stream=stream, clock=clock)
    for step in range(1, 41):
        clock.now += 10.0
        sink.log({"step": step, "loss": 1.0, "step_seconds": 1.0})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("ETA ?")
    assert lines[-1].endswith("ETA 10m00s")  # 60 steps of 10 s


def test_a_line_shows_every_number_people_follow_and_what_a_recipe_added() -> None:
    """Catches a field that is formatted wrongly or left out."""
    parts = line_parts(
        {
            "step": 7,
            "loss": 2.34567,
            "validation_loss": 2.5,
            "validation_perplexity": 12.2,
            "grad_norm": 0.51234,
            "lr": 3e-4,
            "tokens": 7 * 4096,
            "tokens_per_second_per_gpu": 12345.6,
            "mfu": 0.4123,
            "peak_memory_gib": 71.26,
            "step_seconds": 1.0,
            "data_wait_seconds": 0.2,
            "skipped_steps": 2,
            "loss_scale": 65536.0,
            "reward": 0.53219,
            "kl": None,
        }
    )
    assert parts == [
        "loss 2.3457",
        "val 2.5000",
        "12.3k tok/s/gpu",
        "mfu 41.2%",
        "grad 0.512",
        "lr 3.00e-04",
        "71.3 GiB",
        "scale 65.5k",
        "data wait 20%",
        "skipped 2",
        "reward 0.5322",
    ]
    rollout = {"step_seconds": 1.0, "data_wait_seconds": 0.7, "rollout_seconds": 0.6, "reward_failures": 3}
    assert line_parts(rollout) == ["rollout 60%", "data wait 10%"]
    assert line_parts({"step": 1, "loss": float("nan"), "mfu": None, "skipped_steps": 0}) == ["loss nan"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0"), (0.5, "0.5"), (99.9, "99.9"), (123.4, "123"), (999.4, "999"), (999.9, "1k"), (1234, "1.23k")],
        *[(12345, "12.3k"), (123456, "123k"), (999_499, "999k"), (999_999, "1M"), (1.5e6, "1.5M"), (2e13, "20T")],
    ],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    """Catches 1e+03k at the edges between units."""
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (83, "1m23s"), (3599.9, "1h00m"), (7500, "2h05m"), (90000, "1d01h")],
)
def test_durations_show_the_two_largest_units(seconds: float, text: str) -> None:
    """Catches 1m60s."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize("width", [1, 10, 39, 40, 50, 80, 110, 200])
def test_a_live_line_is_one_line_at_any_width(width: int) -> None:
    """Catches a line that wraps: it cannot be redrawn in place, and fills the screen."""
    from rich.console import Console

    stream = io.StringIO()
    parts = ["123/1000", "ETA 1h02m", "loss 2.3457", "val 2.5000", "12.3k tok/s/gpu", "mfu 41.2%", "grad 0.512"]
    Console(file=stream, width=width, force_terminal=False).print(live_line(parts, 0.123, width), end="")
    assert stream.getvalue().rstrip("\n").count("\n") == 0
    shown = {40: parts[:3], 80: parts[:5], 200: parts}.get(width, [])
    assert all(part in stream.getvalue() for part in shown)
    assert ("━" in stream.getvalue()) == (width >= 50)


def in_terminal(code: str, columns: int, term: str = "xterm") -> str:
    """What a program writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": str(columns), "LINES": "24", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env, cwd=ROOT)
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the closed other end so
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait() == 0, output.decode()
    return output.decode()


THREE_STEPS = """
from trainer.console import ConsoleSink
sink = ConsoleSink(total_steps=3, interval=1)
sink.log({"step": 1, "loss": 3.0, "tokens_per_second_per_gpu": 12345.0})
sink.log({"step": 2, "loss": 2.0, "validation_loss": 2.25})
print("a print of somebody else")
sink.event({"kind": "checkpoint", "text": "saved step 2"}, 2)
sink.log({"step": 3, "loss": 1.0})
sink.close()
"""


def test_on_a_terminal_a_live_line_gives_way_to_lasting_ones() -> None:
    """Catches a terminal without the bar, a hidden cursor left behind, and prints that are lost under the live line."""
    output = in_terminal(THREE_STEPS, columns=100)
    assert "━" in output
    assert "12.3k tok/s/gpu" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor was shown after it was last hidden
    for text in (
        "step 2/3  loss 2.0000  val 2.2500",
        "a print of somebody else",
        "saved step 2",
        "step 3/3  loss 1.0000",
    ):
        assert text in output


def test_a_dumb_terminal_gets_plain_lines() -> None:
    """Catches escape codes in an editor's shell buffer."""
    output = in_terminal(THREE_STEPS, columns=100, term="dumb")
    assert "\x1b" not in output
    assert "step 1/3  loss 3.0000" in output


def test_force_color_on_a_ci_machine_gives_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches cursor movements in a CI log: rich takes FORCE_COLOR for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert all("\x1b" not in line for line in run_steps(total=3, interval=1, seconds=2.0))


LOGGER = """
import sys
from pathlib import Path
from trainer.config import LoggingConfig
from trainer.metrics import MetricLogger
{prepare}
metrics = MetricLogger(Path(sys.argv[1]), LoggingConfig(), is_main=True, total_steps=99, run_name="x", config_dict={{}})
for step in range(1, 100):
    metrics.log({{"step": step, "loss": 1.0, "validation_loss": 1.0}})
metrics.close()
"""


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("redirect", "prepare"),
    [
        (">&-", ""),  # no standard output at all: sys.stdout is None
        ("", "sys.stdout.close()"),
        ("| true", "import time; time.sleep(0.2)"),  # the reader has gone
        (">/dev/full", ""),
    ],
)
def test_a_standard_output_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, redirect: str, prepare: str
) -> None:
    """Catches `train | head` or a log disk that is full ending a run, or changing its exit code to 120."""
    code = LOGGER.format(prepare=prepare)
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirect}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, code, str(tmp_path)], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 99
    assert '"sink": "console"' in (tmp_path / "events.jsonl").read_text()
    assert done.stderr.count("console is switched off") == 1
