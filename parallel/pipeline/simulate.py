"""Proof and prediction: a schedule is complete, can finish, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Collective, Kind, Message, Reduce, Unshard
from parallel.pipeline.schedules import Schedule


def _free(_: object) -> float:
    return 0.0


@dataclass(frozen=True)
class Costs:
    """Time of every action, in any unit; of a message, from the end of what makes it to the start of what needs it."""

    action: Callable[[Action], float]
    message: Callable[[Message], float] = _free
    unshard: Callable[[Unshard], float] = _free
    reduce: Callable[[Reduce], float] = _free


def equal_costs(forward: float = 1.0, input: float = 1.0, weight: float = 1.0, *, message: float = 0.0) -> Costs:
    """All stages and micro-batches alike. B takes input + weight."""
    of_kind = {Kind.FORWARD: forward, Kind.INPUT: input, Kind.WEIGHT: weight, Kind.BACKWARD: input + weight}
    return Costs(lambda action: of_kind[action.kind], lambda _: message)


def stage_costs(forward: Sequence[float], *, sizes: Sequence[float] | None = None, message: float = 0.0) -> Costs:
    """F = I = W, B both of these, as long as `forward` says of the stage, times `sizes` of the micro-batch."""
    passes = {Kind.FORWARD: 1, Kind.INPUT: 1, Kind.WEIGHT: 1, Kind.BACKWARD: 2}

    def of(action: Action) -> float:
        return passes[action.kind] * forward[action.stage] * (1.0 if sizes is None else sizes[action.microbatch])

    return Costs(of, lambda _: message)


@dataclass(frozen=True)
class Span:
    """A computation or collective on a time line."""

    rank: int
    action: Action | Collective
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """What a run looks like. Spans in the order of their ends."""

    spans: tuple[Span, ...]
    num_ranks: int

    @property
    def computations(self) -> Iterator[tuple[Span, Action]]:
        return ((span, span.action) for span in self.spans if isinstance(span.action, Action))

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """Part of all ranks' time in which they do not compute, 0 to 1."""
        return 1.0 - sum(span.length for span, _ in self.computations) / (self.makespan * self.num_ranks)

    def peak_activations(self) -> list[int]:
        """Per rank, the most micro-batches, counted per stage, whose activations are kept at one time.

        Kept from the start of F to the end of B, or of W: the weight gradients need what the forward saved.
        """
        held, peaks = [0] * self.num_ranks, [0] * self.num_ranks
        for span, action in sorted(self.computations, key=lambda pair: pair[0].start):  # on a rank, its list's order
            if action.kind is Kind.FORWARD:
                held[span.rank] += 1
                peaks[span.rank] = max(peaks[span.rank], held[span.rank])
            elif action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                held[span.rank] -= 1
        return peaks


def check_complete(schedule: Schedule) -> None:
    """Every stage has F, and B or else I and W, exactly once per micro-batch, on its rank. Raises ValueError.

    A schedule without any backward is complete with its forwards. Collectives: see `_collective_problems`.
    """
    computations = [[a for a in actions if isinstance(a, Action)] for actions in schedule.ranks]
    found = Counter(action for actions in computations for action in actions)
    problems = [f"{action} is there {count} times" for action, count in found.items() if count > 1]
    for rank, actions in enumerate(schedule.ranks):
        problems += [f"{a} is on rank {rank}" for a in actions if schedule.owner[a.stage] != rank]
    trains = any(action.kind is not Kind.FORWARD for action in found)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            kinds = {kind for kind in Kind if found[Action(kind, stage, microbatch)]}
            wanted = [{Kind.FORWARD, Kind.BACKWARD}, {Kind.FORWARD, Kind.INPUT, Kind.WEIGHT}]
            if kinds not in (wanted if trains else [{Kind.FORWARD}]):
                problems.append(f"stage {stage} does {sorted(kinds)} for micro-batch {microbatch}")
    expected = schedule.num_stages * schedule.num_microbatches
    if sum(a.kind is Kind.FORWARD for a in found) != expected:
        problems.append(f"there are forwards of other stages or micro-batches than the {expected}")
    for actions in schedule.ranks:
        problems += _collective_problems(actions, unshards=schedule.unshards)
    if problems:
        raise ValueError(f"schedule {schedule.name} is not complete: {'; '.join(problems[:8])}")


def _collective_problems(actions: Sequence[Action | Collective], *, unshards: bool) -> list[str]:
    """Of one rank, with respect to its computations.

    One Reduce of every stage that has a backward, and no contribution to its gradients behind it. If parameters lie in
    shards, one Unshard of every use, with no computation between them: that would free the layers it shares with the
    use, or run with others in memory. If they do not, none.
    """
    problems = []
    reduced = Counter(a.stage for a in actions if isinstance(a, Reduce))
    for stage in sorted(
        {a.stage for a in actions if isinstance(a, Action) and a.kind is not Kind.FORWARD} | {*reduced}
    ):
        contributes = [i for i, a in enumerate(actions) if isinstance(a, Action) and _contributes(a, stage)]
        if reduced[stage] != 1 or not contributes:
            problems.append(f"stage {stage} is reduced {reduced[stage]} times after {len(contributes)} contributions")
        elif actions.index(Reduce(stage)) < contributes[-1]:
            problems.append(f"{actions[contributes[-1]]} comes after reduce({stage})")
    pending: Unshard | None = None
    for action in actions:
        if isinstance(action, Unshard):
            if pending is not None or not unshards:
                problems.append(f"{action} has no use" if unshards else f"{action} finds whole parameters")
            pending = action
        elif isinstance(action, Action):
            if unshards and action.walks_layers != (pending == Unshard(action)):
                problems.append(f"{action} follows {pending or 'no unshard'}")
            pending = None
    return problems + ([f"{pending} has no use"] if pending is not None else [])


def _contributes(action: Action, stage: int) -> bool:
    """Whether a computation adds to the gradients of a stage."""
    return action.stage == stage and action.kind is not Kind.FORWARD


def dependencies(action: Action, num_stages: int) -> list[tuple[Action, ...]]:
    """What must end before an action starts: one of each tuple."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind is Kind.FORWARD:
        return [(Action(Kind.FORWARD, stage - 1, microbatch),)] if stage > 0 else []
    if action.kind is Kind.WEIGHT:
        return [(Action(Kind.INPUT, stage, microbatch),)]
    needs: list[tuple[Action, ...]] = [(Action(Kind.FORWARD, stage, microbatch),)]
    if stage < num_stages - 1:
        needs.append((Action(Kind.BACKWARD, stage + 1, microbatch), Action(Kind.INPUT, stage + 1, microbatch)))
    return needs


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


class _Rank:
    """One rank's clocks: what it computes, and its collectives, which run beside that, one after the other."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.position = 0
        self.computing = 0.0
        self.communicating = 0.0
        self.gathered = 0.0  # when the newest Unshard was through
        self.spans: list[Span] = []

    def compute(self, action: Action, inputs: float, cost: float) -> float:
        start = max(self.computing, inputs, self.gathered if action.walks_layers else 0.0)
        self.computing = start + cost
        self.spans.append(Span(self.rank, action, start, self.computing))
        return self.computing

    def communicate(self, action: Collective, costs: Costs) -> None:
        cost = costs.unshard(action) if isinstance(action, Unshard) else costs.reduce(action)
        start = max(self.computing, self.communicating)
        self.communicating = start + cost
        if isinstance(action, Unshard):
            self.gathered = self.communicating
        self.spans.append(Span(self.rank, action, start, self.communicating))


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule against a clock: every rank takes its actions in order, each as soon as its inputs are there.

    Collectives start when what stands before them has ended, and only a use waits for its Unshard. Messages take
    their time and no link is ever busy. costs: None, F = I = W = 1 and the rest free.

    Raises ValueError for a schedule that is not complete, or that cannot finish because ranks wait for each other;
    neither depends on the costs.
    """
    costs = costs or equal_costs()
    check_complete(schedule)
    ended: dict[Action, float] = {}
    ranks = [_Rank(rank) for rank in range(len(schedule.ranks))]

    def ready(action: Action) -> float | None:
        """Earliest start by its inputs; None while one is not there."""
        start = 0.0
        for alternatives in dependencies(action, schedule.num_stages):
            source = next((a for a in alternatives if a in ended), None)
            if source is None:
                return None
            # Of the same stage, as F for B, nothing travels whatever F sends elsewhere.
            message = message_after(source, schedule.owner) if source.stage != action.stage else None
            start = max(start, ended[source] + (costs.message(message) if message is not None else 0.0))
        return start

    progress = True
    while progress:
        progress = False
        for state, actions in zip(ranks, schedule.ranks, strict=True):
            while state.position < len(actions):
                action = actions[state.position]
                if not isinstance(action, Action):
                    state.communicate(action, costs)
                elif (inputs := ready(action)) is not None:
                    ended[action] = state.compute(action, inputs, costs.action(action))
                else:
                    break
                state.position += 1
                progress = True
    stuck = [
        f"rank {state.rank} at {actions[state.position]}"
        for state, actions in zip(ranks, schedule.ranks, strict=True)
        if state.position < len(actions)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name} cannot finish, these wait for each other: {', '.join(stuck)}")
    # Ties by rank: a total order, the same wherever it is computed. Sorting is stable, so a rank's order is kept.
    spans = sorted((span for state in ranks for span in state.spans), key=lambda span: (span.end, span.rank))
    return Timeline(tuple(spans), len(ranks))
