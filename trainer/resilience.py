"""Preemption: a signal on any rank becomes a decision of all ranks at the same step.

Schedulers announce preemption by SIGTERM (SLURM, Kubernetes, torchrun passing it on) or SIGUSR1 (`sbatch --signal`).
The trainer asks after each step, saves, and exits with PREEMPTED_EXIT_CODE. torchrun restarts the group after any exit
code but 0 while --max-restarts allows; at 0 it would call the run finished.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

PREEMPTED_EXIT_CODE = os.EX_TEMPFAIL
"""75, in sysexits.h: a temporary failure, the user is invited to retry."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = logging.getLogger(__name__)


def launcher_problems(environment: Mapping[str, str]) -> list[str]:
    """Why torchrun, which set these variables for a worker, could not restart this run; empty when it can.

    By default torchrun lends its own key-value store to the workers and keeps it over restarts, so that the new
    processes find the addresses of those that ended and fail or hang in init_process_group (seen with torch 2.13; with
    the static rendezvous always, with c10d unless the variable named below is set).
    """
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts == 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    return [
        f"torchrun --max-restarts={restarts} would restart with the addresses of the processes that ended; start it "
        "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, and --standalone or --rdzv-backend c10d"
    ]


class PreemptionGuard:
    """Between construction and close, SIGNALS are only noted. All ranks construct it together, in the main thread."""

    def __init__(self) -> None:
        # Over CPU: the note is on the host, and a collective on the device would wait for the step's kernels.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, over gloo, for what the host says after a step; None: this process is alone."""
        return self._group

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def requested(self, step: int) -> bool:
        """Whether a signal has reached any rank; the same answer on all of them. Collective (4 bytes over gloo).

        step: the one just finished, for the log.
        """
        received = torch.tensor(self._received, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        number = int(received)
        if number and (self._group is None or dist.get_rank() == 0):
            logger.warning("%s received: the run saves and stops after step %d", signal.Signals(number).name, step)
        return number != 0

    def close(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
