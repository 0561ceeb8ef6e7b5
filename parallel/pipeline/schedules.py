"""Schedules as data: what each rank computes, in which order. Pure functions of ranks, stages and micro-batches.

    name               stages per rank  backward  source
    gpipe              1                whole     1811.06965
    1f1b               1                whole     PipeDream-Flush, 2006.09503; Megatron-LM, 2104.04473
    interleaved_1f1b   chosen           whole     Megatron-LM, 2104.04473, section 2.2
    zero_bubble        1                split     ZB-H1, 2401.10241, section 2.2
    zbv                2, in a V        split     ZB-V, 2401.10241, section 5
    dualpipev          2, in a V        both      DualPipe (2412.19437, section 3.2.1), cut in half

Each of these functions orders computations. `make_schedule` adds what a stage does together with other data-parallel
ranks: Unshard before every computation that needs parameters, where these lie in shards, and one Reduce per stage. What
must be sent follows from all this (program.py), and whether it can finish at all is proven before it runs (simulate.py,
program.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Action, Collective, Kind, Reduce, Unshard


@dataclass(frozen=True)
class Schedule:
    """Actions of every rank in order."""

    name: str
    num_microbatches: int
    owner: tuple[int, ...]  # rank of each stage
    ranks: tuple[tuple[Action | Collective, ...], ...]
    unshards: bool = False  # parameters lie in shards and are gathered for each use

    @property
    def num_stages(self) -> int:
        return len(self.owner)


def loop(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Rank of each stage when stages go round the ranks: 0, 1, ..., 0, 1, ..."""
    return tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank))


def vee(num_ranks: int) -> tuple[int, ...]:
    """Rank of each of two stages per rank when the second half comes back: 0, 1, ..., 1, 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


class _Rank:
    """The list of one rank under construction; each call takes the next micro-batch of its kind and stage."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[Kind, int], int] = {}

    def done(self, kind: Kind, stage: int) -> int:
        """How many micro-batches that kind of action has seen on that stage."""
        return self._next.get((kind, stage), 0)

    def add(self, kind: Kind, stage: int) -> None:
        microbatch = self.done(kind, stage)
        self._next[kind, stage] = microbatch + 1
        self.actions.append(Action(kind, stage, microbatch))

    def forward(self, stage: int) -> None:
        self.add(Kind.FORWARD, stage)

    def backward(self, stage: int) -> None:
        """Input and weight gradients at once. Counts for both, so that a later `weight` goes on with the next."""
        self._next[Kind.WEIGHT, stage] = self.done(Kind.WEIGHT, stage) + 1
        self._next[Kind.INPUT, stage] = self.done(Kind.INPUT, stage) + 1
        self.actions.append(Action(Kind.BACKWARD, stage, self.done(Kind.INPUT, stage) - 1))

    def input(self, stage: int) -> None:
        self.add(Kind.INPUT, stage)

    def weight(self, stage: int) -> None:
        self.add(Kind.WEIGHT, stage)


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    ranks = []
    for rank in range(num_ranks):
        build = _Rank()
        for _ in range(num_microbatches):
            build.forward(rank)
        for _ in range(num_microbatches):
            build.backward(rank)
        ranks.append(tuple(build.actions))
    return Schedule("gpipe", num_microbatches, loop(num_ranks, 1), tuple(ranks))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """As few forwards ahead as the pipeline needs, then one forward and one backward in turn."""
    ranks = []
    for rank in range(num_ranks):
        ahead = min(num_microbatches, num_ranks - 1 - rank)
        build = _Rank()
        for _ in range(ahead):
            build.forward(rank)
        for _ in range(num_microbatches - ahead):
            build.forward(rank)
            build.backward(rank)
        for _ in range(ahead):
            build.backward(rank)
        ranks.append(tuple(build.actions))
    return Schedule("1f1b", num_microbatches, loop(num_ranks, 1), tuple(ranks))


def _without_padding(name: str, num_microbatches: int, owner: tuple[int, ...], ranks: Iterable[_Rank]) -> Schedule:
    """A schedule made for more micro-batches, cut down to those there are.

    Actions depend on actions of their own micro-batch and on their place in a rank's list; taking out whole
    micro-batches keeps every remaining dependency, so what could finish still can.
    """
    cut = tuple(tuple(a for a in rank.actions if a.microbatch < num_microbatches) for rank in ranks)
    return Schedule(name, num_microbatches, owner, cut)


def interleaved_1f1b(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """1F1B over rounds of num_ranks micro-batches, which pass through one stage of a rank after the other."""
    padded = -(-num_microbatches // num_ranks) * num_ranks
    # Index of the stage, among those of a rank, that the k-th forward runs; backwards run them in reverse.
    order = [k % (num_ranks * stages_per_rank) // num_ranks for k in range(padded * stages_per_rank)]
    ranks = []
    for rank in range(num_ranks):
        ahead = min(len(order), 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks)
        forwards = [rank + num_ranks * chunk for chunk in order]
        backwards = [rank + num_ranks * (stages_per_rank - 1 - chunk) for chunk in order]
        build = _Rank()
        for stage in forwards[:ahead]:
            build.forward(stage)
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            build.forward(forward)
            build.backward(backward)
        for stage in backwards[len(order) - ahead :]:
            build.backward(stage)
        ranks.append(build)
    return _without_padding("interleaved_1f1b", num_microbatches, loop(num_ranks, stages_per_rank), ranks)


def zero_bubble(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B's memory; rank r leaves the weight gradients of r micro-batches for the time it would idle."""
    padded = max(num_microbatches, num_ranks)
    ranks = []
    for rank in range(num_ranks):
        ahead = num_ranks - 1 - rank
        build = _Rank()
        for _ in range(ahead):
            build.forward(rank)
        for i in range(padded - ahead):
            build.forward(rank)
            build.input(rank)
            if i >= rank:
                build.weight(rank)
        for _ in range(ahead):
            build.input(rank)
            build.weight(rank)
        while build.done(Kind.WEIGHT, rank) < padded:
            build.weight(rank)
        ranks.append(build)
    return _without_padding("zero_bubble", num_microbatches, loop(num_ranks, 1), ranks)


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: the last stage sits beside the first, so that the first backward starts early and weight gradients fill."""
    padded = max(num_microbatches, 2 * num_ranks - 1)
    ranks = []
    for rank in range(num_ranks):
        down, up = rank, 2 * num_ranks - 1 - rank
        build = _Rank()
        for _ in range(2 * (num_ranks - rank) - 1):
            build.forward(down)
        for _ in range(rank):
            build.forward(up)
            build.forward(down)
        for _ in range(num_ranks - rank):
            build.forward(up)
            build.input(up)
            build.weight(up)
        while build.done(Kind.FORWARD, up) < padded:
            if build.done(Kind.FORWARD, down) < padded:
                build.forward(down)
            build.input(down)
            build.weight(down)
            build.forward(up)
            build.input(up)
            build.weight(up)
        for _ in range(rank):
            build.input(down)
            build.input(up)
        for _ in range(num_ranks - rank):
            build.input(down)
            build.weight(down)
        for stage in (up, down):
            while build.done(Kind.WEIGHT, stage) < padded:
                build.weight(stage)
        ranks.append(build)
    return _without_padding("zbv", num_microbatches, vee(num_ranks), ranks)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe-V: forwards of one half of the V run beside backwards of the other; the tail splits its backwards.

    The eight phases are those of DeepSeek's schedule, whose forward-backward pairs run one after the other here.
    """
    padded = max(num_microbatches, 2 * num_ranks)
    ranks = []
    for rank in range(num_ranks):
        down, up = rank, 2 * num_ranks - 1 - rank
        after = num_ranks - 1 - rank  # ranks further down
        build = _Rank()
        for _ in range(2 * after):
            build.forward(down)
        for _ in range(rank + 1):
            build.forward(down)
            build.forward(up)
        for _ in range(after):
            build.input(up)
            build.weight(up)
            build.forward(up)
        for _ in range(padded - 2 * num_ranks + rank + 1):
            build.forward(down)
            build.backward(up)
            build.forward(up)
            build.backward(down)
        for _ in range(after):
            build.backward(up)
            build.forward(up)
            build.backward(down)
        # In the tail, weight gradients are put off from half way on.
        splits = [False] * (rank + 1) + [True] * (rank + 1)
        for stage, split in zip((up, down) * (rank + 1), splits, strict=True):
            if split:
                build.input(stage)
            else:
                build.backward(stage)
        owed = [a for a in build.actions if a.kind is Kind.INPUT]
        owed = [a for a in owed if Action(Kind.WEIGHT, a.stage, a.microbatch) not in build.actions]
        for _ in range(after):
            if owed:
                first = owed.pop(0)
                build.actions.append(Action(Kind.WEIGHT, first.stage, first.microbatch))
            build.input(down)
            owed.append(build.actions[-1])
        build.actions += [Action(Kind.WEIGHT, a.stage, a.microbatch) for a in owed]
        ranks.append(build)
    return _without_padding("dualpipev", num_microbatches, vee(num_ranks), ranks)


def _with_collectives(schedule: Schedule, *, unshards: bool) -> Schedule:
    """The same computations, with what ranks that share a stage do together.

    Unshard stands directly before its use: what it hides is the wait for the message that the use needs. Earlier it
    would be wrong or useless. Under ZeRO-3 a computation gathers its layers one after the other and frees each as it
    leaves it, so behind another stage's computation there would be a layer more in memory than it promises, behind one
    of the same stage the layer would be free again, and fully_shard throws away every gather on its way when a backward
    ends.
    """
    ranks = []
    for actions in schedule.ranks:
        last = {a.stage: a for a in actions if isinstance(a, Action) and a.kind is not Kind.FORWARD}
        together: list[Action | Collective] = []
        for action in actions:
            assert isinstance(action, Action)
            together += [Unshard(action)] * (unshards and action.walks_layers)
            together.append(action)
            together += [Reduce(action.stage)] * (last.get(action.stage) == action)
        ranks.append(tuple(together))
    return replace(schedule, ranks=tuple(ranks), unshards=unshards)


def forward_only(owner: tuple[int, ...], num_microbatches: int, *, unshards: bool = False) -> Schedule:
    """Every forward and nothing else, for evaluation: stage by stage."""
    ranks = tuple(
        tuple(
            Action(Kind.FORWARD, stage, microbatch)
            for stage in range(len(owner))
            if owner[stage] == rank
            for microbatch in range(num_microbatches)
        )
        for rank in range(max(owner) + 1)
    )
    return _with_collectives(Schedule("forward_only", num_microbatches, owner, ranks), unshards=unshards)


_ONE_STAGE: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zero_bubble": zero_bubble,
}
_VEE: dict[str, Callable[[int, int], Schedule]] = {"zbv": zbv, "dualpipev": dualpipev}

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")
"""Schedules with I and W, which need layers that can put their weight gradients off."""


def stages_per_rank(name: str, chosen: int) -> int:
    """How many stages a rank holds under a schedule; `chosen` counts for interleaved_1f1b alone."""
    return chosen if name == "interleaved_1f1b" else 2 if name in _VEE else 1


def placement(name: str, num_ranks: int, chosen: int) -> tuple[int, ...]:
    """Rank of each stage."""
    return vee(num_ranks) if name in _VEE else loop(num_ranks, stages_per_rank(name, chosen))


def make_schedule(name: str, *, num_ranks: int, num_microbatches: int, chosen: int, unshards: bool = False) -> Schedule:
    """The schedule of that name; one of SCHEDULES. unshards: parameters lie in shards and are gathered for each use."""
    if name == "interleaved_1f1b":
        schedule = interleaved_1f1b(num_ranks, num_microbatches, chosen)
    else:
        schedule = (_ONE_STAGE | _VEE)[name](num_ranks, num_microbatches)
    return _with_collectives(schedule, unshards=unshards)
