"""What happened in a run: `python launch/report.py RUN [RUN ...]` writes one HTML page, RUN/report.html.

Several runs are drawn beside each other, with the settings in which they differ. A run that goes on may be looked at;
the page is of that moment. Exit codes: 0 done; 2 wrong arguments; 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from launch.errors import exit_code_of
from trainer.config import ConfigError
from trainer.run_info import write_atomically


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; {' '.join(self.format_usage().split())}"])


def report(arguments: list[str]) -> None:
    """Write the page that the command line asks for, and say where it is. Raises ConfigError for what is no run."""
    parser = _Parser(prog="launch/report.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder (run.dir)")
    parser.add_argument("--out", type=Path, help="the file; default: report.html in the first run's folder")
    command = parser.parse_args(arguments)
    try:
        from launch.run_report.page import page
        from launch.run_report.record import read_runs
    except ImportError as error:
        raise ConfigError([f"the report needs plotly ({error}): pip install 'lattice-train[plot]'"]) from None
    runs = read_runs(command.runs)
    out = command.out.expanduser() if command.out is not None else runs[0].folder / "report.html"
    write_atomically(out, page(runs))
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(exit_code_of(report, sys.argv[1:]))
