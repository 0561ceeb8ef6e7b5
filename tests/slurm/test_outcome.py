"""Whether a job is done, starts again or goes back to the queue."""

from __future__ import annotations

import pytest

from launch import errors
from launch.slurm import outcome
from launch.slurm.outcome import MAX_HANGS, Action, Hangs, Outcome, code_of_node, exit_code, judge, lost, next_action
from trainer import resilience, watchdog


def test_exit_codes_are_those_of_the_training_program() -> None:
    """Would catch: a preempted run that is taken for a crash, since a number was changed in one place."""
    assert outcome.PREEMPTED_EXIT_CODE == resilience.PREEMPTED_EXIT_CODE
    assert outcome.CONFIG_EXIT_CODE == errors.CONFIG_EXIT_CODE
    assert outcome.HUNG_EXIT_CODE == watchdog.HUNG_EXIT_CODE


@pytest.mark.parametrize(
    ("codes", "signalled", "reported"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),  # the last step was the last
        ([75, 75], True, 75),
        ([75, 75], False, 75),  # another node was signalled
        ([-10, -10], True, 75),  # SIGUSR1 while ranks were starting
        ([75, 1], True, 75),
        ([75, 1], False, 1),
        ([2, 2], True, 2),
        ([1, 2], False, 2),
        ([0, -9], False, 137),
        ([-6, 1, -9], False, 134),
        ([3, -9], False, 3),  # ended because the other had failed
        ([70, 1], False, 70),  # its peer's connection broke
        ([1, 70], False, 1),  # waited for a rank that had crashed
    ],
)
def test_a_node_reports_what_its_ranks_mean(codes: list[int], signalled: bool, reported: int) -> None:
    """Would catch: a preemption that looks like a crash, or the reverse."""
    assert code_of_node(codes, signalled=signalled) == reported


@pytest.mark.parametrize(
    ("codes", "down", "expected"),
    [
        ({"a": 0, "b": 0}, [], Outcome.DONE),
        ({"a": 0, "b": 0}, ["b"], Outcome.DONE),  # it went when it was done
        ({"a": 2, "b": 2}, [], Outcome.CONFIG_ERROR),
        ({"a": 2, "b": None}, ["b"], Outcome.CONFIG_ERROR),
        ({"a": 75, "b": 75}, [], Outcome.PREEMPTED),
        ({"a": 75, "b": 1}, [], Outcome.PREEMPTED),
        ({"a": 1, "b": None}, [], Outcome.NODE_LOST),  # the other's peer is gone, and it says so
        ({"a": 1, "b": 1}, ["b"], Outcome.NODE_LOST),
        ({"a": None, "b": None}, ["a"], Outcome.NODE_LOST),
        ({"a": None, "b": None}, [], Outcome.NOT_STARTED),  # srun refused
        ({"a": None, "b": None}, ["c"], Outcome.NOT_STARTED),  # that is a spare one
        ({"a": 1, "b": 0}, [], Outcome.CRASHED),
        ({"a": 134, "b": 1}, ["c"], Outcome.CRASHED),
        ({"a": 70, "b": 70}, [], Outcome.HUNG),
        ({"a": 1, "b": 70}, [], Outcome.HUNG),
        ({"a": 70, "b": None}, [], Outcome.NODE_LOST),  # why they waited
        ({"a": 70, "b": 2}, [], Outcome.CONFIG_ERROR),
    ],
)
def test_how_a_start_ended(codes: dict[str, int | None], down: list[str], expected: Outcome) -> None:
    """Would catch: the ranks that survive a node, whose errors are taken for the cause."""
    assert judge(codes, down=down) is expected


def test_only_what_is_gone_is_not_used_again() -> None:
    """Would catch: all peers of a lost node given up, so that no spare one is enough."""
    assert lost({"a": 1, "b": None, "c": 137}, down=["c", "d"]) == {"b", "c"}


@pytest.mark.parametrize(
    ("ended", "usable", "crashes_left", "action"),
    [
        (Outcome.DONE, 4, 9, Action.STOP),
        (Outcome.CONFIG_ERROR, 4, 9, Action.STOP),
        (Outcome.NOT_STARTED, 4, 9, Action.STOP),
        (Outcome.PREEMPTED, 4, 0, Action.REQUEUE),
        (Outcome.NODE_LOST, 4, 0, Action.RESTART),
        (Outcome.NODE_LOST, 3, 0, Action.REQUEUE),
        (Outcome.HUNG, 4, 0, Action.RESTART),
        (Outcome.HUNG, 3, 0, Action.REQUEUE),
        (Outcome.CRASHED, 4, 0, Action.STOP),
        (Outcome.CRASHED, 4, 1, Action.RESTART),
        (Outcome.CRASHED, 3, 1, Action.REQUEUE),
    ],
)
def test_what_follows(ended: Outcome, usable: int, crashes_left: int, action: Action) -> None:
    """Would catch: a configuration error that is queued for ever, or a run that is preempted and forgotten."""
    assert next_action(ended, num_usable=usable, num_needed=4, crashes_left=crashes_left) is action


def test_hangs_are_retried_as_long_as_there_is_progress_between_them() -> None:
    """Would catch: a run that hangs at one place and is started again for ever; one that gets on and is given up."""
    hangs = Hangs()
    for _ in range(MAX_HANGS):
        hangs = hangs.after(0)
        assert hangs.retried
    assert not hangs.after(0).retried
    assert not hangs.after(None).retried  # nobody knows of any progress
    for step in range(10, 100, 10):
        hangs = hangs.after(step)
        assert hangs == Hangs(step, 1)
    assert hangs.after(10).count == 2  # the newer ones were damaged: no progress


def test_the_batch_script_exits_as_the_program_would() -> None:
    """Would catch: `sacct` that shows every end as the same."""
    assert exit_code(Outcome.DONE, {"a": 0}) == 0
    assert exit_code(Outcome.CONFIG_ERROR, {"a": None, "b": 2}) == 2
    assert exit_code(Outcome.PREEMPTED, {"a": 1, "b": 75}) == 75
    assert exit_code(Outcome.CRASHED, {"a": 0, "b": 134}) == 134
    assert exit_code(Outcome.CRASHED, {"a": 70, "b": 70}) == 70  # a hang that is not retried
    assert exit_code(Outcome.NOT_STARTED, {"a": None}) == 1
