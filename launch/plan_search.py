"""`launch/plan.py --search`: every layout that the trainer would accept, ranked by predicted time.

Whether a layout is legal is asked of trainer.validate; here is only what is tried at all.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from parallel.dims import divisors
from parallel.dims import problems as dims_problems
from parallel.problem import shown
from planner.hardware import Hardware, world_problems
from planner.plan import room
from planner.search import Changes, Ladder, Layout, Neighbour, Ranking, Rung, cost_of, neighbours, rank_layouts
from trainer.config import ConfigError, TrainConfig
from trainer.predicted import job_of
from trainer.validate import resolve

PLACES = 6
MAX_CP = 8
MICRO_BATCHES = (1, 2, 4, 8)
SCHEDULES = ("1f1b", "interleaved_1f1b")
CHECKPOINTS = ("none", "selective", "full")
"""Of model.activation_checkpoint, from least recomputation to most: each needs less memory and more time."""
SEARCHED = (
    "parallel.pp", "parallel.dp_replicate", "parallel.cp", "parallel.tp", "parallel.ep", "parallel.sequence_parallel",
    "parallel.zero_stage", "parallel.pp_schedule", "train.micro_batch_size", "model.activation_checkpoint",
)  # fmt: skip
GIB = 2**30


@dataclass(frozen=True)
class Found:
    """What a search says: for planner.search_report."""

    ranking: Ranking
    others: list[Neighbour]  # of the winner
    command: str  # that runs the winner


def held_by(arguments: Sequence[str]) -> set[str]:
    """Searched fields that the command line sets: they stay. `parallel=NAME` holds the ZeRO stage."""
    keys = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    held = keys & {*SEARCHED, "parallel.dp_shard"}
    return held | {"parallel.zero_stage"} if "parallel" in keys else held


def search(
    config: TrainConfig, hardware: Hardware, *, world_size: int, held: Set[str], arguments: Sequence[str]
) -> Found:
    """config: as composed. held: fields that keep its values. arguments: of the command, to repeat in the winner's.

    Raises ConfigError where no layout is legal, or none fits, with the nearest one.
    """
    space = _Space(config, hardware, world_size, held)
    ranking = rank_layouts(space.ladders(), hardware, places=PLACES)
    if not ranking.layouts:
        raise ConfigError(_refusal(space, ranking))
    winner = ranking.layouts[0]
    others = neighbours(winner, space.choices_around(winner), space.legal, hardware)
    command = space.command(winner, arguments)
    return Found(ranking, others, command)


class _Space:
    """The layouts that are tried, as changes of a configuration."""

    def __init__(self, config: TrainConfig, hardware: Hardware, world_size: int, held: Set[str]) -> None:
        self.config, self.hardware, self.world_size, self.held = config, hardware, world_size, held
        self.problem = ""  # of the layout that was refused last

    def legal(self, changes: Changes) -> Rung | None:
        """The layout, if the trainer accepts it."""
        done, problems = resolve(_changed(self.config, changes), self.world_size)
        if problems:
            self.problem = problems[0]
            return None
        return Rung(changes, job_of(done, world_size=self.world_size))

    def ladders(self) -> Iterator[Ladder]:
        """Every layout, from least recomputation to most."""
        checkpoints = self._of("model.activation_checkpoint", CHECKPOINTS)
        for split in self._splits():
            if dims_problems(_changed(self.config, split).parallel, self.world_size):
                continue
            for inner in self._inner(split):
                yield Ladder(
                    [split | inner | {"model.activation_checkpoint": mode} for mode in checkpoints], self.legal
                )

    def _of(self, field: str, values: Sequence[Any]) -> Sequence[Any]:
        """Of a field: its own value where that is held."""
        group, name = field.split(".")
        return [getattr(getattr(self.config, group), name)] if field in self.held else values

    def _splits(self) -> Iterator[dict[str, Any]]:
        """Numbers of ranks of each axis."""
        world, node = self.world_size, self.hardware.gpus_per_node
        experts = self.config.model.moe.num_experts
        axes = {
            "parallel.tp": divisors(min(world, node)),  # so that no group crosses nodes
            "parallel.pp": [d for d in divisors(world) if d <= self.config.model.num_layers],
            "parallel.cp": [d for d in divisors(world) if d <= MAX_CP],
            "parallel.ep": divisors(experts) if experts else [1],
        }
        for tp, pp, cp, ep in itertools.product(*(self._of(field, values) for field, values in axes.items())):
            if world % (tp * pp * cp):
                continue
            left = world // (tp * pp * cp)
            in_node = max(1, node // (tp * cp))  # of dp_shard
            replicas = [1, left // in_node] if left > in_node and left % in_node == 0 else [1]
            for dp_replicate in self._of("parallel.dp_replicate", replicas):
                yield {
                    "parallel.pp": pp, "parallel.dp_replicate": dp_replicate, "parallel.cp": cp, "parallel.tp": tp,
                    "parallel.ep": ep,
                }  # fmt: skip

    def _inner(self, split: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """All else that is tried with a split. Sequence parallelism wherever it is legal: it costs nothing."""
        ranks = self.world_size // (split["parallel.pp"] * split["parallel.tp"])
        dp = ranks // split["parallel.cp"]
        share = max(1, self.config.train.global_batch_size // dp)  # sequences of a rank
        one_shard = ranks == split["parallel.dp_replicate"]
        choices = {
            "parallel.sequence_parallel": [split["parallel.tp"] > 1],
            "parallel.zero_stage": [1] if one_shard else [1, 2, 3],
            "parallel.pp_schedule": SCHEDULES if split["parallel.pp"] > 1 else SCHEDULES[:1],
            "train.micro_batch_size": [n for n in MICRO_BATCHES if n <= share],
        }
        for values in itertools.product(*(self._of(field, values) for field, values in choices.items())):
            yield dict(zip(choices, values, strict=True))

    def choices_around(self, winner: Layout) -> dict[str, Sequence[Any]]:
        """What else each field but the degrees could be."""
        choices: dict[str, Sequence[Any]] = {
            "parallel.zero_stage": (1, 2, 3),
            "train.micro_batch_size": [n for n in MICRO_BATCHES if n <= sum(winner.job.sequences)],
            "model.activation_checkpoint": CHECKPOINTS,
        }
        if winner.job.dims.pp > 1:
            choices["parallel.pp_schedule"] = SCHEDULES
        return {field: values for field, values in choices.items() if field not in self.held}

    def command(self, layout: Layout, arguments: Sequence[str]) -> str:
        """The command line that trains so: the one given, with what the layout changes."""
        kept = [a for a in arguments if not a.lstrip("+").startswith(("plan.", "format=", "--"))]
        changes = [f"{field}={shown(value)}" for field, value in _differing(self.config, layout.changes).items()]
        node = min(self.world_size, self.hardware.gpus_per_node)
        nodes = f"--nnodes {self.world_size // node} " if self.world_size > node else ""
        return f"torchrun {nodes}--nproc-per-node {node} launch/train.py {shlex.join([*kept, *changes])}"


def _changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    """A copy of what changes; the rest is shared."""
    groups: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        group, name = field.split(".")
        groups.setdefault(group, {})[name] = value
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in groups.items()})


def _differing(config: TrainConfig, changes: Changes) -> dict[str, Any]:
    found = {}
    for field, value in changes.items():
        group, name = field.split(".")
        if getattr(getattr(config, group), name) != value:
            found[field] = value
    return found


# ---- where nothing fits


def _refusal(space: _Space, ranking: Ranking) -> list[str]:
    if ranking.nearest is None:
        return [
            f"plan.search=true: no layout of {space.world_size} GPUs is legal; of the last one tried: {space.problem}"
        ]
    nearest, hardware = ranking.nearest, space.hardware
    excess = nearest.peak - room(hardware)
    fits = [shown_changes(change) for change in _remedies(nearest) if _fits(space, nearest, change)]
    whole = [n for n in (2, 4, 8, 16) if not world_problems(n * space.world_size, hardware)]
    more = next((n for n in whole if _fits(_with_gpus(space, n), nearest, {})), None)
    if more is not None:
        fits.append(f"plan.gpus={more * space.world_size}")
    advice = f"with it would fit: {', or '.join(fits)}" if fits else "no single change that was tried would make it fit"
    return [
        f"plan.search=true: of {ranking.num_legal} legal layouts none fits {space.world_size} x {hardware.name}; the "
        f"nearest, {shown_changes(nearest.changes)}, needs {nearest.peak / GIB:.1f} GiB of {room(hardware) / GIB:.1f}, "
        f"{round(excess):,} bytes too many; {advice}"
    ]


def shown_changes(changes: Changes) -> str:
    """As overrides."""
    return " ".join(f"{field}={shown(value)}" for field, value in changes.items())


def _remedies(nearest: Layout) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"model.activation_checkpoint": "full"},
        {"optim.state_dtype": "int8"},
        {"parallel.zero_stage": 3, "parallel.cpu_offload": True},
    ]
    length = nearest.job.seq_len
    return found + [{"train.seq_len": length // n} for n in (2, 4) if length % n == 0]


def _fits(space: _Space, nearest: Layout, change: Changes) -> bool:
    if change and all(nearest.changes.get(field) == value for field, value in change.items()):
        return False
    rung = space.legal({**nearest.changes, **change})
    return rung is not None and cost_of(rung, space.hardware).peak <= room(space.hardware)


def _with_gpus(space: _Space, times: int) -> _Space:
    return _Space(space.config, space.hardware, times * space.world_size, space.held)
