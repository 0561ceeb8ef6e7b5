"""What failures cost: the best interval between checkpoints and the time that is lost (Young 1974, Daly 2006)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.hardware import Hardware

RESTART_SECONDS = 300.0
"""To notice, start again and load; an assumption."""


@dataclass(frozen=True)
class FailureCost:
    mtbf_seconds: float  # between failures of any GPU of the job
    checkpoint_seconds: float  # to write one
    interval_seconds: float  # between checkpoints that loses least
    lost_fraction: float  # of the time, writing, repeating and restarting


def failure_cost(hardware: Hardware, *, num_gpus: int, checkpoint_bytes: float) -> FailureCost:
    """With M between failures and d to write a checkpoint: the interval t = sqrt(2 d M) (Young), at which d / t of the
    time goes into writing, t / 2 of every M is done again, and restarts take R of every M."""
    mtbf = hardware.mtbf_gpu_hours * 3600 / num_gpus
    nodes = max(1, num_gpus // hardware.gpus_per_node)
    write = checkpoint_bytes / (nodes * hardware.checkpoint_gbps * 1e9)
    interval = math.sqrt(2 * write * mtbf)
    lost = write / interval + (interval / 2 + RESTART_SECONDS) / mtbf
    return FailureCost(mtbf, write, interval, min(1.0, lost))
