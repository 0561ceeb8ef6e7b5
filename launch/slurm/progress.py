"""How far a run is saved: `python launch/slurm/progress.py OVERRIDES` prints the step of its newest checkpoint.

0 stands for none. The batch script asks after a hang, in a process of its own: it runs without Hydra itself. Exit
codes: 0 printed; 2 configuration error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from launch.compose import compose_one
from launch.errors import exit_code_of
from trainer.checkpoint import committed_steps


def progress(overrides: list[str]) -> None:
    """Print the step. Raises ConfigError."""
    print(max(committed_steps(Path(compose_one(overrides).run.dir) / "checkpoints"), default=0))


if __name__ == "__main__":
    sys.exit(exit_code_of(progress, sys.argv[1:]))
