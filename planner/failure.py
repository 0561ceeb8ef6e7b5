"""What failures cost: the best interval between checkpoints and the time that is lost.

With M between failures, a checkpoint every t that holds a step up for h, and R to start again, the part of the time

    h / t + (t / 2 + a + R) / M

is lost: in holding up, and of every M in repeating what is newer than the newest checkpoint, and in R. It is least at
t = sqrt(2 h M) (Young 1974; Daly 2006 has the terms of higher order). With d to write a checkpoint:

    checkpoint.asynchronous=false   h = c + d: training waits for the copy to host memory, c, and for the write; a = 0
    asynchronous                    h = c; the write goes on beside training, and until it is done, the newest that is
                                    whole is the one before: a = d. The next begins when it is done, so that t is at
                                    least d (CheckFreq, Mohan et al., FAST 2021, calls these snapshot and persist)
"""

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
    held_up_seconds: float  # that training waits for one
    interval_seconds: float  # between checkpoints that loses least
    lost_fraction: float  # of the time, waiting, repeating and restarting


def failure_cost(
    hardware: Hardware, *, num_gpus: int, checkpoint_bytes: float, rank_bytes: float, asynchronous: bool
) -> FailureCost:
    """checkpoint_bytes: of all ranks together, each once. rank_bytes: that a rank copies to host memory, at most."""
    mtbf = hardware.mtbf_gpu_hours * 3600 / num_gpus
    nodes = max(1, num_gpus // hardware.gpus_per_node)
    write = checkpoint_bytes / (nodes * hardware.checkpoint_gbps * 1e9)
    copy = rank_bytes / (hardware.host_gbps * 1e9)
    held_up, age = (copy, write) if asynchronous else (copy + write, 0.0)
    interval = max(math.sqrt(2 * held_up * mtbf), age)
    lost = held_up / interval + (interval / 2 + age + RESTART_SECONDS) / mtbf
    return FailureCost(mtbf, write, held_up, interval, min(1.0, lost))
