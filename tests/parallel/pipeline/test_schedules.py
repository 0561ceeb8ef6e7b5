"""Schedules: complete and free of deadlock at every size, and as good as their papers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.program import Exchange, Message, make_programs
from parallel.pipeline.schedules import SCHEDULES, Action, Kind, Schedule, forward_only, make_schedule, placement
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.stages import balance, make_stages

RANKS = st.integers(1, 7)
MICROBATCHES = st.integers(1, 19)
COST = st.sampled_from([0.25, 1.0, 1.5, 3.0])


@settings(deadline=None)
@given(name=st.sampled_from(SCHEDULES), p=RANKS, m=MICROBATCHES, chosen=st.integers(1, 3), costs=st.tuples(*[COST] * 4))
def test_every_schedule_can_finish(name: str, p: int, m: int, chosen: int, costs: tuple[float, ...]) -> None:
    """A size for which ranks wait for each other, or for which a micro-batch is left out or done twice."""
    schedule = make_schedule(name, num_ranks=p, num_microbatches=m, chosen=chosen)
    forward, input_, weight, send = costs
    timeline = simulate(schedule, Costs(forward, input_, weight, send))
    work = m * schedule.num_stages * (forward + input_ + weight)
    assert timeline.bubble == pytest.approx(1 - work / (p * timeline.makespan))
    assert schedule.owner == placement(name, p, chosen)


@settings(deadline=None)
@given(name=st.sampled_from(("gpipe", "1f1b")), p=RANKS, m=MICROBATCHES)
def test_gpipe_and_1f1b_have_the_closed_bubble(name: str, p: int, m: int) -> None:
    """(p-1)/(m+p-1) of the time (1811.06965, 2104.04473); activations of m, or min(m, p - rank), micro-batches."""
    timeline = simulate(make_schedule(name, num_ranks=p, num_microbatches=m, chosen=1))
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.peak_activations() == [m if name == "gpipe" else min(m, p - rank) for rank in range(p)]


@settings(deadline=None)
@given(p=RANKS, rounds=st.integers(1, 4), chosen=st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(p: int, rounds: int, chosen: int) -> None:
    """2104.04473, section 2.2: (p-1)/v of a micro-batch's time, for micro-batches in whole rounds."""
    m = rounds * p
    timeline = simulate(make_schedule("interleaved_1f1b", num_ranks=p, num_microbatches=m, chosen=chosen))
    assert timeline.makespan == pytest.approx(3 * (m * chosen + p - 1))


@settings(deadline=None)
@given(p=RANKS, extra=st.integers(0, 9))
def test_zero_bubble_schedules_keep_their_promise(p: int, extra: int) -> None:
    """2401.10241, with F = I = W = 1: ZB-H1 idles a third of 1F1B at its memory; ZB-V only while the pipeline fills."""
    m = 2 * p + extra
    h1, v, dual = (
        simulate(make_schedule(name, num_ranks=p, num_microbatches=m, chosen=1))
        for name in ("zero_bubble", "zbv", "dualpipev")
    )
    assert h1.makespan == 3 * m + p - 1
    assert h1.peak_activations() == [p] * p
    assert v.makespan == 6 * m + p - 1
    assert v.peak_activations() == [2 * p] * p  # of half-size stages
    assert dual.makespan == 6 * m + p - 1
    assert dual.peak_activations() == [2 * p + 1] * p


def _remote(message: Message) -> tuple[bool, int, int]:
    return message.is_gradient, message.stage, message.microbatch


@settings(deadline=None)
@given(name=st.sampled_from(SCHEDULES), p=RANKS, m=MICROBATCHES, chosen=st.integers(1, 3))
def test_programs_finish_even_if_every_message_is_a_rendezvous(name: str, p: int, m: int, chosen: int) -> None:
    """Sends that only complete when received (NCCL): an order of sends and receives that makes a circle of waits.

    The programs run here with every message blocking both of its ends, which is stricter than the executor.
    """
    schedule = make_schedule(name, num_ranks=p, num_microbatches=m, chosen=chosen)
    queues = [
        [one for step in program for one in (step.messages if isinstance(step, Exchange) else (step,))]
        for program in make_programs(schedule)
    ]
    have: list[set[tuple[bool, int, int]]] = [set() for _ in queues]
    progress = True
    while progress:
        progress = False
        for rank, queue in enumerate(queues):
            while queue and isinstance(queue[0], Action):
                action = queue.pop(0)
                key = (action.kind is not Kind.FORWARD, action.stage, action.microbatch)
                previous = action.stage + (1 if key[0] else -1)
                comes = action.kind is not Kind.WEIGHT and 0 <= previous < schedule.num_stages
                if comes and schedule.owner[previous] != rank:
                    have[rank].remove(key)  # KeyError: computed before it arrived
                progress = True
            if queue and isinstance(message := queue[0], Message) and message.source == rank:
                target = queues[message.target]
                if target and target[0] == message:
                    queue.pop(0)
                    target.pop(0)
                    have[message.target].add(_remote(message))
                    progress = True
    assert not any(queues)
    assert not any(have)


def _swap(schedule: Schedule, rank: int, i: int, j: int) -> Schedule:
    actions = list(schedule.ranks[rank])
    actions[i], actions[j] = actions[j], actions[i]
    return replace(schedule, ranks=(*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :]))


def test_a_schedule_that_cannot_finish_is_refused() -> None:
    """Negative control: a rank that wants its first backward before the forward it needs."""
    schedule = make_schedule("1f1b", num_ranks=2, num_microbatches=3, chosen=1)
    with pytest.raises(ValueError, match=r"cannot finish.*rank 0 at 0B0"):
        simulate(_swap(schedule, 0, 0, 2))


def test_an_incomplete_schedule_is_refused() -> None:
    """Negative control: an action left out, done twice, or of a stage that lies elsewhere."""
    schedule = make_schedule("zero_bubble", num_ranks=2, num_microbatches=3, chosen=1)
    first, second = schedule.ranks
    for broken in ((first[:-1], second), ((*first, first[0]), second), (second, first)):
        with pytest.raises(ValueError, match="is not complete"):
            simulate(replace(schedule, ranks=broken))


def test_evaluation_needs_no_backward() -> None:
    """A forward pass that is refused for the backward it does not have."""
    timeline = simulate(forward_only(placement("zbv", 3, 1), 4))
    assert len(timeline.spans) == 24


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 9), min_size=4, max_size=9), stages=st.integers(1, 4), last=st.integers(0, 12))
def test_balance_is_optimal(costs: list[int], stages: int, last: int) -> None:
    """A split that is not the best one: compared with all of them."""

    def dearest(sizes: list[int]) -> float:
        parts = [sum(costs[s.start : s.stop]) for s in make_stages(sizes)]
        return max([*parts[:-1], parts[-1] + last])

    def splits(layers: int, parts: int) -> list[list[int]]:
        if parts == 1:
            return [[layers]]
        return [[n, *rest] for n in range(1, layers - parts + 2) for rest in splits(layers - n, parts - 1)]

    found = balance([float(c) for c in costs], stages, last=last)
    assert sum(found) == len(costs)
    assert min(found) >= 1
    assert dearest(found) == min(dearest(sizes) for sizes in splits(len(costs), stages))
