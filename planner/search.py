"""Which of many layouts is fastest and fits: a search that leaves out only what cannot win.

A ladder is one layout under ever more recomputation. Recomputing costs time and saves memory, so its best rung is the
first that fits. Ladders are tried in the order of a time that they cannot beat (their first rung without waiting in a
pipeline), until that is longer than the last place of the ranking: the ranking is that of trying all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.hardware import Hardware
from planner.job import Job
from planner.memory import memory_of_ranks
from planner.plan import room
from planner.state import rank_states
from planner.steptime import StepTime, step_time

Changes = Mapping[str, Any]
"""Dotted fields of the configuration to values."""


@dataclass(frozen=True)
class Rung:
    """A legal layout."""

    changes: Changes
    job: Job


class Ladder:
    """Changes from least recomputation to most, made into rungs when they are asked for; illegal ones are left out."""

    def __init__(self, changes: Sequence[Changes], legal: Callable[[Changes], Rung | None]) -> None:
        self._changes, self._legal = list(changes), legal
        self._rungs: list[Rung] = []

    def __iter__(self) -> Iterator[Rung]:
        yield from self._rungs
        while self._changes:
            if (rung := self._legal(self._changes.pop(0))) is not None:
                self._rungs.append(rung)
                yield rung

    @property
    def first(self) -> Rung | None:
        return next(iter(self), None)


@dataclass(frozen=True)
class Layout:
    """A rung with its cost."""

    changes: Changes
    job: Job
    time: StepTime
    peak: float  # bytes of the rank that needs most

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.tokens_per_step / self.time.step / self.job.dims.world_size


@dataclass(frozen=True)
class Ranking:
    """The best layout of each split over the axes, the fastest first."""

    layouts: list[Layout]  # that fit
    num_legal: int  # of all layouts, by whatever else than recomputation they differ
    num_costed: int  # whose time and memory were worked out in full
    nearest: Layout | None  # where none fits, the one that lacks least


def rank_layouts(ladders: Iterable[Ladder], hardware: Hardware, *, places: int) -> Ranking:
    """The `places` best splits of what `ladders` has, each by its best layout."""
    legal = [(ladder, ladder.first) for ladder in ladders]
    firsts = [(ladder, first.job) for ladder, first in legal if first is not None]
    least = [_least(job) for _, job in firsts]
    bounds = [
        (step_time(job, hardware, simulated=False).step, i)
        for i, (_, job) in enumerate(firsts)
        if least[i] <= room(hardware)
    ]
    best: dict[object, Layout] = {}
    steps: list[float] = []  # of `best`, ascending
    num_costed = 0
    for bound, i in sorted(bounds):
        if len(steps) >= places and bound > steps[places - 1]:
            break
        split = split_of(firsts[i][1])
        for rung in firsts[i][0]:
            beaten = best[split].time.step if split in best else steps[places - 1] if len(steps) >= places else math.inf
            if step_time(rung.job, hardware, simulated=False).step >= beaten:
                break
            if peak_of(rung.job) > room(hardware):
                continue
            num_costed += 1
            layout = cost_of(rung, hardware)
            if layout.time.step < beaten:
                best[split] = layout
                steps = sorted(held.time.step for held in best.values())
            break
    ranked = sorted(best.values(), key=lambda layout: (layout.time.step, layout.peak))[:places]
    nearest = None if ranked else _nearest([ladder for ladder, _ in firsts], least, hardware)
    return Ranking(ranked, len(firsts), num_costed, nearest)


def cost_of(rung: Rung, hardware: Hardware) -> Layout:
    """Time and memory."""
    return Layout(rung.changes, rung.job, step_time(rung.job, hardware), peak_of(rung.job))


def peak_of(job: Job) -> float:
    """Bytes of the rank that needs most."""
    return max(memory.peak for memory in memory_of_ranks(job, largest=True))


def split_of(job: Job) -> tuple[int, ...]:
    """How many ranks each axis has."""
    dims = job.dims
    return dims.pp, dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp, dims.ep


def _least(job: Job) -> float:
    """Bytes that are there at any time, whatever the activations."""
    if job.parallel.cpu_offload:
        return 0.0
    return max(state.bytes.total - state.bytes.gradients for state in rank_states(job, largest=True))


def _nearest(ladders: Sequence[Ladder], least: Sequence[float], hardware: Hardware) -> Layout | None:
    """The layout that needs least memory: the rungs with most recomputation, tried in the order of their state."""
    found: Layout | None = None
    for i in sorted(range(len(ladders)), key=lambda i: least[i]):
        if found is not None and least[i] >= found.peak:
            break
        *_, last = ladders[i]
        layout = cost_of(last, hardware)
        if found is None or layout.peak < found.peak:
            found = layout
    return found


@dataclass(frozen=True)
class Difference:
    """Of one term of the step."""

    term: str
    seconds: float  # of the other layout, less those of the winner: what the winner saves, or pays if negative


def differences(winner: Layout, other: Layout) -> list[Difference]:
    """Term by term, the largest first; they add up to the difference of the steps."""
    terms = dict.fromkeys((*winner.time.terms, *other.time.terms))
    found = [Difference(t, other.time.terms.get(t, 0.0) - winner.time.terms.get(t, 0.0)) for t in terms]
    return sorted((d for d in found if d.seconds), key=lambda d: -abs(d.seconds))


@dataclass(frozen=True)
class Neighbour:
    """The winner with one field changed."""

    field: str
    value: Any
    layout: Layout
    fits: bool


def neighbours(
    winner: Layout,
    choices: Mapping[str, Sequence[Any]],
    legal: Callable[[Changes], Rung | None],
    hardware: Hardware,
) -> list[Neighbour]:
    """What else each field could be, all others being the winner's; illegal ones are left out."""
    found = []
    for field, values in choices.items():
        for value in values:
            if value == winner.changes.get(field):
                continue
            rung = legal({**winner.changes, field: value})
            if rung is not None:
                layout = cost_of(rung, hardware)
                found.append(Neighbour(field, value, layout, layout.peak <= room(hardware)))
    return found
