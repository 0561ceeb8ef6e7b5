"""From a schedule to what each rank does: the same computations, with the sends and receives they need.

All computations of all ranks are put in one order, by the ends of the simulated schedule. A message stands in its
sender's and in its receiver's list where that order has it, so every list agrees with one total order: the first
message not yet through always has both ends waiting for it or free to come to it. Hence no cycle of waits, even where
sends do not buffer (NCCL), and two ranks see the messages between them in the same order, so these need no tags.
Receives stand as early as their sends allow, before the computation that runs while the data travels.

Messages with no computation between them start together, up to and with a receive: NCCL completes such a group as a
whole, and what computes with the first of two receives should not wait for the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.schedules import Action, Kind, Schedule
from parallel.pipeline.simulate import simulate


@dataclass(frozen=True)
class Message:
    """What passes between the output of one stage and the input of the next: hidden states, or their gradient."""

    is_gradient: bool
    stage: int  # that computes with it
    microbatch: int
    source: int  # rank
    target: int


@dataclass(frozen=True)
class Exchange:
    """Messages a rank starts to send and receive together."""

    messages: tuple[Message, ...]


Step = Action | Exchange


def message_after(action: Action, owner: Sequence[int]) -> Message | None:
    """What another rank needs of an action's result, if one does."""
    stage = action.stage
    if action.kind is Kind.FORWARD:
        following = stage + 1
    elif action.kind in (Kind.BACKWARD, Kind.INPUT):
        following = stage - 1
    else:
        return None
    if not 0 <= following < len(owner) or owner[following] == owner[stage]:
        return None
    return Message(action.kind is not Kind.FORWARD, following, action.microbatch, owner[stage], owner[following])


def make_programs(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """The steps of every rank. Raises ValueError, as `simulate`, for a schedule that cannot run."""
    lists: list[list[Action | list[Message]]] = [[] for _ in schedule.ranks]

    def communicate(rank: int, message: Message) -> None:
        steps = lists[rank]
        if steps and isinstance(last := steps[-1], list) and last[-1].target != rank:
            last.append(message)
        else:
            steps.append([message])

    for span in simulate(schedule).spans:
        lists[span.rank].append(span.action)
        message = message_after(span.action, schedule.owner)
        if message is not None:
            communicate(message.source, message)
            communicate(message.target, message)
    return tuple(tuple(Exchange(tuple(step)) if isinstance(step, list) else step for step in steps) for steps in lists)
