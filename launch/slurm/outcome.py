"""How a start ended, and what the batch script does next: pure decisions."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

CONFIG_EXIT_CODE = 2
PREEMPTED_EXIT_CODE = os.EX_TEMPFAIL
HUNG_EXIT_CODE = os.EX_SOFTWARE
"""All as launch/train.py exits (a test holds them equal). Not imported: the batch script and its helpers start in
a tenth of a second, without torch."""
MAX_HANGS = 3
"""Restarts after hangs from one and the same checkpoint. What hangs by chance (a disk, a link, a driver) goes on from
it; what hangs there a fourth time would for ever."""


class Outcome(Enum):
    """How one start of all ranks ended."""

    DONE = "done"
    CONFIG_ERROR = "configuration error"
    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    HUNG = "hung"
    CRASHED = "crashed"
    NOT_STARTED = "not started"


class Action(Enum):
    """What follows: the job ends, starts again on nodes it has, or goes back to the queue."""

    STOP = "stop"
    RESTART = "restart"
    REQUEUE = "requeue"


def code_of_node(codes: Sequence[int], *, signalled: bool) -> int:
    """What a node reports for its ranks. codes: exit codes in the order of their ends, negative for a signal that ended
    the process; the first failure is the cause of those that follow.

    signalled: SIGTERM or SIGUSR1 has reached the node. A rank that dies of it, because it was still starting and had no
    handler yet, or a save that failed in the time given, is a preemption too: the run goes on from an older checkpoint.
    """
    if CONFIG_EXIT_CODE in codes:
        return CONFIG_EXIT_CODE
    failed = [code for code in codes if code != 0]
    if not failed:
        return 0
    if signalled or all(code == PREEMPTED_EXIT_CODE for code in failed):
        return PREEMPTED_EXIT_CODE
    first = next(code for code in failed if code != PREEMPTED_EXIT_CODE)
    return first if first > 0 else 128 - first


def judge(codes: Mapping[str, int | None], *, down: Collection[str]) -> Outcome:
    """How a start ended. codes: of each node, None without a report. down: nodes that SLURM has given up."""
    if CONFIG_EXIT_CODE in codes.values():
        return Outcome.CONFIG_ERROR
    if all(code == 0 for code in codes.values()):
        return Outcome.DONE
    if PREEMPTED_EXIT_CODE in codes.values():
        return Outcome.PREEMPTED
    if lost(codes, down=down):
        # Without any report srun itself failed, for a reason that the next time is the same.
        nowhere = all(code is None for code in codes.values()) and not set(down) & set(codes)
        return Outcome.NOT_STARTED if nowhere else Outcome.NODE_LOST
    # The watchdog of one rank ends all; on another node the end of a peer may be seen first, as a broken connection.
    return Outcome.HUNG if HUNG_EXIT_CODE in codes.values() else Outcome.CRASHED


def lost(codes: Mapping[str, int | None], *, down: Collection[str]) -> set[str]:
    """Nodes of a start that are gone. Ranks elsewhere fail too when a node goes, so others' codes say nothing."""
    return {node for node, code in codes.items() if code is None or (node in down and code != 0)}


@dataclass(frozen=True)
class Hangs:
    """Of a job, since its run last committed a checkpoint. Filled by `after`."""

    step: int = -1  # of the newest checkpoint when it last hung; 0: there was none
    count: int = 0

    def after(self, step: int | None) -> Hangs:
        """With one more. step: of the newest checkpoint now; None: cannot be told, and is taken for no progress."""
        if step is None or step <= self.step:
            return Hangs(self.step, self.count + 1)
        return Hangs(step, 1)

    @property
    def retried(self) -> bool:
        """Whether the last one is, without being asked to."""
        return self.count <= MAX_HANGS


def next_action(outcome: Outcome, *, num_usable: int, num_needed: int, crashes_left: int) -> Action:
    """What to do. num_usable: nodes of the allocation that are neither down nor lost.

    A configuration error is never tried again; a crash only as often as the user allows, as most come again. HUNG is a
    hang that is retried (`Hangs`); one that is not is a crash.
    """
    if outcome is Outcome.PREEMPTED:
        return Action.REQUEUE
    if outcome in (Outcome.NODE_LOST, Outcome.HUNG):
        return Action.RESTART if num_usable >= num_needed else Action.REQUEUE
    if outcome is Outcome.CRASHED and crashes_left > 0:
        return Action.RESTART if num_usable >= num_needed else Action.REQUEUE
    return Action.STOP


def exit_code(outcome: Outcome, codes: Mapping[str, int | None]) -> int:
    """Of the batch script when it stops, or has asked to be requeued."""
    if outcome is Outcome.DONE:
        return 0
    if outcome is Outcome.CONFIG_ERROR:
        return CONFIG_EXIT_CODE
    if outcome is Outcome.PREEMPTED:
        return PREEMPTED_EXIT_CODE
    return next((code for code in codes.values() if code), 1)
