"""Schedules: complete and free of deadlock at every size, and as good as their papers say."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Exchange, Kind, Message, Reduce, Step, Unshard
from parallel.pipeline.program import PLAN, check_programs, make_programs
from parallel.pipeline.schedules import SCHEDULES, Schedule, forward_only, make_schedule, placement
from parallel.pipeline.simulate import Costs, equal_costs, simulate, stage_costs
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
    timeline = simulate(schedule, equal_costs(forward, input_, weight, message=send))
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
    """2104.04473, section 2.2: (p-1)/v of a micro-batch's time, for micro-batches in whole rounds. In memory are at
    most those of the warm-up and one more, or all."""
    m = rounds * p
    timeline = simulate(make_schedule("interleaved_1f1b", num_ranks=p, num_microbatches=m, chosen=chosen))
    assert timeline.makespan == pytest.approx(3 * (m * chosen + p - 1))
    kept = [min(m * chosen, 2 * (p - 1 - rank) + (chosen - 1) * p + 1) for rank in range(p)]  # each of one stage
    assert timeline.peak_activations() == kept


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


@settings(deadline=None)
@given(
    name=st.sampled_from(SCHEDULES), p=RANKS, m=MICROBATCHES, chosen=st.integers(1, 3), unshards=st.booleans(),
    uneven=st.booleans(),
)  # fmt: skip
def test_every_program_is_proven(name: str, p: int, m: int, chosen: int, unshards: bool, uneven: bool) -> None:
    """A size at which sends and receives make a circle of waits, a receive comes late, or a collective is missing.

    make_programs proves what it makes, for any costs of the stages.
    """
    schedule = make_schedule(name, num_ranks=p, num_microbatches=m, chosen=chosen, unshards=unshards)
    costs = stage_costs([1.0 + uneven * (7 * stage % 5) for stage in range(schedule.num_stages)], message=0.01)
    steps = [step for program in make_programs(schedule, costs) for step in program]
    assert sum(isinstance(step, Reduce) for step in steps) == schedule.num_stages
    assert sum(isinstance(step, Unshard) for step in steps) == unshards * 2 * m * schedule.num_stages


def _programs(name: str = "1f1b", **changes: Any) -> tuple[Schedule, list[list[Step]]]:
    given = {"num_ranks": 3, "num_microbatches": 4, "chosen": 1, "unshards": True}
    schedule = make_schedule(name, **(given | changes))
    return schedule, [list(program) for program in make_programs(schedule)]


def _index(program: list[Step], step: Step | Message) -> int:
    return next(i for i, s in enumerate(program) if s == step or (isinstance(s, Exchange) and step in s.messages))


def test_programs_with_a_fault_are_refused() -> None:
    """Negative control of the proof: each kind of fault that it is there to find."""
    first = Message(False, 1, 0, 0, 1)

    def lost(programs: list[list[Step]]) -> None:
        del programs[1][_index(programs[1], first)]

    def too_early(programs: list[list[Step]]) -> None:
        programs[0].insert(0, programs[0].pop(_index(programs[0], first)))

    def unknown(programs: list[list[Step]]) -> None:
        programs[0].append(Exchange((replace(first, microbatch=9),)))

    def overtaken(programs: list[list[Step]]) -> None:
        at, then = _index(programs[1], first), _index(programs[1], replace(first, microbatch=1))
        programs[1][at], programs[1][then] = programs[1][then], programs[1][at]

    def unreduced(programs: list[list[Step]]) -> None:
        programs[1].remove(Reduce(1))

    expected = {
        lost: "rank 1 has 0 times, not 1: hidden states 0 for stage 1",
        too_early: "rank 0 sends before it has computed: hidden states 0",
        unknown: "rank 0 has 1 times, not 0: hidden states 9",
        overtaken: "rank 0 waits forever at hidden states 0 for stage 1 from rank 0 to 1; rank 1 waits forever",
        unreduced: "rank 1 has other actions than its schedule",
    }
    for fault, message in expected.items():
        schedule, programs = _programs()
        check_programs(schedule, [tuple(program) for program in programs])
        fault(programs)
        with pytest.raises(ValueError, match=re.escape(message)):
            check_programs(schedule, [tuple(program) for program in programs])


def test_a_program_that_receives_late_is_refused() -> None:
    """Negative control: it would finish, with a message on its way while its receiver does nothing."""
    schedule, programs = _programs("gpipe", num_ranks=2, unshards=False)
    message = Message(False, 1, 3, 0, 1)
    at = _index(programs[1], message)
    assert at < _index(programs[1], Action(Kind.FORWARD, 1, 2))
    assert programs[1].pop(at) == Exchange((message,))
    programs[1].insert(_index(programs[1], Action(Kind.FORWARD, 1, 3)), Exchange((message,)))
    with pytest.raises(ValueError, match="rank 1 starts to receive after 1F2, which could hide it: hidden states 3"):
        check_programs(schedule, [tuple(program) for program in programs])
    at = _index(programs[1], message)
    programs[1].insert(at + 2, programs[1].pop(at))
    with pytest.raises(ValueError, match="rank 1 computes 1F3 before it has received hidden states 3"):
        check_programs(schedule, [tuple(program) for program in programs])


@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_come_before_what_hides_them(name: str) -> None:
    """Gradients that travel while nobody computes: in GPipe, with ties of the plan broken the wrong way, all of them.

    Only what a rank idles for in the plan itself has no computation to hide it.
    """
    schedule = make_schedule(name, num_ranks=4, num_microbatches=12, chosen=2)
    spans = {span.action: span for span in simulate(schedule, PLAN).spans}
    exposed = hidden = 0
    for rank, program in enumerate(make_programs(schedule)):
        posted: dict[tuple[bool, int, int], Action | None] = {}
        newest: Action | None = None
        for step in program:
            if isinstance(step, Exchange):
                posted |= {(m.is_gradient, m.stage, m.microbatch): newest for m in step.messages if m.target == rank}
            elif isinstance(step, Action):
                key = (step.kind is not Kind.FORWARD, step.stage, step.microbatch)
                if step.kind is not Kind.WEIGHT and key in posted and newest is not None:
                    if posted[key] != newest:
                        hidden += 1
                    else:
                        exposed += 1
                        assert spans[step].start > spans[newest].end, "the rank had nothing to do meanwhile"
                newest = step
    assert hidden > 0
    if name == "gpipe":
        assert (hidden, exposed) == (2 * 3 * 11, 3), "of each direction all but the first; that gradient ends a wait"


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
    assert len(timeline.spans) == 24, "and no gradient to sum"


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


def test_costs_are_those_of_each_action() -> None:
    """A plan that takes the cost of another stage or micro-batch, or forgets what is not a computation.

    Two stages, two micro-batches, by hand: rank 0 gathers (0.5), F 1, F 1, waits; rank 1 gathers, F 3 and so on.
    """
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=2, chosen=1, unshards=True)
    costs = Costs(
        lambda a: (1.0 if a.stage == 0 else 3.0) * (2.0 if a.kind is Kind.BACKWARD else 1.0) / (1 + a.microbatch),
        message=lambda m: 10.0 if m.is_gradient else 0.25 * (1 + m.microbatch),
        unshard=lambda u: 0.5 if u.use.microbatch == 0 else 0.0,
        reduce=lambda r: 4.0 if r.stage == 0 else 40.0,
    )
    timeline = simulate(schedule, costs)
    of = {str(span.action): (span.start, span.end) for span in timeline.spans}
    assert of["unshard(0F0)"] == (0.0, 0.5)
    assert (of["0F0"], of["0F1"]) == ((0.5, 1.5), (1.5, 2.0))
    assert (of["1F0"], of["1F1"]) == ((1.75, 4.75), (4.75, 6.25))
    assert of["unshard(1B0)"] == (6.25, 6.75)
    assert (of["1B0"], of["1B1"]) == ((6.75, 12.75), (12.75, 15.75))
    assert (of["0B0"], of["0B1"]) == ((22.75, 24.75), (25.75, 26.75))
    assert of["reduce(0)"] == (26.75, 30.75)
    assert of["reduce(1)"] == (15.75, 55.75)
    assert timeline.makespan == 55.75
    assert timeline.bubble == pytest.approx(1 - 18.0 / (2 * 55.75))


def test_collectives_in_the_wrong_place_are_refused() -> None:
    """Negative control: parameters gathered never, for nothing or too early; gradients summed never, twice or early."""
    schedule = make_schedule("zero_bubble", num_ranks=2, num_microbatches=3, chosen=1, unshards=True)
    first, second = schedule.ranks
    of_forward, of_backward = Unshard(Action(Kind.FORWARD, 0, 0)), Unshard(Action(Kind.INPUT, 0, 0))
    without = tuple(a for a in first if a != of_backward)
    early = list(without)
    early.insert(early.index(Action(Kind.FORWARD, 0, 1)), of_backward)
    ends = [a for a in first if not isinstance(a, Reduce)]
    broken = {
        without: "0I0 follows no unshard",
        tuple(early): "0I0 follows no unshard",
        (*first, of_forward): r"unshard\(0F0\) has no use",
        (*first, Reduce(0)): "stage 0 is reduced 2 times",
        tuple(ends): "stage 0 is reduced 0 times",
        (*ends[:-1], Reduce(0), ends[-1]): r"0W2 comes after reduce\(0\)",
    }
    for actions, message in broken.items():
        with pytest.raises(ValueError, match=message):
            simulate(replace(schedule, ranks=(actions, second)))
    with pytest.raises(ValueError, match="finds whole parameters"):
        simulate(replace(schedule, unshards=False))
    evaluation = forward_only(schedule.owner, 2)
    with pytest.raises(ValueError, match="stage 0 is reduced 1 times after 0 contributions"):
        simulate(replace(evaluation, ranks=((*evaluation.ranks[0], Reduce(0)), evaluation.ranks[1])))
