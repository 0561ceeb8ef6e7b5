"""From a schedule to what each rank does: the same actions, with the sends and receives they need, and the proof.

All computations of all ranks are put in one order, by the ends of the simulated schedule. A message stands in its
sender's and in its receiver's list where that order has it, so every list agrees with one total order: the first
message not yet through always has both ends waiting for it or free to come to it. Hence no cycle of waits, even where
sends do not buffer (NCCL), and two ranks see the messages between them in the same order, so these need no tags.
Receives stand as early as their sends allow, before the computation that runs while the data travels.

In the plan that gives this order messages take a little time, as they do. Without it a computation that could hide a
message often ends at the very moment the message leaves, and the receive would come after it: in the backward half of
GPipe every gradient, one after the other.

Messages with no computation between them start together, up to and with a receive: NCCL completes such a group as a
whole, and what computes with the first of two receives should not wait for the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from parallel.pipeline.actions import Action, Collective, Exchange, Kind, Message, Step
from parallel.pipeline.schedules import Schedule
from parallel.pipeline.simulate import Costs, equal_costs, message_after, simulate

Program = tuple[Step, ...]
"""What one rank does, in order."""

TRAVEL = 1 / 64
"""Time of a message, in forwards of an average stage, in the plan that orders messages: a little."""
PLAN = equal_costs(message=TRAVEL)


def make_programs(schedule: Schedule, costs: Costs = PLAN) -> tuple[Program, ...]:
    """The steps of every rank, proven by `check_programs`. Raises ValueError for a schedule that cannot run.

    costs: of computations, all above 0; they decide how early a receive stands, and nothing else.
    """
    lists: list[list[Action | list[Message]]] = [[] for _ in schedule.ranks]

    def communicate(rank: int, message: Message) -> None:
        steps = lists[rank]
        if steps and isinstance(last := steps[-1], list) and last[-1].target != rank:
            last.append(message)
        else:
            steps.append([message])

    for span, action in simulate(schedule, costs).computations:
        lists[span.rank].append(action)
        message = message_after(action, schedule.owner)
        if message is not None:
            communicate(message.source, message)
            communicate(message.target, message)
    programs = tuple(map(_with_collectives, lists, schedule.ranks))
    check_programs(schedule, programs, costs)
    return programs


def _with_collectives(
    steps: Sequence[Action | list[Message]], actions: Sequence[Action | Collective]
) -> tuple[Step, ...]:
    """One rank's computations and messages, with its collectives: behind what there is to send, before the next use."""
    program: list[Step] = []
    rest = iter(actions)
    for step in steps:
        if isinstance(step, list):
            program.append(Exchange(tuple(step)))
            continue
        for action in rest:
            program.append(action)
            if action == step:
                break
    return (*program, *rest)


# ---- the proof


def check_programs(schedule: Schedule, programs: Sequence[Program], costs: Costs = PLAN) -> None:
    """Raises ValueError unless these programs are the schedule, can finish, and receive as early as they can.

    The schedule's own proof is `simulate`'s; here every list has the same actions, and messages and no others stand
    once where they are sent and once where they are received.
    """
    problems = []
    for rank, (program, actions) in enumerate(zip(programs, schedule.ranks, strict=True)):
        if [step for step in program if not isinstance(step, Exchange)] != list(actions):
            problems.append(f"rank {rank} has other actions than its schedule")
        needed = Counter(
            message
            for of_rank in schedule.ranks
            for action in of_rank
            if isinstance(action, Action) and (message := message_after(action, schedule.owner)) is not None
            if rank in (message.source, message.target)
        )
        found = Counter(message for step in program if isinstance(step, Exchange) for message in step.messages)
        wrong = [*(found - needed), *(needed - found)]
        problems += [f"rank {rank} has {found[m]} times, not {needed[m]}: {m}" for m in wrong]
    problems = problems or _blocked(schedule, programs) or late_receives(schedule, programs, costs)
    if problems:
        raise ValueError(f"the programs of schedule {schedule.name} are wrong: {'; '.join(problems[:8])}")


def _blocked(schedule: Schedule, programs: Sequence[Program]) -> list[str]:
    """Run the programs with every message blocking both of its ends, which is stricter than the executor and NCCL."""
    queues = [list(reversed(list(_one_by_one(program)))) for program in programs]
    made: set[Message] = set()
    received: set[Message] = set()
    progress = True
    while progress:
        progress = False
        for rank, queue in enumerate(queues):
            while queue and not isinstance(queue[-1], Message):
                step = queue.pop()
                progress = True
                if not isinstance(step, Action):
                    continue
                needs = message_before(step, schedule.owner)
                if needs is not None and needs not in received:
                    return [f"rank {rank} computes {step} before it has received {needs}"]
                if (result := message_after(step, schedule.owner)) is not None:
                    made.add(result)
            if not queue or not isinstance(message := queue[-1], Message) or message.source != rank:
                continue
            if message not in made:
                return [f"rank {rank} sends before it has computed: {message}"]
            if (other := queues[message.target]) and other[-1] == message:
                queue.pop()
                other.pop()
                received.add(message)
                progress = True
    return [f"rank {rank} waits forever at {queue[-1]}" for rank, queue in enumerate(queues) if queue]


def _one_by_one(program: Program) -> Iterable[Action | Collective | Message]:
    for step in program:
        if isinstance(step, Exchange):
            yield from step.messages
        else:
            yield step


def message_before(action: Action, owner: Sequence[int]) -> Message | None:
    """What an action needs from another rank, if anything."""
    is_gradient = action.kind is not Kind.FORWARD
    previous = action.stage + (1 if is_gradient else -1)
    if not action.walks_layers or not 0 <= previous < len(owner) or owner[previous] == owner[action.stage]:
        return None
    return Message(is_gradient, action.stage, action.microbatch, owner[previous], owner[action.stage])


def late_receives(schedule: Schedule, programs: Sequence[Program], costs: Costs = PLAN) -> list[str]:
    """Receives behind a computation that could hide them: one still running, in the plan, when the message leaves."""
    position: dict[Message, int] = {}  # in the order of the plan's ends, of what makes the message
    place: dict[Action, int] = {}
    for index, (_, action) in enumerate(simulate(schedule, costs).computations):
        place[action] = index
        if (message := message_after(action, schedule.owner)) is not None:
            position[message] = index
    late = []
    for rank, program in enumerate(programs):
        newest: Action | None = None
        for step in program:
            if isinstance(step, Action):
                newest = step
            elif isinstance(step, Exchange) and newest is not None:
                late += [
                    f"rank {rank} starts to receive after {newest}, which could hide it: {message}"
                    for message in step.messages
                    if message.target == rank and place[newest] > position[message]
                ]
    return late
