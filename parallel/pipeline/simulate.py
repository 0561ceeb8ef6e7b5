"""Proof and prediction: a schedule is complete, can finish, and what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from parallel.pipeline.schedules import Action, Kind, Schedule


@dataclass(frozen=True)
class Costs:
    """Time of an action of any stage, in any unit. B takes input + weight."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    send: float = 0.0  # from the end of an action to the earliest start, on another rank, of what needs its result

    def of(self, kind: Kind) -> float:
        return {
            Kind.FORWARD: self.forward,
            Kind.INPUT: self.input,
            Kind.WEIGHT: self.weight,
            Kind.BACKWARD: self.input + self.weight,
        }[kind]


@dataclass(frozen=True)
class Span:
    """An action on a time line."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulated run looks like. Spans in the order of their ends."""

    spans: tuple[Span, ...]
    num_ranks: int

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """Idle part of all ranks' time, 0 to 1."""
        return 1.0 - sum(span.end - span.start for span in self.spans) / (self.makespan * self.num_ranks)

    def peak_activations(self) -> list[int]:
        """Per rank, the most micro-batches, counted per stage, whose activations are kept at one time.

        Kept from the start of F to the end of B, or of W: the weight gradients need what the forward saved.
        """
        held, peaks = [0] * self.num_ranks, [0] * self.num_ranks
        for span in sorted(self.spans, key=lambda span: span.start):  # on a rank, the order of its list
            if span.action.kind is Kind.FORWARD:
                held[span.rank] += 1
                peaks[span.rank] = max(peaks[span.rank], held[span.rank])
            elif span.action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                held[span.rank] -= 1
        return peaks


def check_complete(schedule: Schedule) -> None:
    """Every stage has F, and B or else I and W, exactly once per micro-batch, on its rank. Raises ValueError.

    A schedule without any backward is complete with its forwards.
    """
    found = Counter(action for actions in schedule.ranks for action in actions)
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
    if problems:
        raise ValueError(f"schedule {schedule.name} is not complete: {'; '.join(problems[:8])}")


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


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule against a clock: every rank takes its actions in order, each as soon as its inputs are there.

    Raises ValueError for a schedule that is not complete, or that cannot finish because ranks wait for each other;
    neither depends on the costs.
    """
    costs = costs or Costs()
    check_complete(schedule)
    ended: dict[Action, float] = {}
    clock = [0.0] * len(schedule.ranks)
    position = [0] * len(schedule.ranks)
    spans: list[Span] = []

    def ready(action: Action, rank: int) -> float | None:
        """Earliest start by its inputs; None while one is not there."""
        start = 0.0
        for alternatives in dependencies(action, schedule.num_stages):
            source = next((a for a in alternatives if a in ended), None)
            if source is None:
                return None
            start = max(start, ended[source] + (costs.send if schedule.owner[source.stage] != rank else 0.0))
        return start

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                start = ready(action, rank)
                if start is None:
                    break
                start = max(start, clock[rank])
                clock[rank] = ended[action] = start + costs.of(action.kind)
                spans.append(Span(rank, action, start, clock[rank]))
                position[rank] += 1
                progress = True
    stuck = [
        f"rank {rank} at {actions[position[rank]]}"
        for rank, actions in enumerate(schedule.ranks)
        if position[rank] < len(actions)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name} cannot finish, these wait for each other: {', '.join(stuck)}")
    # Ties by rank: a total order, the same wherever it is computed. Sorting is stable, so a rank's order is kept.
    return Timeline(tuple(sorted(spans, key=lambda span: (span.end, span.rank))), len(schedule.ranks))
